"""What an evaluation's samples say together: means, standard errors, 95 % intervals, paired comparisons of methods.

Samples come one by one, in any order; what is kept does not grow with their number, and the statistics of parts can be
put together. Intervals come from a Poisson bootstrap (Hanley and MacGibbon 2006; Chamandy et al. 2012): in each
resample a sample counts as often as a Poisson variable of mean 1 says, which needs no knowledge of how many samples there
will be. A sample's weights are drawn by the seed and its id alone, so the same samples give the same intervals whatever
their order and however they were spread. The same weights for every method make the comparisons paired.
"""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cdam._hits import Hits
from cdam._hits import as_hits as as_hits  # noqa: PLC0414 - for those who read stored values again

Key: TypeAlias = tuple[int, int, str]
"""Index of the method, index of the metric, quantity."""

Number: TypeAlias = tuple[int, int, str, float] | tuple[int, int, str, float, NDArray[Any] | None]
"""Of a sample: the parts of the key, the value, and its curve of shape (2, points), if it has one."""

_Array: TypeAlias = NDArray[np.float64]
_Indices: TypeAlias = NDArray[np.intp]
_HitsOf: TypeAlias = dict[tuple[int, int], NDArray[np.bool_]]  # by method and metric

CORRELATION: Final = "change_correlation"
"""Pearson's correlation over samples of the two quantities of `CORRELATED`; a quantity of the table alone."""
CORRELATED: Final = ("map_change", "true_change")

PEAK: Final = "max_box_acc"
"""The largest ordinate of the mean curve of `PEAKED` over samples; a quantity of the table alone."""
PEAKED: Final = "box_acc"
"""The quantity whose curve says, 1 or 0, whether each of its points is hit."""

_ENDS = (0.025, 0.975)


@dataclass(frozen=True)
class Row:
    """One quantity of one metric for one method, over all samples.

    Attributes:
        method_index: Index of the method, as evaluated.
        metric_index: Index of the metric, as evaluated.
        quantity: Which of the metric's quantities.
        mean: Mean over samples; for ``change_correlation`` the correlation, for ``max_box_acc`` the maximum.
        standard_error: Of the mean: sd / sqrt(n), with n - 1 in the variance; None for a single sample, and for a
            correlation and a maximum.
        interval_low: Lower end of the 95 % bootstrap interval; None for a single sample.
        interval_high: Upper end; likewise.
        samples: Number of samples.
    """

    method_index: int
    metric_index: int
    quantity: str
    mean: float
    standard_error: float | None
    interval_low: float | None
    interval_high: float | None
    samples: int


@dataclass(frozen=True)
class Comparison:
    """Two methods on one quantity, sample by sample.

    Attributes:
        method_index: Index of the one method.
        other_method_index: Index of the other.
        metric_index: Index of the metric.
        quantity: Which of the metric's quantities.
        mean_difference: Mean over samples of the one's value minus the other's; for ``change_correlation`` and
            ``max_box_acc`` the difference of the two methods' numbers.
        interval_low: Lower end of the difference's 95 % bootstrap interval; None for a single sample.
        interval_high: Upper end; likewise.
    """

    method_index: int
    other_method_index: int
    metric_index: int
    quantity: str
    mean_difference: float
    interval_low: float | None
    interval_high: float | None


@dataclass(frozen=True)
class Table:
    """What an evaluation comes to.

    Attributes:
        rows: By method, then by metric, then by quantity.
        comparisons: By metric and quantity, of every two methods, the one that comes first minus the other.
        samples: Samples that could be measured.
        failures: Samples that could not.
    """

    rows: tuple[Row, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    samples: int = 0
    failures: int = 0


class Statistics:
    """Aggregates over samples that come one by one.

    Attributes:
        samples: Samples added.
        failures: Samples that failed.
    """

    def __init__(self, methods: int, *, seed: int = 0, resamples: int = 1000) -> None:
        """Begin without samples.

        Args:
            methods: Number of methods.
            seed: With a sample's id it fixes the sample's weights.
            resamples: Number of bootstrap resamples.

        Raises:
            ValueError: Methods or resamples are less than one.
        """
        if methods < 1 or resamples < 1:
            raise ValueError(f"methods and resamples are at least 1, got {methods} and {resamples}")
        self.samples = 0
        self.failures = 0
        self._methods = methods
        self._seed = seed
        self._resamples = resamples
        self._moments: _Moments | None = None

    def add(self, sample_id: str, values: Sequence[Number]) -> None:
        """Add a sample; each is added once.

        Args:
            sample_id: Its id.
            values: Its method indices, metric indices, quantities and values, in any order; the same for every sample. Of
                `PEAKED` the curve is needed, others are not looked at.

        Raises:
            ValueError: They are not those of the samples before, or not finite; nothing was added.
        """
        keys = tuple((value[0], value[1], value[2]) for value in values)
        numbers = np.array([value[3] for value in values], np.float64)
        if not np.isfinite(numbers).all():
            raise ValueError(f"{sample_id!r} has values that are not finite")
        hits = _hits(sample_id, values)
        moments = self._moments or _Moments(self._checked(keys), self._resamples, hits)
        if keys != moments.keys:
            numbers = numbers[_order(keys, moments.keys)]
        moments.check(sample_id, hits)
        moments.add(numbers, hits, _weights(self._seed, sample_id, self._resamples))
        self._moments = moments
        self.samples += 1

    def failed(self) -> None:
        """Count a sample that could not be measured."""
        self.failures += 1

    def merge(self, other: "Statistics") -> None:
        """Add all samples of another; none of them may have been added here.

        Raises:
            ValueError: It is of other methods, quantities, resamples or another seed.
        """
        for name in ("_methods", "_seed", "_resamples"):
            if getattr(self, name) != getattr(other, name):
                its, own = getattr(other, name), getattr(self, name)
                raise ValueError(f"statistics of different {name[1:]} can't be merged: {own} and {its}")
        theirs = other._moments  # noqa: SLF001 - of the same class
        if theirs is not None and self._moments is not None:
            self._moments.merge(theirs)
        elif theirs is not None:
            self._moments = copy.deepcopy(theirs)
        self.samples += other.samples
        self.failures += other.failures

    def table(self) -> Table:
        """What the samples so far come to."""
        if self._moments is None:
            return Table(failures=self.failures)
        estimates = self._moments.estimates(self.samples)
        return Table(tuple(estimates.rows()), tuple(estimates.comparisons()), self.samples, self.failures)

    def _checked(self, keys: tuple[Key, ...]) -> tuple[Key, ...]:
        if len(set(keys)) < len(keys):
            raise ValueError("a quantity is there twice")
        if any(not 0 <= method < self._methods or metric < 0 for method, metric, _ in keys):
            raise ValueError(f"an index is out of range; there are {self._methods} methods")
        return keys


class _Sums:
    """Weighted means of quantities, and weighted sums of products of their deviations, of a number of resamples at once.

    A resample's numbers depend on the samples that it has alone: its origin is the first of them. So neither an outlier
    that it does not have nor a large offset costs it digits, and its sums are 0 exactly where its samples are equal.
    """

    def __init__(self, quantities: int, pairs: tuple[_Indices, _Indices], resamples: int) -> None:
        self.pairs = pairs
        self.weight = np.zeros(resamples)
        self.origin = np.zeros((quantities, resamples))
        self.mean = np.zeros((quantities, resamples))  # less the origin
        self.products = np.zeros((len(pairs[0]), resamples))

    def add(self, values: _Array, weights: _Array) -> None:
        """Add a sample."""
        self.origin[:, self.weight == 0] = values[:, None]
        self._join(values[:, None] - self.origin, weights)

    def merge(self, other: "_Sums", order: _Indices) -> None:
        """Add the sums of other samples, whose quantities are in another order."""
        empty = self.weight == 0
        self.origin[:, empty] = other.origin[np.ix_(order, empty)]
        first, second = (order[side].tolist() for side in self.pairs)
        its = _order(list(zip(*other.pairs, strict=True)), list(zip(first, second, strict=True)))
        self.products += other.products[its]
        self._join(other.origin[order] - self.origin + other.mean[order], other.weight)

    def means(self) -> _Array:
        """The weighted means, (quantities, resamples)."""
        return self.origin + self.mean

    def _join(self, means: _Array, weights: _Array) -> None:
        """Update (Chan, Golub and LeVeque 1983) by samples of such means, less the origin, and such total weights."""
        total = self.weight + weights
        share = weights / np.where(total > 0, total, 1.0)
        means -= self.mean  # in place: new arrays of this size cost more than the arithmetic
        first, second = (means[side] for side in self.pairs)
        first *= share
        second *= self.weight
        first *= second
        self.products += first
        means *= share
        self.mean += means
        self.weight = total


class _Moments:
    """Sums over samples of every quantity: of all samples once, and of the bootstrap's resamples."""

    def __init__(self, keys: tuple[Key, ...], resamples: int, hits: _HitsOf) -> None:
        self.keys = keys
        self.hits = {its: Hits(len(points), resamples) for its, points in hits.items()}
        pairs = _correlated(keys)
        every = np.arange(len(keys))
        self.x = x = np.array([x for x, _ in pairs], np.intp)
        self.y = y = np.array([y for _, y in pairs], np.intp)
        self.once = _Sums(len(keys), (np.concatenate([every, x]), np.concatenate([every, y])), 1)
        self.drawn = _Sums(len(keys), (np.concatenate([x, y, x]), np.concatenate([x, y, y])), resamples)

    def check(self, sample_id: str, hits: _HitsOf) -> None:
        """Refuse curves of another length than those before."""
        for its, points in hits.items():
            before = len(self.hits[its].once)
            if len(points) != before:
                raise ValueError(f"{sample_id!r}: {PEAKED}'s curve has {len(points)} points, not {before} as before")

    def add(self, values: _Array, hits: _HitsOf, weights: _Array) -> None:
        """Add a sample."""
        self.once.add(values, np.ones(1))
        self.drawn.add(values, weights)
        for its, points in hits.items():
            self.hits[its].add(points, weights)

    def merge(self, other: "_Moments") -> None:
        """Add the sums of other samples."""
        order = _order(other.keys, self.keys)
        for its, hits in self.hits.items():
            theirs, ours = len(other.hits[its].once), len(hits.once)
            if theirs != ours:
                raise ValueError(
                    f"curves of different lengths can't be merged: {PEAKED} has {ours} and {theirs} points"
                )
        for its, hits in self.hits.items():
            hits.merge(other.hits[its])
        self.once.merge(other.once, order)
        self.drawn.merge(other.drawn, order)

    def estimates(self, samples: int) -> "_Estimates":
        """Every quantity's estimate from all samples, and from each resample that has any."""
        squares, products = np.split(self.once.products[:, 0], [len(self.keys)])
        correlation = _correlation(squares[self.x], squares[self.y], products)
        some = self.drawn.weight > 0
        correlations = _correlation(*np.split(self.drawn.products[:, some], 3))
        errors = np.sqrt(squares / (samples - 1) / samples) if samples > 1 else None
        correlated = [self.keys[index][:2] for index in self.x]
        peaks = [hits.peaks(self.drawn.weight) for hits in self.hits.values()]
        return _Estimates(
            keys=(
                *self.keys,
                *((method, metric, CORRELATION) for method, metric in correlated),
                *((method, metric, PEAK) for method, metric in self.hits),
            ),
            points=np.array(
                [*self.once.means()[:, 0], *correlation, *(its.peak(samples) for its in self.hits.values())]
            ),
            resampled=np.concatenate([self.drawn.means()[:, some], correlations, *(its[None] for its in peaks)]),
            errors=errors,
            samples=samples,
        )


@dataclass(frozen=True, eq=False)
class _Estimates:
    """Estimates of quantities, `errors` of those that are means."""

    keys: tuple[Key, ...]
    points: _Array  # (keys,)
    resampled: _Array  # (keys, resamples)
    errors: _Array | None
    samples: int

    def rows(self) -> Iterator[Row]:
        """By method, then by metric, quantities in the order in which they came."""
        low, high = self._interval(self.resampled)
        for row in sorted(range(len(self.keys)), key=lambda row: self.keys[row][:2]):
            mean = self.errors is not None and row < len(self.errors)
            error = float(self.errors[row]) if self.errors is not None and mean else None
            yield Row(*self.keys[row], float(self.points[row]), error, low[row], high[row], self.samples)

    def comparisons(self) -> Iterator[Comparison]:
        """By metric and quantity, every method with all that come after it."""
        found: dict[tuple[int, str], list[int]] = {}
        for row in sorted(range(len(self.keys)), key=lambda row: self.keys[row][:2]):
            _, metric, quantity = self.keys[row]
            found.setdefault((metric, quantity), []).append(row)
        for (metric, quantity), rows in sorted(found.items(), key=lambda item: item[0][0]):
            ones, others = (np.array(rows)[side] for side in np.triu_indices(len(rows), 1))
            low, high = self._interval(self.resampled[ones] - self.resampled[others])
            for pair, (one, other) in enumerate(zip(ones, others, strict=True)):
                difference = float(self.points[one] - self.points[other])
                methods = self.keys[one][0], self.keys[other][0]
                yield Comparison(*methods, metric, quantity, difference, low[pair], high[pair])

    def _interval(self, resampled: _Array) -> tuple[Sequence[float | None], Sequence[float | None]]:
        if self.samples < 2 or not resampled.size:
            nothing = [None] * len(resampled)
            return nothing, nothing
        low, high = np.quantile(resampled, _ENDS, axis=1).tolist()
        return low, high


def _weights(seed: int, sample_id: str, resamples: int) -> _Array:
    """How often a sample counts in each resample."""
    parts = [part.encode() for part in (str(seed), sample_id, "bootstrap")]
    digest = hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).digest()
    draws = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return draws.poisson(1.0, resamples).astype(np.float64)


def _hits(sample_id: str, values: Sequence[Number]) -> _HitsOf:
    """The curves of `PEAKED`, by method and metric."""
    hits = {}
    for method, metric, quantity, _, *rest in values:
        if quantity == PEAKED:
            try:
                hits[method, metric] = as_hits(rest[0] if rest else None)
            except ValueError as error:
                raise ValueError(f"{sample_id!r}: {PEAKED}: {error}") from error
    return hits


def _order(keys: Sequence[Any], wanted: Sequence[Any]) -> _Indices:
    """Where each wanted key is."""
    where = {key: index for index, key in enumerate(keys)}
    if len(where) < len(keys) or where.keys() != set(wanted):
        raise ValueError("the samples don't all have the same methods, metrics and quantities")
    return np.array([where[key] for key in wanted], np.intp)


def _correlated(keys: Sequence[Key]) -> list[tuple[int, int]]:
    """Where the two correlated quantities of a method and metric are, for all that have both."""
    where = {key: index for index, key in enumerate(keys)}
    x, y = CORRELATED
    found = ((index, where.get((method, metric, y))) for (method, metric, name), index in where.items() if name == x)
    return [(index, other) for index, other in found if other is not None]


def _correlation(xx: _Array, yy: _Array, xy: _Array) -> _Array:
    """Pearson's, of moments; 0 where one does not vary."""
    varies = (xx > 0) & (yy > 0)
    scale = np.where(varies, np.sqrt(xx) * np.sqrt(yy), 1.0)
    return np.where(varies, np.clip(xy / scale, -1.0, 1.0), 0.0)
