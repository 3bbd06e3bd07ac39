"""Targets: what is explained, as a scalar function of (latent, logits)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Scalar(Protocol):
    """A differentiable scalar function of one image's latent (D,) and logits (C,)."""

    def __call__(self, latent: Tensor, logits: Tensor) -> Tensor:
        """The value, shape ()."""


@dataclass(frozen=True)
class Output:
    """An output of the model: the logit of a class, or a regression value.

    Attributes:
        index: Index of the output, from 0.
    """

    index: int

    def __call__(self, latent: Tensor, logits: Tensor) -> Tensor:  # noqa: ARG002
        return logits[self.index]


@dataclass(frozen=True)
class TopK:
    """The k outputs with the highest logits, highest first; stands for k targets.

    Attributes:
        k: How many, from 1 to the number of outputs.
    """

    k: int


Target = Output | TopK


def resolve(targets: Sequence[Target], logits: Tensor) -> list[Output]:
    """Replace each top-k target by the outputs that it stands for; equal logits keep the order of their indices.

    Args:
        targets: Targets of one image.
        logits: Its logits, shape (C,).

    Raises:
        IndexError: There is no such output, or there are fewer than k.
    """
    resolved: list[Output] = []
    for target in targets:
        match target:
            case Output(index):
                if not 0 <= index < len(logits):
                    raise IndexError(f"output {index} of a model with {len(logits)} outputs")
                resolved.append(target)
            case TopK(k):
                if not 1 <= k <= len(logits):
                    raise IndexError(f"top {k} of {len(logits)} outputs")
                order = logits.argsort(descending=True, stable=True)
                resolved += [Output(int(index)) for index in order[:k]]
    return resolved
