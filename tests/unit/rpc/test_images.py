"""Images from strangers: colours that come out right, and bytes that are refused."""

import io
import random
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from cdam.v1 import common_pb2
from cdam_server.errors import InvalidArgumentError
from cdam_server.rpc.images import FORMATS, ImageLimits, decode_image

LIMITS = ImageLimits(max_bytes=4 * 1024 * 1024, max_pixels=2_000_000)
RNG = np.random.default_rng(0)
PHOTO = Image.fromarray(RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((42, 30), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(data: bytes, limits: ImageLimits = LIMITS) -> Image.Image:
    image = decode_image(common_pb2.Image(encoded=data), limits)
    assert image.mode == "RGB"
    return image


def pixel(data: bytes) -> tuple[int, ...]:
    return tuple(np.asarray(decode(data))[0, 0].tolist())


def refusal(image: common_pb2.Image, limits: ImageLimits = LIMITS, **kwargs: str) -> InvalidArgumentError:
    with pytest.raises(InvalidArgumentError) as caught:
        decode_image(image, limits, **kwargs)
    return caught.value


def refused(data: bytes, limits: ImageLimits = LIMITS) -> str:
    error = refusal(common_pb2.Image(encoded=data), limits)
    assert error.field == "image.encoded"
    assert "0x" not in error.description  # no addresses of objects
    return error.description


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG from rows that have their filter bytes, with `extra` chunks before the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# --- what comes out right


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_files_come_back_as_they_were(kind: str) -> None:
    image = decode(encode(PHOTO, kind, **({"lossless": True} if kind == "WEBP" else {})))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(PHOTO))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30, "subsampling": 2}])
def test_jpeg_is_what_pil_makes_of_it(options: dict[str, Any]) -> None:
    data = encode(PHOTO, "JPEG", **options)
    with Image.open(io.BytesIO(data)) as file:
        np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(file.convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_other_modes_become_rgb(mode: str) -> None:
    source = PHOTO.convert(mode)
    np.testing.assert_array_equal(np.asarray(decode(encode(source))), np.asarray(source.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(PHOTO, kind, exif=exif)
    with Image.open(io.BytesIO(data)) as file:
        expected = ImageOps.exif_transpose(file).convert("RGB")
    image = decode(data)
    assert image.size == expected.size
    assert image.size == ((30, 42) if orientation >= 5 else (42, 30))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"rubbish"]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_broken_exif_is_ignored(kind: str, exif: bytes) -> None:
    assert decode(encode(PHOTO, kind, exif=exif)).size == PHOTO.size


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_do_not_exist_are_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert decode(encode(PHOTO, "JPEG", exif=exif)).size == PHOTO.size


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize(("alpha", "expected"), [(0, (255, 255, 255)), (128, (127, 177, 227)), (255, (0, 100, 200))])
def test_transparency_is_laid_over_white(kind: str, alpha: int, expected: tuple[int, ...]) -> None:
    data = encode(
        Image.new("RGBA", (8, 8), (0, 100, 200, alpha)),
        kind,
        **({"lossless": True, "exact": True} if kind == "WEBP" else {}),
    )
    assert pixel(data) == pytest.approx(expected, abs=1)


def test_transparent_grey_is_laid_over_white() -> None:
    assert pixel(encode(Image.new("LA", (4, 4), (100, 0)))) == (255, 255, 255)
    assert pixel(encode(Image.new("LA", (4, 4), (100, 255)))) == (100, 100, 100)


@pytest.mark.parametrize("transparency", [1, b"\xff\x00\xff", b"\xff\x80\xff"])
def test_transparent_palette_entry_is_laid_over_white(transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1])
    out = decode(encode(image, transparency=transparency))
    assert out.getpixel((0, 0)) == (10, 20, 30)
    opacity = 128 / 255 if transparency == b"\xff\x80\xff" else 0
    assert out.getpixel((1, 0)) == pytest.approx([255 - opacity * (255 - v) for v in (40, 50, 60)], abs=1)


@pytest.mark.parametrize(
    ("depth", "row", "sample", "seen"),
    [
        (1, b"\x00\x40", 1, [0, 255]),
        (2, b"\x00\x10", 1, [0, 255]),
        (2, b"\x00\x20", 1, [0, 170]),
        (4, b"\x00\x07", 7, [0, 255]),
        (4, b"\x00\x07", 8, [0, 119]),
        (8, b"\x00\x00\xc8", 200, [0, 255]),
        (16, b"\x00\x00\x00\xc8\x01", 0xC801, [0, 255]),
        (16, b"\x00\x00\x00\xc8\x02", 0xC801, [0, 200]),
    ],
)
def test_transparent_grey_value_at_every_depth(depth: int, row: bytes, sample: int, seen: list[int]) -> None:
    image = decode(png(2, 1, depth, 0, row, chunk(b"tRNS", struct.pack(">H", sample))))
    assert np.asarray(image)[0, :, 0].tolist() == seen


def test_transparent_colour_of_16_bits() -> None:
    row = b"\x00" + struct.pack(">6H", 0x8000, 0x4000, 0xFFFF, 0, 0, 0)
    image = decode(png(2, 1, 16, 2, row, chunk(b"tRNS", struct.pack(">3H", 0x8000, 0x4000, 0xFFFF))))
    assert [image.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (0, 0, 0)]


def test_grey_of_16_bits_is_scaled_not_clipped() -> None:
    samples = np.linspace(0, 65535, 64).astype(np.uint16)[None]
    image = decode(encode(Image.fromarray(samples)))
    np.testing.assert_array_equal(np.asarray(image), np.repeat((samples >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_grey_and_colour_of_16_bits_agree() -> None:
    samples = np.linspace(0, 65535, 64).astype(">u2")
    grey = png(64, 1, 16, 0, b"\x00" + samples.tobytes())
    colour = png(64, 1, 16, 2, b"\x00" + np.repeat(samples, 3).tobytes())
    np.testing.assert_array_equal(np.asarray(decode(grey)), np.asarray(decode(colour)))


@pytest.mark.parametrize(
    ("ink", "expected"),
    [
        ((0, 255, 255, 0), (255, 0, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0, 0, 0, 0), (255, 255, 255)),
        ((255, 0, 0, 0), (0, 255, 255)),
    ],
)
def test_cmyk_jpeg(ink: tuple[int, ...], expected: tuple[int, ...]) -> None:
    data = encode(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100)
    assert b"Adobe" in data
    assert pixel(data) == pytest.approx(expected, abs=3)


def test_ycck_jpeg() -> None:
    # What PIL stores as the (inverted) inks of CMYK is read as luma, chroma and black once the marker says so.
    luma, blue, red = np.asarray(Image.new("RGB", (1, 1), (230, 40, 90)).convert("YCbCr"))[0, 0].tolist()
    data = bytearray(encode(Image.new("CMYK", (16, 16), (255 - luma, 255 - blue, 255 - red, 0)), "JPEG", quality=100))
    data[data.index(b"Adobe") + 11] = 2
    assert pixel(bytes(data)) == pytest.approx((255 - 230, 255 - 40, 255 - 90), abs=3)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    data = encode(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert pixel(data) == (255, 0, 0)


def test_first_picture_of_a_multi_picture_jpeg() -> None:
    data = encode(
        Image.new("RGB", (16, 16), "red"), "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16), "blue")]
    )
    assert pixel(data) == pytest.approx((254, 0, 0), abs=2)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 200), (2000, 1)])
def test_odd_sizes(width: int, height: int) -> None:
    assert decode(encode(Image.new("RGB", (width, height)))).size == (width, height)


# --- what is refused


def test_no_source() -> None:
    assert refusal(common_pb2.Image()).field == "image.source"
    assert refusal(common_pb2.Image(), field="images[3]").field == "images[3].source"


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"hello", bytes(1000), b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBPVP8X"]
)
def test_not_an_image(data: bytes) -> None:
    assert refused(data)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_formats_beyond_the_list(kind: str) -> None:
    assert "JPEG, PNG or WebP" in refused(encode(PHOTO, kind))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated(kind: str, part: float) -> None:
    data = encode(PHOTO, kind)
    assert refused(data[: int(len(data) * part)])


def test_zero_pixels() -> None:
    assert refused(png(0, 0, 8, 2, b""))
    assert refused(png(0, 5, 8, 2, bytes(5)))


def test_more_bytes_than_allowed() -> None:
    data = encode(PHOTO)
    assert decode(data, ImageLimits(max_bytes=len(data)))
    assert "limit" in refused(data, ImageLimits(max_bytes=len(data) - 1))


def test_more_pixels_than_allowed() -> None:
    data = encode(PHOTO)
    assert decode(data, ImageLimits(max_pixels=42 * 30))
    assert "30 x 42" in refused(data, ImageLimits(max_pixels=42 * 30 - 1))


def huge_png(width: int, height: int) -> bytes:
    """A small file that decodes to width * height black pixels."""
    packer = zlib.compressobj(9)
    row = bytes(1 + width)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    small = png(width, height, 8, 0, b"")
    return small[: small.index(b"IDAT") - 4] + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: ImageFile.ImageFile) -> None:
        pytest.fail("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    data = huge_png(12_000, 10_000)
    assert len(data) < 400_000
    assert "limit of 50000000" in refused(data, ImageLimits())


def test_a_bomb_is_refused_where_warnings_are_errors() -> None:
    header = png(12_000, 10_000, 8, 2, b"")
    assert "limit" in refused(header, ImageLimits())
    header = png(60_000, 60_000, 8, 2, b"")
    assert "limit" in refused(header, ImageLimits())


WEBP_HEADERS: dict[str, Callable[[int, int], bytes]] = {
    "VP8X": lambda w, h: bytes([0x10, 0, 0, 0]) + (w - 1).to_bytes(3, "little") + (h - 1).to_bytes(3, "little"),
    "VP8L": lambda w, h: b"\x2f" + ((w - 1) | (h - 1) << 14).to_bytes(4, "little") + bytes(5),
    "VP8 ": lambda w, h: b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", w, h),
}


@pytest.mark.parametrize("kind", WEBP_HEADERS)
def test_a_large_webp_is_refused_before_pil_makes_its_canvas(kind: str) -> None:
    body = WEBP_HEADERS[kind](16_000, 12_345)
    file = b"WEBP" + kind.encode() + struct.pack("<I", len(body)) + body
    assert "12345 x 16000" in refused(b"RIFF" + struct.pack("<I", len(file)) + file)


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0"}], ids=["VP8", "VP8L", "VP8X"])
def test_webp_sizes_are_read_from_real_files(options: dict[str, Any]) -> None:
    data = encode(Image.new("RGB", (123, 77)), "WEBP", **options)
    assert "77 x 123" in refused(data, ImageLimits(max_pixels=100))
    assert decode(data).size == (123, 77)


@pytest.mark.parametrize("after", [False, True])
def test_compressed_text_that_explodes(after: bool) -> None:
    bomb = chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(50_000_000), 9))
    good = png(1, 1, 8, 0, b"\0\0")
    assert refused(good[:-12] + bomb + good[-12:] if after else png(1, 1, 8, 0, b"\0\0", bomb))


def test_much_text_in_many_chunks() -> None:
    text = chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(PngImagePlugin.MAX_TEXT_CHUNK), 9))
    assert refused(png(1, 1, 8, 0, b"\0\0", *[text] * 65))


def test_a_colour_profile_that_explodes() -> None:
    assert refused(png(1, 1, 8, 0, b"\0\0", chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(50_000_000), 9))))


def test_a_progressive_jpeg_of_endless_scans() -> None:
    data = encode(PHOTO, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    endless = data[:-2] + data[last:-2] * 100 + b"\xff\xd9"
    assert "scans" in refused(endless, ImageLimits(max_pixels=42 * 30))
    assert decode(data, ImageLimits(max_pixels=42 * 30))
    assert decode(endless)


def raw(height: int, width: int, channels: int, data: bytes) -> common_pb2.Image:
    return common_pb2.Image(raw=common_pb2.RawImage(height=height, width=width, channels=channels, data=data))


@pytest.mark.parametrize("channels", [1, 3])
def test_raw_pixels(channels: int) -> None:
    pixels = RNG.integers(0, 256, (4, 6, channels), dtype=np.uint8)
    image = decode_image(raw(4, 6, channels, pixels.tobytes()), LIMITS)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.broadcast_to(pixels, (4, 6, 3)))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (raw(0, 6, 3, b""), "image.raw.height"),
        (raw(4, 0, 3, b""), "image.raw.width"),
        (raw(4, 6, 0, b""), "image.raw.channels"),
        (raw(4, 6, 4, bytes(96)), "image.raw.channels"),
        (raw(4, 6, 3, bytes(71)), "image.raw.data"),
        (raw(4, 6, 3, bytes(73)), "image.raw.data"),
        (raw(4, 6, 1, b""), "image.raw.data"),
        (raw(1, 1, 1, bytes(LIMITS.max_bytes + 1)), "image.raw.data"),
        (raw(1000, 2001, 1, bytes(2_001_000)), "image.raw"),
        (raw(2**32 - 1, 2**32 - 1, 3, b""), "image.raw"),
    ],
)
def test_raw_pixels_that_do_not_fit(message: common_pb2.Image, field: str) -> None:
    assert refusal(message).field == field


# --- bytes of any kind


def mutate(data: bytes, random_: random.Random) -> bytes:
    mutant = bytearray(data)
    for _ in range(random_.choice([1, 1, 2, 5, 20])):
        at = random_.randrange(len(mutant)) if random_.random() < 0.5 else random_.randrange(min(64, len(mutant)))
        match random_.randrange(4):
            case 0:
                mutant[at] = random_.choice([0, 1, 0x7F, 0x80, 0xFF, random_.randrange(256)])
            case 1:
                del mutant[at : at + random_.choice([1, 4, 40])]
            case 2:
                mutant[at:at] = random_.randbytes(random_.choice([1, 4, 40]))
            case _:
                other = random_.randrange(len(mutant))
                mutant[at : at + 8] = mutant[other : other + 8]
        if not mutant:
            return b""
    return bytes(mutant)


def repaired(data: bytes) -> bytes:
    """The same with the checksums of PNG chunks set right, so that a mutation gets past them."""
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        if at + 12 + length > len(data):
            break
        out += chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + length])
        at += 12 + length
    return bytes(out + data[at:])


def seeds() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    frames: dict[str, Any] = {"save_all": True, "append_images": [PHOTO.transpose(Image.Transpose.ROTATE_180)]}
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", "<tiff:Orientation>6</tiff:Orientation>", zip=True)
    info.add_text("key", "value", zip=True)
    return {
        "jpeg": encode(PHOTO, "JPEG", exif=exif, icc_profile=bytes(200), comment=b"comment"),
        "jpeg-progressive-cmyk": encode(PHOTO.convert("CMYK"), "JPEG", progressive=True),
        "mpo": encode(PHOTO, "MPO", **frames),
        "png": encode(PHOTO, exif=exif, pnginfo=info, icc_profile=bytes(200), dpi=(72, 72)),
        "png-palette": encode(PHOTO.convert("P"), transparency=b"\x00\x80\xff"),
        "png-16": encode(Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257)),
        "apng": encode(PHOTO, **frames),
        "webp": encode(PHOTO, "WEBP", exif=exif, icc_profile=bytes(200)),
        "webp-lossless-alpha": encode(PHOTO.convert("RGBA"), "WEBP", lossless=True),
        "webp-animated": encode(PHOTO, "WEBP", **frames),
    }


@pytest.mark.parametrize("name", seeds())
@pytest.mark.filterwarnings("default")  # as in production: PIL's warnings about bad files go to the log
def test_damaged_files_are_decoded_or_refused_but_never_an_internal_error(
    name: str, recwarn: pytest.WarningsRecorder
) -> None:
    original = seeds()[name]
    decode(original)
    random_ = random.Random(name)
    outcomes = {True: 0, False: 0}
    for _ in range(300):
        data = mutate(original, random_)
        if "png" in name and random_.random() < 0.8:
            data = repaired(data)
        try:
            image = decode(data)
        except InvalidArgumentError:
            outcomes[False] += 1
        else:
            assert image.width * image.height <= LIMITS.max_pixels
            outcomes[True] += 1
    assert outcomes[False] > 20, outcomes


def test_threads_agree() -> None:
    files = [*seeds().values(), b"rubbish", huge_png(2000, 2000)] * 10

    def attempt(data: bytes) -> bytes | str:
        try:
            return decode(data).tobytes()
        except InvalidArgumentError as error:
            return str(error)

    alone = [attempt(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(attempt, files)) == alone
