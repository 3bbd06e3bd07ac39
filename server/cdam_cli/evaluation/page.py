"""`report.html`: one file that needs nothing else."""

import base64
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

import cdam
from cdam.statistics import Comparison, Row
from cdam_cli.evaluation import figures
from cdam_cli.evaluation.about import About, said
from cdam_cli.evaluation.files import replacing
from cdam_cli.evaluation.quantities import Quantity, metric, quantity
from cdam_cli.evaluation.results import FEW, Results, tells, unfit
from cdam_cli.evaluation.terminal import decimals, ordered
from cdam_cli.report import printable

_PICTURE: Final = 224  # longer side, in pixels
_NAMED: Final = 100  # failures that are listed
_PLACES: Final = 6  # most digits after the point


@dataclass(frozen=True, eq=False)
class Example:
    """A sample's pictures.

    Attributes:
        id: The sample's id.
        target: Its target, for people.
        probability: What the model gives the target; None if it gives none.
        image: The image.
        mask: The image where the target's object is, if that is known.
        maps: The maps over the image, by the method's index.
    """

    id: str
    target: str
    probability: float | None
    image: Image.Image
    mask: Image.Image | None
    maps: dict[int, Image.Image]


def write_page(path: Path, about: About, results: Results, examples: Sequence[Example], seconds: float) -> None:
    """Write the report.

    Args:
        path: The file.
        about: What was evaluated.
        results: What it came to.
        examples: Samples to show.
        seconds: That it took to measure.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cdam_cli.evaluation", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["printable"] = printable
    page = environment.get_template("report.html.jinja").render(
        about=about,
        table=results.table,
        few=results.table.samples < FEW,
        methods=[_method(about, index) for index in ordered(about)],
        colours=figures.COLOURS,
        metrics=[_metric(about, results, index) for index in range(len(about.metrics))],
        standing=_standing(about, results),
        examples=[_example(example) for example in examples],
        shown=[method for method in ordered(about) if any(method in example.maps for example in examples)],
        failed=[(printable(record.id), printable(record.message)) for record in results.failed[:_NAMED]],
        seconds=_duration(seconds),
        time=datetime.now(UTC),
        versions=f"cdam-serve {cdam.__version__}, Python {platform.python_version()}",
    )
    with replacing(path) as part:
        part.write_text(page, encoding="utf-8", errors="replace")


def _method(about: About, index: int) -> dict[str, Any]:
    dashes = figures.dashes(about, index)
    return {
        "index": index,
        "name": about.method_names[index],
        "anchor": about.is_anchor(index),
        "said": said(about.protocol()["methods"][index]),
        "colour": figures.variable(about, index),
        "dashes": "" if dashes == "-" else " ".join(f"{2 * length:g}" for length in dashes[1]),
    }


def _metric(about: About, results: Results, index: int) -> dict[str, Any]:
    names = results.quantities(index)
    return {
        "name": about.metric_names[index],
        "described": metric(about.metrics[index].kind),
        "said": said(about.protocol()["metrics"][index]),
        "quantities": [_quantity(about, results, index, name) for name in names],
        "against": [method for method in ordered(about) if method != 0] if len(about.methods) > 1 else [],
        "curves": figures.curves(about, results, index),
        "scatter": figures.scatter(about, results, index),
    }


def _quantity(about: About, results: Results, index: int, name: str) -> dict[str, Any]:
    known, places = quantity(name), decimals(results, index, name)
    rows = {method: results.row((method, index, name)) for method in range(len(about.methods))}
    there = {method: row for method, row in rows.items() if row is not None}
    reason = unfit(about, results, index, name)
    best, tied = (None, set()) if reason else _best(about, results, index, name)
    return {
        "name": name,
        "known": known,
        "unfit": reason,
        "cells": {
            method: _cell(
                row, places, list(there.values()), "best" if method == best else "tied" if method in tied else ""
            )
            for method, row in there.items()
        },
        "differences": {
            method: _difference(known, row, results.difference(method, 0, index, name), places)
            for method, row in there.items()
            if method != 0
        },
    }


def _best(about: About, results: Results, index: int, name: str) -> tuple[int | None, set[int]]:
    """The best method, and those that can't be told apart from it; none of a single one."""
    methods = [method for method in range(len(about.methods)) if not about.is_anchor(method)]
    means = {method: row.mean for method in methods if (row := results.row((method, index, name)))}
    best = quantity(name).best(means) if len(means) > 1 else None
    if best is None:
        return None, set()
    tied = {method for method in means if tells(results.difference(method, best, index, name)) is False}
    return best, tied - {best}


def _standing(about: About, results: Results) -> list[dict[str, Any]]:
    """Of how many quantities a method is the best, or not told apart from it."""
    firsts = {method: 0 for method in range(len(about.methods)) if not about.is_anchor(method)}
    shared = dict.fromkeys(firsts, 0)
    total = 0
    for index in range(len(about.metrics)):
        for name in results.quantities(index):
            best, tied = _best(about, results, index, name)
            if best is not None and unfit(about, results, index, name) == "":
                total += 1
                firsts[best] += 1
                for method in tied:
                    shared[method] += 1
    if not total:
        return []
    ranks = sorted(firsts, key=lambda method: (-firsts[method], -shared[method]))
    return [{"method": m, "first": firsts[m], "shared": shared[m], "total": total} for m in ranks]


def _cell(row: Row, places: int, rows: Sequence[Row], mark: str) -> dict[str, Any]:
    cell: dict[str, Any] = {"mean": _number(row.mean, places), "mark": mark, "interval": "", "error": ""}
    if row.standard_error is not None:
        cell["error"] = f"{row.standard_error:.{places}f}"
    if row.interval_low is None or row.interval_high is None:
        return cell
    cell["interval"] = f"{_number(row.interval_low, places)} to {_number(row.interval_high, places)}"
    ends = [end for each in rows for end in (each.interval_low, each.interval_high, each.mean) if end is not None]
    low, span = min(ends), (max(ends) - min(ends)) or 1.0
    at = (100 * (value - low) / span for value in (row.interval_low, row.interval_high, row.mean))
    cell["bar"] = dict(zip(("low", "high", "mean"), (round(each, 1) for each in at), strict=True))
    return cell


def _difference(known: Quantity, row: Row, comparison: Comparison | None, places: int) -> dict[str, Any]:
    if comparison is None:
        return {"mean": "-", "interval": "", "verdict": ""}
    verdict = interval = ""
    low, high = comparison.interval_low, comparison.interval_high
    if low is not None and high is not None:
        if tells(comparison) and known.better is not None:
            verdict = "better" if known.improves(row.mean, comparison.mean_difference) else "worse"
        while verdict and places < _PLACES and not (round(low, places) and round(high, places)):
            places += 1  # an interval that leaves out 0 is not to look as if it had it
        interval = f"{_number(low, places, '+')} to {_number(high, places, '+')}"
    return {"mean": _number(comparison.mean_difference, places, "+"), "interval": interval, "verdict": verdict}


def _number(value: float, places: int, sign: str = "") -> str:
    """A number with a real minus; what rounds to zero has no sign."""
    text = f"{value:{sign}.{places}f}"
    return (text.lstrip("+-") if float(text) == 0 else text).replace("-", "\N{MINUS SIGN}")


def picture(image: Image.Image) -> Image.Image:
    """The image in the size in which it is shown."""
    factor = _PICTURE / max(image.size)
    size = max(round(image.width * factor), 1), max(round(image.height * factor), 1)
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def outside_faded(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The image where the mask is, and a pale one around it."""
    pixels = np.asarray(image, np.float32)
    inside = mask.convert("L").point(lambda level: 255 if level else 0).resize(image.size, Image.Resampling.BILINEAR)
    share = np.asarray(inside, np.float32)[..., None] / 255
    pale = pixels.mean(2, keepdims=True) * 0.25 + 180
    return Image.fromarray((pale + share * (pixels - pale)).clip(0, 255).astype(np.uint8))


def _example(example: Example) -> dict[str, Any]:
    return {
        "id": printable(example.id),
        "target": printable(example.target),
        "probability": "" if example.probability is None else f"{example.probability:.1%}",
        "image": _source(example.image),
        "mask": _source(example.mask) if example.mask else "",
        "maps": {method: _source(image) for method, image in example.maps.items()},
        "width": example.image.width,
        "height": example.image.height,
    }


def _source(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, "WEBP", quality=88, method=6)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _duration(seconds: float) -> str:
    def parts(rest: int) -> Iterator[str]:
        for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
            count, rest = divmod(rest, size)
            if count:
                yield f"{count} {unit}"

    return " ".join(list(parts(round(seconds)))[:2]) or f"{seconds:.1f} s"
