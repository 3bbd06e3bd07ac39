"""The models that a server has loaded, and how one batch of one of them is computed."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from cdam_engine import (
    METHODS,
    Asked,
    Explainer,
    Explanation,
    Method,
    Refusal,
    Target,
    TokenCache,
    UnsupportedArchitectureError,
    UnsupportedMethodError,
    explain_together,
    interruptible,
)
from cdam_engine.evaluation import Evaluator, Measured, Sample, SampleError
from cdam_server.compute.facts import Bucket, EvaluationBucket, EvaluationFacts, ModelFacts, Models, NonFiniteError
from cdam_server.compute.loading import LoadedModel
from cdam_server.compute.scheduling import DeviceLostError, Pause, TooLargeError
from cdam_server.errors import FailedPreconditionError, InvalidArgumentError


@dataclass(frozen=True, eq=False)
class ImageQuery:
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

    @cached_property
    def facts(self) -> ModelFacts:
        """What requests are checked against."""
        loaded, error = self.loaded, self.unsupported
        if error is None:
            explained = self.explainer.facts
            refusals = {kind: refusal for (kind, variant), refusal in explained.refusals.items() if not variant}
        else:
            explained, refusals = None, dict.fromkeys(METHODS, Refusal(error.reason, str(error)))
        return ModelFacts(
            name=loaded.name,
            architecture=loaded.architecture,
            fingerprint=loaded.fingerprint,
            task=loaded.task,
            output_names=loaded.output_names,
            output_count=loaded.output_count,
            data_config=loaded.data_config,
            explainer=explained,
            refusals=refusals,
            batches_with=(self.trunk_of or self).loaded.name,
            resampled=loaded.resampled,
            model_kwargs=loaded.model_kwargs,
        )

    def compute(
        self, jobs: Sequence[ImageQuery], pause: Callable[[], None], models: Sequence[ServedModel] | None = None
    ) -> list[Explanation | Exception]:
        """Explain a batch of images of one size; blocks until the device is done.

        Args:
            jobs: The images, and what is asked about them.
            pause: Called wherever the work may pause.
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
            with interruptible(pause):
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
        self, evaluator: Evaluator, samples: Sequence[Sample], pause: Callable[[], None]
    ) -> list[Measured | Exception]:
        """Measure samples of one evaluation; blocks until the device is done.

        Args:
            evaluator: Of this model.
            samples: What is measured on.
            pause: Called wherever the work may pause.

        Raises:
            TooLargeError: A sample does not fit into the device's memory.
            DeviceLostError: The device computes no more.
            FailedPreconditionError: A method is not defined for inputs of this size.
        """
        with self._engine_errors(), interruptible(pause):
            answers = evaluator.evaluate(samples)
        return [
            InvalidArgumentError(answer.field, answer.reason) if isinstance(answer, SampleError) else answer
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


class Catalog:
    """All models of a server, to compute with; the first is the default.

    Args:
        models: At least one.
        cache: The token cache that they share, or None.
    """

    def __init__(self, models: Sequence[ServedModel], cache: TokenCache | None = None) -> None:
        self._models = {model.loaded.name: model for model in models}
        self.cache = cache
        self._cores = _Cores(torch.get_num_threads())
        self._evaluations: dict[EvaluationBucket, SharedEvaluator] = {}

    def __iter__(self) -> Iterator[ServedModel]:
        """The models, in the order of the settings."""
        return iter(self._models.values())

    def get(self, name: str) -> ServedModel:
        """The model of this name, which there must be."""
        return self._models[name]

    @property
    def facts(self) -> Models:
        """What requests are checked against."""
        return Models([served.facts for served in self])

    def compute(self, bucket: Bucket, jobs: Sequence[ImageQuery], pause: Pause) -> list[Explanation | Exception]:
        """Explain one batch; called in a worker's thread."""
        models = [self.get(job.model or bucket.model) for job in jobs]
        return self.get(bucket.model).compute(jobs, self._sharing(pause), models)

    @contextmanager
    def evaluation(self, bucket: EvaluationBucket) -> Iterator[SharedEvaluator]:
        """What measures the samples of a bucket, held as long as the block runs; equal buckets share it."""
        held = self._evaluations.setdefault(bucket, SharedEvaluator(self.get(bucket.model), bucket))
        held.count += 1
        try:
            yield held
        finally:
            held.count -= 1
            if not held.count:
                del self._evaluations[bucket]

    def evaluate(self, bucket: EvaluationBucket, samples: Sequence[Sample], pause: Pause) -> list[Measured | Exception]:
        """Measure one batch of samples, of an evaluation that is held; called in a worker's thread."""
        evaluator = self._evaluations[bucket].evaluator()
        return self.get(bucket.model).evaluate(evaluator, samples, self._sharing(pause))

    def _sharing(self, pause: Pause) -> Callable[[], None]:
        """Rest, and go on with the thread's share of the cores; called once now."""

        def rest_and_share() -> None:
            self._cores.share(pause())

        rest_and_share()
        return rest_and_share


class SharedEvaluator:
    """What measures the samples of a bucket, made when it is first asked for.

    Args:
        served: The model.
        bucket: The bucket.

    Attributes:
        count: How many evaluations hold it.
    """

    def __init__(self, served: ServedModel, bucket: EvaluationBucket) -> None:
        self.count = 0
        self._served = served
        self._bucket = bucket
        self._lock = threading.Lock()
        self._evaluator: Evaluator | None = None

    def evaluator(self) -> Evaluator:
        """What measures them; slow when it is made.

        Raises:
            UnsupportedMethodError: The model can't serve a method.
            ValueError: A metric can't be had.
        """
        with self._lock:
            if self._evaluator is None:
                its = self._bucket
                self._evaluator = Evaluator(self._served.explainer, its.protocol, input_size=its.input_size)
            return self._evaluator

    def facts(self) -> EvaluationFacts:
        """What is known before the first sample; raises what `evaluator` raises."""
        evaluator = self.evaluator()
        return EvaluationFacts(evaluator.passes(), evaluator.required)


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


def _asked(model: ServedModel, jobs: Sequence[ImageQuery]) -> Asked:
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
