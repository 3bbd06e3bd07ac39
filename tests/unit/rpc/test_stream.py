"""The stream server alone: items are plain messages, answers what a test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from itertools import count

import grpc
import pytest
import structlog
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from structlog.testing import capture_logs

from cdam.v1 import common_pb2
from cdam_server.compute.scheduling import ByteBudget
from cdam_server.errors import (
    DeadlineError,
    ExhaustedError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from cdam_server.operation.telemetry import Telemetry
from cdam_server.rpc.stream import Exchange, StreamServer

Answer = Callable[[str], Awaitable[str]]
Response = tuple[str, str | common_pb2.ItemError]


@dataclass
class Talk:
    """A stream without a wire: what was read of it, what was written to it, and what stands in the way."""

    answer: Answer
    max_items: int = 8
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    telemetry: Telemetry = field(default_factory=Telemetry)
    read: int = 0
    written: list[Response] = field(default_factory=list)
    may_write: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.may_write.set()

    async def serve(self, items: Iterable[str] | AsyncIterator[str]) -> None:
        server = StreamServer(self.telemetry, self.draining, max_items=self.max_items)
        await server.serve(self._count(items), self._write, Exchange(str, self._pair, lambda *failure: failure))

    async def _pair(self, item: str) -> Response:
        return item, await self.answer(item)

    async def _count(self, items: Iterable[str] | AsyncIterator[str]) -> AsyncIterator[str]:
        if isinstance(items, AsyncIterator):
            async for item in items:
                self.read += 1
                yield item
        else:
            for item in items:
                self.read += 1
                yield item

    async def _write(self, response: Response) -> None:
        await self.may_write.wait()
        self.written.append(response)

    def answers(self) -> dict[str, str | common_pb2.ItemError]:
        assert len(dict(self.written)) == len(self.written)
        return dict(self.written)


async def echo(item: str) -> str:
    return item.upper()


async def never(item: str) -> str:
    await asyncio.Event().wait()
    return item


def once(may: asyncio.Event) -> Answer:
    """Answers what it is asked, as soon as it may."""

    async def answer(item: str) -> str:
        await may.wait()
        return item

    return answer


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(200):
        await asyncio.sleep(0)


async def silence(*items: str) -> AsyncIterator[str]:
    """The items, and then nothing, but no end either."""
    for item in items:
        yield item
    await asyncio.Event().wait()


def code(outcome: str | common_pb2.ItemError) -> int:
    assert isinstance(outcome, common_pb2.ItemError)
    return outcome.code


def violation(error: str | common_pb2.ItemError) -> str:
    assert code(error) == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert isinstance(error, common_pb2.ItemError)
    detail = error_details_pb2.BadRequest()
    assert error.details[0].Unpack(detail)
    return str(detail.field_violations[0].field)


async def test_every_item_has_its_answer() -> None:
    talk = Talk(echo, max_items=3)
    await talk.serve(map(str, range(100)))
    assert talk.answers() == {str(number): str(number) for number in range(100)}
    empty = Talk(echo)
    await empty.serve([])
    assert (empty.read, empty.written) == (0, [])


async def test_answers_do_not_wait_for_each_other() -> None:
    may = {name: asyncio.Event() for name in "abc"}

    async def answer(item: str) -> str:
        await may[item].wait()
        return item

    talk = Talk(answer)
    serving = asyncio.create_task(talk.serve("abc"))
    for name in "cab":
        may[name].set()
        await settle()
    await serving
    assert [item for item, _ in talk.written] == ["c", "a", "b"]


async def test_no_more_items_are_read_than_may_be_in_work() -> None:
    working = most = 0
    may_work = asyncio.Event()

    async def answer(item: str) -> str:
        nonlocal working, most
        working += 1
        most = max(most, working)
        await may_work.wait()
        working -= 1
        return item

    talk = Talk(answer, max_items=5)
    serving = asyncio.create_task(talk.serve(map(str, range(50))))
    await settle()
    assert (talk.read, working) == (5, 5)
    may_work.set()
    await serving
    assert (talk.read, most, len(talk.answers())) == (50, 5, 50)


async def test_a_client_that_does_not_read_is_not_read_from() -> None:
    talk = Talk(echo, max_items=5)
    talk.may_write.clear()
    serving = asyncio.create_task(talk.serve(map(str, range(50))))
    await settle()
    assert (talk.read, talk.written) == (5, [])
    talk.may_write.set()
    await serving
    assert len(talk.answers()) == 50


@pytest.mark.parametrize(
    ("error", "expected", "detail"),
    [
        (InvalidArgumentError("image", "is required"), "INVALID_ARGUMENT", error_details_pb2.BadRequest),
        (NotFoundError("model", "unicorn", "no such model"), "NOT_FOUND", error_details_pb2.ResourceInfo),
        (FailedPreconditionError("NO_OUTPUTS", "none"), "FAILED_PRECONDITION", error_details_pb2.ErrorInfo),
        (ExhaustedError("OUT_OF_MEMORY", "too large"), "RESOURCE_EXHAUSTED", error_details_pb2.ErrorInfo),
        (UnavailableError("going down", 1.0), "UNAVAILABLE", error_details_pb2.RetryInfo),
        (DeadlineError("too late"), "DEADLINE_EXCEEDED", error_details_pb2.RequestInfo),
        (ZeroDivisionError("/secret/path"), "INTERNAL", error_details_pb2.ErrorInfo),
    ],
)
async def test_an_item_fails_alone(error: Exception, expected: str, detail: type) -> None:
    async def answer(item: str) -> str:
        if item == "bad":
            raise error
        return item

    talk = Talk(answer)
    with capture_logs() as logs:
        await talk.serve(["good", "bad", "better"])
    answers = talk.answers()
    assert (answers["good"], answers["better"]) == ("good", "better")
    bad = answers["bad"]
    assert isinstance(bad, common_pb2.ItemError)
    assert bad.code == grpc.StatusCode[expected].value[0]
    assert bad.details[0].Is(detail.DESCRIPTOR)
    assert talk.telemetry.registry.get_sample_value("cdam_request_failures_total", {"reason": expected}) == 1
    internal = [line for line in logs if line["event"] == "internal error"]
    assert len(internal) == (expected == "INTERNAL")
    if internal:
        assert "secret" not in str(bad)
        assert internal[0]["error_id"] in bad.message
        assert internal[0]["request_id"] == "bad"
    items = {line["request_id"]: line["code"] for line in logs if line["event"] == "item"}
    assert items == {"good": "OK", "better": "OK", "bad": expected}


async def test_the_stream_knows_how_many_items_it_had() -> None:
    async def answer(item: str) -> str:
        structlog.contextvars.bind_contextvars(model=item)
        if item == "b":
            raise DeadlineError("late")
        return item

    await Talk(answer).serve("abc")
    assert structlog.contextvars.get_contextvars() == {"items": 3, "failures": 1}  # and nothing of a single item


async def test_an_item_needs_an_id() -> None:
    talk = Talk(echo)
    await talk.serve(["a", "", "b"])
    answers = talk.answers()
    assert violation(answers.pop("")) == "request.request_id"
    assert answers == {"a": "A", "b": "B"}


async def test_a_second_item_of_an_unanswered_id_fails_and_the_first_does_not() -> None:
    may = asyncio.Event()
    talk = Talk(once(may))
    serving = asyncio.create_task(talk.serve("aba"))
    await settle()
    ((item, error),) = talk.written
    assert (item, violation(error)) == ("a", "request.request_id")
    may.set()
    await serving
    assert sorted(talk.written[1:]) == [("a", "a"), ("b", "b")]


async def test_an_id_is_free_as_soon_as_its_answer_can_be_read() -> None:
    """A client may use it again before the server has heard that the answer has gone out."""
    again: asyncio.Queue[str | None] = asyncio.Queue()

    async def items() -> AsyncIterator[str]:
        yield "a"
        while (item := await again.get()) is not None:
            yield item

    served: list[Response] = []

    async def write(response: Response) -> None:
        served.append(response)
        again.put_nowait("a" if len(served) == 1 else None)
        if len(served) == 1:
            await settle()  # the second item is read while this write is not over

    async def pair(item: str) -> Response:
        return item, item

    await StreamServer(Telemetry(), asyncio.Event()).serve(items(), write, Exchange(str, pair, lambda *failed: failed))
    assert served == [("a", "a"), ("a", "a")]


async def test_an_item_waits_for_room_in_the_queue() -> None:
    tries = 0

    async def answer(item: str) -> str:
        nonlocal tries
        tries += 1
        if tries <= 3:
            raise OverloadedError("the queue is full", 0.01)
        return item

    talk = Talk(answer)
    await talk.serve(["a"])
    assert talk.answers() == {"a": "a"}
    assert tries == 4


async def test_an_idle_stream_ends_when_the_server_goes_down() -> None:
    talk = Talk(echo)
    serving = asyncio.create_task(talk.serve(silence("a")))
    await settle()
    assert talk.answers() == {"a": "A"}
    talk.draining.set()
    with pytest.raises(UnavailableError) as caught:
        await serving
    assert caught.value.retry_after > 0


async def test_what_is_in_work_is_answered_when_the_server_goes_down_and_no_more_is_read() -> None:
    may = asyncio.Event()

    async def answer(item: str) -> str:
        if item == "waiting":
            raise OverloadedError("the queue is full", 3600.0)
        await may.wait()
        return item

    talk = Talk(answer, max_items=3)
    serving = asyncio.create_task(talk.serve(["a", "waiting", "b", "c", "d"]))
    await settle()
    talk.draining.set()
    await settle()
    assert not serving.done()
    may.set()
    with pytest.raises(UnavailableError):
        await serving
    answers = talk.answers()
    assert code(answers.pop("waiting")) == grpc.StatusCode.UNAVAILABLE.value[0]
    assert answers == {"a": "a", "b": "b"}
    assert talk.read <= 4  # the one that was being read when the word came is nobody's any more: it has no answer


async def test_a_stream_whose_client_has_sent_all_ends_well_although_the_server_goes_down() -> None:
    may = asyncio.Event()
    talk = Talk(once(may))
    serving = asyncio.create_task(talk.serve("ab"))
    await settle()
    talk.draining.set()
    await settle()
    may.set()
    await serving
    assert talk.answers() == {"a": "a", "b": "b"}


async def test_cancelling_a_stream_cancels_its_items_and_leaves_no_task() -> None:
    before = asyncio.all_tasks()
    cancelled: list[str] = []

    async def answer(item: str) -> str:
        try:
            return await never(item)
        except asyncio.CancelledError:
            cancelled.append(item)
            raise

    async def full(item: str) -> str:
        raise OverloadedError("the queue is full", 3600.0)

    for how, items in ((answer, silence("a", "b")), (full, silence("a", "b")), (echo, silence("a", "b"))):
        talk = Talk(how)
        serving = asyncio.create_task(talk.serve(items))
        await settle()
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        assert asyncio.all_tasks() == before
    assert sorted(cancelled) == ["a", "b"]


async def test_no_task_is_left_by_any_end() -> None:
    before = asyncio.all_tasks()
    await Talk(echo).serve("abc")
    assert asyncio.all_tasks() == before
    talk = Talk(echo)
    talk.draining.set()
    with pytest.raises(UnavailableError):
        await talk.serve(silence("a"))
    assert asyncio.all_tasks() == before


async def test_what_is_no_message_ends_the_stream_after_the_answers_to_those_before() -> None:
    async def items() -> AsyncIterator[str]:
        yield "a"
        yield "b"
        raise DecodeError("Error parsing message")

    talk = Talk(echo)
    with pytest.raises(InvalidArgumentError) as caught:
        await talk.serve(items())
    assert caught.value.field == "request"
    assert talk.answers() == {"a": "A", "b": "B"}


@pytest.mark.parametrize("fails", ["read", "write"])
async def test_a_lost_client_is_as_good_as_a_cancelled_one(fails: str) -> None:
    before = asyncio.all_tasks()

    async def items() -> AsyncIterator[str]:
        yield "slow"
        yield "quick"
        if fails == "read":
            raise grpc.aio.BaseError("the call is over")
        await asyncio.Event().wait()

    async def pair(item: str) -> Response:
        return item, await (never(item) if item == "slow" else echo(item))

    async def write(response: Response) -> None:
        if fails == "write":
            raise grpc.aio.BaseError("the call is over")

    server = StreamServer(Telemetry(), asyncio.Event())
    with pytest.raises(asyncio.CancelledError):
        await server.serve(items(), write, Exchange(str, pair, lambda *failure: failure))
    assert asyncio.all_tasks() == before


async def test_items_of_all_streams_share_their_memory() -> None:
    """However many streams there are: what is read and not answered is bounded, and an item too large for it goes alone."""
    server = StreamServer(Telemetry(), asyncio.Event(), budget=ByteBudget(100))
    held = most = 0

    async def answer(item: int) -> int:
        nonlocal held, most
        held += item
        most = max(most, held)
        await asyncio.sleep(0.001)
        held -= item
        return item

    async def items() -> AsyncIterator[int]:
        for size in (60, 30, 10, 250, 40, 40, 40):
            yield size

    answers: list[int] = []

    async def write(response: int) -> None:
        answers.append(response)

    numbers = count()
    exchange = Exchange(lambda _: str(next(numbers)), answer, lambda item_id, error: -1, lambda item: item)
    async with asyncio.timeout(10):
        await asyncio.gather(*(server.serve(items(), write, exchange) for _ in range(5)))
    assert sorted(answers) == sorted([60, 30, 10, 250, 40, 40, 40] * 5)
    assert most == 250


async def test_a_stream_that_is_answered_as_a_whole_must_not_fall_silent() -> None:
    async def requests() -> AsyncIterator[str]:
        yield "a"
        await asyncio.sleep(60)

    server = StreamServer(Telemetry(), asyncio.Event(), idle_seconds=0.05)
    messages = server.messages(requests())
    assert await anext(messages) == "a"
    with pytest.raises(DeadlineError, match="nothing came"):
        await anext(messages)


async def test_a_stream_that_keeps_a_place_must_not_fall_silent() -> None:
    async def requests() -> AsyncIterator[str]:
        yield "a"
        await asyncio.sleep(60)

    answers: list[str] = []

    async def write(answer: str) -> None:
        answers.append(answer)

    server = StreamServer(Telemetry(), asyncio.Event(), idle_seconds=0.05)
    exchange = Exchange(str, echo, lambda item_id, error: f"{item_id}: {error.message}")
    with pytest.raises(UnavailableError, match="nothing came") as caught:
        await server.serve(requests(), write, exchange, may_idle=False)
    assert answers == ["A"]
    assert caught.value.retry_after > 0
