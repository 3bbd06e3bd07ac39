"""What every RPC of the API goes through: one log line, metrics, a span, and errors turned into statuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from cdam_server.errors import InvalidArgumentError, UnavailableError
from cdam_server.operation.telemetry import Telemetry
from cdam_server.operation.tracing import Tracing
from cdam_server.rpc.status import status_of

_PREFIX = "/cdam.v1."
_log = structlog.get_logger("cdam.rpc")


class RequestInterceptor(grpc.aio.ServerInterceptor):
    """Logs, measures, traces, and answers errors.

    Args:
        telemetry: Where to count.
        ready: Whether the server takes requests; while it doesn't, they are answered UNAVAILABLE.
        tracing: Where spans go; nowhere by default.
    """

    def __init__(self, telemetry: Telemetry, ready: Callable[[], bool], tracing: Tracing | None = None) -> None:
        self._telemetry = telemetry
        self._ready = ready
        self._tracing = tracing or Tracing()
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._wrapped: dict[str, tuple[object, Any]] = {}  # by method: gRPC's handler, and what stands for it

    async def wait_until_idle(self) -> None:
        """Return when no RPC of the API is being answered."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handlers of the API; those of health and reflection go as they are."""
        handler: Any = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(_PREFIX):
            return handler  # type: ignore[no-any-return]
        name = handler_call_details.method
        of, wrapped = self._wrapped.get(name, (None, None))
        if of is not handler:
            wrapped = self._wrap(name.removeprefix("/"), handler)
            self._wrapped[name] = handler, wrapped
        return wrapped  # type: ignore[no-any-return]

    def _wrap(self, method: str, handler: Any) -> Any:
        make = getattr(grpc, f"{_shape(handler)}_rpc_method_handler")
        wrap = self._wrap_stream if handler.response_streaming else self._wrap_unary
        parse = _pass_on if handler.request_streaming else handler.request_deserializer
        return make(
            wrap(method, getattr(handler, _shape(handler)), parse),
            # A single request is parsed inside, where an error is answered, logged and counted like any other.
            request_deserializer=handler.request_deserializer if handler.request_streaming else None,
            response_serializer=handler.response_serializer,
        )

    def _wrap_unary(self, method: str, behaviour: Any, parse: Callable[[Any], Any]) -> Any:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            async with self._observed(method, context):
                return await behaviour(_parsed(request, parse), context)

        return call

    def _wrap_stream(self, method: str, behaviour: Any, parse: Callable[[Any], Any]) -> Any:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            async with self._observed(method, context):
                async for response in behaviour(_parsed(request, parse), context):
                    yield response

        return call

    @asynccontextmanager
    async def _observed(self, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
        started = perf_counter()
        code, failure = grpc.StatusCode.OK, None
        structlog.contextvars.clear_contextvars()
        span = self._tracing.start(method, context.invocation_metadata())
        self._in_flight += 1
        self._idle.clear()
        try:
            if not self._ready():
                raise UnavailableError("the server is starting, or going down")  # noqa: TRY301
            yield
        except asyncio.CancelledError:
            remaining = context.time_remaining()
            late = remaining is not None and remaining <= 0
            code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            self._telemetry.failures.labels(code.name).inc()
            raise
        except Exception as error:  # noqa: BLE001 - this is where every error ends
            status = status_of(error, structlog.contextvars.get_contextvars().get("request_id", ""))
            code, failure = status.code, status.message
            if status.error_id:
                _log.error("internal error", error_id=status.error_id, exc_info=error)
            self._telemetry.failures.labels(code.name).inc()
            await context.abort(code, status.message, status.trailing_metadata())
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()
            seconds = perf_counter() - started
            name = method.rpartition("/")[2]
            self._telemetry.observe_rpc(name, code.name, seconds)
            facts = {"method": name, "code": code.name, "seconds": round(seconds, 6), "peer": context.peer()}
            if failure:
                facts["error"] = failure
            _log.info("rpc", **facts)
            span.end(code.name, failure)


def _pass_on(request: Any) -> Any:
    return request


def _parsed(request: Any, parse: Callable[[Any], Any]) -> Any:
    try:
        return parse(request)
    except DecodeError as error:
        raise InvalidArgumentError("request", "is not a message of this API") from error


def _shape(handler: Any) -> str:
    """The name of the handler's shape, for example ``unary_stream``."""
    return "_".join(
        "stream" if streams else "unary" for streams in (handler.request_streaming, handler.response_streaming)
    )
