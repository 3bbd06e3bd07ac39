"""How many long requests there may be at once: each is many jobs, and no caller has more than its share of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Literal, TypeAlias

from cdam_server.errors import OverloadedError

Long: TypeAlias = Literal["registrations", "evaluations"]

# Ratio to max_pending. One request in so many may be a registration, and one in so many an evaluation.
_PENDING_FOR_ONE: Final[dict[Long, int]] = {"registrations": 4, "evaluations": 8}
_CALLER_SHARE: Final = 4  # a single caller may have one in so many
# Seconds after which a caller who is refused may come again: about what one takes.
_RETRY_AFTER: Final[dict[Long, float]] = {"registrations": 1.0, "evaluations": 5.0}


class LongRequests:
    """Belongs to one event loop.

    Args:
        max_pending: The server's bound on requests.
    """

    def __init__(self, max_pending: int) -> None:
        self._most = {kind: max(1, max_pending // ratio) for kind, ratio in _PENDING_FOR_ONE.items()}
        self._taken: dict[Long, Counter[str]] = {kind: Counter() for kind in _PENDING_FOR_ONE}

    @contextmanager
    def take(self, kind: Long, caller: str) -> Iterator[None]:
        """Count one for as long as the block runs.

        Raises:
            OverloadedError: There are too many, or the caller has its share.
        """
        self.begin(kind, caller)
        try:
            yield
        finally:
            self.end(kind, caller)

    def begin(self, kind: Long, caller: str) -> None:
        """Count one until `end`; raises what `take` raises."""
        most, taken = self._most[kind], self._taken[kind]
        own = taken[caller]
        if own >= math.ceil(most / _CALLER_SHARE):
            raise OverloadedError(f"{own} {kind} of yours are under way", _RETRY_AFTER[kind])
        if taken.total() >= most:
            raise OverloadedError(f"too many {kind} are under way", _RETRY_AFTER[kind])
        taken[caller] += 1

    def end(self, kind: Long, caller: str) -> None:
        """It has ended."""
        taken = self._taken[kind]
        taken[caller] -= 1
        if not taken[caller]:
            del taken[caller]
