"""What an evaluation came to: everything that the report shows, made of the journal's records one by one."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

import cdam
from cdam.statistics import CORRELATED, Comparison, Row, Statistics, Table
from cdam_cli.evaluation.about import About
from cdam_cli.evaluation.journal import Record
from cdam_cli.evaluation.quantities import quantity

Key = tuple[int, int, str]
"""Index of the method, index of the metric, quantity."""

FEW = 10
"""Fewer samples than that have intervals that say little."""

_MOST_POINTS = 1000
_MOST_FAILURES = 1000


@dataclass(eq=False)
class Curve:
    """The mean of curves that share their abscissae, and how much they scatter (Welford)."""

    x: NDArray[np.float64]
    mean: NDArray[np.float64]
    _squares: NDArray[np.float64]
    count: int = 0

    @classmethod
    def like(cls, curve: NDArray[np.float64]) -> "Curve":
        """None so far, of the shape of this one."""
        return cls(curve[0], np.zeros(curve.shape[1]), np.zeros(curve.shape[1]))

    def add(self, y: NDArray[np.float64]) -> None:
        """Add the ordinates of one."""
        self.count += 1
        before = y - self.mean
        self.mean = self.mean + before / self.count
        self._squares = self._squares + before * (y - self.mean)

    @property
    def standard_error(self) -> NDArray[np.float64]:
        """Of the mean; 0 for a single one."""
        if self.count < 2:
            return np.zeros_like(self.mean)
        return np.sqrt(self._squares / (self.count - 1) / self.count)


@dataclass(frozen=True, eq=False)
class Results:
    """What an evaluation came to.

    Attributes:
        table: Means and comparisons.
        curves: The mean curves.
        points: (map_change, true_change) of the first samples, by method and metric.
        failed: The first samples that could not be measured.
    """

    table: Table
    curves: Mapping[Key, Curve]
    points: Mapping[tuple[int, int], Sequence[tuple[float, float]]]
    failed: Sequence[Record]
    _rows: Mapping[Key, Row] = field(repr=False)
    _comparisons: Mapping[tuple[int, int, int, str], Comparison] = field(repr=False)

    @property
    def rows(self) -> Sequence[Row]:
        """The table's rows."""
        return self.table.rows

    def quantities(self, metric_index: int) -> list[str]:
        """The quantities of a metric."""
        return list(dict.fromkeys(row.quantity for row in self.rows if row.metric_index == metric_index))

    def row(self, key: Key) -> Row | None:
        """One quantity of one method."""
        return self._rows.get(key)

    def difference(self, one: int, other: int, metric_index: int, name: str) -> Comparison | None:
        """What the one method has more than the other; None of one and the same."""
        if found := self._comparisons.get((one, other, metric_index, name)):
            return found
        turned = self._comparisons.get((other, one, metric_index, name))
        if turned is None:
            return None
        low, high = turned.interval_low, turned.interval_high
        return Comparison(
            one,
            other,
            metric_index,
            name,
            -turned.mean_difference,
            None if high is None else -high,
            None if low is None else -low,
        )


def tells(comparison: Comparison | None) -> bool | None:
    """Whether the interval of a difference leaves out 0; None if there is none."""
    if comparison is None or comparison.interval_low is None or comparison.interval_high is None:
        return None
    return comparison.interval_low > 0 or comparison.interval_high < 0


def unfit(about: About, results: Results, index: int, name: str) -> str:
    """Why a quantity says nothing here; empty if it does, or if there are no anchors to tell."""
    mask, random = about.index(cdam.Anchor.MASK), about.index(cdam.Anchor.RANDOM)
    known = quantity(name)
    if mask is None or random is None or not known.of_truth or known.better is None:
        return ""
    difference = results.difference(mask, random, index, name)
    told, row = tells(difference), results.row((mask, index, name))
    if difference is None or told is None or row is None:
        return ""
    if not told:
        return "does not tell the object's mask from random scores"
    if not known.improves(row.mean, difference.mean_difference):
        return "puts random scores above the object's mask"
    return ""


def gather(records: Iterable[Record], methods: int, *, seed: int, resamples: int) -> Results:
    """Put the records together; what is kept does not grow with their number."""
    statistics = Statistics(methods, seed=seed, resamples=resamples)
    curves: dict[Key, Curve] = {}
    points: dict[tuple[int, int], list[tuple[float, float]]] = {}
    failed: list[Record] = []
    for record in records:
        if record.failed:
            statistics.failed()
            if len(failed) < _MOST_FAILURES:
                failed.append(record)
            continue
        statistics.add(record.id, record.values)
        changes: dict[tuple[int, int], dict[str, float]] = {}
        for method, metric, name, value, curve in record.values:
            if curve is not None:
                curves.setdefault((method, metric, name), Curve.like(curve)).add(curve[1])
            if name in CORRELATED:
                changes.setdefault((method, metric), {})[name] = value
        for key, change in changes.items():
            if len(change) == len(CORRELATED) and len(points.setdefault(key, [])) < _MOST_POINTS:
                points[key].append((change[CORRELATED[0]], change[CORRELATED[1]]))
    table = statistics.table()
    rows = {(row.method_index, row.metric_index, row.quantity): row for row in table.rows}
    comparisons = {
        (item.method_index, item.other_method_index, item.metric_index, item.quantity): item
        for item in table.comparisons
    }
    return Results(table, curves, points, failed, rows, comparisons)
