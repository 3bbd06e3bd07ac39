"""Work in pieces, so that memory is bounded whatever is asked for."""

from __future__ import annotations

from collections.abc import Iterator


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover 0..count."""
    for start in range(0, count, max(1, size)):
        yield slice(start, min(start + max(1, size), count))
