"""SAM's image encoder: tokens on a grid, windows, a neck. The model itself is listened to; nothing is shared with the engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from cdam_engine import (
    Attention,
    Cdam,
    Concept,
    Explainer,
    InputXGradient,
    IntegratedCdam,
    Output,
    PatchMaskPrediction,
    Readout,
    TokenAblation,
    UnsupportedMethodError,
)
from reference.models import randomise

SIZE = (80, 64)
GRID = (5, 4)
SMALL: dict[str, Any] = {"img_size": SIZE, "embed_dim": 48, "depth": 2, "num_heads": 3}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": ("samvit_base_patch16_224", {"num_classes": 5, "window_size": 0}),
    "last block whole": ("samvit_base_patch16_224", {"num_classes": 5, "window_size": 3, "global_attn_indexes": (1,)}),
    "padded windows": ("samvit_base_patch16_224", {"num_classes": 5, "window_size": 3}),
    "relative positions": ("samvit_base_patch16_224", {"num_classes": 5, "window_size": 2, "use_rel_pos": True}),
    "neck": ("samvit_base_patch16", {"window_size": 3, "neck_chans": 24, "num_classes": 0}),
    "neck and head": ("samvit_base_patch16", {"window_size": 3, "neck_chans": 24, "num_classes": 5}),
    "max pool": ("samvit_base_patch16_224", {"num_classes": 5, "window_size": 3, "global_pool": "max"}),
}


def build(kind: str) -> nn.Module:
    name, options = KINDS[kind]
    model: nn.Module = timm.create_model(name, **{**SMALL, **options})
    randomise(model, seed=5)
    return model.double().eval()


def pixels() -> Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0)).double()


def heard(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """T, shape (B, h, w, D), on a graph to the outputs (B, C)."""
    seen: list[Tensor] = []
    handle = model.blocks[-1].norm1.register_forward_hook(lambda _module, _given, out: seen.append(out))
    outputs = model(x.requires_grad_())
    handle.remove()
    return seen[0], outputs


@pytest.mark.parametrize("kind", KINDS)
def test_maps_equal_a_full_backward_pass(kind: str) -> None:
    model = build(kind)
    explainer = Explainer(model)
    tokens, outputs = heard(model, pixels())
    if explainer.vit.num_outputs:
        targets: list[Any] = [Output(3), Output(0)]
        values = [outputs[:, 3], outputs[:, 0]]
    else:
        vector = torch.randn(outputs.shape[1], generator=torch.Generator().manual_seed(1)).double()
        targets, values = [Concept(vector)], [outputs @ vector]
    found = explainer.explain(pixels(), [targets] * 2, [[Cdam(), InputXGradient()]] * 2)
    for k, value in enumerate(values):
        (gradient,) = torch.autograd.grad(value.sum(), tokens, retain_graph=True)
        expected = (gradient * tokens).sum(dim=-1).detach().numpy()
        for image, explanation in enumerate(found):
            assert explanation.grid == GRID
            np.testing.assert_allclose(
                explanation.maps[k].scores, expected[image], rtol=0, atol=1e-10 * abs(expected).max()
            )
    answered = np.stack([its.logits if explainer.vit.num_outputs else its.latent for its in found])
    np.testing.assert_allclose(answered, outputs.detach().numpy(), rtol=0, atol=1e-10)


def test_integrated_cdam_is_complete() -> None:
    (found,) = Explainer(build("neck and head")).explain(
        pixels()[:1], [[Output(2)]], [[IntegratedCdam(steps=64, quadrature="gauss_legendre")]]
    )
    assert abs(found.maps[0].completeness_residual) < 1e-6


def test_what_it_can_not_be_asked_for() -> None:
    for kind in KINDS:
        explainer = Explainer(build(kind))
        with pytest.raises(UnsupportedMethodError):
            explainer.check(TokenAblation())
        with pytest.raises(UnsupportedMethodError):
            explainer.check(Attention())
        pool = Readout.MAX_POOL if kind == "max pool" else Readout.AVERAGE_POOL
        assert explainer.vit.readout is pool


@pytest.mark.parametrize("kind", ["padded windows", "neck and head"])
def test_patch_mask_prediction_asks_of_each_token_that_is_pooled(kind: str) -> None:
    model = build(kind)
    method = PatchMaskPrediction("identity")
    (found,) = Explainer(model).explain(pixels()[:1], [[Output(1)]], [[method]])
    final: list[Tensor] = []
    model.neck.register_forward_hook(lambda _module, _given, out: final.append(out))
    model(pixels()[:1])
    alone = final[0].permute(0, 2, 3, 1).reshape(-1, final[0].shape[1], 1, 1)
    expected = model.head(alone)[:, 1].reshape(GRID).detach().numpy()
    np.testing.assert_allclose(found.maps[0].scores, expected, rtol=0, atol=1e-10)
