"""What a traced request tells about itself; `tracing` hands it out, and `otlp` records it."""

from collections.abc import Mapping
from typing import Any


class RequestSpan:
    """The span of an RPC; this one, of an RPC that is not traced, does nothing."""

    def ids(self) -> dict[str, str]:
        """``trace_id`` and ``span_id`` for the log."""
        return {}

    def stage(self, name: str, started: float, seconds: float, attributes: Mapping[str, Any]) -> None:
        """Add a stage that is over."""

    def end(self, code: str, message: str | None) -> None:
        """End it with what the caller is told, the code by its name."""
