"""From bytes that a stranger sent to an upright RGB image.

Everything here assumes hostile input: limits are checked on the header, before pixels are decoded, and whatever PIL
raises on bad bytes becomes an `InvalidArgumentError`. Nothing here touches global state, so it may run in threads.

What an image is, upright, opaque and of 8 bits, `cdam_images` says, and `cdam_images.files` where it is in a file.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

# The plugins are imported here so that no request, and no two at once, is the one that registers them.
from PIL import Image, ImageChops, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError, WebPImagePlugin

from cdam.v1 import common_pb2
from cdam_images import UndefinedRangeError, upright_mask, upright_rgb
from cdam_images.files import OverLimitError, Picture, find_picture
from cdam_server.errors import InvalidArgumentError

FORMATS: Final = (
    JpegImagePlugin.JpegImageFile.format,
    PngImagePlugin.PngImageFile.format,
    WebPImagePlugin.WebPImageFile.format,
)

# Each scan of a JPEG passes over the whole picture, so that a few hundred kB could take minutes. Encoders
# write about ten; so many are allowed at `max_pixels`, and more in smaller pictures.
_MAX_JPEG_SCANS: Final = 25

_Convert = Callable[[Image.Image, int | None], Image.Image]
"""From an image and its orientation to what is wanted of it."""


@dataclass(frozen=True)
class ImageLimits:
    """What one image may weigh.

    Attributes:
        max_bytes: Largest size of an encoded image; raw ones are bounded by their pixels.
        max_pixels: Largest height * width. Decoding takes about 4 bytes a pixel, 8 where the image is turned or
            transparent, up to 12 where it is both, and a JPEG of several scans up to 6 more. PIL's own guard stays on behind
            it, at 179 million pixels.
    """

    max_bytes: int = 32 * 1024 * 1024
    max_pixels: int = 50_000_000


def decode_image(image: common_pb2.Image, limits: ImageLimits, field: str = "image") -> Image.Image:
    """The image as RGB, as `upright_rgb` makes it; of an animation the first frame.

    Args:
        image: The message.
        limits: What it may weigh.
        field: Path of the message from the request's root, for errors.

    Raises:
        InvalidArgumentError: There is no image, it is damaged, of another format, or over a limit.
    """
    return _decode(image, limits, field, upright_rgb)


def decode_mask(image: common_pb2.Image, limits: ImageLimits, field: str) -> Image.Image:
    """Where an image is neither black nor transparent: 255 there, 0 elsewhere, in grey; the rest as `decode_image`."""
    return _decode(image, limits, field, upright_mask)


def _decode(image: common_pb2.Image, limits: ImageLimits, field: str, convert: _Convert) -> Image.Image:
    match image.WhichOneof("source"):
        case "encoded":
            return _decode_encoded(image.encoded, limits, f"{field}.encoded", convert)
        case "raw":
            return _decode_raw(image.raw, limits, f"{field}.raw", convert)
        case _:
            raise InvalidArgumentError(f"{field}.source", "set either `encoded` or `raw`")


def _decode_encoded(data: bytes, limits: ImageLimits, field: str, convert: _Convert) -> Image.Image:
    if not data:
        raise InvalidArgumentError(field, "is empty; send a JPEG, PNG or WebP file")
    _check_bytes(data, limits, field)
    with _blaming_the_bytes(field, limits):
        picture = find_picture(data)
        if picture.size:  # PIL allocates the canvas of a WebP on opening the file
            _check_size(picture.size, limits, field)
        with Image.open(io.BytesIO(picture.data), formats=FORMATS) as file:
            if file.format not in FORMATS:
                raise InvalidArgumentError(field, "is not a JPEG, PNG or WebP file")
            _check_size(file.size, limits, field)
            _check_scans(file, picture, limits, field)
            if picture.probe is not None:
                _check_whole(file, picture.probe, field)
            return convert(file, picture.orientation)


def _decode_raw(raw: common_pb2.RawImage, limits: ImageLimits, field: str, convert: _Convert) -> Image.Image:
    if raw.height < 1:
        raise InvalidArgumentError(f"{field}.height", "must be at least 1")
    if raw.width < 1:
        raise InvalidArgumentError(f"{field}.width", "must be at least 1")
    if raw.channels not in {1, 3}:
        raise InvalidArgumentError(f"{field}.channels", f"must be 1 (grey) or 3 (RGB), not {raw.channels}")
    _check_size((raw.width, raw.height), limits, field)
    expected = raw.height * raw.width * raw.channels
    if len(raw.data) != expected:
        raise InvalidArgumentError(
            f"{field}.data",
            f"has {len(raw.data)} bytes; height * width * channels = "
            f"{raw.height} * {raw.width} * {raw.channels} = {expected} are needed",
        )
    with _blaming_the_bytes(field, limits):
        pixels = Image.frombytes("L" if raw.channels == 1 else "RGB", (raw.width, raw.height), raw.data)
        return convert(pixels, 1)


@contextmanager
def _blaming_the_bytes(field: str, limits: ImageLimits) -> Iterator[None]:
    """Turns whatever PIL raises into an `InvalidArgumentError`.

    PIL promises no set of exceptions for bad bytes. Most are OSError, SyntaxError and ValueError; its plugins and the
    libraries below them also let through EOFError, struct.error, MemoryError and others, and warnings where those are
    errors. Hence everything is caught, and only image decoding stands inside.
    """
    try:
        yield
    except InvalidArgumentError:
        raise
    except (OverLimitError, UndefinedRangeError) as error:  # their words are ours
        raise InvalidArgumentError(field, str(error)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidArgumentError(field, f"is over the limit of {limits.max_pixels} pixels") from error
    except UnidentifiedImageError as error:
        raise InvalidArgumentError(field, "is not a JPEG, PNG or WebP file, or its header is damaged") from error
    except (OSError, SyntaxError, ValueError) as error:  # these come with words for people
        raise InvalidArgumentError(field, f"is damaged or truncated ({error})") from error
    except MemoryError as error:
        raise InvalidArgumentError(field, "does not fit into memory") from error
    except Exception as error:
        raise InvalidArgumentError(field, "is damaged") from error


def _check_bytes(data: bytes, limits: ImageLimits, field: str) -> None:
    if len(data) > limits.max_bytes:
        raise InvalidArgumentError(
            field, f"has {len(data)} bytes, over the limit of {limits.max_bytes}; make it smaller, or send a JPEG"
        )


def _check_size(size: tuple[int, int], limits: ImageLimits, field: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise InvalidArgumentError(field, f"is empty: {height} x {width} pixels (height x width)")
    if width * height > limits.max_pixels:
        raise InvalidArgumentError(
            field,
            f"has {height} x {width} (height x width) = {height * width} pixels, over the limit of {limits.max_pixels}",
        )


def _check_whole(file: Image.Image, probe: bytes, field: str) -> None:
    """Refuse a JPEG that has no end because a part of it is missing."""
    with Image.open(io.BytesIO(probe), formats=FORMATS) as other:
        if ImageChops.difference(file, other).getbbox() is not None:
            raise InvalidArgumentError(field, "is damaged or truncated (its pixels end too early)")


def _check_scans(file: Image.Image, picture: Picture, limits: ImageLimits, field: str) -> None:
    if picture.scans * file.width * file.height > _MAX_JPEG_SCANS * limits.max_pixels:
        raise InvalidArgumentError(field, f"is a JPEG of {picture.scans} scans, too many for its size")
