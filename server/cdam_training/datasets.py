"""From what a user has to rows: a folder with a sub-folder for each class, a CSV file, or a manifest in JSON Lines.

Everything is checked before anything is trained, and what is wrong is one line with file, line and column. Rows are
brought into an order of their own, by the images' content: neither the file's order nor the files' names change what a
seed draws, or the digest.

*Leaks.* Every image is read once, for its SHA-256. Files of the same bytes are one picture: they stay on one side of a
drawn split, and where a column puts them on two sides, or gives them different values or groups, the dataset is
refused. A picture that was encoded anew has other bytes, and is not found so: rows that belong together need a group.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cdam_images.folders import SUFFIXES, begins_like_image, is_shown, walk
from cdam_server.load_error import few, reason
from cdam_server.specs import Task
from cdam_training.errors import UNREADABLE, DatasetError, shown
from cdam_training.tables import Record, Table, read_table
from cdam_training.values import Value, check_classes, odd_names, read_values

Split = Literal["train", "validation", "test"]
SPLITS: Final[tuple[Split, ...]] = get_args(Split)

IMAGE: Final = "image"
"""The column with the images' paths, relative to the file."""

_FORMAT: Final = "cdam-dataset-1"  # another name whenever what the digest covers changes
_SPLIT_NAMES: Final[Mapping[str, Split]] = {
    "train": "train",
    "val": "validation",
    "validation": "validation",
    "test": "test",
}

Progress = Callable[[Sequence[Path]], Iterable[Path]]
"""Wraps the files that are read, such as `tqdm.tqdm`."""


@dataclass(frozen=True)
class Row:
    """An image and what is known of it.

    Attributes:
        image: Its file.
        where: Where it stands in the dataset, for messages: a line, or a file below the folder.
        content: SHA-256 of the file, in hex.
        value: What the model is to answer: a class's index, or a number for each output.
        group: What it belongs to, such as a patient; None where the dataset has no groups.
        split: The side that the dataset puts it on; None: it says none.
        mask: A file with the object's mask; None: it has none.
        mask_content: SHA-256 of that file; empty without one.
    """

    image: Path
    where: str
    content: str
    value: Value
    group: str | None = None
    split: Split | None = None
    mask: Path | None = None
    mask_content: str = ""

    @property
    def place(self) -> list[tuple[int, str]]:
        """What orders rows as they stand in the dataset: line 9 comes before line 10."""
        return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", self.where)]


@dataclass(frozen=True)
class Dataset:
    """Rows that a model can be trained on.

    Attributes:
        name: The file's or folder's own name, without the path to it.
        kind: ``folder``, ``csv`` or ``jsonl``.
        task: What the values mean.
        outputs: Names of the model's outputs, in their order: of classes, or of target columns.
        rows: In the order of the images' content.
        digest: SHA-256 over task, outputs, and of each row image, value, group, split and mask; where the files lie,
            what they are called, and the rows' order in the file are no part of it.
        group_by: The column of the groups, if there is one.
        split_by: What says the split: the column's name, or ``folders``; None: nothing does.
        notes: What its user should look at.
    """

    name: str
    kind: str
    task: Task
    outputs: tuple[str, ...]
    rows: tuple[Row, ...]
    digest: str
    group_by: str | None = None
    split_by: str | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def targets(self, indices: NDArray[np.int64] | None = None) -> NDArray[Any]:
        """The values as an array, for a loss.

        Args:
            indices: Of the rows, (n,); None: all.

        Returns:
            multi_class: (n,) int64, indices of outputs. Otherwise (n, outputs) float32; binary has one output.
        """
        rows = self.rows if indices is None else [self.rows[index] for index in indices]
        if self.task is Task.MULTI_CLASS:
            return np.array([row.value for row in rows], np.int64)
        return np.array([row.value for row in rows], np.float32).reshape(len(rows), len(self.outputs))

    def clusters(self, indices: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Which rows belong together: those of a group, or without groups those of the same content.

        Args:
            indices: Of the rows, (n,); None: all.

        Returns:
            (n,): a number for each row, from 0; the same for rows that belong together.
        """
        names = [row.content if row.group is None else row.group for row in self.rows]
        clusters = np.unique(names, return_inverse=True)[1].astype(np.int64)
        return clusters if indices is None else clusters[indices]


def read_dataset(
    path: Path,
    *,
    task: Task | None = None,
    targets: Sequence[str] = (),
    group_by: str | None = None,
    split_by: str | None = None,
    mask: str | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """The rows of a dataset, all of them checked.

    A *folder* has a sub-folder for each class, with images anywhere below it; what is hidden or no image is passed over.
    Where its sub-folders are train, val (or validation) and test, each of those has the classes' folders.

    A *CSV file* or a *manifest* has the column `image`, paths relative to the file, and target columns. A manifest has one
    JSON object a line, with the columns as keys, and may have lists of labels. The targets, by task:

    - multi_class: one column of classes' names or numbers; the outputs are the names, sorted, numbers by size.
    - multi_label: several columns of 0 and 1 (or true, false), the outputs in the columns' order as they are asked for; or
      one column of names with ``;`` between them, or lists of names: the outputs are the names, sorted.
    - binary: one column of 0 and 1 (or true, false); 1 and true are positive, the output has the column's name.
    - regression: columns of numbers, one for each output.

    Args:
        path: The folder or file.
        task: What the targets mean; None only for a folder, which is multi_class.
        targets: Target columns. If left out: the only column that is not taken for something else.
        group_by: Column of what rows belong to, such as a patient: a group is on one side of a split.
        split_by: Column with train, val or validation, test.
        mask: Column with paths of masks; its cells may be empty.
        progress: Wraps the files that are read.

    Raises:
        DatasetError: Anything is wrong with it.
    """
    columns = _Columns(tuple(targets), group_by, split_by, mask)
    if path.is_dir():
        draft = _read_folder(path, task, columns)
    elif path.exists():
        draft = _read_table(path, task, columns)
    else:
        raise DatasetError(f"{path}: there is no such file or folder")
    return _checked(draft, path, progress or iter)


@dataclass(frozen=True)
class _Columns:
    """What columns are asked for."""

    targets: tuple[str, ...]
    group_by: str | None
    split_by: str | None
    mask: str | None

    @property
    def others(self) -> tuple[str, ...]:
        """Those that are no targets."""
        return (IMAGE, *(column for column in (self.group_by, self.split_by, self.mask) if column is not None))


# --- Folders


def _read_folder(path: Path, task: Task | None, columns: _Columns) -> Dataset:
    if task not in {None, Task.MULTI_CLASS}:
        raise DatasetError(
            f"{path}: a folder of classes is the task multi_class; {task} needs a CSV file or a manifest"
        )
    if columns.targets or columns.others != (IMAGE,):
        raise DatasetError(
            f"{path}: a folder of classes has no columns; target, group, split and mask are for CSV files"
        )
    sides = _sides(path)
    folders = {folder: side for top, side in sides for folder in _folders(top)}
    if not folders:
        raise DatasetError(f"{path}: has no sub-folders; there must be one for each class")
    outputs = tuple(sorted({folder.name for folder in folders}))
    index_of = {name: index for index, name in enumerate(outputs)}
    rows: list[Row] = []
    others: list[Path] = []
    for folder, side in sorted(folders.items()):
        images, left_out = walk(folder)
        if not images:
            raise DatasetError(
                f"{path / _below(folder, path)}: has no JPEG, PNG or WebP file below it, and is no class therefore"
            )
        others += left_out
        rows += (Row(image, _below(image, path), "", index_of[folder.name], split=side) for image in images)
    check_classes(str(path), outputs, (row.value for row in rows))
    others += (file for top in {path, *(top for top, _ in sides)} for file in sorted(top.iterdir()) if _is_loose(file))
    notes = [*odd_names(outputs)]
    if others:
        notes.append(f"files passed over: {few((_below(file, path) for file in others), 3)}")
    split_by = None if sides[0][1] is None else "folders"
    return Dataset(
        path.resolve().name, "folder", Task.MULTI_CLASS, outputs, tuple(rows), "", None, split_by, tuple(notes)
    )


def _sides(path: Path) -> list[tuple[Path, Split | None]]:
    """The folder itself; or train, val and test in it, if there is nothing else and they hold folders."""
    folders = _folders(path)
    named = [folder for folder in folders if folder.name in _SPLIT_NAMES]
    if not named or not all(map(_folders, named)):
        return [(path, None)]
    if len(named) < len(folders):
        other = next(folder.name for folder in folders if folder not in named)
        raise DatasetError(f"{path}: has folders for splits, {named[0].name!r}, and others, {other!r}; take them apart")
    sides: list[tuple[Path, Split | None]] = [(folder, _SPLIT_NAMES[folder.name]) for folder in named]
    if len({side for _, side in sides}) < len(sides):
        raise DatasetError(f"{path}: has a folder val and a folder validation; keep one")
    return sides


def _folders(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and is_shown(folder.name))


def _is_loose(file: Path) -> bool:
    return file.is_file() and is_shown(file.name) and file.suffix.lower() in SUFFIXES


def _below(file: Path, folder: Path) -> str:
    return shown(file.relative_to(folder).as_posix())


# --- Tables


def _read_table(path: Path, task: Task | None, columns: _Columns) -> Dataset:
    table = read_table(path)
    if task is None:
        raise DatasetError(
            f"{path}: a file does not say what its targets mean; give the task (--task): {', '.join(Task)}"
        )
    table.require((*columns.others, *columns.targets))
    targets = columns.targets or _only_target(table, columns)
    asked = (*columns.others, *targets)
    if twice := sorted({column for column in asked if asked.count(column) > 1}):
        raise DatasetError(f"{path}: column {twice[0]!r} is asked for twice")
    values = read_values(table, task, targets)
    rows = tuple(
        _row(table, record, columns, value) for record, value in zip(table.records, values.values, strict=True)
    )
    notes = [*values.notes]
    if unused := [column for column in table.columns if column not in asked]:
        notes.append(f"columns not used: {few(map(shown, unused))}")
    return Dataset(
        path.name, table.kind, task, values.outputs, rows, "", columns.group_by, columns.split_by, tuple(notes)
    )


def _only_target(table: Table, columns: _Columns) -> tuple[str, ...]:
    left = [column for column in table.columns if column not in columns.others]
    if len(left) != 1:
        which = (
            f"there are {few(map(shown, left), 8)}" if left else f"there are none beside {', '.join(columns.others)}"
        )
        raise DatasetError(f"{table.path}: say which columns are the targets (--target); {which}")
    return tuple(left)


def _row(table: Table, record: Record, columns: _Columns, value: Value) -> Row:
    group = None if columns.group_by is None else table.name(record, columns.group_by)
    split = None if columns.split_by is None else _split(table, record, columns.split_by)
    mask = None if columns.mask is None or not table.text(record, columns.mask) else _file(table, record, columns.mask)
    return Row(_file(table, record, IMAGE), f"line {record.line}", "", value, group, split, mask)


def _split(table: Table, record: Record, column: str) -> Split:
    name = table.filled(record, column)
    if name not in _SPLIT_NAMES:
        raise table.wrong(record, column, f"{name!r} is none of {', '.join(_SPLIT_NAMES)}")
    return _SPLIT_NAMES[name]


def _file(table: Table, record: Record, column: str) -> Path:
    name = table.filled(record, column)
    file = table.path.parent / name
    try:
        if file.is_file():
            return file
        found = "is a folder" if file.is_dir() else "is not there"
    except OSError as error:
        found = f"can't be read ({error.strerror})"
    hint = "; parts of a path have / between them" if "\\" in name else ""
    raise table.wrong(
        record,
        column,
        f"the file {table.shown(record, column)} {found} (paths are relative to {table.path.name}){hint}",
    )


# --- Files, copies, leaks


def _checked(draft: Dataset, path: Path, progress: Progress) -> Dataset:
    """The dataset with its images read, in its order, with its digest."""
    _check_files_differ(draft.rows, path)
    contents = _contents(draft.rows, path, progress)
    masks = {row.mask: contents[row.mask] for row in draft.rows if row.mask is not None}
    rows = tuple(
        replace(row, content=contents[row.image], mask_content="" if row.mask is None else masks[row.mask])
        for row in draft.rows
    )
    notes = [*draft.notes, *_check_copies(rows, draft, path), *_check_groups(rows, draft, path)]
    rows = tuple(sorted(rows, key=lambda row: (row.content, row.mask_content, row.where)))
    return replace(draft, rows=rows, digest=_digest(draft, rows), notes=tuple(notes))


def _check_files_differ(rows: Iterable[Row], path: Path) -> None:
    seen: dict[Path, Row] = {}
    for row in rows:
        other = seen.setdefault(row.image.resolve(), row)
        if other is not row:
            raise DatasetError(f"{path}, {row.where}: has the image of {other.where}; each image must have one row")


def _contents(rows: Sequence[Row], path: Path, progress: Progress) -> dict[Path, str]:
    """SHA-256 of all images and masks."""
    wheres = {file: row.where for row in reversed(rows) for file in (row.image, row.mask) if file is not None}
    contents: dict[Path, str] = {}
    for file in progress(list(wheres)):
        try:
            data = file.read_bytes()
        except OSError as error:
            raise DatasetError(f"{path}, {wheres[file]}: {shown(file.name)} can't be read: {error.strerror}") from error
        if not begins_like_image(data):
            found = "is empty" if not data else "is no JPEG, PNG or WebP image"
            raise DatasetError(f"{path}, {wheres[file]}: {shown(file.name)} {found}")
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.draft("RGB", (1, 1))  # a JPEG is read to its end all the same
                image.load()
        except UNREADABLE as error:
            why = f"can't be read as an image ({reason(error)}): mend it, or leave it out"
            raise DatasetError(f"{path}, {wheres[file]}: {shown(file.name)} {why}") from error
        contents[file] = hashlib.sha256(data).hexdigest()
    return contents


def _check_copies(rows: Iterable[Row], dataset: Dataset, path: Path) -> Iterator[str]:
    """Rows of the same bytes have to agree."""
    first: dict[str, Row] = {}
    copies = 0
    for row in rows:
        other = first.setdefault(row.content, row)
        if other is row:
            continue
        copies += 1
        same = f"{path}, {row.where}: has the same picture as {other.where}, byte for byte"
        if row.value != other.value:
            found, first_found = _words(dataset, row.value), _words(dataset, other.value)
            raise DatasetError(f"{same}, but another target, {found} and not {first_found}; leave one out")
        if row.split != other.split:
            raise DatasetError(f"{same}, and is in {row.split}, not in {other.split}: that is a leak; leave one out")
        if row.group != other.group:
            raise DatasetError(f"{same}, but is of group {row.group!r}, not {other.group!r}; leave one out")
    if copies:
        yield f"images that are copies of others, byte for byte: {copies}; they count as often as they are there"


def _check_groups(rows: Iterable[Row], dataset: Dataset, path: Path) -> Iterator[str]:
    """A group is on one side, and has several rows."""
    if dataset.group_by is None:
        return
    groups: defaultdict[str | None, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.group].append(row)
    for name, members in groups.items():
        for row in members:
            if row.split != members[0].split:
                raise DatasetError(
                    f"{path}, {row.where}: group {name!r} is in {row.split}, and in {members[0].split} in "
                    f"{members[0].where}: that is a leak"
                )
    if all(len(members) == 1 for members in groups.values()):
        yield f"every row has a group of its own by {dataset.group_by!r}; is it the right column?"


def _words(dataset: Dataset, value: Value) -> str:
    if isinstance(value, int):
        return repr(dataset.outputs[value])
    if dataset.task is Task.MULTI_LABEL:
        return few([name for name, given in zip(dataset.outputs, value, strict=True) if given]) or "no labels"
    return few(f"{number:g}" for number in value)


def _digest(dataset: Dataset, rows: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    head = {"format": _FORMAT, "task": dataset.task, "outputs": dataset.outputs}
    lines = sorted(
        json.dumps([row.content, row.value, row.group, row.split, row.mask_content], ensure_ascii=True) for row in rows
    )
    for line in (json.dumps(head, ensure_ascii=True, sort_keys=True), *lines):
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()
