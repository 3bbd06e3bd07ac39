"""Draws pictures of the demo model's maps: `python tools/demo_gallery.py`.

By default a sample scene, explained by every method for two of its digits; also prints how alike each method's two maps
are: their correlation over the patches. With `--concepts`, the concept "loops" in all sample scenes that have a digit
with a closed loop and one without. Each map has full colour at its own largest |score|, which stands below it: methods
and similarities have different units.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import as_file
from importlib.resources.abc import Traversable
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import cdam
from cdam_server import bootstrap
from cdam_server.demo.model import ASSETS
from cdam_server.demo.tour import loop_images
from cdam_server.operation import logs
from cdam_server.settings.config import Settings
from demo_model.concepts import LOOPS, NO_LOOPS

_COLUMNS: Final = 3
_ZOOM: Final = 3
_CELL: Final = 64 * _ZOOM
_GAP, _GUTTER, _MARGIN = 8, 34, 20
_ABOVE, _BELOW, _HEADER = 30, 40, 262
_THUMB, _ACROSS, _CONCEPT_HEADER = 53, 10, 362
_SIMILARITIES: Final[tuple[cdam.Similarity, ...]] = get_args(cdam.Similarity)
_SHADES: Final = 4  # levels of a channel that are one in the file: nobody sees it, and the file is half as large
_INK, _MUTED, _FRAME = (24, 26, 30), (96, 101, 109), (214, 217, 222)
_LARGE, _NORMAL, _SMALL = (ImageFont.load_default(size) for size in (26, 21, 17))


def explain(scene: Path, labels: list[str]) -> cdam.Explanation:
    """The scene's maps by all methods."""
    with _client() as client:
        return client.explain(scene, labels, methods=[method() for method in cdam.METHODS.values()])


def explain_loops() -> list[tuple[Image.Image, cdam.Explanation]]:
    """The sample scenes that have a digit with a loop and one without, and their maps.

    For the class of the digit with the loop; for the concept by dot product, cosine and L2; and for the difference of
    two concepts, those of either kind of image alone.
    """
    positives, negatives = ([image.read_bytes() for image in side] for side in loop_images())
    explained = []
    with _client() as client:
        client.register_concept("loops", positives, negatives=negatives)
        client.register_concept("loops_alone", positives)
        client.register_concept("no_loops", negatives)
        sides = (cdam.Concept(name, similarity="cosine") for name in ("loops_alone", "no_loops"))
        targets: list[cdam.Target] = [cdam.Concept("loops", similarity=kind) for kind in _SIMILARITIES]
        targets.append(cdam.Contrast(*sides))
        for sample in _samples():
            digits: set[int] = {item["class"] for item in sample["objects"]}
            if digits.intersection(LOOPS) and digits.intersection(NO_LOOPS):
                scene = _open(ASSETS / "samples" / sample["image"])
                explained.append((scene, client.explain(scene, [min(digits.intersection(LOOPS)), *targets])))
    return explained


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
    return _lighter(canvas)


def draw_loops(explained: Sequence[tuple[Image.Image, cdam.Explanation]]) -> Image.Image:
    """The concept's images, and below them a row for each scene: the scene and its maps."""
    width, height = _CELL + _GAP, _CELL + _BELOW
    headings = ["the scene", "the class", "loops: dot product", "loops: cosine", "loops: L2", "loops - no loops"]
    size = (
        2 * _MARGIN + len(headings) * width - _GAP,
        _CONCEPT_HEADER + _ABOVE + len(explained) * height + _MARGIN // 2,
    )
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    _loops_head(canvas, pen)
    for column, heading in enumerate(headings):
        pen.text((_MARGIN + column * width, _CONCEPT_HEADER + _ABOVE - 8), heading, _INK, _NORMAL, "ls")
    for row, (scene, explanation) in enumerate(explained):
        top = _CONCEPT_HEADER + _ABOVE + row * height
        _frame(canvas, pen, scene.resize((_CELL, _CELL), Image.Resampling.BICUBIC), (_MARGIN, top), "")
        for column, relevance in enumerate(explanation, 1):
            picture = relevance.overlay(scene, zoom=_ZOOM)
            assert relevance.target is not None
            of = {cdam.Output: relevance.label, cdam.Contrast: "two cosines"}.get(type(relevance.target.target), "")
            note = f"{of}   ±{_short(relevance.limit)}".lstrip()
            _frame(canvas, pen, picture, (_MARGIN + column * width, top), note)
    return _lighter(canvas)


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


def _loops_head(canvas: Image.Image, pen: ImageDraw.ImageDraw) -> None:
    """What the concept is made of."""
    positives, negatives = loop_images()
    pen.text((_MARGIN, _MARGIN), "A concept that is no class: digits with a closed loop", _INK, _LARGE)
    lines = [
        f"The mean latent of these {len(positives)} images less that of {len(negatives)} others; no original of theirs is in the scenes.",
        "Orange speaks for it, blue against it, no colour is zero. Full colour is each map's own largest |score|, written below.",
        "To a model of ten classes it is any of 0, 6, 8 and 9: shown three of these, it does not find the fourth.",
    ]
    for number, line in enumerate(lines):
        pen.text((_MARGIN, _MARGIN + 44 + 30 * number), line, _MUTED, _NORMAL)
    step = _THUMB + 5
    for side, images in enumerate((positives, negatives)):
        first = _MARGIN if side == 0 else canvas.width - _MARGIN + 5 - _ACROSS * step
        for number, image in enumerate(images):
            place = first + number % _ACROSS * step, _MARGIN + 148 + number // _ACROSS * step
            canvas.paste(_open(image).resize((_THUMB, _THUMB), Image.Resampling.LANCZOS), place)


def _frame(
    canvas: Image.Image, pen: ImageDraw.ImageDraw, picture: Image.Image, place: tuple[int, int], note: str
) -> None:
    left, top = place
    canvas.paste(picture, place)
    pen.rectangle((left - 1, top - 1, left + picture.width, top + picture.height), outline=_FRAME)
    pen.text((left, top + picture.height + 6), note, _MUTED, _SMALL)


def _lighter(canvas: Image.Image) -> Image.Image:
    return canvas.point([min(255, (value + _SHADES // 2) // _SHADES * _SHADES) for value in range(256)] * 3)


def _short(number: float) -> str:
    """Two digits, and no exponent."""
    return f"{number:.2g}" if number >= 1e-4 else f"{number:.5f}"


def _samples() -> list[dict[str, Any]]:
    samples: list[dict[str, Any]] = json.loads((ASSETS / "samples" / "samples.json").read_text())["samples"]
    return samples


def _open(image: Traversable) -> Image.Image:
    with image.open("rb") as file:
        return Image.open(file).convert("RGB")


@contextmanager
def _client() -> Iterator[cdam.Client]:
    """Of a server of the demo model in this process, without concepts."""
    logs.configure("console", "warning")
    with TemporaryDirectory() as concepts:
        settings = Settings(
            address="127.0.0.1:0", admin_address="127.0.0.1:0", log_level="warning", data_dir=Path(concepts)
        )
        with bootstrap.serve_in_background(settings) as address, cdam.Client(address, timeout=300) as client:
            yield client


def main() -> None:
    """Write a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the picture (out/methods.png or out/concepts.png)")
    parser.add_argument("--scene", type=int, choices=range(1, 7), default=1, help="of the methods (%(default)s)")
    parser.add_argument("--concepts", action="store_true", help="draw the concept in place of the methods")
    arguments = parser.parse_args()
    out: Path = arguments.out or Path("out/concepts.png" if arguments.concepts else "out/methods.png")
    picture = draw_loops(explain_loops()) if arguments.concepts else _draw_methods(_samples()[arguments.scene - 1])
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out, optimize=True)
    print(f"{out}: {picture.width} x {picture.height}, {out.stat().st_size // 1000} kB")


def _draw_methods(sample: dict[str, Any]) -> Image.Image:
    labels = [item["label"] for item in sample["objects"]][:2]
    with as_file(ASSETS / "samples" / sample["image"]) as path:
        explanation = explain(path, labels)
    for kind, correlation in alike(explanation).items():
        print(f"{kind:22} {correlation:+.2f}")
    return draw(explanation, _open(ASSETS / "samples" / sample["image"]))


if __name__ == "__main__":
    main()
