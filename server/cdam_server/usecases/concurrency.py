"""Places for long requests: so many at once, and no caller more than its share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from cdam_server.errors import OverloadedError

_CALLER_SHARE: Final = 4  # of all places a single caller has one in so many


class ConcurrencyLimit:
    """Belongs to one event loop.

    Args:
        most: How many there are.
        what: What they are for, in the plural.
        retry_after: Seconds after which a caller who finds none may come again.
    """

    def __init__(self, most: int, what: str, retry_after: float) -> None:
        self._most = most
        self._what = what
        self._retry_after = retry_after
        self._taken: Counter[str] = Counter()

    @contextmanager
    def take(self, caller: str) -> Iterator[None]:
        """Have a place as long as the block runs.

        Raises:
            OverloadedError: There is none, or the caller has its share.
        """
        own = self._taken[caller]
        if own >= math.ceil(self._most / _CALLER_SHARE):
            raise OverloadedError(f"{own} {self._what} of yours are under way", self._retry_after)
        if self._taken.total() >= self._most:
            raise OverloadedError(f"too many {self._what} are under way", self._retry_after)
        self._taken[caller] += 1
        try:
            yield
        finally:
            self._taken[caller] -= 1
            if not self._taken[caller]:
                del self._taken[caller]
