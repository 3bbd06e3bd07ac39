"""What the scheduler is told of a request's work."""

import timm

from cdam_engine import Cdam, Explainer, IntegratedCdam, SmoothCdam, SmoothGrad, TokenAblation


def _explainer(name: str) -> Explainer:
    return Explainer(timm.create_model(name, depth=4, embed_dim=32, num_heads=2, img_size=32).eval())


def test_in_closed_form_gradients_are_nearly_free() -> None:
    explainer = _explainer("vit_tiny_patch16_224")
    assert 1 < explainer.cost([Cdam()], 1, 4) < 1.1
    assert 1 < explainer.cost([IntegratedCdam(steps=50)], 1, 4) < 1.5
    assert explainer.cost([IntegratedCdam(tolerance=1e-3)], 1, 4) > explainer.cost([IntegratedCdam()], 1, 4) + 4


def test_by_autograd_each_costs_a_part_of_the_model() -> None:
    explainer = _explainer("vit_base_patch16_siglip_gap_224")
    assert explainer.cost([SmoothCdam(samples=8)], 2, 4) == 1 + 8 * 2 * 3 / 4


def test_passes_through_the_whole_model_count_in_full() -> None:
    explainer = _explainer("vit_tiny_patch16_224")
    assert explainer.cost([TokenAblation(), SmoothGrad(samples=5)], 3, 196) == 1 + 196 + 15
