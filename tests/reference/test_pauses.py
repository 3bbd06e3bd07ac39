"""Work that rests, and what is done meanwhile, gives the maps that it would give alone."""

from __future__ import annotations

from time import perf_counter, sleep

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cdam_engine import (
    Cdam,
    Explainer,
    Explanation,
    Method,
    Output,
    SmoothCdam,
    TopK,
    interruptible,
)
from every import short_methods
from reference.method_expectations import supported
from reference.models import BY_ID, Case, build, images

CASES = [BY_ID["patch_8"], BY_ID["siglip_pool"]]  # in closed form, and by autograd
TARGETS = [Output(1), Output(2), TopK(2)]
EVERY = [
    pytest.param(case, method, id=f"{case.id}-{kind}")
    for case in CASES
    for kind, method in short_methods().items()
    if supported(case, method)
]


class EnoughError(Exception):
    pass


def _arrays(explanation: Explanation) -> list[NDArray[np.floating]]:
    return [explanation.logits, *(its.scores for its in explanation.maps)]


def _assert_same(found: Explanation, expected: Explanation) -> None:
    for ours, theirs in zip(_arrays(found), _arrays(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("case", "method"), EVERY)
def test_what_is_done_in_a_rest_changes_nothing(case: Case, method: Method) -> None:
    explainer = Explainer(build(case))
    others = [Cdam(), SmoothCdam(samples=2, seed=5)]

    def meanwhile() -> Explanation:
        return explainer.explain(images(case, 1, seed=2), [[TopK(3)]], [others])[0]

    alone, expected = explainer.explain(images(case, 1), [TARGETS], [[method]])[0], meanwhile()
    rests: list[Explanation] = []
    with interruptible(lambda: rests.append(meanwhile())):
        interrupted = explainer.explain(images(case, 1), [TARGETS], [[method]])[0]
    assert rests
    _assert_same(interrupted, alone)
    for found in rests:
        _assert_same(found, expected)


@pytest.mark.parametrize(("case", "method"), EVERY)
def test_what_a_rest_raises_ends_the_work_and_leaves_nothing_behind(case: Case, method: Method) -> None:
    explainer = Explainer(build(case))
    calls = 0

    def rest() -> None:
        nonlocal calls
        calls += 1
        raise EnoughError

    with interruptible(rest), pytest.raises(EnoughError):
        explainer.explain(images(case, 1), [TARGETS], [[method]])
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in explainer.vit.model.parameters())
    explainer.explain(images(case, 1), [TARGETS], [[method]])  # nobody is asked outside the block
    assert calls == 1


def test_long_work_rests_often() -> None:
    case = CASES[1]
    counts = []
    for samples in (4, 8):
        rests: list[None] = []
        with interruptible(lambda rests=rests: rests.append(None)):  # type: ignore[misc]
            Explainer(build(case)).explain(images(case, 1), [[Output(1)]], [[SmoothCdam(samples=samples)]])
        counts.append(len(rests))
    assert counts[1] >= counts[0] >= 2


def test_rests_are_not_booked_as_work() -> None:
    case = CASES[0]
    started = perf_counter()
    rests: list[None] = []

    def rest() -> None:
        rests.append(None)
        sleep(0.05)

    with interruptible(rest):
        (found,) = Explainer(build(case)).explain(images(case, 1), [TARGETS], [[SmoothCdam(samples=20)]])
    elapsed = perf_counter() - started
    assert elapsed - found.trunk_seconds - found.tail_seconds >= 0.05 * len(rests)
