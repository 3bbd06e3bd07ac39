"""Pictures of explanations, with nothing but Pillow: shared scales, contact sheets.

`RelevanceMap.overlay` draws one map; `sheet` puts an image and all of its maps side by side, with captions and the
colours' scale.
"""

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cdam import _overlay
from cdam._explanation import Explanation, RelevanceMap
from cdam._images import ImageLike, MaskLike, encode_image, encode_mask, open_image, open_mask
from cdam._overlay import Interpolation
from cdam._targets import Concept

__all__ = ["limit", "sheet", "upright", "upright_mask"]

_INK, _MUTED, _PAPER = (24, 26, 30), (112, 117, 125), (255, 255, 255)
_FRAME = (214, 217, 222)

_Ink: TypeAlias = tuple[int, int, int]
_Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


def limit(maps: Iterable[RelevanceMap], percentile: float = 100.0) -> float:
    """The |score| that gets full colour on all of these maps, so that they can be compared.

    Args:
        maps: The maps that share the scale; an `Explanation` is an iterable of its maps.
        percentile: Of |score| over all maps; 100: the maximum. Less, 99 say, keeps one patch from paling all others.
    """
    scores = [np.abs(relevance.scores).ravel() for relevance in maps]
    return float(np.percentile(np.concatenate(scores), percentile)) if scores else 0.0


def sheet(
    explanation: Explanation,
    image: ImageLike | None = None,
    *,
    cell: int = 256,
    columns: int = 5,
    shared_scale: bool = True,
    percentile: float = 100.0,
    interpolation: Interpolation = "bicubic",
    title: str = "",
    box: float | None = None,
) -> Image.Image:
    """The image and its maps side by side: a row for each method, a column for each target.

    Args:
        explanation: What to show.
        image: The original image; None: the image that was sent.
        cell: Longer side of each picture, in pixels.
        columns: Maps in a row; further ones begin another row.
        shared_scale: One scale for all maps of a row's method, so that targets can be compared; otherwise each has
            its own.
        percentile: Of |score|, where colours are full.
        interpolation: How maps are enlarged: "bicubic", "bilinear", or "nearest" for blocks.
        title: Written above everything.
        box: Draw each map's `RelevanceMap.box` at this fraction of its largest score; None: draw none.

    Returns:
        An RGB image.
    """
    original = _original(explanation, image)
    layout = _Layout(cell, original.size)
    rows = _rows(explanation.maps, columns)
    scales = {id(m): limit(_sharing(m, explanation) if shared_scale else [m], percentile) for m in explanation}
    top = layout.title_height if title else layout.margin
    width = layout.left(1 + max(map(len, rows), default=0)) + (layout.bar_width if rows else 0)
    canvas = Image.new("RGB", (width, top + layout.row_height * max(len(rows), 1)), _PAPER)
    pen = _Pen(canvas, layout)
    if title:
        pen.text((layout.margin, layout.margin), title, layout.large)
    pen.cell(0, top, original.resize(layout.picture, Image.Resampling.BICUBIC), "input", explanation.model)
    for row in rows:
        one_scale = len({scales[id(m)] for m in row}) == 1
        for column, relevance in enumerate(row, 1):
            scale = scales[id(relevance)]
            heading, note = _captions(relevance)
            if not one_scale:
                note += f"   ±{scale:.3g}"
            picture = _picture(relevance, original, layout.picture, scale, interpolation)
            if box is not None:
                relevance._outline(picture, box)  # noqa: SLF001 - a friend
            pen.cell(column, top, picture, heading, note)
        pen.bar(layout.left(len(row) + 1), top, scales[id(row[0])] if one_scale else None)
        top += layout.row_height
    return canvas


def upright(image: ImageLike) -> Image.Image:
    """An image as the server sees it, and as overlays are drawn on it: RGB, upright, opaque.

    Raises:
        OSError: if a path can't be read.
        ImageError: if it is no image.
        TypeError: if it is none of the types of `ImageLike`.
    """
    return open_image(encode_image(image))


def upright_mask(mask: MaskLike) -> Image.Image:
    """A mask as the server sees it: mode L, 255 inside, 0 elsewhere, upright; raises as `upright`."""
    return open_mask(encode_mask(mask))


class _Layout:
    """Sizes and fonts, all in proportion to a cell."""

    def __init__(self, cell: int, size: tuple[int, int]) -> None:
        factor = cell / max(size)
        self.picture = max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)
        unit = max(cell / 256, 0.6)
        self.margin, self.gap = round(16 * unit), round(14 * unit)
        self.large, self.normal, self.small = (ImageFont.load_default(round(s * unit)) for s in (20, 17, 13))
        self.heading_height, self.note_height = round(26 * unit), round(24 * unit)
        self.title_height = self.margin + round(38 * unit)
        self.row_height = self.heading_height + self.picture[1] + self.note_height + self.gap
        self.bar_width = round(78 * unit)
        self.stroke = round(14 * unit)

    def left(self, column: int) -> int:
        """Left edge of a column, the image being column 0."""
        return self.margin + column * (self.picture[0] + self.gap)


class _Pen:
    """Draws the parts of a sheet."""

    def __init__(self, canvas: Image.Image, layout: _Layout) -> None:
        self.canvas, self.layout, self.draw = canvas, layout, ImageDraw.Draw(canvas)

    def text(self, place: tuple[int, int], text: str, font: _Font, ink: _Ink = _INK, anchor: str = "la") -> None:
        self.draw.text(place, text, ink, font, anchor)

    def cell(self, column: int, top: int, picture: Image.Image, heading: str, note: str) -> None:
        """One picture with a line above and a line below."""
        layout, left = self.layout, self.layout.left(column)
        above, below = top + layout.heading_height, top + layout.heading_height + picture.height
        baseline = above - layout.heading_height // 3
        self.text((left, baseline), self._fitting(heading, layout.normal), layout.normal, anchor="ls")
        self.canvas.paste(picture, (left, above))
        self.draw.rectangle((left - 1, above - 1, left + picture.width, below), outline=_FRAME)
        self.text((left, below + layout.gap // 2), self._fitting(note, layout.small), layout.small, _MUTED)

    def bar(self, left: int, top: int, scale: float | None) -> None:
        """The colours from full evidence down to full counter-evidence, and their scores, if they have one scale."""
        layout = self.layout
        top, height = top + layout.heading_height, layout.picture[1]
        values = np.linspace(1, -1, height, dtype=np.float32)[:, None].repeat(layout.stroke, axis=1)
        rgba = Image.fromarray(np.rint(_overlay.colours(values)).astype(np.uint8))
        self.canvas.paste(rgba, (left, top), rgba)
        self.draw.rectangle((left - 1, top - 1, left + layout.stroke, top + height), outline=_FRAME)
        high, low = (f"+{scale:.2g}", f"-{scale:.2g}") if scale is not None else ("for", "against")
        beside = left + layout.stroke + layout.gap // 2
        self.text((beside, top), high, layout.small, anchor="lt")
        self.text((beside, top + height // 2), "0", layout.small, anchor="lm")
        self.text((beside, top + height), low, layout.small, anchor="lb")

    def _fitting(self, text: str, font: _Font) -> str:
        """The text, cut to a picture's width."""
        width = self.layout.picture[0]
        if font.getlength(text) <= width:
            return text
        while text and font.getlength(text + "...") > width:
            text = text[:-1]
        return text.rstrip() + "..."


def _picture(
    relevance: RelevanceMap, original: Image.Image, size: tuple[int, int], scale: float, interpolation: Interpolation
) -> Image.Image:
    canvas = original.resize(size, Image.Resampling.BICUBIC)
    height, width = relevance.geometry.image_size
    region = relevance.geometry.region.scaled(size[0] / width, size[1] / height)
    return _overlay.overlay(relevance.scores, region, canvas, scale, interpolation=interpolation)


def _captions(relevance: RelevanceMap) -> tuple[str, str]:
    """A line above a map: what; a line below it: by which method, and the model's answer."""
    method = relevance.method.kind.replace("_", " ")
    target = relevance.target
    if target is None:
        return method, "no target"
    if target.probability is None:
        return target.label, f"{method}   value {target.value:.3g}"
    return f"{target.label}   {target.probability:.1%}", f"{method}   logit {target.value:.3g}"


def _original(explanation: Explanation, image: ImageLike | None) -> Image.Image:
    if image is not None:
        return upright(image)
    for relevance in explanation:
        return relevance._canvas(None)[0]  # noqa: SLF001 - a friend
    return Image.new("RGB", explanation.image_size[::-1], _PAPER)


def _rows(maps: Iterable[RelevanceMap], columns: int) -> list[list[RelevanceMap]]:
    """Maps by method, at most so many in a row."""
    rows: list[list[RelevanceMap]] = []
    for relevance in maps:
        if not rows or rows[-1][0].method != relevance.method or len(rows[-1]) == max(columns, 1):
            rows.append([])
        rows[-1].append(relevance)
    return rows


def _sharing(relevance: RelevanceMap, explanation: Explanation) -> list[RelevanceMap]:
    """The maps in the same units: by the same method, of targets of the same sort."""
    return [m for m in explanation if m.method == relevance.method and _units(m) == _units(relevance)]


def _units(relevance: RelevanceMap) -> str:
    target = relevance.target.target if relevance.target else None
    return target.similarity if isinstance(target, Concept) else "output"
