"""What the scheduler computes, batch by batch: images to explain or to embed, samples to measure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from cdam_engine import Explanation, Method, Target
from cdam_engine.evaluation import Measured, Sample
from cdam_server.compute.facts import Bucket, EvaluationBucket, ModelFacts
from cdam_server.compute.models import Catalog, ImageQuery
from cdam_server.compute.scheduling import Answer, Computed, Pause


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


class ModelWork(Protocol[Answer]):
    """What is asked of a model, as a plain value: it may come from another process.

    Only the structure counts, as for `cdam_server.compute.scheduling.Work`.
    """

    @property
    def bucket(self) -> Hashable:
        """What the pieces of a batch have in common."""

    def run(self, catalog: Catalog, batch: Sequence[Self], pause: Pause) -> Sequence[Answer | Exception]:
        """Compute a batch, of which this is the first piece; see `Work.run`."""

    def record(
        self,
        catalog: Catalog,
        observer: BatchObserver,
        batch: Sequence[Self],
        answers: Sequence[Answer | Exception],
        computed: Computed,
    ) -> None:
        """Count a batch that `run` has answered; see `Work.record`."""


@dataclass(frozen=True, eq=False)
class ImageWork(ABC):
    """One image; those of a bucket share a batch, whatever is asked about each.

    Attributes:
        bucket: Its bucket.
        model: Name of its model.
        pixels: uint8, shape (H, W, C), at the model's input size.
    """

    bucket: Bucket
    model: str
    pixels: NDArray[np.uint8]

    @property
    @abstractmethod
    def query(self) -> ImageQuery:
        """What the engine is asked."""

    def run(self, catalog: Catalog, batch: Sequence[ImageWork], pause: Pause) -> list[Explanation | Exception]:
        """See `ModelWork`."""
        return catalog.compute(self.bucket, [work.query for work in batch], pause)

    def record(
        self,
        catalog: Catalog,
        observer: BatchObserver,
        batch: Sequence[ImageWork],
        answers: Sequence[Explanation | Exception],
        computed: Computed,
    ) -> None:
        """See `ModelWork`."""
        explained = next((answer for answer in answers if isinstance(answer, Explanation)), None)
        if explained is not None:  # each explanation knows the whole batch's times
            observer.observe_batch(
                self.bucket.model, len(batch), computed.fill, explained.trunk_seconds, explained.method_seconds
            )
        if catalog.cache is not None:
            for work, answer in zip(batch, answers, strict=True):
                if isinstance(answer, Explanation) and any(method.reads_tokens for method in work.query.methods):
                    observer.observe_cache(work.model, hit=answer.token_cache_hit)


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
    def query(self) -> ImageQuery:
        """See `ImageWork`."""
        return ImageQuery(self.pixels, self.targets, self.methods, self.model)


@dataclass(frozen=True, eq=False)
class EmbedWork(ImageWork):
    """An image whose latent is wanted, and nothing else."""

    @property
    def query(self) -> ImageQuery:
        """See `ImageWork`."""
        return ImageQuery(self.pixels, (), (), self.model)


@dataclass(frozen=True, eq=False)
class EvaluateWork:
    """A sample to measure.

    Attributes:
        bucket: Its bucket, whose evaluation is held while it is computed.
        sample: The sample.
    """

    bucket: EvaluationBucket
    sample: Sample

    def run(self, catalog: Catalog, batch: Sequence[EvaluateWork], pause: Pause) -> list[Measured | Exception]:
        """See `ModelWork`."""
        return catalog.evaluate(self.bucket, [work.sample for work in batch], pause)

    def record(
        self,
        catalog: Catalog,  # noqa: ARG002 - nothing of it is counted
        observer: BatchObserver,
        batch: Sequence[EvaluateWork],  # noqa: ARG002 - counted once, however many share it
        answers: Sequence[Measured | Exception],  # noqa: ARG002
        computed: Computed,
    ) -> None:
        """See `ModelWork`."""
        observer.observe_evaluation(self.bucket.model, computed.seconds)


def image_bucket(model: ModelFacts, input_size: tuple[int, int]) -> Bucket:
    """Where an image of a model goes: into one batch with those of the models that share its trunk."""
    return Bucket(model.batches_with, input_size)


@dataclass(frozen=True, eq=False)
class Bound(Generic[Answer]):
    """Work with the models that it is done by; what the scheduler of their process takes.

    Attributes:
        work: The work.
        catalog: The models.
        observer: Where batches are counted; None: nowhere.
    """

    work: ModelWork[Answer]
    catalog: Catalog
    observer: BatchObserver | None

    @property
    def bucket(self) -> Hashable:
        """See `Work`."""
        return self.work.bucket

    def run(self, batch: Sequence[Bound[Answer]], pause: Pause) -> Sequence[Answer | Exception]:
        """See `Work`."""
        return self.work.run(self.catalog, [bound.work for bound in batch], pause)

    def record(self, batch: Sequence[Bound[Answer]], answers: Sequence[Answer | Exception], computed: Computed) -> None:
        """See `Work`."""
        if self.observer is not None:
            self.work.record(self.catalog, self.observer, [bound.work for bound in batch], answers, computed)
