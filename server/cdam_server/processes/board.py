"""What every process of a server may know at once, in shared memory: how much each device has to do.

Each row has one writer. What is read may be a moment old, and two numbers of a row may be of two moments: it serves for a guess that the
scheduler corrects.
"""

from __future__ import annotations

import ctypes
from multiprocessing.context import BaseContext
from typing import Any, Final

from cdam_server.store.cache import OtherWriters

MAX_DEVICES: Final = 16
MAX_FRONT_ENDS: Final = 64
_IMAGES: Final = 1 << 16  # 512 kB; a token cache holds some thousands


class DeviceRow(ctypes.Structure):
    """Written by a compute process.

    Attributes:
        up: Whether it computes; who loses the connection to a process that died says for it that it does not.
        jobs: Jobs that were let in and are not yet answered, but for those in the background.
        seconds: Estimate of the work that this is.
        beat: When its event loop last turned, by `time.monotonic`.
    """

    _fields_ = [
        ("up", ctypes.c_double),
        ("jobs", ctypes.c_double),
        ("seconds", ctypes.c_double),
        ("beat", ctypes.c_double),
    ]


class FrontEndRow(ctypes.Structure):
    """Written by a front end.

    Attributes:
        devices: How many it is connected to.
        preparing: Jobs whose image it decodes before it asks for room.
        writes: How often it has changed the store of concepts.
        beat: When its event loop last turned, by `time.monotonic`.
    """

    _fields_ = [
        ("devices", ctypes.c_double),
        ("preparing", ctypes.c_double),
        ("writes", ctypes.c_double),
        ("beat", ctypes.c_double),
    ]


class Board(ctypes.Structure):
    """All rows, and on which device an image was last: by its key, whose last digits are the place, and those of the device."""

    _fields_ = [
        ("devices", DeviceRow * MAX_DEVICES),
        ("front_ends", FrontEndRow * MAX_FRONT_ENDS),
        ("images", ctypes.c_uint64 * _IMAGES),
    ]


class ImagePlaces:
    """On which device the tokens of an image may be. One that is not there any more is forgotten when another takes its place.

    Args:
        board: The board.
    """

    def __init__(self, board: Board) -> None:
        self._images = board.images

    def get(self, key: int) -> int | None:
        """The device; None if it is not known."""
        found = self._images[key % _IMAGES]
        return int(found % MAX_DEVICES) if found // MAX_DEVICES == key // MAX_DEVICES and found else None

    def put(self, key: int, device: int) -> None:
        """The image goes there now."""
        self._images[key % _IMAGES] = key // MAX_DEVICES * MAX_DEVICES + device


class FrontEndWrites(OtherWriters):
    """The writes of a server's other front ends.

    Args:
        board: The board.
        number: Of this front end's row.
        of: Number of front ends.
    """

    def __init__(self, board: Board, number: int, of: int) -> None:
        self._rows = [board.front_ends[other] for other in range(of) if other != number]
        self._own = board.front_ends[number]

    def writes(self) -> int:
        """See `OtherWriters`."""
        return int(sum(row.writes for row in self._rows))

    def wrote(self) -> None:
        """See `OtherWriters`."""
        self._own.writes += 1


def make_board(context: BaseContext) -> Any:
    """A board that processes of the context can be given, all zero."""
    return context.RawValue(Board)
