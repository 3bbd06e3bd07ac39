"""Rows and columns of a file: CSV, or JSON Lines with one object a line. What the cells mean, `values` says.

A CSV is UTF-8 (a byte order mark is passed over), has commas, double quotes, and a first line that names the columns;
cells may hold line breaks in quotes. Columns without a name are passed over: there is no way to ask for them. Blanks
around names and cells are nothing.
"""

from __future__ import annotations

import csv
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from cdam_server.settings.load_error import few
from cdam_training.errors import DatasetError, meant

Kind = Literal["csv", "jsonl"]

_KINDS: Final[Mapping[str, Kind]] = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
NUMBER: Final = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
"""A number as files write it: in decimal digits, with a point."""

_NOT_IN_NAMES: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})  # controls, halves of characters, ends of lines
_SHOWN: Final = 40  # characters of a cell in a message


@dataclass(frozen=True)
class Record:
    """One row.

    Attributes:
        line: Where it begins in the file, from 1.
        cells: By column: text in a CSV, JSON's types in JSON Lines.
    """

    line: int
    cells: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """All of a file.

    Attributes:
        path: As given.
        kind: By its suffix.
        columns: Their names, each once; of JSON Lines all keys in the order of their first appearance.
        records: The rows, one at least.
    """

    path: Path
    kind: Kind
    columns: tuple[str, ...]
    records: Sequence[Record]

    def require(self, columns: Iterable[str]) -> None:
        """Check that there are these columns.

        Raises:
            DatasetError: One is missing.
        """
        for column in columns:
            if column not in self.columns:
                raise DatasetError(f"{self.path}: no column {column!r}{meant(column, self.columns)}")

    def text(self, record: Record, column: str) -> str:
        """A cell as text without blanks around it; empty if there is nothing in it.

        Raises:
            DatasetError: It is a list or an object.
        """
        match record.cells.get(column):
            case None:
                return ""
            case str(text):
                return text.strip()
            case bool() | int() | float() as value:
                return json.dumps(value)
        raise self.wrong(record, column, f"{self.shown(record, column)} is no single value")

    def filled(self, record: Record, column: str) -> str:
        """A cell's text.

        Raises:
            DatasetError: It is empty, or no single value.
        """
        text = self.text(record, column)
        if not text:
            raise self.wrong(record, column, "is empty")
        return text

    def name(self, record: Record, column: str) -> str:
        """A cell's text as a name: of a class, a group.

        Raises:
            DatasetError: It is empty, or no name.
        """
        name = self.filled(record, column)
        if not is_name(name):
            raise self.wrong(record, column, f"{self.shown(record, column)} has line breaks or control characters")
        return name

    def number(self, record: Record, column: str) -> float:
        """A cell as a finite number.

        Raises:
            DatasetError: It is none.
        """
        text = self.filled(record, column)
        shown = self.shown(record, column)
        if text.lower().lstrip("+-") in {"nan", "inf", "infinity"}:
            raise self.wrong(record, column, f"{shown} is not finite")
        if isinstance(record.cells[column], bool) or not NUMBER.fullmatch(text):
            remedy = "; the decimal sign is a point" if NUMBER.fullmatch(text.replace(",", ".")) else ""
            raise self.wrong(record, column, f"{shown} is no number{remedy}")
        value = float(text)
        if not math.isfinite(value):
            raise self.wrong(record, column, f"{shown} is too large")
        return value

    def flag(self, record: Record, column: str) -> bool:
        """A cell that is 0, 1, true or false, also 0.0 and 1.0; case is nothing.

        Raises:
            DatasetError: It is something else.
        """
        text = self.filled(record, column).lower()
        if text in {"true", "false"}:
            return text == "true"
        if NUMBER.fullmatch(text) and float(text) in {0.0, 1.0}:
            return float(text) == 1.0
        raise self.wrong(
            record, column, f"{self.shown(record, column)} is none of 0, 1, true and false (1 and true are positive)"
        )

    def shown(self, record: Record, column: str) -> str:
        """A cell for a message, cut short."""
        text = repr(record.cells.get(column))
        return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."

    def wrong(self, record: Record, column: str, message: str) -> DatasetError:
        """The error of a cell, with file, line and column."""
        return DatasetError(f"{self.path}, line {record.line}, column {column!r}: {message}")


def is_name(text: str) -> bool:
    """Whether a text can be an output's name: something on one line, without control characters."""
    return bool(text.strip()) and not any(unicodedata.category(character) in _NOT_IN_NAMES for character in text)


def read_table(path: Path) -> Table:
    """The rows of a file.

    Args:
        path: A ``.csv``, ``.jsonl`` or ``.ndjson`` file.

    Raises:
        DatasetError: It is of another kind, can't be read, is not well-formed, or has no rows.
    """
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise DatasetError(f"{path}: must be a folder of classes, or end in {', '.join(_KINDS)}")
    try:
        columns, records = _read_csv(path) if kind == "csv" else _read_json_lines(path)
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: is not in UTF-8; spreadsheets save it as 'CSV UTF-8'") from error
    except OSError as error:
        raise DatasetError(f"{path}: can't be read: {error.strerror}") from error
    if not records:
        raise DatasetError(f"{path}: has no rows")
    return Table(path, kind, columns, records)


def _read_csv(path: Path) -> tuple[tuple[str, ...], list[Record]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = [column.strip() for column in next(reader, [])]
            _check_header(path, header)
            return tuple(filter(None, header)), list(_csv_records(path, header, reader))
        except csv.Error as error:
            raise DatasetError(f"{path}, line {reader.line_num}: is no CSV: {error}") from error


def _csv_records(path: Path, header: Sequence[str], reader: Any) -> Iterator[Record]:
    line = reader.line_num + 1
    for cells in reader:
        if any(cell.strip() for cell in cells):
            if len(cells) != len(header):
                raise DatasetError(
                    f"{path}, line {line}: {len(cells)} cells, but {len(header)} columns; a cell with a comma in it "
                    "must be in double quotes"
                )
            yield Record(line, {column: cell for column, cell in zip(header, cells, strict=True) if column})
        line = reader.line_num + 1


def _check_header(path: Path, header: Sequence[str]) -> None:
    if not any(header):
        raise DatasetError(f"{path}: its first line must name the columns, and is empty")
    if twice := _twice(filter(None, header)):
        raise DatasetError(f"{path}: two columns of the same name: {twice}")
    for mark, called in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(header) == 1 and mark in header[0]:
            raise DatasetError(f"{path}: has {called} between its columns; save it with commas")


def _read_json_lines(path: Path) -> tuple[tuple[str, ...], list[Record]]:
    columns: dict[str, None] = {}
    records: list[Record] = []
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            cells = _json_object(path, line, text)
            columns.update(dict.fromkeys(cells))
            records.append(Record(line, cells))
    return tuple(columns), records


def _json_object(path: Path, line: int, text: str) -> dict[str, Any]:
    def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := _twice(key for key, _ in pairs):
            raise DatasetError(f"{path}, line {line}: two values of the same name: {twice}")
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=once_each)
    except DatasetError:
        raise
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}, line {line}: is no JSON: {error.msg} at character {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}, line {line}: is no JSON that can be read: {error}") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path}, line {line}: must be one JSON object, {{...}}, on each line")
    return content


def _twice(names: Iterable[str]) -> str:
    return few(repr(name) for name, count in Counter(names).items() if count > 1)
