"""How often curves of hits are hit, over samples that come in any order: sums of whole numbers, exact."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

_Array: TypeAlias = NDArray[np.float64]


def as_hits(curve: NDArray[Any] | None) -> NDArray[np.bool_]:
    """Whether each point of a curve (2, points) is hit: its ordinate is 1, not 0.

    Raises:
        ValueError: It is no such curve.
    """
    if curve is None:
        raise ValueError("there is no curve")
    if curve.ndim != 2 or len(curve) != 2 or not curve.size:
        raise ValueError(f"a curve has the shape (2, points), not {curve.shape}")
    if not np.isin(curve[1], (0, 1)).all():
        raise ValueError("the curve has ordinates other than 0 and 1")
    return np.asarray(curve[1] == 1)


class Hits:
    """Hits at each point: of all samples once, and of the bootstrap's resamples."""

    def __init__(self, points: int, resamples: int) -> None:
        self.once = np.zeros(points, np.int64)
        self.drawn = np.zeros((points, resamples), np.int64)

    def add(self, hits: NDArray[np.bool_], weights: _Array) -> None:
        """Add a sample, which counts so often in each resample."""
        self.once += hits
        self.drawn[hits] += weights.astype(np.int64)

    def merge(self, other: "Hits") -> None:
        """Add those of other samples."""
        self.once += other.once
        self.drawn += other.drawn

    def peak(self, samples: int) -> float:
        """The largest share of so many samples that a point has."""
        return float(self.once.max()) / samples

    def peaks(self, weight: _Array) -> _Array:
        """The same of each resample that has samples, whose weight is not 0."""
        some = weight > 0
        return np.asarray(self.drawn[:, some].max(axis=0) / weight[some])
