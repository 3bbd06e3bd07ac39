"""Randomisation: does the map depend on what the model has learned?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cdam_engine.evaluation.evaluated import Anchor
from cdam_engine.evaluation.metrics.base import Better, Found, Metric, OfMaps
from cdam_engine.evaluation.numerics import curve, spearman
from cdam_engine.evaluation.perturbation import MapOf
from cdam_engine.evaluation.sample import Field
from cdam_engine.evaluation.subject import Subject


@dataclass(frozen=True)
class Randomisation(OfMaps, Metric):
    """Spearman's rank correlation with the map of the model whose weights are drawn anew, from the head down.

    Source: Adebayo et al. (2018), cascading randomisation. Every weight tensor is drawn from the normal distribution of
    its own mean and standard deviation, so that signals keep their size. A map that stays the same explains no model.

    Attributes:
        absolute: Whether absolute values are taken first.
    """

    kind: ClassVar[str] = "randomisation"
    better: ClassVar[Better] = {"randomisation_mean": "lower", "randomisation_all": "lower"}
    requires: ClassVar[tuple[Field, ...]] = ()
    randomised: ClassVar[bool] = True

    absolute: bool = False

    def measure(self, its: MapOf, seed: int, subject: Subject) -> dict[str, Found]:
        true = subject.maps[its]
        others = [true if isinstance(its.evaluated, Anchor) else maps[its] for maps in subject.randomised]
        taken = (np.abs(scores) if self.absolute else scores for scores in others)
        mine = np.abs(true) if self.absolute else true
        rho = np.array([spearman(mine, scores) for scores in taken])
        found = curve(np.arange(1.0, len(rho) + 1), rho)
        return {"randomisation_mean": Found(float(rho.mean()), found), "randomisation_all": Found(float(rho[-1]))}
