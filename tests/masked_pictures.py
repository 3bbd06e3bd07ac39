"""Coloured squares on noise, with masks, and a small network for them: for training with masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from small_models import ARCHITECTURE, SHAPE, vit

CLASSES = ("blue", "green", "red")
SIZE = 48
PATCH = 8
KWARGS: dict[str, Any] = {**SHAPE, "img_size": SIZE, "patch_size": PATCH, "depth": 3}


def picture(kinds: list[int], seed: int) -> tuple[Image.Image, NDArray[np.uint8]]:
    """A square of each kind, side by side; and which pixel is of which, from 1."""
    rng = np.random.default_rng((seed, *kinds))
    pixels = rng.integers(0, 120, (SIZE, SIZE, 3))
    mask = np.zeros((SIZE, SIZE), np.uint8)
    width = SIZE // max(2, len(kinds))
    for place, kind in zip(rng.permutation(max(2, len(kinds))).tolist(), kinds, strict=False):
        side = int(rng.integers(16, width + 1))
        top, left = int(rng.integers(0, SIZE - side + 1)), place * width + int(rng.integers(0, width - side + 1))
        square = (slice(top, top + side), slice(left, left + side))
        pixels[square][..., 2 - kind] += 130
        mask[square] = kind + 1
    return Image.fromarray(pixels.astype(np.uint8)), mask


def write_pictures(folder: Path, count: int = 20) -> None:
    """`one.csv` of one square an image, by class, with masks of the object; `several.jsonl` of up to two, by label.

    In `one.csv`, `object` is a mask of each image's square, `red` of the red ones alone, `classes` an index image. Splits
    are given.
    """
    (folder / "images").mkdir(parents=True)
    one = ["image,class,is_red,object,red,classes,split"]
    several = []
    for number in range(count * len(CLASSES)):
        split = ("train", "train", "train", "val", "test")[number // len(CLASSES) % 5]
        kind = number % len(CLASSES)
        image, mask = picture([kind], number)
        name = f"images/one{number}"
        image.save(folder / f"{name}.png")
        Image.fromarray(np.where(mask > 0, np.uint8(255), np.uint8(0))).save(folder / f"{name}_object.png")
        Image.fromarray(mask).save(folder / f"{name}_classes.png")
        red = CLASSES[kind] == "red"
        of_red = f"{name}_object.png" if red else ""
        one.append(f"{name}.png,{CLASSES[kind]},{int(red)},{name}_object.png,{of_red},{name}_classes.png,{split}")
        kinds = [[0], [1], [2], [0, 1], [0, 2], [1, 2]][number % 6]
        image, mask = picture(kinds, number)
        name = f"images/several{number}"
        image.save(folder / f"{name}.png")
        Image.fromarray(mask).save(folder / f"{name}_classes.png")
        labels = [CLASSES[each] for each in kinds]
        several.append({"image": f"{name}.png", "labels": labels, "mask": f"{name}_classes.png", "split": split})
    (folder / "one.csv").write_text("\n".join(one) + "\n")
    (folder / "several.jsonl").write_text("".join(json.dumps(row) + "\n" for row in several))


def write_model(folder: Path, outputs: int = len(CLASSES), **settings: Any) -> Path:
    """A models file of a small network with a classifier."""
    torch.save(vit(outputs, seed=3, **KWARGS).state_dict(), folder / f"network{outputs}.pth")
    entry = {"name": "small", "architecture": ARCHITECTURE, "checkpoint": f"network{outputs}.pth"}
    path = folder / f"models{outputs}.yaml"
    path.write_text(json.dumps({"models": [{**entry, "model_kwargs": KWARGS, **settings}]}))
    return path
