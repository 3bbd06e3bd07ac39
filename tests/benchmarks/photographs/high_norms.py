"""Patches whose tokens have norms of another kind than most: DINOv2 without registers has some where nothing is.

After Darcet et al., "Vision Transformers Need Registers" (2024), who tell them by a threshold between two modes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.signal import argrelextrema
from scipy.stats import gaussian_kde

_POINTS: Final = 512
_LEAST_HEIGHT: Final = 0.002
"""Of a second mode, as a share of the first one's: lower ones are single tokens."""


@dataclass(frozen=True)
class Threshold:
    """Where high norms begin.

    Attributes:
        value: The threshold.
        modes: How many modes the norms' distribution has, 1 or 2 (the highest one and those beyond).
    """

    value: float
    modes: int


def threshold(norms: NDArray[np.floating]) -> Threshold:
    """Where the norms of tokens stop being of the common kind.

    The density of log norms is estimated by a Gaussian kernel (Scott's rule). If beyond its highest mode it has another
    one, of a 500th of that height at least, the threshold is the lowest point before it. If not, norms are of one kind,
    and it is the usual rule for outliers: median + 3 robust standard deviations (1.4826 median absolute deviations) of
    the log norms.

    Args:
        norms: Of the patches of many photographs, (n,).
    """
    log = np.log(np.asarray(norms, np.float64).ravel())
    margin = 0.1 * np.ptp(log)  # so that a mode at an end is one
    at = np.linspace(log.min() - margin, log.max() + margin, _POINTS)
    density = gaussian_kde(log)(at)
    top = int(density.argmax())
    peaks = [k for k in argrelextrema(density, np.greater)[0] if k > top and density[k] > _LEAST_HEIGHT * density[top]]
    if peaks:
        second = max(peaks, key=lambda k: density[k])
        return Threshold(float(np.exp(at[top + density[top:second].argmin()])), 2)
    spread = 1.4826 * np.median(np.abs(log - np.median(log)))
    return Threshold(float(np.exp(np.median(log) + 3 * spread)), 1)


def share(scores: NDArray[np.floating], high: NDArray[np.bool_]) -> float:
    """Of a map's positive scores, the share that lies on some patches; 0 of none. Both of one shape."""
    positive = np.maximum(scores, 0).astype(np.float64)
    total = float(positive.sum())
    return float(positive[high].sum()) / total if total else 0.0


def zeroed(scores: NDArray[np.float32], high: NDArray[np.bool_]) -> NDArray[np.float32]:
    """A map with 0 on some patches."""
    return np.where(high, np.float32(0), scores)


def outside(masks: Sequence[NDArray[np.floating]], high: NDArray[np.bool_]) -> float:
    """Of some patches, the share that no object covers by half; nan of none.

    Args:
        masks: Of each object, the share of each patch that it covers.
        high: The patches.
    """
    covered = np.sum(masks, axis=0) >= 0.5
    return float((~covered[high]).mean()) if high.any() else float("nan")
