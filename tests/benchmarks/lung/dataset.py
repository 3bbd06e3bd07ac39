"""From crops to what `cdam train head` takes: pictures and a CSV file, with scans kept on one side."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.lung.regions import disc
from real.lidc import BIOMARKERS, SIDE, Nodules

SHARES: Final = (0.7225, 0.1275, 0.15)
"""Of the scans for train, val and test, as in the paper (of its nodules)."""
SIDES: Final = ("train", "val", "test")


def grey(crops: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Crops as 8-bit grey: all of -1000 to 400 HU, 5.5 HU a level."""
    return np.round(crops / 257).astype(np.uint8)


def sides(scan: NDArray[np.int64], malignant: NDArray[np.int64], seed: int) -> NDArray[np.str_]:
    """On which side each nodule is, (n,): scans are drawn, those with a malignant nodule and those without apart.

    Args:
        scan: Of each nodule, (n,).
        malignant: Whether it is, (n,).
        seed: Of the draw.
    """
    rng = np.random.default_rng(seed)
    ends = np.cumsum(SHARES)[:-1]
    side: dict[int, str] = {}
    with_one = np.unique(scan[malignant > 0])
    for stratum in (with_one, np.setdiff1d(scan, with_one)):
        drawn = rng.permutation(stratum)
        for place, one in enumerate(drawn.tolist()):
            side[one] = SIDES[int(np.searchsorted(ends, (place + 0.5) / len(drawn)))]
    return np.array([side[one] for one in scan.tolist()])


def name_of(row: int, kind: str = "crops") -> str:
    """The picture's file, relative to the CSV file; of "discs" its disc's."""
    return f"{kind}/{row:04}.png"


def write(its: Nodules, folder: Path, splits: int) -> Path:
    """The pictures, `crops/*.png`, and `nodules.csv`; with a column `split_0`, `split_1`, ... for each seed.

    For `cdam evaluate` discs in the place of masks, `discs/*.png`, and the test nodules, `test_0.csv`, ...

    Args:
        its: The nodules.
        folder: Where to; made if need be.
        splits: How many ways to divide them.

    Returns:
        The CSV file.
    """
    for kind in ("crops", "discs"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    middles = np.arange(SIDE) + 0.5
    y, x = np.meshgrid(middles, middles, indexing="ij")
    for row, picture in enumerate(grey(its.crops)):
        Image.fromarray(picture).save(folder / name_of(row))
        inside = disc(its.radius[row])(y, x) <= 0
        Image.fromarray(inside.astype(np.uint8) * 255).save(folder / name_of(row, "discs"))
    path = folder / "nodules.csv"
    with path.open("w", newline="", encoding="utf-8") as text:
        writer = csv.writer(text, lineterminator="\n")
        divided = [sides(its.scan, its.malignant, seed) for seed in range(splits)]
        columns = ["image", "scan", *(f"split_{seed}" for seed in range(splits))]
        writer.writerow([*columns, "malignant", "mean_malignancy", *BIOMARKERS])
        writer.writerows(_rows(its, divided))
    for seed, side in enumerate(divided):
        with (folder / f"test_{seed}.csv").open("w", newline="", encoding="utf-8") as text:
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(["id", "image", "target", "mask"])
            for row in np.flatnonzero(side == "test").tolist():
                writer.writerow([f"{row:04}", name_of(row), "malignant", name_of(row, "discs")])
    return path


def _rows(its: Nodules, divided: list[NDArray[np.str_]]) -> Iterator[list[object]]:
    for row in range(len(its)):
        values = (its.mean_malignancy[row], *its.biomarkers[row])
        split = [one[row] for one in divided]
        yield [name_of(row), its.scan[row], *split, its.malignant[row], *(f"{value:.6g}" for value in values)]
