"""The items of a bidirectional stream: each answered as soon as it is done, failing alone, never too many at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Final, Generic, Self, TypeVar

import grpc
import structlog
from google.protobuf.message import DecodeError

from cdam.v1 import common_pb2
from cdam_server.compute.scheduling import ByteBudget
from cdam_server.errors import DeadlineError, InvalidArgumentError, OverloadedError, ServiceError, UnavailableError
from cdam_server.operation.telemetry import Telemetry
from cdam_server.rpc.status import Status, status_of

Request = TypeVar("Request")
Response = TypeVar("Response")

# Bytes. The budget of a server that is told none: the default of the setting max_pending_mib.
_MAX_BYTES: Final = 256 << 20
# Seconds. The longest wait for a stream's first message: it is ready when the call is made, a slow network's delay aside.
_FIRST_SECONDS: Final = 10.0
_log = structlog.get_logger("cdam.rpc")


class _GoneError(Exception):
    """Nobody reads the answers any more."""


@dataclass(frozen=True)
class Exchange(Generic[Request, Response]):
    """What one RPC does with the items of its streams.

    Attributes:
        item_id: The id that the client gave to an item; empty if it gave none.
        answer: Answers an item, or raises; what it raises fails that item alone.
        failure: The answer to an item that failed: of its id, and why.
        size: The memory that an item takes, in bytes.
        id_field: Path of the id, for errors.
    """

    item_id: Callable[[Request], str]
    answer: Callable[[Request], Awaitable[Response]]
    failure: Callable[[str, common_pb2.ItemError], Response]
    size: Callable[[Request], int] = lambda _: 0
    id_field: str = "request.request_id"


class StreamServer:
    """Serves bidirectional streams of items.

    Args:
        telemetry: Where failures are counted.
        draining: Set when the server goes down: streams then read no more, answer what they have read, and end.
        max_items: Most items of one stream that are in work at once; while they are, it reads no more, and HTTP/2's
            flow control holds the client back. An answer that the client has not taken counts as work.
        budget: For the items of all streams; while it is full, none reads more than one item.
        idle_seconds: How long `messages` waits for one; for the first, which clients send at once, at most ten seconds.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        draining: asyncio.Event,
        *,
        max_items: int = 32,
        budget: ByteBudget | None = None,
        idle_seconds: float = 120.0,
    ) -> None:
        self._telemetry = telemetry
        self._draining = draining
        self._max_items = max_items
        self._idle_seconds = idle_seconds
        self._budget = budget or ByteBudget(_MAX_BYTES)

    async def serve(
        self,
        requests: AsyncIterator[Request],
        write: Callable[[Response], Awaitable[None]],
        exchange: Exchange[Request, Response],
        *,
        max_items: int | None = None,
        may_idle: bool = True,
    ) -> None:
        """Answer every item; return when the client has sent its last one and has all answers.

        Args:
            requests: The items; a `ServiceError` that it raises ends the stream as what is no message does.
            write: Sends an answer.
            exchange: What is done with items.
            max_items: Most items that are in work at once, if fewer than of any stream.
            may_idle: Whether the next item may take longer than `idle_seconds`; not where a stream keeps a place from others.

        Cancelling it cancels the items. Log lines of an item carry its request_id, the stream's the number of `items`
        and `failures`.

        Raises:
            InvalidArgumentError: What came is no message; the items before it have been answered.
            UnavailableError: The server goes down, or nothing came; all items that were read have been answered.
        """
        most = min(self._max_items, max_items or self._max_items)
        stream = _Stream(exchange, write, self._telemetry, self._draining, most, self._budget)
        end: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as tasks, _Reader(requests, self._draining) as reader:
                end = await stream.read(reader, tasks, None if may_idle else self._idle_seconds)
        except* _GoneError:
            end = asyncio.CancelledError()  # as gRPC itself is about to say
        finally:
            structlog.contextvars.bind_contextvars(items=stream.items, failures=stream.failures)
        if end is not None:
            raise end

    async def first(self, requests: AsyncIterator[Request]) -> Request | None:
        """The first message of a stream, or None if there is none; what is raised, `messages` raises too."""
        try:
            request = await _next(requests, self._draining, min(self._idle_seconds, _FIRST_SECONDS))
        except _GoneError as error:
            raise asyncio.CancelledError from error
        if isinstance(request, ServiceError):
            raise request
        return request

    async def messages(self, requests: AsyncIterator[Request]) -> AsyncIterator[Request]:
        """The messages of a stream that is answered as a whole.

        Raises:
            InvalidArgumentError: What came is no message.
            DeadlineError: Nothing came for `idle_seconds`; what was begun keeps a place from others.
            UnavailableError: The server goes down, and won't wait for the rest.
        """
        longest = min(self._idle_seconds, _FIRST_SECONDS)
        try:
            while (request := await _next(requests, self._draining, longest)) is not None:
                if isinstance(request, ServiceError):
                    raise request
                yield request
                longest = self._idle_seconds
        except _GoneError as error:
            raise asyncio.CancelledError from error  # as gRPC itself is about to say


class _Stream(Generic[Request, Response]):
    """One stream."""

    def __init__(
        self,
        exchange: Exchange[Request, Response],
        write: Callable[[Response], Awaitable[None]],
        telemetry: Telemetry,
        draining: asyncio.Event,
        max_items: int,
        budget: ByteBudget,
    ) -> None:
        self.items = 0
        self.failures = 0
        self._exchange = exchange
        self._write = write
        self._telemetry = telemetry
        self._draining = draining
        self._slots = asyncio.Semaphore(max_items)
        self._budget = budget
        self._writing = asyncio.Lock()
        self._unanswered: set[str] = set()

    async def read(
        self, reader: _Reader[Request], tasks: asyncio.TaskGroup, longest: float | None
    ) -> ServiceError | None:
        """Make a task of each item; return when there are no more, with what ended the stream early, if it did."""
        while True:
            await self._slots.acquire()
            request = await reader.next(longest)
            if isinstance(request, DeadlineError):  # the rest may come on another stream
                return UnavailableError(str(request))
            if request is None or isinstance(request, ServiceError):
                return request
            self.items += 1
            size = self._exchange.size(request)
            await self._budget.take(size)
            task = tasks.create_task(self._serve(request, *self._named(request)))
            task.add_done_callback(partial(self._budget.give_back, size))

    def _named(self, request: Request) -> tuple[str, InvalidArgumentError | None]:
        """The item's id, and what is wrong with it.

        A second item of an id fails, and the first is still answered under it. The client can tell the two apart:
        a violation of the `id_field` always speaks of the later one, whatever becomes of the first.
        """
        item_id = self._exchange.item_id(request)
        if not item_id:
            return item_id, InvalidArgumentError(self._exchange.id_field, "is required for an item of a stream")
        if item_id in self._unanswered:
            message = "is that of an earlier item of this stream, which is not answered yet"
            return item_id, InvalidArgumentError(self._exchange.id_field, message)
        self._unanswered.add(item_id)
        return item_id, None

    async def _serve(self, request: Request, item_id: str, refusal: InvalidArgumentError | None) -> None:
        """Answer one item, and only then make room for another."""
        started = perf_counter()
        code = grpc.StatusCode.OK
        try:
            if refusal is not None:
                raise refusal  # noqa: TRY301 - answered like any other error
            response = await self._answer(request)
        except Exception as error:  # noqa: BLE001 - this is where every error of an item ends
            status = status_of(error, item_id)
            code = status.code
            response = self._exchange.failure(item_id, item_error(status))
            self.failures += 1
            self._telemetry.failures.labels(code.name).inc()
            if status.error_id:
                _log.error("internal error", error_id=status.error_id, request_id=item_id, exc_info=error)
        if refusal is None:
            # Before it is written: once the client has the answer, the id is its own again.
            self._unanswered.discard(item_id)
        try:
            async with self._writing:
                await self._write(response)
        except grpc.aio.BaseError as error:
            raise _GoneError from error
        _log.debug("item", request_id=item_id, code=code.name, seconds=round(perf_counter() - started, 6))
        self._slots.release()

    async def _answer(self, request: Request) -> Response:
        """The answer, as soon as the queue has room: streams are bulk work, they can wait."""
        while True:
            try:
                return await self._exchange.answer(request)
            except UnavailableError:
                raise
            except OverloadedError as full:
                await self._pause(full)

    async def _pause(self, full: OverloadedError) -> None:
        """Wait until the item tries again.

        Raises:
            UnavailableError: The server goes down.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(full.pause()):
                await self._draining.wait()
                raise _going_down()


def item_error(status: Status) -> common_pb2.ItemError:
    """The status, as a stream's item carries it."""
    error = common_pb2.ItemError(code=status.code.value[0], message=status.message)
    for detail in status.details:
        error.details.add().Pack(detail)
    return error


def _going_down() -> UnavailableError:
    return UnavailableError("the server is going down")


async def _next(
    requests: AsyncIterator[Request], draining: asyncio.Event, longest: float
) -> Request | ServiceError | None:
    async with _Reader(requests, draining) as reader:
        return await reader.next(longest)


class _Reader(Generic[Request]):
    """Reads messages until there are no more or the server goes down; a context, used in one task.

    Args:
        requests: The messages.
        draining: Set when the server goes down.
    """

    def __init__(self, requests: AsyncIterator[Request], draining: asyncio.Event) -> None:
        self._requests = requests
        self._draining = draining
        self._reading: asyncio.Timeout | None = None

    async def __aenter__(self) -> Self:
        # One task for all messages: to wait for two things at once takes two tasks for each.
        self._waiting = asyncio.create_task(self._draining.wait())
        self._waiting.add_done_callback(self._interrupt)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._waiting.cancel()
        await asyncio.wait({self._waiting})

    async def next(self, longest: float | None) -> Request | ServiceError | None:
        """The next message; None after the last, an error in place of one that can't be read or has not come in time, or if the
        server goes down.

        Args:
            longest: Seconds in which it has to come; None: any time.
        """
        if self._draining.is_set():
            return _going_down()
        try:
            async with asyncio.timeout(longest) as self._reading:
                return await anext(self._requests, None)
        except TimeoutError:
            return _going_down() if self._draining.is_set() else DeadlineError(f"nothing came for {longest:g} s")
        except DecodeError:
            return InvalidArgumentError("request", "is not a message of this API")
        except ServiceError as error:
            return error
        except grpc.aio.BaseError as error:
            raise _GoneError from error
        finally:
            self._reading = None

    def _interrupt(self, waiting: asyncio.Task[bool]) -> None:
        if not waiting.cancelled() and self._reading is not None and not self._reading.expired():
            self._reading.reschedule(0)
