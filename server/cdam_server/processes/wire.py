"""Messages between the processes of one server, over a local socket that nobody else can open."""

from __future__ import annotations

import asyncio
import pickle
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from cdam_server.compute.concurrency import Long
from cdam_server.compute.facts import EvaluationBucket
from cdam_server.compute.scheduling import JobSpec
from cdam_server.processes.ring import Place

GREETING: Final = b"cdam"
"""What a front end sends first, with the descriptor of its ring."""

_LENGTH: Final = struct.Struct("<I")


class PackedWork(NamedTuple):
    """A `ModelWork`.

    Attributes:
        data: The work, pickled without its arrays' bytes.
        places: Where those are: in the ring, or here if there was no room.
    """

    data: bytes
    places: tuple[Place | bytes, ...]


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
    work: PackedWork | None


class Submit(NamedTuple):
    """From a front end: the work of a job that was let in."""

    number: int
    work: PackedWork


class Hold(NamedTuple):
    """From a front end: an evaluation to be held, or a long request to be counted, with its caller, until it is released."""

    number: int
    what: EvaluationBucket | tuple[Long, str]


class Release(NamedTuple):
    """From a front end: nobody waits for the job any more, or what was held is not needed."""

    number: int


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

    Args:
        receive: Called with messages that arrived.
        lost: Called once, when the other process is gone.
    """

    def __init__(self, receive: Callable[[Sequence[Any]], None], lost: Callable[[], None]) -> None:
        self._receive = receive
        self._lost = lost
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
        while len(self._incoming) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._incoming)
            end = _LENGTH.size + length
            if len(self._incoming) < end:
                return
            with memoryview(self._incoming) as view:
                messages = pickle.loads(view[_LENGTH.size : end])  # noqa: S301 - of a process of this server
            del self._incoming[:end]
            self._receive(messages)

    def _flush(self) -> None:
        messages, self._outgoing = self._outgoing, []
        if messages and self._transport is not None and not self._transport.is_closing():
            data = pickle.dumps(messages, pickle.HIGHEST_PROTOCOL)
            self._transport.writelines((_LENGTH.pack(len(data)), data))
