"""Notices from outside when the computing has come to a stop."""

import os
import threading
from collections.abc import Callable
from typing import Final

_POLL_SECONDS: Final = 0.25
_LAST_CALL_SECONDS: Final = 10.0


class Watchdog:
    """A thread that looks at the workers again and again.

    Args:
        silent_seconds: For how long the computing has been silent.
        limit: Longest silence, in seconds.
        bark: Called once when it has lasted longer. Should the process outlive that by ten seconds, it is ended with exit code 1: whoever was
            to do it hangs, too.
    """

    def __init__(self, silent_seconds: Callable[[], float], limit: float, bark: Callable[[], None]) -> None:
        self._silent_seconds = silent_seconds
        self._limit = limit
        self._bark = bark
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_POLL_SECONDS):
            if self._silent_seconds() > self._limit:
                self._bark()
                if not self._over.wait(_LAST_CALL_SECONDS):
                    os._exit(1)
                return
