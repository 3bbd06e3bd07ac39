"""Class discrimination: does the map for the right target speak of it more than that for a wrong one?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from cdam_engine.evaluation.geometry import Geometry
from cdam_engine.evaluation.metrics.base import Better, Cost, Found, Metric, ParameterError
from cdam_engine.evaluation.metrics.boxes import BoxSensitivity
from cdam_engine.evaluation.metrics.curves import Fidelity
from cdam_engine.evaluation.perturbation import MapOf, Perturbation, map_of
from cdam_engine.evaluation.sample import Field
from cdam_engine.evaluation.subject import Subject
from cdam_engine.methods.prediction import Activation


@dataclass(frozen=True)
class ClassDiscrimination(Metric):
    """Fidelity and box sensitivity of the map for the right target minus those of the map for the wrong one.

    Both are measured on the right target. Source: Brocki, Binda and Chung (TMLR 2024), class sensitivity.

    Attributes:
        fidelity: The fidelity that is compared.
        box_sensitivity: The box sensitivity that is compared.
    """

    kind: ClassVar[str] = "class_discrimination"
    better: ClassVar[Better] = {
        "delta_a_mif": "lower",
        "delta_a_lif": "higher",
        "delta_a_lif_mif": "higher",
        "delta_box_mean": "higher",
        "delta_box_area": "higher",
    }
    requires: ClassVar[tuple[Field, ...]] = ("wrong_target",)

    fidelity: Fidelity = field(default_factory=Fidelity)
    box_sensitivity: BoxSensitivity = field(default_factory=BoxSensitivity)

    def resolved(self, geometry: Geometry, activation: Activation | None = None) -> Self:
        try:
            boxes = self.box_sensitivity.resolved(geometry, activation)
        except ParameterError as error:
            error.field = f"box_sensitivity.{error.field}"
            raise
        return replace(self, fidelity=self.fidelity.resolved(geometry, activation), box_sensitivity=boxes)

    def cost(self, geometry: Geometry) -> Cost:
        return Cost(images=2 * self.fidelity.cost(geometry).images + self.box_sensitivity.cost(geometry).images)

    def images_of_map(self, its: MapOf, geometry: Geometry) -> Sequence[Perturbation]:
        return [image for each in _right_and_wrong(its) for image in self.fidelity.images_of_map(each, geometry)]

    def images_of_sample(self, seed: int, sample: str, geometry: Geometry) -> Sequence[Perturbation]:
        return self.box_sensitivity.images_of_sample(seed, sample, geometry)

    def measure(self, its: MapOf, seed: int, subject: Subject) -> dict[str, Found]:
        right, wrong = (
            self.fidelity.measure(each, seed, subject) | self.box_sensitivity.measure(each, seed, subject)
            for each in _right_and_wrong(its)
        )
        names = {quantity: quantity.removeprefix("delta_") for quantity in self.quantities}
        return {quantity: Found(right[name].value - wrong[name].value) for quantity, name in names.items()}


def _right_and_wrong(its: MapOf) -> tuple[MapOf, MapOf]:
    return its, map_of(its.evaluated, wrong=True)
