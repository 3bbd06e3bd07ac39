"""Draws a sample scene, explained by every method for two of its digits: `python -m cdam_server.demo.gallery`.

Each map has full colour at its own largest |score|, which stands below it: methods have different units. Also prints how
alike each method's two maps are: their correlation over the patches.
"""

import argparse
import json
from importlib.resources import as_file
from itertools import groupby
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import cdam
from cdam_server import bootstrap, logs
from cdam_server.config import Settings
from cdam_server.demo.model import ASSETS

_COLUMNS: Final = 3
_ZOOM: Final = 3
_CELL: Final = 64 * _ZOOM
_GAP, _GUTTER, _MARGIN = 8, 34, 20
_ABOVE, _BELOW, _HEADER = 30, 40, 262
_SHADES: Final = 4  # levels of a channel that are one in the file: nobody sees it, and the file is half as large
_INK, _MUTED, _FRAME = (24, 26, 30), (96, 101, 109), (214, 217, 222)
_LARGE, _NORMAL, _SMALL = (ImageFont.load_default(size) for size in (26, 21, 17))


def explain(scene: Path, labels: list[str]) -> cdam.Explanation:
    """The scene's maps by all methods, from a server of the demo model in this process."""
    logs.configure("console", "warning")
    settings = Settings(address="127.0.0.1:0", admin_address="127.0.0.1:0", log_level="warning")
    with bootstrap.serve_in_background(settings) as address, cdam.Client(address, timeout=300) as client:
        return client.explain(scene, labels, methods=[method() for method in cdam.METHODS.values()])


def draw(explanation: cdam.Explanation, scene: Image.Image) -> Image.Image:
    """The scene, and below it the maps: a method's side by side.

    Args:
        explanation: Of two targets.
        scene: What was explained.
    """
    methods = _by_method(explanation)
    width, height = 2 * _CELL + _GAP + _GUTTER, _ABOVE + _CELL + _BELOW
    rows = -(-len(methods) // _COLUMNS)
    size = (2 * _MARGIN + _COLUMNS * width - _GUTTER, _HEADER + rows * height + _MARGIN - _BELOW // 4)
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    _head(canvas, pen, explanation, scene)
    for number, maps in enumerate(methods):
        left, top = _MARGIN + number % _COLUMNS * width, _HEADER + number // _COLUMNS * height
        pen.text((left, top + _ABOVE - 8), maps[0].method.kind, _INK, _NORMAL, "ls")
        for column, relevance in enumerate(maps):
            label = f"{relevance.label}   " if relevance.target else "needs no target   "
            picture = relevance.overlay(scene, zoom=_ZOOM)
            place = left + column * (_CELL + _GAP), top + _ABOVE
            _frame(canvas, pen, picture, place, f"{label}±{_short(relevance.limit)}")
    return canvas.point([min(255, (value + _SHADES // 2) // _SHADES * _SHADES) for value in range(256)] * 3)


def alike(explanation: cdam.Explanation) -> dict[str, float]:
    """Correlation of a method's maps of two targets, by its name."""
    return {
        maps[0].method.kind: float(np.corrcoef([relevance.scores.ravel() for relevance in maps])[0, 1])
        for maps in _by_method(explanation)
        if len(maps) == 2
    }


def _by_method(explanation: cdam.Explanation) -> list[list[cdam.RelevanceMap]]:
    return [list(maps) for _, maps in groupby(explanation, key=lambda relevance: relevance.method.kind)]


def _head(canvas: Image.Image, pen: ImageDraw.ImageDraw, explanation: cdam.Explanation, scene: Image.Image) -> None:
    left, top = _MARGIN, _MARGIN
    _frame(canvas, pen, scene.resize((_CELL, _CELL), Image.Resampling.BICUBIC), (left, top), "the scene")
    left += _CELL + _GUTTER
    first, second = explanation.targets
    pen.text((left, top), f"Every method, asked for {first.label} and for {second.label}", _INK, _LARGE)
    lines = [
        f"The model says {first.label} ({first.probability or 0:.1%}) and {second.label} ({second.probability or 0:.1%}).",
        f"Left of each pair {first.label}, right {second.label}; two methods need no target.",
        "Orange speaks for the digit, blue against it, no colour is zero.",
        "Full colour is each map's own largest |score|, written below it.",
    ]
    for number, line in enumerate(lines):
        pen.text((left, top + 50 + 32 * number), line, _MUTED, _NORMAL)


def _frame(
    canvas: Image.Image, pen: ImageDraw.ImageDraw, picture: Image.Image, place: tuple[int, int], note: str
) -> None:
    left, top = place
    canvas.paste(picture, place)
    pen.rectangle((left - 1, top - 1, left + picture.width, top + picture.height), outline=_FRAME)
    pen.text((left, top + picture.height + 6), note, _MUTED, _SMALL)


def _short(number: float) -> str:
    """Two digits, and no exponent."""
    return f"{number:.2g}" if number >= 1e-4 else f"{number:.5f}"


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/methods.png"), help="the picture (%(default)s)")
    parser.add_argument("--scene", type=int, choices=range(1, 7), default=1, help="sample scene (%(default)s)")
    arguments = parser.parse_args()
    sample = json.loads((ASSETS / "samples" / "samples.json").read_text())["samples"][arguments.scene - 1]
    labels = [item["label"] for item in sample["objects"]][:2]
    with as_file(ASSETS / "samples" / sample["image"]) as path:
        explanation = explain(path, labels)
        picture = draw(explanation, Image.open(path).convert("RGB"))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(arguments.out, optimize=True)
    for kind, correlation in alike(explanation).items():
        print(f"{kind:22} {correlation:+.2f}")
    print(f"{arguments.out}: {picture.width} x {picture.height}, {arguments.out.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
