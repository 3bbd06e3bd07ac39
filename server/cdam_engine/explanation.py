"""What is found out about an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cdam_engine.families import Grid
from cdam_engine.targets import Output, Scalar


@dataclass(frozen=True, eq=False)
class ExplainedTarget:
    """A target and the model's answer to it.

    Attributes:
        target: The target; never top-k.
        value: Its value: a logit, a regression value, a similarity, or a difference of two.
        request_index: Index in the targets asked for that it came from.
    """

    target: Scalar
    value: float
    request_index: int

    @property
    def index(self) -> int | None:
        """Of an output: its index."""
        return self.target.index if isinstance(self.target, Output) else None


@dataclass(frozen=True, eq=False)
class RelevanceMap:
    """Signed relevance of each patch for one target by one method; arrays are float32, or float64 if the model is.

    Attributes:
        scores: Shape (h, w), raw.
        method_index: Index in the methods asked for.
        target_index: Index in `Explanation.targets`; None for a method that needs no target.
        prefix_share: sum |score| over prefix tokens / sum |score| over all tokens, 0 if all are zero; None for methods
            that have no score for prefix tokens.
        value_part: The part of the scores that goes through the attention's values, shape (h, w), if asked for.
        key_part: The rest.
        standard_error: Of each score over the draws, shape (h, w), for the mean over several.
        completeness_residual: sum of all scores - change of the target along the path, for path integrals.
        steps: Points on the path, for path integrals.
    """

    scores: NDArray[np.floating]
    method_index: int = 0
    target_index: int | None = 0
    prefix_share: float | None = None
    value_part: NDArray[np.floating] | None = None
    key_part: NDArray[np.floating] | None = None
    standard_error: NDArray[np.floating] | None = None
    completeness_residual: float | None = None
    steps: int | None = None


@dataclass(frozen=True, eq=False)
class Explanation:
    """Everything about one image.

    Attributes:
        grid: The patch grid.
        latent: Shape (D,).
        logits: Shape (C,).
        targets: The targets, top-k ones replaced by their outputs.
        maps: Method by method, one for each target; one alone for a method that needs no target.
        trunk_seconds: Time that the batch spent in the trunk.
        tail_seconds: Time that the batch spent in all that came after it.
        method_seconds: The same by the method's kind.
        token_cache_hit: Whether the trunk's output was known from before.
    """

    grid: Grid
    latent: NDArray[np.floating]
    logits: NDArray[np.floating]
    targets: tuple[ExplainedTarget, ...]
    maps: tuple[RelevanceMap, ...]
    trunk_seconds: float
    tail_seconds: float
    method_seconds: Mapping[str, float]
    token_cache_hit: bool
