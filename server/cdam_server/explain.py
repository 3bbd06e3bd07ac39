"""Explain: from a request's words to a job for the engine, and back with all that the answer needs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cdam_engine import Explanation, Output, Target, TopK
from cdam_engine.preprocess import Prepared, Resize, prepare
from cdam_server.errors import (
    DeadlineError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from cdam_server.loading import Task
from cdam_server.models import Bucket, Catalog, Job, ServedModel
from cdam_server.scheduling import Batcher, ClosedError, Done, ExpiredError, QueueFullError
from cdam_server.telemetry import Telemetry


@dataclass(frozen=True)
class OutputNamed:
    """An output by name, still to be looked up."""

    name: str


@dataclass(frozen=True, eq=False)
class Command:
    """A request to explain one image, decoded but for the image.

    Attributes:
        model: Name of the model; empty for the default one.
        open_image: Decodes the image, upright RGB; slow, so it is called outside the event loop.
        targets: What to explain.
        resize: Which part of the image the model sees.
        input_size: (height, width) in pixels, or None for the model's own.
        timeout: Seconds that the caller will still wait, or None.
        rank: Commands of lower rank go first.
    """

    model: str
    open_image: Callable[[], Image.Image]
    targets: tuple[Output | TopK | OutputNamed, ...]
    resize: Resize
    input_size: tuple[int, int] | None
    timeout: float | None
    rank: int


@dataclass(frozen=True, eq=False)
class Explained:
    """The answer to a command.

    Attributes:
        model: The model that was explained.
        prepared: The image as the model saw it, with its geometry.
        done: The explanation, and how its batch came about.
        request_indices: For each explained target, the index of the command's target that it came from.
        probabilities: Of every output, shape (C,); None for a regression.
        decode_seconds: Time for decoding and resizing the image, the wait for a decoder counted in.
    """

    model: ServedModel
    prepared: Prepared
    done: Done[Explanation]
    request_indices: tuple[int, ...]
    probabilities: NDArray[np.float64] | None
    decode_seconds: float


class ExplainUseCase:
    """Explains one image at a time; the batcher brings them together.

    Args:
        catalog: The models.
        batcher: Where jobs go.
        decoders: Threads for decoding images.
        telemetry: Metrics.
        max_targets: Largest number of targets of a request, top-k counted as k.
        max_patches: Most patches that a request's input size may give.
    """

    def __init__(
        self,
        catalog: Catalog,
        batcher: Batcher[Bucket, Job, Explanation],
        decoders: ThreadPoolExecutor,
        telemetry: Telemetry,
        *,
        max_targets: int,
        max_patches: int,
    ) -> None:
        self.catalog = catalog
        self._batcher = batcher
        self._decoders = decoders
        self._telemetry = telemetry
        self._max_targets = max_targets
        self._max_patches = max_patches
        self._preparing = 0

    async def __call__(self, command: Command) -> Explained:
        """Check, prepare, queue, compute.

        Raises:
            ServiceError: The request is wrong, or can't be served now.
        """
        model = self.catalog.get(command.model)
        input_size = self._input_size(model, command)
        targets = self._targets(model, command)
        with _refusals():
            self._batcher.check_room(self._preparing)
            prepared, decode_seconds = await self._prepare(model, command, input_size)
            timeout = None if command.timeout is None else command.timeout - decode_seconds
            bucket = Bucket(model.loaded.name, input_size)
            job = Job(prepared.pixels, targets)
            done = await self._batcher.submit(bucket, job, timeout=timeout, rank=command.rank)
        self._observe(model, done, decode_seconds)
        return Explained(
            model=model,
            prepared=prepared,
            done=done,
            request_indices=_request_indices(targets),
            probabilities=_probabilities(done.answer.logits, model.loaded.task),
            decode_seconds=decode_seconds,
        )

    def _input_size(self, model: ServedModel, command: Command) -> tuple[int, int]:
        own = model.loaded.data_config.input_size
        size = command.input_size or own
        try:
            grid = model.explainer.vit.grid(size)
        except ValueError as error:
            raise InvalidArgumentError("preprocessing.input_size", str(error)) from error
        # Attention's cost grows with the square of the patches; a model's own size is its operator's choice.
        if size != own and grid.h * grid.w > self._max_patches:
            message = f"gives {grid.h} x {grid.w} patches; at most {self._max_patches} are allowed"
            raise InvalidArgumentError("preprocessing.input_size", message)
        return size

    def _targets(self, model: ServedModel, command: Command) -> tuple[Target, ...]:
        """The targets with names looked up and every index in range."""
        count = model.loaded.output_count
        if not count:
            raise FailedPreconditionError("NO_OUTPUTS", f"model {model.loaded.name!r} has no outputs: it needs a head")
        resolved: list[Target] = []
        for position, target in enumerate(command.targets):
            field = f"targets[{position}]"
            match target:
                case OutputNamed(name):
                    resolved.append(Output(model.output_index(name, f"{field}.output.name")))
                case Output(index) if index >= count:
                    message = (
                        f"{field}.output.index: model {model.loaded.name!r} has outputs 0 to {count - 1}, not {index}"
                    )
                    raise NotFoundError("output", str(index), message)
                case TopK(k) if not 1 <= k <= count:
                    raise InvalidArgumentError(f"{field}.top_k.k", f"must be from 1 to {count}, the number of outputs")
                case _:
                    resolved.append(target)
        wanted = sum(target.k if isinstance(target, TopK) else 1 for target in resolved)
        if wanted > self._max_targets:
            raise InvalidArgumentError("targets", f"{wanted} targets; at most {self._max_targets} a request")
        return tuple(resolved)

    async def _prepare(
        self, model: ServedModel, command: Command, input_size: tuple[int, int]
    ) -> tuple[Prepared, float]:
        """The image as the model sees it, and the time from now until it was there."""
        started = perf_counter()
        self._preparing += 1
        try:
            prepared = await asyncio.get_running_loop().run_in_executor(
                self._decoders, _open_and_resize, model, command, input_size
            )
        finally:
            self._preparing -= 1
        return prepared, perf_counter() - started

    def _observe(self, model: ServedModel, done: Done[Explanation], decode_seconds: float) -> None:
        telemetry, name = self._telemetry, model.loaded.name
        telemetry.compute.labels("decode", "").observe(decode_seconds)
        telemetry.compute.labels("trunk", "cdam").observe(done.answer.trunk_seconds)
        telemetry.compute.labels("tail", "cdam").observe(done.answer.tail_seconds)
        telemetry.queue.labels(name).observe(done.queue_seconds)
        telemetry.batch_size.labels(name).observe(done.batch_size)


def _open_and_resize(model: ServedModel, command: Command, input_size: tuple[int, int]) -> Prepared:
    return prepare(command.open_image(), model.loaded.data_config, resize=command.resize, input_size=input_size)


@contextmanager
def _refusals() -> Iterator[None]:
    """The batcher's refusals, in the service's words."""
    try:
        yield
    except QueueFullError as error:
        raise OverloadedError(str(error), error.retry_after) from error
    except ExpiredError as error:
        raise DeadlineError(str(error)) from error
    except ClosedError as error:
        raise UnavailableError("the server is going down", 1.0) from error


def _request_indices(targets: tuple[Target, ...]) -> tuple[int, ...]:
    counts = (target.k if isinstance(target, TopK) else 1 for target in targets)
    return tuple(index for index, count in enumerate(counts) for _ in range(count))


def _probabilities(logits: NDArray[np.floating], task: Task) -> NDArray[np.float64] | None:
    """What a classifier's logits mean: softmax over classes, or a sigmoid for each label."""
    values = logits.astype(np.float64)
    match task:
        case Task.MULTI_CLASS:
            exponentials = np.exp(values - values.max(initial=-np.inf))
            return np.asarray(exponentials / exponentials.sum())
        case Task.MULTI_LABEL | Task.BINARY:
            return np.asarray(0.5 * (1.0 + np.tanh(0.5 * values)))  # no overflow at either end
        case Task.REGRESSION:
            return None
