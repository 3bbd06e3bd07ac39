"""Connected components and boxes against scikit-image, and against pixels counted one by one."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.measure
from numpy.typing import NDArray

from cdam_images.components import components, highest_iou

Row = tuple[int, ...]


def plain(masks: NDArray[np.bool_]) -> list[Row]:
    """Mask, area and box of each component, by scikit-image."""
    return [
        (index, int(region.area), *region.bbox)
        for index, mask in enumerate(masks)
        for region in skimage.measure.regionprops(skimage.measure.label(mask, connectivity=2))
    ]


def rows(masks: NDArray[np.bool_]) -> list[Row]:
    found = components(masks)
    return [
        (int(mask), int(area), *map(int, box))
        for mask, area, box in zip(found.mask, found.area, found.box, strict=True)
    ]


@pytest.mark.parametrize("share", [0.1, 0.35, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("shape", [(3, 7, 5), (4, 40, 31), (5, 1, 9), (5, 9, 1), (2, 1, 1), (1, 64, 64)])
def test_components_are_scikit_images(shape: tuple[int, int, int], share: float) -> None:
    for seed in range(10):
        masks = np.random.default_rng(seed).random(shape) < share
        assert rows(masks) == plain(masks)


def test_forms_that_join_late() -> None:
    """A spiral and a comb, whose runs belong together only by what comes far below; corners touch."""
    spiral = np.zeros((21, 21), bool)
    for inset in range(0, 10, 2):
        spiral[inset, inset : -inset or None] = spiral[inset : -inset or None, -1 - inset] = True
        spiral[-1 - inset, inset : -inset or None] = spiral[inset + 2 : -inset or None, inset] = True
        spiral[inset + 2, inset : inset + 3] = True
    comb = np.zeros((21, 21), bool)
    comb[:, ::2] = comb[-1] = True
    masks = np.stack((spiral, comb, np.eye(21, dtype=bool), ~spiral, np.flipud(comb), np.fliplr(np.eye(21)) > 0))
    assert rows(masks) == plain(masks)
    assert rows(masks)[1] == (1, int(comb.sum()), 0, 0, 21, 21)


def test_nothing_and_everything() -> None:
    masks = np.stack((np.zeros((4, 6), bool), np.ones((4, 6), bool), np.zeros((4, 6), bool)))
    assert rows(masks) == [(1, 24, 0, 0, 4, 6)]
    assert rows(masks[:1]) == rows(masks[:0]) == []
    assert components(masks[:1]).box.shape == (0, 4)


def test_the_largest_of_each_mask_and_of_equal_ones_the_first() -> None:
    masks = np.zeros((3, 5, 9), bool)
    masks[0, 0, :2] = masks[0, 2, 4:7] = masks[0, 4, 0] = True
    masks[2, 3:, 6:8] = masks[2, 0:2, 3:5] = masks[2, 4, 0] = True
    found = components(masks).largest()
    assert found.mask.tolist() == [0, 2]
    assert found.area.tolist() == [3, 4]
    assert found.box.tolist() == [[2, 4, 3, 7], [0, 3, 2, 5]]


def test_iou_counts_pixels() -> None:
    rng = np.random.default_rng(0)

    def boxes(count: int) -> NDArray[np.int64]:
        corners = rng.integers(0, 12, (count, 2))
        return np.concatenate((corners, corners + rng.integers(1, 9, (count, 2))), axis=1)

    def pixels(box: NDArray[np.int64]) -> NDArray[np.bool_]:
        canvas = np.zeros((20, 20), bool)
        canvas[box[0] : box[2], box[1] : box[3]] = True
        return canvas

    ours, others = boxes(200), boxes(9)
    expected = [max((pixels(a) & pixels(b)).sum() / (pixels(a) | pixels(b)).sum() for b in others) for a in ours]
    np.testing.assert_array_equal(highest_iou(ours, others), expected)
    assert highest_iou(ours[:0], others).shape == (0,)
    assert highest_iou(others, others).tolist() == [1.0] * 9


def test_many_boxes_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    corners = rng.integers(0, 50, (100, 2))
    boxes = np.concatenate((corners, corners + 1 + rng.integers(0, 20, (100, 2))), axis=1)
    whole = highest_iou(boxes, boxes[::7])
    monkeypatch.setattr("cdam_images.components._AT_ONCE", 40)
    np.testing.assert_array_equal(highest_iou(boxes, boxes[::7]), whole)
