"""How closely the engine agrees with the reference, on one architecture and in one precision."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch

from cdam_engine import Explainer, Explanation, Output, TopK
from reference.cdam_reference import Reference, cdam, relative_error
from reference.models import Case, build, images

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cdam_engine import Target

BATCH = 3


class Agreement(NamedTuple):
    """The worst relative errors, over images and targets."""

    maps: float
    logits: float
    prefix_share: float


def targets(case: Case) -> list[list[Target]]:
    """Targets of the batch: another number of them for each image, and one image with the same target twice."""
    last = case.outputs - 1
    return [
        [Output(0)],
        [Output(last), TopK(min(2, case.outputs)), Output(last // 2)],
        [Output(last), Output(last)],
    ]


@functools.cache
def explanation(case: Case, dtype: torch.dtype) -> tuple[Explanation, ...]:
    """The engine's answer to the batch."""
    return tuple(Explainer(build(case, dtype)).explain(images(case, BATCH, dtype), targets(case)))


@functools.cache
def expected(case: Case, dtype: torch.dtype, image: int, output: int) -> Reference:
    """The reference's answer to one image of the batch, one output."""
    return cdam(build(case, dtype), images(case, BATCH, dtype)[image], output)


def in_batch(case: Case, dtype: torch.dtype, truth: torch.dtype | None = None) -> Agreement:
    """The batch, explained at once, against the reference on each image and target (in precision `truth`, if given)."""
    found = explanation(case, dtype)
    assert len(found) == BATCH
    return _worst([_compare(case, truth or dtype, image, found[image]) for image in range(BATCH)])


def alone(case: Case, dtype: torch.dtype) -> Agreement:
    """One image, explained as a batch of one."""
    image = 1
    (found,) = Explainer(build(case, dtype)).explain(
        images(case, BATCH, dtype)[image : image + 1], [targets(case)[image]]
    )
    return _compare(case, dtype, image, found)


def reference_noise(case: Case) -> float:
    """The reference's own float32 rounding: its worst error against itself in double precision."""
    asked = {(i, target.index) for i, item in enumerate(explanation(case, torch.float32)) for target in item.targets}
    return max(
        relative_error(expected(case, torch.float32, i, k).scores, expected(case, torch.float64, i, k).scores)
        for i, k in asked
    )


def _compare(case: Case, dtype: torch.dtype, image: int, found: Explanation) -> Agreement:
    worst: list[Agreement] = []
    for target, relevance in zip(found.targets, found.maps, strict=True):
        truth = expected(case, dtype, image, target.index)
        assert relevance.scores.shape == case.grid
        worst.append(
            Agreement(
                maps=relative_error(_tensor(relevance.scores), truth.scores),
                logits=relative_error(_tensor(found.logits), truth.logits),
                prefix_share=abs(relevance.prefix_share - truth.prefix_share),
            )
        )
    return _worst(worst)


def _worst(items: list[Agreement]) -> Agreement:
    return Agreement(*(max(values) for values in zip(*items, strict=True)))


def _tensor(array: NDArray[np.floating]) -> torch.Tensor:
    return torch.from_numpy(array)
