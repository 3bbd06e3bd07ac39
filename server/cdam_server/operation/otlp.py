"""Spans by OpenTelemetry, sent to a collector. Only `cdam_server.operation.tracing` imports this, when tracing is on."""

import logging
import threading
from collections.abc import Callable, Mapping
from time import perf_counter_ns, time_ns
from typing import Any, Final

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.propagate import extract
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from cdam_server.operation.spans import RequestSpan

_FLUSH_SECONDS: Final = 3.0
# Of a server's spans, by the semantic conventions; other codes are the caller's fault, or its wish.
_FAILURES: Final = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
_log = structlog.get_logger("cdam.tracing")


class SpanSender:
    """Begins spans, and sends in batches what has ended, from a thread of its own.

    Args:
        endpoint: URL of a collector that takes OTLP over gRPC.
    """

    def __init__(self, endpoint: str) -> None:
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over the default.
        resource = Resource.create({"service.name": "cdam-serve"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"))
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("cdam_server")
        self._complaints = _Complaints()

    def start(self, method: str, metadata: Mapping[str, str]) -> RequestSpan:
        """Begin an RPC's span, below the caller's if the metadata name one."""
        return _RecordedSpan(self._tracer, method, extract(metadata))

    def close(self) -> None:
        """Send what is left, for some seconds at most."""
        # OpenTelemetry's own calls heed no timeout, and a collector that is away is tried again and again.
        sent = _within(_FLUSH_SECONDS, self._provider.force_flush)
        self._complaints.end()
        if not sent:
            _log.warning("the last spans were not sent")
            self._exporter.shutdown()  # cuts off what goes on
        _within(_FLUSH_SECONDS, self._provider.shutdown)


class _RecordedSpan(RequestSpan):
    def __init__(self, tracer: trace.Tracer, method: str, caller: Context) -> None:
        self._tracer = tracer
        self._epoch = time_ns() - perf_counter_ns()  # one for a request, so that its spans fit each other
        self._span = tracer.start_span(
            method,
            caller,
            trace.SpanKind.SERVER,
            {"rpc.system.name": "grpc", "rpc.method": method},
            start_time=self._epoch + perf_counter_ns(),
        )
        self._context = trace.set_span_in_context(self._span, caller)

    def ids(self) -> dict[str, str]:
        ids = self._span.get_span_context()
        if not ids.is_valid:  # OTEL_SDK_DISABLED
            return {}
        return {"trace_id": trace.format_trace_id(ids.trace_id), "span_id": trace.format_span_id(ids.span_id)}

    def stage(self, name: str, started: float, seconds: float, attributes: Mapping[str, Any]) -> None:
        begin = self._epoch + round(1e9 * started)
        facts = {f"cdam.{key}": value for key, value in attributes.items()}
        span = self._tracer.start_span(name, self._context, attributes=facts, start_time=begin)
        span.end(begin + round(1e9 * seconds))

    def end(self, code: str, message: str | None) -> None:
        self._span.set_attribute("rpc.response.status_code", code)
        if code in _FAILURES:
            self._span.set_attribute("error.type", code)
            self._span.set_status(trace.StatusCode.ERROR, message)
        self._span.end(self._epoch + perf_counter_ns())


class _Complaints(logging.Handler):
    """What OpenTelemetry logs, for example that the collector is away, in the form of all other lines."""

    def __init__(self) -> None:
        super().__init__()
        logger = logging.getLogger("opentelemetry")
        logger.propagate = False
        logger.handlers = [self]

    def emit(self, record: logging.LogRecord) -> None:
        _log.log(record.levelno, "tracing", detail=record.getMessage())

    def end(self) -> None:
        """Drop what is still to come: that the exporter was told to stop is no news."""
        logging.getLogger("opentelemetry").handlers = [logging.NullHandler()]


def _within(seconds: float, call: Callable[[], object]) -> bool:
    """Whether a call returned in time; if not, it is left to a thread that keeps nobody."""
    thread = threading.Thread(target=call, name="tracing-close", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
