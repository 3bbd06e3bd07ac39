"""What every process of a server may know at once, in shared memory: how much each device has to do.

Each row has one writer. What is read may be a moment old, and two numbers of a row may be of two moments: it serves for a guess that the
scheduler corrects.
"""

from __future__ import annotations

import ctypes
from multiprocessing.context import BaseContext
from typing import Any, Final

MAX_DEVICES: Final = 16
MAX_FRONT_ENDS: Final = 64


class DeviceRow(ctypes.Structure):
    """Written by a compute process.

    Attributes:
        jobs: Jobs that were let in and are not yet answered, but for those in the background.
        seconds: Estimate of the work that this is.
        beat: When its event loop last turned, by `time.monotonic`.
    """

    _fields_ = [("jobs", ctypes.c_double), ("seconds", ctypes.c_double), ("beat", ctypes.c_double)]


class FrontEndRow(ctypes.Structure):
    """Written by a front end.

    Attributes:
        preparing: Jobs whose image it decodes before it asks for room.
        writes: How often it has changed the store of concepts.
        beat: When its event loop last turned, by `time.monotonic`.
    """

    _fields_ = [("preparing", ctypes.c_double), ("writes", ctypes.c_double), ("beat", ctypes.c_double)]


class Board(ctypes.Structure):
    """All rows."""

    _fields_ = [("devices", DeviceRow * MAX_DEVICES), ("front_ends", FrontEndRow * MAX_FRONT_ENDS)]


def make_board(context: BaseContext) -> Any:
    """A board that processes of the context can be given, all zero."""
    return context.RawValue(Board)
