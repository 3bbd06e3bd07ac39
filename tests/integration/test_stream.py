"""ExplainStream from end to end: real servers, raw stubs for what a wrong client does, the Python clients for the rest."""

from __future__ import annotations

import asyncio
import io
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from PIL import Image

import cdam
import in_this_process
from calls import SAMPLES, Stub, method, output, refused, request
from cdam.v1 import common_pb2, explain_pb2, explainer_service_pb2_grpc, target_pb2
from processes import serving

PATH = "/cdam.v1.ExplainerService/ExplainStream"
SCENES = [(SAMPLES / f"scene{number}.png").read_bytes() for number in range(1, 7)]


@pytest.fixture(params=["blocking", "asyncio"])
def collect(request: pytest.FixtureRequest) -> Callable[..., list[cdam.ItemResult]]:
    """All results of a stream, by a client of either kind; `each` is called with every one as it comes."""

    def blocking(address: str, *args: Any, each: Callable[[Any], None] | None = None, **kwargs: Any) -> Any:
        results = []
        with cdam.Client(address) as client:
            for result in client.explain_stream(*args, **kwargs):
                results.append(result)
                (each or len)(results)
        return results

    def asynchronous(address: str, *args: Any, each: Callable[[Any], None] | None = None, **kwargs: Any) -> Any:
        async def run() -> Any:
            results = []
            async with cdam.AsyncClient(address) as client:
                async for result in client.explain_stream(*args, **kwargs):
                    results.append(result)
                    (each or len)(results)
            return results

        return asyncio.run(run())

    return blocking if request.param == "blocking" else asynchronous


def items(*requests: explain_pb2.ExplainRequest) -> Iterator[explain_pb2.ExplainStreamRequest]:
    return (explain_pb2.ExplainStreamRequest(request=item) for item in requests)


def item_detail(error: common_pb2.ItemError, kind: type) -> Any:
    detail = kind()
    assert any(packed.Unpack(detail) for packed in error.details)
    return detail


def test_items_are_answered_like_single_requests(stub: Stub) -> None:
    requests = [request(scene, output(3), request_id=f"r{number}") for number, scene in enumerate(SCENES)]
    answers = {answer.request_id: answer for answer in stub.ExplainStream(items(*requests))}
    assert set(answers) == {f"r{number}" for number in range(6)}
    for single in requests:
        answer = answers[single.request_id].response
        assert answer.request_id == single.request_id
        alone = stub.Explain(single)
        ours, theirs = (np.frombuffer(found.maps[0].scores.data, "<f4") for found in (answer, alone))
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_no_items(stub: Stub) -> None:
    assert list(stub.ExplainStream(iter(()))) == []


def test_every_kind_of_bad_item_fails_alone(stub: Stub) -> None:
    good, code = SCENES[0], grpc.StatusCode
    size = common_pb2.Preprocessing(input_size=common_pb2.Size(height=63, width=64))
    named = target_pb2.Target(concept=target_pb2.ConceptTarget(name="stripes"))
    bad = {
        "image": (request(good[:200], output(3)), code.INVALID_ARGUMENT, "image.encoded"),
        "none": (explain_pb2.ExplainRequest(targets=[output(3)]), code.INVALID_ARGUMENT, "image"),
        "size": (request(good, output(3), preprocessing=size), code.INVALID_ARGUMENT, "preprocessing.input_size"),
        "no targets": (request(good), code.INVALID_ARGUMENT, "targets"),
        "output": (request(good, output("unicorn")), code.NOT_FOUND, "output"),
        "model": (request(good, output(3), model="unicorn"), code.NOT_FOUND, "model"),
        "concept": (request(good, named), code.NOT_FOUND, "concept"),
    }
    requests = [request(good, output(3), request_id="first")]
    for name, (wrong, _, _) in bad.items():
        wrong.request_id = name
        requests.append(wrong)
    requests += [request(good, output(3), request_id="é" * 200), request(good, output(3), request_id="last")]
    found = {answer.request_id: answer for answer in stub.ExplainStream(items(*requests))}
    assert len(found) == len(requests)
    assert found["first"].HasField("response")
    assert found["last"].HasField("response")
    for name, (_, expected, fact) in bad.items():
        error = found[name].error
        assert error.code == expected.value[0], (name, error)
        assert item_detail(error, error_details_pb2.RequestInfo).request_id == name
        if expected is code.INVALID_ARGUMENT:
            violation = item_detail(error, error_details_pb2.BadRequest).field_violations[0]
            assert violation.field == fact
        else:
            assert item_detail(error, error_details_pb2.ResourceInfo).resource_type == f"cdam.v1.{fact}"
    violation = item_detail(found["é" * 200].error, error_details_pb2.BadRequest).field_violations[0]
    assert violation.field == "request_id"


def test_ids_are_needed_and_unique_among_the_unanswered(stub: Stub) -> None:
    slow = request(SCENES[0], output(3), methods=[method("smooth_grad", samples=50)], request_id="twice")
    quick = request(SCENES[0], output(3), request_id="twice")
    nameless = request(SCENES[0], output(3))
    answers = list(stub.ExplainStream(items(slow, quick, nameless)))
    assert sorted(answer.request_id for answer in answers) == ["", "twice", "twice"]
    errors = [answer for answer in answers if answer.HasField("error")]
    for answer in errors:
        violation = item_detail(answer.error, error_details_pb2.BadRequest).field_violations[0]
        assert violation.field == "request.request_id"
    assert sorted(answer.request_id for answer in errors) == ["", "twice"]
    (good,) = (answer for answer in answers if answer.HasField("response"))
    assert len(good.response.maps) == 1


def test_an_answered_id_can_be_used_again(stub: Stub) -> None:
    sending: queue.Queue[explain_pb2.ExplainRequest | None] = queue.Queue()
    call = stub.ExplainStream(map(_wrap, iter(sending.get, None)))
    for _ in range(20):
        sending.put(request(SCENES[0], output(3), request_id="same"))
        assert next(call).HasField("response")
    sending.put(None)
    assert list(call) == []


def test_what_is_no_message_fails_the_stream_once_the_rest_is_answered(server_address: str) -> None:
    messages = [next(items(request(SCENES[0], output(3), request_id="good"))).SerializeToString(), b"\xff\xff\xff"]
    with grpc.insecure_channel(server_address) as channel:
        call = channel.stream_stream(PATH, None, explain_pb2.ExplainStreamResponse.FromString)(iter(messages))
        assert next(call).request_id == "good"
        code, _, (detail,) = refused(lambda: next(call), error_details_pb2.BadRequest)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert detail.field_violations[0].field == "request"


def test_a_client_that_does_not_read_is_held_back(stub: Stub) -> None:
    """Large answers that nobody reads: the server takes what it may work on, and no more, however long it waits."""
    offered = 0
    offering = threading.Condition()
    bulky = [method("cdam", parts=True)] * 16
    every = target_pb2.Target(top_k=target_pb2.TopKTarget(k=10))
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")

    def source() -> Iterator[explain_pb2.ExplainStreamRequest]:
        nonlocal offered
        for number in range(300):
            with offering:
                offered += 1
                offering.notify_all()
            yield _wrap(request(buffer.getvalue(), every, methods=bulky, request_id=str(number)))

    call = stub.ExplainStream(source())
    while True:  # until it comes to rest
        with offering:
            if not offering.wait(3):
                break
    at_rest = offered
    # 32 in work, and what fits into the buffers between: far from all.
    assert 32 <= at_rest <= 100
    assert len({answer.request_id for answer in call}) == 300
    assert offered == 300


async def test_a_cancelled_stream_leaves_nothing_behind() -> None:
    slow = [method("smooth_grad", samples=20)]
    async with in_this_process.application(max_batch_size=2) as address, grpc.aio.insecure_channel(address) as channel:
        stub: Any = explainer_service_pb2_grpc.ExplainerServiceStub(channel)
        before = in_this_process.tasks()
        call = stub.ExplainStream()
        for number in range(20):
            item = request(SCENES[number % 6], output(3), methods=slow, request_id=str(number))
            await call.write(_wrap(item))
        assert (await call.read()).HasField("response")
        assert in_this_process.tasks() - before
        call.cancel()
        while in_this_process.tasks() - before:  # noqa: ASYNC110 - the test's own time limit is the bound
            await asyncio.sleep(0.05)
        assert (await stub.Explain(request(SCENES[1], output(3)))).maps


async def test_a_full_queue_holds_a_stream_up_and_fails_nothing() -> None:
    async with (
        in_this_process.application(max_pending=2, max_batch_size=2) as address,
        cdam.AsyncClient(address) as client,
    ):
        results = [result async for result in client.explain_stream([SCENES[k % 6] for k in range(100)], "7")]
    assert sorted(result.key for result in results) == list(range(100))
    assert [result.error for result in results if result.error] == []


def test_a_thousand_items(server_address: str, collect: Callable[..., list[cdam.ItemResult]]) -> None:
    results = collect(server_address, (cdam.Item(SCENES[k % 6], k % 10, key=(k, k % 10)) for k in range(1000)))
    assert {result.key for result in results} == {(k, k % 10) for k in range(1000)}
    assert len(results) == 1000
    assert all([target.output_index for target in r.result().targets] == [r.key[1]] for r in results)


def test_files_some_of_them_broken(
    server_address: str, collect: Callable[..., list[cdam.ItemResult]], tmp_path: Path
) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(12)]
    for number, path in enumerate(paths):
        path.write_bytes(SCENES[number % 6] if number % 3 else SCENES[0][: 20 * number])
    results = {result.key: result for result in collect(server_address, paths, "7")}
    assert len(results) == 12
    errors = {key: type(result.error) for key, result in results.items() if result.error is not None}
    assert errors == {
        0: cdam.ImageError,  # empty: it does not even begin like an image
        3: cdam.InvalidArgument,
        6: cdam.InvalidArgument,
        9: cdam.InvalidArgument,
    }
    assert results[1].result()["7"].overlay().size == (64, 64)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_another_server_takes_over(
    collect: Callable[..., list[cdam.ItemResult]], tmp_path: Path, how: signal.Signals
) -> None:
    """The server dies, or goes down in good order, in the middle: every item is answered once all the same."""
    with serving(tmp_path / "first.log") as first, serving(tmp_path / "second.log") as second:

        def end_the_first(results: list[cdam.ItemResult]) -> None:
            if len(results) == 50:
                first.process.send_signal(how)

        address = f"ipv4:{first.address},{second.address}"
        results = collect(address, (SCENES[k % 6] for k in range(600)), "7", each=end_the_first)
        assert first.process.wait(timeout=60) == (0 if how is signal.SIGTERM else -signal.SIGKILL)
        assert sorted(result.key for result in results) == list(range(600))
        assert [result.error for result in results if result.error] == []
        (line,) = (line for line in second.log_lines() if line.get("method") == "ExplainStream")
        assert (line["code"], line["failures"]) == ("OK", 0)
        assert 0 < int(str(line["items"])) <= 600


def test_an_open_stream_does_not_hold_up_the_drain(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "log", "--drain-seconds", "600") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        sending: queue.Queue[explain_pb2.ExplainRequest | None] = queue.Queue()
        call = Stub(channel).ExplainStream(map(_wrap, iter(sending.get, None)))
        sending.put(request(SCENES[0], output(3), request_id="one"))
        assert next(call).HasField("response")
        server.process.send_signal(signal.SIGTERM)
        code, _, (retry,) = refused(lambda: next(call), error_details_pb2.RetryInfo)
        assert code is grpc.StatusCode.UNAVAILABLE
        assert retry.retry_delay.ToMilliseconds() > 0
        assert server.process.wait(timeout=60) == 0
        sending.put(None)
    (line,) = (line for line in server.log_lines() if line.get("method") == "ExplainStream")
    assert (line["code"], line["items"], line["failures"]) == ("UNAVAILABLE", 1, 0)


def test_leaving_early_frees_the_server(server_address: str) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield SCENES[0]

    with cdam.Client(server_address) as client:
        with closing(client.explain_stream(endless(), "7", methods=cdam.SmoothGrad(samples=50))) as results:
            assert next(results).result().maps
        assert client.explain(SCENES[1], "7", timeout=60).maps


def _wrap(item: explain_pb2.ExplainRequest) -> explain_pb2.ExplainStreamRequest:
    return explain_pb2.ExplainStreamRequest(request=item)
