"""Lung nodules with the ratings of radiologists: 916 of LIDC-IDRI, where they are at hand.

They are for research only and not part of this repository. `CDAM_LIDC` names their folder: `crops.npz` (`crops`, uint16,
(916, 32, 32): -1000 to 400 HU scaled to 0 to 65535, the nodule in the middle, at the scan's own spacing) and
`nodules.csv` (of each crop its row, the scan, the ratings' means, the diameter in mm, mm per pixel). Without it,
`../shared/data/lidc` beside the repository.
"""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

BIOMARKERS: Final = (
    "subtlety",
    "calcification",
    "sphericity",
    "margin",
    "lobulation",
    "spiculation",
    "texture",
    "diameter",
)
SIDE: Final = 32
"""Of a crop, in pixels."""
HU_RANGE: Final = (-1000.0, 400.0)
"""What the crops' least and largest numbers stand for: a lung window, so nothing has to be cut off."""

_BESIDE: Final = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "lidc"


@dataclass(frozen=True, eq=False)
class Nodules:
    """All of them, n.

    Attributes:
        crops: (n, 32, 32), uint16.
        scan: What scan each is in, (n,).
        malignant: As the data say, (n,): of 886 whether the mean rating of malignancy is above 3.
        mean_malignancy: Mean rating, 1 to 5, (n,).
        biomarkers: In the order of `BIOMARKERS`, diameter in mm, the others mean ratings, (n, 8).
        radius: Half the diameter, in pixels of the crop, (n,).
    """

    crops: NDArray[np.uint16]
    scan: NDArray[np.int64]
    malignant: NDArray[np.int64]
    mean_malignancy: NDArray[np.float64]
    biomarkers: NDArray[np.float64]
    radius: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.crops)


def nodules() -> Nodules:
    """The nodules.

    Raises:
        LookupError: They are not here.
        ValueError: They are not what they should be.
    """
    folder = Path(os.environ.get("CDAM_LIDC") or _BESIDE)
    if not ((folder / "crops.npz").is_file() and (folder / "nodules.csv").is_file()):
        raise LookupError("CDAM_LIDC names no folder with crops.npz and nodules.csv")
    with np.load(folder / "crops.npz") as file:
        crops = file["crops"]
    with (folder / "nodules.csv").open(newline="", encoding="utf-8") as text:
        rows = list(csv.DictReader(text))
    if crops.shape != (len(rows), SIDE, SIDE) or crops.dtype != np.uint16:
        raise ValueError(f"{folder}: crops of {crops.dtype}, {crops.shape}, and {len(rows)} rows")
    if [int(row["row"]) for row in rows] != list(range(len(rows))):
        raise ValueError(f"{folder / 'nodules.csv'}: rows are not numbered from 0")
    numbers = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    numbers["diameter"] = numbers["diameter_mm"]
    return Nodules(
        crops,
        numbers["scan"].astype(np.int64),
        numbers["malignant"].astype(np.int64),
        numbers["mean_malignancy"],
        np.stack([numbers[name] for name in BIOMARKERS], axis=1),
        numbers["diameter"] / numbers["mm_per_pixel"] / 2,
    )
