"""A second opinion: captum's gradient times activation at the last block's first norm is CDAM before pooling rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import LayerGradientXActivation

from cdam_engine import Explainer, Output, TopK
from reference.models import BY_ID, build, images


@pytest.mark.parametrize("name", ["vit_small", "deit_distilled", "dinov2_registers", "siglip", "eva02", "beit_token"])
def test_map_equals_captum(name: str) -> None:
    case = BY_ID[name]
    model, pixels = build(case), images(case, 3)
    outputs = [0, case.outputs - 1, case.outputs // 2]

    attribution = LayerGradientXActivation(model, model.blocks[-1].norm1).attribute(pixels, target=outputs)
    captum = attribution.detach().sum(dim=-1)

    found = Explainer(model).explain(pixels, [[Output(output)] for output in outputs])
    for item, scores in zip(found, captum.numpy(), strict=True):
        expected = scores[case.prefix :].reshape(case.grid)
        np.testing.assert_allclose(item.maps[0].scores, expected, rtol=0, atol=1e-10 * np.abs(expected).max())
        share = np.abs(scores[: case.prefix]).sum() / np.abs(scores).sum()
        assert item.maps[0].prefix_share == pytest.approx(share, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("k", [1, 3, 11])
@pytest.mark.parametrize("name", ["patch_8", "dinov2_registers", "beit"])
def test_top_k_is_torchs(name: str, k: int) -> None:
    case = BY_ID[name]
    model, pixels = build(case), images(case, 3)
    with torch.no_grad():
        values, indices = model(pixels).topk(k)
    found = Explainer(model).explain(pixels, [[TopK(k)]] * 3)
    for item, index, value in zip(found, indices.tolist(), values.tolist(), strict=True):
        assert [target.index for target in item.targets] == index
        assert [target.value for target in item.targets] == pytest.approx(value, rel=1e-10)
        assert len(item.maps) == k
