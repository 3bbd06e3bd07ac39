"""One image on its way: room in the queue, decoded, brought to the model's input, computed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cdam_engine import Explanation, Method, Target
from cdam_engine.preprocess import Prepared, Resize, prepare
from cdam_engine.targets import count
from cdam_server.compute.facts import Bucket, ModelFacts
from cdam_server.compute.interface import Compute
from cdam_server.compute.scheduling import (
    ClosedError,
    DeviceLostError,
    Done,
    ExpiredError,
    JobSpec,
    Pool,
    QueueFullError,
    TooLargeError,
)
from cdam_server.compute.work import EmbedWork, ExplainWork, ImageWork, image_bucket
from cdam_server.errors import DeadlineError, ExhaustedError, OverloadedError, UnavailableError
from cdam_server.operation import tracing
from cdam_server.operation.telemetry import Telemetry

Content: TypeAlias = Callable[[], bytes]


@dataclass(frozen=True, eq=False)
class ImageRequest:
    """An image that something is asked about.

    Attributes:
        open: Decodes it, upright RGB; slow, so it is called outside the event loop.
        resize: Which part of it the model sees.
        timeout: Seconds that the caller will still wait, or None.
        rank: Those of lower rank go first.
        caller: Who asks; callers take turns.
        bytes: Memory that the request holds.
        content: Returns the image as it was sent; None: it won't be asked about again.
    """

    open: Callable[[], Image.Image]
    resize: Resize
    timeout: float | None = None
    rank: int = 0
    caller: str = ""
    bytes: int = 0
    content: Content | None = None


@dataclass(frozen=True, eq=False)
class Answered:
    """What was found of an image.

    Attributes:
        prepared: The image as the model saw it, with its geometry.
        done: The explanation, and how its batch came about.
        decode_seconds: Time for decoding and resizing the image, the wait for a decoder counted in.
    """

    prepared: Prepared
    done: Done[Explanation]
    decode_seconds: float


class Images:
    """Has images computed, one at a time; the scheduler brings them together.

    Args:
        compute: What computes.
        decoders: Threads for decoding images.
        telemetry: Metrics.
    """

    def __init__(self, compute: Compute, decoders: Pool, telemetry: Telemetry) -> None:
        self._compute = compute
        self._decoders = decoders
        self._telemetry = telemetry

    async def explain(
        self,
        model: ModelFacts,
        request: ImageRequest,
        input_size: tuple[int, int],
        targets: tuple[Target, ...],
        methods: tuple[Method, ...],
    ) -> Answered:
        """Explain an image, by targets and methods that the model can serve.

        Raises:
            ServiceError: The image can't be decoded, or can't be served now.
            NonFiniteError: What was found is not finite.
        """
        cost = model.explained.cost(methods, count(targets), model.patches(input_size))
        bucket = image_bucket(model, input_size)
        return await self._answer(
            model, request, bucket, cost, lambda pixels: ExplainWork(bucket, model.name, pixels, targets, methods)
        )

    async def embed(
        self, model: ModelFacts, request: ImageRequest, input_size: tuple[int, int]
    ) -> NDArray[np.floating]:
        """The latent of an image, shape (D,); raises what `explain` raises."""
        bucket = image_bucket(model, input_size)
        answered = await self._answer(model, request, bucket, 1.0, lambda pixels: EmbedWork(bucket, model.name, pixels))
        return answered.done.answer.latent

    async def _answer(
        self,
        model: ModelFacts,
        request: ImageRequest,
        bucket: Bucket,
        cost: float,
        make: Callable[[NDArray[np.uint8]], ImageWork],
    ) -> Answered:
        spec = JobSpec(
            bucket=bucket,
            cost=model.times_larger(bucket.input_size) * cost,
            bytes=request.bytes + 3 * math.prod(bucket.input_size),
            caller=request.caller,
            timeout=request.timeout,
            rank=request.rank,
        )
        with refusals():
            image = None if request.content is None else partial(_image_key, request, bucket)
            async with self._compute.admit(spec, image) as ticket:
                started = perf_counter()
                prepared = await self._decoders.run(request.caller, _open_and_resize, model, request, bucket.input_size)
                decode_seconds = perf_counter() - started
                done = await ticket.submit(make(prepared.pixels))
        _trace(done, decode_seconds, perf_counter())
        self._telemetry.observe_request(model.name, decode_seconds, done.queue_seconds)
        return Answered(prepared, done, decode_seconds)


def _trace(done: Done[Explanation], decode_seconds: float, ended: float) -> None:
    """The stages of a request that is done: one after the other, the last one ending now."""
    trunk, tail = done.answer.trunk_seconds, done.answer.tail_seconds
    stages = {"decode": decode_seconds, "queue": done.queue_seconds, "trunk": trunk, "tail": tail}
    started = ended - sum(stages.values())
    for name, seconds in stages.items():
        tracing.stage(name, started, seconds, batch_size=done.batch_size)
        started += seconds


def _image_key(request: ImageRequest, bucket: Bucket) -> int:
    """64 bits that stand for an image as a model sees it, the same in every process."""
    assert request.content is not None
    found = hashlib.blake2b(request.content(), digest_size=8)
    found.update(repr((bucket, request.resize)).encode())
    return int.from_bytes(found.digest())


def _open_and_resize(model: ModelFacts, request: ImageRequest, input_size: tuple[int, int]) -> Prepared:
    return prepare(request.open(), model.data_config, resize=request.resize, input_size=input_size)


@contextmanager
def refusals() -> Iterator[None]:
    """The scheduler's refusals, in the service's words."""
    try:
        yield
    except QueueFullError as error:
        raise OverloadedError(str(error), error.retry_after) from error
    except ExpiredError as error:
        raise DeadlineError(str(error)) from error
    except TooLargeError as error:
        raise ExhaustedError("OUT_OF_MEMORY", "the image does not fit into the device's memory") from error
    except (ClosedError, DeviceLostError) as error:
        raise UnavailableError("the server is going down") from error
