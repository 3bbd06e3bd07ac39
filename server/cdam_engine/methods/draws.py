"""Random numbers that depend on a seed alone: not on the batch, nor on how the work is cut."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from cdam_engine.chunks import chunks
from cdam_engine.methods.base import Scores
from cdam_engine.transfer import send

_MAX_KEPT: Final = 64 * 1024 * 1024  # bytes


def draws(seed: int, samples: int, at_once: int, like: Tensor) -> Iterator[Tensor]:
    """Standard normal numbers in the shape, dtype and on the device of `like`, some draws at a time: (draws, ...).

    Draw k is the k-th `torch.randn` in float32 of a generator with this seed, however many come at a time; drawn on the
    CPU, so that maps are the same on every device.
    """
    shape = tuple(like.shape)
    if 4 * samples * math.prod(shape) <= _MAX_KEPT:
        kept = _drawn(seed, samples, shape, like.device)
        for some in chunks(samples, at_once):
            yield kept[some].to(like.dtype)
        return
    generator = torch.Generator().manual_seed(seed)
    for some in chunks(samples, at_once):
        yield _draw(generator, some.stop - some.start, shape, like.device).to(like.dtype)


@lru_cache(maxsize=1)
def _drawn(seed: int, samples: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """All draws; the last ones are kept, since most requests have the same seed and drawing costs as much as using."""
    return _draw(torch.Generator().manual_seed(seed), samples, shape, device)


def _draw(generator: torch.Generator, count: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    drawn = torch.empty((count, *shape), dtype=torch.float32)
    for one in drawn:
        one.normal_(generator=generator)
    return send(drawn, device)


class Moments:
    """Mean and standard error of several images' maps that come a few draws at a time, in double precision.

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean: Tensor = torch.zeros(())
        self._squares: Tensor = torch.zeros(())

    def add(self, values: Tensor) -> None:
        """Take in some draws' values, shape (draws, B, ...)."""
        values = values.double()
        count, mean = len(values), values.mean(dim=0)
        squares = (values - mean).square().sum(dim=0)
        if self._count:
            total = self._count + count
            difference = mean - self._mean
            squares = squares + self._squares + difference.square() * (self._count * count / total)
            mean = self._mean + difference * (count / total)
        self._count, self._mean, self._squares = self._count + count, mean, squares

    @property
    def mean(self) -> Tensor:
        """The mean over draws, shape (B, ...)."""
        return self._mean

    @property
    def standard_error(self) -> Tensor | None:
        """Sample standard deviation / sqrt(draws); None of a single draw."""
        return (self._squares / (self._count - 1) / self._count).sqrt() if self._count > 1 else None


def mean_scores(moments: Sequence[Moments], like: Tensor, *, has_prefix: bool) -> Scores:
    """The scores of all images, means over draws, in the dtype of `like`."""
    errors = [error for its in moments if (error := its.standard_error) is not None]
    return Scores(
        torch.cat([its.mean for its in moments]).to(like),
        has_prefix=has_prefix,
        standard_error=torch.cat(errors).to(like) if errors else None,
    )
