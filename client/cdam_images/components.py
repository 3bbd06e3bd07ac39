"""Connected components of masks and the boxes around them; numpy alone, so that the client and the engine draw the same box.

A component's pixels touch at an edge or a corner (8-connectivity), as in OpenCV's contours, which the literature on weakly
supervised localisation uses. A box is (top, left, bottom, right) in pixels, bottom and right exclusive.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Components", "components", "highest_iou"]

_Indices: TypeAlias = NDArray[np.intp]

_AT_ONCE: Final = 1 << 20  # pairs of boxes


class Components(NamedTuple):
    """The connected components of several masks: by mask, then by where each begins, from the top row by row.

    Attributes:
        mask: The index of each one's mask, shape (n,).
        area: Its pixels, shape (n,).
        box: The tightest box around it: top, left, bottom, right; shape (n, 4).
    """

    mask: _Indices
    area: _Indices
    box: _Indices

    def largest(self) -> Components:
        """The one of the largest area of each mask that has any; of equal ones the first."""
        order = np.lexsort((-self.area, self.mask))  # which is stable
        _, first = np.unique(self.mask[order], return_index=True)
        chosen = order[first]
        return Components(self.mask[chosen], self.area[chosen], self.box[chosen])


def components(masks: NDArray[np.bool_]) -> Components:
    """The connected components of each mask.

    Args:
        masks: Shape (masks, H, W).
    """
    count, height, width = masks.shape
    # One line of pixels, in which rows end with one that is outside, and masks with a row of those.
    padded = np.zeros((count, height + 1, width + 1), np.bool_)
    padded[:, :-1, :-1] = masks
    line = padded.ravel()
    edges = np.flatnonzero(line[1:] != line[:-1]) + 1
    if line[:1].any():
        edges = np.concatenate(([0], edges))
    starts, ends = edges[::2], edges[1::2]  # of runs: pixels side by side
    label = _joined(len(starts), *_touching(starts, ends, width + 1))
    first, of = np.unique(label, return_inverse=True)
    rows, lefts = np.divmod(starts, width + 1)
    rights = ends % (width + 1)
    area, left = np.zeros(len(first), np.intp), np.full(len(first), width)
    bottom, right = np.zeros(len(first), np.intp), np.zeros(len(first), np.intp)
    np.add.at(area, of, ends - starts)
    np.minimum.at(left, of, lefts)
    np.maximum.at(bottom, of, rows % (height + 1) + 1)
    np.maximum.at(right, of, rights)
    mask, top = np.divmod(rows[first], height + 1)
    return Components(mask, area, np.stack((top, left, bottom, right), axis=1))


def highest_iou(boxes: NDArray[Any], others: NDArray[Any]) -> NDArray[np.float64]:
    """Each box's intersection over union with that of the others that it fits best, shape (n,).

    Args:
        boxes: Shape (n, 4).
        others: Shape (m, 4), at least one.
    """
    highest = np.zeros(len(boxes))
    step = max(1, _AT_ONCE // len(others))
    for start in range(0, len(boxes), step):
        ours = boxes[start : start + step, None]
        corner, end = np.maximum(ours[..., :2], others[:, :2]), np.minimum(ours[..., 2:], others[:, 2:])
        both = (end - corner).clip(min=0).prod(axis=-1)
        highest[start : start + step] = (both / (_areas(ours) + _areas(others) - both)).max(axis=1)
    return highest


def _areas(boxes: NDArray[Any]) -> NDArray[Any]:
    areas: NDArray[Any] = (boxes[..., 2:] - boxes[..., :2]).prod(axis=-1)
    return areas


def _touching(starts: _Indices, ends: _Indices, step: int) -> tuple[_Indices, _Indices]:
    """Every two runs that touch from one row to the next, the upper ones and the lower ones."""
    first = np.searchsorted(ends, starts + step)  # of those in the next row: the first that does not end before
    count = np.searchsorted(starts, ends + step, side="right") - first
    upper = np.repeat(np.arange(len(starts)), count)
    within = np.arange(len(upper)) - np.repeat(count.cumsum() - count, count)
    return upper, np.repeat(first, count) + within


def _joined(count: int, one: _Indices, other: _Indices) -> _Indices:
    """The first of all that are joined with each, directly or by others, shape (count,)."""
    label = np.arange(count)
    while len(one):
        one, other = label[one], label[other]
        apart = one != other
        one, other = one[apart], other[apart]
        np.minimum.at(label, np.maximum(one, other), np.minimum(one, other))
        while (label[label] != label).any():
            label = label[label]
    return label
