"""The front end's side of the connections to compute processes: `Compute`, elsewhere."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any, Final, cast

from cdam_server.compute.concurrency import Long
from cdam_server.compute.facts import EvaluationBucket, EvaluationFacts
from cdam_server.compute.scheduling import (
    Answer,
    DeviceLostError,
    Done,
    ExpiredError,
    JobSpec,
    Observer,
    QueueFullError,
    policy,
)
from cdam_server.compute.work import ModelWork
from cdam_server.processes.board import Board, ImagePlaces
from cdam_server.processes.ring import RingWriter
from cdam_server.processes.wire import (
    GREETING,
    GREETING_SECONDS,
    Admit,
    Admitted,
    Answered,
    Consumed,
    Failed,
    Hold,
    Link,
    Release,
    Submit,
    Welcome,
)

# Ratio to max_pending, and to a job's deadline. Below it the device has so little to do that a job is prepared before it is let in: it
# would hardly be refused, and one message is saved.
_LITTLE: Final = 0.25
# Seconds. So long a caller who was refused is refused again without asking: the queue has not become much shorter.
_REFUSAL_SECONDS: Final = 0.05
# Seconds. A device that says nothing for so long gets nothing new while there are others.
_SILENT_SECONDS: Final = 2.0
# Seconds. Where only the connection to a device is lost, and not its process, it is made again so much later.
_RECONNECT_SECONDS: Final = 0.5
# Callers whose last refusal is remembered.
_REFUSALS: Final = 1024


class RemoteCompute:
    """Computes on the devices that compute processes own.

    Args:
        board: What the devices have to do.
        number: Of this front end's row.
        of: Number of front ends.
        max_pending: The server's bound on requests.
        observer: Told of refusals that no compute process has heard of.
        remembers: Whether the devices keep tokens, so that it pays to send an image where it has been.
    """

    def __init__(
        self, board: Board, number: int, of: int, max_pending: int, observer: Observer, *, remembers: bool
    ) -> None:
        self._board = board
        self._rows = [board.front_ends[other] for other in range(of)]
        self._row = self._rows[number]
        self._max_pending = max_pending
        self._observer = observer
        self._images = ImagePlaces(board)
        self._remembers = remembers
        self._devices: dict[int, _Device] = {}
        self._closed = False
        self._connecting = asyncio.Lock()
        self._reconnecting: set[asyncio.Task[None]] = set()
        self._evaluations: defaultdict[EvaluationBucket, list[_Device]] = defaultdict(list)
        self._refusals: dict[tuple[Any, ...], tuple[float, QueueFullError]] = {}

    async def connect(self, number: int, path: Path) -> None:
        """Use a device from now on, if it is not used already; later, if its process does not answer, and not if there is none."""
        async with self._connecting:
            if number in self._devices:
                return
            device = _Device(number, self._board.devices[number], lambda: self._forget(number, path))
            try:
                await device.connect(path)
            except TimeoutError:
                device.link.close()
                return
            except OSError:  # the supervisor tells when there is another
                return
            if not device.link.closed:
                self._devices[number] = device
                self._row.devices = len(self._devices)

    def _forget(self, number: int, path: Path) -> None:
        self._devices.pop(number, None)
        self._row.devices = len(self._devices)
        if not self._closed:
            task = asyncio.create_task(self._reconnect(number, path), name=f"reconnect {number}")
            self._reconnecting.add(task)
            task.add_done_callback(self._reconnecting.discard)

    async def _reconnect(self, number: int, path: Path) -> None:
        await asyncio.sleep(_RECONNECT_SECONDS)
        await self.connect(number, path)

    @property
    def connected(self) -> bool:
        """Whether there is a device at all."""
        return bool(self._devices)

    def close(self) -> None:
        """Leave all devices."""
        self._closed = True
        for task in self._reconnecting:
            task.cancel()
        for device in list(self._devices.values()):
            device.link.close()

    @asynccontextmanager
    async def admit(self, spec: JobSpec, image: Callable[[], int] | None = None) -> AsyncIterator[_Ticket]:
        """See `Compute`; while there is little to do, the job is let in only when its work comes."""
        device = self._device_for(spec, image)
        self._check(device, spec)
        ticket = _Ticket(device, spec)
        try:
            if self._little_to_do(device, spec):
                self._row.preparing += 1
                try:
                    yield ticket
                finally:
                    self._row.preparing -= 1
            else:
                await ticket.admit()
                yield ticket
        except QueueFullError as refusal:
            self._remember(spec, refusal)
            raise
        except asyncio.CancelledError:
            if ticket.admitted:
                self._observer.dropped("cancelled")
            raise
        except ExpiredError:
            self._observer.dropped("expired")
            raise
        finally:
            ticket.release()

    @asynccontextmanager
    async def long_request(self, kind: Long, caller: str) -> AsyncIterator[None]:
        """See `Compute`; all front ends ask the same process."""
        device = self._devices.get(min(self._devices, default=-1))
        if device is None:
            raise DeviceLostError("nothing can be computed now")
        async with device.holding((kind, caller)):
            yield

    @asynccontextmanager
    async def evaluation(self, bucket: EvaluationBucket) -> AsyncIterator[EvaluationFacts]:
        """See `Compute`; all its samples go to one device."""
        device = self._holder(bucket) or self._least_loaded()
        async with device.holding(bucket) as (facts, lost):
            holders = self._evaluations[bucket]
            holders.append(device)
            try:
                async with _ended_by(lost):
                    yield cast("EvaluationFacts", facts)
            finally:
                holders.remove(device)
                if not holders:
                    self._evaluations.pop(bucket, None)

    def _holder(self, bucket: EvaluationBucket) -> _Device | None:
        """A device that holds an evaluation."""
        return next((device for device in self._evaluations.get(bucket, ()) if not device.link.closed), None)

    def _device_for(self, spec: JobSpec, image: Callable[[], int] | None) -> _Device:
        if isinstance(spec.bucket, EvaluationBucket):
            if (holder := self._holder(spec.bucket)) is None:
                raise DeviceLostError("nothing can be computed any more")
            return holder
        if image is None or not self._remembers or len(self._devices) < 2:
            return self._least_loaded()
        key = image()
        device = self._devices.get(cast("int", self._images.get(key)))
        if device is None or device.row.jobs >= self._max_pending or _is_silent(device):
            device = self._least_loaded()
            self._images.put(key, device.number)
        return device

    def _least_loaded(self) -> _Device:
        if not self._devices:
            raise DeviceLostError("nothing can be computed now")
        return min(self._devices.values(), key=lambda device: (_is_silent(device), device.row.seconds, device.row.jobs))

    def _check(self, device: _Device, spec: JobSpec) -> None:
        """Refuse what would be refused anyway, before anybody is asked.

        Raises:
            QueueFullError: There is no room for anyone, or there was none for this caller a moment ago.
        """
        refusal = None
        if not spec.background and device.row.jobs >= self._max_pending:
            retry_after = max(policy.MIN_RETRY_SECONDS, policy.RETRY_SHARE * device.row.seconds)
            message = f"the queue is full (max_pending); requests being served: {device.row.jobs:.0f}"
            refusal = QueueFullError("jobs", message, retry_after)
        elif (known := self._refusals.get(_refusal_key(spec))) is not None:
            if time.monotonic() - known[0] < _REFUSAL_SECONDS:
                refusal = known[1]
            else:
                del self._refusals[_refusal_key(spec)]
        if refusal is not None:
            self._observer.refused(refusal.reason)
            raise QueueFullError(refusal.reason, str(refusal), refusal.retry_after)

    def _remember(self, spec: JobSpec, refusal: QueueFullError) -> None:
        if refusal.reason not in {"jobs", "deadline"}:  # the others depend on what the next job weighs
            return
        if len(self._refusals) >= _REFUSALS:
            self._refusals.clear()
        self._refusals.setdefault(_refusal_key(spec), (time.monotonic(), refusal))

    def _little_to_do(self, device: _Device, spec: JobSpec) -> bool:
        jobs = device.row.jobs + sum(row.preparing for row in self._rows)
        in_time = spec.timeout is None or device.row.seconds < _LITTLE * spec.timeout
        return bool(jobs < _LITTLE * self._max_pending and in_time)


def _is_silent(device: _Device) -> bool:
    return bool(time.monotonic() - device.row.beat > _SILENT_SECONDS)


def _refusal_key(spec: JobSpec) -> tuple[Any, ...]:
    """What two jobs have in common if the second one would be refused as the first one was."""
    timeout = None if spec.timeout is None else round(spec.timeout, 1)
    return spec.caller, spec.rank, spec.bucket, spec.cost, timeout


class _Device:
    """The connection to one compute process.

    Args:
        number: Of the device.
        row: Its row of the board.
        gone: Called once, when the process is gone.
    """

    def __init__(self, number: int, row: Any, gone: Callable[[], object]) -> None:
        self.number = number
        self.row = row
        self.ring = RingWriter()
        self.link = Link(self._receive, self._lost, put=self.ring.put)
        self._gone = gone
        self._welcome = asyncio.Event()
        self._numbers = count()
        self._admissions: dict[int, asyncio.Future[object]] = {}
        self._answers: dict[int, asyncio.Future[object]] = {}

    async def connect(self, path: Path) -> None:
        """Hand the ring over, and wait for the welcome.

        Raises:
            OSError: There is no process, or, as a TimeoutError, none that answers.
        """
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            client.connect(str(path))
            socket.send_fds(client, [GREETING], [self.ring.file])
        except OSError:
            client.close()
            self.ring.close()
            raise
        await asyncio.get_running_loop().create_unix_connection(lambda: self.link, sock=client)
        async with asyncio.timeout(GREETING_SECONDS):
            await self._welcome.wait()

    def begin(self) -> tuple[int, asyncio.Future[object]]:
        """A number for messages, and the future of the answer to it.

        Raises:
            DeviceLostError: The process is gone.
        """
        if self.link.closed:
            raise DeviceLostError("nothing can be computed any more")
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        return number, answer

    async def admission(self, number: int) -> object:
        """What is known when it has been let in; raises the answer if it has not."""
        admitted = self._admissions[number] = asyncio.get_running_loop().create_future()
        return await admitted

    def end(self, number: int) -> bool:
        """Expect no answer any more; whether one was still to come."""
        self._admissions.pop(number, None)
        answer = self._answers.pop(number, None)
        if answer is not None:
            answer.cancel()
        return answer is not None

    @asynccontextmanager
    async def holding(
        self, what: EvaluationBucket | tuple[Long, str]
    ) -> AsyncIterator[tuple[object, asyncio.Future[object]]]:
        """Have something held as long as the block runs; yields what is told of it, and what fails if it is lost."""
        number, lost = self.begin()
        self.link.send(Hold(number, what))
        try:
            yield await self.admission(number), lost
        finally:
            if lost.done() and not lost.cancelled():
                lost.exception()  # nobody need ask for it
            if self.end(number):
                self.link.send(Release(number))

    def _receive(self, messages: Sequence[Any]) -> None:
        for message in messages:
            match message:
                case Answered(number, answer):
                    self._answer(number, answer)
                case Admitted(number, facts):
                    _settle(self._admissions.pop(number, None), facts)
                case Consumed(total):
                    self.ring.consumed(total)
                case Welcome():
                    self._welcome.set()

    def _answer(self, number: int, answer: object) -> None:
        admission, future = self._admissions.pop(number, None), self._answers.pop(number, None)
        _settle(admission or future, answer)

    def _lost(self) -> None:
        self._gone()  # before any caller hears of it
        self.ring.close()
        for number in list(self._answers):
            self._answer(number, Failed.of(DeviceLostError("nothing can be computed any more")))


@asynccontextmanager
async def _ended_by(lost: asyncio.Future[object]) -> AsyncIterator[None]:
    """End the block when the future fails, with its exception."""
    task, inside = asyncio.current_task(), True
    assert task is not None

    def end(_: object) -> None:
        if inside:  # it may be called when the block has just ended
            task.cancel()

    lost.add_done_callback(end)
    try:
        yield
    except asyncio.CancelledError:
        if lost.done() and not lost.cancelled() and not task.uncancel():
            lost.result()
        raise
    finally:
        inside = False
        lost.remove_done_callback(end)


def _settle(future: asyncio.Future[object] | None, answer: object) -> None:
    if future is None or future.done():  # nobody waits any more
        return
    if isinstance(answer, Failed):
        future.set_exception(answer.error())
    else:
        future.set_result(answer)


class _Ticket:
    """See `Ticket`."""

    def __init__(self, device: _Device, spec: JobSpec) -> None:
        self._device = device
        self._spec = spec
        self._arrived = time.monotonic()
        self._number: int | None = None
        self._answer: asyncio.Future[object] | None = None

    async def admit(self) -> None:
        """Ask for room; raises what `Compute.admit` raises."""
        self._number, self._answer = self._device.begin()
        self._device.link.send(Admit(self._number, self._spec, self._arrived, None))
        await self._device.admission(self._number)

    async def submit(self, work: ModelWork[Answer]) -> Done[Answer]:
        """See `Ticket`."""
        device = self._device
        if self._number is None or self._answer is None:
            self._number, self._answer = device.begin()
            device.link.send(Admit(self._number, self._spec, self._arrived, work))
        else:
            device.link.send(Submit(self._number, work))
        return cast("Done[Answer]", await self._answer)

    @property
    def admitted(self) -> bool:
        """Whether it has been let in, as far as is known: it may have been refused since it was asked for."""
        return self._number is not None

    def release(self) -> None:
        """Nobody waits for it any more."""
        if self._number is not None and self._device.end(self._number):
            self._device.link.send(Release(self._number))
