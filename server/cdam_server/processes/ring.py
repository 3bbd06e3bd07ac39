"""Shared memory through which a front end hands pixels to a compute process: a ring, written by the one, read by the other.

Each byte is written once and copied out once, in the order in which it was written; where it is the socket says (`wire`), and it is the
socket that orders the two.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

RING_BYTES: Final = 8 << 20
"""Of one front end and one compute process. Images wait in it for the other event loop's next turn only; what finds no room in it goes through
the socket."""


class Place(NamedTuple):
    """Where bytes are in a ring.

    Attributes:
        start: Of the first.
        size: How many.
        end: How many bytes of the ring have been used since it began, these counted in.
    """

    start: int
    size: int
    end: int


class RingWriter:
    """The front end's side.

    Args:
        size: In bytes.

    Attributes:
        file: Descriptor of the memory, for the other process.
    """

    def __init__(self, size: int = RING_BYTES) -> None:
        self.file = _anonymous_file(size)
        self._memory = mmap.mmap(self.file, size)
        self._size = size
        self._written = self._consumed = 0

    def put(self, data: memoryview) -> Place | None:
        """Copy bytes into the ring; None if there is no room for them now."""
        position, size = self._written % self._size, data.nbytes
        skipped = self._size - position if position + size > self._size else 0  # they are not divided
        if self._written + skipped + size - self._consumed > self._size:
            return None
        start = 0 if skipped else position
        self._memory[start : start + size] = data
        self._written += skipped + size
        return Place(start, size, self._written)

    def consumed(self, count: int) -> None:
        """So many bytes have been read."""
        self._consumed = count

    def close(self) -> None:
        """Give the memory back, once the other side has as well."""
        self._memory.close()
        os.close(self.file)


class RingReader:
    """The compute process's side.

    Args:
        file: Descriptor of the memory, from the writer; closed by this.

    Attributes:
        consumed: How many bytes have been read.
    """

    def __init__(self, file: int) -> None:
        self.consumed = 0
        try:
            self._memory = mmap.mmap(file, 0, prot=mmap.PROT_READ)
        finally:
            os.close(file)
        self._bytes = np.frombuffer(self._memory, np.uint8)

    def take(self, place: Place) -> NDArray[np.uint8]:
        """A copy of what is there, whose place is free from now on."""
        data = self._bytes[place.start : place.start + place.size].copy()  # numpy lets other threads work meanwhile
        self.consumed = place.end
        return data

    def close(self) -> None:
        """Give the memory back."""
        del self._bytes
        self._memory.close()


def _anonymous_file(size: int) -> int:
    """A file in memory that no name leads to, so that nothing is left of it whoever is killed."""
    if hasattr(os, "memfd_create"):  # Linux; not limited by the size of /dev/shm, which containers keep small
        file = os.memfd_create("cdam-ring")
    else:
        with tempfile.TemporaryFile() as opened:
            file = os.dup(opened.fileno())
    os.ftruncate(file, size)
    return file
