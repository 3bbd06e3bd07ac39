"""Overlays: colours that mean what they should, in the right place."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cdam
from cdam import _overlay
from cdam._decode import decode_explanation
from cdam._encode import encode_explain
from cdam._images import _upright, encode_image
from cdam._methods import as_methods
from cdam._overlay import Region
from cdam_images.components import components
from scripted_server import answer

TARGET = cdam.ExplainedTarget(cdam.Output(0), "cat", 1.0, 0.5, 0, 0)
INTERPOLATIONS = ["bicubic", "bilinear", "nearest"]


def _map(scores: Any, region: Region, size: tuple[int, int], image: Any = None) -> cdam.RelevanceMap:
    array = np.asarray(scores, np.float32)
    geometry = cdam.Geometry(array.shape, region, size, size)
    return cdam.RelevanceMap(
        array, TARGET, cdam.Cdam(), geometry, _image=None if image is None else encode_image(image)
    )


def _explanation(targets: Any, methods: Any = ()) -> cdam.Explanation:
    request = encode_explain(
        np.full((40, 60, 3), 90, np.uint8),
        targets,
        methods=methods,
        model="",
        resize=None,
        input_size=None,
        request_id="",
        priority=None,
    )
    return decode_explanation(answer(request), as_methods(methods), request)


def test_orange_is_for_blue_is_against_and_zero_is_transparent() -> None:
    against, nothing, evidence = _overlay.colours(np.array([-1, 0, 1], np.float32), alpha=1.0)
    assert evidence[0] > evidence[1] > evidence[2]
    assert against[2] > against[1] > against[0]
    assert (nothing[3], evidence[3], against[3]) == (0, 255, 255)


def test_noise_is_faint_and_strength_only_grows() -> None:
    values = np.linspace(0, 1, 101, dtype=np.float32)
    for sign in (1, -1):
        alpha = _overlay.colours(sign * values, alpha=1.0)[:, 3] / 255
        assert (np.diff(alpha) >= 0).all()
        assert alpha[10] < 0.1
        assert 0.3 < alpha[33] < 0.6
        assert alpha[60:].min() > 0.7
    np.testing.assert_array_equal(_overlay.colours(3 * values[-1:]), _overlay.colours(values[-1:]))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_enlarging_keeps_every_patch_at_its_place(interpolation: Any) -> None:
    scores = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    # Patches of 7 x 9 px whose centres are centres of pixels.
    large = _overlay.enlarge(scores, Region(2, 4, 2 + 5 * 9, 4 + 3 * 7), (30, 50), interpolation)
    np.testing.assert_allclose(large[4 + 3 : 25 : 7, 2 + 4 : 47 : 9], scores, atol=1e-6)
    assert not large[:4].any()
    assert not large[25:].any()
    assert not large[:, :2].any()
    assert not large[:, 47:].any()


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_a_flat_map_stays_flat(interpolation: Any) -> None:
    large = _overlay.enlarge(np.full((2, 3), 0.7, np.float32), Region(-3.3, 0, 20, 16.5), (16, 17), interpolation)
    np.testing.assert_allclose(large, 0.7, atol=1e-6)


def test_blocks_are_blocks() -> None:
    scores = np.arange(6, dtype=np.float32).reshape(2, 3)
    large = _overlay.enlarge(scores, Region(0, 0, 12, 6), (6, 12), "nearest")
    np.testing.assert_array_equal(large, scores.repeat(3, 0).repeat(4, 1))


def test_a_linear_map_is_a_ramp() -> None:
    large = _overlay.enlarge(np.arange(4, dtype=np.float32)[None], Region(0, 0, 40, 1), (1, 40), "bilinear")
    np.testing.assert_allclose(large[0, 5:35], (np.arange(5, 35) + 0.5) / 10 - 0.5, atol=1e-6)
    smooth = _overlay.enlarge(np.arange(6, dtype=np.float32)[None], Region(0, 0, 60, 1), (1, 60), "bicubic")
    np.testing.assert_allclose(smooth[0, 15:45], (np.arange(15, 45) + 0.5) / 10 - 0.5, atol=1e-5)


def test_the_overlay_lands_on_its_region() -> None:
    # One patch speaks for, one against, in the centre crop of a wide image.
    scores = [[1, 0], [0, -1]]
    overlay = np.asarray(
        _map(scores, Region(20, 0, 60, 40), (40, 80), np.full((40, 80), 128, np.uint8)).overlay(
            interpolation="nearest"
        ),
        int,
    )
    red_over_blue = overlay[..., 0] - overlay[..., 2]
    assert (red_over_blue[:20, 20:40] > 100).all()
    assert (red_over_blue[20:, 40:60] < -100).all()
    assert (red_over_blue[:20, 40:] == 0).all()
    assert (red_over_blue[20:, :40] == 0).all()
    assert overlay[0, 0, 0] > overlay[0, 59, 0]  # what the model didn't see is paler


def test_the_overlay_of_a_turned_photo() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    from io import BytesIO

    file = BytesIO()
    Image.new("RGB", (80, 40)).save(file, "JPEG", exif=exif)
    relevance = _map([[1], [0]], Region(0, 0, 40, 80), (80, 40), file.getvalue())
    overlay = np.asarray(relevance.overlay(interpolation="nearest"), int)
    assert overlay.shape == (80, 40, 3)
    assert (overlay[:40, :, 0] > overlay[:40, :, 2]).all()


def test_a_box_is_around_the_largest_part_of_the_image() -> None:
    """In a crop of a wide image, 4 x 4 patches of 10 pixels: the weaker part is larger, the stronger one is far from it."""
    scores = np.zeros((4, 4))
    scores[0, 0] = 10
    scores[2:, 2:] = 3
    scores[1, 1] = -5
    crop = _map(scores, Region(20, 0, 60, 40), (40, 80))
    assert crop.box(interpolation="nearest") == Region(40, 20, 60, 40)
    assert crop.box(0.3, interpolation="nearest") == Region(40, 20, 60, 40)
    assert crop.box(0.31, interpolation="nearest") == crop.box(1, interpolation="nearest") == Region(20, 0, 30, 10)
    # Between the centres of patches: the weaker part's 3 begins at 25, the other falls from 10 at 5 to 0 at 15.
    assert crop.box(0.29) == Region(20 + 25, 25, 60, 40)
    assert crop.box(0.5) == Region(20, 0, 20 + 10, 10)
    assert _map(-abs(scores), Region(20, 0, 60, 40), (40, 80)).box() is None
    assert _map(np.zeros((4, 4)), Region(20, 0, 60, 40), (40, 80)).box() is None
    assert _map(np.ones((4, 4)), Region(20, 0, 60, 40), (40, 80)).box() == Region(20, 0, 60, 40)
    padded = _map(np.ones((4, 4)), Region(-10, -10, 90, 50), (40, 80))
    assert padded.box() == Region(0, 0, 80, 40)  # what lies beyond the image is no part of it


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_a_box_is_the_one_that_the_metric_measures(interpolation: Any) -> None:
    """Where the model sees the image as it is: 0 for one pixel more or less in any of a hundred random maps."""
    from cdam_engine.evaluation.geometry import Geometry
    from cdam_engine.families import Grid

    geometry = Geometry((40, 60), (8, 6), Grid(5, 10))
    for seed in range(100):
        scores = np.random.default_rng(seed).standard_normal((5, 10)).astype(np.float32)
        pixels = geometry.enlarge(scores, interpolation)
        found = components((pixels / pixels.max() >= 0.2)[None]).largest()
        box = _map(scores, Region(0, 0, 60, 40), (40, 60)).box(0.2, interpolation=interpolation)
        assert box is not None
        assert [[box.top, box.left, box.bottom, box.right]] == found.box.tolist()


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, float("nan")])
def test_thresholds_of_no_box(threshold: float) -> None:
    with pytest.raises(ValueError, match="greater than 0 and at most 1"):
        _map([[1, 0]], Region(0, 0, 40, 40), (40, 40)).box(threshold)


def test_a_box_is_drawn_into_the_overlay() -> None:
    scores = np.zeros((4, 4))
    scores[2:, 2:] = 1
    its = _map(scores, Region(20, 0, 60, 40), (40, 80), np.full((40, 80), 128, np.uint8))
    plain, boxed = (its.overlay(interpolation="nearest", box=box) for box in (None, 0.5))
    large = its.overlay(np.full((400, 800), 128, np.uint8), interpolation="nearest", box=0.5)
    for picture, factor in ((boxed, 1), (large, 10), (its.overlay(box=0.5, zoom=3), 3)):
        pixels = np.asarray(picture, int)
        dark = np.argwhere(pixels.sum(2) < 150)  # the line's, within its white edge
        line = max(1, round(80 * factor / 256))
        box = its.box(0.5)
        assert box is not None
        assert dark.min(0).tolist() == [round(box.top) * factor + line, round(box.left) * factor + line]
        assert dark.max(0).tolist() == [round(box.bottom) * factor - 1 - line, round(box.right) * factor - 1 - line]
    changed = np.argwhere((np.asarray(plain) != np.asarray(boxed)).any(2))
    assert len(changed)
    empty = _map(-scores, Region(20, 0, 60, 40), (40, 80))
    assert (np.asarray(empty.overlay(box=0.2)) == np.asarray(empty.overlay())).all()


def test_a_sheet_with_boxes() -> None:
    explanation = _explanation(["7", "3"])
    plain, boxed = (np.asarray(cdam.render.sheet(explanation, box=box)) for box in (None, 0.5))
    assert plain.shape == boxed.shape
    assert (plain != boxed).any()


def test_maps_can_share_a_scale() -> None:
    weak, strong = (_map([[v, 0]], Region(0, 0, 2, 1), (1, 2)) for v in (0.1, -1.0))
    assert cdam.render.limit([weak, strong]) == 1.0
    own = np.asarray(weak.overlay(interpolation="nearest"), int)[0, 0]
    shared = np.asarray(weak.overlay(scale=1.0, interpolation="nearest"), int)[0, 0]
    assert own[2] < 60
    assert shared[2] > 220
    assert cdam.render.limit([]) == 0.0


def test_a_percentile_is_robust() -> None:
    scores = np.ones((10, 10))
    scores[0, 0] = 1000
    relevance = _map(scores, Region(0, 0, 10, 10), (10, 10))
    assert cdam.render.limit([relevance], percentile=98) == 1.0
    assert relevance.limit == 1000


def test_an_empty_map_leaves_the_image() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    relevance = _map(np.zeros((2, 2)), Region(0, 0, 8, 8), (8, 8), image)
    np.testing.assert_array_equal(np.asarray(relevance.overlay(background="original")), image)


def test_zoom_and_other_sizes() -> None:
    relevance = _map([[1, 0]], Region(0, 0, 60, 40), (40, 60), np.zeros((40, 60), np.uint8))
    assert relevance.overlay(zoom=3).size == (180, 120)
    assert relevance.overlay(np.zeros((20, 30, 3), np.uint8)).size == (30, 20)
    with pytest.raises(ValueError, match="not the same shape"):
        relevance.overlay(np.zeros((60, 40), np.uint8))
    assert _map([[1]], Region(0, 0, 6, 4), (4, 6)).overlay().size == (6, 4)


def test_heatmap() -> None:
    relevance = _map([[1, 0], [0, -1]], Region(20, 0, 60, 40), (40, 80))
    heat = relevance.heatmap((20, 30), interpolation="nearest")
    assert (heat.mode, heat.size) == ("RGBA", (30, 20))
    assert heat.getpixel((0, 0))[3] == heat.getpixel((29, 19))[3] == 255
    assert heat.getpixel((29, 0))[3] == 0
    assert relevance.heatmap().size == (80, 40)


@pytest.mark.parametrize("shared_scale", [True, False])
def test_sheet(shared_scale: bool) -> None:
    one = cdam.render.sheet(_explanation("cat"), shared_scale=shared_scale, cell=64)
    two = cdam.render.sheet(_explanation(["cat", "dog"]), shared_scale=shared_scale, cell=64)
    rows = cdam.render.sheet(_explanation(["cat", "dog"], ["cdam", "smooth_cdam"]), shared_scale=shared_scale, cell=64)
    wrapped = cdam.render.sheet(_explanation(list("abcdefg")), columns=3, cell=64, title="Letters")
    assert one.mode == "RGB"
    assert one.width < two.width == rows.width < wrapped.width
    assert one.height == two.height < rows.height < wrapped.height


def test_a_sheet_of_concepts_and_long_names() -> None:
    targets = [
        "a very long name of a class, and then some more",
        cdam.Concept("fur"),
        cdam.Concept("x", similarity="l2"),
    ]
    explanation = _explanation(targets, ["cdam", "attention"])
    assert cdam.render.sheet(explanation, cell=96).width < 96 * 6


def test_a_sheet_without_maps() -> None:
    assert cdam.render.sheet(_explanation([], "attention"), cell=64).width > 64


def test_a_16_bit_grey_picture_is_taken_by_its_high_byte() -> None:
    samples = np.array([[0x0102, 0xFF00], [0x7FFF, 0x0000]], np.uint16)
    assert np.asarray(_upright(Image.fromarray(samples))).tolist() == [[1, 255], [127, 0]]


def test_images_and_masks_as_the_server_sees_them(tmp_path: Path) -> None:
    sideways = Image.new("RGB", (4, 2), "teal")
    sideways.getexif()[0x0112] = 6  # turned by a quarter
    sideways.save(tmp_path / "sideways.png", exif=sideways.getexif())
    upright = cdam.render.upright(tmp_path / "sideways.png")
    assert (upright.mode, upright.size, upright.getpixel((0, 0))) == ("RGB", (2, 4), (0, 128, 128))
    inside = np.zeros((2, 3), bool)
    inside[1, 2] = True
    np.testing.assert_array_equal(np.asarray(cdam.render.upright_mask(inside)), 255 * inside.astype(np.uint8))
