"""Photographs with masks: 1,039 of PASCAL VOC 2012, where they are at hand.

They are for research only and not part of this repository. `CDAM_VOC` names their folder: `manifest.json` (the classes
in the order of the masks' values from 1; of each image its name, split, and share of every class that it shows),
`images/NAME.jpg`, `masks/NAME.png`. Without it, `../shared/data/voc` beside the repository.

`python tests/real/voc.py voc.jsonl` writes what `cdam train` takes: images, labels, masks, and the official split with val
as the test side. Beside it, voc.yaml has the backbone (`backbone.py`) as the models file of docs/training.md.
"""

from __future__ import annotations

import json
import os
import sys
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


def write_dataset(voc: Photographs, path: Path, most: int | None = None) -> None:
    """What `cdam train` takes: image, mask, labels and split of each photograph.

    Args:
        voc: The photographs.
        path: The file, .jsonl.
        most: Of val only the first ones; None: all.
    """
    sides = (("train", voc.train), ("test", voc.val[:most]))
    rows = (
        {"image": str(one.path.resolve()), "mask": str(one.mask.resolve()), "labels": [*one.shares], "split": split}
        for split, side in sides
        for one in side
    )
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def write_models(path: Path, checkpoint: Path, head: Path | None = None) -> None:
    """The backbone as it sees photographs, with a head if there is one, as a models file.

    Args:
        path: The file, .yaml.
        checkpoint: The backbone's weights, or a whole model's.
        head: What `cdam train` wrote.
    """
    entry = {
        "name": "voc",
        "architecture": "vit_small_patch14_dinov2",
        "checkpoint": str(checkpoint.resolve()),
        "input_size": [224, 224],
        "preprocessing": {"crop_mode": "squash", "crop_pct": 1.0},
        **({} if head is None else {"head": str(head.resolve())}),
    }
    path.write_text(json.dumps({"models": [entry]}), encoding="utf-8")  # JSON is YAML


if __name__ == "__main__":
    (target,) = map(Path, sys.argv[1:])
    write_dataset(photographs(), target)
    write_models(target.with_suffix(".yaml"), target.with_name("backbone.safetensors"))
