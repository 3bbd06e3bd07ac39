"""What an image is in this project: upright, opaque, 8-bit RGB. One step, shared by the client, the engine and the service.

It needs Pillow and numpy alone, so that all three can import it, and a picture gives the same map wherever it is opened:

- The EXIF orientation is applied, or where EXIF has none, XMP's; a broken or impossible one counts as none.
- Transparency is laid over white.
- Grey of 16 bits is taken by its high byte, as Pillow takes colours of 16 bits.
- Other modes are converted by Pillow. Colour profiles and gamma are ignored, as in the pipelines that models were trained
  and evaluated with: an embedded profile changes how a picture looks, not what a model was shown.
- Integers of 32 bits and floats have no defined range: which value is white only their owner knows. They are refused.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageChops

__all__ = ["UndefinedRangeError", "upright_indices", "upright_mask", "upright_rgb"]

_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Bits of a sample, by how Pillow reads the rows of a PNG that it brings to 8 bits.
_DEPTHS: Final = {"L;2": 2, "L;4": 4, "RGB;16B": 16}


class UndefinedRangeError(ValueError):
    """The samples of an image have no defined range."""


def upright_rgb(image: Image.Image, orientation: int | None = None) -> Image.Image:
    """The image as models are shown it: upright, opaque, RGB of 8 bits.

    Of an image of several frames this is the current one, the first if the file was just opened.

    Args:
        image: An image of any mode; it is not changed.
        orientation: 1 to 8, as EXIF counts; None: as the image's metadata say.

    Returns:
        Mode RGB: a new image, or the image itself if there is nothing to do.

    Raises:
        UndefinedRangeError: The mode has no defined range: I, F.
        ValueError: The image has no pixels, or its file was closed before they were read.
        OSError: A file that was opened lazily is damaged.
    """
    colours, alpha = _layers(image)
    if alpha is not None:
        white = Image.new("RGB", colours.size, "white")
        white.paste(colours, mask=alpha)
        colours = white
    turn = _turn(image, orientation)
    return colours if turn is None else colours.transpose(turn)


def upright_mask(image: Image.Image, orientation: int | None = None) -> Image.Image:
    """Where an image is neither black nor transparent: 255 there, 0 elsewhere, upright.

    Args:
        image: An image of any mode; it is not changed. Samples of 16 and 32 bits need no range here: 0 is black.
        orientation: As for `upright_rgb`.

    Returns:
        Mode L; a new image.

    Raises:
        ValueError: As for `upright_rgb`.
        OSError: As for `upright_rgb`.
    """
    if image.mode[0] in "IF":
        _load(image)
        samples = np.asarray(image)
        mask = Image.fromarray(np.where((samples != 0) & ~_is_transparent(samples, image), np.uint8(255), np.uint8(0)))
    else:
        colours, alpha = _layers(image)
        mask = _not_black(colours if colours.mode == "RGB" else colours.convert("RGB"))
        if alpha is not None:
            opacity = alpha if alpha.mode == "L" else alpha.getchannel("A")
            mask = ImageChops.multiply(mask, _not_black(opacity))
    turn = _turn(image, orientation)
    return mask if turn is None else mask.transpose(turn)


def upright_indices(image: Image.Image, orientation: int | None = None) -> NDArray[np.uint8]:
    """The numbers in an index image, such as a mask of several classes: of a palette's image the palette's places.

    Args:
        image: An image of one channel of at most 8 bits; it is not changed.
        orientation: As for `upright_rgb`.

    Returns:
        Shape (height, width).

    Raises:
        ValueError: It has colours, or more bits; or as for `upright_rgb`.
        OSError: As for `upright_rgb`.
    """
    if image.mode not in {"1", "L", "P"}:
        raise ValueError(f"an index image has one channel of at most 8 bits (mode L, P or 1), not mode {image.mode}")
    depth = _depth(image)
    _load(image)
    turn = _turn(image, orientation)
    numbers = np.asarray(image if turn is None else image.transpose(turn)).astype(np.uint8)
    return numbers // np.uint8(255 // ((1 << depth) - 1)) if image.mode == "L" and depth in {2, 4} else numbers


class _Layers(NamedTuple):
    """The pixels as they lie in memory, not turned.

    Attributes:
        colours: RGB or RGBA.
        alpha: How opaque they are, L or RGBA, as a mask for pasting; None: wholly.
    """

    colours: Image.Image
    alpha: Image.Image | None = None


def _layers(image: Image.Image) -> _Layers:
    depth = _depth(image)  # known before the pixels are loaded
    _load(image)
    match image.mode:
        case "I" | "F":
            raise UndefinedRangeError(
                f"an image of mode {image.mode!r} has no defined range of values; scale it to 8 bits, 0..255, first"
            )
        case "1" | "L" | "RGB" | "I;16" | "I;16L" | "I;16B" | "I;16N":
            return _of_samples(image, depth)
        case "LA" | "PA" | "RGBA" | "RGBa" | "La":
            return _of_rgba(image)
        case "P" if image.has_transparency_data:
            return _of_rgba(image)
    return _Layers(image.convert("RGB"))


def _load(image: Image.Image) -> None:
    """Read the pixels now: a PNG's transparency and orientation may follow them."""
    if not (image.width and image.height):
        raise ValueError(f"the image has no pixels: {image.height} x {image.width} (height x width)")
    try:
        image.load()
    except (AssertionError, AttributeError) as error:  # as Pillow puts it
        raise ValueError("the image's file was closed before its pixels were read") from error


def _of_rgba(image: Image.Image) -> _Layers:
    if image.mode == "La":  # Pillow knows no other way out of it
        image = image.convert("LA")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    return _Layers(rgba, rgba)


def _of_samples(image: Image.Image, depth: int | None) -> _Layers:
    """Of grey and RGB, where one value may stand for transparent pixels."""
    alpha = None
    if image.info.get("transparency") is not None:
        transparent = _is_transparent(np.asarray(image), image, depth)
        if transparent.any():
            alpha = Image.fromarray(np.where(transparent, np.uint8(0), np.uint8(255)))
    if image.mode == "RGB":
        return _Layers(image, alpha)
    if image.mode.startswith("I"):
        grey = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    else:
        grey = image if image.mode == "L" else image.convert("L")
    return _Layers(Image.merge("RGB", [grey] * 3), alpha)


def _is_transparent(samples: NDArray[Any], image: Image.Image, depth: int | None = None) -> NDArray[np.bool_]:
    """Which pixels have the value that stands for transparent ones, if there is one."""
    value = image.info.get("transparency")
    value = tuple(value) if isinstance(value, tuple | list) else (value,)
    planes = samples[..., None] if samples.ndim == 2 else samples
    if len(value) != planes.shape[-1] or not all(isinstance(sample, int) for sample in value):
        return np.zeros(planes.shape[:2], np.bool_)
    if image.mode in {"L", "RGB"}:
        value = _of_8_bits(value, planes, depth)
    elif image.mode == "1":
        value = (bool(value[0]),)
    return reduce(np.logical_and, (planes[..., place] == sample for place, sample in enumerate(value)))


def _of_8_bits(value: tuple[int, ...], planes: NDArray[Any], depth: int | None) -> tuple[int, ...]:
    """A transparent value in the pixels' 8 bits: Pillow brings those of a PNG to 8 bits, and leaves the value as it was."""
    if depth is None and max(value) > 255:
        depth = 16
    elif depth is None and len(value) == 1 and 0 < value[0] < 16 and not (planes == value[0]).any():
        # A value that no pixel has would be of no use: these are samples of 2 or 4 bits.
        depths = [(2, 85), (4, 17)]
        fits = (bits for bits, step in depths if value[0] < 1 << bits and not (planes % step).any())
        depth = next(fits, None)
    match depth:
        case 16:
            return tuple(sample >> 8 for sample in value)
        case 2 | 4:
            return tuple(sample * 255 // ((1 << depth) - 1) for sample in value)
    return value


def _depth(image: Image.Image) -> int | None:
    """Bits of a sample in the file, if Pillow still knows."""
    for tile in getattr(image, "tile", None) or ():
        rawmode = tile[3] if isinstance(tile[3], str) else None
        return _DEPTHS.get(rawmode or "", 8)
    return None


def _turn(image: Image.Image, orientation: int | None) -> Image.Transpose | None:
    """What brings the image upright; None if nothing is needed, or its metadata are broken."""
    if orientation is not None:
        return _UPRIGHT.get(orientation)
    try:
        said = image.getexif().get(ExifTags.Base.Orientation)
        return _UPRIGHT.get(said) if isinstance(said, int) else None
    except Exception:  # noqa: BLE001 - the pixels are good, and Pillow promises no set of exceptions here
        return None


def _not_black(image: Image.Image) -> Image.Image:
    highest: Image.Image = reduce(ImageChops.lighter, image.split())
    return highest.point([0] + 255 * [255])
