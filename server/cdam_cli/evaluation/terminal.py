"""The summary that `cdam evaluate` prints, and how numbers are written."""

import math
from collections.abc import Iterator, Sequence

from cdam.statistics import Row
from cdam_cli.evaluation.about import About
from cdam_cli.evaluation.quantities import quantity
from cdam_cli.evaluation.results import FEW, Results, unfit
from cdam_cli.report import columns, printable


def summary(about: About, results: Results) -> str:
    """A table for each metric: a line for each method, anchors last, with the means and their standard errors."""
    table = results.table
    failed = f", {table.failures} failed" if table.failures else ""
    samples = f"{table.samples} sample{'' if table.samples == 1 else 's'}"
    what = f"{printable(about.dataset.name)}  {printable(about.model.name)}, {samples}{failed}"
    lines = [f"{what}; mean ± standard error"]
    if table.samples < FEW:
        lines.append(f"{samples}: differences and intervals from so few carry little")
    for index, name in enumerate(about.metric_names):
        names = results.quantities(index)
        heads = [_head(about, results, index, each) for each in names]
        rows = [(name, *heads), *_rows(about, results, index, names)]
        lines += ["", *columns(rows, right=range(1, len(heads) + 1))]
    return "\n".join(lines)


def _head(about: About, results: Results, metric: int, name: str) -> str:
    said = f"{name} {quantity(name).arrow}".rstrip()
    return f"{said} (unfit)" if unfit(about, results, metric, name) else said


def ordered(about: About) -> list[int]:
    """The methods' indices, anchors last."""
    return sorted(range(len(about.methods)), key=about.is_anchor)


def _rows(about: About, results: Results, metric: int, names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    digits = [decimals(results, metric, name) for name in names]
    for method in ordered(about):
        cells = (_cell(results.row((method, metric, name)), places) for name, places in zip(names, digits, strict=True))
        yield (f"{about.method_names[method]}{' (anchor)' if about.is_anchor(method) else ''}", *cells)


def _cell(row: Row | None, places: int) -> str:
    if row is None:
        return "-"
    error = "" if row.standard_error is None else f" ± {row.standard_error:.{places}f}"
    return f"{row.mean:.{places}f}{error}"


def decimals(results: Results, metric: int, name: str) -> int:
    """So many that the typical width of a quantity's intervals, or its size, has two digits."""
    rows = [row for row in results.rows if (row.metric_index, row.quantity) == (metric, name)]
    widths = [
        (row.interval_high - row.interval_low) / 4
        for row in rows
        if row.interval_low is not None and row.interval_high is not None and row.interval_high > row.interval_low
    ]
    scale = sorted(widths)[len(widths) // 2] if widths else max((abs(row.mean) for row in rows), default=0.0) / 100
    return min(max(1 - math.floor(math.log10(scale)), 0), 5) if scale > 0 else 3
