"""What both clients ask of the network and of their callers.

What a client does is written once, as coroutines over a `Transport`. `AsyncClient` awaits them. The transport of `Client`
blocks where that of `AsyncClient` waits, so its coroutines never suspend, and `cdam._blocking.run` has their result at
once.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import grpc
from google.protobuf.message import Message

from cdam._channel import SERVICE, Connection, checked_timeout
from cdam._errors import DeadlineExceeded, RpcError, error_from_rpc

T = TypeVar("T")
Response = TypeVar("Response", bound=Message)

Items: TypeAlias = Iterator[Any] | AsyncIterator[Any]
Start: TypeAlias = Callable[[Any], Any]
"""Begins a stream of grpc's, given an iterator of its requests."""


# --- what streams report


@dataclass(frozen=True)
class Answer:
    """A server's answer.

    Attributes:
        server: The server's index.
        message: The answer.
    """

    server: int
    message: Any


@dataclass(frozen=True)
class Ended:
    """A server's stream has ended.

    Attributes:
        server: The server's index.
        error: Why; None: as it should.
    """

    server: int
    error: RpcError | None = None


@dataclass(frozen=True)
class Taken:
    """The caller's next item.

    Attributes:
        items: The item; empty if there are no more.
    """

    items: tuple[Any, ...]


Event: TypeAlias = Answer | Ended | Taken


# --- what a client is made of


class Streams(ABC):
    """Streams of one method, at most one at a time for each server."""

    @abstractmethod
    async def open(self, server: int) -> None:
        """Open a server's stream; one before it is cancelled."""

    @abstractmethod
    def send(self, server: int, request: Any) -> None:
        """Send a request some time soon. To wait for it could stop both sides, each until the other reads."""

    @abstractmethod
    async def deliver(self, server: int, request: Any) -> bool:
        """Send a request, and wait until the connection has taken it; False if the server answered or ended instead."""

    @abstractmethod
    def finish(self, server: int) -> None:
        """Say that nothing more will be sent."""

    @abstractmethod
    async def event(self, items: Items | None = None, seconds: float | None = None) -> Event | None:
        """Wait for the next answer, the end of a stream or the next of the items, whichever comes first.

        Args:
            items: The caller's items; None: take none.
            seconds: How long to wait at most; None: as long as it takes.

        Returns:
            What came; None if the time has passed. If both are there, an item and an event of a stream take turns, so that
            neither keeps the other back.
        """

    @abstractmethod
    async def close(self) -> None:
        """Cancel the streams that are open; no thread and no task stays behind."""


class Transport(ABC):
    """A client's connection, and how it waits.

    Attributes:
        connection: Where the server is, and how it is spoken to.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._closed = False
        self._lock = threading.Lock()

    @abstractmethod
    def channel(self) -> Any:
        """The channel, opened if need be."""

    @abstractmethod
    async def close(self) -> None:
        """Close the connection, for good."""

    @abstractmethod
    async def response(self, call: Any) -> Any:
        """The response of a unary call that grpc has begun."""

    @abstractmethod
    async def pause(self, seconds: float) -> None:
        """Wait for a while."""

    @abstractmethod
    async def work(self, function: Callable[[], T]) -> T:
        """Call a function that may take its time."""

    @abstractmethod
    async def take(self, items: Items) -> tuple[Any, ...]:
        """The next of the caller's items; empty if there are no more."""

    @abstractmethod
    def iterator(self, items: Iterable[Any] | AsyncIterable[Any]) -> Items:
        """An iterator of the caller's items.

        Raises:
            TypeError: if this client can't take them.
        """

    @abstractmethod
    def streams(self, starts: Sequence[Start]) -> Streams:
        """Streams that are begun so, one for each server."""

    def start(
        self, path: str, serialise: Callable[[Any], bytes], parse: Callable[[bytes], Any], timeout: float | None
    ) -> Start:
        """What begins a stream to this server, of a method by its full path; the timeout is that of all its streams."""
        deadline = None if timeout is None else self.deadline(timeout)

        def start(requests: Any) -> Any:
            call = self.channel().stream_stream(path, serialise, parse)
            return call(requests, timeout=_remaining(deadline), metadata=self.connection.metadata)

        return start

    def deadline(self, timeout: float | None) -> float:
        """When a call that begins now must have been answered."""
        return time.monotonic() + (self.connection.timeout if timeout is None else checked_timeout(timeout))

    def check_open(self) -> None:
        """Raise RuntimeError if the client is closed."""
        if self._closed:
            raise RuntimeError("this client is closed")


class Calls:
    """Unary calls that have to be answered by one deadline.

    Args:
        transport: Where they go.
        timeout: Seconds from now for all of them; None: the client's, from the first call on.
    """

    def __init__(self, transport: Transport, timeout: float | None) -> None:
        self.transport = transport
        self._deadline = None if timeout is None else transport.deadline(timeout)

    async def __call__(self, method: str, request: Message, response: type[Response]) -> Response:
        """Call a method of this API.

        Raises:
            RpcError: if the server refuses, or can't be reached in time.
        """
        decode: Callable[[bytes], Response] = response.FromString
        return await self.raw(f"/{SERVICE}/{method}", request.SerializeToString(), decode)

    async def raw(
        self, path: str, request: bytes, decode: Callable[[bytes], T], *, wait_for_ready: bool | None = None
    ) -> T:
        """Call a method by its full path; raises as `__call__`.

        Args:
            path: The path.
            request: The request, serialised.
            decode: Makes the answer of its bytes.
            wait_for_ready: Wait for the connection instead of failing without one.
        """
        call = self.transport.channel().unary_unary(path, None, decode)
        settings = {"metadata": self.transport.connection.metadata, "wait_for_ready": wait_for_ready}
        self._deadline = self._deadline or self.transport.deadline(None)
        timeout = _remaining(self._deadline)
        try:
            # A blocking call has its answer now, or raises.
            answer: T = await self.transport.response(call(request, timeout=timeout, **settings))
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
        return answer


def _remaining(deadline: float | None) -> float | None:
    remaining = None if deadline is None else deadline - time.monotonic()
    if remaining is not None and remaining <= 0:
        raise DeadlineExceeded("the timeout passed", code=grpc.StatusCode.DEADLINE_EXCEEDED)
    return remaining
