"""The picture in an image file: its pixels without what lies around them.

Files of phones, cameras and editors hold more than a picture: thumbnails, colour profiles, previews, depth maps, notes
of any length, a video behind the end. None of it changes what a model is shown, so a file is taken apart by its
format's own structure, and what is not needed for the first picture's pixels is left out before Pillow sees it. That
keeps hostile metadata from Pillow, too, which would inflate text and walk through EXIF; of metadata the orientation
alone is read, here, in bounded time. What is counted of a file are its real parts and scans, so that limits hold for
those who mean harm and for nobody else.

Nothing here decodes pixels, and every loop is over parts, whose number is bounded, or runs in C.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from typing import Final

from cdam_images.orientation import orientation_of

# Parts are walked through one by one. Of a file of 32 MiB so many have 670 bytes each, fewer than encoders write.
MAX_PARTS: Final = 50_000
# Texts and profiles of a PNG, inflated, in bytes, all together: more than any picture needs, and it takes 0.1 s to see.
MAX_INFLATED: Final = 32 * 1024 * 1024
# What Pillow inflates of one text at most; a file of a longer one it does not open.
_MAX_TEXT: Final = 1024 * 1024

_PNG: Final = b"\x89PNG\r\n\x1a\n"
_JPEG_END: Final = b"\xff\xd9"
_PROBE: Final = bytes(place * 151 % 255 for place in range(64))
_SEQUENTIAL: Final = frozenset({0xC0, 0xC1, 0xC9})
_JPEG_MARKER: Final = re.compile(rb"\xff([\x01-\xfe])")
# Entropy-coded data hold stuffed zeros and restart markers; any other marker ends them.
_SCAN_END: Final = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
# Between restart markers a decoder passes over markers that there are none of, to find the next interval.
_RESTARTED_END: Final = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
_EXIF: Final = b"Exif\0\0"
_JPEG_XMP: Final = b"http://ns.adobe.com/xap/1.0/\0"
_PNG_XMP: Final = b"XML:com.adobe.xmp"
_PNG_EXIF: Final = b"Raw profile type exif"  # as ImageMagick wrote it before PNG had a chunk for it


class OverLimitError(ValueError):
    """A file is made of more parts than `MAX_PARTS`, or its metadata inflate to more than `MAX_INFLATED` bytes."""


@dataclass(frozen=True)
class Picture:
    """A file's first picture.

    Attributes:
        data: A file of the same format with the picture's pixels in it, and little else.
        orientation: 1 to 8, as EXIF counts them; 1 where there is none, or it is broken. None: of another format, whose
            metadata are left in it.
        size: (width, height) in pixels by the header; None if it has none.
        scans: The scans of a JPEG: how often a decoder passes over the picture. 1 in other files.
        probe: Of a JPEG whose end is not marked: the same with further bytes behind the last scan. A decoder that needs
            none there makes the same pixels of both; other pixels mean that the scan is cut short, or broken. Else None.
    """

    data: bytes
    orientation: int | None = None
    size: tuple[int, int] | None = None
    scans: int = 1
    probe: bytes | None = None


def find_picture(data: bytes) -> Picture:
    """The first picture in a JPEG, PNG or WebP file; another file is left as it is.

    What is damaged, or ends too early, in the pixels stays so.

    Raises:
        OverLimitError: It is made of countless tiny parts, or its metadata are a bomb.
    """
    if data.startswith(b"\xff\xd8"):
        return _jpeg(data)
    if data.startswith(_PNG):
        return _png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    return Picture(data)


def _count(parts: int) -> int:
    if parts >= MAX_PARTS:
        raise OverLimitError(f"is made of more than {MAX_PARTS} segments")
    return parts + 1


# --- JPEG


def _jpeg(data: bytes) -> Picture:
    """Up to the end of the first picture: tables, frame, scans, and what says how its colours are meant.

    A thumbnail lies inside a segment, of which the length is known; a video or further pictures lie behind the end.

    Source: ISO/IEC 10918-1, annex B.
    """
    found = _JpegParts(data)
    parts = 0
    while found.step():
        parts = _count(parts)
    orientation = orientation_of(bytes(found.exif), found.xmp)
    data = b"".join(found.kept)
    probe = None if found.marked else data[: -len(_JPEG_END)] + _PROBE + _JPEG_END
    return Picture(data, orientation, found.size, max(found.scans, 1), probe)


class _JpegParts:
    """A walk from segment to segment.

    Attributes:
        kept: What the picture needs; nothing more once it is complete.
        exif: As it stands in one segment, or in several.
        xmp: An XML file, or nothing.
        size: (width, height) in pixels.
        scans: How many there are.
        marked: False if the picture seems complete, and what follows it is not what may follow a scan.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._view = memoryview(data)
        self._position = 2
        self._complete = False
        self._restarts = False
        self._single = -1  # components of a scan that is the whole picture, if one can be
        self.kept: list[bytes | memoryview] = [b"\xff\xd8"]
        self.exif = bytearray()
        self.xmp = b""
        self.size: tuple[int, int] | None = None
        self.scans = 0
        self.marked = True

    def step(self) -> bool:
        """Take the next segment; False if there are no more."""
        found = _JPEG_MARKER.search(self._data, self._position)
        # Some cameras forget to mark the end: what does not follow at once on a complete picture is none of it.
        self.marked = not self._complete
        if found is None or (self._complete and self._data[self._position : found.start()].strip(b"\xff")):
            return False
        marker, start = found[1][0], found.end()
        if marker in {0xD8, 0xD9}:  # another picture's beginning, the end
            if marker == 0xD9:
                self.marked = True
                self.kept += [] if self._complete else [_JPEG_END]
            return False
        self._position = start
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # these stand alone
            return True
        end = start + max(int.from_bytes(self._view[start : start + 2], "big"), 2)
        if end > len(self._data):
            return False
        self._position = end
        self._segment(marker, start, end)
        return True

    def _segment(self, marker: int, start: int, end: int) -> None:
        body = self._view[start + 2 : end]
        if _is_metadata(marker, body):
            if not self.scans:  # Pillow reads none behind
                self._metadata(marker, bytes(body))
            return
        if not self._complete:
            self.kept.append(self._view[start - 2 : end])
        if 0xC0 <= marker <= 0xCF and marker not in {0xC4, 0xC8, 0xCC} and len(body) > 5 and self.size is None:
            self.size = (int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big"))
            self._single = body[5] if marker in _SEQUENTIAL else -1
        elif marker == 0xDD:
            self._restarts = any(body[:2])
        elif marker == 0xDA:
            self._scan(components=body[0] if body else 0, start=end)

    def _scan(self, components: int, start: int) -> None:
        self.scans += 1
        after = (_RESTARTED_END if self._restarts else _SCAN_END).search(self._data, start)
        self._position = after.start() if after else len(self._data)
        if self._complete:
            return
        self.kept.append(self._view[start : self._position])
        if after and components == self._single:
            self._complete = True
            self.kept.append(_JPEG_END)

    def _metadata(self, marker: int, body: bytes) -> None:
        if marker == 0xE1 and body.startswith(_EXIF):
            self.exif += body[len(_EXIF) :] if self.exif else body
        elif marker == 0xE1 and body.startswith(_JPEG_XMP):
            self.xmp = body[len(_JPEG_XMP) :]


def _is_metadata(marker: int, body: memoryview) -> bool:
    """Whether a segment says nothing of the pixels: comments and applications', but for two that tell of the colours."""
    if marker == 0xE0:
        return bytes(body[:5]) != b"JFIF\0"
    if marker == 0xEE:
        return bytes(body[:5]) != b"Adobe"
    return marker == 0xFE or 0xE0 <= marker <= 0xEF


# --- PNG


def _png(data: bytes) -> Picture:
    """The critical chunks and the transparency. Of an animation that leaves the picture that programs show that know none.

    Source: PNG (third edition), sections 5 and 11.
    """
    view = memoryview(data)
    kept: list[bytes | memoryview] = [_PNG]
    metadata = _PngMetadata()
    parts, position = 0, 8
    while position + 8 <= len(data):
        parts = _count(parts)
        kind = data[position + 4 : position + 8]
        end = position + 12 + int.from_bytes(view[position : position + 4], "big")
        if not kind.isalpha():
            break
        if kind[:1].isupper() or kind == b"tRNS":
            kept.append(view[position:end])
        elif end <= len(data):
            metadata.add(kind, view[position + 4 : end])
        if kind == b"IEND":
            break
        position = end
    size = (int.from_bytes(view[16:20], "big"), int.from_bytes(view[20:24], "big")) if data[12:16] == b"IHDR" else None
    return Picture(b"".join(kept), orientation_of(metadata.exif, metadata.xmp), size)


class _PngMetadata:
    """What chunks say of the orientation; of those that are compressed, how much they are is counted.

    Attributes:
        exif: A TIFF file, or nothing.
        xmp: An XML file, or nothing.
    """

    def __init__(self) -> None:
        self.xmp = b""
        self._exif: bytes | None = None
        self._profile = b""
        self._inflated = 0

    @property
    def exif(self) -> bytes:
        return self._profile if self._exif is None else self._exif

    def add(self, kind: bytes, chunk: memoryview) -> None:
        """Take a chunk, from its kind to its checksum."""
        body = chunk[4:-4]
        if kind == b"eXIf":
            if zlib.crc32(chunk[:-4]) == int.from_bytes(chunk[-4:], "big"):
                self._exif = bytes(body)
        elif kind in {b"tEXt", b"zTXt", b"iTXt", b"iCCP"}:
            self._add_text(kind, bytes(body))

    def _add_text(self, kind: bytes, body: bytes) -> None:
        key, _, text = body.partition(b"\0")
        if kind == b"iTXt":
            compressed, fields = text[:1] == b"\1", text[2:].split(b"\0", 2)
            text = fields[2] if len(fields) == 3 else b""
        else:
            compressed = kind != b"tEXt"
            text = text[1:] if compressed else text
        if compressed:
            text = self._inflate(text)
        if key == _PNG_XMP:
            self.xmp = text
        elif key == _PNG_EXIF:
            digits = b"".join(text.split(b"\n", 3)[3:])  # after a name and a length
            try:
                self._profile = bytes.fromhex(digits.decode("ascii"))
            except ValueError:
                self._profile = b"rubbish"

    def _inflate(self, data: bytes) -> bytes:
        """The text; nothing if it is damaged, or longer than a text that Pillow would read."""
        inflater, length = zlib.decompressobj(), 0
        pieces: list[bytes] = []
        try:
            while data and not inflater.eof:
                piece = inflater.decompress(data, _MAX_TEXT)
                data = inflater.unconsumed_tail
                length += len(piece)
                self._inflated += len(piece)
                if self._inflated > MAX_INFLATED:
                    raise OverLimitError(f"has metadata that inflate to more than {MAX_INFLATED} bytes")
                pieces = [*pieces, piece] if length <= _MAX_TEXT else []
        except zlib.error:
            return b""
        return b"".join(pieces)


# --- WebP


def _webp(data: bytes) -> Picture:
    """The image, or the first frame of an animation, without profile and notes.

    Source: RFC 9649, section 2.
    """
    view = memoryview(data)
    kept: list[bytes | memoryview] = []
    seen: set[bytes] = set()
    notes = {b"EXIF": b"", b"XMP ": b""}
    announced = data[20] if data[12:16] == b"VP8X" and len(data) > 20 else 0
    parts, position = 0, 12
    stop = min(len(data), 8 + int.from_bytes(view[4:8], "little"))
    while position + 8 <= stop:
        parts = _count(parts)
        kind, length = data[position : position + 4], int.from_bytes(view[position + 4 : position + 8], "little")
        end = position + 8 + length
        if kind in notes:
            if announced & _WEBP_NOTES[kind]:  # libwebp passes over others
                notes[kind] = notes[kind] or bytes(view[position + 8 : end])
        elif kind in _WEBP_PIXELS and kind not in seen:
            seen.add(kind)
            chunk = view[position:end]
            kept += [_without_notes(chunk) if kind == b"VP8X" else chunk, b"\0" * (length % 2)]
        position = end + length % 2
    body = b"".join([b"WEBP", *kept])
    picture = b"RIFF" + struct.pack("<I", len(body)) + body
    return Picture(picture, orientation_of(notes[b"EXIF"], notes[b"XMP "]), _webp_canvas(picture))


_WEBP_NOTES: Final = {b"EXIF": 0x08, b"XMP ": 0x04}
_WEBP_PIXELS: Final = frozenset({b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L"})


def _without_notes(header: memoryview) -> bytes:
    """An extended header that announces no profile, EXIF and XMP."""
    return bytes(header[:8]) + bytes(flags & 0xD3 for flags in header[8:9]) + bytes(header[9:])


def _webp_canvas(data: bytes) -> tuple[int, int] | None:
    """(width, height) from a WebP header, or None if it has none.

    Source: RFC 9649, sections 2.5 to 2.7 and 3.4.
    """
    if len(data) < 30:
        return None
    chunk = data[12:16]
    if chunk == b"VP8X":  # 24 bits each, minus one
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if chunk == b"VP8L":  # 14 bits each, minus one, after a signature byte
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 ":  # 14 bits each, with 2 bits of scaling above, after the frame's tag and start code
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None
