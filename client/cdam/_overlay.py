"""Colour for signed maps, and the geometry of laying them over an image. Arrays in, pixels out.

Orange speaks for the target, blue against it, zero is transparent. Scores are enlarged first and coloured then, at
every pixel's own place in the patch grid, so that edges between pixels, crops and non-square grids need no rounding.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cdam_images.components import components

Interpolation: TypeAlias = Literal["bicubic", "bilinear", "nearest"]
"""How a map is enlarged: smoothly, or each patch as a block."""

Background: TypeAlias = Literal["faded", "original"]
"""What lies under a map: the image grey and light, so that colours are the map's alone, or as it is."""

# From faint to full: the hue stays, the depth grows. Told apart with any kind of colour vision.
_EVIDENCE = np.array([(255, 176, 84), (250, 126, 20), (211, 68, 0)], np.float32)
_COUNTER = np.array([(104, 176, 250), (36, 112, 220), (8, 54, 165)], np.float32)
_LEVELS = 1024  # of either sign

_INK, _CASING = (24, 26, 30), (255, 255, 255)  # of a box, to be seen on anything
_STROKES = 256  # widths of its line in the longer side of a picture

_GREYS, _OUTSIDE = (150.0, 252.0), 0.7  # range of a faded background; how far towards white where the model didn't look


@dataclass(frozen=True)
class Region:
    """A rectangle in pixel coordinates of the original image: x to the right, y down, (0, 0) the top left corner.

    Edges may fall between pixels, and outside the image where a model's preprocessing pads.
    """

    left: float
    top: float
    right: float
    bottom: float

    def scaled(self, x: float, y: float) -> "Region":
        """The same region of an image stretched by these factors."""
        return Region(self.left * x, self.top * y, self.right * x, self.bottom * y)


@cache
def _palette() -> NDArray[np.float32]:
    """RGBA, each 0..255, of the values -1, ..., 1: shape (2 * _LEVELS + 1, 4)."""
    strength = np.linspace(0, 1, _LEVELS + 1)
    signs = []
    for stops in (_COUNTER, _EVIDENCE):
        channels = [np.interp(strength, (0.0, 0.5, 1.0), stops[:, channel]) for channel in range(3)]
        # Noise stays faint, a third of the maximum is plain to see, and the upper half is nearly opaque.
        signs.append(np.stack([*channels, 255 * strength**1.5 * (2.5 - 1.5 * strength)], axis=-1))
    return np.concatenate([signs[0][:0:-1], signs[1]]).astype(np.float32)


def colours(values: NDArray[np.float32], alpha: float = 0.9) -> NDArray[np.float32]:
    """RGBA, each 0..255, of shape (..., 4), for values in -1..1; alpha, 0..1, is the opacity of -1 and 1."""
    level = np.rint(values.clip(-1, 1) * _LEVELS).astype(np.intp) + _LEVELS
    rgba: NDArray[np.float32] = _palette()[level]
    rgba[..., 3] *= alpha
    return rgba


def enlarge(
    scores: NDArray[np.float32],
    region: Region,
    size: tuple[int, int],
    interpolation: Interpolation = "bicubic",
) -> NDArray[np.float32]:
    """Scores at the centre of every pixel of an image of `size` (height, width); zero outside the region."""
    rows = _weights(size[0], scores.shape[0], region.top, region.bottom, interpolation)
    columns = _weights(size[1], scores.shape[1], region.left, region.right, interpolation)
    return np.asarray(rows @ scores.astype(np.float32) @ columns.T, np.float32)


def heatmap(
    scores: NDArray[np.float32],
    size: tuple[int, int],
    limit: float,
    alpha: float = 1.0,
    interpolation: Interpolation = "bicubic",
) -> Image.Image:
    """The map alone, RGBA, stretched to `size` (height, width)."""
    values = enlarge(scores, Region(0, 0, size[1], size[0]), size, interpolation)
    return Image.fromarray(np.rint(colours(_normalised(values, limit), alpha)).astype(np.uint8))


def overlay(
    scores: NDArray[np.float32],
    region: Region,
    image: Image.Image,
    limit: float,
    *,
    alpha: float = 0.9,
    interpolation: Interpolation = "bicubic",
    background: Background = "faded",
    zoom: int = 1,
) -> Image.Image:
    """The map over an RGB image, RGB, `zoom` times as large as the image."""
    if zoom > 1:
        image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.BICUBIC)
        region = region.scaled(zoom, zoom)
    size = image.height, image.width
    rgba = colours(_normalised(enlarge(scores, region, size, interpolation), limit), alpha)
    opacity = rgba[..., 3:] / 255
    under = _background(image, region, background)
    return Image.fromarray(np.rint(under + opacity * (rgba[..., :3] - under)).astype(np.uint8))


def largest_box(
    scores: NDArray[np.float32],
    region: Region,
    size: tuple[int, int],
    threshold: float,
    interpolation: Interpolation = "bilinear",
) -> Region | None:
    """The box around the largest connected part of an image of `size` (height, width) with a fraction of the largest score.

    None if no score is positive where the image is.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"the threshold of a box is greater than 0 and at most 1, not {threshold:g}")
    enlarged = enlarge(scores, region, size, interpolation)  # 0, which is no evidence, outside
    high = float(enlarged.max())
    if high <= 0:
        return None
    ((top, left, bottom, right),) = components((enlarged / high >= threshold)[None]).largest().box.tolist()
    return Region(left, top, right, bottom)


def outline(picture: Image.Image, box: Region) -> None:
    """Draw the edge of a box into a picture, from within."""
    width = max(1, round(max(picture.size) / _STROKES))
    pen = ImageDraw.Draw(picture)
    for inset, ink, stroke in ((0, _CASING, 3 * width), (width, _INK, width)):
        left, top = round(box.left) + inset, round(box.top) + inset
        right, bottom = max(left, round(box.right) - 1 - inset), max(top, round(box.bottom) - 1 - inset)
        pen.rectangle((left, top, right, bottom), outline=ink, width=stroke)


def _background(image: Image.Image, region: Region, background: Background) -> NDArray[np.float32]:
    rows, columns = _inside(image.height, region.top, region.bottom), _inside(image.width, region.left, region.right)
    outside = ~np.outer(rows, columns)
    pixels = np.asarray(image, np.float32).copy() if background == "original" else _faded(image)
    pixels[outside] += _OUTSIDE * (255 - pixels[outside])
    return pixels


def _faded(image: Image.Image) -> NDArray[np.float32]:
    """Grey and light, whether the image is dark or bright: all that the eye needs to find its way."""
    grey = np.asarray(image.convert("L"), np.float32)
    dark, bright = np.percentile(grey, (1, 99)).astype(np.float32)
    # A low-contrast image keeps some of its calm, and its place between black and white.
    contrast = bright - dark
    spread = max(contrast, np.float32(96))
    start = dark * (255 - spread) / max(255 - contrast, np.float32(1))
    low, high = _GREYS
    faded = low + (high - low) * ((grey - start) / spread).clip(0, 1)
    return np.asarray(faded[..., None].repeat(3, axis=2), np.float32)


def _normalised(scores: NDArray[np.float32], limit: float) -> NDArray[np.float32]:
    return scores / np.float32(limit) if limit > 0 else np.zeros_like(scores)


def _inside(pixels: int, start: float, end: float) -> NDArray[np.bool_]:
    centres = np.arange(pixels) + 0.5
    return (centres >= start) & (centres < end)


def _weights(pixels: int, patches: int, start: float, end: float, interpolation: Interpolation) -> NDArray[np.float32]:
    """One axis of the enlargement: (pixels, patches), rows sum to one, or to zero outside start..end."""
    place = (np.arange(pixels) + 0.5 - start) / (end - start) * patches - 0.5  # 0 at the first patch's centre
    if interpolation == "nearest":
        base, taps = np.floor(place + 0.5), np.ones((1, pixels))
        first = 0
    else:
        base = np.floor(place)
        t = place - base
        if interpolation == "bilinear":
            taps, first = np.stack([1 - t, t]), 0
        else:  # Catmull-Rom: passes through the scores themselves
            taps = np.stack(
                [
                    ((2 - t) * t - 1) * t / 2,
                    ((3 * t - 5) * t * t + 2) / 2,
                    ((4 - 3 * t) * t + 1) * t / 2,
                    (t - 1) * t * t / 2,
                ]
            )
            first = -1
    weights = np.zeros((pixels, patches), np.float32)
    for offset, tap in enumerate(taps, first):
        patch = (base + offset).clip(0, patches - 1).astype(np.intp)
        np.add.at(weights, (np.arange(pixels), patch), tap)
    weights[~_inside(pixels, start, end)] = 0
    return weights
