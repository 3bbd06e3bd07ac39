"""The models that a server has loaded, and how one batch of one of them is computed."""

from __future__ import annotations

import difflib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from cdam_engine import (
    METHODS,
    Asked,
    Explainer,
    Explanation,
    Method,
    Target,
    TokenCache,
    UnsupportedArchitectureError,
    UnsupportedMethodError,
    explain_together,
    interruptible,
)
from cdam_engine.evaluation import Evaluator, Measured, Protocol, Sample, SampleError
from cdam_server.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from cdam_server.loading import LoadedModel
from cdam_server.scheduling import DeviceLostError, Rest, TooLargeError


@dataclass(frozen=True, eq=False)
class Job:
    """One image, and what is to be explained about it.

    Attributes:
        pixels: uint8, shape (H, W, C), at the model's input size.
        targets: What to explain.
        methods: How; every method is applied to every target.
        model: Name of the model; empty: the one that its batch is named after.
    """

    pixels: NDArray[np.uint8]
    targets: tuple[Target, ...]
    methods: tuple[Method, ...]
    model: str = ""


@dataclass(frozen=True)
class Bucket:
    """What the images of a batch have in common.

    Attributes:
        model: Name of the first of the models that share their trunk.
        input_size: (height, width) in pixels.
    """

    model: str
    input_size: tuple[int, int]


@dataclass(frozen=True)
class EvaluationBucket:
    """What the samples of a batch have in common.

    Attributes:
        model: Name of the model.
        input_size: (height, width) in pixels.
        protocol: What is measured.
        evaluator: Measures it; those of equal buckets are interchangeable.
    """

    model: str
    input_size: tuple[int, int]
    protocol: Protocol
    evaluator: Evaluator = field(compare=False, repr=False)


@dataclass(frozen=True)
class Refusal:
    """Why a model can't serve a method.

    Attributes:
        reason: UPPER_SNAKE_CASE, stable, for programs.
        message: For people.
    """

    reason: str
    message: str


class ServedModel:
    """A loaded model with its explainer.

    Args:
        loaded: The model and what is known about it.
        precision: Arithmetic of the trunk: ``fp32``, ``bf16``, or ``auto`` for what is fast on the device.
        compiled_batch_sizes: Compile the model for batches of these sizes; empty: run it as it is.
        cache: Where what the trunk made of recent images is kept; several models may share it.
        trunk_of: A model of the same trunk, which is used for this one, too.

    Attributes:
        loaded: The model and what is known about it.
        unsupported: Why CDAM can't be had from it, or None.
        refusals: The methods that it can't serve, by their names.
        compiled_batch_sizes: As given.
        trunk_of: As given.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        precision: str = "fp32",
        compiled_batch_sizes: Sequence[int] = (),
        cache: TokenCache | None = None,
        trunk_of: ServedModel | None = None,
    ) -> None:
        self.loaded = loaded
        self.compiled_batch_sizes = tuple(compiled_batch_sizes)
        self.unsupported: UnsupportedArchitectureError | None = None
        self._explainer: Explainer | None = None
        self.trunk_of = trunk_of
        try:
            self._explainer = self._explain_by(precision, cache)
        except UnsupportedArchitectureError as error:
            self.unsupported = error
        self.refusals: Mapping[str, Refusal] = MappingProxyType(dict(self._ask()))

    def _explain_by(self, precision: str, cache: TokenCache | None) -> Explainer:
        loaded = self.loaded
        if self.trunk_of is not None:
            return self.trunk_of.explainer.share_trunk(loaded.module)
        return Explainer(
            loaded.module,
            precision=precision,
            compile=bool(self.compiled_batch_sizes),
            compile_batch_sizes=self.compiled_batch_sizes or (1,),
            cache=cache,
            data_config=loaded.data_config,
            fingerprint=loaded.trunk_fingerprint,
        )

    @property
    def explainer(self) -> Explainer:
        """The explainer.

        Raises:
            FailedPreconditionError: CDAM is not defined for the architecture.
        """
        if self._explainer is None:
            assert self.unsupported is not None
            raise FailedPreconditionError(
                self.unsupported.reason, f"model {self.loaded.name!r}: {self.unsupported}", model=self.loaded.name
            )
        return self._explainer

    @property
    def heads(self) -> int:
        """Number of attention heads of the last block."""
        return int(self.explainer.vit.num_heads)

    def check_method(self, method: Method, field: str) -> None:
        """Refuse a method that the model can't serve with these parameters.

        Args:
            method: The method.
            field: Path of the field that asks for it, for the message.

        Raises:
            FailedPreconditionError: With the engine's reason.
        """
        try:
            self.explainer.check(method)
        except UnsupportedMethodError as error:
            name = self.loaded.name
            message = f"{field}: model {name!r} can't serve it: {error}"
            raise FailedPreconditionError(error.reason, message, model=name, method=method.kind) from error

    def output_index(self, name: str, field: str) -> int:
        """The index of the output with this name.

        Raises:
            NotFoundError: There is none.
            InvalidArgumentError: Several outputs share the name.
        """
        matches = [index for index, known in enumerate(self.loaded.output_names) if known == name]
        if not self.loaded.output_names:
            last = self.loaded.output_count - 1
            message = f"{field}: the outputs of model {self.loaded.name!r} have no names; ask by index, 0 to {last}"
            raise NotFoundError("output", name, message)
        if not matches:
            similar = difflib.get_close_matches(name, self.loaded.output_names, n=3, cutoff=0.5)
            similar += [known for known in self.loaded.output_names if name and name in known and known not in similar][
                :3
            ]
            hint = f"; is it {' or '.join(map(repr, similar))}?" if similar else ""
            raise NotFoundError(
                "output", name, f"{field}: model {self.loaded.name!r} has no output named {name!r}{hint}"
            )
        if len(matches) > 1:
            raise InvalidArgumentError(field, f"outputs {matches} are all named {name!r}; say which by index")
        return matches[0]

    def compute(
        self, jobs: Sequence[Job], rest: Callable[[], None], models: Sequence[ServedModel] | None = None
    ) -> list[Explanation | Exception]:
        """Explain a batch of images of one size; blocks until the device is done.

        Args:
            jobs: The images, and what is asked about them.
            rest: Called wherever the work may rest.
            models: Who explains each, of those that share this one's trunk; None: this one, all of them.

        Raises:
            TooLargeError: The batch does not fit into the device's memory.
            DeviceLostError: The device computes no more.
            FailedPreconditionError: A method is not defined for inputs of this size.
        """
        with self._engine_errors():
            places: dict[ServedModel, list[int]] = {}
            for place, model in enumerate(models or [self] * len(jobs)):
                places.setdefault(model, []).append(place)
            with interruptible(rest):
                if len(places) == 1:
                    (model,) = places
                    its = _asked(model, jobs)
                    return list(map(_checked, model.explainer.explain(its.images, its.targets, its.methods)))
                several = explain_together(
                    [_asked(model, [jobs[place] for place in its]) for model, its in places.items()]
                )
        answers = dict(zip(itertools.chain(*places.values()), itertools.chain(*several), strict=True))
        return [_checked(answers[place]) for place in range(len(jobs))]

    def evaluate(
        self, evaluator: Evaluator, samples: Sequence[Sample], rest: Callable[[], None]
    ) -> list[Measured | Exception]:
        """Measure samples of one evaluation; blocks until the device is done.

        Args:
            evaluator: Of this model.
            samples: What is measured on.
            rest: Called wherever the work may rest.

        Raises:
            TooLargeError: A sample does not fit into the device's memory.
            DeviceLostError: The device computes no more.
            FailedPreconditionError: A method is not defined for inputs of this size.
        """
        with self._engine_errors(), interruptible(rest):
            answers = evaluator.evaluate(samples)
        return [
            InvalidArgumentError(f"sample.{answer.field}", answer.reason) if isinstance(answer, SampleError) else answer
            for answer in answers
        ]

    @contextmanager
    def _engine_errors(self) -> Iterator[None]:
        """What the engine raises, in the scheduler's words."""
        try:
            yield
        except UnsupportedMethodError as error:
            raise FailedPreconditionError(error.reason, str(error), model=self.loaded.name) from error
        except (RuntimeError, MemoryError) as error:
            # On a CPU torch has no class of its own for it.
            if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error):
                self._free()
                raise TooLargeError(str(error)) from error
            self._check_device(error)
            raise

    def _free(self) -> None:
        """Give back what memory can be had."""
        if self.explainer.cache is not None:
            self.explainer.cache.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _check_device(self, error: RuntimeError) -> None:
        """An error of a kernel stays with a CUDA context for good; ask whether it computes at all.

        Raises:
            DeviceLostError: It does not.
        """
        device = next(self.loaded.module.parameters()).device
        if device.type == "cpu":
            return
        try:
            torch.ones(1, device=device).sum().item()
        except RuntimeError as lost:
            raise DeviceLostError(str(error)) from lost

    def _ask(self) -> Iterator[tuple[str, Refusal]]:
        """Every method that the engine refuses for this model."""
        for kind, method in METHODS.items():
            if self._explainer is None:
                assert self.unsupported is not None
                yield kind, Refusal(self.unsupported.reason, str(self.unsupported))
                continue
            try:
                self._explainer.check(method())
            except UnsupportedMethodError as error:
                yield kind, Refusal(error.reason, str(error))


class Catalog:
    """All models of a server by name; the first is the default.

    Args:
        models: At least one.
        cache: The token cache that they share, or None.
    """

    def __init__(self, models: Sequence[ServedModel], cache: TokenCache | None = None) -> None:
        self._models = {model.loaded.name: model for model in models}
        self.default = models[0]
        self.cache = cache
        self._cores = _Cores(torch.get_num_threads())

    def __iter__(self) -> Iterator[ServedModel]:
        """The models, default first, then by name."""
        rest = (model for model in self._models.values() if model is not self.default)
        return iter([self.default, *sorted(rest, key=lambda model: model.loaded.name)])

    def get(self, name: str) -> ServedModel:
        """The model of this name; the default model for an empty name.

        Raises:
            NotFoundError: There is none.
        """
        if not name:
            return self.default
        if name not in self._models:
            raise NotFoundError("model", name, f"there is no model {name!r}; the server has {', '.join(self._models)}")
        return self._models[name]

    def bucket(self, model: ServedModel, input_size: tuple[int, int]) -> Bucket:
        """Where an image of a model goes: into one batch with those of the models that share its trunk."""
        return Bucket((model.trunk_of or model).loaded.name, input_size)

    def compute(self, bucket: Bucket, jobs: Sequence[Job], rest: Rest) -> list[Explanation | Exception]:
        """Explain one batch; called in a worker's thread."""
        lead = self.get(bucket.model)
        return lead.compute(jobs, self._sharing(rest), [self.get(job.model or bucket.model) for job in jobs])

    def evaluate(self, bucket: EvaluationBucket, samples: Sequence[Sample], rest: Rest) -> list[Measured | Exception]:
        """Measure one batch of samples; called in a worker's thread."""
        return self.get(bucket.model).evaluate(bucket.evaluator, samples, self._sharing(rest))

    def _sharing(self, rest: Rest) -> Callable[[], None]:
        """Rest, and go on with the thread's share of the cores; called once now."""

        def rest_and_share() -> None:
            self._cores.share(rest())

        rest_and_share()
        return rest_and_share


class _Cores:
    """The CPU's cores, divided among the batches in work: several batches with few threads each take less time than one after the
    other with many.

    Args:
        threads: As many as all may have together.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._own = threading.local()
        self._last = threads

    def share(self, batches: int) -> None:
        """Give the calling thread its share."""
        threads = max(1, self._threads // batches)
        # OpenMP keeps the number by thread, MKL for all of them.
        if threads != self._last or threads != getattr(self._own, "threads", None):
            torch.set_num_threads(threads)
            self._last = self._own.threads = threads


def _asked(model: ServedModel, jobs: Sequence[Job]) -> Asked:
    pixels = torch.from_numpy(np.stack([job.pixels for job in jobs]))
    return Asked(model.explainer, pixels, [job.targets for job in jobs], [job.methods for job in jobs])


def _checked(explanation: Explanation) -> Explanation | Exception:
    """What is not finite is no answer."""
    values = [target.value for target in explanation.targets]
    arrays = [explanation.latent, explanation.logits]
    for item in explanation.maps:
        arrays += [
            array for array in (item.scores, item.value_part, item.key_part, item.standard_error) if array is not None
        ]
        if item.completeness_residual is not None:
            values.append(item.completeness_residual)
    if all(np.isfinite(array).all() for array in arrays) and np.isfinite(values).all():
        return explanation
    return NonFiniteError("the model's latent, outputs or gradients for this image are not finite")


class NonFiniteError(ArithmeticError):
    """The model answered with NaN or infinity; the caller is told of an internal error, since it can't do better."""
