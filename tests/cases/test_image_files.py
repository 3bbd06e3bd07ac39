"""Good files that other programs called damaged, and bad ones that only look good.

Expected pixels are those of the same picture in a plain file.
"""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

import cdam
from cdam._images import open_image
from cdam.v1 import common_pb2
from cdam_images import upright_rgb
from cdam_images.files import MAX_INFLATED, MAX_PARTS, find_picture
from cdam_images.orientation import exif_orientation
from cdam_server.errors import InvalidArgumentError
from cdam_server.rpc.images import ImageLimits, decode_image

RNG = np.random.default_rng(3)
PHOTO = Image.fromarray(RNG.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((96, 72), Image.Resampling.BICUBIC)
OTHER = PHOTO.transpose(Image.Transpose.ROTATE_180)
LARGEST = ImageLimits(max_pixels=PHOTO.width * PHOTO.height)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def seen(data: bytes, limits: ImageLimits = LARGEST) -> NDArray[np.uint8]:
    return np.asarray(decode_image(common_pb2.Image(encoded=data), limits))


def assert_same(data: bytes, plain: bytes) -> None:
    """That the service and an overlay see in a file what Pillow sees in a plain one."""
    with Image.open(io.BytesIO(plain)) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(seen(data), expected)
    np.testing.assert_array_equal(np.asarray(open_image(common_pb2.Image(encoded=data))), expected)


def refused(data: bytes, said: str, limits: ImageLimits = LARGEST) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        decode_image(common_pb2.Image(encoded=data), limits)


# --- JPEG

BASELINE = saved(PHOTO, "JPEG", quality=90)
PROGRESSIVE = saved(PHOTO, "JPEG", quality=90, progressive=True)
RESTARTS = saved(PHOTO, "JPEG", quality=90, restart_marker_blocks=1)
CMYK = saved(PHOTO.convert("CMYK"), "JPEG", quality=90)
JPEGS = {"baseline": BASELINE, "progressive": PROGRESSIVE, "restarts": RESTARTS, "cmyk": CMYK}


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def video(length: int) -> bytes:
    """As it stands behind a picture: hardly less random than noise, and full of what looks like markers."""
    return b"MotionPhoto_Data\0\0\0\x18ftypmp42" + RNG.integers(0, 256, length, dtype=np.uint8).tobytes()


@pytest.mark.parametrize("kind", JPEGS)
def test_a_video_behind_the_picture(kind: str) -> None:
    """libjxl#3502, gkv311/sview#138: the photos in motion of phones."""
    assert_same(JPEGS[kind] + video(8_000_000), JPEGS[kind])


def test_a_video_behind_a_picture_whose_end_is_not_marked() -> None:
    """libjpeg-turbo#163: panoramas of a phone have no end marker, and a video at once behind the last scan."""
    for kind in ("baseline", "cmyk"):
        data = JPEGS[kind]
        assert data.endswith(b"\xff\xd9")
        for _ in range(5):
            assert_same(data[:-2] + b"\0\0\x01\x0a" + video(500_000), data)


@pytest.mark.parametrize(
    "padding", [bytes(1_000_000), b"\xff" * 1_000_000, b"\xff\xd9" * 500_000, b"\xff\xda\0\x08" * 250_000]
)
def test_padding_behind_the_end(padding: bytes) -> None:
    """digital-preservation/pronom-research-week#13: megabytes of padding after the end marker."""
    for kind, data in JPEGS.items():
        assert_same(data + padding, data)
        assert len(find_picture(data + padding).data) <= len(data), kind


def test_a_scan_that_is_cut_short_before_a_video_is_refused() -> None:
    """intel/libyami#801: an end that is not marked is no proof that all is there."""
    for kind in ("baseline", "cmyk"):
        data = JPEGS[kind]
        scan = data.rindex(b"\xff\xda")
        for part in (0.2, 0.5, 0.9):
            cut = scan + int((len(data) - scan) * part)
            refused(data[:cut] + b"\xff\xe7\0\x02" + video(100_000), "damaged or truncated")
            refused(data[:cut] + b"\xff\x9b" + data[cut:], "damaged or truncated")


def test_pictures_behind_the_picture() -> None:
    """Pillow#1138, lucyparsons/OpenOversight#1098: depth and gain maps, stereo; the first picture is the photo."""
    data = saved(PHOTO, "MPO", save_all=True, append_images=[OTHER], quality=90)
    assert data.count(b"\xff\xd8\xff") == 2
    assert_same(data, BASELINE)
    assert_same(BASELINE + saved(OTHER, "JPEG"), BASELINE)


def test_a_directory_of_pictures_that_is_broken() -> None:
    """Pillow#1138: what is said of further pictures does not concern the first."""
    for body in (b"MPF\0", b"MPF\0rubbish", b"MPF\0II*\0\xff\xff\xff\xff"):
        assert_same(with_segments(BASELINE, segment(0xE2, body)), BASELINE)


@pytest.mark.parametrize("kind", JPEGS)
def test_whole_pictures_inside_metadata(kind: str) -> None:
    """libjxl#3502 and Pillow#4370: thumbnails and previews, with markers of their own, in one segment or several."""
    thumbnail = saved(OTHER.resize((24, 18)), "JPEG", progressive=True)
    segments = [segment(marker, thumbnail) for marker in (0xE1, 0xE5, 0xED, 0xEF, 0xFE)]
    assert_same(with_segments(JPEGS[kind], *segments * 40), JPEGS[kind])


def test_a_large_colour_profile() -> None:
    """Pillow#2445's sibling for JPEG: a profile of ten megabytes in segments of 64 kB each, and its bytes are any."""
    profile = RNG.integers(0, 256, 10_000_000, dtype=np.uint8).tobytes()
    assert_same(saved(PHOTO, "JPEG", quality=90, icc_profile=profile), BASELINE)


def test_fill_bytes_before_markers() -> None:
    """nothings/stb#421: 138 images of ImageNet have them; OpenPDF#1247."""
    for kind, data in JPEGS.items():
        filled = bytearray(data[:2])
        for part in _parts(data):
            filled += b"\xff" * 3 + part
        assert len(filled) > len(data), kind
        assert_same(bytes(filled), data)


def _parts(data: bytes) -> list[bytes]:
    """The segments of a JPEG, each with the scan that follows it, and the end."""
    parts, position = [], 2
    while data[position + 1] != 0xD9:
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if data[position + 1] == 0xDA:
            while data[end] != 0xFF or data[end + 1] in {0, *range(0xD0, 0xD8)}:
                end += 1
        parts.append(data[position:end])
        position = end
    return [*parts, data[position:]]


def test_stray_bytes_between_segments() -> None:
    """Pillow#1977: FF 00 and other bytes before a marker; jpeg-js#66: at the end of a scan."""
    for stray in (b"\xff\0\xff\0", b"\0\0\0", b"rubbish"):
        for data in (BASELINE, PROGRESSIVE):
            *parts, end = _parts(data)
            assert_same(data[:2] + b"".join(part + stray for part in parts) + end, data)


def test_a_comment_whose_length_is_wrong() -> None:
    """mozilla/pdf.js#8170: too short by some bytes, or by all."""
    for length in (0, 1, 2, 5):
        assert_same(with_segments(BASELINE, b"\xff\xfe" + length.to_bytes(2, "big") + b"a comment"), BASELINE)


def test_exif_that_would_take_for_ever() -> None:
    """ianare/exif-py#249: entries that each claim all of a large block; the orientation alone is read."""
    size = 4_000_000
    entry = struct.pack("<HHLL", 0x9286, 7, size - 100_000, 8)
    orientation = struct.pack("<HHLL", 0x0112, 3, 1, 6)
    table = struct.pack("<H", 8000) + orientation + entry * 7999
    exif = (b"II*\0\x08\0\0\0" + table).ljust(size, b"\0")
    data = saved(PHOTO, "PNG")
    place = data.index(b"IDAT") - 4
    turned = seen(data[:place] + chunk(b"eXIf", exif) + data[place:])
    np.testing.assert_array_equal(turned, np.rot90(np.asarray(PHOTO), -1))


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_a_truncated_scan_is_refused(kind: str, part: float) -> None:
    """Pillow's reports of truncated files: half a picture is no picture, with a thumbnail or without."""
    thumbnail = segment(0xE1, b"Exif\0\0" + saved(OTHER.resize((24, 18)), "JPEG"))
    data = with_segments(JPEGS[kind], thumbnail)
    refused(data[: len(thumbnail) + int(len(JPEGS[kind]) * part)], "damaged or truncated")


def test_a_bomb_of_scans_is_refused_with_or_without_a_video() -> None:
    """libjpeg-turbo's "progressive bombs": each scan passes over the whole picture."""
    for data in (PROGRESSIVE, BASELINE):
        scan = data[data.rindex(b"\xff\xda") : -2]
        bomb = data[:-2] + scan * 100 + b"\xff\xd9"
        refused(bomb, "is a JPEG of 1[01][0-9] scans, too many for its size")
        refused(bomb + video(100_000), "is a JPEG of 1[01][0-9] scans")


def test_countless_parts_are_refused() -> None:
    refused(with_segments(BASELINE, segment(0xE1, b"") * (MAX_PARTS + 1)), f"more than {MAX_PARTS} segments")
    refused(b"\xff\xd8" + b"\xff\xd0" * (MAX_PARTS + 1), f"more than {MAX_PARTS} segments")
    png = saved(PHOTO, "PNG")
    refused(png[:33] + chunk(b"teSt", b"") * (MAX_PARTS + 1) + png[33:], f"more than {MAX_PARTS} segments")
    webp = saved(PHOTO, "WEBP", icc_profile=bytes(500))
    assert webp[12:16] == b"VP8X"
    body = webp[8:30] + b"teSt\0\0\0\0" * (MAX_PARTS + 1) + webp[30:]
    refused(b"RIFF" + struct.pack("<L", len(body)) + body, f"more than {MAX_PARTS} segments")


# --- PNG


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


PNG = saved(PHOTO, "PNG")


def with_chunks(*chunks: bytes, after: bool = False) -> bytes:
    place = PNG.rindex(b"IEND") - 4 if after else PNG.index(b"IDAT") - 4
    return PNG[:place] + b"".join(chunks) + PNG[place:]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"iCCP"])
def test_text_and_profiles_beyond_what_pillow_reads(kind: bytes, after: bool) -> None:
    """Pillow#8363, Pillow#5610, Pillow#2445, KatherLab/STAMP#76: "Decompressed data too large", in pictures that are good."""
    text = RNG.integers(97, 123, 3_000_000, dtype=np.uint8).tobytes()
    body = {
        b"tEXt": b"key\0" + text,
        b"zTXt": b"key\0\0" + zlib.compress(text),
        b"iTXt": b"key\0\x01\0\0\0" + zlib.compress(text),
        b"iCCP": b"profile\0\0" + zlib.compress(text),
    }[kind]
    data = with_chunks(chunk(kind, body), after=after)
    if kind != b"tEXt":
        with pytest.raises(ValueError, match=r"[Tt]oo large"):
            Image.open(io.BytesIO(data)).load()
    assert_same(data, PNG)


def test_much_text_in_many_chunks() -> None:
    """PixivUtil2#269's kind: 20 MB of it, which a program left in its own pictures."""
    text = RNG.integers(97, 123, 1_000_000, dtype=np.uint8).tobytes()
    assert_same(with_chunks(*[chunk(b"zTXt", b"key%d\0\0" % i + zlib.compress(text, 1)) for i in range(20)]), PNG)


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_metadata_that_explode_are_refused(kind: bytes) -> None:
    """Pillow#1060 (CVE-2014-9601): kilobytes that become gigabytes."""
    bomb = zlib.compress(bytes(MAX_INFLATED + 1), 9)
    body = {b"zTXt": b"k\0\0", b"iTXt": b"k\0\x01\0\0\0", b"iCCP": b"p\0\0"}[kind] + bomb
    refused(with_chunks(chunk(kind, body)), f"metadata that inflate to more than {MAX_INFLATED} bytes")
    half = zlib.compress(bytes(MAX_INFLATED // 2), 9)
    halves = [chunk(b"zTXt", b"k%d\0\0" % i + half) for i in range(3)]
    refused(with_chunks(*halves, after=True), "metadata that inflate")


def test_metadata_that_are_damaged() -> None:
    """Pillow#7817: a wrong method of compression, a wrong checksum, broken deflate: pixels are as good as before."""
    wrong = bytearray(chunk(b"gAMA", struct.pack(">L", 45455)))
    wrong[-1] ^= 1
    damaged = [
        chunk(b"iCCP", b"profile\0\x07" + zlib.compress(b"x")),
        chunk(b"iCCP", b"no end"),
        chunk(b"zTXt", b"key\0\0rubbish"),
        chunk(b"zTXt", b"key\0\x01" + zlib.compress(b"x")),
        chunk(b"iTXt", b"key\0"),
        chunk(b"tEXt", b""),
        chunk(b"pHYs", b"\0"),
        chunk(b"eXIf", b""),
        bytes(wrong),
    ]
    for part in damaged:
        for after in (False, True):
            assert_same(with_chunks(part, after=after), PNG)


@pytest.mark.parametrize(
    "tail", [b"\0\0", bytes(4096), b"PK\x03\x04 and the rest of an archive", b"\0\0\0\x05IENDxxxxxxxxx"]
)
def test_what_follows_the_end_of_a_png(tail: bytes) -> None:
    """libjxl#4383, paolobarbolini/img-parts#8, google/zopfli#132: browsers and editors open these."""
    assert_same(PNG + tail, PNG)
    assert_same(PNG + PNG[:100] + tail, PNG)


def test_an_animation_whose_later_frames_are_broken() -> None:
    """Pillow#6252's kind: a broken chunk behind the pixels; of an animation the first frame is taken."""
    data = saved(PHOTO, "PNG", save_all=True, append_images=[OTHER])
    assert_same(data, PNG)
    place = data.index(b"fdAT")
    assert_same(data[: place + 4] + b"\xff" * 4 + data[place + 8 :], PNG)
    assert_same(with_chunks(chunk(b"fcTL", b""), after=True), PNG)


def test_pixels_that_are_damaged_are_refused() -> None:
    place = PNG.index(b"IDAT") + 30
    refused(PNG[:place] + b"\0\0\0\0" + PNG[place + 4 :], "damaged")
    refused(PNG[: len(PNG) // 2], "damaged")
    refused(PNG[:8] + PNG[33:], "damaged|not a JPEG")  # no header


# --- WebP


@pytest.mark.parametrize("lossless", [False, True])
def test_a_webp_with_large_metadata(lossless: bool) -> None:
    """Pillow#2445's sibling for WebP: profile, EXIF and XMP of megabytes, and a tail."""
    plain = saved(PHOTO, "WEBP", lossless=lossless)
    noise = RNG.integers(0, 256, 2_000_000, dtype=np.uint8).tobytes()
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x01\0\0\0\0\0\0" + noise
    data = saved(PHOTO, "WEBP", lossless=lossless, icc_profile=noise, exif=exif, xmp=noise)
    assert len(data) > 6_000_000
    assert_same(data, plain)
    assert_same(data + noise, plain)
    assert_same(plain + noise, plain)


def test_the_first_frame_of_a_webp_whose_others_are_broken() -> None:
    data = saved(PHOTO, "WEBP", lossless=True, save_all=True, append_images=[OTHER, PHOTO])
    assert_same(data, PNG)
    place = data.rindex(b"ANMF") + 40
    assert_same(data[:place] + bytes(20) + data[place + 20 :], PNG)


@pytest.mark.parametrize("wrong", [-9, -1, 1, 1_000_000])
def test_a_webp_whose_header_counts_its_bytes_wrongly(wrong: int) -> None:
    """A chunk says how long it is, too; whoever cut off or appended a chunk forgot the file's header."""
    for options in ({}, {"lossless": True}, {"xmp": b"<x/>"}):
        data = saved(PHOTO, "WEBP", **options)
        size = struct.unpack_from("<L", data, 4)[0] + wrong
        assert_same(data[:4] + struct.pack("<L", size) + data[8:], data)


def test_a_webp_with_alpha_keeps_it() -> None:
    alpha = Image.fromarray(RNG.integers(0, 256, (72, 96), dtype=np.uint8))
    image = Image.merge("RGBA", (*PHOTO.split(), alpha))
    exif = Image.Exif()
    exif[0x0112] = 6
    for lossless in (False, True):
        plain = saved(image, "WEBP", lossless=lossless, exact=True)
        data = saved(image, "WEBP", lossless=lossless, exact=True, exif=exif, icc_profile=bytes(500))
        np.testing.assert_array_equal(seen(data), np.rot90(seen(plain), -1))
        with Image.open(io.BytesIO(plain)) as file:
            assert file.mode == "RGBA"


# --- all of them


@given(
    st.binary(max_size=80),
    st.sampled_from([b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"II*\0\x0a\0\0\0", b"Exif\0\0MM\0*\0\0\0\x08"]),
)
def test_the_orientation_is_read_as_pillow_reads_it(body: bytes, head: bytes) -> None:
    """Pillow#4215, Pillow#8348: whatever stands in EXIF, the file and the image opened from it turn alike."""
    order = "<" if b"II" in head else ">"
    entry = struct.pack(f"{order}HHHL", 1, 0x0112, 3, 1)
    for exif in (head + body, head + entry + body):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of most of these
            pillow = Image.Exif()
            try:
                pillow.load(b"Exif\0\0" + exif)
                said = pillow.get(0x0112)
            except Exception:  # noqa: BLE001 - it promises no set of exceptions
                said = None
        try:
            ours = exif_orientation(b"Exif\0\0" + exif)
        except (ValueError, struct.error):
            ours = None
        usual = range(2, 9)
        assert (said if isinstance(said, int) and said in usual else 1) == (ours if ours in usual else 1)


def _mutated(data: bytes, random_: random.Random) -> bytes:
    mutant = bytearray(data)
    for _ in range(random_.choice([1, 1, 2, 5])):
        at = random_.randrange(2, len(mutant))
        length = random_.choice([1, 4, 40])
        match random_.randrange(3):
            case 0:
                mutant[at] = random_.randrange(256)
            case 1:
                mutant[at:at] = random_.choice([random_.randbytes(length), b"\xff" * length, bytes(length)])
            case _:
                del mutant[at : at + length]
    return bytes(mutant)


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.parametrize("name", ["baseline", "progressive", "restarts", "cmyk", "thumbnail", "png", "apng"])
def test_damaged_files_are_never_other_pictures(name: str) -> None:
    """Whatever was done to a file: what the service makes of it is what Pillow does, or nothing.

    That a walk of one's own agrees with the decoder's is what makes it safe to leave anything out.
    """
    exif = Image.Exif()
    exif[0x0112] = 6
    files = JPEGS | {
        "thumbnail": with_segments(saved(PHOTO, "JPEG", exif=exif), segment(0xE5, saved(OTHER, "JPEG"))),
        "png": saved(PHOTO, "PNG", exif=exif),
        "apng": saved(PHOTO, "PNG", save_all=True, append_images=[OTHER]),
    }
    random_ = random.Random(name)
    both = 0
    for _ in range(200):
        data = _mutated(files[name], random_)
        try:
            ours = seen(data, ImageLimits(max_pixels=1_000_000))
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
                pillow = np.asarray(upright_rgb(image))
        except (InvalidArgumentError, OSError, SyntaxError, ValueError, struct.error, IndexError, EOFError):
            continue
        np.testing.assert_array_equal(ours, pillow)
        both += 1
    assert both


@pytest.mark.parametrize("data", [*JPEGS.values(), PNG, saved(PHOTO, "WEBP"), saved(PHOTO, "WEBP", xmp=b"<x/>")])
def test_a_plain_file_is_not_changed_but_for_its_metadata(data: bytes) -> None:
    picture = find_picture(data)
    assert picture.size == PHOTO.size
    assert picture.orientation == 1
    assert len(picture.data) <= len(data)
    assert find_picture(picture.data) == picture
    assert_same(picture.data, data)


def test_other_bytes_are_left_alone() -> None:
    for data in (b"", b"\xff\xd8", b"hello", b"RIFF\0\0\0\0WAVE", saved(PHOTO, "TIFF")):
        assert find_picture(data).data == data or len(data) < 3
    with pytest.raises(cdam.ImageError):
        open_image(common_pb2.Image(encoded=b"hello"))


def test_pngs_limits_are_still_pillows() -> None:
    """The module says that Pillow opens no file of a longer text; should it, the orientation would be read from one."""
    assert PngImagePlugin.MAX_TEXT_CHUNK == 1024 * 1024
