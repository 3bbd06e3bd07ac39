"""Images: from what a caller has to what travels, and to what an overlay is drawn on."""

import io
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cdam._errors import ImageError, ResourceExhausted
from cdam.v1 import common_pb2 as pb
from cdam_images import UndefinedRangeError, upright_mask, upright_rgb
from cdam_images.files import find_picture

ImageLike: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[np.uint8]
"""An image: a path, an encoded file's bytes, a PIL image, or uint8 pixels of shape (H, W), (H, W, 1) or (H, W, 3)."""

MaskLike: TypeAlias = ImageLike | NDArray[np.bool_]
"""A mask: an image that is neither black nor transparent inside, or a bool array of shape (H, W)."""

_Convert: TypeAlias = Callable[..., Image.Image]  # of an image, and its orientation if that is known

WRAPPING_BYTES = 16  # that a message weighs more inside another than alone, at most
_GREY = frozenset({"1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N"})


def encode_image(image: ImageLike) -> pb.Image:
    """The message for an image.

    JPEG, PNG and WebP files travel as they are; what Pillow can read beside them, PIL images and arrays travel as raw
    pixels, upright, opaque, and of 8 bits, as `cdam_images` defines it and the server takes files.

    Raises:
        OSError: if a path can't be read.
        ImageError: if it is no image, or its values have no defined range.
        TypeError: if it is none of the types of `ImageLike`.
    """
    return _encode(image, _upright)


def encode_mask(mask: MaskLike) -> pb.Image:
    """The message for a mask; raises as `encode_image`."""
    if isinstance(mask, np.ndarray) and mask.dtype == np.bool_:
        mask = mask.astype(np.uint8) * np.uint8(255)
    return _encode(mask, upright_mask)


def open_image(message: pb.Image) -> Image.Image:
    """The original image as the server sees it: RGB, upright, opaque.

    Raises:
        ImageError: if it is no image.
    """
    return _open(message, upright_rgb)


def open_mask(message: pb.Image) -> Image.Image:
    """A mask as the server sees it: mode L, 255 inside, 0 elsewhere, upright; raises as `open_image`."""
    return _open(message, upright_mask)


def fit(request: Any, images: Iterable[pb.Image], largest: int) -> None:
    """Bring a request to a size: images that travel as pixels become PNG files, the largest first, as far as needed.

    Args:
        request: The message.
        images: Those in it; they are changed.
        largest: The client's max_message_bytes.

    Raises:
        ResourceExhausted: if it is too large all the same.
    """
    for image in sorted(images, key=lambda image: len(image.raw.data), reverse=True):
        if request.ByteSize() + WRAPPING_BYTES <= largest:
            return
        if image.WhichOneof("source") == "raw":
            file = io.BytesIO()
            Image.fromarray(_raw_pixels(image.raw)).save(file, "PNG", compress_level=1)
            image.encoded = file.getvalue()
    if (size := request.ByteSize() + WRAPPING_BYTES) > largest:
        raise ResourceExhausted(
            f"a request of {size} bytes, over the client's max_message_bytes of {largest}: send a JPEG file, make the "
            "picture smaller, or allow more here and on the server",
            code=grpc.StatusCode.RESOURCE_EXHAUSTED,
        )


def _encode(image: Any, convert: _Convert) -> pb.Image:
    match image:
        case str() | os.PathLike():
            return _encode_file(Path(image).read_bytes(), os.fspath(image), convert)
        case bytes() | bytearray() | memoryview():
            return _encode_file(bytes(image), "these bytes", convert)
        case Image.Image():
            return _encode_pixels(np.asarray(_converted(image, "the image", convert)))
        case np.ndarray():
            return _encode_pixels(image)
    raise TypeError(f"an image is a path, bytes, a PIL image or an array, not {type(image).__name__}")


def _encode_file(data: bytes, name: str, convert: _Convert) -> pb.Image:
    if data[:3] == b"\xff\xd8\xff" or data[:8] == b"\x89PNG\r\n\x1a\n" or (data[:4], data[8:12]) == (b"RIFF", b"WEBP"):
        return pb.Image(encoded=data)
    return _encode_pixels(np.asarray(_opened(data, name, convert)))


def _open(message: pb.Image, convert: _Convert) -> Image.Image:
    if message.WhichOneof("source") == "encoded":
        return _opened(message.encoded, "the image", convert)
    return convert(Image.fromarray(_raw_pixels(message.raw)))


def _opened(data: bytes, name: str, convert: _Convert) -> Image.Image:
    try:
        picture = find_picture(data)
        image = Image.open(io.BytesIO(picture.data))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}: not an image that can be read; send a JPEG, PNG or WebP file") from error
    return _converted(image, name, partial(convert, orientation=picture.orientation))


def _converted(image: Image.Image, name: str, convert: _Convert) -> Image.Image:
    try:
        return convert(image)
    except UndefinedRangeError as error:
        raise ImageError(f"{name}: {error}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}: not an image that can be read: {error}") from error


def _upright(image: Image.Image, orientation: int | None = None) -> Image.Image:
    """Mode L if the image is grey, else RGB."""
    rgb = upright_rgb(image, orientation)
    return rgb.getchannel("R") if image.mode in _GREY else rgb


def _encode_pixels(pixels: NDArray[Any]) -> pb.Image:
    if pixels.dtype != np.uint8:
        raise ImageError(f"an array of pixels is uint8, 0..255, not {pixels.dtype}; scale it to 8 bits first")
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in {1, 3} or not pixels.size:
        raise ImageError(
            f"an array of pixels has shape (H, W), (H, W, 1) or (H, W, 3), not {pixels.shape}{_remedy(pixels)}"
        )
    height, width, channels = pixels.shape
    return pb.Image(raw=pb.RawImage(height=height, width=width, channels=channels, data=pixels.tobytes()))


def _remedy(pixels: NDArray[Any]) -> str:
    if pixels.ndim == 3 and pixels.shape[2] in {2, 4} and pixels.size:
        return "; with transparency, give Image.fromarray(pixels): it is laid over white"
    if pixels.ndim == 3 and pixels.shape[0] in {1, 3} and pixels.size:
        return "; channels come last: pixels.transpose(1, 2, 0)"
    return ""


def _raw_pixels(raw: pb.RawImage) -> NDArray[np.uint8]:
    shape = (raw.height, raw.width, 3) if raw.channels == 3 else (raw.height, raw.width)
    return np.frombuffer(raw.data, np.uint8).reshape(shape)
