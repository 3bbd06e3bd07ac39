"""Metrics against scikit-learn and scipy, value by value; intervals against a slow bootstrap and against theory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

pytest.importorskip("sklearn", reason="metrics are compared with those of the extra `train`")

from scipy import stats
from sklearn import metrics as sklearn_metrics

from cdam_server.specs import Task
from cdam_training.metrics import Estimate, Scores, measure
from cdam_training.ranking import auroc, average_precision

ROWS = 300


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def names(count: int) -> list[str]:
    return [f"o{index}" for index in range(count)]


def values(scores: Scores) -> dict[str, float | None]:
    return {name: estimate.value for name, estimate in scores.estimates.items()}


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(1, keepdims=True))


# --- Values


@pytest.mark.parametrize("classes", [3, 9])
def test_multi_class(classes: int) -> None:
    targets = rng().integers(classes, size=ROWS)
    logits = rng(1).normal(size=(ROWS, classes)) + 2 * np.eye(classes)[targets]
    scores = measure(Task.MULTI_CLASS, names(classes), targets, logits)
    said = logits.argmax(1)
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(targets, said),
        "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(targets, said),
        "log_loss": sklearn_metrics.log_loss(targets, softmax(logits)),
    }
    if classes > 5:
        expected["top_5_accuracy"] = sklearn_metrics.top_k_accuracy_score(targets, logits, k=5)
    assert values(scores) == pytest.approx(expected, abs=1e-12)
    recall = sklearn_metrics.recall_score(targets, said, average=None)
    assert [scores.by_output["recall"][name].value for name in names(classes)] == pytest.approx(
        recall.tolist(), abs=1e-12
    )
    assert (scores.rows, scores.clusters) == (ROWS, ROWS)


def test_log_loss_of_extreme_logits_is_finite() -> None:
    logits = np.array([[1e4, -1e4], [0.0, 3e38]])
    scores = measure(Task.MULTI_CLASS, names(2), np.array([1, 0]), logits)
    assert scores.estimates["log_loss"].value == pytest.approx((2e4 + 3e38) / 2)


def test_of_equal_logits_the_first_is_meant() -> None:
    scores = measure(Task.MULTI_CLASS, names(7), np.array([0, 1, 4, 5, 6]), np.zeros((5, 7)))
    assert (scores.estimates["accuracy"].value, scores.estimates["top_5_accuracy"].value) == (0.2, 0.6)


def test_multi_label() -> None:
    targets = (rng().random((ROWS, 6)) < 0.2).astype(np.float32)
    logits = np.round(rng(1).normal(size=(ROWS, 6)) + targets, 1)  # with ties
    scores = measure(Task.MULTI_LABEL, names(6), targets, logits, resamples=50)
    for metric, oracle in (
        ("average_precision", sklearn_metrics.average_precision_score),
        ("auroc", sklearn_metrics.roc_auc_score),
    ):
        expected = [oracle(targets[:, index], logits[:, index]) for index in range(6)]
        assert [scores.by_output[metric][name].value for name in names(6)] == pytest.approx(expected, abs=1e-12)
        assert scores.estimates[f"mean_{metric}"].value == pytest.approx(np.mean(expected), abs=1e-12)


def test_binary() -> None:
    targets = (rng().random((ROWS, 1)) < 0.3).astype(np.float32)
    logits = np.round(rng(1).normal(size=ROWS) + targets[:, 0] - 0.3, 1)
    truth, said, probability = targets[:, 0].astype(int), logits > 0, 1 / (1 + np.exp(-logits))
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(truth, said),
        "sensitivity": sklearn_metrics.recall_score(truth, said),
        "specificity": sklearn_metrics.recall_score(truth, said, pos_label=0),
        "auroc": sklearn_metrics.roc_auc_score(truth, logits),
        "average_precision": sklearn_metrics.average_precision_score(truth, logits),
        "brier": sklearn_metrics.brier_score_loss(truth, probability),
        "log_loss": sklearn_metrics.log_loss(truth, probability),
    }
    for answers in (logits, logits[:, None]):
        assert values(measure(Task.BINARY, ["sick"], targets, answers)) == pytest.approx(expected, abs=1e-12)


def test_regression() -> None:
    truth = (rng().normal(size=(ROWS, 2)) * [1, 500] + [0, 1e5]).astype(np.float32)
    answers = truth + rng(1).normal(size=(ROWS, 2)) * [1, 300]
    scores = measure(Task.REGRESSION, ["a", "b"], truth, answers)
    oracles: dict[str, Callable[[Any, Any], float]] = {
        "pearson_r": lambda y, x: float(stats.pearsonr(y, x).statistic),
        "r2": sklearn_metrics.r2_score,
        "mae": sklearn_metrics.mean_absolute_error,
        "rmse": sklearn_metrics.root_mean_squared_error,
    }
    double = truth.astype(np.float64)
    for metric, oracle in oracles.items():
        expected = [oracle(double[:, index], answers[:, index]) for index in range(2)]
        assert [scores.by_output[metric][name].value for name in "ab"] == pytest.approx(expected, rel=1e-9)
    assert set(scores.estimates) == {"mean_pearson_r", "mean_r2"}
    r2 = [scores.by_output["r2"][name].value or math.nan for name in "ab"]
    assert scores.estimates["mean_r2"].value == pytest.approx(np.mean(r2), rel=1e-12)


# --- Ranking under weights


@settings(max_examples=100, deadline=None)
@given(
    scores=hnp.arrays(np.float64, 12, elements=st.sampled_from([-1.0, 0.0, 0.5, 2.0, 3.0])),
    positive=hnp.arrays(np.bool_, 12),
    weights=hnp.arrays(np.float64, (3, 12), elements=st.sampled_from([0.0, 1.0, 2.0, 5.0])),
)
def test_ranking_under_weights(
    scores: NDArray[np.float64], positive: NDArray[np.bool_], weights: NDArray[np.float64]
) -> None:
    """As scikit-learn has it with rows repeated as often as their weight says."""
    precision, area = average_precision(scores, positive, weights), auroc(scores, positive, weights)
    for index, row in enumerate(weights):
        drawn = np.repeat(np.arange(12), row.astype(int))
        kinds = set(positive[drawn].tolist())
        if True in kinds:
            expected = sklearn_metrics.average_precision_score(positive[drawn], scores[drawn])
            assert precision[index] == pytest.approx(expected, abs=1e-12)
        else:
            assert math.isnan(precision[index])
        if len(kinds) == 2:
            assert area[index] == pytest.approx(
                sklearn_metrics.roc_auc_score(positive[drawn], scores[drawn]), abs=1e-12
            )
        else:
            assert math.isnan(area[index])


# --- Undefined


def test_a_class_without_examples_has_no_recall() -> None:
    scores = measure(Task.MULTI_CLASS, names(3), np.repeat([0, 0, 2, 2], 3), np.eye(3)[np.repeat([0, 1, 2, 2], 3)])
    assert scores.by_output["recall"]["o1"] == Estimate(None, note="there is no example")
    assert scores.estimates["balanced_accuracy"].value == 0.75
    assert scores.estimates["balanced_accuracy"].note == "over 2 of 3 outputs: of the others there is no example"


@pytest.mark.parametrize(
    ("rows", "right", "note"), [(9, 4, "no interval: 9 clusters tell"), (40, 40, "no interval: all")]
)
def test_no_interval_is_claimed_of_too_few_or_of_what_never_differs(rows: int, right: int, note: str) -> None:
    """A bootstrap of six right answers out of six says 1 to 1."""
    answers = np.eye(2)[[int(row >= right) for row in range(rows)]]
    estimate = measure(Task.MULTI_CLASS, names(2), np.zeros(rows, np.int64), answers).estimates["accuracy"]
    assert (estimate.value, estimate.low, estimate.high) == (right / rows, None, None)
    assert estimate.note.startswith(note)


def test_a_label_of_one_kind() -> None:
    targets = np.array([[0, 1, 1], [0, 1, 0], [0, 1, 1], [0, 1, 0]], np.float32)
    scores = measure(Task.MULTI_LABEL, names(3), targets, np.arange(12.0).reshape(4, 3))
    assert scores.by_output["average_precision"]["o0"] == Estimate(None, note="there is no positive example")
    one_kind = Estimate(None, note="there are only positive or only negative examples")
    assert scores.by_output["auroc"]["o0"] == scores.by_output["auroc"]["o1"] == one_kind
    assert scores.by_output["average_precision"]["o1"].value == 1
    assert scores.estimates["mean_auroc"].note.startswith(
        "over 1 of 3 outputs: of the others there are only positive or only"
    )


def test_labels_without_any_positive() -> None:
    scores = measure(Task.MULTI_LABEL, names(2), np.zeros((5, 2), np.float32), rng().normal(size=(5, 2)))
    assert scores.estimates["mean_average_precision"] == Estimate(None, note="there is no positive example")


@pytest.mark.parametrize(
    ("value", "undefined", "defined"), [(0, "sensitivity", "specificity"), (1, "specificity", "sensitivity")]
)
def test_binary_of_one_kind(value: int, undefined: str, defined: str) -> None:
    scores = measure(Task.BINARY, ["sick"], np.full((12, 1), value, np.float32), np.full(12, value - 0.5))
    assert scores.estimates[undefined].value is None
    assert scores.estimates[undefined].note == f"there is no {'negative' if value else 'positive'} example"
    assert scores.estimates[defined] == Estimate(1.0, note="no interval: all rows say the same")
    assert scores.estimates["auroc"] == Estimate(None, note="there are only positive or only negative examples")


@pytest.mark.parametrize("constant", [0.1, 1e8 / 3, 0.0])
def test_regression_without_variation(constant: float) -> None:
    same, other = np.full((7, 1), constant, np.float32), np.arange(7.0)[:, None]
    scores = measure(Task.REGRESSION, ["mm"], same, other)
    assert scores.by_output["r2"]["mm"] == Estimate(None, note="targets are all the same")
    assert scores.estimates["mean_pearson_r"] == Estimate(None, note="targets or answers are all the same")
    scores = measure(Task.REGRESSION, ["mm"], other.astype(np.float32), same)
    assert scores.by_output["pearson_r"]["mm"] == Estimate(None, note="targets or answers are all the same")
    assert scores.by_output["r2"]["mm"].value is not None


def test_an_interval_needs_most_draws() -> None:
    """Of twelve rows with one positive a third of the draws has none."""
    targets = np.array([[1], *[[0]] * 11], np.float32)
    estimate = measure(Task.BINARY, ["sick"], targets, np.arange(12.0)).estimates["auroc"]
    assert estimate.value == 0
    assert (estimate.low, estimate.high) == (None, None)
    assert estimate.note.startswith("no interval: in 3")
    assert estimate.note.endswith(" of 1000 draws there are only positive or only negative examples")


def test_one_cluster_has_no_interval() -> None:
    scores = measure(
        Task.REGRESSION,
        ["mm"],
        np.arange(4, dtype=np.float32)[:, None],
        np.arange(4.0) ** 2,
        clusters=np.zeros(4, np.int64),
    )
    assert scores.clusters == 1
    assert scores.by_output["mae"]["mm"] == Estimate(2.0, note="no interval: there is one cluster alone")


def test_no_draws_no_intervals() -> None:
    scores = measure(Task.BINARY, ["sick"], np.array([[0], [1]], np.float32), np.array([-1.0, 1.0]), resamples=0)
    assert scores.estimates["accuracy"] == Estimate(1.0)


# --- Intervals


def test_intervals_are_those_of_a_bootstrap_by_groups() -> None:
    """The same draws, group by group and row by row, in the plainest way."""
    targets = (rng().random((60, 1)) < 0.4).astype(np.float32)
    logits = rng(1).normal(size=60) + targets[:, 0]
    clusters = rng(2).integers(100, 117, size=60)
    scores = measure(Task.BINARY, ["sick"], targets, logits, clusters=clusters, seed=8, resamples=200)
    groups = np.unique(clusters)
    drawn = np.random.default_rng(8).integers(len(groups), size=(200, len(groups)))
    expected: dict[str, list[float]] = {"accuracy": [], "auroc": [], "average_precision": [], "brier": []}
    for draw in drawn:
        rows = np.concatenate([np.flatnonzero(clusters == groups[index]) for index in draw])
        truth, said = targets[rows, 0].astype(int), logits[rows]
        expected["accuracy"].append(sklearn_metrics.accuracy_score(truth, said > 0))
        expected["auroc"].append(sklearn_metrics.roc_auc_score(truth, said))
        expected["average_precision"].append(sklearn_metrics.average_precision_score(truth, said))
        expected["brier"].append(sklearn_metrics.brier_score_loss(truth, 1 / (1 + np.exp(-said))))
    assert scores.clusters == len(groups)
    for name, draws in expected.items():
        estimate = scores.estimates[name]
        bias = np.mean(draws) - estimate.value
        low, high = np.clip(np.percentile(draws, [2.5, 97.5]) - 2 * bias, 0, 1)
        expected_ends = min(low, estimate.value), max(high, estimate.value)
        assert (estimate.low, estimate.high) == pytest.approx(expected_ends, abs=1e-12)


def test_an_interval_reaches_to_its_value() -> None:
    """Of classes with few examples some draws have none, whose mean over the others is higher."""
    targets = np.repeat([0, 1, 2], [5, 5, 4])
    scores = measure(Task.MULTI_CLASS, names(3), targets, np.tile([0.0, 1.0, 0.0], (14, 1)))
    found = scores.estimates["balanced_accuracy"]
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.value <= found.high


def test_an_interval_of_accuracy_is_as_wide_as_theory_says() -> None:
    """1.96 sqrt(p (1 - p) / n) on both sides."""
    targets = np.repeat([0, 1], 500)
    said = targets.copy()
    said[rng(3).permutation(1000)[:200]] ^= 1
    estimate = measure(Task.MULTI_CLASS, names(2), targets, np.eye(2)[said], resamples=4000).estimates["accuracy"]
    half = 1.96 * math.sqrt(0.8 * 0.2 / 1000)
    assert (estimate.low, estimate.high) == pytest.approx((0.8 - half, 0.8 + half), abs=0.1 * half)


def test_intervals_of_rare_labels_hold_the_truth() -> None:
    """Of 40 samples 95 % should; plain percentiles of the draws hold it in about half, as they lie too high."""

    def sample(seed: int, rows: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        targets = (rng(seed).random((rows, 10)) < 0.07).astype(np.float32)
        return targets, rng(seed + 1000).normal(size=(rows, 10)) + targets

    truth = (
        measure(Task.MULTI_LABEL, names(10), *sample(0, 100_000), resamples=0).estimates["mean_average_precision"].value
    )
    assert truth is not None
    held = 0
    for seed in range(1, 41):
        found = measure(Task.MULTI_LABEL, names(10), *sample(seed, 300), seed=seed, resamples=200)
        estimate = found.estimates["mean_average_precision"]
        assert estimate.low is not None
        assert estimate.high is not None
        held += estimate.low <= truth <= estimate.high
    assert held >= 33


def test_intervals_stay_in_the_range_of_their_quantity() -> None:
    targets = np.array([[1], [0], [1], [0], [0], [0], [1], [0]], np.float32)
    scores = measure(Task.BINARY, ["sick"], targets, np.array([2, 1, 3, -1, -2, -1.5, 0.5, -3]))
    for estimate in scores.estimates.values():
        assert estimate.low is None or estimate.low >= 0
    bounded = [estimate.high for name, estimate in scores.estimates.items() if name != "log_loss"]
    assert all(high is None or high <= 1 for high in bounded)


def test_copies_of_rows_add_no_certainty() -> None:
    """Ten copies of each row, as clusters, have the interval of the rows; counted as rows they seem three times as sure."""
    truth, answers = rng().normal(size=(40, 1)).astype(np.float32), rng(1).normal(size=40)
    once = measure(Task.REGRESSION, ["mm"], truth, answers).by_output["mae"]["mm"]
    tenfold = (np.repeat(truth, 10, axis=0), np.repeat(answers, 10))
    grouped = measure(Task.REGRESSION, ["mm"], *tenfold, clusters=np.repeat(np.arange(40), 10)).by_output["mae"]["mm"]
    naive = measure(Task.REGRESSION, ["mm"], *tenfold).by_output["mae"]["mm"]
    assert (grouped.value, grouped.low, grouped.high) == pytest.approx((once.value, once.low, once.high), rel=1e-12)
    assert width(naive) == pytest.approx(width(once) / math.sqrt(10), rel=0.15)


def width(estimate: Estimate) -> float:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.high - estimate.low


def test_many_rows_are_weighed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = rng().integers(3, size=50)
    logits = rng(1).normal(size=(50, 3))
    whole = measure(Task.MULTI_CLASS, names(3), targets, logits, resamples=37)
    monkeypatch.setattr("cdam_training.metrics._CELLS", 50 * 5)
    assert measure(Task.MULTI_CLASS, names(3), targets, logits, resamples=37) == whole


def test_seeds_differ_and_repeat() -> None:
    targets, logits = rng().integers(3, size=50), rng(1).normal(size=(50, 3))
    first, again, other = (measure(Task.MULTI_CLASS, names(3), targets, logits, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert values(first) == values(other)


# --- Refused


@pytest.mark.parametrize(
    ("task", "targets", "answers", "message"),
    [
        (Task.MULTI_CLASS, np.zeros(4, np.int64), np.zeros((4, 3)), r"answers must be \(rows, 2\), not \(4, 3\)"),
        (
            Task.MULTI_CLASS,
            np.zeros((4, 1), np.int64),
            np.zeros((4, 2)),
            r"targets must be \(4,\) for multi_class, not \(4, 1\)",
        ),
        (Task.MULTI_LABEL, np.zeros(4), np.zeros((4, 2)), r"targets must be \(4, 2\) for multi_label, not \(4,\)"),
        (Task.MULTI_LABEL, np.zeros((0, 2)), np.zeros((0, 2)), r"there are no rows to measure on"),
        (Task.REGRESSION, np.zeros((2, 2)), np.array([[0, 1], [2, np.nan]]), r"the answer 'o1' of row 1 is nan"),
    ],
)
def test_what_does_not_fit(task: Task, targets: NDArray[Any], answers: NDArray[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(task, names(2), targets, answers)


def test_clusters_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"clusters must be \(4,\), not \(3,\)"):
        measure(Task.MULTI_CLASS, names(2), np.zeros(4, np.int64), np.zeros((4, 2)), clusters=np.zeros(3, np.int64))
