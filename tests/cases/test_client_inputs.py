"""What callers hand to the client: large pictures from memory, whole numbers of any library, event loops one after another."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import cdam
from cdam._encode import encode_explain, encode_method
from cdam._evaluate import Evaluate
from cdam._images import open_image
from cdam._items import Items
from cdam._targets import as_targets
from scripted_server import Script, scores

RNG = np.random.default_rng(5)
SMOOTH = np.add.outer(np.arange(300), np.arange(400)).astype(np.uint8)[..., None].repeat(3, axis=2)  # 360,000 bytes
NOISE = RNG.integers(0, 256, (300, 400, 3), dtype=np.uint8)
LIMIT = 100_000


# --- pictures over the limit of a message


@pytest.mark.parametrize("picture", [SMOOTH, SMOOTH[..., 0], Image.fromarray(SMOOTH)], ids=["RGB", "grey", "PIL"])
def test_a_picture_over_the_limit_travels_as_png(script: Script, picture: Any) -> None:
    """triton-inference-server#1776, MLServer#290: an array that is too large as it is, and small as a file."""
    with cdam.Client(script.address, max_message_bytes=LIMIT) as client:
        client.explain(picture, 1)
    (request,) = script.requests
    assert request.image.encoded.startswith(b"\x89PNG")
    assert request.ByteSize() < LIMIT
    np.testing.assert_array_equal(np.asarray(open_image(request.image)), SMOOTH)


def test_a_picture_within_the_limit_travels_as_it_is(script: Script) -> None:
    with cdam.Client(script.address) as client:
        client.explain(SMOOTH, 1)
    assert script.requests[0].image.raw.data == SMOOTH.tobytes()


TOO_LARGE = (
    rf"a request of 3\d{{5}} bytes, over the client's max_message_bytes of {LIMIT}: send a JPEG file, make the picture "
    "smaller, or allow more here and on the server"
)


@pytest.mark.parametrize("picture", [NOISE, Image.fromarray(NOISE)], ids=["array", "PIL"])
def test_what_is_too_large_even_so_says_what_to_do(script: Script, picture: Any) -> None:
    """exo#474, grpc/grpc-dotnet#2277: the transport's "larger than max" names no picture and no remedy."""
    with cdam.Client(script.address, max_message_bytes=LIMIT) as client:
        with pytest.raises(cdam.ResourceExhausted, match=TOO_LARGE):
            client.explain(picture, 1)
        with pytest.raises(cdam.ResourceExhausted, match=TOO_LARGE) as error:
            client.register_concept("loops", [SMOOTH, picture])
        assert error.value.__notes__ == ["examples[1]"]
    assert not script.requests


def test_an_item_of_a_stream_fails_alone() -> None:
    """exo#474: in a stream the picture that is too large has the error, and the others go on."""
    settings: dict[str, Any] = {"model": "", "resize": None, "input_size": None, "priority": None}
    job = Items(1, (), window=1, retries=0, max_message_bytes=LIMIT, **settings)
    result: Any = job.encode(NOISE, 0, ())
    with pytest.raises(cdam.ResourceExhausted, match=TOO_LARGE):
        result.result()
    sent: Any = job.encode(SMOOTH, 1, ())
    assert len(job.serialise(sent.request)) < LIMIT
    np.testing.assert_array_equal(np.asarray(open_image(sent.request.image)), SMOOTH)


async def test_asyncio_says_the_same(script: Script) -> None:
    async with cdam.AsyncClient(script.address, max_message_bytes=LIMIT) as client:
        with pytest.raises(cdam.ResourceExhausted, match=TOO_LARGE):
            await client.explain(NOISE, 1)
        assert (await client.explain(SMOOTH, 1)).maps[0].label == "1"


def test_the_largest_of_a_samples_pictures_is_packed_first() -> None:
    job = Evaluate(
        ["one"],
        methods="cdam",
        metrics="fidelity",
        model="",
        seed=0,
        resize=None,
        input_size=None,
        window=np.int64(2),
        retries=torch.tensor(1),
        bootstrap_resamples=np.int32(10),
        expected_samples=None,
        max_message_bytes=LIMIT,
    )
    small = NOISE[:100, :100]
    sent: Any = job.encode(cdam.Sample("s", SMOOTH, 1, counterfactual=small, mask=SMOOTH[..., 0] > 9), 0, ())
    sample = sent.request.sample
    assert (sample.image.WhichOneof("source"), sample.counterfactual.WhichOneof("source")) == ("encoded", "raw")
    np.testing.assert_array_equal(np.asarray(open_image(sample.image)), SMOOTH)
    assert not sample.HasField("wrong_mask")
    assert (job.window, job.retries, job.resamples) == (2, 1, 10)


# --- whole numbers

SEVENS: dict[str, Any] = {
    "int": 7,
    "np.int64": np.int64(7),
    "np.uint8": np.uint8(7),
    "array": np.array(7),
    "tensor": torch.tensor(7),
    "tensor of one": torch.tensor([7]),
    "argmax": torch.eye(9)[7].argmax(),
}


@pytest.mark.parametrize("name", SEVENS)
def test_an_index_of_any_library(name: str) -> None:
    """civisanalytics/civis-python#85, frgfm/torch-cam#264: the index comes from argmax, as numpy's or torch's integer."""
    seven = SEVENS[name]
    assert as_targets(seven) == (cdam.Output(7),)
    assert as_targets([seven, "cat"]) == (cdam.Output(7), cdam.Output("cat"))
    assert as_targets([cdam.Contrast(seven, 2)]) == (cdam.Contrast(cdam.Output(7), cdam.Output(2)),)
    assert type(cdam.Output(seven).selector) is int
    assert (cdam.TopK(seven), type(cdam.TopK(seven).k)) == (cdam.TopK(7), int)
    method = encode_method(cdam.SmoothCdam(samples=seven, seed=seven))
    assert (method.smooth_cdam.samples, method.smooth_cdam.seed) == (7, 7)
    assert encode_method(cdam.Attention(heads=(seven, 1))).attention.heads == [7, 1]


def test_several_indices_of_any_library() -> None:
    expected = (cdam.Output(5), cdam.Output(6))
    for several in (np.array([5, 6]), torch.tensor([5, 6]), range(5, 7), (np.int32(5), torch.tensor(6))):
        assert as_targets(several) == expected


@pytest.mark.parametrize(
    "wrong", [True, np.True_, torch.tensor(data=True), 7.0, np.float32(7), torch.tensor(7.0), None, np.array(7.5)]
)
def test_what_is_no_index(wrong: Any) -> None:
    """A bool passes for an integer in Python; a label that YAML read as one would be output 1."""
    with pytest.raises(TypeError, match="index"):
        as_targets(wrong)
    with pytest.raises(TypeError, match="index"):
        cdam.Output(wrong)
    with pytest.raises(TypeError, match="k is a whole number, not"):
        cdam.TopK(wrong)
    if wrong is not None:  # which is the default
        with pytest.raises(ValueError, match="smooth_cdam: samples can't be"):
            encode_method(cdam.SmoothCdam(samples=wrong))


@pytest.mark.parametrize("noise", [0.25, np.float32(0.25), np.float64(0.25)])
def test_a_level_of_noise_of_any_library(noise: Any) -> None:
    """civisanalytics/civis-python#85's sibling: np.float32 is no float in Python."""
    for method in (cdam.SmoothCdam(noise=noise), cdam.SmoothGrad(noise=noise)):
        assert method.noise == cdam.Noise(relative=0.25)
        assert getattr(encode_method(method), method.kind).noise.relative == 0.25


@pytest.mark.parametrize("size", [np.array([32, 48]), torch.tensor([32, 48]), (np.int64(32), 48)])
def test_a_size_of_any_library(size: Any) -> None:
    """Shapes come from arrays: Image.size is of ints, but np.array(...) // 2 is not."""
    given: dict[str, Any] = {"methods": (), "model": "", "resize": None, "request_id": "", "priority": None}
    request = encode_explain(SMOOTH, 1, input_size=size, **given)
    assert (request.preprocessing.input_size.height, request.preprocessing.input_size.width) == (32, 48)
    with pytest.raises(TypeError, match="a side of input_size is a whole number, not float"):
        encode_explain(SMOOTH, 1, input_size=(32.0, 48), **given)  # type: ignore[arg-type]


# --- event loops

Ask = Callable[[cdam.AsyncClient], Any]


async def _once(client: cdam.AsyncClient) -> Any:
    return (await client.explain(SMOOTH, 3)).maps[0].scores


async def _stream(client: cdam.AsyncClient) -> Any:
    (scores,) = [result.result().maps[0].scores async for result in client.explain_stream([SMOOTH], 3)]
    return scores


@pytest.mark.parametrize("ask", [_once, _stream])
def test_one_loop_after_another(server_address: str, ask: Ask) -> None:
    """grpc/grpc#32480, nebius/pysdk#178, pyzeebe#198: "attached to a different loop", "Event loop is closed"."""
    client = cdam.AsyncClient(server_address)
    asyncio.run(client.wait_until_ready(60))
    with cdam.Client(server_address) as blocking:
        expected = blocking.explain(SMOOTH, 3).maps[0].scores
    for _ in range(3):
        np.testing.assert_allclose(asyncio.run(ask(client)), expected, atol=1e-5 * np.abs(expected).max())
    asyncio.run(client.close())
    with pytest.raises(RuntimeError, match="this client is closed"):
        asyncio.run(ask(client))


def test_loops_in_several_threads_at_once(script: Script) -> None:
    """nebius/pysdk#178: a client that two threads share, each with a loop of its own; either may close it."""
    client = cdam.AsyncClient(script.address)
    both = threading.Barrier(2, timeout=30)
    answers: list[Any] = []
    errors: list[BaseException] = []

    async def use(*, closes: bool) -> None:
        answers.append(await _once(client))
        await asyncio.to_thread(both.wait)
        answers.append(await _once(client))
        await asyncio.to_thread(both.wait)
        if closes:
            await client.close()
        await asyncio.to_thread(both.wait)

    def run(*, closes: bool) -> None:
        try:
            asyncio.run(use(closes=closes))
        except BaseException as error:  # noqa: BLE001 - shown below
            errors.append(error)

    threads = [threading.Thread(target=run, kwargs={"closes": closes}) for closes in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert len(answers) == 4
    assert all(np.array_equal(answer, scores(0)) for answer in answers)
