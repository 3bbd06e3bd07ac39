"""The engine's CDAM equals the reference's, on every kind of Vision Transformer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from cdam_engine import Explainer, Output, TopK
from reference.agreement import BATCH, Agreement, alone, explanation, in_batch, targets
from reference.cdam_reference import cdam
from reference.models import BY_ID, CASES, Case, build, images, require

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}

every_case = pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
both_precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])


@every_case
def test_map_of_one_image_equals_reference(case: Case) -> None:
    require(case)
    _check(alone(case, torch.float64), TOLERANCE[torch.float64])


@every_case
def test_maps_in_a_batch_equal_reference(case: Case) -> None:
    """Different images, each with targets of its own, against the reference on each image and target alone."""
    require(case)
    _check(in_batch(case, torch.float64), TOLERANCE[torch.float64])


@every_case
def test_single_precision_is_as_close_to_the_truth_as_its_rounding_allows(case: Case) -> None:
    require(case)
    assert in_batch(case, torch.float32, truth=torch.float64).maps < 5e-5


@every_case
@both_precisions
def test_logits_equal_the_plain_models(case: Case, dtype: torch.dtype) -> None:
    require(case)
    with torch.no_grad():
        logits = build(case, dtype)(images(case, BATCH, dtype)).numpy()
    found = explanation(case, dtype)
    for item, plain in zip(found, logits, strict=True):
        assert item.logits.dtype == plain.dtype
        assert all(relevance.scores.dtype == plain.dtype for relevance in item.maps)
        np.testing.assert_allclose(item.logits, plain, rtol=0, atol=TOLERANCE[dtype] * np.abs(plain).max())
        for target in item.targets:
            assert target.value == item.logits[target.index]


@every_case
def test_targets_come_back_in_the_order_asked_for(case: Case) -> None:
    require(case)
    for item, wanted in zip(explanation(case, torch.float64), targets(case), strict=True):
        order = np.argsort(-item.logits, kind="stable")
        indices: list[int] = []
        for target in wanted:
            indices += [target.index] if isinstance(target, Output) else order[: target.k].tolist()
        assert [target.index for target in item.targets] == indices
        assert len(item.maps) == len(indices)


@both_precisions
@pytest.mark.parametrize("name", ["vit_small", "beit_token", "dinov3_token", "perception_encoder"])
def test_without_fused_attention(name: str, dtype: torch.dtype) -> None:
    """timm writes attention out where it can't be fused; the engine must follow."""
    case = BY_ID[name]
    require(case)
    model = copy.deepcopy(build(case, dtype))
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    found = Explainer(model).explain(images(case, BATCH, dtype), targets(case))
    for item, fused in zip(found, explanation(case, dtype), strict=True):
        for relevance, same in zip(item.maps, fused.maps, strict=True):
            atol = TOLERANCE[dtype] * np.abs(same.scores).max()
            np.testing.assert_allclose(relevance.scores, same.scores, rtol=0, atol=atol)


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (16, 16)], ids=str)
def test_one_explainer_serves_several_image_sizes(size: tuple[int, int]) -> None:
    case = BY_ID["dynamic_size"]
    resized = Case(case.id, case.timm_name, size, (size[0] // 16, size[1] // 16), options=case.options)
    model = build(case)
    explainer = Explainer(model)
    pixels = images(resized, 2)
    for image, item in zip(pixels, explainer.explain(pixels, [[TopK(1)], [Output(3)]]), strict=True):
        truth = cdam(model, image, item.targets[0].index)
        np.testing.assert_allclose(item.maps[0].scores, truth.scores.numpy(), rtol=1e-10, atol=1e-12)


def _check(agreement: Agreement, tolerance: float) -> None:
    assert agreement.maps <= tolerance
    assert agreement.logits <= tolerance
    assert agreement.prefix_share <= tolerance
