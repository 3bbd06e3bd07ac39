"""Concepts by both clients against a scripted server: what travels, in how many messages, and what comes back."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import io
import itertools
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2 as details
from PIL import Image
from safetensors.numpy import load, save

import cdam
from cdam._encode import encode_target
from cdam.v1 import concept_pb2
from scripted_server import UNAVAILABLE, Failure, Script, fail, serving, tensor

Call = Callable[..., Any]
MEBIBYTE = 1024 * 1024


@dataclass
class Hearing(Script):
    """Uploads that each are heard to so many messages and then fail, as long as there are failures."""

    breaks: list[tuple[int, Failure]] = field(default_factory=list)
    hold: threading.Event | None = None  # nothing is heard before
    over: threading.Event = field(default_factory=threading.Event)  # a call has ended

    def take(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        if not context.add_callback(self.over.set):
            self.over.set()
        if self.hold is not None:
            self.hold.wait(30)
        if not self.breaks:
            yield from requests
            return
        count, failure = self.breaks.pop(0)
        yield from itertools.islice(requests, count)
        fail(context, failure)


@pytest.fixture
def script() -> Iterator[Hearing]:
    with serving(Hearing()) as script:
        yield script  # type: ignore[misc]


@pytest.fixture(params=["blocking", "asyncio"])
def call(request: pytest.FixtureRequest) -> Call:
    """Call a method of a client, of either kind; of `concepts`, all of them."""

    def blocking(address: str, method: str, *args: Any, settings: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        with cdam.Client(address, **(settings or {})) as client:
            answer = getattr(client, method)(*args, **kwargs)
            return list(answer) if method == "concepts" else answer

    def asynchronous(
        address: str, method: str, *args: Any, settings: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        async def run() -> Any:
            async with cdam.AsyncClient(address, **(settings or {})) as client:
                answer = getattr(client, method)(*args, **kwargs)
                return [found async for found in answer] if method == "concepts" else await answer

        return asyncio.run(run())

    return blocking if request.param == "blocking" else asynchronous


def jpeg(number: int, size: int = 0) -> bytes:
    """Bytes that pass for a JPEG file."""
    return b"\xff\xd8\xff" + f"{number:08}".encode() + bytes(size)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def numbers(messages: list[concept_pb2.ConceptRegisterStreamRequest]) -> list[int]:
    """Which images a stream was sent, negatives as negative numbers; the specification came first."""
    assert messages[0].WhichOneof("payload") == "spec"
    images = [(m.WhichOneof("payload"), getattr(m, m.WhichOneof("payload")).encoded) for m in messages[1:]]
    return [int(data[3:11]) * (1 if kind == "example" else -1) for kind, data in images]


def test_a_few_images_travel_in_one_message(script: Hearing, call: Call, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(1))
    pixels = np.zeros((4, 5, 3), np.uint8)
    done: list[int] = []
    concept = call(
        script.address,
        "register_concept",
        "loops",
        [path, jpeg(2), Image.fromarray(pixels)],
        negatives=iter([pixels]),
        model="second",
        description="round things",
        labels={"team": "vision"},
        resize="squash",
        input_size=(32, 48),
        replace=True,
        expected_version=0,
        model_fingerprint="f00d",
        progress=done.append,
    )
    (sent,) = script.requests
    spec = sent.spec
    assert (spec.name, spec.model, spec.description, dict(spec.labels)) == (
        *("loops", "second", "round things"),
        {"team": "vision"},
    )
    assert (spec.preprocessing.resize_mode, spec.preprocessing.input_size.width) == (2, 48)
    assert (spec.replace, spec.model_fingerprint, spec.HasField("vector")) == (True, "f00d", False)
    assert spec.HasField("expected_version")
    assert spec.expected_version == 0
    assert [image.encoded for image in sent.examples[:2]] == [jpeg(1), jpeg(2)]
    assert sent.examples[2].raw.data == sent.negatives[0].raw.data == bytes(60)
    assert done == [4]
    assert not script.uploads
    assert (concept.name, concept.version, concept.model, concept.model_fingerprint) == ("loops", 1, "second", "f00d")
    assert (concept.resize, concept.input_size, concept.created, concept.imported) == ("squash", (32, 48), True, False)
    assert (concept.example_count, concept.negative_count) == (3, 1)
    assert concept.spread == pytest.approx(0.99)
    assert concept.create_time == datetime(2024, 5, 6, 7, 8, 9, 500_000, UTC)
    assert concept.examples[1] == cdam.ConceptExample(sha(jpeg(2)), 0.99)
    assert [example.cosine for example in concept.negatives] == [1]
    np.testing.assert_array_equal(concept.vector, np.arange(1, 9))
    assert concept.vector.dtype == np.float32
    assert not concept.vector.flags.writeable
    with pytest.raises(TypeError):
        concept.labels["team"] = "other"


def test_what_is_not_said_is_not_set(script: Hearing, call: Call) -> None:
    script.created = False
    concept = call(script.address, "register_concept", "loops", [jpeg(1)])
    expected = concept_pb2.ConceptRegisterRequest(spec=concept_pb2.ConceptSpec(name="loops"))
    expected.examples.add(encoded=jpeg(1))
    assert script.requests == [expected]
    assert concept.created is False
    assert 29 < script.seconds_left[0] < 31


def test_a_vector_needs_no_images(script: Hearing, call: Call) -> None:
    concept = call(script.address, "register_concept", "axis", vector=[0, 0.5, -2])
    assert script.requests[0].spec.vector == tensor(np.array([0, 0.5, -2], np.float32))
    assert (concept.spread, concept.resize, concept.input_size, concept.examples) == (None, None, None, ())
    np.testing.assert_array_equal(concept.vector, np.float32([0, 0.5, -2]))


def test_the_unary_call_is_tried_again(script: Hearing, call: Call) -> None:
    script.failures = [UNAVAILABLE] * 3
    assert call(script.address, "register_concept", "loops", (jpeg(n) for n in range(3))).example_count == 3
    assert len(script.requests) == 4


@pytest.mark.parametrize("make", [list, iter, lambda images: (image for image in images)])
def test_many_images_travel_as_a_stream(script: Hearing, call: Call, make: Any) -> None:
    done: list[int] = []
    concept = call(
        script.address,
        "register_concept",
        "loops",
        make([jpeg(n) for n in range(1, 101)]),
        negatives=make([jpeg(n) for n in range(1, 31)]),
        model="second",
        settings={"token": "s3cret"},
        progress=done.append,
    )
    (messages,) = script.uploads
    assert numbers(messages) == [*range(1, 101), *range(-1, -31, -1)]
    assert messages[0].spec == concept_pb2.ConceptSpec(name="loops", model="second")
    assert done == list(range(1, 131))
    assert not script.requests
    assert script.metadata[0]["authorization"] == "Bearer s3cret"
    assert script.seconds_left[0] is None or script.seconds_left[0] > 1e6  # no deadline
    assert (concept.example_count, concept.negative_count, concept.created) == (100, 30, True)


@pytest.mark.parametrize(("count", "size", "streams"), [(64, 0, 0), (65, 0, 1), (3, MEBIBYTE, 0), (4, MEBIBYTE, 1)])
def test_what_one_message_holds(script: Hearing, call: Call, count: int, size: int, streams: int) -> None:
    concept = call(script.address, "register_concept", "loops", [jpeg(n, size) for n in range(count)])
    assert (len(script.uploads), len(script.requests)) == (streams, 1 - streams)
    assert concept.example_count == count


def test_small_messages_hold_less(script: Hearing, call: Call) -> None:
    images = [jpeg(n, 1000) for n in range(9)]
    call(script.address, "register_concept", "loops", images, settings={"max_message_bytes": 5000})
    assert len(numbers(script.uploads[0])) == 9
    with pytest.raises(cdam.ResourceExhausted, match="max_message_bytes") as caught:
        call(script.address, "register_concept", "x", [*images, jpeg(0, 6000)], settings={"max_message_bytes": 5000})
    assert caught.value.__notes__ == ["examples[9]"]


def test_asynchronous_images(script: Hearing) -> None:
    async def images(count: int) -> AsyncIterator[bytes]:
        for number in range(1, count + 1):
            await asyncio.sleep(0)
            yield jpeg(number)

    async def run() -> cdam.RegisteredConcept:
        async with cdam.AsyncClient(script.address) as client:
            return await client.register_concept("loops", images(80), negatives=images(2))

    assert asyncio.run(run()).example_count == 80
    assert numbers(script.uploads[0]) == [*range(1, 81), -1, -2]
    with cdam.Client(script.address) as client, pytest.raises(TypeError, match="AsyncClient"):
        client.register_concept("loops", images(2))  # type: ignore[arg-type]


def test_a_broken_stream_is_sent_again_from_its_beginning(script: Hearing, call: Call) -> None:
    script.breaks = [(80, UNAVAILABLE), (10, UNAVAILABLE), (0, Failure(grpc.StatusCode.CANCELLED))]
    done: list[int] = []
    images = [jpeg(n) for n in range(1, 101)]
    concept = call(script.address, "register_concept", "loops", images, negatives=[jpeg(1)], progress=done.append)
    assert [len(messages) for messages in script.uploads] == [80, 10, 0, 102]
    assert numbers(script.uploads[3]) == [*range(1, 101), -1]
    assert done[-1] == 101
    assert done.count(1) >= 2
    assert concept.example_count == 100


def test_paths_of_an_iterator_are_sent_again(script: Hearing, call: Call, tmp_path: Path) -> None:
    for number in range(1, 101):
        (tmp_path / f"{number:03}.jpg").write_bytes(jpeg(number))
    script.breaks = [(90, UNAVAILABLE)]
    call(script.address, "register_concept", "loops", map(str, sorted(tmp_path.iterdir())), negatives=[jpeg(7)])
    assert numbers(script.uploads[1]) == [*range(1, 101), -7]


def test_other_images_of_an_iterator_can_be_sent_once(script: Hearing, call: Call) -> None:
    script.breaks = [(80, UNAVAILABLE)]
    with pytest.raises(cdam.Unavailable):
        call(script.address, "register_concept", "loops", (jpeg(n) for n in range(1, 101)))
    assert len(script.uploads) == 1


def test_but_those_that_are_kept_are_sent_again(script: Hearing, call: Call) -> None:
    script.breaks = [(66, UNAVAILABLE)]
    call(script.address, "register_concept", "loops", (jpeg(n) for n in range(1, 66)))
    assert [len(messages) for messages in script.uploads] == [66, 66]
    assert numbers(script.uploads[1]) == list(range(1, 66))


def test_and_those_for_a_server_that_comes_late(call: Call) -> None:
    with serving(Script()) as script:
        address = script.address  # a port that is free a moment later
    late, done = Script(), threading.Event()

    def serve() -> None:
        time.sleep(0.3)
        with serving(late, address):
            done.wait(20)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(serve)
        try:
            call(address, "register_concept", "loops", (jpeg(n) for n in range(1, 101)))
        finally:
            done.set()
    assert numbers(late.uploads[-1]) == list(range(1, 101))


def test_retries_end(script: Hearing, call: Call) -> None:
    script.breaks = [(5, UNAVAILABLE)] * 9
    images = [jpeg(n) for n in range(100)]
    with pytest.raises(cdam.Unavailable) as caught:
        call(script.address, "register_concept", "loops", images, retries=2)
    assert caught.value.retry_after == 0.001
    assert len(script.uploads) == 3
    with pytest.raises(cdam.Unavailable):
        call(script.address, "register_concept", "loops", images, retries=0)
    assert len(script.uploads) == 4
    with pytest.raises(ValueError, match="retries"):
        call(script.address, "register_concept", "loops", images, retries=-1)


def test_nobody_there(call: Call) -> None:
    with pytest.raises(cdam.Unavailable):
        call("127.0.0.1:1", "register_concept", "loops", [jpeg(n) for n in range(100)], retries=1)


def test_a_refusal_ends_it_at_once(script: Hearing, call: Call) -> None:
    violation = details.BadRequest.FieldViolation(field="examples[79].encoded", description="no image")
    refusal = details.BadRequest(field_violations=[violation])
    script.breaks = [(81, Failure(grpc.StatusCode.INVALID_ARGUMENT, "bad", [refusal]))] * 2
    endless = map(jpeg, itertools.count(1))
    for count, images in enumerate([endless, [jpeg(n) for n in range(100)]], start=1):
        with pytest.raises(cdam.InvalidArgument) as caught:
            call(script.address, "register_concept", "loops", images)
        assert caught.value.field == "examples[79].encoded"
        assert len(script.uploads) == count


def test_an_answer_before_the_end_is_none(script: Hearing, call: Call) -> None:
    script.hasty = True
    script.take = lambda requests, _context: itertools.islice(requests, 70)  # type: ignore[method-assign]
    with pytest.raises(cdam.MalformedResponse, match="before all images"):
        call(script.address, "register_concept", "loops", map(jpeg, itertools.count(1)))


def test_images_are_taken_as_there_is_room(script: Hearing, call: Call) -> None:
    script.hold = threading.Event()
    taken: list[int] = []
    still = threading.Event()

    def images() -> Iterator[bytes]:
        for number in range(60):
            taken.append(number)
            yield jpeg(number, MEBIBYTE)

    def watch() -> None:
        before = -1
        while before < 4 or before != len(taken):  # until nothing more is taken
            before = len(taken)
            still.wait(0.5)
        counts.append(len(taken))
        script.hold.set()  # type: ignore[union-attr]

    counts: list[int] = []
    watcher = threading.Thread(target=watch)
    watcher.start()
    assert call(script.address, "register_concept", "loops", images()).example_count == 60
    watcher.join()
    assert counts[0] < 30
    assert len(taken) == 60


def test_a_timeout_is_for_all_of_it(script: Hearing, call: Call) -> None:
    script.hold = threading.Event()
    images = [jpeg(n) for n in range(100)]
    try:
        with pytest.raises(cdam.DeadlineExceeded):
            call(script.address, "register_concept", "loops", images, timeout=1.0)
    finally:
        script.hold.set()
    assert script.seconds_left[0] < 1.1
    script.delay = 0.5
    with pytest.raises(cdam.DeadlineExceeded):
        call(script.address, "register_concept", "loops", images[:2], timeout=0.1)


class _OwnError(Exception):
    pass


def _stays(script: Hearing) -> Callable[[Iterator[Any], Any], Iterator[Any]]:
    """What hears all that is sent, and then ends only with the call: cancelled, as nothing answers it."""

    def take(requests: Iterator[Any], context: Any) -> Iterator[Any]:
        if not context.add_callback(script.over.set):
            script.over.set()
        with suppress(grpc.RpcError):
            yield from requests
        script.over.wait(30)
        context.abort(grpc.StatusCode.CANCELLED, "as it is")

    return take


def _images_and_an_error() -> Iterator[bytes]:
    for number in range(80):
        yield jpeg(number)
    raise _OwnError


def test_an_error_of_the_callers_own_cancels_the_upload(script: Hearing) -> None:
    script.take = _stays(script)  # type: ignore[method-assign]
    with cdam.Client(script.address) as client:
        with pytest.raises(_OwnError):
            client.register_concept("loops", _images_and_an_error())
        assert script.over.wait(20)
        assert client.models()  # the client is as good as before


async def test_an_error_of_the_callers_own_cancels_the_upload_asyncio(script: Hearing) -> None:
    script.take = _stays(script)  # type: ignore[method-assign]
    async with cdam.AsyncClient(script.address) as client:
        with pytest.raises(_OwnError):
            await client.register_concept("loops", _images_and_an_error())
        assert await asyncio.to_thread(script.over.wait, 20)
        assert await client.models()


async def test_cancelling_the_caller_cancels_the_upload(script: Hearing) -> None:
    script.take = _stays(script)  # type: ignore[method-assign]
    begun = asyncio.Event()

    async def images() -> AsyncIterator[bytes]:
        for number in range(80):
            yield jpeg(number)
        begun.set()
        await asyncio.sleep(60)
        yield jpeg(0)

    async with cdam.AsyncClient(script.address) as client:
        task = asyncio.create_task(client.register_concept("loops", images()))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(script.over.wait, 20)
        assert await client.models()


@pytest.mark.parametrize("count", [3, 90])
def test_a_bad_image_is_named(script: Hearing, call: Call, tmp_path: Path, count: int) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    images = [jpeg(n) for n in range(count)]
    with pytest.raises(cdam.ImageError, match=r"notes\.txt") as caught:
        call(script.address, "register_concept", "loops", images[:2], negatives=[*images, tmp_path / "notes.txt"])
    assert caught.value.__notes__ == [f"negatives[{count}]"]
    with pytest.raises(FileNotFoundError) as missing:
        call(script.address, "register_concept", "loops", [*images, tmp_path / "nowhere.png"])
    assert missing.value.__notes__ == [f"examples[{count}]"]
    assert not script.requests


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ValueError, "at least one example"),
        ({"examples": iter(())}, ValueError, "at least one example"),
        ({"negatives": [jpeg(1)]}, ValueError, "at least one example"),
        ({"negatives": [jpeg(n) for n in range(99)]}, ValueError, "at least one example"),
        ({"examples": [jpeg(1)], "vector": [1.0]}, ValueError, "not of both"),
        ({"vector": [[1.0]]}, ValueError, "one axis"),
        ({"examples": "a.jpg"}, TypeError, "in a list"),
        ({"examples": Path("a.jpg")}, TypeError, "in a list"),
        ({"examples": jpeg(1)}, TypeError, "in a list"),
        ({"examples": Image.new("L", (2, 2))}, TypeError, "in a list"),
        ({"examples": np.zeros((4, 5, 3), np.uint8)}, TypeError, "in a list"),
        ({"examples": [jpeg(1)], "negatives": np.zeros((4, 5), np.uint8)}, TypeError, "in a list"),
        ({"examples": [jpeg(1)], "resize": "stretch"}, ValueError, "'squash'"),
        ({"examples": [jpeg(1)], "expected_version": -1}, ValueError, "expected_version|out of range"),
    ],
)
def test_what_can_not_be_registered(
    script: Hearing, call: Call, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(script.address, "register_concept", "loops", **given)
    assert not script.requests
    assert not script.uploads


def test_a_folder_is_no_images(script: Hearing, call: Call, tmp_path: Path) -> None:
    for folder in (tmp_path, str(tmp_path)):
        with pytest.raises(TypeError, match=r"Path\('.*'\)\.glob\('\*\.jpg'\)"):
            call(script.address, "register_concept", "loops", folder)
    with pytest.raises(TypeError, match="in a list"):
        call(script.address, "register_concept", "loops", str(tmp_path / "a.jpg"))


def test_arrays_of_several_images(script: Hearing, call: Call) -> None:
    assert call(script.address, "register_concept", "x", np.zeros((3, 4, 5, 3), np.uint8)).example_count == 3


def stock(script: Hearing, *names: str) -> None:
    """Register concepts that differ in nothing but the name."""
    with cdam.Client(script.address) as client:
        for name in names:
            client.register_concept(name, [jpeg(1), jpeg(2)], negatives=[jpeg(3)], labels={"of": name})
    script.requests.clear()


def test_a_concept_by_name_and_by_id(script: Hearing, call: Call) -> None:
    stock(script, "loops", "bars")
    bars = call(script.address, "concept", "bars", model="second")
    loops = call(script.address, "concept", id=sha(b"loops"))
    assert script.requests == [
        concept_pb2.GetConceptRequest(name="bars", model="second"),
        concept_pb2.GetConceptRequest(id=sha(b"loops")),
    ]
    assert (bars.name, loops.name, loops.created) == ("bars", "loops", None)
    with pytest.raises(cdam.NotFound) as caught:
        call(script.address, "concept", "strokes")
    assert (caught.value.kind, caught.value.name) == ("concept", "strokes")
    for wrong in ({}, {"name": "loops", "id": loops.id}, {"id": loops.id, "model": "first"}):
        with pytest.raises(ValueError, match="goes"):
            call(script.address, "concept", **wrong)


def test_listing_follows_the_pages(script: Hearing, call: Call) -> None:
    stock(script, "a", "b", "c", "d", "e")
    found = call(script.address, "concepts", model="first", labels={"team": "vision"}, page_size=2)
    assert [concept.name for concept in found] == ["a", "b", "c", "d", "e"]
    assert [(r.page_token, r.page_size, r.model, dict(r.labels)) for r in script.requests] == [
        (token, 2, "first", {"team": "vision"}) for token in ("", "2", "4")
    ]
    assert (found[0].vector, found[0].examples, found[0].example_count) == (None, (), 2)
    assert found[0] == call(script.address, "concept", "a")
    assert found[0] != found[1]
    assert len({*found, *found}) == 5


def test_pages_are_asked_for_as_they_are_needed(script: Hearing) -> None:
    stock(script, "a", "b", "c", "d", "e")
    with cdam.Client(script.address) as client:
        found = client.concepts()
        assert not script.requests
        assert [next(found).name for _ in range(2)] == ["a", "b"]
        assert len(script.requests) == 1
        assert next(found).name == "c"
        assert len(script.requests) == 2


def test_deleting(script: Hearing, call: Call) -> None:
    stock(script, "loops", "bars")
    assert call(script.address, "delete_concept", "loops", model="second", expected_version=7).name == "loops"
    expected = concept_pb2.DeleteConceptRequest(name="loops", model="second", expected_version=7)
    assert script.requests == [expected]
    assert call(script.address, "delete_concept", "bars").name == "bars"
    assert script.requests[-1] == concept_pb2.DeleteConceptRequest(name="bars", model="first")  # asked for
    with pytest.raises(cdam.NotFound):
        call(script.address, "delete_concept", "bars")


def test_a_concept_is_a_target(script: Hearing, call: Call) -> None:
    stock(script, "loops")
    loops = call(script.address, "concept", "loops")
    image = np.zeros((4, 4, 3), np.uint8)
    explanation = call(script.address, "explain", image, loops)
    assert script.requests[-1].targets[0] == encode_target(cdam.Concept(id=loops.id))
    assert explanation.targets[0].target == cdam.Concept(id=loops.id)
    contrast = cdam.Contrast(loops, "7")
    assert contrast == cdam.Contrast(cdam.Concept(id=loops.id), cdam.Output("7"))
    explanation = call(script.address, "explain", image, ["7", contrast, loops])
    assert [t.WhichOneof("kind") for t in script.requests[-1].targets] == ["output", "contrast", "concept"]
    assert explanation.targets[1].target == contrast
    explanation = call(
        script.address, "explain", image, [cdam.Concept("loops"), cdam.Concept("loops", similarity="cosine")]
    )
    assert explanation["loops"] is explanation.maps[0]
    assert explanation["loops (cosine)"] is explanation.maps[1]


def test_concepts_by_id_are_called_what_the_caller_calls_them(script: Hearing, call: Call) -> None:
    stock(script, "loops")
    loops = call(script.address, "concept", "loops")
    rust = dataclasses.replace(loops, name="rust")
    cosine = cdam.Concept(id=loops.id, similarity="cosine", label="rings")
    unnamed = cdam.Concept(id=loops.id)
    targets = [
        *(loops, rust, cosine, unnamed, cdam.Concept("loops")),
        *(cdam.Contrast(loops, rust), cdam.Contrast("3", loops), cdam.Contrast(cosine, unnamed)),
    ]
    image = np.zeros((4, 4, 3), np.uint8)
    explanation = call(script.address, "explain", image, targets)
    short = loops.id[:12]
    labels = [
        "loops",
        "rust",
        "rings (cosine)",
        short,
        "loops",
        "loops - rust",
        "3 - loops",
        f"rings (cosine) - {short}",
    ]
    assert [target.label for target in explanation.targets] == labels
    assert explanation["rust"] is explanation.maps[1]
    assert [target.target.label for target in explanation.targets[:5]] == ["loops", "rust", "rings", None, "loops"]
    assert explanation.targets[5].target.negative.label == "rust"
    with pytest.raises(ValueError, match="by its id"):
        cdam.Concept("loops", label="rings")


def test_it_is_shown_briefly(script: Hearing, call: Call) -> None:
    stock(script, "loops")
    shown = repr(call(script.address, "concept", "loops"))
    assert shown.startswith("RegisteredConcept(name='loops', version=1, model='first', id='")
    assert "spread=0.995" in shown
    assert len(shown) < 160


def test_answers_that_contradict_themselves(script: Hearing, call: Call) -> None:
    stock(script, "loops")
    script.concepts["loops"].vector.data = b"123"
    with pytest.raises(cdam.MalformedResponse):
        call(script.address, "concept", "loops")
    script.concepts["loops"].vector.CopyFrom(tensor(np.ones((2, 4), np.float32)))
    with pytest.raises(cdam.MalformedResponse):
        call(script.address, "concept", "loops")
    script.concepts["loops"].ClearField("vector")
    script.concepts["loops"].id = ""
    with pytest.raises(cdam.MalformedResponse):
        call(script.address, "concept", "loops")


# --- files


def test_an_export_is_the_concept_again(script: Hearing, call: Call, tmp_path: Path) -> None:
    stock(script, "loops")
    loops = call(script.address, "concept", "loops")
    for given in ("loops", cdam.Concept("loops"), cdam.Concept(id=loops.id), loops):
        path = tmp_path / "loops.safetensors"
        path.write_text("what was there before")
        assert call(script.address, "export_concept", given, path) == path
        again = cdam.load_concept(path)
        for name in (f.name for f in dataclasses.fields(loops) if f.name != "vector"):
            assert getattr(again, name) == getattr(loops, name), name
        np.testing.assert_array_equal(again.vector, loops.vector)
        assert not again.vector.flags.writeable
        assert [p.name for p in tmp_path.iterdir()] == ["loops.safetensors"]
    assert load(path.read_bytes())["vector"].dtype == np.float32  # as anybody's safetensors reads it
    with pytest.raises(ValueError, match="vector alone"):
        call(script.address, "export_concept", cdam.Concept(vector=[1.0]), path)


def test_a_concept_of_a_list_is_exported_under_its_own_name(script: Hearing, call: Call, tmp_path: Path) -> None:
    stock(script, "loops")
    (listed,) = call(script.address, "concepts")
    with pytest.raises(ValueError, match="without its vector"):
        cdam.save_concept(listed, tmp_path / "file")
    with pytest.raises(ValueError, match="without its vector"):
        call(script.address, "import_concept", listed)
    script.concepts["loops"].name, script.concepts["loops"].version = "same-content", 9
    exported = cdam.load_concept(call(script.address, "export_concept", listed, tmp_path / "file"))
    assert script.requests[-1] == concept_pb2.GetConceptRequest(id=listed.id)
    assert (exported.name, exported.version, len(exported.examples)) == ("loops", 1, 2)


def test_an_import_says_all_that_makes_the_id(script: Hearing, call: Call, tmp_path: Path) -> None:
    stock(script, "loops")
    path = call(script.address, "export_concept", "loops", tmp_path / "loops.safetensors")
    imported = call(script.address, "import_concept", path, replace=True, expected_version=1)
    spec = script.requests[-1].spec
    assert (spec.name, spec.model_fingerprint, spec.replace, spec.expected_version) == ("loops", "f00d", True, 1)
    assert dict(spec.labels) == {"of": "loops"}
    assert spec.vector == tensor(np.arange(1, 9, dtype=np.float32))
    assert (spec.preprocessing.resize_mode, spec.preprocessing.input_size.width) == (1, 48)
    assert [example.digest for example in spec.origin.examples] == [sha(jpeg(1)), sha(jpeg(2))]
    assert [example.cosine for example in spec.origin.examples] == [1, 0.99]
    assert [example.digest for example in spec.origin.negatives] == [sha(jpeg(3))]
    assert imported.imported
    call(script.address, "import_concept", cdam.load_concept(path), name="rings", description="", labels={}, model="x")
    spec = script.requests[-1].spec
    assert (spec.name, spec.model, dict(spec.labels), spec.HasField("expected_version")) == ("rings", "x", {}, False)


def test_an_import_finds_its_model(script: Hearing, call: Call, tmp_path: Path) -> None:
    stock(script, "loops")
    loops = call(script.address, "concept", "loops")
    for its, found in (
        (dataclasses.replace(loops, model="second"), "second"),  # of two with the same fingerprint
        (dataclasses.replace(loops, model="elsewhere"), "first"),
        (dataclasses.replace(loops, model_fingerprint="other"), ""),  # for the server to refuse
    ):
        call(script.address, "import_concept", its)
        assert (script.requests[-1].spec.model, script.requests[-1].spec.model_fingerprint) == (
            *(found, its.model_fingerprint),
        )


def test_a_plain_vector_has_no_origin(script: Hearing, call: Call, tmp_path: Path) -> None:
    call(script.address, "register_concept", "axis", vector=np.arange(8) - 4.0)
    path = call(script.address, "export_concept", "axis", tmp_path / "axis.safetensors")
    assert cdam.load_concept(path).spread is None
    call(script.address, "import_concept", path)
    spec = script.requests[-1].spec
    assert not spec.HasField("origin")
    assert not spec.HasField("preprocessing")
    assert spec.vector == tensor(np.arange(8, dtype=np.float32) - 4)


def test_what_can_not_be_written_leaves_what_was_there(script: Hearing, call: Call, tmp_path: Path) -> None:
    stock(script, "loops")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        call(script.address, "export_concept", "loops", tmp_path / "folder")
    with pytest.raises(FileNotFoundError) as caught:
        call(script.address, "export_concept", "loops", tmp_path / "nowhere" / "file")
    assert caught.value.filename == str(tmp_path / "nowhere" / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.fixture
def saved(script: Hearing, tmp_path: Path) -> dict[str, Any]:
    """What the JSON of an export says."""
    stock(script, "loops")
    with cdam.Client(script.address) as client:
        data = client.export_concept("loops", tmp_path / "whole").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    found: dict[str, Any] = json.loads(header["__metadata__"]["cdam.concept"])
    return found


VECTOR = np.arange(1, 9, dtype=np.float32)


def _wrong(path: Path, fields: Any, tensors: dict[str, np.ndarray] | None = None) -> str:
    text = fields if isinstance(fields, str) else json.dumps(fields)
    path.write_bytes(save({"vector": VECTOR} if tensors is None else tensors, {"cdam.concept": text}))
    with pytest.raises(cdam.ConceptFileError) as caught:
        cdam.load_concept(path)
    assert isinstance(caught.value, ValueError)
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert len(said) < len(str(path)) + 200
    return said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("id", "1234"),
        ("id", None),
        ("name", 7),
        ("version", -1),
        ("version", True),
        ("version", 2**64),
        ("labels", {"a": 1}),
        ("labels", ["a"]),
        ("example_count", 3),
        ("negative_count", 0),
        ("spread", "high"),
        ("spread", 1e300),
        ("spread", float("nan")),
        ("create_time", "yesterday"),
        ("create_time", "2024-05-06T07:08:09"),
        ("create_time", 5),
        ("labels", {"\ud800": "a"}),
        ("labels", {"a": "\ud800"}),
        ("description", "\ud800"),
        ("model_fingerprint", "\ud800"),
        ("resize", 2),
        ("resize", "nope"),
        ("input_size", [32]),
        ("input_size", [2**32, 4]),
        ("input_size", "64"),
        ("examples", [{"digest": "00"}]),
        ("examples", 5),
        ("examples", [{"digest": "0" * 64, "cosine": "1"}] * 2),
        ("negatives", [["0" * 64, 1.0]]),
        ("imported", 1),
        ("description", ["x" * 100 + "\0"]),
    ],
)
def test_wrong_fields_are_named(saved: dict[str, Any], tmp_path: Path, name: str, value: Any) -> None:
    assert name in _wrong(tmp_path / "file", saved | {name: value})


def test_every_field_is_needed(saved: dict[str, Any], tmp_path: Path) -> None:
    for name in saved:
        said = _wrong(tmp_path / "file", {key: value for key, value in saved.items() if key != name})
        assert "format" in said if name == "format" else f"{name!r} is missing" in said
    (tmp_path / "file").write_bytes(save({"vector": VECTOR}, {"cdam.concept": json.dumps(saved | {"new": 1})}))
    assert cdam.load_concept(tmp_path / "file").name == "loops"  # what a later version adds is passed over


def test_files_that_are_none(saved: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert "reads 'cdam-concept-1'" in _wrong(path, saved | {"format": "cdam-concept-2"})
    for text in ("", "{", "[" * 100_000, '"text"', "[]", "null"):
        _wrong(path, text)
    for tensors in (
        {},
        {"other": VECTOR},
        {"vector": VECTOR, "other": VECTOR},
        {"vector": VECTOR.astype(np.float64)},
        {"vector": VECTOR[None]},
        {"vector": VECTOR * 0},
        {"vector": VECTOR * np.float32("inf")},
        {"vector": VECTOR[:0]},
    ):
        _wrong(path, saved, tensors)
    path.write_bytes(save({"vector": VECTOR}, {"other": "metadata"}))
    with pytest.raises(cdam.ConceptFileError, match=r"cdam\.concept"):
        cdam.load_concept(path)
    whole = (tmp_path / "whole").read_bytes()
    picture = io.BytesIO()
    Image.new("L", (9, 9)).save(picture, "PNG")
    for data in (b"", b"\0", whole[:50], whole[:-1], whole + b"\0", b"\xff" * 8 + whole[8:], picture.getvalue()):
        path.write_bytes(data)
        with pytest.raises(cdam.ConceptFileError, match="safetensors"):
            cdam.load_concept(path)
    with path.open("wb") as file:
        file.truncate(65 * MEBIBYTE)
    with pytest.raises(cdam.ConceptFileError, match="more than a concept has"):
        cdam.load_concept(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(cdam.ConceptFileError, match="no file"):
        cdam.load_concept(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        cdam.load_concept(tmp_path / "nowhere")
    with pytest.raises(IsADirectoryError):
        cdam.load_concept(tmp_path)
