"""Where on a crop's patches a nodule's body, its rim and its surroundings are.

There are no masks. The disc of the rated diameter in the middle is an approximation; what is brighter than -400 HU there
is another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from real.backbone import INPUT
from real.lidc import HU_RANGE, SIDE

Floats = NDArray[np.float64]

CENTRE: Final = 16.5
"""Of the nodule in pixels from the crop's edge: the middle of pixel 16, where the brightness' centroid is in the median."""
GRID: Final = 16
"""Patches along a side."""
PATCH: Final = SIDE / GRID
"""Pixels of the crop along a patch's side."""
THRESHOLD: Final = -400.0
"""HU, midway between lung (about -800) and soft tissue (about 0)."""

_FINE: Final = 16  # points along a patch's side at which distances are taken
_REACH: Final = 1.5  # radii from the centre within which bright pixels may belong to the nodule


@dataclass(frozen=True, eq=False)
class Regions:
    """The share of each patch that lies in a region, (16, 16) each.

    Attributes:
        inside: The nodule.
        body: More than a patch from its edge, inside.
        rim: At most a patch from its edge, on either side.
        outside: More than a patch from its edge, outside.
    """

    inside: Floats
    body: Floats
    rim: Floats
    outside: Floats

    @property
    def has_rim(self) -> bool:
        """Whether the body covers two patches or more, and the rim lies in the crop: else they can't be told apart."""
        touched = (self.rim[0].any(), self.rim[-1].any(), self.rim[:, 0].any(), self.rim[:, -1].any())
        return bool(self.body.sum() >= 2 and not any(touched) and self.outside.sum() >= 2)


def regions(distance: Callable[[Floats, Floats], Floats]) -> Regions:
    """The regions of a nodule.

    Args:
        distance: From its edge at points of the crop, y and x in pixels; negative inside.
    """
    points = (np.arange(GRID * _FINE) + 0.5) * PATCH / _FINE
    its = distance(*np.meshgrid(points, points, indexing="ij"))
    return Regions(*(_shares(where) for where in (its <= 0, its < -PATCH, np.abs(its) <= PATCH, its > PATCH)))


def _shares(where: NDArray[np.bool_]) -> Floats:
    shares: Floats = where.reshape(GRID, _FINE, GRID, _FINE).mean((1, 3))
    return shares


def disc(radius: float) -> Callable[[Floats, Floats], Floats]:
    """Distance from the edge of a disc in the middle, its radius in pixels."""
    return lambda y, x: np.hypot(y - CENTRE, x - CENTRE) - radius


def disc_mask(radius: float) -> NDArray[np.bool_]:
    """The disc on the model's input, (224, 224)."""
    down, across = ((np.arange(side) + 0.5) * SIDE / side for side in INPUT)
    return np.asarray(disc(radius)(*np.meshgrid(down, across, indexing="ij")) <= 0)


def bright(crop: NDArray[np.uint16], radius: float) -> NDArray[np.bool_] | None:
    """What is above `THRESHOLD` and hangs together with the middle, (32, 32); None if the middle is not.

    Nodules touch vessels and the chest wall, which are as bright: what is further than 1.5 radii from the centre is left
    out.
    """
    low, high = HU_RANGE
    level = (THRESHOLD - low) / (high - low) * 65535
    y, x = (np.indices(crop.shape) + 0.5).astype(np.float64)
    near = np.hypot(y - CENTRE, x - CENTRE) <= _REACH * radius
    labels, _ = ndimage.label((crop > level) & near)
    middle = labels[int(CENTRE), int(CENTRE)]
    return np.asarray(labels == middle) if middle else None


def outline(mask: NDArray[np.bool_]) -> Callable[[Floats, Floats], Floats]:
    """Distance from the edge of a mask (32, 32), interpolated between pixels' middles."""
    # From a pixel's middle to the edge it is half a pixel less than to the nearest middle beyond it.
    signed = np.where(mask, 0.5 - ndimage.distance_transform_edt(mask), ndimage.distance_transform_edt(~mask) - 0.5)
    return lambda y, x: np.asarray(ndimage.map_coordinates(signed, [y - 0.5, x - 0.5], order=1, mode="nearest"))
