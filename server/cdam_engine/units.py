"""The pieces of work that a batch comes down to, and what they found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdam_engine.batch import Batch
from cdam_engine.clock import Clock
from cdam_engine.explanation import ExplainedTarget, RelevanceMap
from cdam_engine.families import Grid
from cdam_engine.methods.base import Method, Scores
from cdam_engine.targets import Output, Target, count
from cdam_engine.transfer import fetch, widened

_Floats = NDArray[np.floating[Any]]


class Unit(NamedTuple):
    """A piece of work: one method and one list of targets for one of the batch's images."""

    image: int
    method: Method
    targets: tuple[Target, ...]


class Group(NamedTuple):
    """What a method found out about several images, on the model's device.

    Attributes:
        units: The pieces of work, one a row of the scores.
        scores: The scores.
    """

    units: Sequence[Unit]
    scores: Scores


class Answered(NamedTuple):
    """All that a batch's images are told, on the host.

    Attributes:
        found: What became of every piece of work.
        latents: Shape (B, D).
        logits: Shape (B, C).
        targets: Of each image.
    """

    found: dict[Unit, Found]
    latents: _Floats
    logits: _Floats
    targets: list[tuple[ExplainedTarget, ...]]


class Found(NamedTuple):
    """What a method found out about one image.

    Attributes:
        method: The method.
        grid: The patch grid.
        arrays: What it found out about several images.
        row: Which of them it is.
    """

    method: Method
    grid: Grid
    arrays: _Arrays
    row: int

    def maps(self, method_index: int) -> list[RelevanceMap]:
        """One map for each target."""
        arrays, row = self.arrays, self.row
        scores, value, error = map(self._patches, (arrays.scores, arrays.value, arrays.standard_error))
        assert scores is not None
        return [
            RelevanceMap(
                scores=patches,
                method_index=method_index,
                target_index=k if self.method.needs_target else None,
                prefix_share=None if arrays.shares is None else float(arrays.shares[row, k]),
                value_part=None if value is None else value[k],
                key_part=None if value is None else patches - value[k],
                standard_error=None if error is None else error[k],
                completeness_residual=None if arrays.residual is None else float(arrays.residual[row, k]),
                steps=None if arrays.steps is None else arrays.steps[row][k],
            )
            for k, patches in enumerate(scores)
        ]

    def _patches(self, values: _Floats | None) -> _Floats | None:
        """Of every target, shape (K, h, w)."""
        if values is None:
            return None
        patches = values[self.row, :, self.arrays.prefix :]
        return np.ascontiguousarray(patches.reshape(len(patches), *self.grid))


class _Arrays(NamedTuple):
    """`Scores` on the host, with the shares (B, K) of the prefix tokens, of which there are so many."""

    prefix: int
    steps: list[list[int]] | None
    scores: _Floats | None
    value: _Floats | None
    standard_error: _Floats | None
    residual: _Floats | None
    shares: _Floats | None


def run_units(batch: Batch, units: Sequence[Unit], clock: Clock) -> list[Group]:
    """Do every different piece of work once, together those of one method with equal numbers of targets."""
    groups: dict[tuple[Method, int], list[Unit]] = {}
    for unit in dict.fromkeys(units):
        number = count(unit.targets)
        if number or not unit.method.needs_target:
            groups.setdefault((unit.method, number), []).append(unit)
    computed = []
    for (method, _), group in groups.items():
        with clock(method.kind):
            scores = method.explain(batch, [unit.image for unit in group], [unit.targets for unit in group])
        computed.append(Group(group, scores))
    return computed


def answer(
    batch: Batch, groups: Sequence[Group], images: Sequence[int], wanted: Sequence[Sequence[Target]]
) -> Answered:
    """Bring everything to the host, at once.

    Args:
        batch: The batch, which knows the outputs of all its images.
        groups: What was found out about them.
        images: Whom to tell what the model says of them; an image may occur more than once.
        wanted: The targets of each.
    """
    latents, logits = map(widened, batch.outputs(images))
    scalars = batch.resolve(images, wanted)
    values = [f(latents[b], logits[b]) for b, its in enumerate(scalars) for f in its if not isinstance(f, Output)]
    prefix = batch.vit.num_prefix_tokens
    first = [latents, logits, torch.stack(values) if values else logits.new_zeros(0)]
    tensors = [_tensors(group.scores, prefix) for group in groups]
    arrays = iter(fetch([*first, *(its for some in tensors for its in some if its is not None)]))
    all_latents, all_logits, others = (next(arrays) for _ in first)
    found: dict[Unit, Found] = {}
    for group, some in zip(groups, tensors, strict=True):
        on_host = [None if its is None else next(arrays) for its in some]
        its = _Arrays(prefix if group.scores.has_prefix else 0, group.scores.steps, *on_host)
        found |= {unit: Found(unit.method, batch.grid, its, row) for row, unit in enumerate(group.units)}
    left = iter(others.tolist())
    explained = [
        tuple(
            ExplainedTarget(f, float(all_logits[b, f.index]) if isinstance(f, Output) else next(left), index)
            for f, index in zip(its, _origins(wanted[b]), strict=True)
        )
        for b, its in enumerate(scalars)
    ]
    # Copies: a kept tail's own would be the cache's.
    return Answered(found, all_latents.copy(), all_logits.copy(), explained)


def _origins(wanted: Sequence[Target]) -> list[int]:
    """Which target each scalar function comes of."""
    return [index for index, target in enumerate(wanted) for _ in range(count([target]))]


def _tensors(found: Scores, prefix: int) -> list[Tensor | None]:
    """What `_Arrays` holds, in its order."""
    shares = None
    if found.has_prefix:
        size = widened(found.scores).abs()
        total = size.sum(dim=-1)
        shares = size[..., :prefix].sum(dim=-1) / total.where(total > 0, 1.0)
    return [found.scores, found.value, found.standard_error, found.residual, shares]
