"""The same picture is the same pixels in the notebook, in the client and in the service, whatever it was opened as.

Each case stands for public reports of pictures that one of them saw differently.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

import cdam
from cdam._images import encode_image, encode_mask, open_image, open_mask
from cdam.v1 import common_pb2
from cdam_engine import Explainer, Output, upright_rgb
from cdam_images import UndefinedRangeError, upright_mask
from cdam_server.errors import InvalidArgumentError
from cdam_server.rpc.images import ImageLimits, decode_image, decode_mask

RNG = np.random.default_rng(11)
COLOURS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
GREY_16 = RNG.integers(0, 65536, (6, 9), dtype=np.uint16)
RGB = Image.fromarray(COLOURS)

# What EXIF's orientations mean, from the specification: where the first row and column are seen.
UPRIGHT: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def service(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(decode_image(common_pb2.Image(encoded=data), ImageLimits()))


def all_three(image: Image.Image) -> NDArray[np.uint8]:
    """What the notebook sees of a PIL image, after a check that the service and an overlay see it, byte for byte."""
    notebook = np.asarray(upright_rgb(image))
    message = encode_image(image)
    np.testing.assert_array_equal(np.asarray(decode_image(message, ImageLimits())), notebook)
    np.testing.assert_array_equal(np.asarray(open_image(message)), notebook)
    np.testing.assert_array_equal(np.asarray(upright_rgb(image)), notebook)  # it was not changed
    return notebook


def over_white(colours: NDArray[Any], alpha: NDArray[Any]) -> NDArray[np.float64]:
    weight = alpha.astype(float)[..., None] / 255
    return np.asarray(colours.astype(float) * weight + 255 * (1 - weight))


def with_alpha(alpha: NDArray[np.uint8] = ALPHA) -> Image.Image:
    return Image.merge("RGBA", (*RGB.split(), Image.fromarray(alpha)))


def palette(**options: Any) -> Image.Image:
    """Nine colours, of which some may be transparent."""
    image = Image.fromarray(np.arange(54, dtype=np.uint8).reshape(6, 9) % 9, "L").convert("P")
    image.putpalette(COLOURS[0].tobytes())
    image.info.update(options)
    return image


def grey_alpha(alpha: NDArray[np.uint8] = ALPHA) -> Image.Image:
    return Image.merge("LA", (Image.fromarray(COLOURS[..., 0]), Image.fromarray(alpha)))


def grey_16(dtype: str) -> Image.Image:
    return Image.frombuffer({"<u2": "I;16", ">u2": "I;16B"}[dtype], (9, 6), GREY_16.astype(dtype).tobytes(), "raw")


OPAQUE = {
    "RGB": (RGB, COLOURS),
    "RGBX": (RGB.convert("RGBX"), COLOURS),
    "L": (Image.fromarray(COLOURS[..., 0]), COLOURS[..., :1]),
    "1": (Image.fromarray(ALPHA > 99), 255 * (ALPHA > 99)[..., None]),
    "P": (palette(), COLOURS[0][np.arange(54).reshape(6, 9) % 9]),
    "CMYK": (
        Image.merge("CMYK", [Image.fromarray(255 - COLOURS[..., i]) for i in range(3)] + [Image.new("L", (9, 6))]),
        COLOURS,
    ),
    "I;16": (grey_16("<u2"), (GREY_16 // 256)[..., None]),
    "I;16B": (grey_16(">u2"), (GREY_16 // 256)[..., None]),
}
CONVERTED = {"YCbCr": RGB.convert("YCbCr"), "HSV": RGB.convert("HSV"), "LAB": RGB.convert("LAB")}
TRANSPARENT = {
    "RGBA": (with_alpha(), over_white(COLOURS, ALPHA)),
    "RGBa": (with_alpha().convert("RGBa"), over_white(COLOURS, ALPHA)),
    "LA": (grey_alpha(), over_white(COLOURS[..., :1], ALPHA)),
    "La": (grey_alpha().convert("La"), over_white(COLOURS[..., :1], ALPHA)),
    "PA": (with_alpha().quantize(256).convert("PA"), over_white(COLOURS, ALPHA)),
    "P, index": (
        palette(transparency=4),
        over_white(COLOURS[0], np.where(np.arange(9) == 4, 0, 255))[np.arange(54).reshape(6, 9) % 9],
    ),
    "P, bytes": (
        palette(transparency=bytes(ALPHA[0])),
        over_white(COLOURS[0], ALPHA[0])[np.arange(54).reshape(6, 9) % 9],
    ),
}


@pytest.mark.parametrize("mode", OPAQUE)
def test_modes_have_their_colours(mode: str) -> None:
    """Pillow#2574, Pillow#3011, Pillow#5991: 16-bit grey came out white; here it is taken by its high byte."""
    image, expected = OPAQUE[mode]
    np.testing.assert_array_equal(all_three(image), np.broadcast_to(expected, (6, 9, 3)))


@pytest.mark.parametrize("mode", CONVERTED)
def test_other_colour_spaces_come_back_to_rgb(mode: str) -> None:
    """pytorch/vision#244: three channels are not always RGB. Pillow's way back is lossy: by a few steps."""
    tolerance = {"YCbCr": 3, "HSV": 6, "LAB": 40}[mode]  # LAB: colours beyond the gamut of 8 bits
    difference = np.abs(all_three(CONVERTED[mode]).astype(int) - COLOURS)
    assert difference.max() <= tolerance
    assert difference.mean() <= 3


@pytest.mark.parametrize("mode", TRANSPARENT)
def test_transparency_lies_over_white(mode: str) -> None:
    """NVIDIA/DIGITS#85, meerk40t#962: see-through pixels were black; Pillow#6706: RGBa could not be converted."""
    image, expected = TRANSPARENT[mode]
    seen = all_three(image).astype(float)
    if mode == "PA":  # quantised: no more than about the same
        assert np.abs(seen - expected).mean() < 25
        return
    tolerance = 3 if mode in {"RGBa", "La"} else 1  # colours that were multiplied by a small alpha are coarse
    solid = ALPHA >= 64 if mode in {"RGBa", "La"} else np.full((6, 9), fill_value=True)
    assert np.abs(seen - np.broadcast_to(expected, seen.shape))[solid].max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "P, bytes", "I;16"])
def test_every_mode_at_every_orientation(mode: str, orientation: int) -> None:
    """Pillow#9109, kraken#760, kohya-ss/sd-scripts#1316: a photo of a phone lay on its side."""
    image, _ = (OPAQUE | TRANSPARENT)[mode]
    data = saved(image, exif=exif_of(orientation))
    expected = UPRIGHT[orientation](np.asarray(upright_rgb(image)))
    np.testing.assert_array_equal(all_three(opened(data)), expected)
    np.testing.assert_array_equal(service(data), expected)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_orientation_of_every_format(kind: str, orientation: int) -> None:
    """imageio#983, imazen/imageflow#90: PNG and WebP have an orientation, too."""
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    plain = service(saved(RGB, kind, **options))
    data = saved(RGB, kind, exif=exif_of(orientation), **options)
    np.testing.assert_array_equal(service(data), UPRIGHT[orientation](plain))
    np.testing.assert_array_equal(all_three(opened(data)), UPRIGHT[orientation](plain))


def test_an_orientation_survives_what_people_do_in_notebooks() -> None:
    """Pillow#4124: a copy, a conversion and a crop keep the orientation, and are brought upright as well."""
    image = opened(saved(RGB, exif=exif_of(6)))
    expected = UPRIGHT[6](COLOURS)
    for same in (image.copy(), image.convert("RGB"), image.crop((0, 0, 9, 6))):
        np.testing.assert_array_equal(all_three(same), expected)


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def xmp(orientation: int) -> str:
    return f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_the_orientation_of_xmp(compressed: bool, late: bool) -> None:
    """Pillow#4529: macOS writes a PNG's orientation as XMP; before the pixels or behind them."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp(8), zip=compressed)
    (kind, value, _), data = info.chunks[0], saved(RGB)
    place = data.rindex(b"IEND") - 4 if late else data.index(b"IDAT") - 4
    data = data[:place] + chunk(kind, value) + data[place:]
    np.testing.assert_array_equal(service(data), UPRIGHT[8](COLOURS))
    np.testing.assert_array_equal(all_three(opened(data)), UPRIGHT[8](COLOURS))


def test_exif_goes_before_xmp() -> None:
    """ImageMagick#1445: a picture with both, which contradict each other."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp(8))
    data = saved(RGB, pnginfo=info, exif=exif_of(3))
    np.testing.assert_array_equal(service(data), UPRIGHT[3](COLOURS))
    np.testing.assert_array_equal(all_three(opened(data)), UPRIGHT[3](COLOURS))


def test_exif_as_imagemagick_wrote_it() -> None:
    """exif-js#86, w3c/png#310: a text chunk with EXIF in hexadecimal digits."""
    exif = exif_of(6).tobytes()
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(exif):8}\n{exif.hex()}\n", zip=True)
    data = saved(RGB, pnginfo=info)
    np.testing.assert_array_equal(service(data), UPRIGHT[6](COLOURS))
    np.testing.assert_array_equal(all_three(opened(data)), UPRIGHT[6](COLOURS))


def test_exif_with_its_header_twice() -> None:
    """Pillow#8348: a camera wrote Exif twice before the data."""
    exif = b"Exif\0\0" + exif_of(6).tobytes()
    data = saved(RGB, "WEBP", lossless=True, exif=exif)
    np.testing.assert_array_equal(service(data), UPRIGHT[6](COLOURS))
    np.testing.assert_array_equal(all_three(opened(data)), UPRIGHT[6](COLOURS))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0rubbish",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x01\x36\0\0\0\0\0\0\0",  # "6", a text
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x02\0\x06\0\x06\0\0\0\0",  # two of them
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0\0\0\0\0",  # no such orientation
    ],
)
def test_a_broken_orientation_is_none(exif: bytes) -> None:
    """Pillow#4215, Pillow#3973, Pillow#8548: broken EXIF is no reason to refuse, or to turn, good pixels."""
    data = saved(RGB, "WEBP", lossless=True, exif=exif)
    np.testing.assert_array_equal(service(data), COLOURS)
    np.testing.assert_array_equal(all_three(opened(data)), COLOURS)


def test_a_tiff_is_turned_once() -> None:
    """Pillow#7381: Pillow has turned a TIFF already when it is loaded."""
    data = saved(RGB, "TIFF", exif=exif_of(6))
    np.testing.assert_array_equal(all_three(opened(data)), UPRIGHT[6](COLOURS))
    np.testing.assert_array_equal(np.asarray(open_image(encode_image(data))), UPRIGHT[6](COLOURS))


def png(width: int, depth: int, colour: int, row: bytes, transparent: bytes) -> bytes:
    """A PNG of one row, and of a value that stands for transparent pixels."""
    header = width.to_bytes(4, "big") + b"\0\0\0\x01" + bytes([depth, colour, 0, 0, 0])
    pixels = zlib.compress(b"\0" + row)
    chunks = chunk(b"IHDR", header) + chunk(b"tRNS", transparent) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize(
    ("depth", "colour", "row", "transparent", "expected"),
    [
        (1, 0, b"\x40", b"\0\0", [255, 255]),  # black is transparent, and the other white
        (1, 0, b"\x40", b"\0\x01", [0, 255]),
        (2, 0, b"\x60", b"\0\x01", [255, 170]),
        (4, 0, b"\x78", b"\0\x07", [255, 136]),
        (8, 0, b"\x07\x08", b"\0\x07", [255, 8]),
        (16, 0, b"\x07\x01\x07\x02", b"\x07\x01", [255, 7]),
        (8, 2, b"\x01\x02\x03\x01\x02\x04", b"\0\x01\0\x02\0\x03", [[255, 255, 255], [1, 2, 4]]),
        (16, 2, b"\x80\0\x40\0\x20\0" + b"\x90\0\x40\0\x20\0", b"\x80\0\x40\0\x20\0", [[255, 255, 255], [144, 64, 32]]),
    ],
)
def test_a_value_that_is_transparent(
    depth: int, colour: int, row: bytes, transparent: bytes, expected: list[Any], loaded: bool
) -> None:
    """Pillow#421, Pillow#3379, Pillow#9281: transparency without an alpha channel, at every depth."""
    data = png(2, depth, colour, row, transparent)
    image = opened(data)
    if loaded:
        image.load()
    seen = np.broadcast_to(np.reshape(expected, (1, 2, -1)), (1, 2, 3))
    np.testing.assert_array_equal(service(data), seen)
    np.testing.assert_array_equal(all_three(image), seen)


UNDEFINED = {
    "I": Image.fromarray(GREY_16.astype(np.int32)),
    "F": Image.fromarray(GREY_16.astype(np.float32)),
    "F, 0..1": Image.fromarray((GREY_16 / 65535).astype(np.float32)),
}


@pytest.mark.parametrize("name", UNDEFINED)
def test_what_has_no_range_is_refused_everywhere(name: str) -> None:
    """pytorch/vision#317, pytorch/vision#1099, Pillow#3011: floats and 32-bit integers, whose white nobody knows."""
    image = UNDEFINED[name]
    said = rf"mode '{image.mode}' has no defined range of values; scale it to 8 bits, 0\.\.255, first"
    with pytest.raises(UndefinedRangeError, match=said):
        upright_rgb(image)
    with pytest.raises(cdam.ImageError, match=said):
        encode_image(image)
    with pytest.raises(cdam.ImageError, match=said):
        encode_image(saved(image, "TIFF"))


@pytest.mark.parametrize("dtype", [np.uint16, np.int64, np.float32, np.bool_])
def test_arrays_are_of_8_bits(dtype: type) -> None:
    """pytorch/vision#448: an array's range is the caller's to say, for 16 bits as for floats."""
    with pytest.raises(cdam.ImageError, match=rf"uint8, 0\.\.255, not {np.dtype(dtype)}; scale it to 8 bits first"):
        encode_image(COLOURS.astype(dtype))


def test_arrays_with_alpha_or_channels_first_say_what_to_do() -> None:
    """pytorch/vision#320: a fourth channel was dropped without a word."""
    with pytest.raises(cdam.ImageError, match=r"\(6, 9, 4\); with transparency, give Image\.fromarray"):
        encode_image(np.asarray(with_alpha()))
    with pytest.raises(cdam.ImageError, match=r"\(3, 6, 9\); channels come last: pixels\.transpose\(1, 2, 0\)"):
        encode_image(COLOURS.transpose(2, 0, 1))


def test_an_image_without_pixels() -> None:
    """No file holds one, but one can be made in memory."""
    with pytest.raises(ValueError, match="the image has no pixels: 0 x 5"):
        upright_rgb(Image.new("RGB", (5, 0)))
    with pytest.raises(cdam.ImageError, match="no pixels"):
        encode_image(Image.new("RGB", (5, 0)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_file_that_was_closed_before_its_pixels_were_read(kind: str) -> None:
    """Pillow reads pixels when they are needed: after the block that opened the file there are none, and no word why."""
    with opened(saved(RGB, kind)) as image:
        pass
    with pytest.raises(ValueError, match="file was closed before its pixels were read"):
        upright_rgb(image)
    with pytest.raises(cdam.ImageError, match="file was closed before its pixels were read"):
        encode_image(image)


@pytest.mark.parametrize("kind", ["palette", "16 bits", "alpha", "32 bits"])
def test_a_mask_is_the_same_as_object_and_as_file(kind: str) -> None:
    """A small label in 16 bits is inside, though its high byte is black; what is see-through is outside."""
    inside = ALPHA > 127
    images = {
        "palette": palette(),
        "16 bits": Image.fromarray(inside.astype(np.uint16)),  # a label of 1: its high byte is 0
        "alpha": Image.merge("LA", (Image.new("L", (9, 6), 255), Image.fromarray(255 * inside.astype(np.uint8)))),
        "32 bits": Image.fromarray(7 * inside.astype(np.int32)),
    }
    image = images[kind]
    if kind == "palette":
        inside = (np.asarray(image.convert("RGB")) != 0).any(axis=2)
    expected = 255 * inside.astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(upright_mask(image)), expected)
    np.testing.assert_array_equal(np.asarray(decode_mask(encode_mask(image), ImageLimits(), "mask")), expected)
    np.testing.assert_array_equal(np.asarray(open_mask(encode_mask(image))), expected)
    if kind != "32 bits":
        for message in (common_pb2.Image(encoded=saved(image)), encode_mask(saved(image, "TIFF"))):
            np.testing.assert_array_equal(np.asarray(decode_mask(message, ImageLimits(), "mask")), expected)
            np.testing.assert_array_equal(np.asarray(open_mask(message)), expected)


@pytest.fixture(scope="module")
def explainer() -> Explainer:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=64, depth=2, num_heads=2, num_classes=3
    ).eval()
    return Explainer(model)


@pytest.mark.parametrize("orientation", [1, 6])
def test_the_notebook_explains_what_the_service_sees(explainer: Explainer, orientation: int) -> None:
    """Pillow#9109, Pillow#2574: the map of a file is the same, opened in a notebook or sent to the service."""
    ramp = np.add.outer(np.linspace(0, 40000, 96), np.linspace(0, 25000, 64)).astype(np.uint16)
    for image in (Image.fromarray(ramp), Image.merge("RGBA", [Image.fromarray((ramp >> 8).astype(np.uint8))] * 4)):
        data = saved(image, exif=exif_of(orientation))
        seen = decode_image(common_pb2.Image(encoded=data), ImageLimits())
        assert seen.size == ((96, 64) if orientation == 6 else (64, 96))
        expected = explainer(seen, Output(1)).maps[0].scores
        got = explainer(opened(data), Output(1)).maps[0].scores
        np.testing.assert_allclose(got, expected, atol=1e-6 * np.abs(expected).max())


def test_the_notebook_refuses_what_has_no_range(explainer: Explainer) -> None:
    """Pillow#3011: an image of mode I or F was clipped to white, and explained."""
    for image in UNDEFINED.values():
        with pytest.raises(ValueError, match=f"mode '{image.mode}'"):
            explainer(image, Output(1))


def test_the_service_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow#5991: PNGs of 16 bits were of mode I in older versions of Pillow; were they again, they would be refused."""
    monkeypatch.setitem(PngImagePlugin._MODES, (16, 0), ("I", "I;16B"))
    with pytest.raises(InvalidArgumentError, match="mode 'I' has no defined range"):
        service(saved(Image.fromarray(GREY_16)))
