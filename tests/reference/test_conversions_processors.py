"""transformers' image processors, in terms of `DataConfig`, against transformers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from cdam_engine.preprocess import normalise, prepare
from cdam_server.compute.conversions.hugging_face.preprocessor import PROCESSORS, data_config
from cdam_server.compute.conversions.tensors import ConversionError

HALF = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.2, 0.1]}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", {}),
    "vit_small_oblong": ("ViT", {"size": {"height": 32, "width": 48}, **HALF, "resample": 3}),
    "vit_not_normalised": ("ViT", {"size": {"height": 32, "width": 32}, "do_normalize": False}),
    "vit_not_rescaled": ("ViT", {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [100.0] * 3}),
    "vit_other_scale": ("ViT", {"rescale_factor": 1 / 127.5}),
    "vit_lanczos": ("ViT", {"resample": 1}),
    "vit_number": ("ViT", {"size": 32}),
    "deit": ("DeiT", {}),
    "deit_small": ("DeiT", {"size": {"height": 36, "width": 36}, "crop_size": {"height": 32, "width": 32}}),
    "beit": ("Beit", {}),
    "beit_cut": ("Beit", {"size": {"height": 256, "width": 256}, "do_center_crop": True}),
    "dinov2": ("Bit", {"size": {"shortest_edge": 256}, **HALF}),
    "dinov2_odd": ("Bit", {"size": {"shortest_edge": 45}, "crop_size": {"height": 42, "width": 42}}),
    "clip": ("CLIP", {}),
    "clip_number": ("CLIP", {"size": 40, "crop_size": 32}),
    "siglip": ("Siglip", {}),
    "siglip_large": ("Siglip", {"size": {"height": 384, "width": 384}}),
}
SIZES = [(301, 420), (225, 224), (97, 31), (64, 229), (500, 333)]


def _picture(height: int, width: int, low: int = 0, high: int = 256) -> Image.Image:
    """Noise of all sizes, so that no resampling hides behind a smooth picture."""
    random = np.random.default_rng(height)
    coarse = random.integers(low, high, (height // 9 + 1, width // 9 + 1, 3), np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = random.integers(-40, 40, (height, width, 3))
    return Image.fromarray((np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8))


def _saved(processor: Any, folder: Path) -> dict[str, Any]:
    processor.save_pretrained(folder)
    return json.loads((folder / "preprocessor_config.json").read_text())


def _ours(content: dict[str, Any], picture: Image.Image, patch: int = 2) -> torch.Tensor:
    config = data_config(content, (patch, patch))
    return normalise(torch.from_numpy(prepare(picture, config).pixels)[None], config)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_equal_transformers_pil_processors(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    family, arguments = KINDS[kind]
    processor = getattr(transformers, f"{family}ImageProcessorPil")(**arguments)
    content = _saved(processor, tmp_path)
    picture = _picture(*size)
    expected = torch.as_tensor(np.asarray(processor(picture, return_tensors="pt").pixel_values[0]))
    torch.testing.assert_close(_ours(content, picture), expected.float(), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("family", PROCESSORS)
def test_pixels_are_within_a_level_of_the_torchvision_processors(family: str, tmp_path: Path) -> None:
    """Another arithmetic of the same filters: one level of 255, rarely two. (More only where a bicubic filter overshoots
    black or white, which Pillow cuts off after each of its two passes and torchvision after both.)"""
    processor = getattr(transformers, f"{family}ImageProcessor")()
    content = _saved(processor, tmp_path)
    for size in SIZES:
        picture = _picture(*size, low=80, high=176)
        expected = processor(picture, return_tensors="pt").pixel_values[0]
        difference = (
            (_ours(content, picture) - expected).abs() * torch.tensor(content["image_std"])[:, None, None] * 255
        )
        assert difference.max() < 2.01
        assert difference.mean() < 0.5


@pytest.mark.parametrize("family", PROCESSORS)
def test_defaults_are_transformers_own(family: str) -> None:
    processor, ours = getattr(transformers, f"{family}ImageProcessor"), PROCESSORS[family]
    assert int(processor.resample) == ours.resample
    assert tuple(processor.image_mean) == pytest.approx(ours.mean)
    assert tuple(processor.image_std) == pytest.approx(ours.std)
    assert dict(processor.size) == dict(ours.size)
    assert bool(getattr(processor, "do_center_crop", False)) is ours.crop
    assert bool(getattr(processor, "default_to_square", True)) is ours.square
    if ours.crop:
        assert dict(processor.crop_size) == {"height": 224, "width": 224}


def test_files_of_old_versions() -> None:
    """Numbers in place of dictionaries, `feature_extractor_type`, keys left out."""
    old = {"feature_extractor_type": "ViTFeatureExtractor", "size": 224, "resample": 2, "do_resize": True}
    config = data_config({**old, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, (16, 16))
    assert (config.input_size, config.crop_mode, config.crop_pct) == ((224, 224), "squash", 1.0)
    clip = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 336, "crop_size": 336, "do_center_crop": True}
    config = data_config(clip, (14, 14))
    assert (config.input_size, config.crop_mode, config.interpolation) == ((336, 336), "center_floor", "bicubic")
    fast = {"image_processor_type": "BitImageProcessorFast", "size": {"shortest_edge": 256, "longest_edge": None}}
    config = data_config(fast, (14, 14))
    assert (config.input_size, config.crop_pct) == ((224, 224), 0.875)


def test_an_input_that_is_no_multiple_of_the_patches_is_cut_as_the_convolution_does() -> None:
    """384 / 14: the patches leave out the last six rows and columns."""
    content = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 384, "width": 384}}
    picture = _picture(500, 333)
    config = data_config(content, (14, 14))
    assert (config.input_size, config.crop_mode) == ((378, 378), "squash_top_left")
    prepared = prepare(picture, config)
    whole = np.asarray(picture.resize((384, 384), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(prepared.pixels, whole[:378, :378])
    region = prepared.region
    assert (region.left, region.top) == (0, 0)
    assert (region.right, region.bottom) == pytest.approx((333 * 378 / 384, 500 * 378 / 384))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"do_resize": False}, "do_resize is false"),
        ({"do_pad": True}, "steps that are not known here: do_pad"),
        ({"do_flip_channel_order": True}, "not known here: do_flip_channel_order"),
        ({"image_processor_type": "LevitImageProcessor"}, "image_processor_type is LevitImageProcessor; known are ViT"),
        ({"image_processor_type": None}, "image_processor_type is not there"),
        ({"resample": 9}, "resample is 9, which is no filter"),
        ({"size": {"longest_edge": 224}}, "size is {'longest_edge': 224}; known are"),
        ({"size": {"shortest_edge": 224}}, "size has a shortest_edge and nothing is cut"),
        ({"do_center_crop": True, "crop_size": 256}, r"crop_size \(256, 256\) is larger than size \(224, 224\)"),
        ({"do_center_crop": True, "crop_size": 221}, r"is no multiple of the patch size"),
        ({"rescale_offset": True}, "rescale_offset is true"),
        ({"rescale_factor": -1.0}, "rescale_factor is -1.0, which is not positive"),
        ({"image_mean": [0.5]}, "image_mean has 1 channels; only RGB is served"),
        (
            {"size": {"shortest_edge": 64}, "do_center_crop": True, "crop_size": {"height": 32, "width": 64}},
            "is no square, but size has a shortest_edge",
        ),
        ({"size": 227, "do_center_crop": True}, "lies between pixels of size"),
    ],
)
def test_refusals(content: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConversionError, match=reason):
        data_config({"image_processor_type": "ViTImageProcessor", **content}, (16, 16))
