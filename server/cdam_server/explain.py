"""Explain: from a request's words to a job for the engine, and back with all that the answer needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cdam_engine import (
    Attention,
    Concept,
    Contrast,
    Explanation,
    Method,
    Output,
    PatchMaskPrediction,
    Target,
    TopK,
)
from cdam_engine.methods.prediction import Activation
from cdam_engine.preprocess import Prepared, Resize, prepare
from cdam_engine.targets import Scalar, Similarity, count
from cdam_server import tracing
from cdam_server.concepts import ConceptId, ConceptName, ConceptUseCase
from cdam_server.errors import (
    DeadlineError,
    ExhaustedError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from cdam_server.loading import Task
from cdam_server.models import Bucket, Catalog, Job, NonFiniteError, ServedModel
from cdam_server.scheduling import (
    ClosedError,
    DeviceLostError,
    Done,
    ExpiredError,
    Pool,
    QueueFullError,
    Scheduler,
    Terms,
    TooLargeError,
    Work,
)
from cdam_server.telemetry import Telemetry

_SHORT_ID: Final = 12
ACTIVATIONS: Final[dict[Task, Activation]] = {
    Task.MULTI_CLASS: "softmax",
    Task.MULTI_LABEL: "sigmoid",
    Task.BINARY: "sigmoid",
    Task.REGRESSION: "identity",
}
"""What turns a logit into what it means."""


@dataclass(frozen=True)
class OutputNamed:
    """An output by name, still to be looked up."""

    name: str


@dataclass(frozen=True)
class ConceptSelected:
    """A registered concept, still to be looked up.

    Attributes:
        selector: Which.
        similarity: How similarity to it is measured.
    """

    selector: ConceptName | ConceptId
    similarity: Similarity


@dataclass(frozen=True, eq=False, kw_only=True)
class RegisteredConcept(Concept):
    """Similarity to a registered concept; equal questions are answered once, so equal ones must be equal.

    Attributes:
        id: The concept's id.
        name: What it is called in the answer.
    """

    id: str
    name: str

    def __eq__(self, other: object) -> bool:
        """Whether both are the same concept, compared in the same way."""
        return isinstance(other, RegisteredConcept) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[str, str, str]:
        return self.id, self.name, self.similarity


Side: TypeAlias = Output | OutputNamed | Concept | ConceptSelected


@dataclass(frozen=True, eq=False)
class ContrastNamed:
    """A contrast whose outputs are still to be looked up.

    Attributes:
        positive: The minuend.
        negative: The subtrahend.
    """

    positive: Side
    negative: Side


WantedScalar: TypeAlias = Side | ContrastNamed
Wanted: TypeAlias = WantedScalar | TopK


@dataclass(frozen=True, eq=False)
class Command:
    """A request to explain one image, decoded but for the image.

    Attributes:
        model: Name of the model; empty for the default one.
        open_image: Decodes the image, upright RGB; slow, so it is called outside the event loop.
        targets: What to explain.
        methods: How.
        resize: Which part of the image the model sees.
        input_size: (height, width) in pixels, or None for the model's own.
        timeout: Seconds that the caller will still wait, or None.
        rank: Commands of lower rank go first.
        caller: Who asks; callers take turns.
        bytes: Memory that the request holds.
    """

    model: str
    open_image: Callable[[], Image.Image]
    targets: tuple[Wanted, ...]
    methods: tuple[Method, ...]
    resize: Resize
    input_size: tuple[int, int] | None
    timeout: float | None
    rank: int
    caller: str = ""
    bytes: int = 0


@dataclass(frozen=True, eq=False)
class Explained:
    """The answer to a command.

    Attributes:
        model: The model that was explained.
        prepared: The image as the model saw it, with its geometry.
        done: The explanation, and how its batch came about.
        probabilities: Of every output, shape (C,); None for a regression.
        decode_seconds: Time for decoding and resizing the image, the wait for a decoder counted in.
    """

    model: ServedModel
    prepared: Prepared
    done: Done[Explanation]
    probabilities: NDArray[np.float64] | None
    decode_seconds: float


class ExplainUseCase:
    """Explains one image at a time; the scheduler brings them together.

    Args:
        catalog: The models.
        scheduler: Where jobs go.
        work: What computes a job.
        decoders: Threads for decoding images.
        telemetry: Metrics.
        concepts: Where registered concepts are found.
        max_targets: Largest number of targets of a request, top-k counted as k.
        max_patches: Most patches that a request's input size may give.
        max_passes: Most passes through the whole model that a request's methods may take.
    """

    def __init__(
        self,
        catalog: Catalog,
        scheduler: Scheduler,
        work: Callable[[Bucket, Job], Work[Explanation]],
        decoders: Pool,
        telemetry: Telemetry,
        concepts: ConceptUseCase,
        *,
        max_targets: int,
        max_patches: int,
        max_passes: int,
    ) -> None:
        self.catalog = catalog
        self._scheduler = scheduler
        self._work = work
        self._decoders = decoders
        self._telemetry = telemetry
        self._concepts = concepts
        self._max_targets = max_targets
        self._max_patches = max_patches
        self._max_passes = max_passes

    async def __call__(self, command: Command) -> Explained:
        """Check, admit, prepare, queue, compute.

        Raises:
            ServiceError: The request is wrong, or can't be served now.
        """
        model = self.catalog.get(command.model)
        input_size = self.input_size(model, command.input_size, "preprocessing.input_size")
        methods = tuple(
            resolve_method(model, method, f"methods[{position}]") for position, method in enumerate(command.methods)
        )
        targets = await self._targets(model, command)
        terms = self._terms(model, command, input_size, targets, methods)
        with refusals(), self._scheduler.admit(terms) as ticket:
            prepared, decode_seconds = await self._prepare(model, command, input_size)
            try:
                job = Job(prepared.pixels, targets, methods, model.loaded.name)
                done = await ticket.submit(self._work(self.catalog.bucket(model, input_size), job))
            except NonFiniteError as error:
                if all(isinstance(target, Output | TopK) for target in targets):
                    raise
                message = "a map is not finite: is a concept's vector too large for one of the methods?"
                raise InvalidArgumentError("targets", message) from error
        _trace(done, decode_seconds, perf_counter())
        self._telemetry.compute.labels("decode", "", model.loaded.name).observe(decode_seconds)
        self._telemetry.queue.labels(model.loaded.name).observe(done.queue_seconds)
        return Explained(
            model=model,
            prepared=prepared,
            done=done,
            probabilities=_probabilities(done.answer.logits, model.loaded.task),
            decode_seconds=decode_seconds,
        )

    def input_size(self, model: ServedModel, wanted: tuple[int, int] | None, field: str) -> tuple[int, int]:
        """(height, width) in pixels that images are brought to.

        Args:
            model: The model.
            wanted: What the request says; None: the model's own.
            field: Path of the field that says it, for the message.

        Raises:
            InvalidArgumentError: The model can't take it, or it is too large.
        """
        own = model.loaded.data_config.input_size
        size = wanted or own
        try:
            grid = model.explainer.vit.grid(size)
        except ValueError as error:
            raise InvalidArgumentError(field, str(error)) from error
        # Attention's cost grows with the square of the patches; a model's own size is its operator's choice.
        if size != own and grid.h * grid.w > self._max_patches:
            message = f"gives {grid.h} x {grid.w} patches; at most {self._max_patches} are allowed"
            raise InvalidArgumentError(field, message)
        return size

    async def _targets(self, model: ServedModel, command: Command) -> tuple[Target, ...]:
        """The targets as the engine takes them, all of them such as the model has."""
        targets = tuple(
            [await self._target(model, target, f"targets[{i}]") for i, target in enumerate(command.targets)]
        )
        wanted = count(targets)
        if wanted > self._max_targets:
            raise InvalidArgumentError("targets", f"{wanted} targets; at most {self._max_targets} a request")
        return targets

    async def _target(self, model: ServedModel, target: Wanted, field: str) -> Target:
        if not isinstance(target, TopK):
            return await self.scalar(model, target, field)
        count = _output_count(model)
        if not 1 <= target.k <= count:
            raise InvalidArgumentError(f"{field}.top_k.k", f"must be from 1 to {count}, the number of outputs")
        return target

    async def scalar(self, model: ServedModel, target: WantedScalar, field: str) -> Scalar:
        """The target of one value as the engine takes it, such as the model has.

        Args:
            model: The model.
            target: What the request says.
            field: Path of the field that says it, for the message.

        Raises:
            ServiceError: The model has no such output, or there is no such concept of it.
        """
        match target:
            case ContrastNamed(positive, negative):
                return Contrast(
                    await self._side(model, positive, f"{field}.contrast.positive"),
                    await self._side(model, negative, f"{field}.contrast.negative"),
                )
            case _:
                return await self._side(model, target, field)

    async def _side(self, model: ServedModel, target: Side, field: str) -> Output | Concept:
        match target:
            case ConceptSelected(selector, similarity):
                if isinstance(selector, ConceptName):
                    selector = replace(selector, model=model.loaded.name)
                found = await self._concepts.find(model, selector, f"{field}.concept")
                concept_id = found.content.facts.id
                # Content that goes by an id may have any number of names, of anybody's.
                name = selector.name if isinstance(selector, ConceptName) else concept_id[:_SHORT_ID]
                vector = torch.from_numpy(found.content.vector.copy())  # which is not for writing
                return RegisteredConcept(vector, similarity, id=concept_id, name=name)
            case Concept():
                check_vector(
                    model, target.vector, f"{field}.concept.vector", needs_direction=target.similarity == "cosine"
                )
                return target
            case OutputNamed(name):
                _output_count(model)
                return Output(model.output_index(name, f"{field}.output.name"))
            case Output(index):
                count = _output_count(model)
                if index >= count:
                    message = (
                        f"{field}.output.index: model {model.loaded.name!r} has outputs 0 to {count - 1}, not {index}"
                    )
                    raise NotFoundError("output", str(index), message)
                return target

    def _terms(
        self,
        model: ServedModel,
        command: Command,
        input_size: tuple[int, int],
        targets: tuple[Target, ...],
        methods: tuple[Method, ...],
    ) -> Terms:
        """What the scheduler is told of the work.

        Raises:
            InvalidArgumentError: It is more than a request may ask for.
        """
        grid = model.explainer.vit.grid(input_size)
        patches, number = grid.h * grid.w, count(targets)
        larger = times_larger(model, input_size)
        passes = math.ceil(larger * sum(method.passes(number, patches) for method in methods))
        if passes > self._max_passes:
            message = f"take {passes} passes through the whole model; at most {self._max_passes} are allowed a request"
            raise InvalidArgumentError("methods", message)
        return Terms(
            bucket=self.catalog.bucket(model, input_size),
            cost=larger * model.explainer.cost(methods, number, patches),
            bytes=command.bytes + 3 * math.prod(input_size),
            caller=command.caller,
            timeout=command.timeout,
            rank=command.rank,
        )

    async def _prepare(
        self, model: ServedModel, command: Command, input_size: tuple[int, int]
    ) -> tuple[Prepared, float]:
        """The image as the model sees it, and the time from now until it was there."""
        started = perf_counter()
        prepared = await self._decoders.run(command.caller, _open_and_resize, model, command, input_size)
        return prepared, perf_counter() - started


def _trace(done: Done[Explanation], decode_seconds: float, ended: float) -> None:
    """The stages of a request that is done: one after the other, the last one ending now."""
    trunk, tail = done.answer.trunk_seconds, done.answer.tail_seconds
    stages = {"decode": decode_seconds, "queue": done.queue_seconds, "trunk": trunk, "tail": tail}
    started = ended - sum(stages.values())
    for name, seconds in stages.items():
        tracing.stage(name, started, seconds, batch_size=done.batch_size)
        started += seconds


def _open_and_resize(model: ServedModel, command: Command, input_size: tuple[int, int]) -> Prepared:
    return prepare(command.open_image(), model.loaded.data_config, resize=command.resize, input_size=input_size)


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
        raise UnavailableError("the server is going down", 1.0) from error


def times_larger(model: ServedModel, input_size: tuple[int, int]) -> float:
    """How many times more patches than the input that the operator chose the limits for, the model's own; at least 1."""
    grid, own = map(model.explainer.vit.grid, (input_size, model.loaded.data_config.input_size))
    return max(1.0, grid.h * grid.w / (own.h * own.w))


def resolve_method(model: ServedModel, method: Method, field: str) -> Method:
    """The method as the engine takes it, such as the model can serve.

    Args:
        model: The model.
        method: What the request says.
        field: Path of the message that says it, for the message.

    Raises:
        InvalidArgumentError: The model has no such head.
        FailedPreconditionError: The model can't serve the method.
    """
    field = f"{field}.{method.kind}"
    match method:
        case Attention(heads) if any(head >= model.heads for head in heads):
            message = f"model {model.loaded.name!r} has heads 0 to {model.heads - 1}, not {max(heads)}"
            raise InvalidArgumentError(f"{field}.heads", message)
        case PatchMaskPrediction():
            method = replace(method, activation=ACTIVATIONS[model.loaded.task])
    model.check_method(method, field)
    return method


def _output_count(model: ServedModel) -> int:
    """The number of outputs, of which there must be one at least."""
    name, count = model.loaded.name, model.loaded.output_count
    if not count:
        message = f"model {name!r} has no outputs: ask for a concept, or serve it with a head"
        raise FailedPreconditionError("NO_OUTPUTS", message, model=name)
    return count


def check_vector(
    model: ServedModel, vector: torch.Tensor | NDArray[np.float32], field: str, *, needs_direction: bool
) -> None:
    """Refuse a concept vector that is not one of the model's latent space.

    Args:
        model: The model.
        vector: Shape (D,), finite.
        field: Path of the field that has it, for the message.
        needs_direction: Whether it must not be zero, either.

    Raises:
        InvalidArgumentError: It has another length, or no direction.
    """
    length, size = len(vector), model.explainer.vit.latent_size
    if length != size:
        message = f"has length {length}; the latent of model {model.loaded.name!r} has {size}"
        raise InvalidArgumentError(field, message)
    if needs_direction and not vector.any():
        raise InvalidArgumentError(field, "is zero, which makes no angle with anything")


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
