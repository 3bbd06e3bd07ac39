"""Masks of a dataset's images, as counts of pixels in each patch of a model's grid.

Two kinds. Of an ``object`` mask the pixels that are neither black nor transparent belong to the image's own class. A mask
of ``classes`` is an index image: pixel n belongs to the n-th output, counted from 1; 0 is none of them, 255 undecided.

A mask is cropped and resized as its image is, taking the nearest pixel. Where the input is padded nothing is of any class.
Counts lose nothing that a map over patches could show: whatever is measured over pixels follows from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cdam_engine.evaluation.geometry import Geometry
from cdam_images import upright_indices, upright_mask
from cdam_server.load_error import few
from cdam_server.specs import Task
from cdam_training.datasets import Dataset, Row
from cdam_training.errors import UNREADABLE, DatasetError
from cdam_training.trunk_outputs import Sources
from cdam_training.views import PLAIN, read_image, view_of_indices

UNDECIDED: Final = 255
"""In a mask of classes: a pixel of which nothing is known."""

_MOST: Final = UNDECIDED - 1  # outputs that an index of 8 bits can name


class MaskKind(StrEnum):
    """What a mask's pixels mean."""

    OBJECT = "object"
    CLASSES = "classes"


@dataclass(frozen=True, eq=False)
class PatchMask:
    """Where outputs are in one view of an image, in pixels of each of P patches.

    Attributes:
        outputs: Indices of the outputs of which it is known, (k,).
        inside: How many of a patch's pixels belong to each, (k, P).
        decided: Of how many it is known, (P,).
    """

    outputs: NDArray[np.int64]
    inside: NDArray[np.int32]
    decided: NDArray[np.int32]

    @property
    def targets(self) -> NDArray[np.bool_]:
        """Whether more than half of a patch's decided pixels belong to an output, (k, P)."""
        found: NDArray[np.bool_] = 2 * self.inside > self.decided
        return found


@dataclass(frozen=True, eq=False)
class Masks:
    """The masks of a dataset, as a model sees them.

    Attributes:
        dataset: Whose rows have them.
        kind: What they mean.
        sources: How its images are made into inputs; their masks go the same way.
        geometry: The model's patches.

    Raises:
        DatasetError: The task has no such masks, or no image has one.
    """

    dataset: Dataset
    kind: MaskKind
    sources: Sources
    geometry: Geometry
    _known: dict[tuple[int, int], PatchMask] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """See above."""
        check_kind(self.dataset, self.kind)

    def having(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of some rows that have a mask."""
        return rows[[self.dataset.rows[row].mask is not None for row in rows.tolist()]] if len(rows) else rows

    def of(self, row: int, view: int = PLAIN) -> PatchMask:
        """The mask of a row in a view; it is kept.

        Raises:
            DatasetError: The file is damaged, does not fit to the image, or holds what it should not.
        """
        if (row, view) not in self._known:
            its = self.dataset.rows[row]
            sources = self.sources
            shown = view_of_indices(self._indices(its), sources.view(row, view), sources.config, sources.augmentation)
            self._known[row, view] = self._counted(its, shown)
        return self._known[row, view]

    def _indices(self, row: Row) -> NDArray[np.uint8]:
        """Of the outputs from 1, shape (height, width) of the image."""
        assert row.mask is not None
        width, height = read_image(row.image).size
        try:
            with Image.open(row.mask) as opened:
                if self.kind is MaskKind.OBJECT:
                    indices = (np.asarray(upright_mask(opened)) > 0).astype(np.uint8)
                else:
                    indices = upright_indices(opened)
        except UNREADABLE as error:
            raise self._wrong(row, f"can't be read: {error}") from error
        if indices.shape != (height, width):
            found = " x ".join(map(str, indices.shape))
            raise self._wrong(row, f"is {found} (height x width), but the image is {height} x {width}")
        if self.kind is MaskKind.CLASSES:
            self._check_values(row, indices)
        elif not self._own(row) and indices.any():
            raise self._wrong(row, f"has pixels of an object, but {self.dataset.outputs[0]!r} is 0")
        elif self._own(row) and not indices.any():
            raise self._wrong(row, "is empty: nothing is of the image's class; leave the cell empty")
        return indices

    def _check_values(self, row: Row, indices: NDArray[np.uint8]) -> None:
        count = len(self.dataset.outputs)
        strange = sorted({*np.unique(indices).tolist()} - {*range(count + 1), UNDECIDED})
        if strange:
            raise self._wrong(
                row,
                f"has the values {few(map(str, strange))}; there may be 0 (none), 1 to {count} (the outputs in their "
                f"order, from {self.dataset.outputs[0]!r} to {self.dataset.outputs[-1]!r}) and {UNDECIDED} (undecided)",
            )

    def _wrong(self, row: Row, message: str) -> DatasetError:
        assert row.mask is not None
        return DatasetError(f"{self.dataset.name}, {row.where}: the mask {row.mask.name} {message}")

    def _own(self, row: Row) -> bool:
        """Whether the image is of a class that an object mask can show."""
        return self.dataset.task is not Task.BINARY or bool(_labels(row)[0])

    def _counted(self, row: Row, indices: NDArray[np.uint8]) -> PatchMask:
        outputs = self._known_outputs(row, indices)
        numbers = np.ones_like(outputs) if self.kind is MaskKind.OBJECT else outputs + 1
        counts = [self.geometry.count(indices == number) for number in numbers.tolist()]
        undecided = self.kind is MaskKind.CLASSES
        decided = self.geometry.count(indices != UNDECIDED if undecided else np.ones_like(indices, np.bool_))
        inside = np.stack(counts).reshape(len(counts), -1)
        return PatchMask(outputs, inside.astype(np.int32), decided.ravel().astype(np.int32))

    def _known_outputs(self, row: Row, indices: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Outputs whose place in the image, or absence, the mask tells.

        A softmax gives a patch of the background to some class, too: only the classes that are in the image are asked for.
        """
        match self.dataset.task, self.kind:
            case Task.MULTI_LABEL | Task.BINARY, _:
                return np.arange(len(self.dataset.outputs))
            case _, MaskKind.OBJECT:
                return np.array([row.value], np.int64)
        there = {*np.unique(indices).tolist()} - {0, UNDECIDED}
        return np.array(sorted({row.value, *(number - 1 for number in there)}), np.int64)


def check_kind(dataset: Dataset, kind: MaskKind) -> None:
    """Refuse masks that the task has not.

    Raises:
        DatasetError: They are of another kind, or there are none.
    """
    fitting = {
        Task.MULTI_CLASS: (MaskKind.OBJECT, MaskKind.CLASSES),
        Task.MULTI_LABEL: (MaskKind.CLASSES,),
        Task.BINARY: (MaskKind.OBJECT,),
    }.get(dataset.task)
    if fitting is None:
        raise DatasetError(f"{dataset.name}: a regression has no classes that a mask could show")
    if kind not in fitting:
        raise DatasetError(f"{dataset.name}: masks of {dataset.task} are of the kind {fitting[0]}, not {kind}")
    if kind is MaskKind.CLASSES and len(dataset.outputs) > _MOST:
        raise DatasetError(
            f"{dataset.name}: masks of classes are for {_MOST} outputs at most, and there are {len(dataset.outputs)}"
        )
    if not any(row.mask is not None for row in dataset.rows):
        raise DatasetError(f"{dataset.name}: no image has a mask; --mask names the column with their paths")


def choose(dataset: Dataset, rows: NDArray[np.int64], number: int, seed: int) -> NDArray[np.int64]:
    """Some rows, drawn at random, but of as many classes as possible.

    Args:
        dataset: The rows are its.
        rows: Indices to choose from.
        number: How many; all, if there are not as many.
        seed: Of the draw.

    Returns:
        Ascending.
    """
    order = np.random.default_rng((seed, 1)).permutation(np.sort(rows)).tolist()
    seen: set[int] = set()
    first: list[int] = []
    for row in order:
        labels = _classes(dataset.rows[row])
        if labels - seen:
            first.append(row)
            seen |= labels
    rest = [row for row in order if row not in set(first)]
    return np.sort(np.array((first + rest)[:number], np.int64))


def _labels(row: Row) -> Sequence[float]:
    assert not isinstance(row.value, int)
    return row.value


def _classes(row: Row) -> set[int]:
    if isinstance(row.value, int):
        return {row.value}
    return {index for index, value in enumerate(row.value) if value}
