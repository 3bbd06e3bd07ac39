"""From an RGB image to a model's input, and back to the part of the image that the input shows.

Pixel for pixel the evaluation transform that timm makes of a model's data configuration (resize by the crop
fraction, cut or pad to the input size). Rewritten because the service must know which region of the image is seen,
must not build a huge intermediate for an image of extreme proportions, and moves uint8 to the device rather than
float32, where `normalise` does the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import timm.data
import torch
from PIL import Image

from cdam_engine.transfer import send

Size = tuple[int, int]
"""(height, width) in pixels."""

Resize = Literal["model", "squash"]
"""Which part of an image the model sees: its own crop, or all of it."""

_INTERPOLATIONS: Final = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}
_MODES: Final = {1: "L", 3: "RGB"}
_CROP_MODES: Final = ("center", "center_floor", "squash", "squash_top_left", "border")

# A resized image of more pixels than this is not built in full; only the part that the input shows. Rounding may then
# differ from timm's in the last bit. At an input of 224 x 224 it takes an aspect ratio of 1:256 to get here.
_MAX_RESIZED_PIXELS: Final = 16_000_000
# PIL keeps 8 bytes for every filter tap: 32 bytes for each pixel of a side that shrinks under a bicubic filter. Longer
# sides than this are first averaged down.
_MAX_FILTERED_SIDE: Final = 200_000


def input_channels(model: torch.nn.Module) -> int:
    """How many channels a timm model's input has: what its first convolution takes.

    A patch embedding's own projection may come after a convolutional stem, whose features are no channels of an image.
    """
    embedding = getattr(model, "patch_embed", model)
    for module in embedding.modules():
        if isinstance(module, torch.nn.Conv2d):
            return module.in_channels
    return int(getattr(model, "in_chans", 3))


@dataclass(frozen=True)
class DataConfig:
    """How a model wants its images, in timm's terms.

    Attributes:
        input_size: (height, width) in pixels.
        mean: Of each channel, on a scale where white is 1: three for RGB, one for grey.
        std: Likewise.
        interpolation: Name of the resampling filter: bicubic, bilinear, ...
        crop_pct: Input size over resized size, in (0, 1].
        crop_mode: ``center`` (shorter side resized, centre cut out), ``squash`` (aspect ratio given up), or
            ``border`` (longer side resized, the rest padded with the mean). Two more are not timm's: ``center_floor``
            (the cut begins at the whole pixel before the centre's, as transformers cuts, not at the nearest one) and
            ``squash_top_left`` (cut from the top left corner, where a model's patches leave out the last pixels).
    """

    input_size: Size
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str

    def __post_init__(self) -> None:
        """Raises ValueError where a value makes no sense."""
        if min(self.input_size) < 1:
            raise ValueError(f"input_size must be positive, not {self.input_size}")
        if len(self.mean) not in _MODES or len(self.std) != len(self.mean):
            raise ValueError(
                f"mean and std must have a value for each channel, 3 (RGB) or 1 (grey), not {self.mean} and {self.std}"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, not {self.std}")
        if self.interpolation not in _INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {', '.join(_INTERPOLATIONS)}, not {self.interpolation!r}")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be in (0, 1], not {self.crop_pct}")
        if self.crop_mode not in _CROP_MODES:
            raise ValueError(f"crop_mode must be one of {', '.join(_CROP_MODES)}, not {self.crop_mode!r}")

    @property
    def channels(self) -> int:
        """How many channels the model's input has: 3 (RGB) or 1 (grey)."""
        return len(self.mean)

    @classmethod
    def from_timm(cls, model: torch.nn.Module) -> DataConfig:
        """The configuration that comes with a timm model.

        The input size is the one that the model was built with (`img_size`), which timm leaves out of the
        configuration.

        Raises:
            ValueError: The model takes neither RGB nor grey images, or is configured in a way that is not served.
        """
        config: dict[str, Any] = timm.data.resolve_model_data_config(model)
        _, *size = config["input_size"]
        embedding = getattr(model, "patch_embed", None)
        channels = input_channels(model)
        if channels not in _MODES:
            raise ValueError(
                f"the model takes {channels} channels, and a picture has 3 (RGB) or 1 (grey): explain tensors instead"
            )
        built_for = getattr(embedding, "img_size", None)
        return cls(
            input_size=_pair(built_for or size),
            mean=_of_channels("mean", config["mean"], channels),
            std=_of_channels("std", config["std"], channels),
            interpolation=str(config["interpolation"]),
            crop_pct=float(config["crop_pct"]),
            crop_mode=str(config["crop_mode"]),
        )


@dataclass(frozen=True)
class Region:
    """A rectangle in pixels of the original image, x to the right and y down from its top left corner.

    Edges may fall between pixels, and outside the image where the input was padded.
    """

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Prepared:
    """An image at a model's input size.

    Attributes:
        pixels: uint8, shape (height, width, channels), not yet normalised.
        region: The part of the original image that `pixels` shows.
        image_size: (height, width) of the original image.
        input_size: (height, width) of `pixels`.
        resize: As `prepare` was told.
    """

    pixels: npt.NDArray[np.uint8]
    region: Region
    image_size: Size
    input_size: Size
    resize: Resize = "model"


@dataclass(frozen=True)
class _Axis:
    """One axis of resize, crop and pad: `original` pixels become `resized`, of which `size` are taken from `start`.

    `start` is negative where `size` is larger than `resized`: padding goes around.
    """

    original: int
    resized: int
    start: int
    size: int

    @property
    def region(self) -> tuple[float, float]:
        """First and last edge of what is taken, in original pixels."""
        scale = self.original / self.resized
        return self.start * scale, (self.start + self.size) * scale

    @property
    def inside(self) -> tuple[int, int]:
        """First and last edge of what is taken and not padding, in resized pixels."""
        return max(self.start, 0), min(self.start + self.size, self.resized)


def prepare(
    image: Image.Image,
    config: DataConfig,
    *,
    resize: Resize = "model",
    input_size: Size | None = None,
) -> Prepared:
    """The image at the model's input size.

    Args:
        image: RGB, upright; made grey for a model of one channel.
        config: The model's.
        resize: ``model``: the model's own way, equal to timm's evaluation transform. ``squash``: the whole image,
            stretched to the input size.
        input_size: (height, width) in place of the configuration's.

    Raises:
        ValueError: The image is not RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"the image must be RGB, not {image.mode}")
    size = input_size or config.input_size
    image_size = (image.height, image.width)
    resized = size if resize == "squash" else _resized_size(image_size, size, config)
    rows, columns = (
        _Axis(original, new, _start(new, taken, config.crop_mode), taken)
        for original, new, taken in zip(image_size, resized, size, strict=True)
    )
    fill = (
        tuple(round(255 * value) for value in config.mean) if config.crop_mode == "border" else (0,) * config.channels
    )
    mode = _MODES[config.channels]
    seen = image if image.mode == mode else image.convert(mode)
    pixels = _render(seen, rows, columns, _INTERPOLATIONS[config.interpolation], fill)
    (top, bottom), (left, right) = rows.region, columns.region
    shown = np.array(pixels).reshape(*size, config.channels)
    return Prepared(shown, Region(left, top, right, bottom), image_size, size, resize)


def normalise(pixels: torch.Tensor, config: DataConfig, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``(pixels / 255 - mean) / std``, on the device where the pixels are.

    Args:
        pixels: uint8, shape (B, H, W, C).
        config: The model's.
        dtype: Of the result; arithmetic is done in float32 at least.

    Returns:
        Shape (B, C, H, W), contiguous.
    """
    work = torch.promote_types(dtype, torch.float32)
    mean, std = (send(values, pixels.device, work).view(1, -1, 1, 1) for values in (config.mean, config.std))
    planes = pixels.permute(0, 3, 1, 2).contiguous().to(work)
    return planes.div_(255).sub_(mean).div_(std).to(dtype)


def _resized_size(image: Size, size: Size, config: DataConfig) -> Size:
    """(height, width) before crop and pad. Rounds as timm and torchvision do, in each case in their own way."""
    scaled = (math.floor(size[0] / config.crop_pct), math.floor(size[1] / config.crop_pct))
    if config.crop_mode in {"squash", "squash_top_left"}:
        return scaled
    if config.crop_mode in {"center", "center_floor"} and scaled[0] == scaled[1]:
        short, long = min(image), max(image)
        new_long = int(scaled[0] * long / short)
        return (new_long, scaled[0]) if image[0] > image[1] else (scaled[0], new_long)
    ratios = image[0] / scaled[0], image[1] / scaled[1]
    ratio = max(ratios) if config.crop_mode == "border" else min(ratios)
    return max(1, round(image[0] / ratio)), max(1, round(image[1] / ratio))  # timm fails where it rounds to 0


def _start(resized: int, size: int, crop_mode: str) -> int:
    """Where the crop begins; negative where it pads, with the odd pixel of padding last."""
    if crop_mode == "squash_top_left":
        return 0
    if crop_mode == "center_floor" and size <= resized:
        return (resized - size) // 2
    return -((size - resized) // 2) if size > resized else round((resized - size) / 2)


def _render(
    image: Image.Image, rows: _Axis, columns: _Axis, resampling: Image.Resampling, fill: tuple[int, ...]
) -> Image.Image:
    """Resizes, then crops or pads to (rows.size, columns.size)."""
    (top, bottom), (left, right) = rows.inside, columns.inside
    if rows.resized * columns.resized <= _MAX_RESIZED_PIXELS:
        resized = _resize(image, (columns.resized, rows.resized), resampling)
        seen = resized.crop((left, top, right, bottom))
    else:
        seen = _resize_part(image, rows, columns, resampling)
    if seen.size == (columns.size, rows.size):
        return seen
    canvas = Image.new(seen.mode, (columns.size, rows.size), fill if len(fill) > 1 else fill[0])
    canvas.paste(seen, (left - columns.start, top - rows.start))
    return canvas


def _resize_part(image: Image.Image, rows: _Axis, columns: _Axis, resampling: Image.Resampling) -> Image.Image:
    """The same as to resize all and crop to `inside`, up to rounding, without building what is cropped away."""
    spans = []
    for axis in (columns, rows):
        first, last = axis.inside
        scale = axis.original / axis.resized
        reach = math.ceil(3 * max(scale, 1)) + 1  # of the widest filter, beyond the part
        start = max(math.floor(first * scale) - reach, 0)
        stop = min(math.ceil(last * scale) + reach, axis.original)
        # Relative to whole pixels nearby, because PIL keeps a box in float32.
        spans.append((start, stop, first * scale - start, min(last * scale, axis.original) - start, last - first))
    (left, right, box_left, box_right, width), (top, bottom, box_top, box_bottom, height) = spans
    part = image.crop((left, top, right, bottom))
    return _resize(part, (width, height), resampling, (box_left, box_top, box_right, box_bottom))


def _resize(
    image: Image.Image,
    size: tuple[int, int],
    resampling: Image.Resampling,
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image:
    gap = 8.0 if max(image.size) > _MAX_FILTERED_SIDE else None
    return image.resize(size, resampling, box=box, reducing_gap=gap)


def _pair(size: Any) -> Size:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _of_channels(name: str, values: Any, channels: int) -> tuple[float, ...]:
    """One value for each channel; timm keeps three for a grey model, which will do if they are the same."""
    its = tuple(float(value) for value in values)
    if channels == 1 and len(set(its)) == 1:
        return its[:1]
    if len(its) != channels:
        raise ValueError(f"{name} has {len(its)} values {its} for a model of {channels} channels: give {channels}")
    return its
