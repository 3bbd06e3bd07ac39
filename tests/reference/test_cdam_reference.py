"""The reference and the zoo, before anything is compared with them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from reference.agreement import BATCH, expected
from reference.cdam_reference import cdam, relative_error
from reference.models import BY_ID, CASES, Case, build, images, require

every_case = pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])


@every_case
def test_zoo_is_not_degenerate(case: Case) -> None:
    """Maps are uneven and signed or at least graded, differ between images and outputs, and prefix tokens count."""
    require(case)
    pairs = list(itertools.product(range(BATCH), sorted({0, case.outputs - 1})))
    answers = [expected(case, torch.float64, image, output) for image, output in pairs]
    for answer in answers:
        assert answer.scores.shape == case.grid
        assert answer.scores.std() > 0.05 * answer.scores.abs().max() > 0.001
        assert (answer.prefix_share > 0) == (case.prefix > 0)
        assert answer.prefix_share < 1
    for one, other in itertools.combinations(answers, 2):
        assert relative_error(one.scores, other.scores) > 0.01
    assert build(case).num_prefix_tokens == case.prefix


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(BY_ID[name], id=name)
        for name in ("eight_outputs", "deit_distilled", "dinov2_registers", "siglip", "beit", "rope_mixed")
    ],
)
def test_score_is_the_derivative_under_scaling_of_a_token(case: Case) -> None:
    """`S_i = d/de f(T with token i times (1 + e))` at e = 0, by central differences: no autograd involved."""
    require(case)
    model = build(case)
    image = images(case, 1)[0]
    output = case.outputs - 1
    step = 1e-5
    tokens = case.prefix + case.grid[0] * case.grid[1]

    def logits_when_scaled(factor: float) -> Tensor:
        def scale(_module: nn.Module, _args: tuple[Tensor, ...], normed: Tensor) -> Tensor:
            # Image i of the batch has its token i scaled.
            return normed * (1 + (factor - 1) * torch.eye(tokens, dtype=normed.dtype)[:, :, None])

        with model.blocks[-1].norm1.register_forward_hook(scale), torch.no_grad():
            return model(image.expand(tokens, -1, -1, -1))[:, output]

    scores = (logits_when_scaled(1 + step) - logits_when_scaled(1 - step)) / (2 * step)

    answer = cdam(model, image, output)
    assert relative_error(answer.scores.flatten(), scores[case.prefix :]) < 1e-7
    share = scores[: case.prefix].abs().sum() / scores.abs().sum()
    assert answer.prefix_share == pytest.approx(float(share), rel=1e-6, abs=1e-12)


def test_reference_leaves_nothing_behind() -> None:
    model = build(BY_ID["eight_outputs"])
    with pytest.raises(IndexError):
        cdam(model, images(BY_ID["eight_outputs"], 1)[0], 8)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(weight.grad is None for weight in model.parameters())
