"""Evaluate: from a protocol and samples to numbers, one job of the scheduler a sample, and what they come to."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from time import perf_counter
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cdam.statistics import CORRELATED, Statistics, Table
from cdam_engine import Method, UnsupportedMethodError
from cdam_engine.evaluation import Evaluated, Geometry, Measured, Metric, ParameterError, Protocol, Sample
from cdam_engine.preprocess import Resize, prepare
from cdam_server.compute.facts import EvaluationBucket, ModelFacts
from cdam_server.compute.interface import Compute
from cdam_server.compute.scheduling import BACKGROUND, JobSpec, Pool
from cdam_server.compute.work import EvaluateWork
from cdam_server.errors import FailedPreconditionError, InvalidArgumentError, within
from cdam_server.operation.telemetry import Telemetry
from cdam_server.usecases.images import refusals
from cdam_server.usecases.resolve import Resolver, WantedScalar, resolve_method

# Samples that take no more passes share batches: alone they would not fill a forward pass of the evaluator.
_LIGHT_COST: Final = 32.0
_LEAST_WINDOW: Final = 4  # of samples in work: one for each batch that there may be, on most machines
_SHARE: Final = 4  # of the server's bound on pending work
_MAX_NUMBERS: Final = 1 << 21  # that the bootstrap keeps: 16 MiB, and a second for the table
_MAX_LEVELS: Final = 20_000  # of maps, where boxes are drawn: 7 s at 224 x 224
_LISTED: Final = 16  # perturbed images, of all methods, for each pass that is allowed
_MASK_THRESHOLD: Final = 128


@dataclass(frozen=True, eq=False)
class EvaluateCommand:
    """What is to be measured, as it is asked for.

    Attributes:
        model: Name of the model; empty for the default one.
        protocol: Methods, metrics and seed.
        resize: Which part of an image the model sees.
        input_size: (height, width) in pixels, or None for the model's own.
        resamples: Of the bootstrap; 0: no intervals.
        caller: Who asks.
    """

    model: str
    protocol: Protocol
    resize: Resize
    input_size: tuple[int, int] | None
    resamples: int
    caller: str


@dataclass(frozen=True, eq=False)
class SampleCommand:
    """A sample, decoded but for its images. Opening one is slow, so it is done outside the event loop.

    Attributes:
        id: Unique in the evaluation.
        open_image: Decodes the image, upright RGB.
        target: The right target.
        wrong_target: A wrong one, or None.
        open_mask: Decodes the mask of the target's object, grey, 0 outside and 255 inside; or None.
        open_counterfactual: Decodes the image without the object, upright RGB; or None.
        open_wrong_mask: Decodes the mask of the wrong target's object; or None.
    """

    id: str
    open_image: Callable[[], Image.Image]
    target: WantedScalar
    wrong_target: WantedScalar | None = None
    open_mask: Callable[[], Image.Image] | None = None
    open_counterfactual: Callable[[], Image.Image] | None = None
    open_wrong_mask: Callable[[], Image.Image] | None = None

    def only(self, required: Collection[str]) -> SampleCommand:
        """The same without the optional parts that nothing requires: what is wrong with them is nobody's concern."""
        optional = {
            "wrong_target": "wrong_target",
            "mask": "open_mask",
            "counterfactual": "open_counterfactual",
            "wrong_mask": "open_wrong_mask",
        }
        without: dict[str, Any] = {part: None for field, part in optional.items() if field not in required}
        return replace(self, **without)


@dataclass(frozen=True, eq=False)
class EvaluationTools:
    """What evaluations have in common.

    Attributes:
        resolver: Resolves what protocols and samples name.
        compute: What computes.
        decoders: Threads for decoding images.
        telemetry: Metrics.
    """

    resolver: Resolver
    compute: Compute
    decoders: Pool
    telemetry: Telemetry


class EvaluateUseCase:
    """Measures how true explanations are.

    Args:
        tools: What evaluations have in common.
        max_passes: Most passes through the whole model that a sample may take.
        max_pending_passes: The server's bound on pending work; an evaluation has samples for a quarter of it in work.
    """

    def __init__(self, tools: EvaluationTools, *, max_passes: int, max_pending_passes: int) -> None:
        self._tools = tools
        self._max_passes = max_passes
        self._max_pending_passes = max_pending_passes
        self._numbers = count()

    @asynccontextmanager
    async def begin(self, command: EvaluateCommand) -> AsyncIterator[Evaluation]:
        """Check all that does not depend on samples, and give the evaluation a place as long as the block runs.

        Raises:
            ServiceError: The protocol is wrong, or there are too many evaluations.
        """
        resolver = self._tools.resolver
        model = resolver.models.get(command.model)
        input_size = resolver.input_size(model, command.input_size)
        sizes = model.explained.sizes
        geometry = Geometry(input_size, sizes.patch_size, sizes.grid(input_size))
        protocol = _resolved(model, command.protocol, geometry)
        cost = protocol.cost(geometry)
        _check_levels(cost.levels)
        _check_resamples(protocol, cost.levels, command.resamples)
        self._check_images(cost.images)
        bucket = EvaluationBucket(model.name, input_size, protocol)
        async with AsyncExitStack() as stack:
            stack.enter_context(refusals())  # also while it is under way: its device may be lost
            with _unmeasurable(model):
                facts = await stack.enter_async_context(self._tools.compute.evaluation(bucket))
            passes = math.ceil(model.times_larger(input_size) * facts.passes)
            if passes > self._max_passes:
                message = (
                    f"take {passes} passes through the whole model a sample; at most {self._max_passes} are allowed"
                )
                raise InvalidArgumentError("metrics", message)
            await stack.enter_async_context(self._tools.compute.long_request("evaluations", command.caller))
            spec = JobSpec(
                bucket=bucket,
                cost=float(max(1, passes)),
                # Evaluations take turns among themselves, and with everyone else's images in the decoders.
                caller=f"evaluation {next(self._numbers)} of {command.caller}",
                rank=BACKGROUND,
                light_cost=_LIGHT_COST,
            )
            window = max(_LEAST_WINDOW, int(self._max_pending_passes / _SHARE / spec.cost))
            yield Evaluation(self._tools, model, command, bucket, spec, facts.required, window)

    def _check_images(self, images: int) -> None:
        """Refuse what would take long even to list; an image that several methods share is listed for each."""
        most = _LISTED * self._max_passes
        if images > most:
            message = f"are of {images} perturbed images a sample, those of each method counted; at most {most}"
            raise InvalidArgumentError("metrics", message)


class Evaluation:
    """An evaluation under way; from `EvaluateUseCase.begin`.

    Attributes:
        model: The model.
        protocol: What is measured, every choice made.
        resize: Which part of an image the model sees.
        input_size: (height, width) in pixels.
        resamples: Of the bootstrap; 0: no intervals.
        window: Most samples that should be in work at once.
        sample_bytes: Memory that a sample takes, but for its message.
    """

    def __init__(
        self,
        tools: EvaluationTools,
        model: ModelFacts,
        command: EvaluateCommand,
        bucket: EvaluationBucket,
        spec: JobSpec,
        required: frozenset[str],
        window: int,
    ) -> None:
        self.model = model
        self.protocol = bucket.protocol
        self.resize: Resize = command.resize
        self.input_size = bucket.input_size
        self.resamples = command.resamples
        self.window = window
        self.sample_bytes = (3 + 3 + 1 + 1) * math.prod(self.input_size)  # two images, two masks
        self._tools = tools
        self._bucket = bucket
        self._spec = spec
        self._required = required
        self._statistics = Statistics(
            len(self.protocol.methods), seed=self.protocol.seed, resamples=max(1, command.resamples)
        )
        self._adding = asyncio.Lock()

    async def measure(self, sample_command: SampleCommand) -> Measured:
        """Prepare, queue, measure, and count into the table.

        Raises:
            ServiceError: The sample is wrong, or can't be measured now.
        """
        sample_command, resolver = sample_command.only(self._required), self._tools.resolver
        with within("target"):
            target = await resolver.scalar(self.model, sample_command.target)
        wrong_target = None
        if sample_command.wrong_target is not None:
            with within("wrong_target"):
                wrong_target = await resolver.scalar(self.model, sample_command.wrong_target)
        with refusals():
            async with self._tools.compute.admit(self._spec) as ticket:
                pixels = await self._prepare(sample_command)
                sample = Sample(
                    id=sample_command.id,
                    image=pixels.image,
                    target=target,
                    wrong_target=wrong_target,
                    mask=pixels.mask,
                    counterfactual=pixels.counterfactual,
                    wrong_mask=pixels.wrong_mask,
                )
                measured = (await ticket.submit(EvaluateWork(self._bucket, sample))).answer
        values = [(v.method_index, v.metric_index, v.quantity, v.value, v.curve) for v in measured.values]
        async with self._adding:  # which takes milliseconds, of many quantities and resamples
            await asyncio.to_thread(self._statistics.add, sample_command.id, values)
        return measured

    def failed(self) -> None:
        """A sample could not be measured."""
        self._statistics.failed()

    async def table(self) -> Table:
        """What all samples so far come to."""
        table = await asyncio.to_thread(self._statistics.table)
        return table if self.resamples else _without_intervals(table)

    async def _prepare(self, sample_command: SampleCommand) -> _Pixels:
        started = perf_counter()
        pixels = await self._tools.decoders.run(
            self._spec.caller, _open_and_resize, self.model, sample_command, self.resize, self.input_size
        )
        self._tools.telemetry.compute.labels("decode", "", self.model.name).observe(perf_counter() - started)
        return pixels


# --- the protocol


def _resolved(model: ModelFacts, protocol: Protocol, geometry: Geometry) -> Protocol:
    """The protocol with what the model and its input decide, its methods such as the model can serve."""
    methods: list[Evaluated] = []
    for position, method in enumerate(protocol.methods):
        with within(f"methods[{position}]"):
            methods.append(resolve_method(model, method) if isinstance(method, Method) else method)
    metrics = tuple(
        _resolved_metric(model, metric, geometry, f"metrics[{i}].{metric.kind}")
        for i, metric in enumerate(protocol.metrics)
    )
    return replace(protocol, methods=tuple(methods), metrics=metrics)


def _resolved_metric(model: ModelFacts, metric: Metric, geometry: Geometry, field: str) -> Metric:
    try:
        return metric.resolved(geometry, model.activation)
    except ParameterError as error:
        raise InvalidArgumentError(f"{field}.{error.field}", error.reason) from error


def _check_levels(levels: int) -> None:
    """Refuse boxes that take long to draw: they take no pass, which would bound them."""
    if levels > _MAX_LEVELS:
        message = f"draw boxes at {levels} levels a sample, those of each method counted; at most {_MAX_LEVELS}"
        raise InvalidArgumentError("metrics", message)


def _check_resamples(protocol: Protocol, levels: int, resamples: int) -> None:
    """Refuse a bootstrap that takes too much memory, or a table that takes too long."""
    rows = levels + len(protocol.methods) * sum(
        len(metric.quantities) + 3 * (set(CORRELATED) <= set(metric.quantities)) for metric in protocol.metrics
    )
    if rows * resamples > _MAX_NUMBERS:
        message = f"{resamples} of {rows} rows; at most {_MAX_NUMBERS // rows} are allowed"
        raise InvalidArgumentError("resamples", message)


@contextmanager
def _unmeasurable(model: ModelFacts) -> Iterator[None]:
    """What can't be measured of a model, in the service's words."""
    try:
        yield
    except UnsupportedMethodError as error:
        message = f"model {model.name!r} can't serve one: {error}"
        raise FailedPreconditionError(error.reason, message, field="methods", model=model.name) from error
    except ValueError as error:
        raise InvalidArgumentError("metrics", str(error)) from error


def _without_intervals(table: Table) -> Table:
    rows = tuple(replace(row, interval_low=None, interval_high=None) for row in table.rows)
    comparisons = tuple(replace(item, interval_low=None, interval_high=None) for item in table.comparisons)
    return replace(table, rows=rows, comparisons=comparisons)


# --- a sample


@dataclass(frozen=True, eq=False)
class _Pixels:
    """A sample at the model's input size (H, W): images uint8 (H, W, 3), masks bool (H, W)."""

    image: NDArray[np.uint8]
    mask: NDArray[np.bool_] | None
    counterfactual: NDArray[np.uint8] | None
    wrong_mask: NDArray[np.bool_] | None


def _open_and_resize(
    model: ModelFacts, sample_command: SampleCommand, resize: Resize, input_size: tuple[int, int]
) -> _Pixels:
    """Decode a sample's images one after the other, since each may be large."""
    image = sample_command.open_image()
    opened = _Opened(model, resize, input_size, image.size)
    return _Pixels(
        image=opened.at_input_size(image),
        mask=opened.mask(sample_command.open_mask, "mask"),
        counterfactual=opened.image(sample_command.open_counterfactual, "counterfactual"),
        wrong_mask=opened.mask(sample_command.open_wrong_mask, "wrong_mask"),
    )


@dataclass(frozen=True)
class _Opened:
    """What goes with an image of (width, height) pixels, brought to the model's input in the same way."""

    model: ModelFacts
    resize: Resize
    input_size: tuple[int, int]
    size: tuple[int, int]

    def at_input_size(self, image: Image.Image) -> NDArray[np.uint8]:
        return prepare(image, self.model.data_config, resize=self.resize, input_size=self.input_size).pixels

    def image(self, open_image: Callable[[], Image.Image] | None, field: str) -> NDArray[np.uint8] | None:
        return None if open_image is None else self.at_input_size(self._checked(open_image(), field))

    def mask(self, open_mask: Callable[[], Image.Image] | None, field: str) -> NDArray[np.bool_] | None:
        if open_mask is None:
            return None
        grey = self._checked(open_mask(), field)
        # Where it is padded there is nothing of it.
        config = replace(self.model.data_config, interpolation="bilinear", mean=(0.0, 0.0, 0.0))
        prepared = prepare(grey.convert("RGB"), config, resize=self.resize, input_size=self.input_size)
        inside = prepared.pixels[..., 0] >= _MASK_THRESHOLD
        if not inside.any():
            raise InvalidArgumentError(field, "nothing of it is left at the model's input size")
        return np.asarray(inside)

    def _checked(self, image: Image.Image, field: str) -> Image.Image:
        if image.size != self.size:
            found, wanted = (f"{height} x {width}" for width, height in (image.size, self.size))
            raise InvalidArgumentError(field, f"is {found} (height x width), but the image is {wanted}")
        return image
