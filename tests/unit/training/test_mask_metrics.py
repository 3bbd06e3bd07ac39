"""Metrics of maps against masks: scikit-learn and plain counts over pixels."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

from cdam_training.mask_metrics import measure_masks, pixel_average_precision
from cdam_training.masks import PatchMask

NAMES = ("a", "b", "c")
PATCHES, SIDE = 12, 16  # pixels of a patch


def pixels(seed: int, outputs: list[int]) -> tuple[NDArray[np.int64], PatchMask, NDArray[np.float64]]:
    """Which output each pixel is of, (P, SIDE): -1 undecided, from 1; the same as counts; and a map of each output."""
    rng = np.random.default_rng(seed)
    numbers = rng.choice([-1, 0, *(output + 1 for output in outputs)], (PATCHES, SIDE))
    inside = np.stack([(numbers == output + 1).sum(1) for output in range(3)]).astype(np.int32)
    mask = PatchMask(np.arange(3), inside, (numbers >= 0).sum(1).astype(np.int32))
    return numbers, mask, rng.random((3, PATCHES)).round(1)  # with ties


def test_average_precision_of_patches_is_that_of_their_pixels() -> None:
    for seed in range(20):
        numbers, mask, maps = pixels(seed, [0, 2])
        decided = numbers >= 0
        for output in (0, 2):
            scores = np.repeat(maps[output][:, None], SIDE, 1)[decided]
            expected = average_precision_score((numbers == output + 1)[decided], scores)
            found = pixel_average_precision(maps[output], mask.inside[output].astype(float), mask.decided.astype(float))
            assert found == pytest.approx(expected, abs=1e-12)


def test_everything_is_what_counts_over_pixels_say() -> None:
    images = [pixels(0, [0, 2]), pixels(1, [0]), pixels(2, [])]
    scores = measure_masks(NAMES, [(mask, maps) for _, mask, maps in images], np.arange(3))
    assert (scores.rows, scores.clusters) == (3, 3)
    for output, name in enumerate(NAMES):
        precision, share, iou, errors = [], [], [], []
        both = either = 0
        for numbers, _, maps in images:
            decided = numbers >= 0
            p = np.repeat(maps[output][:, None], SIDE, 1)[decided]
            true = (numbers == output + 1)[decided]
            errors.append((p - true) ** 2)
            both += int((true & (p > 0.5)).sum())
            either += int((true | (p > 0.5)).sum())
            if true.any():
                precision.append(average_precision_score(true, p))
                share.append(true.mean())
                iou.append((true & (p > 0.5)).sum() / (true | (p > 0.5)).sum())
        found = {quantity: its[name].value for quantity, its in scores.by_output.items()}
        assert found["mask_brier"] == pytest.approx(np.concatenate(errors).mean(), abs=1e-12)
        assert found["class_iou"] == pytest.approx(both / either, abs=1e-12)
        if precision:
            assert found["mask_average_precision"] == pytest.approx(np.mean(precision), abs=1e-12)
            assert found["mask_share"] == pytest.approx(np.mean(share), abs=1e-12)
            assert found["mask_iou"] == pytest.approx(np.mean(iou), abs=1e-12)
        else:
            assert scores.by_output["mask_iou"][name].note == "no mask shows it"
    a, c = (scores.by_output["mask_iou"][name].value for name in ("a", "c"))
    mean = scores.estimates["mean_mask_iou"]
    assert a is not None
    assert c is not None
    assert mean.value == pytest.approx((a + c) / 2)
    assert mean.note.startswith("over 2 of 3 outputs: of the others no mask shows it")


def test_intervals_are_of_clusters() -> None:
    """The share of pixels inside is a mean over images: its interval is that of a mean over clusters."""
    rng = np.random.default_rng(3)
    count = 40
    inside = rng.integers(1, SIDE, (count, 1, PATCHES)).astype(np.int32)
    decided = np.full(PATCHES, SIDE, np.int32)
    clusters = np.repeat(np.arange(count // 2), 2)
    maps = [(PatchMask(np.array([0]), its, decided), np.zeros((1, PATCHES))) for its in inside]
    estimate = measure_masks(NAMES[:1], maps, clusters).estimates["mean_mask_share"]
    shares = inside.mean((1, 2)) / SIDE
    assert estimate.value == pytest.approx(shares.mean())
    assert estimate.low is not None
    assert estimate.high is not None
    error = shares.reshape(-1, 2).mean(1).std() / np.sqrt(count // 2)
    assert (estimate.high - estimate.low) / 2 == pytest.approx(1.96 * error, rel=0.15)


def test_there_must_be_something() -> None:
    with pytest.raises(ValueError, match="no rows"):
        measure_masks(NAMES, [], np.arange(0))
