"""What must hold whatever the images and targets are."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cdam_engine import Explainer, Output, TopK
from reference.models import BY_ID, Case, build, images

if TYPE_CHECKING:
    from cdam_engine import Explanation, Target

CASE = BY_ID["eight_outputs"]
COUNT = 4

few = settings(max_examples=15, deadline=None, derandomize=True)
target = st.one_of(
    st.integers(0, CASE.outputs - 1).map(Output),
    st.integers(1, 3).map(TopK),
)
batches = st.lists(st.lists(target, max_size=3), min_size=COUNT, max_size=COUNT)


@few
@given(wanted=batches, order=st.permutations(range(COUNT)))
def test_permuted_batch_gives_permuted_results(wanted: list[list[Target]], order: list[int]) -> None:
    found = _explain(list(range(COUNT)), wanted)
    permuted = _explain(order, [wanted[i] for i in order])
    _assert_equal(permuted, [found[i] for i in order])


@few
@given(wanted=batches, size=st.integers(1, COUNT))
def test_batch_size_does_not_matter(wanted: list[list[Target]], size: int) -> None:
    whole = _explain(list(range(COUNT)), wanted)
    parts = [
        item
        for start in range(0, COUNT, size)
        for item in _explain(list(range(COUNT))[start : start + size], wanted[start : start + size])
    ]
    _assert_equal(parts, whole)


@few
@given(wanted=st.lists(target, min_size=1, max_size=3), chosen=st.lists(st.integers(0, 1), min_size=2, max_size=5))
def test_duplicates_get_equal_maps(wanted: list[Target], chosen: list[int]) -> None:
    """The same image twice, the same target twice: the same map."""
    once = _explain([0, 1], [wanted, wanted])
    often = _explain(chosen, [wanted + wanted] * len(chosen))
    for item, image in zip(often, chosen, strict=True):
        half = len(once[image].maps)
        for relevance, same in zip(item.maps, [*once[image].maps, *once[image].maps], strict=True):
            _assert_close(relevance.scores, same.scores)
        assert item.targets[:half] != ()
        assert [t.index for t in item.targets[:half]] == [t.index for t in item.targets[half:]]


@few
@given(output=st.integers(0, CASE.outputs - 1), factor=st.floats(0.01, 100).map(lambda x: round(x, 3)))
@pytest.mark.parametrize("case", [CASE, BY_ID["siglip"], BY_ID["beit"]], ids=lambda case: case.id)
def test_scaled_head_row_gives_scaled_map(case: Case, output: int, factor: float) -> None:
    model = copy.deepcopy(build(case))
    with torch.no_grad():
        model.head.weight[output] *= factor
    pixels = images(case, 2)
    plain = Explainer(build(case)).explain(pixels, [[Output(output), Output(0)]] * 2)
    scaled = Explainer(model).explain(pixels, [[Output(output), Output(0)]] * 2)
    for one, other in zip(scaled, plain, strict=True):
        _assert_close(one.maps[0].scores, factor * other.maps[0].scores)
        assert one.maps[0].prefix_share == pytest.approx(other.maps[0].prefix_share, rel=1e-9)
        if output:
            _assert_close(one.maps[1].scores, other.maps[1].scores)


@few
@given(a=st.integers(0, CASE.outputs - 1), b=st.integers(0, CASE.outputs - 1))
def test_sum_of_head_rows_gives_sum_of_maps(a: int, b: int) -> None:
    model = copy.deepcopy(build(CASE))
    with torch.no_grad():
        model.head.weight[0] = build(CASE).head.weight[a] + build(CASE).head.weight[b]
    (both,) = Explainer(model).explain(images(CASE, 1), [[Output(0)]])
    (each,) = Explainer(build(CASE)).explain(images(CASE, 1), [[Output(a), Output(b)]])
    _assert_close(both.maps[0].scores, each.maps[0].scores + each.maps[1].scores)


@few
@given(shift=st.floats(-10, 10))
def test_bias_of_the_head_does_not_matter(shift: float) -> None:
    model = copy.deepcopy(build(CASE))
    with torch.no_grad():
        model.head.bias += shift
    (found,) = Explainer(model).explain(images(CASE, COUNT)[:1], [[Output(3)]])
    _assert_close(found.maps[0].scores, _explain([0], [[Output(3)]])[0].maps[0].scores)


def _explain(chosen: list[int], wanted: list[list[Target]]) -> list[Explanation]:
    return Explainer(build(CASE)).explain(images(CASE, COUNT)[chosen], wanted)


def _assert_equal(found: list[Explanation], expected: list[Explanation]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logits, other.logits, rtol=1e-10, atol=1e-13)
        assert [target.index for target in one.targets] == [target.index for target in other.targets]
        for a, b in zip(one.maps, other.maps, strict=True):
            _assert_close(a.scores, b.scores)
            assert a.prefix_share == pytest.approx(b.prefix_share, rel=1e-9)


def _assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * np.abs(expected).max())
