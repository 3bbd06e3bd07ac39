"""Scenes of handwritten digits with exact object masks.

A scene is a 64x64 RGB image: a textured backdrop, a few coloured strokes that are no digits, and one to three
handwritten digits that do not overlap. It is a pure function of `(split, seed, number of digits)`.

Scenes are kept in layers (backdrop, then one alpha layer per digit), so a digit can be taken out and every pixel
outside its mask stays as it was: `Scene.without(i)` is an exact counterfactual.

The digits are the 1797 that scikit-learn bundles (8x8 grey levels, from the UCI "optical recognition of handwritten
digits" test set). They are split by source image *before* any scene is composed; writers are not separated, because
the set does not name them.
"""

import colorsys
import math
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Split = Literal["train", "val", "test"]

SIZE = 64
"""Side of a scene, in pixels."""

MAX_DIGITS = 3
"""Most digits that one scene holds."""

_SPLITS: tuple[Split, ...] = ("train", "val", "test")
_HELD_OUT = {"test": 400, "val": 200}
_SPLIT_SEED = 20240721
_CANVAS = 44
_GAP = 2
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True, eq=False)
class Digits:
    """Source digits of one split.

    Attributes:
        images: (n, 8, 8) float32 ink in [0, 1].
        labels: (n,) digit 0 to 9.
        sources: (n,) index of each image in scikit-learn's `load_digits`.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    sources: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class SceneObject:
    """One digit of a scene, as a layer.

    Attributes:
        label: digit 0 to 9.
        source: index of the handwritten original in scikit-learn's `load_digits`.
        colour: RGB in [0, 255].
        alpha: (64, 64) float32 opacity in [0, 1].
    """

    label: int
    source: int
    colour: tuple[float, float, float]
    alpha: NDArray[np.float32]

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """(64, 64) bool: every pixel that this object has any part in, its antialiased rim included."""
        return self.alpha > 0

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Tight box of the mask in pixels: top, left, bottom, right, the last two exclusive."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


@dataclass(frozen=True, eq=False)
class Scene:
    """A backdrop and the digits on it.

    Attributes:
        split: whose source digits are used.
        seed: the seed that the scene was drawn from.
        backdrop: (64, 64, 3) uint8, texture and strokes without digits.
        objects: the digits, in the order in which they are painted.
    """

    split: Split
    seed: int
    backdrop: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]

    @property
    def labels(self) -> tuple[int, ...]:
        """The digits in the scene, distinct."""
        return tuple(o.label for o in self.objects)

    @cached_property
    def image(self) -> NDArray[np.uint8]:
        """(64, 64, 3) uint8: the backdrop with the digits painted on it."""
        image = self.backdrop.copy()
        for o in self.objects:
            under = image[o.mask].astype(np.float32)
            over = under + o.alpha[o.mask][:, None] * (np.asarray(o.colour, np.float32) - under)
            image[o.mask] = np.rint(over).astype(np.uint8)
        return image

    def without(self, index: int) -> "Scene":
        """The same scene with one object taken out; all pixels outside that object's mask are unchanged.

        Raises:
            IndexError: if there is no object `index`.
        """
        if not 0 <= index < len(self.objects):
            raise IndexError(f"scene has {len(self.objects)} objects, no object {index}")
        return replace(self, objects=self.objects[:index] + self.objects[index + 1 :])


@cache
def load_digits(split: Split) -> Digits:
    """Handwritten digits of one split; the three splits are disjoint, stratified by label, and fixed.

    Raises:
        ImportError: if scikit-learn is not installed (extra `demo`).
        ValueError: if `split` is not "train", "val" or "test".
    """
    if split not in _SPLITS:
        raise ValueError(f"split must be one of {_SPLITS}, not {split!r}")
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError as error:
        raise ImportError("demo scenes need scikit-learn: install cdam-serve with its extra `demo`") from error
    data: Any = bundled()
    labels = np.asarray(data.target, np.int64)
    # Sorting by the relative rank within the own class interleaves the classes: every slice of it is stratified.
    rng = np.random.default_rng(_SPLIT_SEED)
    rank = np.empty(len(labels))
    for label in range(10):
        members = np.flatnonzero(labels == label)
        rank[rng.permutation(members)] = (np.arange(len(members)) + 0.5) / len(members)
    order = np.lexsort((labels, rank))
    test, val = _HELD_OUT["test"], _HELD_OUT["test"] + _HELD_OUT["val"]
    sources = np.sort({"test": order[:test], "val": order[test:val], "train": order[val:]}[split])
    return Digits(np.asarray(data.images, np.float32)[sources] / np.float32(16), labels[sources], sources)


def draw_scene(split: Split, seed: int, digits: int) -> Scene:
    """Draws a scene; the same arguments give the same scene, pixel by pixel.

    Args:
        split: which source digits may be used: "train", "val" or "test".
        seed: any non-negative integer.
        digits: how many digits, 1 to 3; their labels are distinct.

    Raises:
        ImportError: if scikit-learn is not installed (extra `demo`).
        ValueError: if `split` or `digits` is out of range.
    """
    if not 1 <= digits <= MAX_DIGITS:
        raise ValueError(f"a scene has 1 to {MAX_DIGITS} digits, not {digits}")
    source = load_digits(split)
    rng = np.random.default_rng((_SPLITS.index(split), seed, digits))
    backdrop = _strokes(_texture(rng), rng)
    chosen = _distinct(source.labels, digits, rng)
    largest = 27.0 if digits < MAX_DIGITS else 24.0
    shapes = [_glyph(source.images[i], rng.uniform(18.0, largest), rng) for i in chosen]
    objects = []
    for i, shape, (top, left) in zip(chosen, shapes, _layout([s.shape for s in shapes], rng), strict=True):
        alpha = np.zeros((SIZE, SIZE), np.float32)
        alpha[top : top + shape.shape[0], left : left + shape.shape[1]] = shape
        colour = _ink(backdrop[alpha > 0], rng)
        objects.append(SceneObject(int(source.labels[i]), int(source.sources[i]), colour, alpha))
    return Scene(split, seed, backdrop, tuple(objects))


def _distinct(labels: NDArray[np.int64], count: int, rng: np.random.Generator) -> list[int]:
    """Indices of `count` digits with distinct labels."""
    wanted = rng.permutation(10)[:count]
    return [int(rng.choice(np.flatnonzero(labels == label))) for label in wanted]


def _glyph(ink: NDArray[np.float32], size: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """An 8x8 digit, turned, sheared and scaled so that its longer side is about `size` px; tightly cropped alpha."""
    turn, shear = rng.uniform(-0.26, 0.26), rng.uniform(-0.2, 0.2)
    stretch = math.exp(rng.uniform(-0.15, 0.15))
    cos, sin = math.cos(turn), math.sin(turn)
    forward = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, shear], [0, 1]]) @ np.diag([stretch, 1 / stretch])
    y, x = np.nonzero(ink > 0.3)
    corners = forward @ np.stack([x, y])
    low, high = corners.min(1), corners.max(1)
    scale = size / ((high - low).max() + 1.0)
    inverse = np.linalg.inv(forward * scale)
    # PIL asks for each output pixel's place in the input; +2.5: two pixels of padding, then the pixel's centre.
    middle = np.linalg.inv(forward) @ ((low + high) / 2) + 2.5
    offset = middle - inverse @ np.full(2, _CANVAS / 2)
    matrix = (*inverse[0], offset[0], *inverse[1], offset[1])
    wide = Image.fromarray(np.pad(ink, 2)).transform(
        (_CANVAS, _CANVAS), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
    )
    level = rng.uniform(0.42, 0.56)  # a higher level makes a thinner pen
    alpha = np.clip((np.asarray(wide, np.float32) - level) / 0.36 + 0.5, 0, 1)
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    glyph: NDArray[np.float32] = alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return glyph


def _layout(shapes: list[tuple[int, ...]], rng: np.random.Generator) -> list[tuple[int, int]]:
    """Top-left corners at which boxes of these shapes do not come closer than `_GAP` px to each other."""
    while True:
        corners = [(int(rng.integers(SIZE - h + 1)), int(rng.integers(SIZE - w + 1))) for h, w in shapes]
        boxes = [(top, left, top + h, left + w) for (top, left), (h, w) in zip(corners, shapes, strict=True)]
        if all(_apart(a, b) for k, a in enumerate(boxes) for b in boxes[:k]):
            return corners


def _apart(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[2] + _GAP <= b[0] or b[2] + _GAP <= a[0] or a[3] + _GAP <= b[1] or b[3] + _GAP <= a[1]


def _texture(rng: np.random.Generator) -> NDArray[np.float32]:
    """(64, 64, 3) float32 backdrop: a gradient between two related colours, soft clouds and a little grain."""
    hue = rng.random()
    dark = rng.random() < 0.5
    value = rng.uniform(0.14, 0.34) if dark else rng.uniform(0.76, 0.95)
    saturation = rng.uniform(0.25, 0.6) if dark else rng.uniform(0.08, 0.3)
    ends = [
        colorsys.hsv_to_rgb((hue + rng.uniform(-0.12, 0.12)) % 1, saturation, value + rng.uniform(-0.06, 0.06))
        for _ in range(2)
    ]
    angle = rng.uniform(0, 2 * math.pi)
    axis = np.linspace(-0.5, 0.5, SIZE, dtype=np.float32)
    ramp = (0.5 + 0.7 * (math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None])).clip(0, 1)[..., None]
    first, last = (255 * np.asarray(e, np.float32) for e in ends)
    cells = int(rng.integers(4, 12))
    clouds = np.asarray(
        Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32)).resize(
            (SIZE, SIZE), Image.Resampling.BICUBIC
        )
    )
    tint = rng.normal(1, 0.35, 3).astype(np.float32)
    grain = rng.normal(0, rng.uniform(1, 4), (SIZE, SIZE, 1)).astype(np.float32)
    texture: NDArray[np.float32] = first + ramp * (last - first) + rng.uniform(4, 13) * clouds[..., None] * tint + grain
    return texture


def _strokes(texture: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Paints two to five thin, long, half-transparent curves: colour and edges that mean nothing."""
    # Drawn at twice the size and averaged down, because ImageDraw has no antialiasing.
    canvas = Image.new("RGBA", (2 * SIZE, 2 * SIZE))
    draw = ImageDraw.Draw(canvas)
    steps = np.linspace(0, 1, 14)[:, None]
    for _ in range(int(rng.integers(2, 6))):
        start, end = rng.uniform(-16, 2 * SIZE + 16, (2, 2))
        bend = (start + end) / 2 + rng.normal(0, 36, 2)
        points = (1 - steps) ** 2 * start + 2 * steps * (1 - steps) * bend + steps**2 * end
        colour = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.4, 0.9), rng.uniform(0.4, 0.95))
        fill = (*(int(255 * c) for c in colour), int(rng.uniform(110, 210)))
        draw.line([tuple(p) for p in points.tolist()], fill=fill, width=int(rng.integers(2, 5)))
    painted = np.asarray(canvas.reduce(2), np.float32)
    opacity = painted[..., 3:] / 255
    return np.clip(texture + opacity * (painted[..., :3] - texture), 0, 255).astype(np.uint8)


def _ink(under: NDArray[np.uint8], rng: np.random.Generator) -> tuple[float, float, float]:
    """A colour that stands out from the pixels it will cover, by luma."""
    ground = float((under @ _LUMA).mean())
    while True:
        value, saturation = (rng.uniform(0.85, 1), rng.uniform(0.15, 0.75))
        if ground > 128:
            value, saturation = rng.uniform(0.15, 0.65), rng.uniform(0.5, 1)
        red, green, blue = colorsys.hsv_to_rgb(rng.random(), saturation, value)
        colour = (255 * red, 255 * green, 255 * blue)
        if abs(float(np.dot(colour, _LUMA)) - ground) > 85:
            return colour
