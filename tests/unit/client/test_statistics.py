"""Aggregates of evaluations against plain formulas over all samples at once."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from cdam.statistics import Comparison, Number, Row, Statistics, Table
from tables import assert_same

Values = list[tuple[int, int, str, float]]
QUANTITIES = [(0, "a_mif"), (0, "a_lif"), (2, "true_change"), (2, "map_change"), (2, "sign_agreement")]


def samples(
    count: int, *, methods: int = 3, seed: int = 0, scale: float = 1.0, offset: float = 0.0
) -> dict[str, Values]:
    """Made-up values of so many samples, correlated between methods and quantities."""
    rng = np.random.default_rng(seed)
    found = {}
    for number in range(count):
        common = rng.standard_normal()
        found[f"sample {number}"] = [
            (method, metric, quantity, offset + scale * (common + (method + 1) * rng.standard_normal()))
            for method in range(methods)
            for metric, quantity in QUANTITIES
        ]
    return found


def aggregated(
    given: dict[str, Values], *, methods: int = 3, order: Sequence[str] | None = None, **settings: Any
) -> Statistics:
    statistics = Statistics(methods, **settings)
    for sample_id in order or given:
        statistics.add(sample_id, given[sample_id])
    return statistics


def weights(seed: int, sample_id: str, resamples: int) -> np.ndarray:
    payload = b""
    for part in (str(seed), sample_id, "bootstrap"):
        payload += len(part.encode()).to_bytes(8, "little") + part.encode()
    key = int.from_bytes(hashlib.sha256(payload).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key)).poisson(1.0, resamples)


def pearson(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> float:
    x, y = np.repeat(x, weight), np.repeat(y, weight)  # as often as they were drawn
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x - x[0], y - y[0])[0, 1])  # a large mean costs it digits


def plain(given: dict[str, Values], *, methods: int = 3, seed: int = 0, resamples: int = 1000) -> Table:
    """The same table, from all values at once, in the plainest way."""
    ids = list(given)
    columns: dict[tuple[int, int, str], np.ndarray] = {}
    for key in [value[:3] for value in given[ids[0]]]:
        columns[key] = np.array([next(v[3] for v in given[name] if v[:3] == key) for name in ids])
    drawn = np.array([weights(seed, name, resamples) for name in ids])
    kept = [drawn[:, column] for column in range(resamples) if drawn[:, column].sum() > 0]
    point: dict[tuple[int, int, str], float] = {}
    boot: dict[tuple[int, int, str], np.ndarray] = {}
    for key, values in columns.items():
        point[key] = float(values.mean())
        boot[key] = np.array([np.average(values, weights=weight) for weight in kept])
    pairs = sorted({key[:2] for key in columns if key[2] == "map_change"})
    for method, metric in pairs:
        x, y = columns[method, metric, "map_change"], columns[method, metric, "true_change"]
        key = (method, metric, "change_correlation")
        point[key] = pearson(x, y, np.ones(len(ids), int))
        boot[key] = np.array([pearson(x, y, weight) for weight in kept])

    def interval(drawn: np.ndarray) -> tuple[float | None, float | None]:
        if len(ids) < 2:
            return None, None
        return float(np.percentile(drawn, 2.5)), float(np.percentile(drawn, 97.5))

    order = sorted(point, key=lambda key: key[:2])
    rows = []
    for key in order:
        error = columns[key].std(ddof=1) / np.sqrt(len(ids)) if key in columns and len(ids) > 1 else None
        rows.append(Row(*key, point[key], error, *interval(boot[key]), len(ids)))
    comparisons = []
    kinds = dict.fromkeys((metric, quantity) for _, metric, quantity in order)
    for (metric, quantity), (one, other) in itertools.product(
        sorted(kinds, key=lambda kind: kind[0]), itertools.combinations(range(methods), 2)
    ):
        a, b = (one, metric, quantity), (other, metric, quantity)
        comparisons.append(Comparison(one, other, metric, quantity, point[a] - point[b], *interval(boot[a] - boot[b])))
    return Table(tuple(rows), tuple(comparisons), len(ids), 0)


@pytest.mark.parametrize("count", [1, 2, 3, 50])
@pytest.mark.parametrize("seed", [0, 18446744073709551615])
def test_a_table_is_what_the_formulas_say(count: int, seed: int) -> None:
    given = samples(count)
    assert_same(aggregated(given, seed=seed, resamples=200).table(), plain(given, seed=seed, resamples=200))


def test_no_samples() -> None:
    statistics = Statistics(2)
    assert statistics.table() == Table()
    statistics.failed()
    assert statistics.table() == Table(failures=1)


def test_a_single_sample_has_no_errors_and_no_intervals() -> None:
    table = aggregated(samples(1)).table()
    assert {(row.standard_error, row.interval_low, row.interval_high) for row in table.rows} == {(None, None, None)}
    assert {(pair.interval_low, pair.interval_high) for pair in table.comparisons} == {(None, None)}
    assert [row.mean for row in table.rows if row.quantity == "change_correlation"] == [0.0] * 3


def test_a_single_method_has_no_comparisons() -> None:
    table = aggregated(samples(4, methods=1), methods=1).table()
    assert table.comparisons == ()
    assert [row.quantity for row in table.rows] == [quantity for _, quantity in QUANTITIES] + ["change_correlation"]


@pytest.mark.parametrize("parts", [[0, 40], [40, 0], [1, 39], [13, 13, 14], [1] * 40])
def test_parts_together_are_the_whole(parts: list[int]) -> None:
    given = samples(40, offset=100.0)
    whole = aggregated(given)
    whole.failed()
    together = Statistics(3)
    names = iter(given)
    for part in parts:
        other = Statistics(3)
        for name in itertools.islice(names, part):
            other.add(name, given[name])
        before = other.table()
        together.merge(other)
        assert other.table() == before  # the other stays as it is
    failed = Statistics(3)
    failed.failed()
    together.merge(failed)
    assert_same(together.table(), whole.table())


def test_a_part_does_not_change_with_the_whole() -> None:
    given = samples(10)
    part, whole = aggregated(given), Statistics(3)
    before = part.table()
    whole.merge(part)
    whole.add("another", samples(1)["sample 0"])
    assert part.table() == before


def test_the_order_does_not_matter() -> None:
    given = samples(60, offset=10.0)
    expected = aggregated(given).table()
    shuffled = list(given)
    for seed in range(3):
        random.Random(seed).shuffle(shuffled)
        assert_same(aggregated(given, order=shuffled).table(), expected)
    mixed = {name: random.Random(name).sample(values, len(values)) for name, values in given.items()}
    mixed["sample 0"] = given["sample 0"]  # the first one's order is the rows'
    assert_same(aggregated(mixed).table(), expected)


@pytest.mark.parametrize("size", [1e5, 1e6, 1e8, 1e12])
@pytest.mark.parametrize("quantities", [("map_change",), ("map_change", "true_change")])
def test_an_outlier_costs_the_others_nothing_wherever_it_comes(size: float, quantities: tuple[str, ...]) -> None:
    given = samples(40)
    names = list(given)
    outlier = names.pop()
    given[outlier] = [(m, k, name, size if name in quantities else value) for m, k, name, value in given[outlier]]
    expected = plain(given, resamples=300)
    lows = [row.interval_low for row in expected.rows]  # of resamples that don't have it
    for place in (0, 20, 39):
        order = [*names[:place], outlier, *names[place:]]
        tables = [aggregated(given, order=order, resamples=300).table()]
        for cut in (1, 20, 39):
            parts = [aggregated(given, order=part, resamples=300) for part in (order[:cut], order[cut:])]
            parts[0].merge(parts[1])
            tables.append(parts[0].table())
        for table in tables:
            assert_same(table, expected)
            assert [row.interval_low for row in table.rows] == pytest.approx(lows, rel=0, abs=1e-12)


@pytest.mark.parametrize("offset", [1e6, 1e9, 1e12])
def test_the_order_does_not_matter_beside_a_large_mean(offset: float) -> None:
    given = samples(60, offset=offset)
    expected = aggregated(given).table()
    names = list(given)
    assert_same(aggregated(given, order=names[::-1]).table(), expected)
    parts = [aggregated(given, order=part) for part in (names[45:], names[:15], names[15:45])]
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    assert_same(parts[0].table(), expected)


def test_statistics_in_another_order_merge() -> None:
    given = samples(20)
    names = list(given)
    backwards = {name: values[::-1] for name, values in given.items()}
    statistics = aggregated(given, order=names[:10])
    statistics.merge(aggregated(backwards, order=names[10:]))
    assert_same(statistics.table(), aggregated(given).table())


def test_a_small_variance_beside_a_large_mean_is_kept() -> None:
    rng = np.random.default_rng(3)
    noise = rng.integers(-512, 513, 500) / 1024  # exact beside 1e9
    statistics, shifted = Statistics(1), Statistics(1)
    for number, value in enumerate(noise):
        statistics.add(str(number), [(0, 0, "q", 1e9 + value)])
        shifted.add(str(number), [(0, 0, "q", value)])
    (row,), (small,) = statistics.table().rows, shifted.table().rows
    assert row.standard_error == pytest.approx(noise.std(ddof=1) / np.sqrt(500), rel=1e-6)
    assert row.interval_low is not None
    assert row.interval_high is not None
    assert small.interval_low is not None
    assert small.interval_high is not None
    assert row.interval_low - 1e9 == pytest.approx(small.interval_low, abs=1e-6)
    assert row.interval_high - 1e9 == pytest.approx(small.interval_high, abs=1e-6)


@pytest.mark.parametrize("constant", ["map_change", "true_change", "both"])
@pytest.mark.parametrize("value", [0.1, 1e9 + 0.1, -1e-9])
def test_what_does_not_vary_correlates_with_nothing(constant: str, value: float) -> None:
    fixed = {"map_change", "true_change"} if constant == "both" else {constant}
    given = {
        name: [(m, k, quantity, value if quantity in fixed else other) for m, k, quantity, other in values]
        for name, values in samples(30).items()
    }
    names = list(given)
    merged = aggregated(given, order=names[:7])
    merged.merge(aggregated(given, order=names[7:]))
    for statistics in (aggregated(given), merged):
        rows = [row for row in statistics.table().rows if row.quantity == "change_correlation"]
        assert [(row.mean, row.interval_low, row.interval_high) for row in rows] == [(0.0, 0.0, 0.0)] * 3


@pytest.mark.parametrize("other", [0.1 + 1e-13, 1e8])
@pytest.mark.parametrize("place", [0, 15, 29])
def test_what_varies_in_some_resamples_correlates_with_nothing_in_the_others(other: float, place: int) -> None:
    given = samples(30, methods=1)
    odd = "sample 29"
    for name, values in given.items():
        fixed = other if name == odd else 0.1
        given[name] = [(m, k, quantity, fixed if quantity == "map_change" else v) for m, k, quantity, v in values]
    order = [name for name in given if name != odd]
    order.insert(place, odd)
    statistics = aggregated(given, methods=1, order=order)
    assert_same(statistics.table(), plain(given, methods=1))
    row = statistics.table().rows[-1]
    assert row.quantity == "change_correlation"
    assert 0.0 in (row.interval_low, row.interval_high)  # of the third of the resamples that don't have it


def test_a_line_correlates_wholly() -> None:
    statistics = Statistics(1)
    for number in range(20):
        statistics.add(str(number), [(0, 0, "map_change", 3.0 + number), (0, 0, "true_change", 7.0 - 2 * number)])
    row = statistics.table().rows[-1]
    assert row.quantity == "change_correlation"
    assert (row.mean, row.interval_low, row.interval_high) == pytest.approx((-1, -1, -1))
    assert row.standard_error is None


# Curves of hits.

Points = dict[int, int]
"""How many points the curve of each metric has."""


def hitting(count: int, points: Points, *, methods: int = 2, seed: int = 0) -> dict[str, list[Number]]:
    """Made-up curves of 0 and 1 among other values, with methods that differ."""
    rng = np.random.default_rng(seed)
    given: dict[str, list[Number]] = {}
    for number in range(count):
        values: list[Number] = []
        for method, metric in itertools.product(range(methods), points):
            levels = np.arange(points[metric]) / points[metric]
            hits = (rng.random(points[metric]) < 0.2 + 0.2 * method + 0.5 * levels).astype(float)
            values += [
                (method, metric, "a_mif", rng.standard_normal(), np.stack((levels, rng.random(points[metric])))),
                (method, metric, "box_acc", float(hits.mean()), np.stack((levels, hits))),
                (method, metric, "corloc", float(rng.integers(2)), None),
            ]
        given[f"sample {number}"] = values
    return given


def peaks(given: dict[str, list[Number]], seed: int, resamples: int) -> dict[tuple[int, int], tuple[float, np.ndarray]]:
    """Of each method and metric: the maximum over the points of the mean curve, of all samples and of each resample."""
    drawn = np.array([weights(seed, name, resamples) for name in given])
    keep = drawn.sum(axis=0) > 0
    curves: dict[tuple[int, int], list[np.ndarray]] = {}
    for values in given.values():
        for method, metric, quantity, _, curve in values:  # type: ignore[misc]
            if quantity == "box_acc":
                curves.setdefault((method, metric), []).append(curve[1])
    return {
        key: (
            float(np.mean(its, axis=0).max()),
            np.array([np.average(its, axis=0, weights=weight).max() for weight in drawn.T[keep]]),
        )
        for key, its in curves.items()
    }


@pytest.mark.parametrize("count", [1, 2, 30])
def test_the_peak_of_the_mean_curve(count: int) -> None:
    given = hitting(count, {0: 7, 3: 1})
    table = filled(Statistics(2, seed=5, resamples=200), given).table()
    expected = peaks(given, 5, 200)
    rows = {(row.method_index, row.metric_index): row for row in table.rows if row.quantity == "max_box_acc"}
    assert rows.keys() == expected.keys()
    for key, (peak, resampled) in expected.items():
        row = rows[key]
        assert row.mean == pytest.approx(peak, abs=1e-12)
        assert (row.standard_error, row.samples) == (None, count)
        ends = (None, None) if count == 1 else tuple(np.percentile(resampled, (2.5, 97.5)))
        assert (row.interval_low, row.interval_high) == pytest.approx(ends, abs=1e-12)
    pairs = {pair.metric_index: pair for pair in table.comparisons if pair.quantity == "max_box_acc"}
    assert pairs.keys() == {0, 3}
    for metric, pair in pairs.items():
        (one, ones), (other, others) = expected[0, metric], expected[1, metric]
        assert pair.mean_difference == pytest.approx(one - other, abs=1e-12)
        ends = (None, None) if count == 1 else tuple(np.percentile(ones - others, (2.5, 97.5)))
        assert (pair.interval_low, pair.interval_high) == pytest.approx(ends, abs=1e-12)
    assert [row.quantity for row in table.rows][:4] == ["a_mif", "box_acc", "corloc", "max_box_acc"]


def filled(statistics: Statistics, given: dict[str, list[Number]], names: Sequence[str] | None = None) -> Statistics:
    for name in given if names is None else names:
        statistics.add(name, given[name])
    return statistics


def test_the_peak_is_the_same_to_the_last_bit_in_any_order_and_in_parts() -> None:
    given = hitting(40, {0: 11, 1: 3})

    def told(statistics: Statistics) -> list[Row | Comparison]:
        table = statistics.table()
        return [item for item in (*table.rows, *table.comparisons) if item.quantity == "max_box_acc"]

    names = list(given)
    whole = told(filled(Statistics(2), given))
    assert told(filled(Statistics(2), given, names[::-1])) == whole
    parts = [filled(Statistics(2), given, part) for part in (names[25:], names[:1], names[1:25])]
    together = Statistics(2)
    for part in parts:
        before = told(part)
        together.merge(part)
        assert told(part) == before
    assert told(together) == whole
    mixed = {name: random.Random(name).sample(values, len(values)) for name, values in given.items()}
    mixed["sample 0"] = given["sample 0"]
    assert told(filled(Statistics(2), mixed)) == whole
    travelled = {  # in the API's float32
        name: [(*value[:4], None if value[4] is None else np.float32(value[4])) for value in values]  # type: ignore[misc]
        for name, values in given.items()
    }
    assert told(filled(Statistics(2), travelled)) == whole


@pytest.mark.parametrize(
    ("curve", "said"),
    [
        (None, "there is no curve"),
        (np.zeros((2, 0)), r"the shape \(2, points\)"),
        (np.zeros(4), r"the shape \(2, points\)"),
        (np.array([[0.0, 0.5, 0.7], [1.0, 0.0, 0.5]]), "other than 0 and 1"),
        (np.array([[0.0, 0.5, 0.7], [1.0, 0.0, np.nan]]), "other than 0 and 1"),
        (np.array([[0.0, 0.5], [1.0, 0.0]]), "2 points, not 3 as before"),
    ],
)
def test_a_curve_that_is_none_is_refused_and_changes_nothing(curve: Any, said: str) -> None:
    statistics = filled(Statistics(2), hitting(3, {0: 3}))
    before = statistics.table()
    (wrong,) = hitting(1, {0: 3}, seed=1).values()
    wrong[4] = (1, 0, "box_acc", 0.5, curve)
    with pytest.raises(ValueError, match=f"'wrong': box_acc.*{said}"):
        statistics.add("wrong", wrong)
    assert statistics.table() == before
    without: list[Number] = [(m, k, name, value) for m, k, name, value, *_ in wrong]
    with pytest.raises(ValueError, match="box_acc: there is no curve"):
        Statistics(2).add("first", without)


def test_curves_of_other_lengths_do_not_merge() -> None:
    statistics, other = filled(Statistics(2), hitting(3, {0: 3})), filled(Statistics(2), hitting(3, {0: 4}))
    before = statistics.table()
    with pytest.raises(ValueError, match="3 and 4 points"):
        statistics.merge(other)
    assert statistics.table() == before


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(400):
        statistics = Statistics(2, seed=trial, resamples=400)
        for number in range(40):
            common, one, other = rng.standard_normal(3)
            statistics.add(str(number), [(0, 0, "q", 5 + 10 * common + one), (1, 0, "q", 4 + 10 * common + other)])
        (pair,) = statistics.table().comparisons
        assert pair.interval_low is not None
        assert pair.interval_high is not None
        covered += pair.interval_low <= 1.0 <= pair.interval_high
        assert pair.interval_high - pair.interval_low < 2  # the common part cancels: they are paired
    assert 0.90 <= covered / 400 <= 0.98


def test_other_seeds_give_other_intervals() -> None:
    given = samples(20)
    one, other = aggregated(given, seed=1).table(), aggregated(given, seed=2).table()
    assert [row.mean for row in one.rows] == [row.mean for row in other.rows]
    assert all(a.interval_low != b.interval_low for a, b in zip(one.rows, other.rows, strict=True))


def test_what_is_kept_does_not_grow_with_the_samples() -> None:
    statistics = Statistics(2, resamples=10)
    given = samples(50, methods=2)

    def size() -> int:
        assert statistics._moments is not None
        return sum(
            array.nbytes
            for sums in (statistics._moments.once, statistics._moments.drawn)
            for array in vars(sums).values()
            if isinstance(array, np.ndarray)
        )

    sizes = set()
    for name, values in given.items():
        statistics.add(name, values)
        sizes.add(size())
    assert len(sizes) == 1


@pytest.mark.parametrize(
    "values",
    [
        [(0, 0, "q", 1.0)],
        [(0, 0, "q", 1.0), (1, 0, "other", 1.0)],
        [(0, 0, "q", 1.0), (0, 0, "q", 1.0)],
        [(0, 0, "q", 1.0), (1, 0, "q", float("nan"))],
        [(0, 0, "q", 1.0), (1, 0, "q", float("inf"))],
        [],
    ],
)
def test_a_sample_of_other_quantities_is_refused_and_changes_nothing(values: Values) -> None:
    statistics = Statistics(2)
    for number in range(3):
        statistics.add(str(number), [(0, 0, "q", float(number)), (1, 0, "q", 2.0)])
    before = statistics.table()
    with pytest.raises(ValueError, match=r"."):
        statistics.add("wrong", values)
    assert statistics.table() == before


@pytest.mark.parametrize("values", [[(2, 0, "q", 1.0)], [(-1, 0, "q", 1.0)], [(0, 0, "q", 1.0), (0, 0, "q", 2.0)]])
def test_a_first_sample_may_be_refused(values: Values) -> None:
    statistics = Statistics(2)
    with pytest.raises(ValueError, match=r"."):
        statistics.add("first", values)
    assert statistics.table() == Table()
    statistics.add("second", [(0, 0, "other", 1.0)])
    assert statistics.samples == 1


@pytest.mark.parametrize(
    "other",
    [
        Statistics(3),
        Statistics(2, seed=1),
        Statistics(2, resamples=10),
        aggregated({"a": [(0, 0, "p", 1.0)]}, methods=2),
    ],
)
def test_different_statistics_do_not_merge(other: Statistics) -> None:
    statistics = aggregated({"b": [(0, 0, "q", 1.0)]}, methods=2)
    before = statistics.table()
    with pytest.raises(ValueError, match=r"."):
        statistics.merge(other)
    assert statistics.table() == before


@pytest.mark.parametrize("wrong", [{"methods": 0}, {"methods": 1, "resamples": 0}])
def test_settings_that_can_not_be(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Statistics(**wrong)
