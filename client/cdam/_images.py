"""Images: from what a caller has to what travels, and to what an overlay is drawn on."""

import io
import os
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from cdam._errors import ImageError
from cdam.v1 import common_pb2 as pb

ImageLike: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[np.uint8]
"""An image: a path, an encoded file's bytes, a PIL image, or uint8 pixels of shape (H, W), (H, W, 1) or (H, W, 3)."""

_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"})


def encode_image(image: ImageLike) -> pb.Image:
    """The message for an image.

    JPEG, PNG and WebP files travel as they are; what Pillow can read beside them, PIL images and arrays travel as raw
    pixels, after EXIF orientation and with transparency laid over white.

    Raises:
        OSError: if a path can't be read.
        ImageError: if it is no image.
        TypeError: if it is none of the types of `ImageLike`.
    """
    match image:
        case str() | os.PathLike():
            return _encode_file(Path(image).read_bytes(), os.fspath(image))
        case bytes() | bytearray() | memoryview():
            return _encode_file(bytes(image), "these bytes")
        case Image.Image():
            return _encode_pixels(np.asarray(_plain(image)))
        case np.ndarray():
            return _encode_pixels(image)
    raise TypeError(f"an image is a path, bytes, a PIL image or an array, not {type(image).__name__}")


def open_image(message: pb.Image) -> Image.Image:
    """The original image as the API understands it: RGB, EXIF orientation applied, transparency over white."""
    if message.WhichOneof("source") == "encoded":
        return _plain(_open(message.encoded, "the image")).convert("RGB")
    raw = message.raw
    shape = (raw.height, raw.width, 3) if raw.channels == 3 else (raw.height, raw.width)
    return Image.fromarray(np.frombuffer(raw.data, np.uint8).reshape(shape)).convert("RGB")


def _encode_file(data: bytes, name: str) -> pb.Image:
    if data[:3] == b"\xff\xd8\xff" or data[:8] == b"\x89PNG\r\n\x1a\n" or (data[:4], data[8:12]) == (b"RIFF", b"WEBP"):
        return pb.Image(encoded=data)
    return _encode_pixels(np.asarray(_plain(_open(data, name))))


def _open(data: bytes, name: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}: not an image that can be read, send a JPEG, PNG or WebP file") from error
    return image


def _plain(image: Image.Image) -> Image.Image:
    """Mode L or RGB, upright and opaque."""
    if image.mode.startswith("I;16"):  # 16-bit grey by its high byte, as the server takes it
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode not in _MODES:
        raise ImageError(f"an image of mode {image.mode!r} has no 8-bit colours; scale it to 0..255 first")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(colours)
    return image if image.mode == "L" else image.convert("RGB")


def _encode_pixels(pixels: NDArray[Any]) -> pb.Image:
    if pixels.dtype != np.uint8:
        raise ImageError(f"an array of pixels is uint8, 0..255, not {pixels.dtype}")
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in {1, 3} or not pixels.size:
        raise ImageError(f"an array of pixels has shape (H, W), (H, W, 1) or (H, W, 3), not {pixels.shape}")
    height, width, channels = pixels.shape
    return pb.Image(raw=pb.RawImage(height=height, width=width, channels=channels, data=pixels.tobytes()))
