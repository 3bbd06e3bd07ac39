"""How good a model's answers are on one side of a split, with 95 % intervals.

Intervals come from a bootstrap over clusters: groups where there are groups, else rows (Efron and Tibshirani 1993,
chapters 10 and 13; Field and Welsh 2007 for clusters). All of a cluster's rows are drawn together, so that ten images of
one patient count as what they are. A draw gives each row a weight, and every quantity is computed of all draws at once.

An interval runs between percentiles of the draws less twice their bias, which is the draws' mean less the value. Few rows
flatter average precision, as each positive row counts itself among those found, and draws, in which rows repeat, flatter it
once more. Plain percentiles would lie above the truth for rare labels; of unbiased quantities they are what remains. Where
few rows leave the value itself outside, the interval reaches to it.

What is undefined has no value and a note that says why; nothing here is ever NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cdam_server.specs import Task
from cdam_training.ranking import Floats, auroc, average_precision

RESAMPLES: Final = 1000
"""Draws of the bootstrap: the ends of an interval are then good to about a tenth of its width."""

TOP: Final = 5
"""How many classes may be named for one to be right, where there are more."""

_CELLS: Final = 2_000_000  # weights at a time: 16 MB
_LEAST_CLUSTERS: Final = 10  # fewer say too little of all others for an interval
_DEFINED: Final = 0.9  # the share of draws that must have a value for an interval
_ROUNDING: Final = 1e-10  # of the largest square: a variance below it is none


@dataclass(frozen=True)
class Estimate:
    """A quantity and how sure it is.

    Attributes:
        value: Of all rows; None: undefined.
        low: Lower end of the 95 % interval; None: there is none.
        high: Upper end.
        note: Why there is no value or no interval, or which outputs a mean is over; empty otherwise.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Scores:
    """What was measured.

    Attributes:
        rows: Number of rows.
        clusters: Number of groups; without groups of rows, copies taken together.
        estimates: By the quantity's name.
        by_output: By the quantity's name, then the output's.
    """

    rows: int
    clusters: int
    estimates: Mapping[str, Estimate]
    by_output: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Values:
    """A quantity under every draw.

    Attributes:
        draws: (r,), or (r, outputs) where it is one of each output; NaN where undefined.
        undefined: Why it would be.
        bounds: The least and the largest value that there can be.
        mean: The name of the mean over outputs; empty: there is none.
    """

    draws: Floats
    undefined: str = ""
    bounds: tuple[float, float] = (0.0, 1.0)
    mean: str = ""


def measure(
    task: Task,
    outputs: Sequence[str],
    targets: NDArray[Any],
    answers: NDArray[Any],
    *,
    clusters: NDArray[np.int64] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Scores:
    """What is reported for a task.

    - multi_class: `accuracy`, `top_5_accuracy` where there are more than five classes, `balanced_accuracy` (the mean of
      `recall` over the classes that there are examples of), `log_loss` (nats); `recall` by class.
    - multi_label: `mean_average_precision` (over the labels with positive examples), `mean_auroc` (over those with both);
      `average_precision` and `auroc` by label.
    - binary: `accuracy`, `sensitivity` and `specificity` at a logit of 0, `auroc`, `average_precision`, `brier` (the mean
      squared error of the probability), `log_loss` (nats).
    - regression: `pearson_r`, `r2`, `mae` and `rmse` by output, the last two in the target's own unit; and the means over
      outputs `mean_pearson_r`, `mean_r2`.

    Args:
        task: What the outputs mean.
        outputs: Their names, C of them.
        targets: As of `Dataset.targets`.
        answers: (n, C), what the model answers: logits, or a regression's values. (n,) where C is 1.
        clusters: (n,), the cluster of each row; None: each row is one.
        seed: Of the bootstrap.
        resamples: Draws of the bootstrap; 0: no intervals.

    Raises:
        ValueError: Shapes do not fit, there are no rows, or an answer is not finite.
    """
    answers = np.asarray(answers, np.float64)
    answers = answers[:, None] if answers.ndim == 1 else answers
    _check(task, outputs, targets, answers, clusters)
    members = np.arange(len(answers)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    count = int(members.max()) + 1
    parts = [_MEASURES[task](targets, answers, weights) for weights in _weights(members, count, seed, resamples)]
    return _scores(parts, outputs, len(answers), count)


def measure_ratios(
    outputs: Sequence[str],
    its_output: NDArray[np.int64],
    ratios: Mapping[str, tuple[Floats, Floats]],
    undefined: Mapping[str, str],
    *,
    clusters: NDArray[np.int64],
    rows: int,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Scores:
    """Quotients of sums by output, such as a mean over some of its rows, and as `mean_...` their mean over outputs.

    Args:
        outputs: Their names.
        its_output: (n,), which output each row is of.
        ratios: By name what is added up above and below, (n,) each.
        undefined: By name why there would be no value: nothing is added up below.
        clusters: (n,), the cluster of each row.
        rows: How many rows there are to be told of; of several outputs they may be less than n.
        seed: Of the bootstrap.
        resamples: See `measure`.

    Raises:
        ValueError: There are no rows.
    """
    if not len(its_output):
        raise ValueError("there are no rows to measure on")
    members = np.unique(clusters, return_inverse=True)[1]
    count = int(members.max()) + 1
    order = np.argsort(its_output, kind="stable")
    there, starts = np.unique(its_output[order], return_index=True)
    parts: list[dict[str, _Values]] = []
    for weights in _weights(members, count, seed, resamples):
        values: dict[str, _Values] = {}
        for name, (above, below) in ratios.items():
            ordered = weights[:, order]
            over, under = (np.add.reduceat(ordered * part[order], starts, axis=1) for part in (above, below))
            draws = np.full((len(weights), len(outputs)), np.nan)
            draws[:, there] = np.divide(over, under, out=np.full_like(over, np.nan), where=under > 0)
            values[name] = _Values(draws, undefined[name], mean=f"mean_{name}")
        parts.append(values)
    return _scores(parts, outputs, rows, count)


def _scores(parts: Sequence[Mapping[str, _Values]], outputs: Sequence[str], rows: int, count: int) -> Scores:
    """From the draws, some at a time."""
    estimates: dict[str, Estimate] = {}
    by_output: dict[str, dict[str, Estimate]] = {}
    for name, first in parts[0].items():
        draws = np.concatenate([part[name].draws for part in parts])
        if draws.ndim == 1:
            estimates[name] = _estimate(draws, first, count)
            continue
        by_output[name] = {output: _estimate(draws[:, index], first, count) for index, output in enumerate(outputs)}
        if first.mean:
            estimates[first.mean] = _mean(draws, first, count)
    return Scores(rows, count, estimates, by_output)


def _check(
    task: Task,
    outputs: Sequence[str],
    targets: NDArray[Any],
    answers: Floats,
    clusters: NDArray[np.int64] | None,
) -> None:
    rows = len(answers)
    if answers.shape != (rows, len(outputs)):
        raise ValueError(f"answers must be (rows, {len(outputs)}), not {answers.shape}")
    if not rows:
        raise ValueError("there are no rows to measure on")
    wanted = (rows,) if task is Task.MULTI_CLASS else answers.shape
    if targets.shape != wanted:
        raise ValueError(f"targets must be {wanted} for {task}, not {targets.shape}")
    if clusters is not None and clusters.shape != (rows,):
        raise ValueError(f"clusters must be {(rows,)}, not {clusters.shape}")
    if not np.isfinite(answers).all():
        row, output = np.argwhere(~np.isfinite(answers))[0]
        raise ValueError(f"the answer {outputs[output]!r} of row {row} is {answers[row, output]}")


def _weights(members: NDArray[np.int64], count: int, seed: int, resamples: int) -> Iterator[Floats]:
    """How often each row was drawn, (draws, n) at a time; the first draw has every row once."""
    rng = np.random.default_rng(seed)
    yield np.ones((1, len(members)))
    at_once = max(1, _CELLS // len(members))
    for start in range(0, resamples, at_once):
        draws = min(at_once, resamples - start)
        drawn = rng.integers(count, size=(draws, count)) + count * np.arange(draws)[:, None]
        times = np.bincount(drawn.ravel(), minlength=draws * count).reshape(draws, count)
        yield times[:, members].astype(np.float64)


def _estimate(draws: Floats, about: _Values, clusters: int) -> Estimate:
    """From the value of all rows and those of the draws."""
    value, values = draws[0], draws[1:]
    if np.isnan(value):
        return Estimate(None, note=about.undefined)
    if not len(values):
        return Estimate(float(value))
    defined = values[~np.isnan(values)]
    if clusters < _LEAST_CLUSTERS:
        which = "there is one cluster alone" if clusters == 1 else f"{clusters} clusters tell too little of others"
        return Estimate(float(value), note=f"no interval: {which}")
    if len(defined) < max(1, _DEFINED * len(values)):
        return Estimate(
            float(value), note=f"no interval: in {len(values) - len(defined)} of {len(values)} draws {about.undefined}"
        )
    if value in about.bounds and (defined == value).all():  # all right, or all wrong: draws of these say no more
        return Estimate(float(value), note="no interval: all rows say the same")
    bias = defined.mean() - value
    low, high = np.clip(np.percentile(defined, [2.5, 97.5]) - 2 * bias, *about.bounds).tolist()
    return Estimate(float(value), min(low, float(value)), max(high, float(value)))


def _mean(draws: Floats, about: _Values, clusters: int) -> Estimate:
    """The mean over the outputs that have a value."""
    there = ~np.isnan(draws)
    number = there.sum(1)
    means = np.divide(np.where(there, draws, 0).sum(1), number, out=np.full(len(draws), np.nan), where=number > 0)
    estimate = _estimate(means, about, clusters)
    if 0 < number[0] < draws.shape[1]:
        note = f"over {number[0]} of {draws.shape[1]} outputs: of the others {about.undefined}"
        return Estimate(estimate.value, estimate.low, estimate.high, "; ".join(filter(None, (note, estimate.note))))
    return estimate


# --- By task. Weights are (r, n).


def _multi_class(targets: NDArray[np.int64], answers: Floats, weights: Floats) -> dict[str, _Values]:
    rows = np.arange(len(targets))
    own = answers[rows, targets][:, None]
    shifted = answers - answers.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[rows, targets]
    # Of equal logits the first counts as the larger, as in argmax.
    before = np.arange(answers.shape[1]) < targets[:, None]
    rank = ((answers > own) | ((answers == own) & before)).sum(1)
    values = {"accuracy": _average(rank == 0, weights)}
    if answers.shape[1] > TOP:
        values[f"top_{TOP}_accuracy"] = _average(rank < TOP, weights)
    order = np.argsort(targets, kind="stable")
    classes, starts = np.unique(targets[order], return_index=True)
    recall = np.full((len(weights), answers.shape[1]), np.nan)
    ordered = weights[:, order]
    right, all_of = (np.add.reduceat(part, starts, axis=1) for part in (ordered * (rank == 0)[order], ordered))
    recall[:, classes] = np.divide(right, all_of, out=np.full_like(right, np.nan), where=all_of > 0)
    return {
        **values,
        "log_loss": _average(losses, weights, bounds=_NOT_NEGATIVE),
        "recall": _Values(recall, "there is no example", mean="balanced_accuracy"),
    }


def _multi_label(targets: NDArray[np.float32], answers: Floats, weights: Floats) -> dict[str, _Values]:
    positive = targets > 0
    outputs = range(answers.shape[1])
    precision = [average_precision(answers[:, index], positive[:, index], weights) for index in outputs]
    area = [auroc(answers[:, index], positive[:, index], weights) for index in outputs]
    return {
        "average_precision": _Values(np.stack(precision, 1), _NO_POSITIVE, mean="mean_average_precision"),
        "auroc": _Values(np.stack(area, 1), _ONE_KIND, mean="mean_auroc"),
    }


def _binary(targets: NDArray[np.float32], answers: Floats, weights: Floats) -> dict[str, _Values]:
    positive, logits = targets[:, 0] > 0, answers[:, 0]
    right = (logits > 0) == positive
    signed = np.where(positive, logits, -logits)
    losses = np.logaddexp(0, -signed)
    return {
        "accuracy": _average(right, weights),
        "sensitivity": _average(right[positive], weights[:, positive], _NO_POSITIVE),
        "specificity": _average(right[~positive], weights[:, ~positive], "there is no negative example"),
        "auroc": _Values(auroc(logits, positive, weights), _ONE_KIND),
        "average_precision": _Values(average_precision(logits, positive, weights), _NO_POSITIVE),
        "brier": _average(np.exp(-2 * np.logaddexp(0, signed)), weights),  # (1 - p of the truth)^2
        "log_loss": _average(losses, weights, bounds=_NOT_NEGATIVE),
    }


def _regression(targets: NDArray[np.float32], answers: Floats, weights: Floats) -> dict[str, _Values]:
    truth = targets.astype(np.float64)
    errors = answers - truth
    total = weights.sum(1, keepdims=True)
    squared = weights @ errors**2 / total
    y, x = _centred(truth), _centred(answers)
    mean_y, mean_x = weights @ y / total, weights @ x / total
    variance_y = _not_tiny(weights @ y**2 / total - mean_y**2, y)
    variance_x = _not_tiny(weights @ x**2 / total - mean_x**2, x)
    covariance = weights @ (x * y) / total - mean_x * mean_y
    return {
        "pearson_r": _Values(
            np.clip(covariance / np.sqrt(variance_x * variance_y), -1, 1),
            "targets or answers are all the same",
            (-1.0, 1.0),
            mean="mean_pearson_r",
        ),
        "r2": _Values(1 - squared / variance_y, "targets are all the same", (-np.inf, 1.0), mean="mean_r2"),
        "mae": _Values(weights @ np.abs(errors) / total, bounds=_NOT_NEGATIVE),
        "rmse": _Values(np.sqrt(squared), bounds=_NOT_NEGATIVE),
    }


_Measures = Callable[[NDArray[Any], Floats, Floats], dict[str, _Values]]
_MEASURES: Final[Mapping[Task, _Measures]] = MappingProxyType(
    {
        Task.MULTI_CLASS: _multi_class,
        Task.MULTI_LABEL: _multi_label,
        Task.BINARY: _binary,
        Task.REGRESSION: _regression,
    }
)
_NOT_NEGATIVE: Final = (0.0, np.inf)
_NO_POSITIVE: Final = "there is no positive example"
_ONE_KIND: Final = "there are only positive or only negative examples"


def _average(
    values: NDArray[Any], weights: Floats, undefined: str = "", bounds: tuple[float, float] = (0.0, 1.0)
) -> _Values:
    total = weights.sum(1)
    average = np.divide(weights @ values.astype(np.float64), total, out=np.full(len(weights), np.nan), where=total > 0)
    return _Values(average, undefined, bounds)


def _centred(values: Floats) -> Floats:
    """Values less their mean, exactly 0 where all are the same: sums of squares lose no digits then."""
    return np.where(np.ptp(values, axis=0) == 0, 0.0, values - values.mean(0))


def _not_tiny(variance: Floats, centred: Floats) -> Floats:
    """The variance, NaN where it is 0 up to rounding."""
    return np.where(variance > _ROUNDING * (centred**2).max(0), variance, np.nan)
