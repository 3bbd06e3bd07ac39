"""The pieces of work that a batch comes down to, and what they found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdam_engine.batch import Batch
from cdam_engine.clock import Clock
from cdam_engine.explanation import ExplainedTarget, RelevanceMap
from cdam_engine.methods.base import Method, Scores
from cdam_engine.targets import Output, Scalar, Target, count


class Unit(NamedTuple):
    """A piece of work: one method and one list of targets for one of the batch's images."""

    image: int
    method: Method
    targets: tuple[Target, ...]


class Found:
    """What a method found out about one image, on the CPU.

    Args:
        method: The method.
        scores: What it found out about several images.
        row: Which of them it is.
        batch: Their batch.
    """

    def __init__(self, method: Method, scores: Scores, row: int, batch: Batch) -> None:
        self._method, self._found, self._row, self._grid = method, scores, row, batch.grid
        self._prefix = batch.vit.num_prefix_tokens if scores.has_prefix else 0

    def maps(self, method_index: int) -> list[RelevanceMap]:
        """One map for each target."""
        found, row = self._found, self._row
        scores, value, error = map(self._patches, (found.scores, found.value, found.standard_error))
        assert scores is not None
        shares = self._prefix_shares() if found.has_prefix else None
        return [
            RelevanceMap(
                scores=patches,
                method_index=method_index,
                target_index=k if self._method.needs_target else None,
                prefix_share=None if shares is None else shares[k],
                value_part=None if value is None else value[k],
                key_part=None if value is None else patches - value[k],
                standard_error=None if error is None else error[k],
                completeness_residual=None if found.residual is None else float(found.residual[row, k]),
                steps=None if found.steps is None else found.steps[row][k],
            )
            for k, patches in enumerate(scores)
        ]

    def _prefix_shares(self) -> list[float]:
        size = self._found.scores[self._row].abs()
        total = size.sum(dim=-1)
        shares: list[float] = (size[:, : self._prefix].sum(dim=-1) / total.where(total > 0, 1.0)).tolist()
        return shares

    def _patches(self, values: Tensor | None) -> NDArray[np.floating] | None:
        """Of every target, shape (K, h, w)."""
        if values is None:
            return None
        array: NDArray[np.floating] = torch.unflatten(values[self._row, :, self._prefix :], -1, self._grid).numpy()
        return np.ascontiguousarray(array)


def run_units(batch: Batch, units: Sequence[Unit], clock: Clock) -> dict[Unit, Found]:
    """Do every different piece of work once, together those of one method with equal numbers of targets."""
    groups: dict[tuple[Method, int], list[Unit]] = {}
    for unit in dict.fromkeys(units):
        number = count(unit.targets)
        if number or not unit.method.needs_target:
            groups.setdefault((unit.method, number), []).append(unit)
    computed = []
    for (method, _), group in groups.items():
        with clock(method.kind):
            computed.append(method.explain(batch, [unit.image for unit in group], [unit.targets for unit in group]))
    return {
        unit: Found(method, scores, row, batch)
        for ((method, _), group), scores in zip(groups.items(), map(_scores_on_cpu, computed), strict=True)
        for row, unit in enumerate(group)
    }


def _scores_on_cpu(scores: Scores) -> Scores:
    return replace(
        scores,
        scores=on_cpu(scores.scores),
        value=None if scores.value is None else on_cpu(scores.value),
        standard_error=None if scores.standard_error is None else on_cpu(scores.standard_error),
        residual=None if scores.residual is None else on_cpu(scores.residual),
    )


def explained_targets(
    wanted: Sequence[Target], scalars: Sequence[Scalar], latent: Tensor, logits: Tensor
) -> tuple[ExplainedTarget, ...]:
    """The model's answers to one image's targets."""
    origins = [index for index, target in enumerate(wanted) for _ in range(count([target]))]
    numbers = logits.tolist()
    return tuple(
        ExplainedTarget(f, numbers[f.index] if isinstance(f, Output) else float(f(latent, logits)), index)
        for f, index in zip(scalars, origins, strict=True)
    )


def on_cpu(values: Tensor) -> Tensor:
    """As numpy can take them: it knows no bfloat16."""
    half = values.dtype in (torch.bfloat16, torch.float16)
    return values.detach().float().cpu() if half else values.detach().cpu()
