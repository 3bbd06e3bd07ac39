"""Datasets on disk, of images of one pixel: for what reads and divides them, and looks at no picture."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def pixel(path: Path, number: int) -> Path:
    """An image of one pixel; different numbers are different files, the same number the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (1, 1), (number % 256, number // 256 % 256, number // 65536)).save(path, "PNG")
    return path


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A CSV file with an image for each row, by the place of the row where that has no image of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = with_images(path.parent, rows)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_manifest(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """The same in JSON Lines."""
    rows = with_images(path.parent, rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def with_images(folder: Path, rows: Iterable[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Rows with a column `image`, whose files are there."""
    named = [{"image": f"images/{number}.png", **row} for number, row in enumerate(rows)]
    for number, row in enumerate(named):
        if row["image"] == f"images/{number}.png":
            pixel(folder / row["image"], number)
    return named
