"""What the trunk makes of a dataset's images: kept on disk, or computed anew for every epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdam_engine.preprocess import DataConfig, normalise
from cdam_training.kept import CHUNK, Kept
from cdam_training.tail import Tail
from cdam_training.views import PLAIN, Augmentation, View, load_batches

Rows = NDArray[np.int64]
Tell = Callable[[int, int], None]
"""Called with how many of how many images are done."""


@dataclass(frozen=True)
class Sources:
    """Where images are, and how they are made into inputs.

    Attributes:
        images: The files.
        config: How the model wants its images.
        augmentation: How training images are varied.
        views: Of each training image, how many are kept; the first is the image as it is served.
        seed: Of what is drawn anew in every epoch.
        workers: Processes that read ahead.
        device: Where the model is.
    """

    images: Sequence[Path]
    config: DataConfig
    augmentation: Augmentation = field(default_factory=Augmentation)
    views: int = 1
    seed: int = 0
    workers: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def view(self, image: int, number: int, *seed: int) -> View:
        """A view of an image, by its index; kept views have no seed, so that trainings can share them."""
        return View(self.images[image], number, (*seed, image))

    def entering(self, tail: Tail, batches: Sequence[Sequence[View]]) -> Iterator[Tensor]:
        """What the trunk makes of each batch of views, on the device."""
        for pixels in load_batches(batches, self.config, self.augmentation, workers=self.workers):
            yield tail.entering(normalise(pixels.to(self.device), self.config))


class TrainingRows(Protocol):
    """What enters the tail of training images, by their places among these."""

    def __call__(self, rows: Rows, epoch: int) -> Tensor:
        """Shape (len(rows), ...), on the device."""
        ...


class KeptOutputs:
    """What the trunk makes of every image as it is served, and of further views of training images, on disk.

    Args:
        tail: Of the model.
        sources: The images.
        train: Indices of the training images; those of which further views are kept.
        plain: Indices of the images that are kept as they are served.
        folder: Where.
        key: What decides the numbers besides the sources' settings: model and images.
        limit: Bytes that may be used.
        dtype: Of the numbers on disk.

    Raises:
        LoadError: See `Kept`.
    """

    def __init__(
        self,
        tail: Tail,
        sources: Sources,
        *,
        train: Rows,
        plain: Rows,
        folder: Path,
        key: Mapping[str, Any],
        limit: int,
        dtype: str = "float32",
    ) -> None:
        self._tail = tail
        self._sources = sources
        self._train = train
        plain = np.sort(plain)  # whatever the split: trainings with another one find the same rows
        self._place = {int(image): row for row, image in enumerate(plain)}
        more = [(int(image), number) for image in train for number in range(1, sources.views)]
        self._views = [sources.view(int(image), PLAIN) for image in plain] + [sources.view(*each) for each in more]
        self._first_more = len(plain)
        of_views = {"augmentation": asdict(sources.augmentation), "train": digest_of(train)}
        which = {"plain": digest_of(plain), **(of_views if more else {})}
        whole = {**key, **which, "blocks": tail.blocks, "views": sources.views, "config": asdict(sources.config)}
        self._kept = Kept(folder, whole, tail.entering_shape, len(self._views), limit=limit, dtype=dtype)

    def fill(self, tell: Tell) -> None:
        """Compute what is missing."""
        chunks = list(self._kept.missing())
        computed = self._sources.entering(self._tail, [[self._views[row] for row in rows] for rows in chunks])
        done = len(self._views) - sum(map(len, chunks))
        tell(done, len(self._views))
        for rows in self._kept.fill(lambda _: next(computed)):
            done += len(rows)
            tell(done, len(self._views))

    def plain(self, images: Rows) -> Tensor:
        """Of images as they are served, by their indices, on the device."""
        rows = np.array([self._place[int(image)] for image in images], dtype=np.int64)
        return self._kept.take(rows).to(self._sources.device)

    def in_parts(self, images: Rows, size: int = 4 * CHUNK) -> Iterator[tuple[slice, Tensor]]:
        """The same, some at a time, with their places among `images`."""
        for start in range(0, len(images), size):
            part = slice(start, min(start + size, len(images)))
            yield part, self.plain(images[part])

    def all_views(self) -> tuple[Tensor, Rows]:
        """Every view of the training images, and which of these each is of."""
        numbers = np.arange(len(self._train))
        more = self._kept.take(np.arange(self._first_more, len(self._views)))
        kept = torch.cat((self.plain(self._train), more.to(self._sources.device)))
        return kept, np.concatenate((numbers, np.repeat(numbers, self._sources.views - 1)))

    def drawn(self, rows: Rows, epoch: int) -> Rows:
        """Which view of each training image is taken in an epoch."""
        rng = np.random.default_rng((self._sources.seed, epoch))
        return rng.integers(self._sources.views, size=len(self._train))[rows]

    def __call__(self, rows: Rows, epoch: int) -> Tensor:
        """See `TrainingRows`: a view of each, drawn anew in every epoch."""
        drawn = self.drawn(rows, epoch)
        further = self._first_more + rows * (self._sources.views - 1) + drawn - 1
        plain = np.array([self._place[int(image)] for image in self._train[rows]], dtype=np.int64)
        return self._kept.take(np.where(drawn == PLAIN, plain, further)).to(self._sources.device)


def digest_of(*sides: Rows) -> str:
    """SHA-256 of which rows are on some sides."""
    digest = hashlib.sha256()
    for rows in sides:
        digest.update(len(rows).to_bytes(8, "little") + rows.astype("<i8").tobytes())
    return digest.hexdigest()


class FreshOutputs:
    """What the trunk makes of training images, varied anew in every epoch.

    Args:
        tail: Of the model.
        sources: The images.
        train: Indices of the training images.
        batches: The rows of an epoch's batches, in order.
    """

    def __init__(self, tail: Tail, sources: Sources, train: Rows, batches: Callable[[int], Sequence[Rows]]) -> None:
        self._tail = tail
        self._sources = sources
        self._train = train
        self._batches = batches
        self._epoch = -1
        self._coming: Iterator[Tensor] = iter(())

    def __call__(self, rows: Rows, epoch: int) -> Tensor:
        """See `TrainingRows`. Batches must be asked for in their order; the first may be any of its epoch."""
        if epoch != self._epoch:
            batches = self._batches(epoch)
            place = next(index for index, batch in enumerate(batches) if np.array_equal(batch, rows))
            views = [
                [self._sources.view(int(image), 1, self._sources.seed, epoch) for image in self._train[batch]]
                for batch in batches[place:]
            ]
            self._coming, self._epoch = self._sources.entering(self._tail, views), epoch
        return next(self._coming)
