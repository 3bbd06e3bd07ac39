"""From cells to what a model is to answer: classes, labels, yes or no, numbers."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from cdam_server.settings.load_error import few
from cdam_server.settings.specs import Task
from cdam_training.errors import DatasetError
from cdam_training.tables import NUMBER, Record, Table, is_name

Value = int | tuple[float, ...]
"""A class's index; or a number for each output: 0 and 1 of labels, a regression's values."""

SEPARATOR: Final = ";"
"""Between the labels in a cell."""

_UNSEEN: Final = frozenset({"Cf", "Zs"})  # blanks of any kind, and what has no width
_MISSING: Final = frozenset({"nan", "none", "null", "na", "n/a"})


@dataclass(frozen=True)
class Values:
    """The values of a dataset.

    Attributes:
        outputs: The outputs' names, in the model's order.
        values: One a row.
        notes: What a reader of the dataset should look at.
    """

    outputs: tuple[str, ...]
    values: tuple[Value, ...]
    notes: tuple[str, ...] = ()


def read_values(table: Table, task: Task, targets: Sequence[str]) -> Values:
    """What the target columns say.

    Args:
        table: The rows.
        task: What they mean.
        targets: The target columns, one at least, in the order of the outputs.

    Raises:
        DatasetError: A cell can't be read so, or there is nothing to learn from the columns.
    """
    values = _READERS[task](table, targets)
    for name in values.outputs:
        if not is_name(name):
            raise DatasetError(
                f"{table.path}: the output {name!r} must have a name, without line breaks and control characters"
            )
    return replace(values, notes=(*odd_names(values.outputs), *values.notes))


def check_classes(where: str, outputs: Sequence[str], values: Iterable[Value]) -> None:
    """Check that there are classes to tell apart, with two examples each: one to learn from, one to measure on.

    Args:
        where: What to look at, for the message.
        outputs: The classes.
        values: Their indices, one a row.

    Raises:
        DatasetError: There are not.
    """
    if len(outputs) < 2:
        raise DatasetError(f"{where}: there is one class alone, {outputs[0]!r}; nothing can be learnt from it")
    counts = Counter(values)
    if single := [name for index, name in enumerate(outputs) if counts[index] == 1]:
        hint = "; are these numbers, for the task regression?" if len(single) > len(outputs) / 2 else ""
        raise DatasetError(
            f"{where}: of {_many(len(single), 'class', 'classes')} there is one example alone, none to measure on: "
            f"{few(map(repr, single))}; add some, or leave it out{hint}"
        )


def odd_names(outputs: Iterable[str]) -> tuple[str, ...]:
    """Notes on names that may be one class in several spellings, or no class."""
    by_fold: dict[str, list[str]] = {}
    for name in outputs:
        shown = (char for char in unicodedata.normalize("NFKC", name) if unicodedata.category(char) not in _UNSEEN)
        by_fold.setdefault("".join(shown).casefold(), []).append(name)
    notes = [
        f"different outputs with almost the same name: {few(map(repr, names))}"
        for names in by_fold.values()
        if len(names) > 1
    ]
    if missing := [names[0] for fold, names in by_fold.items() if fold in _MISSING]:
        notes.append(f"outputs with a name that other programs write for nothing: {few(map(repr, missing))}")
    return tuple(notes)


def _multi_class(table: Table, targets: Sequence[str]) -> Values:
    column = _one(table, targets, Task.MULTI_CLASS)
    names = [table.name(record, column) for record in table.records]
    outputs = _in_order(table, column, set(names))
    index_of = {name: index for index, name in enumerate(outputs)}
    values = tuple(index_of[name] for name in names)
    check_classes(f"{table.path}, column {column!r}", outputs, values)
    return Values(outputs, values)


def _multi_label(table: Table, targets: Sequence[str]) -> Values:
    if len(targets) > 1:
        return _flags(table, targets)
    column = targets[0]
    rows = [_labels(table, record, column) for record in table.records]
    found = {label for labels in rows for label in labels}
    where = f"{table.path}, column {column!r}"
    if not found:
        raise DatasetError(f"{where}: there are no labels in it")
    if found <= {"0", "1"}:
        raise DatasetError(f"{where}: is one column of 0 and 1: take the task binary, or a column for each label")
    if len(found) == 1:
        raise DatasetError(
            f"{where}: there is one label alone, {found.pop()!r}; make it a column of 0 and 1, task binary"
        )
    outputs = _in_order(table, column, found)
    values = tuple(tuple(float(name in labels) for name in outputs) for labels in map(set, rows))
    _check_labels(where, outputs, values)
    commas = [name for name in outputs if "," in name]
    note = f"labels with a comma in them (labels are separated by {SEPARATOR!r}): {few(map(repr, commas))}"
    return Values(outputs, values, (note,) if commas else ())


def _binary(table: Table, targets: Sequence[str]) -> Values:
    _one(table, targets, Task.BINARY)
    return _flags(table, targets)


def _regression(table: Table, targets: Sequence[str]) -> Values:
    values = tuple(tuple(table.number(record, column) for column in targets) for record in table.records)
    with np.errstate(over="ignore"):
        array = np.asarray(values, np.float32)
    for index, column in enumerate(targets):
        if infinite := np.flatnonzero(~np.isfinite(array[:, index])).tolist():
            record = table.records[infinite[0]]
            raise table.wrong(record, column, f"{table.shown(record, column)} is too large for 32 bits")
        if np.ptp(array[:, index]) == 0:
            raise DatasetError(
                f"{table.path}, column {column!r}: is {array[0, index]:g} in every row; nothing can be learnt from it"
            )
    return Values(tuple(targets), values)


_READERS: Final[Mapping[Task, Callable[[Table, Sequence[str]], Values]]] = MappingProxyType(
    {
        Task.MULTI_CLASS: _multi_class,
        Task.MULTI_LABEL: _multi_label,
        Task.BINARY: _binary,
        Task.REGRESSION: _regression,
    }
)


def _one(table: Table, targets: Sequence[str], task: Task) -> str:
    if len(targets) != 1:
        hint = "; several columns of 0 and 1 are the task multi_label" if task is Task.BINARY else ""
        raise DatasetError(f"{table.path}: {task} has one target column, not {few(map(repr, targets))}{hint}")
    return targets[0]


def _flags(table: Table, targets: Sequence[str]) -> Values:
    values = tuple(tuple(float(table.flag(record, column)) for column in targets) for record in table.records)
    _check_labels(str(table.path), targets, values)
    return Values(tuple(targets), values)


def _labels(table: Table, record: Record, column: str) -> list[str]:
    """The labels in a cell: names with ; between them, or a list of JSON; none in an empty one."""
    cell: Any = record.cells.get(column)
    if isinstance(cell, list):
        if not all(isinstance(label, str | int) and not isinstance(label, bool) for label in cell):
            raise table.wrong(record, column, f"{table.shown(record, column)} is no list of names")
        labels = [str(label).strip() for label in cell]
    elif cell is None:
        raise table.wrong(record, column, "is missing; no labels are an empty list, []")
    else:
        text = table.text(record, column)
        labels = [label.strip() for label in text.split(SEPARATOR)] if text else []
    if not all(labels):
        raise table.wrong(record, column, f"{table.shown(record, column)} has an empty label")
    if len(set(labels)) < len(labels):
        raise table.wrong(record, column, f"{table.shown(record, column)} has a label twice")
    return labels


def _check_labels(where: str, outputs: Sequence[str], values: Sequence[tuple[float, ...]]) -> None:
    """Each output needs two rows of either kind: one to learn from, one to measure on."""
    rows = len(values)
    positives = np.asarray(values).sum(0).astype(int).tolist()
    for name, positive in zip(outputs, positives, strict=True):
        for count, called in ((positive, "positive"), (rows - positive, "negative")):
            if count < 2:
                raise DatasetError(
                    f"{where}: of {rows} rows {'none is' if count == 0 else 'one alone is'} {called} for {name!r}; there "
                    "must be two, one to learn from and one to measure on; add some, or leave it out"
                )


def _in_order(table: Table, column: str, names: set[str]) -> tuple[str, ...]:
    """Sorted; numbers by size if all are numbers."""
    if not all(map(NUMBER.fullmatch, names)):
        return tuple(sorted(names))
    numbers = {name: float(name) for name in names}
    by_number: dict[float, str] = {}
    for name, number in sorted(numbers.items()):
        if other := by_number.get(number):
            raise DatasetError(
                f"{table.path}, column {column!r}: {other!r} and {name!r} are one number, spelled in two ways"
            )
        by_number[number] = name
    return tuple(sorted(names, key=lambda name: (numbers[name], name)))


def _many(count: int, one: str, several: str) -> str:
    return f"1 {one}" if count == 1 else f"{count} {several}"
