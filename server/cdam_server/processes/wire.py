"""Messages between the processes of one server, over a local socket that nobody else can open."""

from __future__ import annotations

import asyncio
import pickle
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import structlog
from numpy.typing import NDArray

from cdam_server.compute.concurrency import Long
from cdam_server.compute.facts import EvaluationBucket
from cdam_server.compute.scheduling import JobSpec
from cdam_server.compute.work import ModelWork
from cdam_server.processes.ring import Place

GREETING: Final = b"cdam"
"""What a front end sends first, with the descriptor of its ring."""

GREETING_SECONDS: Final = 2.0
"""For it, and for the welcome that answers it."""

Buffer: TypeAlias = bytearray | NDArray[np.uint8]

_LENGTHS: Final = struct.Struct("<II")  # of the messages, and of where their arrays are
_log = structlog.get_logger("cdam.server")


class Admit(NamedTuple):
    """From a front end: let a job in.

    Attributes:
        number: The front end's own, of all messages about the job.
        spec: What is known of it.
        arrived: When it arrived, by `time.monotonic`.
        work: To be computed as soon as it is let in; None: it is told whether it is, and sends the work then.
    """

    number: int
    spec: JobSpec
    arrived: float
    work: ModelWork[Any] | None


class Submit(NamedTuple):
    """From a front end: the work of a job that was let in."""

    number: int
    work: ModelWork[Any]


class Hold(NamedTuple):
    """From a front end: an evaluation to be held, or a long request to be counted, with its caller, until it is released."""

    number: int
    what: EvaluationBucket | tuple[Long, str]


class Release(NamedTuple):
    """From a front end: nobody waits for the job any more, or what was held is not needed."""

    number: int


class Welcome(NamedTuple):
    """To a front end: its ring is open; the first message."""


class Admitted(NamedTuple):
    """To a front end: a job was let in, or what was to be held is held; what is known of it then."""

    number: int
    facts: object = None


class Answered(NamedTuple):
    """To a front end: the answer to a job or the reason why there is none; the last message about it."""

    number: int
    answer: object


class Failed(NamedTuple):
    """An exception on its way: those of the server take other arguments than `Exception` keeps, so pickle can't make them anew."""

    kind: type[BaseException]
    arguments: tuple[Any, ...]
    state: dict[str, Any]

    @classmethod
    def of(cls, error: BaseException) -> Failed:
        """Pack an exception, without its traceback."""
        try:
            pickle.dumps((error.args, error.__dict__))
        except Exception:  # noqa: BLE001 - whatever it holds, its words must arrive
            return cls(RuntimeError, (f"{type(error).__name__}: {error}",), {})
        return cls(type(error), error.args, dict(error.__dict__))

    def error(self) -> BaseException:
        """The exception."""
        error = self.kind.__new__(self.kind, *self.arguments)
        error.args = self.arguments
        error.__dict__.update(self.state)
        return error


class Consumed(NamedTuple):
    """To a front end: so many bytes of its ring have been read since it began."""

    total: int


class Link(asyncio.Protocol):
    """One end of a connection. Messages of one turn of the event loop travel together, and arrive together.

    The connection is lost if any can't be sent or received, so that both ends know that there is nothing to wait for.

    Args:
        receive: Called with messages that arrived.
        lost: Called once, when the other process is gone.
        put: Takes an array's bytes, and returns where the other process finds them; None if there is no room: then they travel with the messages,
            as all arrays do without this.
        take: Returns the bytes of an array that the other process has put somewhere.
    """

    def __init__(
        self,
        receive: Callable[[Sequence[Any]], None],
        lost: Callable[[], None],
        *,
        put: Callable[[memoryview], Place | None] | None = None,
        take: Callable[[Place], Buffer] | None = None,
    ) -> None:
        self._receive = receive
        self._lost = lost
        self._put = put
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._incoming = bytearray()
        self._outgoing: list[object] = []

    @property
    def closed(self) -> bool:
        """Whether the connection is lost, or was never made."""
        return self._transport is None

    def send(self, message: object) -> None:
        """Send a message; nobody reads it if the connection is lost."""
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(message)

    def close(self) -> None:
        """Send what is to be sent, and close."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002
        """See `asyncio.Protocol`."""
        self._transport = None
        self._lost()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._incoming += data
        while len(self._incoming) >= _LENGTHS.size:
            length, places = _LENGTHS.unpack_from(self._incoming)
            middle = _LENGTHS.size + length
            end = middle + places
            if len(self._incoming) < end:
                return
            with memoryview(self._incoming) as view:
                messages = self._unpacked(view[_LENGTHS.size : middle], view[middle:end])
            del self._incoming[:end]
            self._receive(messages)

    def _unpacked(self, data: memoryview, places: memoryview) -> Any:
        arrays: list[Buffer] = []
        if places:
            for place in pickle.loads(places):  # noqa: S301 - of a process of this server
                assert self._take is not None
                arrays.append(bytearray(place) if isinstance(place, bytes) else self._take(place))
        return pickle.loads(data, buffers=arrays)  # noqa: S301 - likewise

    def _flush(self) -> None:
        messages, self._outgoing = self._outgoing, []
        if not messages or self._transport is None or self._transport.is_closing():
            return
        try:
            self._transport.writelines(self._frame(messages))
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody may wait for what was not sent
            _log.error("messages between processes can't be sent", exc_info=error)
            self._transport.abort()

    def _frame(self, messages: Sequence[object]) -> list[bytes]:
        arrays: list[pickle.PickleBuffer] = []
        keep = arrays.append if self._put is not None else None
        data = pickle.dumps(messages, pickle.HIGHEST_PROTOCOL, buffer_callback=keep)
        places = pickle.dumps([self._place(array) for array in arrays], pickle.HIGHEST_PROTOCOL) if arrays else b""
        chunks = (_LENGTHS.pack(len(data), len(places)), data, places)
        # An empty chunk stays in the transport of Python 3.12 and 3.13 for ever, and the event loop spins.
        return [chunk for chunk in chunks if chunk]

    def _place(self, array: pickle.PickleBuffer) -> Place | bytes:
        assert self._put is not None
        with array.raw() as raw:
            return self._put(raw) or bytes(raw)
