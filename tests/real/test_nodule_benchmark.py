"""The benchmark on lung nodules, on nodules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.lung import dataset, regions
from real.lidc import BIOMARKERS, Nodules, nodules


@pytest.fixture(scope="module")
def its() -> Nodules:
    try:
        return nodules()
    except LookupError as error:
        pytest.skip(f"needs lung nodules: {error}")


def test_nodules_are_in_the_middle_of_their_crops(its: Nodules) -> None:
    assert len(its) == 916
    y, x = np.indices((32, 32)) + 0.5
    near = np.hypot(y - regions.CENTRE, x - regions.CENTRE) < 8
    weights = np.maximum(its.crops / 65535 * 1400 - 600, 0) * near  # above -400 HU
    there = weights.sum((1, 2)) > 0
    middle = [float(np.median((weights * axis).sum((1, 2))[there] / weights.sum((1, 2))[there])) for axis in (y, x)]
    assert middle == pytest.approx([regions.CENTRE] * 2, abs=0.25)
    inside = [
        crop[regions.regions(regions.disc(radius)).inside.repeat(2, 0).repeat(2, 1) >= 0.5].mean()
        for crop, radius in zip(its.crops, its.radius, strict=True)
    ]
    assert np.mean(np.array(inside) > its.crops.mean((1, 2))) > 0.9


def test_enough_nodules_have_a_rim(its: Nodules) -> None:
    rims = np.array([regions.regions(regions.disc(radius)).has_rim for radius in its.radius])
    for seed in range(2):
        assert (rims & (dataset.sides(its.scan, its.malignant, seed) == "test")).sum() >= 70
    tested = [dataset.sides(its.scan, its.malignant, seed) == "test" for seed in range(5)]
    assert (rims & np.any(tested, axis=0)).sum() >= 300


def test_the_split_and_the_targets_are_as_expected(its: Nodules, tmp_path: Path) -> None:
    path = dataset.write(its, tmp_path, 1)
    assert len(path.read_text().splitlines()) == 917
    assert its.malignant.sum() == 401
    assert ((its.mean_malignancy > 3) == (its.malignant > 0)).sum() == 886
    diameter = its.biomarkers[:, BIOMARKERS.index("diameter")]
    assert np.corrcoef(diameter, its.malignant)[0, 1] == pytest.approx(0.64, abs=0.005)
    side = dataset.sides(its.scan, its.malignant, 0)
    assert [np.mean(side == name) for name in dataset.SIDES] == pytest.approx(dataset.SHARES, abs=0.03)
    with Image.open(tmp_path / dataset.name_of(500)) as picture:
        assert np.asarray(picture) == pytest.approx(its.crops[500] / 257, abs=0.5)
