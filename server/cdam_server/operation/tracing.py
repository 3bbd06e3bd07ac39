"""Traces: a span for each RPC of the API, and one for each of its stages.

OpenTelemetry makes and sends them. It is the extra ``tracing``, and imported only where tracing is on.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from typing import Final

import structlog

from cdam_server.operation.spans import RequestSpan

_UNTRACED: Final = RequestSpan()
_current: ContextVar[RequestSpan] = ContextVar("request_span", default=_UNTRACED)


class Tracing:
    """Begins the spans of RPCs, and sends them to a collector.

    Args:
        endpoint: URL of a collector that takes OTLP over gRPC, for example ``http://localhost:4317``. Empty: nothing is
            traced. All else is set by OpenTelemetry's own environment variables.

    Raises:
        ValueError: The endpoint is no such URL, or the extra is not installed.
    """

    def __init__(self, endpoint: str = "") -> None:
        self._sender = None
        if not endpoint:
            return
        if not endpoint.startswith(("http://", "https://")):
            raise ValueError(f"tracing_endpoint: must begin with http:// or https://, not {endpoint!r}")
        try:
            from cdam_server.operation.otlp import SpanSender
        except ModuleNotFoundError as error:
            raise ValueError(f"{error.name} is missing: install cdam-serve with its extra `tracing`") from error
        self._sender = SpanSender(endpoint)

    def start(self, method: str, metadata: Iterable[tuple[str, str | bytes]] | None) -> RequestSpan:
        """Begin the span of the RPC that the current task answers; its ids go into the task's log lines.

        Args:
            method: Full name of the RPC, for example ``cdam.v1.ExplainerService/Explain``.
            metadata: The caller's; ``traceparent`` names the span to go below.
        """
        if self._sender is None:
            return _UNTRACED
        span = self._sender.start(method, {key: value for key, value in metadata or () if isinstance(value, str)})
        structlog.contextvars.bind_contextvars(**span.ids())
        _current.set(span)
        return span

    def close(self) -> None:
        """Send what is left; a collector that is away holds this up for a few seconds at most."""
        if self._sender is not None:
            self._sender.close()


def stage(name: str, started: float, seconds: float, **attributes: str | float) -> None:
    """Add a stage that is over to the span of the RPC that the current task answers, if it is traced.

    A batch's stages are those of every request in it; each adds them for itself, in its own task.

    Args:
        name: ``decode``, ``queue``, ``trunk`` or ``tail``.
        started: When it began, by `time.perf_counter`.
        seconds: How long it took.
        attributes: Facts about it; ``batch_size`` becomes ``cdam.batch_size``.
    """
    _current.get().stage(name, started, seconds, attributes)
