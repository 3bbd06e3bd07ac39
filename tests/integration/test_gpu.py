"""The engine on a GPU gives the CPU's maps."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from cdam_engine import (
    Concept,
    Contrast,
    Explainer,
    Explanation,
    Method,
    Output,
    TokenCache,
    TopK,
)
from every import short_methods

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

METHOD = short_methods()


@pytest.fixture(autouse=True)
def _float32_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # by default convolutions are in TF32


@pytest.fixture(params=["vit_tiny_patch16_224", "vit_base_patch16_siglip_gap_224"], ids=["closed_form", "autograd"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options: dict[str, Any] = {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 7}
        return timm.create_model(request.param, pretrained=False, **options).eval()


def _explain(model: nn.Module, device: str, methods: list[Method], **options: Any) -> list[Explanation]:
    pixels = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    vector = torch.randn(48, generator=torch.Generator().manual_seed(2))
    targets = [[Output(1), TopK(2)], [Contrast(Output(3), Output(0))], [Concept(vector, "cosine")]]
    explainer = Explainer(model.to(device), **options)
    found = explainer.explain(pixels, targets, [methods] * 3)
    return explainer.explain(pixels, targets, [methods] * 3) if explainer.cache is not None else found


def _assert_alike(found: list[Explanation], expected: list[Explanation], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert [target.index for target in one.targets] == [target.index for target in other.targets]
        for a, b in zip(one.maps, other.maps, strict=True):
            np.testing.assert_allclose(a.scores, b.scores, rtol=0, atol=tolerance * np.abs(b.scores).max())


@pytest.mark.parametrize("method", METHOD.values(), ids=METHOD)
def test_map_is_the_cpus(model: nn.Module, method: Method) -> None:
    if method.kind == "partial_lrp" and model.global_pool != "token":
        method = METHOD["cdam"]  # it starts at [CLS]
    expected = _explain(model, "cpu", [method])
    found = _explain(model, "cuda", [method])
    _assert_alike(found, expected, 1e-2 if method.kind == "partial_lrp" else 1e-4)  # its shares divide by almost 0
    assert all(item.trunk_seconds >= 0 and item.tail_seconds > 0 for item in found)


@pytest.mark.parametrize("kind", ["cdam", "smooth_cdam", "integrated_cdam", "attention_rollout", "token_ablation"])
def test_the_host_waits_once(model: nn.Module, kind: str) -> None:
    explainer = Explainer(model.to("cuda"))
    pixels = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    given = pixels, [[Output(1)]] * 3, [[METHOD[kind]]] * 3
    explainer.explain(*given)  # what is drawn or looked up once is not looked at
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            explainer.explain(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(its.message) for its in caught if "called a synchronizing" in str(its.message)]
    assert len(waits) <= 1, waits


def test_what_is_kept_on_the_device(model: nn.Module) -> None:
    expected = _explain(model, "cpu", [METHOD["cdam"], METHOD["integrated_cdam"]])
    found = _explain(model, "cuda", [METHOD["cdam"], METHOD["integrated_cdam"]], cache=TokenCache(1 << 24))
    assert all(item.token_cache_hit for item in found)
    _assert_alike(found, expected, 1e-4)


def test_trunk_in_bfloat16(model: nn.Module) -> None:
    expected = _explain(model, "cpu", [METHOD["cdam"]])
    _assert_alike(_explain(model, "cuda", [METHOD["cdam"]], precision="bf16"), expected, 0.1)
