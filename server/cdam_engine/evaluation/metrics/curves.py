"""Metrics that perturb the image in the order of the scores: fidelity, insertion and deletion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self, get_args

import numpy as np

from cdam_engine.evaluation.geometry import Enlargement, Geometry
from cdam_engine.evaluation.metrics.base import Better, Cost, Found, Metric, one_of, positive
from cdam_engine.evaluation.numerics import area, curve
from cdam_engine.evaluation.perturbation import MapOf, Order, Perturbation, Unit, ranked
from cdam_engine.evaluation.sample import Field
from cdam_engine.evaluation.subject import Subject
from cdam_engine.methods.base import at_least_one
from cdam_engine.methods.prediction import Activation


class _OfRanks(ABC):
    """What a metric is that perturbs the image in the order of the scores, along two curves."""

    @abstractmethod
    def _curves(self, its: MapOf, geometry: Geometry) -> tuple[list[Perturbation], list[Perturbation]]: ...

    def images_of_map(self, its: MapOf, geometry: Geometry) -> Sequence[Perturbation]:
        one, other = self._curves(its, geometry)
        return one + other

    def images_of_sample(self, seed: int, sample: str, geometry: Geometry) -> Sequence[Perturbation]:
        return ()


@dataclass(frozen=True)
class Fidelity(_OfRanks, Metric):
    """The target's value f as more and more of the image is blurred, most (MIF) or least (LIF) important first.

    Source: Brocki, Binda and Chung (TMLR 2024), correctness; after Samek et al. (2017).

    Attributes:
        unit: What is ranked: pixels, by the enlarged map, or whole patches. Equal scores keep raster order, both ways.
        blur_sigma: Of the Gaussian blur, in pixels at an input of 224 x 224; scaled by sqrt(H W) / 224.
        points: Points of a curve, at 0 to 100 % in equal steps.
        enlargement: Of the map, where pixels are ranked.
    """

    kind: ClassVar[str] = "fidelity"
    better: ClassVar[Better] = {
        "a_mif": "lower",
        "a_lif": "higher",
        "a_lif_mif": "higher",
        "mean_mif": "lower",
        "mean_lif": "higher",
    }
    requires: ClassVar[tuple[Field, ...]] = ()

    unit: Unit = "pixel"
    blur_sigma: float = 14.0
    points: int = 11
    enlargement: Enlargement = "bilinear"

    def __post_init__(self) -> None:
        one_of("unit", self.unit, get_args(Unit))
        one_of("enlargement", self.enlargement, get_args(Enlargement))
        positive("blur_sigma", self.blur_sigma)
        if self.points < 2:
            raise ValueError(f"points: {self.points}, but a curve has 2 at least")

    def resolved(self, geometry: Geometry, activation: Activation | None = None) -> Self:
        return self

    def cost(self, geometry: Geometry) -> Cost:
        return Cost(images=2 * self.points)

    def measure(self, its: MapOf, seed: int, subject: Subject) -> dict[str, Found]:
        percent = 100 * np.arange(self.points) / (self.points - 1)
        most, least = (subject.values(images) for images in self._curves(its, subject.geometry))
        mif, lif = curve(percent, most), curve(percent, least)
        a_mif, a_lif = area(mif), area(lif)
        return {
            "a_mif": Found(a_mif, mif),
            "a_lif": Found(a_lif, lif),
            "a_lif_mif": Found(a_lif - a_mif),
            "mean_mif": Found(float(most.mean())),
            "mean_lif": Found(float(least.mean())),
        }

    def _curves(self, its: MapOf, geometry: Geometry) -> tuple[list[Perturbation], list[Perturbation]]:
        """The images of both curves, the most and the least important part blurred first."""
        total = _total(self.unit, geometry)
        counts = _counts(total, self.points - 1)
        orders = (_order(its, self.unit, self.enlargement, least_first=least) for least in (False, True))
        most, least = (ranked(order, counts, total, first=float(self.blur_sigma), rest="clean") for order in orders)
        return most, least


@dataclass(frozen=True)
class InsertionDeletion(_OfRanks, Metric):
    """The target's probability as the most important parts are inserted into a blurred image, or deleted.

    Source: Petsiuk, Das and Saenko (RISE, 2018).

    Attributes:
        unit: As for `Fidelity`.
        steps: Steps from nothing to all; None: one for each patch.
        blur_sigma: Of the image that insertion starts from, as for `Fidelity`.
        enlargement: As for `Fidelity`.
        activation: Makes probabilities of the outputs; of targets that are no outputs the values are taken as they are.
    """

    kind: ClassVar[str] = "insertion_deletion"
    better: ClassVar[Better] = {
        "insertion": "higher",
        "deletion": "lower",
        "insertion_deletion": "higher",
    }
    requires: ClassVar[tuple[Field, ...]] = ()

    unit: Unit = "pixel"
    steps: int | None = None
    blur_sigma: float = 5.0
    enlargement: Enlargement = "bilinear"
    activation: Activation = "softmax"

    def __post_init__(self) -> None:
        one_of("unit", self.unit, get_args(Unit))
        one_of("enlargement", self.enlargement, get_args(Enlargement))
        one_of("activation", self.activation, get_args(Activation))
        positive("blur_sigma", self.blur_sigma)
        if self.steps is not None:
            at_least_one("steps", self.steps)

    def resolved(self, geometry: Geometry, activation: Activation | None = None) -> Self:
        return replace(self, steps=self._steps(geometry), activation=activation or self.activation)

    def cost(self, geometry: Geometry) -> Cost:
        return Cost(images=2 * self._steps(geometry))

    def measure(self, its: MapOf, seed: int, subject: Subject) -> dict[str, Found]:
        steps = self._steps(subject.geometry)
        insertion, deletion = (
            curve(np.arange(steps + 1) / steps, subject.values(images, self.activation))
            for images in self._curves(its, subject.geometry)
        )
        inserted, deleted = area(insertion), area(deletion)
        return {
            "insertion": Found(inserted, insertion),
            "deletion": Found(deleted, deletion),
            "insertion_deletion": Found(inserted - deleted),
        }

    def _curves(self, its: MapOf, geometry: Geometry) -> tuple[list[Perturbation], list[Perturbation]]:
        """The images of both curves, insertion and deletion."""
        total = _total(self.unit, geometry)
        counts = _counts(total, self._steps(geometry))
        order = _order(its, self.unit, self.enlargement, least_first=False)
        return (
            ranked(order, counts, total, first="clean", rest=float(self.blur_sigma)),
            ranked(order, counts, total, first="mean_colour", rest="clean"),
        )

    def _steps(self, geometry: Geometry) -> int:
        return self.steps or geometry.grid.h * geometry.grid.w


def _order(its: MapOf, unit: Unit, enlargement: Enlargement, *, least_first: bool) -> Order:
    return Order(its, unit, enlargement if unit == "pixel" else None, least_first)


def _total(unit: Unit, geometry: Geometry) -> int:
    height, width = geometry.input_size if unit == "pixel" else geometry.grid
    return height * width


def _counts(total: int, steps: int) -> list[int]:
    """How many are perturbed at each point, from none to all: floor(total k / steps + 1/2)."""
    return [(2 * total * k + steps) // (2 * steps) for k in range(steps + 1)]
