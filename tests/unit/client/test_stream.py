# ruff: noqa: N802 - the generated base class sets names
"""Streams of both clients against a scripted server: what travels, what is answered, and what happens when it breaks."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing, closing, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2 as details

import cdam
from cdam.v1 import common_pb2, explain_pb2
from scripted_server import SOON, UNAVAILABLE, Failure, StreamScript, answer, fail, item_error, scores, serving

IMAGE = np.zeros((40, 60, 3), np.uint8)
Collect = Callable[..., list[cdam.ItemResult]]
Behaviour = Callable[[Iterator[explain_pb2.ExplainRequest], Any], Iterator[explain_pb2.ExplainStreamResponse]]


class Streaming(StreamScript):
    def ExplainStream(self, request_iterator: Any, context: Any) -> Any:
        return self.behave(self.open(context), (item.request for item in request_iterator), context, context)


def explained(request: explain_pb2.ExplainRequest) -> explain_pb2.ExplainStreamResponse:
    return explain_pb2.ExplainStreamResponse(request_id=request.request_id, response=answer(request))


def failed(
    request: explain_pb2.ExplainRequest, code: grpc.StatusCode, *reasons: Any
) -> explain_pb2.ExplainStreamResponse:
    return explain_pb2.ExplainStreamResponse(request_id=request.request_id, error=item_error(code, *reasons))


def echo(requests: Iterator[explain_pb2.ExplainRequest], context: Any) -> Iterator[explain_pb2.ExplainStreamResponse]:
    return map(explained, requests)


def stays(requests: Iterator[explain_pb2.ExplainRequest], context: Any) -> Iterator[explain_pb2.ExplainStreamResponse]:
    """Answers every item, and ends only when it is cancelled."""
    over = threading.Event()
    context.add_callback(over.set)
    with suppress(grpc.RpcError):  # the end of the requests, or the cancellation, whichever is heard first
        yield from map(explained, requests)
    over.wait(60)


def breaks_after(count: int, failure: Failure, *, taking: int = 0) -> Behaviour:
    """Answers so many items, and fails once it has taken some more."""

    def behave(requests: Iterator[explain_pb2.ExplainRequest], context: Any) -> Iterator[Any]:
        yield from map(explained, itertools.islice(requests, count))
        for _ in itertools.islice(requests, taking):
            pass
        fail(context, failure)

    return behave


@pytest.fixture
def script() -> Iterator[Streaming]:
    with serving(Streaming(behaviours=[echo])) as script:
        yield script  # type: ignore[misc]


@pytest.fixture(params=["blocking", "asyncio"])
def collect(request: pytest.FixtureRequest) -> Collect:
    """All results of a stream, by a client of either kind."""

    def blocking(address: str, items: Any, *args: Any, settings: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        before = threading.active_count()
        with cdam.Client(address, **(settings or {})) as client:
            try:
                return list(client.explain_stream(items, *args, **kwargs))
            finally:
                assert not [thread for thread in threading.enumerate() if thread.name == "cdam"], before

    def asynchronous(
        address: str, items: Any, *args: Any, settings: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        async def run() -> Any:
            async with cdam.AsyncClient(address, **(settings or {})) as client:
                return [result async for result in client.explain_stream(items, *args, **kwargs)]

        return asyncio.run(run())

    return blocking if request.param == "blocking" else asynchronous


def by_key(results: list[cdam.ItemResult]) -> dict[Any, cdam.ItemResult]:
    found = {result.key: result for result in results}
    assert len(found) == len(results), "an item has two results"
    return found


def test_items_and_what_they_have_in_common(script: Streaming, collect: Collect, tmp_path: Path) -> None:
    key = object()
    items = [
        IMAGE,
        cdam.Item(IMAGE, targets=["dog", 7], methods="smooth_cdam", key=key),
        cdam.Item(IMAGE, methods=[], key=None),
    ]
    results = by_key(
        collect(
            script.address,
            items,
            "cat",
            methods=cdam.Attention(),
            model="second",
            resize="squash",
            input_size=(32, 48),
            priority="low",
            settings={"token": "secret"},
        )
    )
    assert set(results) == {0, key, 2}
    (requests,) = script.streams
    assert len({request.request_id for request in requests}) == 3
    assert {request.model for request in requests} == {"second"}
    assert {request.priority for request in requests} == {explain_pb2.PRIORITY_LOW}
    assert {request.preprocessing.resize_mode for request in requests} == {common_pb2.RESIZE_MODE_SQUASH}
    assert {request.preprocessing.input_size.width for request in requests} == {48}
    assert [[method.WhichOneof("kind") for method in request.methods] for request in requests] == [
        ["attention"],
        ["smooth_cdam"],
        [],
    ]
    assert [len(request.targets) for request in requests] == [1, 2, 1]
    own = results[key].result()
    assert [relevance.label for relevance in own] == ["dog", "7"]
    assert isinstance(own.maps[0].method, cdam.SmoothCdam)
    np.testing.assert_array_equal(own.maps[1].scores, scores(1))
    assert own.request_id == requests[1].request_id
    assert own.maps[0].overlay().size == (60, 40)  # the image is still there to draw on
    assert script.metadata[0]["authorization"] == "Bearer secret"
    assert script.seconds_left[0] is None or script.seconds_left[0] > 1e6  # no deadline
    assert script.finished == [True]


def test_answers_in_any_order(script: Streaming, collect: Collect) -> None:
    script.behaviours = [lambda requests, _: map(explained, reversed(list(requests)))]
    results = collect(script.address, [IMAGE] * 9, "cat", window=10)
    assert [result.key for result in results] == [8, 7, 6, 5, 4, 3, 2, 1, 0]


def test_no_items(script: Streaming, collect: Collect) -> None:
    assert collect(script.address, []) == []
    assert collect(script.address, iter(())) == []


def test_an_item_fails_alone(script: Streaming, collect: Collect, tmp_path: Path) -> None:
    def behave(requests: Iterator[explain_pb2.ExplainRequest], context: Any) -> Iterator[Any]:
        for request in requests:
            match request.targets[0].output.name:
                case "wrong":
                    violation = details.BadRequest.FieldViolation(field="targets[0]", description="no")
                    reason = details.BadRequest(field_violations=[violation])
                    yield failed(request, grpc.StatusCode.INVALID_ARGUMENT, reason)
                case "internal":
                    info = details.ErrorInfo(reason="INTERNAL", metadata={"error_id": "e1"})
                    yield failed(request, grpc.StatusCode.INTERNAL, info)
                case "strange":
                    yield explain_pb2.ExplainStreamResponse(
                        request_id=request.request_id, error=common_pb2.ItemError(code=4711)
                    )
                case "malformed":
                    response = answer(request)
                    response.maps[0].scores.data = b"123"
                    yield explain_pb2.ExplainStreamResponse(request_id=request.request_id, response=response)
                case "nothing":
                    yield explain_pb2.ExplainStreamResponse(request_id=request.request_id)
                case _:
                    yield explained(request)

    script.behaviours = [behave]
    (tmp_path / "broken.png").write_bytes(b"nonsense")
    items = [
        IMAGE,
        tmp_path / "broken.png",
        tmp_path / "missing.png",
        cdam.Item(IMAGE, "wrong", key="wrong"),
        cdam.Item(IMAGE, "internal", key="internal"),
        cdam.Item(IMAGE, "strange", key="strange"),
        cdam.Item(IMAGE, "malformed", key="malformed"),
        cdam.Item(IMAGE, "nothing", key="nothing"),
        cdam.Item(IMAGE, methods="no such method", key="method"),  # type: ignore[arg-type]
        cdam.Item(IMAGE, targets=[], key="no target"),
        None,
        np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8),  # PNG does not make it smaller
        IMAGE,
    ]
    results = by_key(collect(script.address, items, "cat", settings={"max_message_bytes": 100_000}))
    assert len(results) == len(items)
    errors = {key: result.error for key, result in results.items() if result.error is not None}
    assert {key: type(error) for key, error in errors.items()} == {
        1: cdam.ImageError,
        2: FileNotFoundError,
        "wrong": cdam.InvalidArgument,
        "internal": cdam.Internal,
        "strange": cdam.RpcError,
        "malformed": cdam.MalformedResponse,
        "nothing": cdam.MalformedResponse,
        "method": ValueError,
        "no target": ValueError,
        10: TypeError,
        11: cdam.ResourceExhausted,
    }
    assert errors["wrong"].field == "targets[0]"  # type: ignore[union-attr]
    assert errors["internal"].error_id == "e1"  # type: ignore[union-attr]
    with pytest.raises(cdam.InvalidArgument):
        results["wrong"].result()
    assert results[0].result().maps
    assert results[12].explanation is not None


@pytest.mark.parametrize(
    "wrong",
    [{"window": 0}, {"retries": -1}, {"methods": "unknown"}, {"resize": "unknown"}, {"priority": "unknown"}],
)
def test_what_is_wrong_for_all_is_told_before_the_first(wrong: dict[str, Any]) -> None:
    with cdam.Client("localhost:1") as client, pytest.raises(ValueError, match=r"."):
        client.explain_stream([IMAGE], "cat", **wrong)


@pytest.mark.parametrize("single", ["cat.jpg", b"bytes"])
def test_a_single_image_is_no_stream(single: Any) -> None:
    with cdam.Client("localhost:1") as client, pytest.raises(TypeError, match="list"):
        client.explain_stream(single, "cat")
    with pytest.raises(TypeError, match="list"):
        cdam.AsyncClient("localhost:1").explain_stream(single, "cat")


class Source:
    """Images without end, counted."""

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self) -> Iterator[Any]:
        while True:
            self.taken += 1
            yield IMAGE


def test_items_are_taken_as_they_are_needed_and_closing_cancels(script: Streaming) -> None:
    script.behaviours = [stays]
    source = Source()
    with cdam.Client(script.address) as client:
        with closing(client.explain_stream(source, "cat", window=5)) as results:
            assert source.taken == 0
            keys = [next(results).key for _ in range(20)]
        assert sorted(keys) == list(range(20))
        assert source.taken <= 20 + 5
        assert script.cancelled.wait(30)
        assert not [thread for thread in threading.enumerate() if thread.name == "cdam"]
        assert client.models()  # the client is as good as before


def test_a_window_bounds_what_is_unanswered(script: Streaming) -> None:
    hold = threading.Event()
    seen: queue.Queue[str] = queue.Queue()

    def behave(requests: Iterator[explain_pb2.ExplainRequest], context: Any) -> Iterator[Any]:
        held = []
        for request in requests:
            seen.put(request.request_id)
            held.append(request)
            if len(held) == 5:
                hold.wait(30)
                yield from map(explained, held)
                held = []

    script.behaviours = [behave]
    source = Source()
    results: list[cdam.ItemResult] = []
    with cdam.Client(script.address) as client:
        stream = client.explain_stream(source, "cat", window=5)
        thread = threading.Thread(target=lambda: results.append(next(stream)))
        thread.start()
        for _ in range(5):
            seen.get(timeout=30)
        with pytest.raises(queue.Empty):
            seen.get(timeout=0.5)
        assert (source.taken, results) == (5, [])
        hold.set()
        thread.join()
        stream.close()
    assert [result.key for result in results] == [0]


async def _ended_but(tasks: set[asyncio.Task[Any]]) -> None:
    """All others end; grpc's own, which hear of a call's end from its threads, soon."""
    for _ in range(1000):
        if asyncio.all_tasks() == tasks:
            return
        await asyncio.sleep(0.01)
    assert asyncio.all_tasks() == tasks


async def test_items_are_taken_as_they_are_needed_and_closing_cancels_asyncio(script: Streaming) -> None:
    script.behaviours = [stays]
    before = asyncio.all_tasks()
    source = Source()
    async with cdam.AsyncClient(script.address) as client:
        async with aclosing(client.explain_stream(source, "cat", window=5)) as results:
            keys = [(await anext(results)).key for _ in range(20)]
        assert sorted(keys) == list(range(20))
        assert source.taken <= 20 + 6
        assert await asyncio.to_thread(script.cancelled.wait, 30)
    await _ended_but(before)


async def test_answers_come_while_an_item_is_waited_for(script: Streaming) -> None:
    more = asyncio.Event()

    async def source() -> AsyncIterator[Any]:
        yield IMAGE
        await more.wait()
        yield IMAGE

    async with cdam.AsyncClient(script.address) as client:
        results = client.explain_stream(source(), "cat")
        assert (await anext(results)).key == 0
        more.set()
        assert [result.key async for result in results] == [1]


async def test_cancelling_the_caller_cancels_the_stream(script: Streaming) -> None:
    script.behaviours = [stays]
    began = asyncio.Event()

    async def source() -> AsyncIterator[Any]:
        yield IMAGE
        began.set()
        await asyncio.Event().wait()

    async def consume(client: cdam.AsyncClient) -> None:
        async for _ in client.explain_stream(source(), "cat"):
            pass

    before = asyncio.all_tasks()
    async with cdam.AsyncClient(script.address) as client:
        task = asyncio.create_task(consume(client))
        await began.wait()
        await asyncio.to_thread(script.arrived.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(script.cancelled.wait, 30)
    await _ended_but(before)


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
def test_a_broken_stream_goes_on_with_what_is_unanswered(
    script: Streaming, collect: Collect, code: grpc.StatusCode
) -> None:
    failure = Failure(code, details=(SOON,))
    script.behaviours = [breaks_after(10, failure, taking=3), breaks_after(0, failure), breaks_after(7, failure), echo]
    results = by_key(collect(script.address, [IMAGE] * 40, "cat", window=8, retries=2))
    assert set(results) == set(range(40))
    assert all(result.result().maps for result in results.values())
    assert len(script.streams) == 4
    sent = [[int(request.request_id.rpartition("-")[2]) for request in stream] for stream in script.streams]
    assert sent[0][:13] == list(range(13))
    # Answers that were on their way when a stream broke may be lost, and their items sent again; the others are not.
    assert sent[1] == []
    assert sent[2][0] <= 10
    assert all(numbers == sorted(set(numbers)) for numbers in sent)  # oldest first
    assert sent[2][0] <= sent[3][0] <= sent[2][0] + 7


def test_an_item_that_a_server_refuses_as_it_goes_down_goes_elsewhere(script: Streaming, collect: Collect) -> None:
    def goes_down(requests: Iterator[explain_pb2.ExplainRequest], context: Any) -> Iterator[Any]:
        first, second, third = itertools.islice(requests, 3)
        yield explained(first)
        yield failed(second, grpc.StatusCode.UNAVAILABLE, SOON)
        yield explained(third)
        for request in requests:  # this ends only when the client has understood
            yield failed(request, grpc.StatusCode.UNAVAILABLE, SOON)

    script.behaviours = [goes_down, echo]
    results = by_key(collect(script.address, [IMAGE] * 10, "cat", window=4))
    assert set(results) == set(range(10))
    assert all(result.error is None for result in results.values())
    assert script.finished == [True, True]
    assert script.streams[1][0].request_id == script.streams[0][1].request_id


def test_a_server_that_stays_away_is_given_up(script: Streaming, collect: Collect) -> None:
    script.behaviours = [breaks_after(5, UNAVAILABLE), breaks_after(0, UNAVAILABLE)]
    with pytest.raises(cdam.Unavailable):
        collect(script.address, [IMAGE] * 20, "cat", retries=3)
    assert len(script.streams) == 4
    with pytest.raises(cdam.Unavailable):
        collect("127.0.0.1:1", [IMAGE], "cat", retries=1)


def test_progress_sets_the_count_of_retries_back(script: Streaming, collect: Collect) -> None:
    script.behaviours = [breaks_after(2, UNAVAILABLE)] * 10 + [echo]
    results = by_key(collect(script.address, [IMAGE] * 30, "cat", retries=1))
    assert set(results) == set(range(30))
    assert len(script.streams) == 11


def test_what_is_no_outage_is_raised(script: Streaming, collect: Collect) -> None:
    script.behaviours = [breaks_after(1, Failure(grpc.StatusCode.PERMISSION_DENIED)), echo]
    with pytest.raises(cdam.PermissionDenied):
        collect(script.address, [IMAGE] * 5, "cat")
    assert len(script.streams) == 1


def test_a_break_after_the_last_answer_is_none(script: Streaming, collect: Collect) -> None:
    script.behaviours = [breaks_after(3, UNAVAILABLE, taking=1)]
    assert len(collect(script.address, [IMAGE] * 3, "cat")) == 3
    assert len(script.streams) == 1


@pytest.mark.parametrize("kind", ["unasked", "twice", "too few"])
def test_a_server_that_does_not_keep_to_the_rules_is_found_out(script: Streaming, collect: Collect, kind: str) -> None:
    def behave(requests: Iterator[explain_pb2.ExplainRequest], context: Any) -> Iterator[Any]:
        request = next(requests)
        if kind == "unasked":
            request.request_id = "somebody's"
        yield explained(request)
        if kind != "too few":
            yield explained(request)
            yield from map(explained, requests)

    script.behaviours = [behave]
    with pytest.raises(cdam.MalformedResponse):
        collect(script.address, [IMAGE] * 3, "cat")


def test_an_error_of_the_items_own_is_the_callers(script: Streaming, collect: Collect) -> None:
    def items() -> Iterator[Any]:
        yield IMAGE
        raise cdam.Unavailable("from another server")  # nothing that this stream could mend

    script.behaviours = [stays]
    with pytest.raises(cdam.Unavailable, match="another"):
        collect(script.address, items(), "cat", window=1)
    assert len(script.streams) == 1
    assert script.cancelled.wait(30)


def test_the_timeout_is_the_whole_streams(script: Streaming, collect: Collect) -> None:
    def behave(requests: Iterator[explain_pb2.ExplainRequest], context: Any) -> Iterator[Any]:
        yield explained(next(requests))
        threading.Event().wait(5)

    script.behaviours = [behave]
    with pytest.raises(cdam.DeadlineExceeded):
        collect(script.address, [IMAGE] * 2, "cat", timeout=0.5)
    assert 0 < script.seconds_left[0] <= 0.5


def test_items_may_come_from_anywhere(script: Streaming) -> None:
    async def source(images: Iterable[Any]) -> AsyncIterator[Any]:
        for image in images:
            yield image

    async def run() -> list[Any]:
        async with cdam.AsyncClient(script.address) as client:
            return [result.key async for result in client.explain_stream(source([IMAGE] * 3), "cat")]

    assert sorted(asyncio.run(run())) == [0, 1, 2]
    with cdam.Client(script.address) as client:  # an array of images is an iterable of them
        results = client.explain_stream(np.zeros((4, 40, 60, 3), np.uint8), "cat")
        assert sorted(result.key for result in results) == [0, 1, 2, 3]
