"""What transformers' image processors do, in terms of `cdam_engine.preprocess.DataConfig`.

A processor resizes, cuts, rescales and normalises, in this order. All of it comes out as a `DataConfig` that does the
same to the pixel, or is refused. (Processors of transformers' torchvision backend resize by other arithmetic than
Pillow's, which may differ by one level of 255; that of DINOv3 does not round to levels after resizing.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cdam_engine.preprocess import DataConfig
from cdam_server.compute.conversions.layers import crop_fraction
from cdam_server.compute.conversions.tensors import ConversionError

_HALF: Final = (0.5, 0.5, 0.5)
_IMAGENET: Final = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP: Final = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# PIL's numbers of its filters.
_FILTERS: Final = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclass(frozen=True)
class _Defaults:
    """What a class of processors does where its file says nothing.

    Attributes:
        resample: PIL's number of the filter.
        size: Where a lone number stands for the shorter edge, the key is `shortest_edge`.
        square: Whether a lone number stands for both edges.
        crop: Whether it cuts.
    """

    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: Mapping[str, int]
    square: bool = True
    crop: bool = False


_SQUARE: Final = {"height": 224, "width": 224}
PROCESSORS: Final[Mapping[str, _Defaults]] = {
    "ViT": _Defaults(2, _HALF, _HALF, _SQUARE),
    "DeiT": _Defaults(3, _HALF, _HALF, {"height": 256, "width": 256}, crop=True),
    "Beit": _Defaults(3, _HALF, _HALF, _SQUARE),
    "Bit": _Defaults(3, *_CLIP, {"shortest_edge": 224}, square=False, crop=True),
    "CLIP": _Defaults(3, *_CLIP, {"shortest_edge": 224}, square=False, crop=True),
    "Siglip": _Defaults(3, _HALF, _HALF, _SQUARE, square=False),
    "DINOv3ViT": _Defaults(2, *_IMAGENET, _SQUARE),
}
_CROP_SIZE: Final = 224
_OF_LABELS: Final = {"do_reduce_labels", "do_convert_rgb", "do_convert_annotations"}  # nothing to do with pixels of RGB
_STEPS: Final = {"do_resize", "do_center_crop", "do_rescale", "do_normalize"}


def data_config(content: Mapping[str, Any], patch_size: Sequence[int]) -> DataConfig:
    """The configuration that equals a processor's file.

    Args:
        content: Of preprocessor_config.json.
        patch_size: The model's (height, width). Where the input is no multiple of it, the convolution leaves out the
            last rows and columns; the configuration cuts them off.

    Raises:
        ConversionError: The processor does what can't be expressed; the message names the key.
    """
    defaults = _defaults(content)
    _check_steps(content)
    size = _edges(content.get("size") or defaults.size, square=defaults.square, key="size")
    cuts = content.get("do_center_crop")
    cuts = defaults.crop if cuts is None else cuts
    crop = _edges(content.get("crop_size") or _CROP_SIZE, square=True, key="crop_size") if cuts else None
    mean, std = _normalisation(content, defaults)
    resample = content.get("resample")
    resample = defaults.resample if resample is None else resample
    if resample not in _FILTERS:
        raise ConversionError(f"resample is {resample!r}, which is no filter of Pillow's")
    input_size, crop_pct, crop_mode = _geometry(size, crop, (patch_size[0], patch_size[1]))
    return DataConfig(input_size, mean, std, _FILTERS[resample], crop_pct, crop_mode)


def _defaults(content: Mapping[str, Any]) -> _Defaults:
    name = str(content.get("image_processor_type") or content.get("feature_extractor_type") or "")
    family = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", name)
    if family not in PROCESSORS:
        known = ", ".join(f"{family}ImageProcessor" for family in PROCESSORS)
        raise ConversionError(f"image_processor_type is {name or 'not there'}; known are {known}")
    return PROCESSORS[family]


def _check_steps(content: Mapping[str, Any]) -> None:
    if content.get("do_resize") is False:
        raise ConversionError("do_resize is false: images go in as they are, in any size")
    extra = [
        key for key, value in content.items() if key.startswith("do_") and value and key not in _STEPS | _OF_LABELS
    ]
    if extra:
        raise ConversionError(f"the processor has steps that are not known here: {', '.join(extra)}")


def _edges(value: Any, *, square: bool, key: str) -> dict[str, int]:
    """A size as transformers writes it: a number, (height, width), or a dictionary."""
    if isinstance(value, int):
        return {"height": value, "width": value} if square else {"shortest_edge": value}
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        return {"height": int(value[0]), "width": int(value[1])}
    if isinstance(value, Mapping):
        edges = {name: int(edge) for name, edge in value.items() if edge is not None}
        if edges.keys() in ({"height", "width"}, {"shortest_edge"}):
            return edges
    raise ConversionError(f"{key} is {value!r}; known are a number, height and width, and shortest_edge")


def _normalisation(
    content: Mapping[str, Any], defaults: _Defaults
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and std on a scale where white is 1, whatever the processor's scale is."""
    if content.get("rescale_offset"):
        raise ConversionError("rescale_offset is true, which is not known here")
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if content.get("do_normalize") is not False:
        mean = _triple(content.get("image_mean"), defaults.mean, "image_mean")
        std = _triple(content.get("image_std"), defaults.std, "image_std")
    factor = content.get("rescale_factor")
    white = 255.0 if content.get("do_rescale") is False else 255.0 * (1 / 255 if factor is None else float(factor))
    if math.isclose(white, 1.0, rel_tol=1e-6):
        return mean, std
    if white <= 0:
        raise ConversionError(f"rescale_factor is {factor!r}, which is not positive")
    # (white * x - mean) / std with x in [0, 1]
    return (mean[0] / white, mean[1] / white, mean[2] / white), (std[0] / white, std[1] / white, std[2] / white)


def _triple(value: Any, default: Sequence[float], key: str) -> tuple[float, float, float]:
    values = default if value is None else [value] * 3 if isinstance(value, int | float) else value
    if len(values) != 3:
        raise ConversionError(f"{key} has {len(values)} channels; only RGB is served")
    return float(values[0]), float(values[1]), float(values[2])


def _geometry(
    size: Mapping[str, int], crop: Mapping[str, int] | None, patch_size: tuple[int, int]
) -> tuple[tuple[int, int], float, str]:
    """Input size, crop_pct and crop_mode."""
    if "shortest_edge" in size:
        if crop is None:
            raise ConversionError("size has a shortest_edge and nothing is cut: inputs would be of any size")
        resized = (size["shortest_edge"], size["shortest_edge"])
    else:
        resized = (size["height"], size["width"])
    taken = resized if crop is None else (crop["height"], crop["width"])
    if taken[0] > resized[0] or taken[1] > resized[1]:
        raise ConversionError(f"crop_size {taken} is larger than size {resized}: the rest would be black")
    if "shortest_edge" in size and taken[0] != taken[1]:
        raise ConversionError(f"crop_size {taken} is no square, but size has a shortest_edge")
    whole = (taken[0] - taken[0] % patch_size[0], taken[1] - taken[1] % patch_size[1])
    if whole != taken:
        if crop is not None:
            raise ConversionError(f"the input size {taken} is no multiple of the patch size {patch_size}")
        return whole, crop_fraction(whole, resized), "squash_top_left"
    if "shortest_edge" in size:
        return taken, crop_fraction(taken, resized), "center_floor"
    if any((edge - part) % 4 == 3 for edge, part in zip(resized, taken, strict=True)):
        raise ConversionError(f"crop_size {taken} lies between pixels of size {resized}")
    return taken, crop_fraction(taken, resized), "squash"
