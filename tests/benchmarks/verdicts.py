"""Statistics with bootstrap intervals, and what they say of a paper's claims."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.sheets import table

Floats = NDArray[np.float64]
RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % bootstrap interval over samples."""

    value: float
    low: float
    high: float

    def text(self, digits: int = 2) -> str:
        """As in a document; of a single sample without the interval."""
        if math.isinf(self.high - self.low):
            return f"{self.value:.{digits}f}"
        return f"{self.value:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def estimate(rows: Floats, statistic: Callable[[Floats], float], groups: NDArray[Any] | None = None) -> Estimate:
    """A statistic of samples, and what it is on resamples of them.

    Of a single sample or group the interval is everything: nothing is known of others.

    Args:
        rows: One a sample, (samples, ...).
        statistic: Of any number of rows.
        groups: What each sample belongs to, (samples,): groups are drawn, and bring all their samples. None: each sample
            is a group of its own.
    """
    rng = np.random.default_rng(0)
    members = [np.array([row]) for row in range(len(rows))] if groups is None else _members(groups)
    count = len(members)
    if count == 1:
        return Estimate(float(statistic(rows)), -math.inf, math.inf)
    drawn = [
        statistic(rows[np.concatenate([members[group] for group in rng.integers(0, count, count)])])
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Estimate(float(statistic(rows)), float(low), float(high))


def _members(groups: NDArray[Any]) -> list[NDArray[np.intp]]:
    numbers = np.unique(groups, return_inverse=True)[1]
    order = np.argsort(numbers, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)


def mean(rows: Floats, groups: NDArray[Any] | None = None) -> Estimate:
    """Of one number a sample."""
    if groups is not None or len(rows) == 1:
        return estimate(rows, lambda its: float(its.mean()), groups)
    drawn = rows[np.random.default_rng(0).integers(0, len(rows), (RESAMPLES, len(rows)))].mean(axis=1)  # the same draws
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Estimate(float(rows.mean()), float(low), float(high))


@dataclass(frozen=True)
class Claim:
    """A claim of a paper.

    Attributes:
        text: The claim.
        figure: What was found.
        found: That must be above 0 for the claim to hold.
    """

    text: str
    figure: str
    found: Estimate

    @property
    def verdict(self) -> str:
        """By the interval."""
        if self.found.low > 0:
            return "agrees"
        return "does not" if self.found.high < 0 else "can't tell"


def claims_table(claims: Sequence[Claim], others: Mapping[str, Sequence[Claim]] = MappingProxyType({})) -> str:
    """As markdown.

    Args:
        claims: On the model of the document.
        others: On other models, by their names: shown by the verdict alone.
    """
    head = ["the paper says", "here, with 95 % interval", "", *others]
    rows = []
    for claim in claims:
        verdicts = [next((its.verdict for its in theirs if its.text == claim.text), "") for theirs in others.values()]
        rows.append([claim.text, claim.figure, claim.verdict, *verdicts])
    return table(head, rows)
