"""Statistics with bootstrap intervals, and what they say of a paper's claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % bootstrap interval over samples."""

    value: float
    low: float
    high: float

    def text(self, digits: int = 2) -> str:
        """As in a document."""
        return f"{self.value:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def estimate(rows: Floats, statistic: Callable[[Floats], float], groups: NDArray[Any] | None = None) -> Estimate:
    """A statistic of samples, and what it is on resamples of them.

    Args:
        rows: One a sample, (samples, ...).
        statistic: Of any number of rows.
        groups: What each sample belongs to, (samples,): groups are drawn, and bring all their samples. None: each sample
            is a group of its own.
    """
    rng = np.random.default_rng(0)
    members = [np.array([row]) for row in range(len(rows))] if groups is None else _members(groups)
    count = len(members)
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
    return estimate(rows, lambda its: float(its.mean()), groups)


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


def claims_table(claims: Sequence[Claim]) -> str:
    """As markdown."""
    rows = [f"| {claim.text} | {claim.figure} | {claim.verdict} |" for claim in claims]
    return "\n".join(["| the paper says | here, with 95 % interval | |", "|---|---|---|", *rows])
