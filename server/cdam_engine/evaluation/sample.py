"""A sample of an evaluation, and what is measured of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cdam_engine.targets import Scalar

Field = Literal["wrong_target", "mask", "counterfactual", "wrong_mask"]
"""What a sample may have beside its image and target."""


class SampleError(ValueError):
    """A sample that can't be measured; the others of its evaluation can.

    Attributes:
        field: What is wrong of it: ``image``, ``target``, ``wrong_target``, ``mask``, ``counterfactual`` or ``wrong_mask``.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.reason = message


@dataclass(frozen=True, eq=False)
class Sample:
    """An image with what is known about it.

    Attributes:
        id: Keys the sample's draws; unique in its evaluation.
        image: uint8 pixels, shape (H, W, C); or normalised input, shape (C, H, W), in the model's dtype.
        target: The right target.
        wrong_target: A wrong target, where a metric compares the two.
        mask: Where the target's object is, shape (H, W), bool.
        counterfactual: The image without the target's object, of the same kind as `image`.
        wrong_mask: Where the wrong target's object is; what the mask anchors show for the wrong target.
    """

    id: str
    image: NDArray[np.uint8] | Tensor
    target: Scalar
    wrong_target: Scalar | None = None
    mask: NDArray[np.bool_] | None = None
    counterfactual: NDArray[np.uint8] | Tensor | None = None
    wrong_mask: NDArray[np.bool_] | None = None


@dataclass(frozen=True, eq=False)
class Value:
    """One number of one sample.

    Attributes:
        method_index: Index in `Protocol.methods`.
        metric_index: Index in `Protocol.metrics`.
        quantity: Which of the metric's quantities.
        value: Finite.
        curve: What it is the area or the mean of, if it is one: shape (2, points), abscissae then ordinates.
    """

    method_index: int
    metric_index: int
    quantity: str
    value: float
    curve: NDArray[np.float64] | None = None


@dataclass(frozen=True, eq=False)
class Measured:
    """All that is measured of a sample: by method, then by metric, then in the order of the metric's quantities."""

    values: tuple[Value, ...]
