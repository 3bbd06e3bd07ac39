"""A thread that notices when the computing stands still, and ends the process if nothing else does."""

import os
import threading
from collections.abc import Callable
from typing import Final

_POLL_SECONDS: Final = 0.25  # how late it may notice, and how long closing may take
_EXIT_SECONDS: Final = 10.0  # for answering all who wait, closing what is open, and exiting


class Watchdog:
    """Watches the workers in a thread of its own, from `start` to `close`.

    Args:
        silent_seconds: Returns for how long the computing has been silent.
        limit: Longest silence allowed, in seconds.
        on_stall: Called once, in this thread, when the silence has lasted longer; it should end the process. Unless `close` is
            called within ten seconds, the process exits with code 1: what should have ended it hangs as well.
    """

    def __init__(self, silent_seconds: Callable[[], float], limit: float, on_stall: Callable[[], None]) -> None:
        self._silent_seconds = silent_seconds
        self._limit = limit
        self._on_stall = on_stall
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def close(self) -> None:
        """Stop watching, if it has begun."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_SECONDS):
            if self._silent_seconds() > self._limit:
                self._on_stall()
                if not self._closed.wait(_EXIT_SECONDS):
                    os._exit(1)
                return
