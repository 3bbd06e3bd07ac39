"""How the client for asyncio waits: in tasks of the caller's event loop."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any, TypeVar

import grpc
import grpc.aio

from cdam._errors import RpcError, Unavailable, error_from_rpc
from cdam._stream import Results
from cdam._transport import Answer, Ended, Event, Items, Start, Streams, Taken, Transport

T = TypeVar("T")

# grpc.aio says this of a stream that ended while a request was written, over what the server said (grpc/grpc#36066).
_WRITE_FAILED = (grpc.StatusCode.INTERNAL, "Internal error from Core")
_STATUS_SECONDS = 1.0  # to wait for what the server said instead; it has come as a rule


async def iterate(results: Results) -> AsyncGenerator[Any, None]:
    """The results, as they come; leaving early cancels the rest."""
    try:
        while (result := await results.next()) is not None:
            yield result
    finally:
        await results.close()


class AsyncTransport(Transport):
    """The transport of `AsyncClient`."""

    # grpc.aio's channels belong to the loop in which they were made.
    _channels: Mapping[asyncio.AbstractEventLoop, grpc.aio.Channel] = MappingProxyType({})

    def channel(self) -> grpc.aio.Channel:
        loop = asyncio.get_running_loop()
        with self._lock:
            self.check_open()
            if loop not in self._channels:
                others = {at: other for at, other in self._channels.items() if not at.is_closed()}
                self._channels = {**others, loop: self.connection.aio_channel()}
            return self._channels[loop]

    async def close(self) -> None:
        with self._lock:
            self._closed = True
            channels, self._channels = self._channels, {}
        for loop, channel in channels.items():
            if loop is asyncio.get_running_loop():
                await channel.close()
            elif loop.is_running():  # in another thread
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(channel.close(), loop))

    async def response(self, call: Any) -> Any:
        return await call

    async def pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def work(self, function: Callable[[], T]) -> T:
        return await asyncio.to_thread(function)

    async def take(self, items: Items) -> tuple[Any, ...]:
        return await _take(items)

    def iterator(self, items: Iterable[Any] | AsyncIterable[Any]) -> Items:
        return aiter(items) if isinstance(items, AsyncIterable) else iter(items)

    def streams(self, starts: Sequence[Start]) -> Streams:
        return _AsyncStreams(starts)


class _AsyncStreams(Streams):
    def __init__(self, starts: Sequence[Start]) -> None:
        self._streams = [_Stream(server, start) for server, start in enumerate(starts)]
        # These tasks outlive a wait if they have to, so that nothing is lost; the server heard last comes last.
        self._reading: dict[_Stream, asyncio.Task[Answer | Ended]] = {}
        self._taking: asyncio.Task[tuple[Any, ...]] | None = None
        self._item_is_next = False

    async def open(self, server: int) -> None:
        stream = self._streams[server]
        await self._cancel(stream)
        stream.open()

    def send(self, server: int, request: Any) -> None:
        self._streams[server].requests.put_nowait((request, None))

    async def deliver(self, server: int, request: Any) -> bool:
        stream = self._streams[server]
        delivered = asyncio.get_running_loop().create_future()
        stream.requests.put_nowait((request, delivered))
        reading = self._read(stream)
        await asyncio.wait({delivered, reading}, return_when=asyncio.FIRST_COMPLETED)
        return not reading.done()

    def finish(self, server: int) -> None:
        self._streams[server].requests.put_nowait(None)

    async def event(self, items: Items | None = None, seconds: float | None = None) -> Event | None:
        awaited: set[asyncio.Task[Any]] = {self._read(stream) for stream in self._streams if stream.call is not None}
        if items is not None:
            self._taking = self._taking or asyncio.create_task(_take(items))
            awaited.add(self._taking)
        if not awaited:
            await asyncio.sleep(seconds or 0)
            return None
        done, _ = await asyncio.wait(awaited, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        stream = next((stream for stream, reading in self._reading.items() if reading in done), None)
        if self._taking in done and (self._item_is_next or stream is None):
            taken, self._taking, self._item_is_next = self._taking, None, False
            return Taken(taken.result())
        if stream is None:
            return None
        self._item_is_next = True
        event = self._reading.pop(stream).result()
        if isinstance(event, Ended):
            stream.close()
        return event

    async def close(self) -> None:
        for stream in self._streams:
            await self._cancel(stream)
        await _cancel(self._taking)

    def _read(self, stream: "_Stream") -> asyncio.Task[Answer | Ended]:
        """The task that waits for a stream's next answer."""
        if stream not in self._reading:
            self._reading[stream] = asyncio.create_task(stream.read())
        return self._reading[stream]

    async def _cancel(self, stream: "_Stream") -> None:
        stream.close()
        await _cancel(self._reading.pop(stream, None))


class _Stream:
    """One server's stream."""

    def __init__(self, server: int, start: Start) -> None:
        self.requests: asyncio.Queue[Any] = asyncio.Queue()
        self.call: Any = None
        self._server = server
        self._start = start
        self._status: Any = None

    def open(self) -> None:
        self.requests = asyncio.Queue()
        self.call = self._start(_requests(self.requests))
        self._status = _Status(self.call)

    def close(self) -> None:
        if self.call is not None:
            self.call.cancel()
            self.requests.put_nowait(None)
            self.call = None

    async def read(self) -> Answer | Ended:
        """What comes next. Cancelling it cancels the call."""
        try:
            answer = await self.call.read()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # grpc.aio raises this for a stream that the other side cancelled, too.
            return Ended(self._server, RpcError("the stream was cancelled", code=grpc.StatusCode.CANCELLED))
        except grpc.aio.AioRpcError as error:
            if (error.code(), error.details()) == _WRITE_FAILED:
                return Ended(self._server, await self._status.error())
            return Ended(self._server, error_from_rpc(error))
        return Ended(self._server) if answer is grpc.aio.EOF else Answer(self._server, answer)


class _Status:
    """How the server ended a call, whatever grpc.aio makes of it."""

    def __init__(self, call: Any) -> None:
        self._error: asyncio.Future[RpcError | None] = asyncio.get_running_loop().create_future()
        call.add_done_callback(self._note)

    async def error(self) -> RpcError | None:
        """What the server said, None if all went well; if it doesn't come, that the stream is gone."""
        try:
            return await asyncio.wait_for(asyncio.shield(self._error), _STATUS_SECONDS)
        except TimeoutError:
            return Unavailable("the stream ended while a request was sent", code=grpc.StatusCode.UNAVAILABLE)

    def _note(self, call: Any) -> None:
        # Called before anything is written over it, and these coroutines return at once.
        code, said, trailers = map(_at_once, (call.code(), call.details(), call.trailing_metadata()))
        if (code, said) != _WRITE_FAILED and not self._error.done():
            error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailers, said)
            self._error.set_result(None if code is grpc.StatusCode.OK else error_from_rpc(error))


def _at_once(coroutine: Any) -> Any:
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise RuntimeError("grpc.aio's status of a call that is over is not known")


async def _requests(requests: "asyncio.Queue[Any]") -> AsyncIterator[Any]:
    """The requests as grpc takes them: each once the connection has room for it."""
    while (entry := await requests.get()) is not None:
        request, delivered = entry
        if delivered is not None:
            delivered.set_result(None)
        yield request


async def _take(items: Any) -> tuple[Any, ...]:
    if not isinstance(items, AsyncIterator):
        return tuple(islice(items, 1))
    try:
        return (await anext(items),)
    except StopAsyncIteration:
        return ()


async def _cancel(task: asyncio.Task[Any] | None) -> None:
    """Cancel a task, and wait until it has ended."""
    if task is not None:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # looked at, so that nobody complains that it never was
