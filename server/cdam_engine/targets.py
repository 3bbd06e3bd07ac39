"""Targets: what is explained, as a scalar function of (latent, logits)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdam_engine.chunks import is_wide
from cdam_engine.transfer import send

Similarity = Literal["dot", "cosine", "l2"]


@dataclass(frozen=True)
class Output:
    """An output of the model: the logit of a class, or a regression value.

    Attributes:
        index: Index of the output, from 0.
    """

    index: int

    def __post_init__(self) -> None:
        """Raises TypeError where the index is no whole number; numpy's and torch's integers are as good as Python's."""
        object.__setattr__(self, "index", whole("an output's index", self.index))

    def __call__(self, latent: Tensor, logits: Tensor) -> Tensor:  # noqa: ARG002
        """The values of latents (..., D) and logits (..., C), shape (...)."""
        return logits[..., self.index]


@dataclass(frozen=True, eq=False)
class Concept:
    """Similarity g(l, l_c) of the latent to a concept vector; larger means more similar.

    Source: Brocki, Binda and Chung (TMLR 2024), Eq. 3 and 4.

    Attributes:
        vector: l_c, shape (D,): a tensor, or what can be made one, such as `Explanation.latent`.
        similarity: "dot": l . l_c, the paper's choice; "cosine"; "l2": -1/2 |l - l_c|^2.
    """

    vector: Tensor = field(repr=False)
    similarity: Similarity = "dot"

    def __post_init__(self) -> None:
        if self.similarity not in get_args(Similarity):
            raise ValueError(f"a similarity is one of {', '.join(get_args(Similarity))}, not {self.similarity!r}")
        object.__setattr__(self, "vector", torch.as_tensor(self.vector))

    @classmethod
    def of(cls, values: NDArray[np.float32], similarity: Similarity = "dot", **more: Any) -> Self:
        """The same of an array of shape (D,)."""
        return cls(torch.from_numpy(values), similarity, **more)

    def __call__(self, latent: Tensor, logits: Tensor) -> Tensor:  # noqa: ARG002
        """The values of latents (..., D) and logits (..., C), shape (...)."""
        match self.similarity:
            case "dot":
                return latent @ self.like(latent)
            case "cosine":
                cosine: Tensor = latent @ self.direction(latent) / torch.linalg.vector_norm(latent, dim=-1)
                return cosine
            case "l2":
                return -0.5 * (latent - self.like(latent)).square().sum(dim=-1)

    def like(self, other: Tensor) -> Tensor:
        """The vector in the dtype and on the device of another tensor."""
        return send(self.vector, other.device, other.dtype)

    def direction(self, like: Tensor) -> Tensor:
        """The vector at length 1, in the dtype and on the device of another tensor.

        In float32 the squares of tiny values would vanish, and those of huge ones overflow.
        """
        vector = self.vector.detach().double()
        vector = vector / vector.abs().amax()
        return send(vector / torch.linalg.vector_norm(vector), like.device, like.dtype)


@dataclass(frozen=True)
class Contrast:
    """The difference of two targets: what speaks for one and against the other.

    Attributes:
        positive: The minuend.
        negative: The subtrahend.
    """

    positive: Output | Concept
    negative: Output | Concept

    def __post_init__(self) -> None:
        for side in (self.positive, self.negative):
            if not isinstance(side, Output | Concept):
                raise TypeError(f"a contrast is of outputs and concepts, not of {type(side).__name__}")

    def __call__(self, latent: Tensor, logits: Tensor) -> Tensor:
        """The values of latents (..., D) and logits (..., C), shape (...)."""
        return self.positive(latent, logits) - self.negative(latent, logits)


@dataclass(frozen=True)
class TopK:
    """The k outputs with the highest logits, highest first; stands for k targets.

    Attributes:
        k: How many, from 1 to the number of outputs.
    """

    k: int

    def __post_init__(self) -> None:
        """Raises TypeError where k is no whole number."""
        object.__setattr__(self, "k", whole("k", self.k))


Scalar = Output | Concept | Contrast
Target = Scalar | TopK


def count(targets: Sequence[Target]) -> int:
    """How many scalar functions the targets stand for."""
    return sum(target.k if isinstance(target, TopK) else 1 for target in targets)


def whole(what: str, number: object) -> int:
    """A number as Python's own integer.

    Raises:
        TypeError: It is none; True and False are none, either.
    """
    if isinstance(number, bool) or not hasattr(number, "__index__"):
        raise TypeError(f"{what} is a whole number, not {number!r}")
    return operator.index(number)


def check(targets: Sequence[Target], outputs: int, latent_size: int) -> None:
    """Refuse targets that a model does not have.

    Args:
        targets: Targets of one image.
        outputs: The model's number of outputs C.
        latent_size: The length D of its latent.

    Raises:
        IndexError: There is no such output, or there are fewer than k.
        ValueError: A concept's vector is not of shape (D,) or not finite, or a cosine is asked for to a zero vector.
        TypeError: It is no target.
    """
    for target in targets:
        match target:
            case Output(index):
                if not 0 <= index < outputs:
                    raise IndexError(f"output {index} of a model with {outputs} outputs")
            case TopK(k):
                if not 1 <= k <= outputs:
                    raise IndexError(f"top {k} of {outputs} outputs")
            case Contrast(positive, negative):
                check((positive, negative), outputs, latent_size)
            case Concept():
                _check_concept(target, latent_size)
            case _:
                raise TypeError(f"a target is an Output, TopK, Concept or Contrast, not {type(target).__name__}")


def _check_concept(concept: Concept, latent_size: int) -> None:
    vector = concept.vector
    if vector.shape != (latent_size,):
        raise ValueError(f"a concept vector of shape {tuple(vector.shape)}, not ({latent_size},)")
    if not bool(vector.isfinite().all()):
        raise ValueError("a concept vector that is not finite")
    if concept.similarity == "cosine" and not bool(vector.any()):
        raise ValueError("a concept vector that is zero makes no angle with anything")


def values(targets: Sequence[Sequence[Scalar]], latent: Tensor, logits: Tensor) -> Tensor:
    """The values f of every image and target, shape (B, K).

    Args:
        targets: K targets of each of B images.
        latent: Shape (B, D).
        logits: Shape (B, C).
    """
    indices = [[target.index for target in wanted if isinstance(target, Output)] for wanted in targets]
    if any(targets) and list(map(len, indices)) == list(map(len, targets)):  # outputs alone
        return logits.gather(1, send(indices, logits.device))
    if is_wide(latent.device) and any(targets):
        return torch.stack([_column(column, latent, logits) for column in zip(*targets, strict=True)], dim=1)
    rows = [
        torch.stack([target(latent[b], logits[b]) for target in wanted]) for b, wanted in enumerate(targets) if wanted
    ]
    return torch.stack(rows) if rows else latent.new_zeros((len(targets), 0))


def _column(column: Sequence[Scalar], latent: Tensor, logits: Tensor) -> Tensor:
    """The value of one target of each image, shape (B,); at once if it is the same one."""
    first = column[0]
    if all(target is first for target in column):
        return first(latent, logits)
    return torch.stack([target(latent[b], logits[b]) for b, target in enumerate(column)])
