"""One batch of one model: what is refused, and what is no answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import JsonValue

from cdam_engine import Attention, Cdam, Concept, Explanation, IntegratedCdam, Output, SmoothCdam
from cdam_server.compute.facts import NonFiniteError
from cdam_server.compute.loading import ModelSpec, load_model
from cdam_server.compute.models import ImageQuery, ServedModel
from cdam_server.compute.scheduling import TooLargeError
from cdam_server.errors import FailedPreconditionError
from cdam_server.usecases.resolve import resolve_method, resolve_methods

METHODS = (Cdam(parts=True), SmoothCdam(samples=2), IntegratedCdam(steps=2))


@pytest.fixture
def served() -> ServedModel:
    return ServedModel(load_model(ModelSpec(name="demo", architecture="demo")))


def _job(seed: int) -> ImageQuery:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    return ImageQuery(pixels, (Output(3), Concept(torch.ones(128), "l2")), METHODS)


def _rest() -> None:
    pass


def _say(served: ServedModel, monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    """Let the explainer answer so, or raise it."""

    def explain(*_: object) -> Sequence[Explanation]:
        if isinstance(answer, Exception):
            raise answer
        return [answer]

    monkeypatch.setattr(served.explainer, "explain", explain)


def test_a_batch_is_answered_in_order(served: ServedModel) -> None:
    both = served.compute([_job(0), _job(1)], _rest)
    for seed, answer in enumerate(both):
        (alone,) = served.compute([_job(seed)], _rest)
        assert isinstance(answer, Explanation)
        assert isinstance(alone, Explanation)
        assert [target.value for target in answer.targets] == pytest.approx(
            [target.value for target in alone.targets], rel=1e-4
        )


def test_what_is_not_finite_anywhere_is_no_answer(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    (fine,) = served.compute([_job(0)], _rest)
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
        (found,) = served.compute([_job(0)], _rest)
        assert isinstance(found, NonFiniteError)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_runs_out_is_told(served: ServedModel, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    _say(served, monkeypatch, error)
    with pytest.raises(TooLargeError):
        served.compute([_job(0)], _rest)
    _say(served, monkeypatch, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        served.compute([_job(0)], _rest)


def test_methods_that_it_cannot_serve_are_refused(served: ServedModel) -> None:
    """Its attention is the difference of two: there are no weights to show, nor to hold constant."""
    assert not served.facts.refusals
    resolve_method(served.facts, Cdam(parts=True))
    kwargs: dict[str, JsonValue] = {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32}
    other = ServedModel(
        load_model(
            ModelSpec(
                name="dwee",
                architecture="vit_dwee_patch16_reg1_gap_256",
                random_weights=True,
                num_outputs=3,
                model_kwargs=kwargs,
            )
        )
    )
    assert other.facts.refusals["attention"].reason == "UNKNOWN_ATTENTION"
    resolve_method(other.facts, Cdam())
    for method in (Cdam(parts=True), Attention()):
        with pytest.raises(
            FailedPreconditionError, match=r"^methods\[0\]\.\w+: model 'dwee'.*DiffAttention"
        ) as refused:
            resolve_methods(other.facts, [method])
        assert refused.value.reason == "UNKNOWN_ATTENTION"
        assert refused.value.metadata == {"model": "dwee", "method": method.kind}
