"""How the client that blocks waits: in the caller's thread. A thread of its own for each stream receives the answers."""

import queue
import threading
import time
from collections.abc import AsyncIterable, Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import grpc

from cdam._errors import error_from_rpc
from cdam._stream import Results
from cdam._transport import Answer, Ended, Event, Items, Start, Streams, Taken, Transport

T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never suspends, as none over a `BlockingTransport` does."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    coroutine.close()
    raise RuntimeError("a coroutine of the client that blocks has suspended")


def iterate(results: Results) -> Generator[Any, None, None]:
    """The results, as they come; leaving early cancels the rest."""
    try:
        while (result := run(results.next())) is not None:
            yield result
    finally:
        run(results.close())


class BlockingTransport(Transport):
    """The transport of `Client`."""

    _channel: grpc.Channel | None = None

    def channel(self) -> grpc.Channel:
        with self._lock:
            self.check_open()
            self._channel = self._channel or self.connection.channel()
            return self._channel

    async def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._channel is not None:
                self._channel.close()

    async def response(self, call: Any) -> Any:
        return call  # grpc has waited for it

    async def pause(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251 - nothing runs beside this coroutine

    async def work(self, function: Callable[[], T]) -> T:
        return function()

    async def take(self, items: Items) -> tuple[Any, ...]:
        return _take(items)

    def iterator(self, items: Iterable[Any] | AsyncIterable[Any]) -> Iterator[Any]:
        if isinstance(items, AsyncIterable) and not isinstance(items, Iterable):
            raise TypeError("items that come asynchronously are for AsyncClient")
        return iter(items)

    def streams(self, starts: Sequence[Start]) -> Streams:
        return _BlockingStreams(starts)


class _BlockingStreams(Streams):
    def __init__(self, starts: Sequence[Start]) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._streams = [_Stream(server, start, self._events) for server, start in enumerate(starts)]
        self._item_is_next = False

    async def open(self, server: int) -> None:
        self._streams[server].open()

    def send(self, server: int, request: Any) -> None:
        self._streams[server].requests.put((request, None))

    async def deliver(self, server: int, request: Any) -> bool:
        stream = self._streams[server]
        stream.requests.put((request, stream.delivered))
        return stream.delivered.get()

    def finish(self, server: int) -> None:
        self._streams[server].requests.put(None)

    async def event(self, items: Items | None = None, seconds: float | None = None) -> Event | None:
        if items is not None and (self._item_is_next or self._events.empty()):
            self._item_is_next = False
            return Taken(_take(items))
        self._item_is_next = True
        try:
            return self._events.get(timeout=seconds)
        except queue.Empty:
            return None

    async def close(self) -> None:
        for stream in self._streams:
            stream.close()


class _Stream:
    """One server's stream. The queues are C's own: an interrupt (SIGINT) leaves no lock behind."""

    def __init__(self, server: int, start: Start, events: "queue.SimpleQueue[Event]") -> None:
        self.requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.delivered: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._server = server
        self._start = start
        self._events = events
        self._call: Any = None
        self._thread = threading.Thread()

    def open(self) -> None:
        self.close()
        self.requests, self.delivered = queue.SimpleQueue(), queue.SimpleQueue()
        self._call = self._start(_requests(self.requests))
        arguments = self._call, self.delivered
        self._thread = threading.Thread(target=self._receive, args=arguments, name="cdam", daemon=True)
        self._thread.start()

    def close(self) -> None:
        if self._call is not None:
            self._call.cancel()
            self.requests.put(None)
            self._thread.join()
            self._call = None

    def _receive(self, call: Any, delivered: "queue.SimpleQueue[bool]") -> None:
        ended = Ended(self._server)
        try:
            for number, answer in enumerate(call):
                self._events.put(Answer(self._server, answer))
                if number == 0:
                    delivered.put(False)
        except grpc.RpcError as error:
            ended = Ended(self._server, error_from_rpc(error))
        self._events.put(ended)
        delivered.put(False)


def _requests(requests: "queue.SimpleQueue[Any]") -> Iterator[Any]:
    """The requests as grpc takes them: each once the connection has room for it."""
    for request, delivered in iter(requests.get, None):
        if delivered is not None:
            delivered.put(True)
        yield request


def _take(items: Any) -> tuple[Any, ...]:
    return tuple(islice(items, 1))
