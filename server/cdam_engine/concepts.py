"""Concepts from examples: the mean of their latents, and how well they belong together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class Formed:
    """A concept's vector, and how its examples lie to it.

    Attributes:
        vector: l_c, float32 of shape (D,): for `Concept`.
        spread: Mean of `cosines`, in -1..1; low values hint at examples that have little in common.
        cosines: Cosine of each example to the mean of all examples, float64 of shape (n,).
        negative_cosines: Cosine of each negative to the mean of all negatives, float64 of shape (m,).
    """

    vector: NDArray[np.float32]
    spread: float
    cosines: NDArray[np.float64]
    negative_cosines: NDArray[np.float64]


def mean_concept(latents: NDArray[np.floating], negatives: NDArray[np.floating] | None = None) -> Formed:
    """The concept that example images show.

    `l_c = 1/n sum_k l(x_k)`, less `1/m sum_k l(y_k)` of images y that don't show it, if there are any. Sums are in
    float64, and do not depend on the order of the images.

    Source: Brocki, Binda and Chung (TMLR 2024), section 3: the latent l_c that Eq. 3 and 4 compare with. The negatives
    are this project's: they take out what all images have in common.

    Args:
        latents: Of the examples, shape (n, D), such as `Explanation.latent` of each.
        negatives: Of the negatives, shape (m, D); None is as good as m = 0.

    Raises:
        ValueError: There is no example; shapes do not fit; a latent or the vector is not finite in float32; or nothing
            is left of the vector but rounding: a millionth of the longest latent, or less.
    """
    positive = _checked(latents, "examples")
    negative = positive[:0] if negatives is None else _checked(negatives, "negatives")
    if not len(positive):
        raise ValueError("a concept needs an example")
    if positive.shape[1] != negative.shape[1]:
        raise ValueError(f"examples with latents of length {positive.shape[1]}, negatives of {negative.shape[1]}")
    centre, opposite = _mean(positive), _mean(negative)
    difference = centre - opposite
    with np.errstate(over="ignore"):
        vector = difference.astype(np.float32)
    if not np.isfinite(vector).all():
        raise ValueError("examples and negatives are too far apart for float32")
    longest = max(_length(positive).max(), _length(negative).max(initial=0))
    if _length(difference) <= _ROUNDING * longest or not vector.any():
        what = "mean latents of examples and negatives are equal" if len(negative) else "mean latent is zero"
        raise ValueError(f"the {what}: this makes no direction")
    cosines = _cosines(positive, centre)
    return Formed(vector, float(_mean(cosines)), cosines, _cosines(negative, opposite))


def _checked(latents: NDArray[np.floating], name: str) -> NDArray[np.float64]:
    """The latents in float64, in which no sum or square of float32 values overflows or vanishes."""
    array = np.asarray(latents, np.float64)
    if array.ndim != 2 or not array.shape[1]:
        raise ValueError(f"latents of {name} of shape {array.shape}, not (n, D)")
    if not (np.abs(array) <= np.finfo(np.float32).max).all():
        raise ValueError(f"latents of {name} that are not finite")
    return array


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the first axis; of nothing, zero. Sorted first, for a sum that rounds the same in whatever order they came."""
    mean: NDArray[np.float64] = np.sort(values, axis=0).sum(axis=0) / max(len(values), 1)
    return mean


def _length(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    length: NDArray[np.float64] = np.sqrt(np.square(vectors).sum(axis=-1))
    return length


def _cosines(vectors: NDArray[np.float64], centre: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of vectors (n, D) with one of shape (D,); 0 where either is zero."""
    lengths = _length(vectors) * _length(centre)
    products = (vectors * centre).sum(axis=-1)  # row by row the same, however many there are; a matrix product is not
    cosines: NDArray[np.float64] = np.divide(products, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    return cosines.clip(-1, 1)
