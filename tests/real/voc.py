"""Photographs with masks: 1,039 of PASCAL VOC 2012, where they are at hand.

They are for research only and not part of this repository. `CDAM_VOC` names their folder: `manifest.json` (the classes
in the order of the masks' values from 1; of each image its name, split, and share of every class that it shows),
`images/NAME.jpg`, `masks/NAME.png`. Without it, `../shared/data/voc` beside the repository.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_BESIDE: Final = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "voc"


@dataclass(frozen=True)
class Photograph:
    """A photograph.

    Attributes:
        path: The JPEG file.
        mask: PNG; 0 is background, n the n-th class from 1, 255 undecided.
        shares: Of the image, by the names of the classes that it shows.
    """

    path: Path
    mask: Path
    shares: Mapping[str, float]


@dataclass(frozen=True)
class Photographs:
    """All of them.

    Attributes:
        classes: Names, in order.
        train: Those to train on.
        val: Those to measure on.
    """

    classes: tuple[str, ...]
    train: tuple[Photograph, ...]
    val: tuple[Photograph, ...]

    def labels(self, photographs: tuple[Photograph, ...]) -> NDArray[np.bool_]:
        """Which classes each shows, `(B, C)`."""
        return np.array([[name in photograph.shares for name in self.classes] for photograph in photographs])

    def of_two_classes(self, least: float = 0.03) -> list[Photograph]:
        """Of `val`, those that show exactly two classes, each at least on this share of the image."""
        return [one for one in self.val if len(one.shares) == 2 and min(one.shares.values()) >= least]

    def covered(self, photograph: Photograph, name: str, grid: tuple[int, int]) -> NDArray[np.float32]:
        """Share of each patch that the class covers, `grid`, where the whole image is squashed to the model's input."""
        mask = np.asarray(Image.open(photograph.mask)) == self.classes.index(name) + 1
        size = (grid[1], grid[0])
        return np.asarray(Image.fromarray(mask.astype(np.float32)).resize(size, Image.Resampling.BOX))


def photographs() -> Photographs:
    """The photographs.

    Raises:
        LookupError: They are not here.
    """
    folder = Path(os.environ.get("CDAM_VOC") or _BESIDE)
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise LookupError("CDAM_VOC names no folder with manifest.json, images and masks")
    content = json.loads(manifest.read_text(encoding="utf-8"))
    found: dict[str, list[Photograph]] = {"train": [], "val": []}
    for entry in content["images"]:
        name = entry["name"]
        one = Photograph(folder / "images" / f"{name}.jpg", folder / "masks" / f"{name}.png", entry["classes"])
        found[entry["split"]].append(one)
    return Photographs(tuple(content["classes"]), tuple(found["train"]), tuple(found["val"]))
