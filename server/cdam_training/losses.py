"""What training makes small, by task: the mean over images of the sum over outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from torch import Tensor
from torch.nn import functional as F

from cdam_server.settings.specs import Task

Loss = Callable[[Tensor, Tensor], Tensor]


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets)


def _binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits), reduction="sum") / len(logits)


def _squared_error(values: Tensor, targets: Tensor) -> Tensor:
    return (values - targets.to(values)).square().sum() / len(values)


LOSSES: Final[Mapping[Task, Loss]] = {
    Task.MULTI_CLASS: _cross_entropy,
    Task.MULTI_LABEL: _binary_cross_entropy,
    Task.BINARY: _binary_cross_entropy,
    Task.REGRESSION: _squared_error,
}
"""From outputs (B, C) and targets to a scalar: targets are class indices (B), or numbers (B, C)."""


class Scaling:
    """Targets of a regression with mean 0 and deviation 1 on the training images, and the way back.

    Args:
        targets: Of the training images, shape (n, C).
    """

    def __init__(self, targets: Tensor) -> None:
        wide = targets.double()
        self._mean, self._deviation = wide.mean(0), wide.std(0, correction=0)

    def apply(self, targets: Tensor) -> Tensor:
        """Scaled targets, float32."""
        return ((targets.double() - self._mean) / self._deviation).float()

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The head of the targets as they are, from the head of scaled ones: weight (C, D), bias (C)."""
        return (
            (weight.double() * self._deviation[:, None]).to(weight),
            (bias.double() * self._deviation + self._mean).to(bias),
        )


def scaling_of(task: Task, targets: Tensor) -> Scaling | None:
    """How a task's targets are scaled; None if they are not."""
    return Scaling(targets) if task is Task.REGRESSION else None
