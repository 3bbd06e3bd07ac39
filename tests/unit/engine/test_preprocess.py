"""The input equals timm's, and the region says which part of the image it shows."""

import resource
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import timm
import timm.data
import torch
from PIL import Image

from cdam.v1 import common_pb2
from cdam_engine import preprocess
from cdam_engine.preprocess import DataConfig, Prepared, Region, normalise, prepare

CONFIG = DataConfig(
    input_size=(64, 64),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    interpolation="bicubic",
    crop_pct=0.9,
    crop_mode="center",
)
SIZES = [(64, 64), (1, 1), (3, 200), (200, 3), (97, 131), (480, 333), (65, 64), (30, 41), (500, 71)]  # (height, width)
CROP_MODES = ["center", "center_floor", "squash", "squash_top_left", "border"]
CASES = [
    (size, crop_mode)
    for crop_mode in ("center", "squash", "border")
    for size in SIZES
    # With a border timm fails where the shorter side rounds to nothing.
    if crop_mode != "border" or max(size) < 30 * min(size)
]


def noise(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(height * 1000 + width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def by_timm(image: Image.Image, config: DataConfig) -> torch.Tensor:
    out: torch.Tensor = timm.data.create_transform(**asdict(config), is_training=False)(image)
    return out[None]


def ours(prepared: Prepared, config: DataConfig) -> torch.Tensor:
    return normalise(torch.from_numpy(prepared.pixels)[None], config)


def assert_equal_to_timm(image: Image.Image, config: DataConfig) -> None:
    prepared = prepare(image, config)
    assert prepared.pixels.dtype == np.uint8
    assert prepared.pixels.shape == (*config.input_size, 3)
    assert prepared.input_size == config.input_size
    assert prepared.image_size == (image.height, image.width)
    torch.testing.assert_close(ours(prepared, config), by_timm(image, config), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("size", "crop_mode"), CASES)
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 1.0])
def test_equal_to_timm(size: tuple[int, int], crop_mode: str, crop_pct: float) -> None:
    assert_equal_to_timm(noise(*size), replace(CONFIG, crop_mode=crop_mode, crop_pct=crop_pct))


@pytest.mark.parametrize(("size", "crop_mode"), CASES)
@pytest.mark.parametrize("input_size", [(32, 64), (80, 48), (63, 65)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_equal_to_timm_at_other_shapes(
    size: tuple[int, int], crop_mode: str, input_size: tuple[int, int], interpolation: str
) -> None:
    config = replace(CONFIG, crop_mode=crop_mode, input_size=input_size, interpolation=interpolation)
    assert_equal_to_timm(noise(*size), config)


@pytest.mark.parametrize("interpolation", ["nearest", "box", "hamming", "lanczos"])
def test_equal_to_timm_with_other_filters(interpolation: str) -> None:
    assert_equal_to_timm(noise(97, 131), replace(CONFIG, interpolation=interpolation))


def test_an_input_size_of_the_request_replaces_the_configured_one() -> None:
    image = noise(97, 131)
    prepared = prepare(image, CONFIG, input_size=(48, 80))
    np.testing.assert_array_equal(prepared.pixels, prepare(image, replace(CONFIG, input_size=(48, 80))).pixels)
    assert prepared.input_size == (48, 80)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop_mode", CROP_MODES)
def test_squash_shows_the_whole_image(size: tuple[int, int], crop_mode: str) -> None:
    image = noise(*size)
    prepared = prepare(image, replace(CONFIG, crop_mode=crop_mode), resize="squash", input_size=(48, 80))
    assert prepared.region == Region(0, 0, image.width, image.height)
    expected = image.resize((80, 48), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(prepared.pixels, np.asarray(expected))


def test_every_way_to_crop_and_to_resize_has_a_name_in_the_api() -> None:
    assert {f"CROP_MODE_{name.upper()}" for name in CROP_MODES} == set(common_pb2.CropMode.keys()[1:])
    for crop_mode in CROP_MODES:
        replace(CONFIG, crop_mode=crop_mode)
    for name in common_pb2.Interpolation.keys()[1:]:
        replace(CONFIG, interpolation=name.removeprefix("INTERPOLATION_").lower())
    with pytest.raises(ValueError, match=f"crop_mode must be one of {', '.join(CROP_MODES)}, not 'middle'"):
        replace(CONFIG, crop_mode="middle")


def test_regions_by_hand() -> None:
    # 100 x 200 -> shorter side to floor(64 / 0.9) = 71: 71 x 142, crop at (round(3.5), 39) = (4, 39)
    region = prepare(noise(100, 200), CONFIG).region
    assert (region.left, region.right) == pytest.approx((39 * 200 / 142, 103 * 200 / 142))
    assert (region.top, region.bottom) == pytest.approx((4 * 100 / 71, 68 * 100 / 71))
    # longer side to 64, shorter to 32; 16 rows of padding above and below, each 100 / 32 pixels
    region = prepare(noise(100, 200), replace(CONFIG, crop_mode="border", crop_pct=1.0)).region
    assert region == Region(0, -50, 200, 150)
    # both sides to 71, crop at 4
    region = prepare(noise(100, 200), replace(CONFIG, crop_mode="squash")).region
    assert (region.left, region.top) == pytest.approx((4 * 200 / 71, 4 * 100 / 71))
    # the same, from the corner
    region = prepare(noise(100, 200), replace(CONFIG, crop_mode="squash_top_left")).region
    assert (region.left, region.top) == (0, 0)
    assert (region.right, region.bottom) == pytest.approx((64 * 200 / 71, 64 * 100 / 71))
    # 7 and 78 too many of 71 x 142: the cut begins at 3, not at 4
    region = prepare(noise(100, 200), replace(CONFIG, crop_mode="center_floor")).region
    assert (region.left, region.top) == pytest.approx((39 * 200 / 142, 3 * 100 / 71))


@pytest.mark.parametrize("crop_mode", CROP_MODES)
@pytest.mark.parametrize("resize", ["model", "squash"])
@pytest.mark.parametrize("size", [(300, 401), (401, 300), (40, 33), (200, 200)])
@pytest.mark.parametrize("input_size", [(64, 64), (48, 80)])
def test_a_marker_lands_where_the_region_says(
    crop_mode: str, resize: Any, size: tuple[int, int], input_size: tuple[int, int]
) -> None:
    height, width = size
    top, bottom, left, right = round(0.4 * height), round(0.7 * height), round(0.35 * width), round(0.6 * width)
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[top:bottom, left:right] = 255
    config = replace(CONFIG, crop_mode=crop_mode, mean=(0.0, 0.0, 0.0), interpolation="bilinear")
    prepared = prepare(Image.fromarray(pixels), config, resize=resize, input_size=input_size)

    bright_rows, bright_columns = np.nonzero(prepared.pixels[..., 0] > 127)
    region = prepared.region
    x = input_size[1] / (region.right - region.left)
    y = input_size[0] / (region.bottom - region.top)
    assert bright_columns.min() == pytest.approx((left - region.left) * x, abs=1)
    assert bright_columns.max() + 1 == pytest.approx((right - region.left) * x, abs=1)
    assert bright_rows.min() == pytest.approx((top - region.top) * y, abs=1)
    assert bright_rows.max() + 1 == pytest.approx((bottom - region.top) * y, abs=1)


@pytest.mark.parametrize("crop_mode", CROP_MODES)
@pytest.mark.parametrize("size", [(97, 131), (480, 333), (3, 200), (30, 41), (500, 71)])
def test_large_intermediates_are_avoided_without_a_visible_difference(
    crop_mode: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, crop_mode=crop_mode)
    image = noise(*size)
    expected = prepare(image, config)
    monkeypatch.setattr(preprocess, "_MAX_RESIZED_PIXELS", 0)
    got = prepare(image, config)
    difference = np.abs(got.pixels.astype(int) - expected.pixels)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01
    assert got.region == expected.region


@pytest.mark.parametrize(
    ("crop_mode", "resize"), [("center", "model"), ("squash", "model"), ("border", "model"), ("center", "squash")]
)
@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (1, 30_000_000), (30_000_000, 1)])
def test_extreme_proportions_do_not_take_the_memory(crop_mode: str, resize: Any, size: tuple[int, int]) -> None:
    image = Image.new("RGB", (size[1], size[0]), "white")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prepared = prepare(image, replace(CONFIG, crop_mode=crop_mode, input_size=(224, 224)), resize=resize)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    assert prepared.pixels.shape == (224, 224, 3)
    assert prepared.pixels.max() == 255


def test_only_rgb_is_taken() -> None:
    with pytest.raises(ValueError, match="RGB"):
        prepare(Image.new("L", (8, 8)), CONFIG)


# --- normalise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_normalise(dtype: torch.dtype) -> None:
    pixels = torch.from_numpy(np.stack([np.asarray(noise(5, 7)), np.asarray(noise(5, 7).rotate(180))]))
    out = normalise(pixels, CONFIG, dtype)
    assert out.dtype == dtype
    assert out.shape == (2, 3, 5, 7)
    assert out.is_contiguous()
    exact = (pixels.double() / 255 - torch.tensor(CONFIG.mean).double()) / torch.tensor(CONFIG.std).double()
    torch.testing.assert_close(out.double(), exact.permute(0, 3, 1, 2), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_normalise_leaves_its_input_alone() -> None:
    pixels = torch.full((1, 2, 2, 3), 7, dtype=torch.uint8)
    normalise(pixels, CONFIG)
    assert (pixels == 7).all()


# --- configurations


@pytest.mark.parametrize(
    "architecture", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_base_patch16_siglip_224"]
)
def test_configurations_come_from_timm(architecture: str) -> None:
    model = timm.create_model(architecture, depth=1, embed_dim=32, num_heads=2)
    config = DataConfig.from_timm(model)
    expected = timm.data.resolve_model_data_config(model)
    assert {**asdict(config), "input_size": (3, *config.input_size)} == expected


def test_the_size_that_a_model_was_built_for_counts() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=(64, 96))
    assert DataConfig.from_timm(model).input_size == (64, 96)


def test_models_of_rgb_and_of_grey_pictures() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, in_chans=1)
    assert DataConfig.from_timm(model).channels == 1
    model = timm.create_model("vit_tiny_patch16_224", depth=1, in_chans=4)
    with pytest.raises(ValueError, match="the model takes 4 channels, and a picture has 3"):
        DataConfig.from_timm(model)


@pytest.mark.parametrize(
    "wrong",
    [
        {"input_size": (0, 64)},
        {"interpolation": "random"},
        {"crop_pct": 0.0},
        {"crop_pct": 1.1},
        {"crop_mode": "corner"},
        {"std": (1.0, 0.0, 1.0)},
        {"mean": (0.5,)},
    ],
)
def test_configurations_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(CONFIG, **wrong)
