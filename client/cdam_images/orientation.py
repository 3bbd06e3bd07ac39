"""The orientation that metadata give, in bounded time: of EXIF one entry of one directory, of XMP one attribute."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

_HEADS: Final = re.compile(rb"(?:Exif\0\0)*")  # some write more than one
_XMP_ORIENTATION: Final = re.compile(rb"tiff:Orientation(?:=\"|>)([0-9])")
_ORIENTATION: Final = 0x0112


class _Entry(NamedTuple):
    """An entry of a TIFF directory."""

    tag: int
    kind: int
    length: int
    value: bytes


def orientation_of(exif: bytes, xmp: bytes) -> int:
    """What EXIF says, or where it says nothing, XMP; as Pillow reads them."""
    try:
        said = exif_orientation(exif)
    except (ValueError, struct.error):
        return 1
    if said is None and (found := _XMP_ORIENTATION.search(xmp)):
        said = int(found[1])
    return said if said is not None and 1 <= said <= 8 else 1


def exif_orientation(exif: bytes) -> int | None:
    """The orientation in the first directory of EXIF; None if there is none, 0 if it is no number.

    Source: TIFF 6.0, section 2.

    Raises:
        ValueError: It is no EXIF.
    """
    heads = _HEADS.match(exif)
    start = heads.end() if heads else 0
    if start == len(exif):
        return None
    if exif[start : start + 4] not in {b"II*\0", b"MM\0*", b"II\0*", b"MM*\0"}:
        raise ValueError("no EXIF")
    order = "<" if exif.startswith(b"II", start) else ">"
    (offset,) = struct.unpack_from(f"{order}L", exif, start + 4)
    said = None
    for entry in _entries(exif, start + offset, order):
        if entry.tag == _ORIENTATION:
            sizes = {3: "H", 4: "L", 8: "h", 9: "l"}  # whole numbers of 16 and 32 bits
            single = entry.kind in sizes and entry.length == 1
            said = struct.unpack_from(order + sizes[entry.kind], entry.value)[0] if single else 0
    return said


def _entries(tiff: bytes, position: int, order: str) -> Iterator[_Entry]:
    """The entries of the directory at a position, those that are whole; at most 65535."""
    if position + 2 > len(tiff):
        return
    (count,) = struct.unpack_from(f"{order}H", tiff, position)
    table = tiff[position + 2 : position + 2 + 12 * count]
    yield from map(_Entry._make, struct.iter_unpack(f"{order}HHL4s", table[: len(table) // 12 * 12]))
