"""One batch of one model: what is refused, and what is no answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cdam_engine import Cdam, Concept, Explanation, IntegratedCdam, Output, SmoothCdam
from cdam_server.errors import FailedPreconditionError, OutOfMemoryError
from cdam_server.loading import ModelSpec, load_model
from cdam_server.models import Job, NonFiniteError, Refusal, ServedModel

METHODS = (Cdam(parts=True), SmoothCdam(samples=2), IntegratedCdam(steps=2))


@pytest.fixture
def served() -> ServedModel:
    return ServedModel(load_model(ModelSpec(name="demo", architecture="demo")))


def _job(seed: int) -> Job:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    return Job(pixels, (Output(3), Concept(torch.ones(128), "l2")), METHODS)


def _say(served: ServedModel, monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    """Let the explainer answer so, or raise it."""

    def explain(*_: object) -> Sequence[Explanation]:
        if isinstance(answer, Exception):
            raise answer
        return [answer]

    monkeypatch.setattr(served.explainer, "explain", explain)


def test_a_batch_is_answered_in_order(served: ServedModel) -> None:
    both = served.compute([_job(0), _job(1)])
    for seed, answer in enumerate(both):
        (alone,) = served.compute([_job(seed)])
        assert isinstance(answer, Explanation)
        assert isinstance(alone, Explanation)
        assert [target.value for target in answer.targets] == pytest.approx(
            [target.value for target in alone.targets], rel=1e-4
        )


def test_what_is_not_finite_anywhere_is_no_answer(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    (fine,) = served.compute([_job(0)])
    assert isinstance(fine, Explanation)
    spoilt: list[Explanation] = [replace(fine, logits=fine.logits * np.nan)]
    for index, target in enumerate(fine.targets):
        targets = (*fine.targets[:index], replace(target, value=np.inf), *fine.targets[index + 1 :])
        spoilt.append(replace(fine, targets=targets))
    fields = set()
    for index, item in enumerate(fine.maps):
        for field in ("scores", "value_part", "key_part", "standard_error", "completeness_residual"):
            if (value := getattr(item, field)) is not None:
                fields.add(field)
                worse = replace(item, **{field: value * np.nan})
                spoilt.append(replace(fine, maps=(*fine.maps[:index], worse, *fine.maps[index + 1 :])))
    assert len(fields) == 5
    for answer in spoilt:
        _say(served, monkeypatch, answer)
        (found,) = served.compute([_job(0)])
        assert isinstance(found, NonFiniteError)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_runs_out_is_told(served: ServedModel, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    _say(served, monkeypatch, error)
    with pytest.raises(OutOfMemoryError):
        served.compute([_job(0)])
    _say(served, monkeypatch, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        served.compute([_job(0)])


def test_methods_that_it_cannot_serve_are_refused(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not served.refusals
    served.check_method("partial_lrp", "methods[0].partial_lrp")
    monkeypatch.setattr(served, "refusals", {"partial_lrp": Refusal("NO_LRP_RULE", "it has no rule")})
    with pytest.raises(FailedPreconditionError, match=r"^methods\[0\]\.partial_lrp: .*it has no rule$") as refused:
        served.check_method("partial_lrp", "methods[0].partial_lrp")
    assert refused.value.reason == "NO_LRP_RULE"
    assert refused.value.metadata == {"model": "demo", "method": "partial_lrp"}
