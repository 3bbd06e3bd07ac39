"""How each client runs a stream's flow: the connection, and the turns of hearing answers and taking the caller's items."""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Generator, Iterable, Iterator
from itertools import islice
from typing import Any, TypeAlias

import grpc
import grpc.aio

from cdam._errors import RpcError, Unavailable, error_from_rpc
from cdam._flow import Pause
from cdam._images import ImageLike
from cdam._stream import Emit, Ended, Finish, Heard, Item, ItemResult, Open, Send, StreamFlow, Taken, Wait, Work
from cdam.v1 import explain_pb2

Start: TypeAlias = Callable[[Any], Any]
"""Begins a call of grpc's, given an iterator of its requests."""

# grpc.aio says this of a stream that ended while a request was written, over what the server said (grpc/grpc#36066).
WRITE_FAILED = (grpc.StatusCode.INTERNAL, "Internal error from Core")
_PATIENCE = 1.0


class Line:
    """The stream of a blocking client. A thread hears the answers, so that the client can do other things meanwhile."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._call: Any = None
        self._thread = threading.Thread()
        self._outgoing: queue.SimpleQueue[explain_pb2.ExplainRequest | None] = queue.SimpleQueue()
        self._heard: queue.SimpleQueue[Heard | Ended] = queue.SimpleQueue()
        self._heard_last = False

    def heed(self, step: Open | Send | Finish) -> None:
        """Do what a flow says.

        A request is sent some time soon: waiting for it could stop both sides, each until the other reads.
        """
        match step:
            case Open():
                self.close()
                self._outgoing, self._heard = queue.SimpleQueue(), queue.SimpleQueue()
                self._call = self._start(iter(self._outgoing.get, None))
                self._thread = threading.Thread(target=_hear, args=(self._call, self._heard), name="cdam", daemon=True)
                self._thread.start()
            case Send(request):
                self._outgoing.put(request)
            case Finish():
                self._outgoing.put(None)

    def wait(self, items: Iterator[Item | ImageLike] | None) -> Heard | Ended | Taken:
        """Wait for what is heard, or the next of the items, which are taken in the caller's thread."""
        # Turn and turn about, so that neither a slow source of items nor many answers keep the other back.
        if items is not None and (self._heard_last or self._heard.empty()):
            self._heard_last = False
            return Taken(tuple(islice(items, 1)))
        self._heard_last = True
        return self._heard.get()

    def close(self) -> None:
        """Cancel what is under way, and leave no thread behind."""
        if self._call is not None:
            self._call.cancel()
            self._outgoing.put(None)
            self._thread.join()
            self._call = None


def run(flow: StreamFlow, items: Iterator[Item | ImageLike], line: Line) -> Generator[ItemResult, None, None]:
    """Run a flow."""
    try:
        step = next(flow)
        while True:
            came: Any = None
            match step:
                case Wait(take):
                    came = line.wait(items if take else None)
                case Work(call):
                    came = call()
                case Emit(result):
                    yield result
                case Pause(seconds):
                    time.sleep(seconds)
                case _:
                    line.heed(step)
            step = flow.send(came)
    except StopIteration:
        return
    finally:
        line.close()


def _hear(call: Any, heard: "queue.SimpleQueue[Heard | Ended]") -> None:
    try:
        for answer in call:
            heard.put(Heard(answer))
        heard.put(Ended())
    except grpc.RpcError as error:
        heard.put(Ended(error_from_rpc(error)))


class AsyncLine:
    """The stream of a client for asyncio."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._call: Any = None
        self._ending: Any = None
        self._outgoing: asyncio.Queue[explain_pb2.ExplainRequest | None] = asyncio.Queue()
        # Both outlive a wait if they have to, so that nothing that comes is lost.
        self._hearing: asyncio.Task[Heard | Ended] | None = None
        self._taking: asyncio.Task[Taken] | None = None
        self._heard_last = False

    async def heed(self, step: Open | Send | Finish) -> None:
        """As `Line.heed`."""
        match step:
            case Open():
                await self._hang_up()
                self._outgoing = asyncio.Queue()
                self._call = self._start(_each_of(self._outgoing))
                self._ending = Ending(self._call)
            case Send(request):
                self._outgoing.put_nowait(request)
            case Finish():
                self._outgoing.put_nowait(None)

    async def wait(self, items: AsyncIterator[Item | ImageLike] | None) -> Heard | Ended | Taken:
        """As `Line.wait`; while an item is waited for, answers are heard."""
        awaited: set[asyncio.Task[Any]] = set()
        self._hearing = self._hearing or asyncio.create_task(_hear_async(self._call, self._ending))
        awaited.add(self._hearing)
        if items is not None:
            self._taking = self._taking or asyncio.create_task(_take(items))
            awaited.add(self._taking)
        done, _ = await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        if self._taking in done and (self._heard_last or self._hearing not in done):
            taken, self._taking, self._heard_last = self._taking, None, False
            return taken.result()
        heard, self._hearing, self._heard_last = self._hearing, None, True
        return heard.result()

    async def close(self) -> None:
        """Cancel what is under way, and leave no task behind."""
        await self._hang_up()
        await _cancel(self._taking)

    async def _hang_up(self) -> None:
        if self._call is not None:
            self._call.cancel()
            self._outgoing.put_nowait(None)
            self._call = None
        await _cancel(self._hearing)
        self._hearing = None


async def run_async(
    flow: StreamFlow, items: AsyncIterator[Item | ImageLike], line: AsyncLine
) -> AsyncGenerator[ItemResult, None]:
    """Run a flow."""
    try:
        step = next(flow)
        while True:
            came: Any = None
            match step:
                case Wait(take):
                    came = await line.wait(items if take else None)
                case Work(call):
                    came = await asyncio.to_thread(call)
                case Emit(result):
                    yield result
                case Pause(seconds):
                    await asyncio.sleep(seconds)
                case _:
                    await line.heed(step)
            step = flow.send(came)
    except StopIteration:
        return
    finally:
        await line.close()


async def each(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    """The items, whichever way they come."""
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


async def _take(items: AsyncIterator[Item | ImageLike]) -> Taken:
    try:
        return Taken((await anext(items),))
    except StopAsyncIteration:
        return Taken(())


async def _hear_async(call: Any, ending: "Ending") -> Heard | Ended:
    """What `_hear` finds out, once. Cancelling it cancels the call."""
    try:
        answer = await call.read()
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # grpc.aio raises this for a stream that the other side cancelled, too.
        return Ended(RpcError("the stream was cancelled", code=grpc.StatusCode.CANCELLED))
    except grpc.aio.AioRpcError as error:
        if (error.code(), error.details()) == WRITE_FAILED:
            return await ending.heard()
        return Ended(error_from_rpc(error))
    return Ended() if answer is grpc.aio.EOF else Heard(answer)


class Ending:
    """How the server ended a call, whatever grpc.aio makes of it."""

    def __init__(self, call: Any) -> None:
        self._told: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        call.add_done_callback(self._note)

    async def heard(self) -> Ended:
        """What the server said; if it doesn't come, that the stream is gone."""
        try:
            return await asyncio.wait_for(asyncio.shield(self._told), _PATIENCE)
        except TimeoutError:
            gone = Unavailable("the stream ended while a request was sent", code=grpc.StatusCode.UNAVAILABLE)
            return Ended(gone)

    def _note(self, call: Any) -> None:
        # Called before anything is written over it, and these coroutines return at once.
        code, said, trailers = (_at_once(known) for known in (call.code(), call.details(), call.trailing_metadata()))
        if (code, said) != WRITE_FAILED and not self._told.done():
            error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailers, said)
            self._told.set_result(Ended() if code is grpc.StatusCode.OK else Ended(error_from_rpc(error)))


def _at_once(coroutine: Any) -> Any:
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise RuntimeError("grpc.aio's status of a call that is over is not known")


async def _each_of(
    outgoing: "asyncio.Queue[explain_pb2.ExplainRequest | None]",
) -> AsyncIterator[explain_pb2.ExplainRequest]:
    while (request := await outgoing.get()) is not None:
        yield request


async def _cancel(task: asyncio.Task[Any] | None) -> None:
    """Cancel a task, and wait until it has ended."""
    if task is not None:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # looked at, so that nobody complains that it never was
