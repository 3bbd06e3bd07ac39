"""The ring of shared memory, against a plain list of what was written."""

from __future__ import annotations

import os
import random

import pytest

from cdam_server.processes.ring import RingReader, RingWriter


@pytest.fixture
def ring() -> RingWriter:
    return RingWriter(1 << 14)


def _reader(ring: RingWriter) -> RingReader:
    return RingReader(os.dup(ring.file))


def test_what_is_written_is_read(ring: RingWriter) -> None:
    reader, random_bytes = _reader(ring), random.Random(0)
    waiting = []
    written = refused = 0
    for _ in range(2000):
        data = random_bytes.randbytes(random_bytes.randrange(1, 5000))
        place = ring.put(memoryview(data))
        if place is None:
            refused += 1
        else:
            written += 1
            waiting.append((place, data))
        while waiting and random_bytes.random() < 0.5:
            place, expected = waiting.pop(0)
            assert bytes(reader.take(place)) == expected
            ring.consumed(reader.consumed)
    assert min(written, refused) > 100  # both happened


def test_what_finds_no_room_changes_nothing(ring: RingWriter) -> None:
    reader = _reader(ring)
    first = ring.put(memoryview(bytes(range(256)) * 40))
    assert first is not None
    assert ring.put(memoryview(b"x" * 10_000)) is None
    assert ring.put(memoryview(b"x" * (1 << 15))) is None  # which never will
    assert bytes(reader.take(first)) == bytes(range(256)) * 40


def test_what_was_read_stays_as_it_was(ring: RingWriter) -> None:
    """What a batch computes with must not change when its place is written to again."""
    reader = _reader(ring)
    place = ring.put(memoryview(b"a" * 16_000))
    assert place is not None
    taken = reader.take(place)
    ring.consumed(reader.consumed)
    assert ring.put(memoryview(b"b" * 16_000)) is not None
    assert bytes(taken) == b"a" * 16_000


def test_no_name_leads_to_it(ring: RingWriter) -> None:
    assert os.fstat(ring.file).st_nlink == 0
    ring.close()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(ring.file)
