"""Average precision and the area under the ROC curve, of many weightings of the same rows at once.

`sklearn.metrics` has both for one weighting a call; a bootstrap asks for a thousand, for each output. The values are the
same, ties included: rows of equal scores come in together.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def average_precision(scores: Floats, positive: NDArray[np.bool_], weights: Floats) -> Floats:
    """The mean of precision over recall: sum over thresholds of (R_k - R_(k-1)) P_k, without interpolation.

    Args:
        scores: (n,), larger for what is more likely positive.
        positive: (n,).
        weights: (r, n), not negative.

    Returns:
        (r,); NaN where no positive row has a weight.

    Source: Zhu 2004, Recall, precision and average precision; `sklearn.metrics.average_precision_score`.
    """
    true, false = _counts(scores, positive, weights)
    total, taken = true[:, -1], true + false
    precision = np.divide(true, taken, out=np.zeros_like(true), where=taken > 0)
    return _quotient((np.diff(true, axis=1, prepend=0) * precision).sum(1), total)


def auroc(scores: Floats, positive: NDArray[np.bool_], weights: Floats) -> Floats:
    """The probability that a positive row has a larger score than a negative one; of equal scores a half.

    Args:
        scores: (n,).
        positive: (n,).
        weights: (r, n), not negative.

    Returns:
        (r,); NaN where positive or negative rows have no weight.

    Source: Hanley and McNeil 1982, eq. 1; `sklearn.metrics.roc_auc_score`.
    """
    true, false = _counts(scores, positive, weights)
    middle = true - np.diff(true, axis=1, prepend=0) / 2
    return _quotient((np.diff(false, axis=1, prepend=0) * middle).sum(1), true[:, -1] * false[:, -1])


def _counts(scores: Floats, positive: NDArray[np.bool_], weights: Floats) -> tuple[Floats, Floats]:
    """Weights of positive and of negative rows at and above each distinct score, the largest first; (r, distinct)."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    weights = weights[:, order]
    true = np.cumsum(weights * positive[order], axis=1)[:, ends]
    return true, np.cumsum(weights * ~positive[order], axis=1)[:, ends]


def _quotient(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)
