"""Which photographs are measured, and how they become samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cdam_engine import Output, upright_rgb
from cdam_engine.evaluation import Sample
from cdam_engine.preprocess import DataConfig, prepare
from real.voc import Photograph, Photographs

LEAST: Final = 0.02
"""Share of the image that a class covers at least."""
_SEED: Final = 0


@dataclass(frozen=True)
class Chosen:
    """A photograph to measure.

    Attributes:
        photograph: The photograph.
        classes: Indices of the classes that take their turn as the right one, the larger one in the image first.
    """

    photograph: Photograph
    classes: tuple[int, ...]

    @property
    def id(self) -> str:
        """The photograph's name."""
        return self.photograph.path.stem


def several(voc: Photographs) -> list[Chosen]:
    """X_multi: of `voc.val`, those that show two classes or more of 2 % of the image each; the two largest are taken.

    In an order drawn by seed, so that the first ones are a random sample of all.
    """
    found = []
    for photograph in _drawn(voc.val):
        large = [name for name in _by_share(photograph) if photograph.shares[name] >= LEAST]
        if len(large) >= 2:
            found.append(Chosen(photograph, tuple(voc.classes.index(name) for name in large[:2])))
    return found


def alone(voc: Photographs, count: int) -> list[Chosen]:
    """X_single: of `voc.val`, those that show one class and no other, on 2 % of the image at least; the first ones drawn.

    Raises:
        ValueError: There are fewer.
    """
    found = [
        Chosen(photograph, (voc.classes.index(name),))
        for photograph in _drawn(voc.val)
        for name in photograph.shares
        if len(photograph.shares) == 1 and photograph.shares[name] >= LEAST
    ]
    if len(found) < count:
        raise ValueError(f"{count} photographs of one class, but there are {len(found)}")
    return found[:count]


def trained(voc: Photographs, count: int) -> list[Chosen]:
    """Photographs of `voc.train` to choose parameters on, in an order drawn by seed; their largest class is the target.

    Raises:
        ValueError: There are fewer.
    """
    if len(voc.train) < count:
        raise ValueError(f"{count} photographs to choose on, but there are {len(voc.train)}")
    return [Chosen(one, (voc.classes.index(_by_share(one)[0]),)) for one in _drawn(voc.train)[:count]]


def examples(voc: Photographs, index: int, count: int) -> list[Photograph]:
    """Photographs of `voc.train` that show a class, as a concept's examples: `count` drawn by seed, or all there are."""
    return [one for one in _drawn(voc.train) if voc.classes[index] in one.shares][:count]


def _by_share(photograph: Photograph) -> list[str]:
    """The classes shown, the larger ones first; equal ones by name."""
    return sorted(photograph.shares, key=lambda name: (-photograph.shares[name], name))


def _drawn(photographs: Sequence[Photograph]) -> list[Photograph]:
    ordered = sorted(photographs, key=lambda one: one.path.stem)
    return [ordered[place] for place in np.random.default_rng(_SEED).permutation(len(ordered))]


def pixels(path: Path, config: DataConfig) -> NDArray[np.uint8]:
    """The whole photograph squashed to the model's input, (H, W, 3)."""
    with Image.open(path) as opened:
        return prepare(upright_rgb(opened), config, resize="squash").pixels


def mask(path: Path, index: int, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Where a class is, at an input of (height, width); what is undecided (255) is not there."""
    with Image.open(path) as opened:
        values = np.asarray(opened.resize((size[1], size[0]), Image.Resampling.NEAREST))
    return np.asarray(values == index + 1)


def sample(chosen: Chosen, config: DataConfig) -> Sample:
    """The sample whose right target is the first class, the wrong one the second, if there are two."""
    masks = [mask(chosen.photograph.mask, index, config.input_size) for index in chosen.classes]
    targets = [Output(index) for index in chosen.classes]
    return Sample(
        id=chosen.id,
        image=pixels(chosen.photograph.path, config),
        target=targets[0],
        wrong_target=targets[1] if len(targets) > 1 else None,
        mask=masks[0],
        wrong_mask=masks[1] if len(masks) > 1 else None,
    )
