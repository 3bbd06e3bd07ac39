"""The GPU path where there is no GPU: nothing on the wrong device, and one wait, for the answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cdam_engine import (
    METHODS,
    Cdam,
    Concept,
    Contrast,
    Explainer,
    IntegratedCdam,
    IntegratedGradients,
    Method,
    Output,
    SmoothCdam,
    SmoothGrad,
    Target,
    TokenCache,
    TopK,
    UnsupportedMethodError,
)
from cdam_engine.evaluation import (
    METRICS,
    BoxSensitivity,
    ClassDiscrimination,
    Evaluator,
    Fidelity,
    InsertionDeletion,
    Measured,
    Metric,
    Protocol,
    Sample,
)
from cdam_server.demo import model as demo
from fake_cuda import FakeCuda, FaultError, fake_cuda, on_fake_cuda
from small_models import vit

ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "demo": demo.load,
    "average_pool": lambda: vit(global_pool="avg"),
    "registers": lambda: vit(architecture="vit_small_patch14_reg4_dinov2", img_size=28),
    "distillation": lambda: vit(architecture="deit_tiny_distilled_patch16_224"),
    "attention_pool": lambda: vit(architecture="vit_base_patch16_siglip_224"),
    "relative_positions": lambda: vit(architecture="beit_base_patch16_224"),
    "rotary_positions": lambda: vit(architecture="eva02_tiny_patch14_224", img_size=28),
}
SHORT: dict[str, Method] = {
    "smooth_cdam": SmoothCdam(samples=4),
    "integrated_cdam": IntegratedCdam(steps=4),
    "smooth_grad": SmoothGrad(samples=4),
    "integrated_gradients": IntegratedGradients(steps=4),
}
METHOD: dict[str, Method] = {
    **{kind: SHORT.get(kind) or method() for kind, method in METHODS.items()},
    "cdam_parts": Cdam(parts=True),
    "integrated_to_a_tolerance": IntegratedCdam(steps=4, tolerance=1e-9),
}
TARGETS: dict[str, Callable[[Tensor], Target]] = {
    "output": lambda _: Output(1),
    "dot": Concept,
    "cosine": lambda vector: Concept(vector, "cosine"),
    "l2": lambda vector: Concept(vector, "l2"),
    "contrast": lambda vector: Contrast(Output(2), Concept(vector, "cosine")),
    "contrast_of_outputs": lambda _: Contrast(Output(2), Output(0)),
}
METRIC: dict[str, Metric] = {
    **{kind: metric() for kind, metric in METRICS.items()},
    "fidelity": Fidelity(points=3),
    "box_sensitivity": BoxSensitivity(boxes=2),
    "class_discrimination": ClassDiscrimination(Fidelity(points=3), BoxSensitivity(boxes=2)),
    "insertion_deletion": InsertionDeletion(steps=2),
}


@cache
def _proven(architecture: str) -> Explainer:
    """On the CPU, since a proof compares numbers."""
    return Explainer(ARCHITECTURES[architecture]())


def _explainer(architecture: str, **options: Any) -> Explainer:
    """On the GPU that there is not."""
    known = _proven(architecture)
    model = on_fake_cuda(known.vit.model)
    return Explainer(model, data_config=known.data_config, proven=True, **options)


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    """The GPU."""
    for architecture in ARCHITECTURES:
        _proven(architecture)
    with fake_cuda() as it:
        yield it


def _pixels(explainer: Explainer, count: int) -> Tensor:
    height, width = explainer.vit.input_size
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=draw)


def _vector(explainer: Explainer) -> Tensor:
    return torch.linspace(-1, 1, explainer.vit.latent_size)


def _is_refused(cuda: FakeCuda, explainer: Explainer, method: Method) -> bool:
    """Whether the method is not for this model; then nothing is computed before it says so."""
    try:
        explainer.check(method)
    except UnsupportedMethodError as refusal:
        with pytest.raises(UnsupportedMethodError, match=re.escape(str(refusal))):
            explainer.explain(_pixels(explainer, 1), [[Output(0)]], [[method]])
        assert cuda.waits == 0
        return True
    return False


@pytest.mark.parametrize("method", METHOD)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_maps_take_one_wait(cuda: FakeCuda, architecture: str, method: str) -> None:
    explainer = _explainer(architecture)
    if _is_refused(cuda, explainer, METHOD[method]):
        return
    several = [Output(0), Contrast(Output(2), Concept(_vector(explainer), "cosine"))]
    found = explainer.explain(_pixels(explainer, 3), [several, several, several[1:]], [[METHOD[method]]] * 3)
    needs = METHOD[method].needs_target
    assert [len(item.maps) for item in found] == ([2, 2, 1] if needs else [1, 1, 1])
    # To a tolerance each image's residuals are looked at, once, since zeros are within it.
    assert cuda.waits == (4 if method == "integrated_to_a_tolerance" else 1)
    for its in (its for item in found for its in item.maps):
        assert its.scores.shape == explainer.vit.grid(explainer.vit.input_size)
        assert np.isfinite(its.scores).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_targets_of_every_kind_take_no_more(cuda: FakeCuda, architecture: str) -> None:
    explainer = _explainer(architecture)
    every = [make(_vector(explainer)) for make in TARGETS.values()]
    (found,) = explainer.explain(_pixels(explainer, 1), [every], [[Cdam(), SHORT["integrated_cdam"]]])
    assert [its.value for its in found.targets] == [0.0] * len(every)
    assert cuda.waits == 1
    for target in every:
        explainer.explain(_pixels(explainer, 2), [[target]] * 2)
    assert cuda.waits == 1 + len(every)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["demo", "attention_pool"])
def test_top_outputs_take_one_more_for_all_images(cuda: FakeCuda, architecture: str, method: str) -> None:
    explainer = _explainer(architecture)
    if _is_refused(cuda, explainer, METHOD[method]):
        return
    found = explainer.explain(
        _pixels(explainer, 3), [[TopK(2)], [TopK(1), Output(1)], [TopK(3)]], [[METHOD[method]]] * 3
    )
    assert [its.index for its in found[2].targets] == [0, 0, 0]  # as every number is
    groups = 2 if METHOD[method].needs_target else 1
    # Methods that run the model themselves learn the outputs group by group.
    assert cuda.waits == 1 + (1 if METHOD[method].reads_tokens else groups)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_another_question_about_known_images(cuda: FakeCuda, architecture: str) -> None:
    explainer = _explainer(architecture, cache=TokenCache(1 << 24))
    pixels = _pixels(explainer, 3)
    for output in range(3):
        explainer.explain(pixels, [[Output(output)]] * 3)
    found = explainer.explain(pixels[:1], [[Output(1)]])
    assert found[0].token_cache_hit
    assert cuda.waits == 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_take_no_wait(cuda: FakeCuda, architecture: str) -> None:
    explainer = _explainer(architecture)
    latent, logits = explainer.outputs(torch.empty(2, 3, *explainer.vit.input_size, device="cuda"))
    assert latent.is_cuda
    assert logits.is_cuda
    assert not cuda.waits


def _sample(explainer: Explainer, seed: int) -> Sample:
    height, width = explainer.vit.input_size
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    mask, other = np.zeros((2, height, width), bool)
    mask[: height // 2, : width // 2] = True
    other[height // 2 :, width // 2 :] = True
    without = np.where(mask[..., None], np.uint8(128), image)
    return Sample(f"sample {seed}", image, Output(1), Output(2), mask, without, other)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_metrics_wait_for_maps_and_for_batches(cuda: FakeCuda, architecture: str, metric: str) -> None:
    explainer = _explainer(architecture)
    evaluator = Evaluator(explainer, Protocol((Cdam(),), (METRIC[metric],)), batch_size=8)
    found = evaluator.evaluate([_sample(explainer, seed) for seed in range(2)])
    assert all(isinstance(item, Measured) for item in found)
    maps = 2
    if METRIC[metric].randomised:
        maps += 2 * (len(explainer.vit.blocks) + 2) + len(
            list(explainer.vit.model.parameters())
        )  # weights are drawn there
    assert cuda.waits <= maps + -(-2 * evaluator.passes() // 8)


def _plant(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Tensor], object]) -> None:
    explain = Cdam.explain

    def faulty(self: Cdam, *arguments: Any) -> Any:
        found = explain(self, *arguments)
        fault(found.scores)
        return found

    monkeypatch.setattr(Cdam, "explain", faulty)


def _assign(scores: Tensor) -> None:
    scores[scores > 0] = torch.empty(2, device=scores.device)


FAULTS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda scores: scores[0, 0, 0].item(),
    "tolist": lambda scores: scores.tolist(),
    "bool": lambda scores: bool((scores > 0).all()),
    "nonzero": lambda scores: scores.nonzero(),
    "mask": lambda scores: scores[scores > 0],
    "assigned mask": _assign,
    "to the host": lambda scores: scores.cpu(),
    "into ordinary memory": lambda scores: torch.empty(scores.shape).copy_(scores, non_blocking=True),
    "from ordinary memory": lambda scores: scores + torch.tensor([1.0], device="cuda"),
    "from ordinary memory, later": lambda scores: torch.ones(3).to(scores.device, non_blocking=True),
    "on the host": lambda scores: scores + torch.ones(scores.shape[-1]),
    "rows on the host": lambda scores: scores[torch.tensor([0])],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    explainer = _explainer("demo")
    _plant(monkeypatch, FAULTS[fault])
    with pytest.raises((FaultError, RuntimeError), match=r"waits|on cpu and cuda|_local_scalar_dense|nonzero"):
        explainer.explain(_pixels(explainer, 1), [[Output(1)]])


def test_an_answer_that_is_read_too_early_is_found(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    explainer = _explainer("demo")
    monkeypatch.setattr(FakeCuda, "synchronize", lambda _: None)
    (found,) = explainer.explain(_pixels(explainer, 1), [[Output(1)]])
    assert np.isnan(found.maps[0].scores).all()
