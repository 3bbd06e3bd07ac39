"""Box sensitivity: do the scores in a box tell how much the box matters?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final, Self, get_args

import numpy as np
from numpy.typing import NDArray

from cdam_engine.evaluation.draws import generator
from cdam_engine.evaluation.geometry import Enlargement, Geometry
from cdam_engine.evaluation.metrics.base import Better, Cost, Found, Metric, ParameterError, one_of, positive
from cdam_engine.evaluation.numerics import Floats, area, curve, pearson
from cdam_engine.evaluation.perturbation import CLEAN, Boxed, MapOf, Perturbation
from cdam_engine.evaluation.sample import Field
from cdam_engine.evaluation.subject import Subject
from cdam_engine.methods.prediction import Activation

_ROUNDING: Final = 1e-5  # of the target's value; of a plain image every drop is no more than that

Corners = tuple[NDArray[np.int64], NDArray[np.int64]]
"""First rows and first columns of boxes."""


@dataclass(frozen=True)
class BoxSensitivity(Metric):
    """Pearson's r, over random square boxes, of the scores' sum in a box and f's drop when the box is blurred.

    Source: Brocki, Binda and Chung (TMLR 2024), correctness; after sensitivity-n (Ancona et al. 2018). The boxes of a
    sample are the same for every method and target. Of sums that do not vary, or values of f that vary by no more than
    rounding (a hundred-thousandth), r is 0.

    Attributes:
        box_sizes: Sides in pixels of the model's input; empty: 1/8, 2/8, 3/8 and 4/8 of its shorter side, rounded.
        boxes: Boxes of each size.
        blur_sigma: As for `Fidelity`.
        enlargement: Of the map.
    """

    kind: ClassVar[str] = "box_sensitivity"
    better: ClassVar[Better] = {"box_mean": "higher", "box_area": "higher"}
    requires: ClassVar[tuple[Field, ...]] = ()

    box_sizes: tuple[int, ...] = ()
    boxes: int = 100
    blur_sigma: float = 14.0
    enlargement: Enlargement = "bilinear"

    def __post_init__(self) -> None:
        one_of("enlargement", self.enlargement, get_args(Enlargement))
        positive("blur_sigma", self.blur_sigma)
        if self.boxes < 2:
            raise ValueError(f"boxes: {self.boxes}, but a correlation needs 2 at least")
        if any(size < 1 for size in self.box_sizes) or list(self.box_sizes) != sorted(set(self.box_sizes)):
            raise ValueError(f"box_sizes: {self.box_sizes}, but sides are at least 1, distinct, and in ascending order")

    def resolved(self, geometry: Geometry, activation: Activation | None = None) -> Self:
        return replace(self, box_sizes=self.sizes(geometry.input_size))

    def cost(self, geometry: Geometry) -> Cost:
        return Cost(images=len(self.sizes(geometry.input_size)) * self.boxes)

    def images_of_map(self, its: MapOf, geometry: Geometry) -> Sequence[Perturbation]:
        return ()

    def images_of_sample(self, seed: int, sample: str, geometry: Geometry) -> Sequence[Perturbation]:
        boxes = (
            self._images(side, self._corners(seed, sample, geometry, side)) for side in self.sizes(geometry.input_size)
        )
        return [CLEAN, *(image for images in boxes for image in images)]

    def measure(self, its: MapOf, seed: int, subject: Subject) -> dict[str, Found]:
        geometry = subject.geometry
        (clean,) = subject.values([CLEAN])
        integral = _integral(subject.enlarged(its, self.enlargement))
        sides = self.sizes(geometry.input_size)
        correlations = []
        for side in sides:
            corners = self._corners(seed, subject.sample.id, geometry, side)
            blurred = subject.values(self._images(side, corners))
            moved = np.ptp(blurred) > _ROUNDING * np.abs(blurred).max()
            correlations.append(pearson(_sums(integral, corners, side), clean - blurred) if moved else 0.0)
        r = np.array(correlations)
        found = curve(100 * np.array(sides) / min(geometry.input_size), r)
        spread = float(found[0, -1] - found[0, 0])
        return {
            "box_mean": Found(float(r.mean())),
            "box_area": Found(area(found) / spread if spread else float(r[0]), found),
        }

    def sizes(self, input_size: tuple[int, int]) -> tuple[int, ...]:
        """The sides in pixels, at an input of (height, width).

        Raises:
            ParameterError: A box does not fit into the input.
        """
        shorter = min(input_size)
        sizes = self.box_sizes or tuple(dict.fromkeys(max(1, round(shorter * k / 8)) for k in (1, 2, 3, 4)))
        if sizes[-1] > shorter:
            raise ParameterError("box_sizes", f"{sizes[-1]}, but the input's shorter side has {shorter} pixels")
        return sizes

    def _corners(self, seed: int, sample: str, geometry: Geometry, side: int) -> Corners:
        rng = generator(seed, sample, "boxes", str(side))
        tops, lefts = (rng.integers(0, length - side + 1, self.boxes) for length in geometry.input_size)
        return tops, lefts

    def _images(self, side: int, corners: Corners) -> list[Perturbation]:
        tops, lefts = corners
        return [Boxed(float(self.blur_sigma), side, *at) for at in zip(tops.tolist(), lefts.tolist(), strict=True)]


def _integral(values: NDArray[np.floating]) -> Floats:
    """Sums over all rows above and all columns to the left, shape (H + 1, W + 1)."""
    return np.pad(values.astype(np.float64).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))


def _sums(integral: Floats, corners: Corners, side: int) -> Floats:
    top, left = corners
    bottom, right = top + side, left + side
    sums: Floats = integral[bottom, right] - integral[top, right] - integral[bottom, left] + integral[top, left]
    return sums
