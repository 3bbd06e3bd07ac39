"""Variations of a sample's image: which ones a metric asks the model about, and how they are composed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from cdam_engine.evaluation.evaluated import Anchor, Evaluated
from cdam_engine.evaluation.geometry import Enlargement

Unit = Literal["pixel", "patch"]
"""What is ranked and perturbed."""

Picture = Literal["clean", "mean_colour", "counterfactual"] | float
"""A sample's image; the model's mean colour; the sample without its object; or, a number, the image blurred that much."""


class MapOf(NamedTuple):
    """Names a map of a sample.

    Attributes:
        evaluated: Whose it is.
        wrong: Whether it is the wrong target's.
    """

    evaluated: Evaluated
    wrong: bool = False


def map_of(evaluated: Evaluated, *, wrong: bool) -> MapOf:
    """The map for the right or the wrong target, the same one if it is of no target."""
    return MapOf(evaluated, wrong and (isinstance(evaluated, Anchor) or evaluated.needs_target))


class Order(NamedTuple):
    """Names an order of a sample's pixels or patches.

    Attributes:
        map: The map that ranks them; equal scores keep raster order.
        unit: What is ranked.
        enlargement: Of the map; None where patches are ranked.
        least_first: Whether the least important ones come first.
    """

    map: MapOf
    unit: Unit
    enlargement: Enlargement | None
    least_first: bool


@dataclass(frozen=True)
class Whole:
    """One picture.

    Attributes:
        picture: Which.
    """

    picture: Picture


@dataclass(frozen=True)
class Ranked:
    """Two pictures, put together by rank.

    Attributes:
        order: The order.
        first: What its first pixels or patches show.
        rest: What the others show.
        count: How many are the first.
    """

    order: Order
    first: Picture
    rest: Picture
    count: int


@dataclass(frozen=True)
class Boxed:
    """The clean image with a blurred square.

    Attributes:
        blur_sigma: Of the blur.
        side: In pixels.
        top: First row.
        left: First column.
    """

    blur_sigma: float
    side: int
    top: int
    left: int


Perturbation = Whole | Ranked | Boxed

CLEAN = Whole("clean")


def ranked(order: Order, counts: Sequence[int], total: int, *, first: Picture, rest: Picture) -> list[Perturbation]:
    """The images in which the first of an order show one picture and the rest another.

    Args:
        order: The order.
        counts: How many are the first, in each image.
        total: How many there are.
        first: What the first ones show.
        rest: What the rest shows.
    """
    return [
        Whole(rest) if not count else Whole(first) if count == total else Ranked(order, first, rest, count)
        for count in counts
    ]
