"""Concepts the slow, plain way: one image at a time through the untouched model, sums one by one.

Nothing here is shared with the engine.

Source: Brocki, Binda and Chung, "Class-Discriminative Attention Maps for Vision Transformers", TMLR 2024, section 3:
Eq. 3 (concept CDAM) and Eq. 4 (the similarity of a latent to the mean latent of examples).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reference.whole_model import Function, run


class ReferenceConcept(NamedTuple):
    """What examples have in common.

    Attributes:
        vector: `(D,)`.
        spread: mean cosine of the examples to their mean.
        cosines: of each.
        negative_cosines: of each negative to the negatives' mean.
    """

    vector: Tensor
    spread: float
    cosines: list[float]
    negative_cosines: list[float]


def latents(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Of each image `(3, H, W)`, alone, what `forward_head` hands to the classifier, `(D,)`."""
    return [run(model, image).latent.detach() for image in images]


def concept(model: nn.Module, examples: Tensor, negatives: Tensor | None = None) -> ReferenceConcept:
    """The mean latent of the examples, less that of the negatives."""
    positive = latents(model, examples)
    negative = latents(model, negatives) if negatives is not None else []
    centre = mean(positive)
    opposite = mean(negative) if negative else torch.zeros_like(centre)
    cosines = [cosine(latent, centre) for latent in positive]
    return ReferenceConcept(
        vector=centre - opposite,
        spread=math.fsum(cosines) / len(cosines),
        cosines=cosines,
        negative_cosines=[cosine(latent, opposite) for latent in negative],
    )


def mean(vectors: list[Tensor]) -> Tensor:
    """Coordinate by coordinate, by Python's exact sum."""
    columns = zip(*(vector.double().tolist() for vector in vectors), strict=True)
    return torch.tensor([math.fsum(column) / len(vectors) for column in columns], dtype=torch.float64)


def cosine(one: Tensor, other: Tensor) -> float:
    """Of the angle between two vectors."""
    a, b = one.double().tolist(), other.double().tolist()
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def similarity(vector: Tensor, kind: str) -> Function:
    """g(l, l_c) of Eq. 4, "dot", and the two other choices."""

    def g(latent: Tensor, _outputs: Tensor) -> Tensor:
        dot = sum(a * b for a, b in zip(latent, vector, strict=True))
        if kind == "dot":
            return dot
        if kind == "cosine":
            return dot / (sum(a * a for a in latent) * sum(b * b for b in vector)) ** 0.5
        assert kind == "l2"
        return -sum((a - b) ** 2 for a, b in zip(latent, vector, strict=True)) / 2

    return g
