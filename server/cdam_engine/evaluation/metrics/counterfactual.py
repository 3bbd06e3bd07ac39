"""Counterfactual removal: does the map tell what changes when the object is truly not there?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Self

import numpy as np

from cdam_engine.evaluation.geometry import Geometry
from cdam_engine.evaluation.metrics.base import Better, Cost, Found, Metric
from cdam_engine.evaluation.perturbation import CLEAN, MapOf, Perturbation, Whole
from cdam_engine.evaluation.sample import Field
from cdam_engine.evaluation.subject import Subject
from cdam_engine.methods.prediction import Activation

_IMAGES: Final = (CLEAN, Whole("counterfactual"))


@dataclass(frozen=True)
class Counterfactual(Metric):
    """f's true change when the object is not there, against the sum of the scores where the two images differ."""

    kind: ClassVar[str] = "counterfactual"
    better: ClassVar[Better] = {"true_change": None, "map_change": None, "sign_agreement": "higher"}
    requires: ClassVar[tuple[Field, ...]] = ("counterfactual",)

    def resolved(self, geometry: Geometry, activation: Activation | None = None) -> Self:
        return self

    def cost(self, geometry: Geometry) -> Cost:
        return Cost()

    def images_of_map(self, its: MapOf, geometry: Geometry) -> Sequence[Perturbation]:
        return ()

    def images_of_sample(self, seed: int, sample: str, geometry: Geometry) -> Sequence[Perturbation]:
        return _IMAGES

    def measure(self, its: MapOf, seed: int, subject: Subject) -> dict[str, Found]:
        assert subject.difference is not None
        before, after = subject.values(_IMAGES)
        true_change = float(before - after)
        shares = subject.geometry.shares(subject.difference)
        map_change = float((subject.maps[its].astype(np.float64) * shares).sum())
        agreement = 0.5 * (1 + np.sign(true_change) * np.sign(map_change))
        return {
            "true_change": Found(true_change),
            "map_change": Found(map_change),
            "sign_agreement": Found(float(agreement)),
        }
