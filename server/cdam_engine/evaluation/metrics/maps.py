"""Metrics of the map's form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cdam_engine.evaluation.metrics.base import Better, Found, Metric, OfMaps
from cdam_engine.evaluation.perturbation import MapOf
from cdam_engine.evaluation.sample import Field
from cdam_engine.evaluation.subject import Subject


@dataclass(frozen=True)
class Compactness(OfMaps, Metric):
    """The share of patches whose score is at most a small fraction of the largest; 0 if no score is positive.

    Source: Brocki, Binda and Chung (TMLR 2024), compactness; one minus effective complexity (Nguyen and Martinez 2020).

    Attributes:
        threshold: The fraction of the largest score.
        absolute: Whether absolute values are taken first; else negative scores count as small.
    """

    kind: ClassVar[str] = "compactness"
    better: ClassVar[Better] = {"compactness": "higher"}
    requires: ClassVar[tuple[Field, ...]] = ()

    threshold: float = 0.05
    absolute: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold: {self.threshold}, but a fraction is from 0 to less than 1")

    def measure(self, its: MapOf, seed: int, subject: Subject) -> dict[str, Found]:
        scores = subject.maps[its]
        taken = np.abs(scores) if self.absolute else scores
        largest = float(taken.max())
        small = taken.astype(np.float64) <= self.threshold * largest
        return {"compactness": Found(float(small.mean()) if largest > 0 else 0.0)}


@dataclass(frozen=True)
class Sparseness(OfMaps, Metric):
    """Gini index of the absolute scores; 0 if all are zero. Source: Chalasani et al. (2020)."""

    kind: ClassVar[str] = "sparseness"
    better: ClassVar[Better] = {"gini": "higher"}
    requires: ClassVar[tuple[Field, ...]] = ()

    def measure(self, its: MapOf, seed: int, subject: Subject) -> dict[str, Found]:
        sizes = np.sort(np.abs(subject.maps[its].astype(np.float64)), axis=None)
        count, total = len(sizes), float(sizes.sum())
        weights = 2 * np.arange(1, count + 1) - count - 1
        return {"gini": Found(float(weights @ sizes) / (count * total) if total else 0.0)}
