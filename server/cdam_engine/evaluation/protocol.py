"""What is measured of what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cdam_engine.evaluation.evaluated import Anchor, Evaluated
from cdam_engine.evaluation.geometry import Geometry
from cdam_engine.evaluation.metrics.base import Cost, Metric
from cdam_engine.evaluation.sample import Field
from cdam_engine.methods.base import at_least_one, check_seed


@dataclass(frozen=True)
class Protocol:
    """What is compared on what.

    Attributes:
        methods: Methods, and anchors to see what a metric can tell; at least one.
        metrics: At least one.
        seed: With a sample's id it fixes every draw, whatever the order of the samples.
    """

    methods: tuple[Evaluated, ...]
    metrics: tuple[Metric, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one("methods", len(self.methods))
        at_least_one("metrics", len(self.metrics))
        check_seed(self.seed)

    def cost(self, geometry: Geometry) -> Cost:
        """What the metrics take of a sample, for all methods, each counted as if it shared nothing.

        Args:
            geometry: Of the image.
        """
        costs = [metric.cost(geometry) for metric in self.metrics]
        return Cost(*(len(self.methods) * sum(its) for its in zip(*costs, strict=True)))

    def required(self) -> Mapping[Field, str]:
        """The optional fields of a sample that must be there, and what requires each."""
        required: dict[Field, str] = {}
        for metric in self.metrics:
            for field in metric.requires:
                required.setdefault(field, metric.kind)
        for anchor in (Anchor.MASK, Anchor.INVERTED_MASK):
            if anchor in self.methods:
                required.setdefault("mask", anchor.value)
                if "wrong_target" in required:
                    required.setdefault("wrong_mask", anchor.value)
        return required
