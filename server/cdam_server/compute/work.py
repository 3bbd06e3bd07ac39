"""What the scheduler computes, batch by batch: images to explain or to embed, samples to measure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cdam_engine import Explanation, Method, Target
from cdam_engine.evaluation import Measured, Sample
from cdam_server.compute.facts import Bucket, EvaluationBucket, EvaluationFacts, ModelFacts
from cdam_server.compute.models import Catalog, ImageQuery
from cdam_server.compute.scheduling import Computed, Pause


class BatchObserver(Protocol):
    """Where batches are counted."""

    def observe_batch(
        self, model: str, size: int, fill: float, trunk_seconds: float, method_seconds: Mapping[str, float]
    ) -> None:
        """A batch of images; seconds in the trunk, and in the tail by method."""

    def observe_cache(self, model: str, *, hit: bool) -> None:
        """An image that was looked for in the token cache."""

    def observe_evaluation(self, model: str, seconds: float) -> None:
        """A batch of samples."""


@dataclass(frozen=True, eq=False)
class ImageWork(ABC):
    """One image; those of a bucket share a batch, whatever is asked about each.

    Attributes:
        bucket: Its bucket.
        catalog: Where it is computed.
        observer: Where batches are counted; None: nowhere.
        model: Name of its model.
        pixels: uint8, shape (H, W, C), at the model's input size.
    """

    bucket: Bucket
    catalog: Catalog
    observer: BatchObserver | None
    model: str
    pixels: NDArray[np.uint8]

    @property
    @abstractmethod
    def job(self) -> ImageQuery:
        """What the engine is asked."""

    def run(self, batch: Sequence[ImageWork], pause: Pause) -> list[Explanation | Exception]:
        return self.catalog.compute(self.bucket, [work.job for work in batch], pause)

    def record(
        self, batch: Sequence[ImageWork], answers: Sequence[Explanation | Exception], computed: Computed
    ) -> None:
        if self.observer is None:
            return
        explained = next((answer for answer in answers if isinstance(answer, Explanation)), None)
        if explained is not None:  # each explanation knows the whole batch's times
            self.observer.observe_batch(
                self.bucket.model, len(batch), computed.fill, explained.trunk_seconds, explained.method_seconds
            )
        if self.catalog.cache is not None:
            for work, answer in zip(batch, answers, strict=True):
                if isinstance(answer, Explanation) and any(method.reads_tokens for method in work.job.methods):
                    self.observer.observe_cache(work.model, hit=answer.token_cache_hit)


@dataclass(frozen=True, eq=False)
class ExplainWork(ImageWork):
    """An image to explain.

    Attributes:
        targets: What to explain.
        methods: How; every method is applied to every target.
    """

    targets: tuple[Target, ...]
    methods: tuple[Method, ...]

    @property
    def job(self) -> ImageQuery:
        return ImageQuery(self.pixels, self.targets, self.methods, self.model)


@dataclass(frozen=True, eq=False)
class EmbedWork(ImageWork):
    """An image whose latent is wanted, and nothing else."""

    @property
    def job(self) -> ImageQuery:
        return ImageQuery(self.pixels, (), (), self.model)


@dataclass(frozen=True, eq=False)
class EvaluateWork:
    """A sample to measure.

    Attributes:
        bucket: Its bucket, whose evaluation is held while it is computed.
        catalog: Where it is computed.
        observer: Where batches are counted; None: nowhere.
        sample: The sample.
    """

    bucket: EvaluationBucket
    catalog: Catalog
    observer: BatchObserver | None
    sample: Sample

    def run(self, batch: Sequence[EvaluateWork], pause: Pause) -> list[Measured | Exception]:
        """See `cdam_server.compute.scheduling.Work`."""
        return self.catalog.evaluate(self.bucket, [work.sample for work in batch], pause)

    def record(
        self,
        batch: Sequence[EvaluateWork],  # noqa: ARG002 - booked once, however many share it
        answers: Sequence[Measured | Exception],  # noqa: ARG002
        computed: Computed,
    ) -> None:
        """See `cdam_server.compute.scheduling.Work`."""
        if self.observer is not None:
            self.observer.observe_evaluation(self.bucket.model, computed.seconds)


class Works:
    """Makes work of the models of this process.

    Args:
        catalog: The models.
        observer: Where batches are counted; None: nowhere.
    """

    def __init__(self, catalog: Catalog, observer: BatchObserver | None) -> None:
        self._catalog = catalog
        self._observer = observer

    @staticmethod
    def bucket(model: ModelFacts, input_size: tuple[int, int]) -> Bucket:
        """Where an image of a model goes: into one batch with those of the models that share its trunk."""
        return Bucket(model.batches_with, input_size)

    def explain(
        self, model: ModelFacts, pixels: NDArray[np.uint8], targets: tuple[Target, ...], methods: tuple[Method, ...]
    ) -> ExplainWork:
        """An image to explain; pixels are uint8 (H, W, C), at the input size."""
        height, width, _ = pixels.shape
        bucket = self.bucket(model, (height, width))
        return ExplainWork(bucket, self._catalog, self._observer, model.name, pixels, targets, methods)

    def embed(self, model: ModelFacts, pixels: NDArray[np.uint8]) -> EmbedWork:
        """An image to embed, likewise."""
        height, width, _ = pixels.shape
        return EmbedWork(self.bucket(model, (height, width)), self._catalog, self._observer, model.name, pixels)

    @contextmanager
    def evaluation(self, bucket: EvaluationBucket) -> Iterator[Callable[[], EvaluationFacts]]:
        """Hold what measures the samples of a bucket as long as the block runs; yields what tells of it, slowly."""
        with self._catalog.evaluation(bucket) as held:
            yield held.facts

    def evaluate(self, bucket: EvaluationBucket, sample: Sample) -> EvaluateWork:
        """A sample to measure, of an evaluation that is held."""
        return EvaluateWork(bucket, self._catalog, self._observer, sample)
