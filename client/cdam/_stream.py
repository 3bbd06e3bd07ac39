"""Streams of items, for both clients and every kind of item: what is sent, what is taken from the caller, what comes of it.

What the items are is a `Job`'s business. One job may have several servers, each with a stream of its own.
"""

import random
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import grpc

from cdam._errors import MalformedResponse, Overloaded, RpcError, Unavailable
from cdam._transport import Answer, Ended, Start, Taken, Transport

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0


@dataclass(frozen=True, eq=False)
class PreparedItem:
    """An item that is ready to be sent.

    Attributes:
        id: What the server calls it.
        position: Its position, from 0.
        request: Its request.
        context: What the job needs to know when it is answered.
    """

    id: str
    position: int
    request: Any
    context: Any = None


class Job(ABC):
    """How items become requests, and answers results.

    Attributes:
        path: The method's full path.
        servers: What the servers are called, for errors.
        window: Most items of a server that are taken and not yet answered.
        retries: How often in a row, without an answer in between, broken streams are taken up again.
    """

    path: ClassVar[str]
    servers: Sequence[str] = ("the server",)
    window: int
    retries: int

    def check(self) -> None:
        """Raise ValueError if its numbers can't be."""
        if self.window < 1 or self.retries < 0:
            raise ValueError(f"window is at least 1 and retries 0, got {self.window} and {self.retries}")

    def start(self, transport: Transport, timeout: float | None) -> Start:
        """What begins the job's streams to a server."""
        return transport.start(self.path, self.serialise, self.parse, timeout)

    @abstractmethod
    def serialise(self, request: Any) -> bytes:
        """A request as it travels."""

    @abstractmethod
    def parse(self, data: bytes) -> Any:
        """An answer."""

    def opening(self) -> Any:
        """A stream's first request, before any item's; the server is ready once it is answered. None: there is none."""
        return None

    @abstractmethod
    def encode(self, item: Any, position: int, unanswered: Container[str]) -> Any:
        """The item, ready to be sent; or its result, if it can't be sent beside those with the unanswered ids."""

    @abstractmethod
    def item_id(self, answer: Any) -> str | None:
        """The id of the item that an answer is about; None: of none."""

    def note(self, answer: Any, server: int) -> bool:
        """Note an answer about no item; whether it is that to the opening.

        Raises:
            CdamError: if the job can't go on.
        """
        raise MalformedResponse(f"an answer about no item, from {self.servers[server]}: {answer!r}")

    @abstractmethod
    def result(self, item: PreparedItem, answer: Any) -> Any:
        """The item's result; or, as an RpcError, that the server takes no more, and didn't take this item."""


@dataclass(eq=False)
class _Server:
    """What is known of one server, from stream to stream."""

    index: int
    is_open: bool = False
    ready: bool = False
    sending: bool = False
    refusal: RpcError | None = None
    failures: int = 0
    due: float = 0.0  # when its stream may be opened
    unanswered: dict[str, PreparedItem] = field(default_factory=dict)

    def opens(self) -> None:
        self.is_open, self.sending, self.ready, self.refusal = True, True, False, None


class Results:
    """The results of a job, done on as many streams as it takes.

    Each item has one result: what is unanswered when a stream breaks is sent again on the next, or to another server.
    A server gets as many items as it answers in time. A stream that breaks is taken up again for as long as there is work,
    unless no server answers any more.
    """

    def __init__(
        self,
        job: Job,
        transport: Transport,
        items: Iterable[Any] | AsyncIterable[Any],
        starts: Sequence[Start],
        closing: Sequence[Transport] = (),
    ) -> None:
        """Open nothing yet.

        Args:
            job: What is to be done.
            transport: How the client waits.
            items: The caller's items.
            starts: For each of the job's servers, what begins a stream.
            closing: What is to be closed with the results.

        Raises:
            TypeError: if the client can't take such items.
        """
        self._job = job
        self._transport = transport
        self._closing = closing
        self._items = transport.iterator(items)
        self._streams = transport.streams(starts)
        self._servers = [_Server(index) for index in range(len(job.servers))]
        self._taken = 0
        self._exhausted = False
        self._unanswered: dict[str, PreparedItem] = {}
        self._unsent: list[PreparedItem] = []  # those of them that no server has, oldest first

    async def next(self) -> Any:
        """The next result; None if there are no more.

        Raises:
            RpcError: if a stream broke, and it is no use to go on.
            MalformedResponse: if the server doesn't answer what it was asked.
        """
        result = None
        while result is None and not self._is_over():
            await self._open()
            self._send()
            event = await self._streams.event(self._items if self._wants_item() else None, self._patience())
            match event:
                case Taken(items):
                    result = await self._encode(items)
                case Answer(server, message):
                    result = self._answered(self._servers[server], message)
                case Ended(server, error):
                    self._ended(self._servers[server], error)
        return result

    async def close(self) -> None:
        """Cancel what is under way."""
        try:
            await self._streams.close()
        finally:
            for transport in self._closing:
                await transport.close()

    def _is_done(self) -> bool:
        """Whether all items have been taken and have their results."""
        return self._exhausted and not self._unanswered

    def _is_over(self) -> bool:
        """Whether besides all streams have ended that ever began."""
        return self._is_done() and not any(server.is_open and server.ready for server in self._servers)

    async def _open(self) -> None:
        for server in self._servers:
            if not (server.is_open or self._is_done()) and server.due <= time.monotonic():
                server.opens()
                await self._streams.open(server.index)
                opening = self._job.opening()
                server.ready = opening is None
                if opening is not None:
                    self._streams.send(server.index, opening)

    def _send(self) -> None:
        while self._unsent and (free := self._free()):
            item = self._unsent.pop(0)
            free.unanswered[item.id] = item
            self._streams.send(free.index, item.request)
        for server in self._servers:
            # What another server has may yet come to this one.
            has_the_rest = self._exhausted and len(self._unanswered) == len(server.unanswered)
            if server.sending and (server.refusal or (server.ready and has_the_rest)):
                server.sending = False
                self._streams.finish(server.index)

    def _free(self) -> _Server | None:
        """The server with the least to do that has room."""
        ready = [server for server in self._servers if server.ready and server.sending and not server.refusal]
        least = min(ready, key=lambda server: len(server.unanswered), default=None)
        return least if least and len(least.unanswered) < self._job.window else None

    def _wants_item(self) -> bool:
        return not (self._exhausted or self._unsent) and self._free() is not None

    def _patience(self) -> float | None:
        """Seconds until a stream is to be opened again; None: none is."""
        due = [] if self._is_done() else [server.due for server in self._servers if not server.is_open]
        return max(0.0, min(due) - time.monotonic()) if due else None

    async def _encode(self, items: Sequence[Any]) -> Any:
        """Make the request of the item, if there is one; its result, if that can't be done."""
        if not items:
            self._exhausted = True
            return None
        position, self._taken = self._taken, self._taken + 1
        made = await self._transport.work(partial(self._job.encode, items[0], position, self._unanswered))
        if not isinstance(made, PreparedItem):
            return made
        self._unanswered[made.id] = made
        self._unsent.append(made)
        return None

    def _answered(self, server: _Server, message: Any) -> Any:
        """The item's result, if the answer is one."""
        item_id = self._job.item_id(message)
        if item_id is None:
            server.ready |= self._job.note(message, server.index)
            return None
        item = server.unanswered.pop(item_id, None)
        if item is None:
            raise MalformedResponse(f"an answer to {item_id!r}, which is not asked, or answered already")
        result = self._job.result(item, message)
        if isinstance(result, RpcError):  # the server goes down: it answers what it has in work, others get the rest
            server.refusal = result
            self._send_again([item])
            return None
        server.failures = 0
        del self._unanswered[item_id]
        return result

    def _send_again(self, items: Iterable[PreparedItem]) -> None:
        self._unsent = sorted([*self._unsent, *items], key=lambda item: item.position)

    def _ended(self, server: _Server, error: RpcError | None) -> None:
        error = error or server.refusal
        if error is None and (server.unanswered or server.sending):
            raise MalformedResponse(f"the stream ended with {len(server.unanswered)} items unanswered")
        server.is_open = server.sending = False
        if error is None or (self._is_done() and is_passing(error)):
            return
        server.failures += 1
        if not is_passing(error) or all(server.failures > self._job.retries for server in self._servers):
            error.add_note(f"This came of {self._job.servers[server.index]}.")
            raise error
        self._send_again(server.unanswered.values())
        server.unanswered = {}
        server.due = time.monotonic() + pause_seconds(error, server.failures)


def is_passing(error: RpcError) -> bool:
    """Whether it may go better on another stream. A server that closes cancels what it can't wait for."""
    return isinstance(error, Unavailable | Overloaded) or error.code is grpc.StatusCode.CANCELLED


def pause_seconds(error: RpcError, failures: int) -> float:
    """Seconds to wait: what the server advises, or twice as long each time."""
    advised: float | None = getattr(error, "retry_after", None)
    if advised is None:
        advised = min(_FIRST_PAUSE_SECONDS * 2.0 ** min(failures - 1, 10), _LONGEST_PAUSE_SECONDS)
    return min(advised, _LONGEST_PAUSE_SECONDS) * random.uniform(0.8, 1.2)  # noqa: S311
