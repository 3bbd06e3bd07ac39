"""`samples.jsonl`: what was found of each sample, written as it comes, so that nothing is measured twice.

The first line says what the evaluation is of; then a line begins each run, and one follows for each sample. When a server
has filled in the protocol's defaults, a line says how. A sample that is there twice counts as its last line says. What was
killed in the middle of a line leaves a line that counts for nothing.
"""

import fcntl
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self, TypeAlias

import click
import numpy as np
from numpy.typing import NDArray

import cdam
from cdam.statistics import PEAKED, as_hits

FILE: Final = "samples.jsonl"
_FORMAT: Final = 1
_BEGINNING: Final = f'{{"format":{_FORMAT},'.encode()
_FREE: Final = ("written_by", "dataset_name")  # what of a header may differ from run to run

Value: TypeAlias = tuple[int, int, str, float, NDArray[Any] | None]
"""Index of the method, index of the metric, quantity, value; the curve, shape (2, points), if it has one."""


@dataclass(frozen=True, eq=False)
class Record:
    """What was found of a sample: values, or an error.

    Attributes:
        id: The sample's id.
        digest: Of all that it was measured on.
        values: One for each method, metric and quantity; empty if it failed.
        code: Of the error: its gRPC code, or the kind of file that can't be read; empty if there is none.
        message: Of the error.
    """

    id: str
    digest: str
    values: Sequence[Value] = ()
    code: str = ""
    message: str = ""

    @property
    def failed(self) -> bool:
        """Whether there is no value."""
        return not self.values


class Journal:
    """The file, open for this process alone.

    Attributes:
        seconds: That all runs so far have measured.
        protocol: With the defaults that the server filled in, in JSON's types; None: none has answered yet.
    """

    def __init__(self, file: IO[bytes], found: "_Found") -> None:
        self.seconds = self._before = found.seconds
        self.protocol = found.protocol
        self._file = file
        self._places = found.places  # by id: where its line begins, digest, whether it failed

    @classmethod
    def open(cls, folder: Path, header: Mapping[str, Any], *, overwrite: bool = False) -> Self:
        """The journal of a folder, which is made if need be.

        Args:
            folder: Where it is.
            header: What the evaluation is of, in JSON's types.
            overwrite: Begin anew, whatever is there.

        Raises:
            click.ClickException: if it is of something else, damaged, or in use.
            OSError: if it can't be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        path.touch()
        file = path.open("r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise click.ClickException(f"{path}: another `cdam evaluate` is writing to it") from error
        try:
            if overwrite:
                file.truncate(0)
            found = _Found()
            found.read(file, path)
            found.check(header, path)
            journal = cls(file, found)
            file.truncate(found.end if found.places else 0)
            file.seek(0, 2)
            if not found.places:
                journal.protocol = None
                journal._write({"format": _FORMAT, **header})
            journal._write({"run": datetime.now(UTC).isoformat(timespec="seconds")})
        except BaseException:
            file.close()
            raise
        return journal

    def measured(self, sample_id: str, digest: str) -> bool:
        """Whether there are values of a sample as it is now."""
        _, its_digest, failed = self._places.get(sample_id, (0, "", True))
        return not failed and bool(digest) and digest == its_digest

    def has(self, sample_id: str) -> bool:
        """Whether there are values of a sample."""
        return not self._places.get(sample_id, (0, "", True))[2]

    def note(self, protocol: Mapping[str, Any]) -> None:
        """Write how the server filled in the protocol.

        Raises:
            click.ClickException: if what is there was measured with other defaults.
        """
        plain = json.loads(json.dumps(protocol))
        if self.protocol is None:
            self._file.seek(0, 2)
            self._write({"protocol": plain})
            self.protocol = plain
        elif plain != self.protocol:
            raise click.ClickException(
                f"{self._file.name}: the server fills in other defaults than it was begun with; "
                "-o another folder, or --overwrite"
            )

    def add(self, record: Record, seconds: float) -> None:
        """Write what was found of a sample, so many seconds after this run began; it is in the file on return."""
        outcome: dict[str, Any]
        if record.failed:
            outcome = {"error": {"code": record.code, "message": record.message}}
        else:
            outcome = {"values": [_words(*value) for value in record.values]}
        place = self._file.seek(0, 2)
        self._write({"id": record.id, "digest": record.digest, "seconds": round(seconds, 3), **outcome})
        self._places[record.id] = place, record.digest, record.failed
        self.seconds = self._before + seconds

    def records(self, ids: Iterable[str]) -> Iterator[Record]:
        """What was found of these samples, in their order; those that are not there are left out."""
        for sample_id in ids:
            if sample_id in self._places:
                self._file.seek(self._places[sample_id][0])
                yield _record(json.loads(self._file.readline()))
        self._file.seek(0, 2)

    def close(self) -> None:
        """Close the file, and let others use it."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=True, separators=(",", ":")).encode() + b"\n")
        self._file.flush()


class _Found:
    """What is in a file."""

    def __init__(self) -> None:
        self.header: dict[str, Any] = {}
        self.protocol: dict[str, Any] | None = None
        self.places: dict[str, tuple[int, str, bool]] = {}
        self.end = 0  # of the last whole line
        self.seconds = 0.0
        self._run = 0.0
        self._keys: set[tuple[int, int, str]] = set()
        self._curves: dict[tuple[Any, ...], tuple[int, ...]] = {}  # the shapes that theirs have

    def read(self, file: IO[bytes], path: Path) -> None:
        """Read all of it, but for a torn end."""
        file.seek(0)
        for number, line in enumerate(file, 1):
            torn = not line.endswith(b"\n")
            if torn and (number > 1 or line[: len(_BEGINNING)] == _BEGINNING[: len(line)]):
                break
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                message = f"{path}, line {number}: damaged; -o another folder, or --overwrite"
                raise click.ClickException(message) from error
            self.end += len(line)
        self.seconds += self._run

    def check(self, header: Mapping[str, Any], path: Path) -> None:
        """Refuse to add to what is of something else."""
        if self.places and (differs := _difference(self.header, header)):
            message = f"{path} is of another evaluation: {differs}; -o another folder, or --overwrite"
            raise click.ClickException(message)

    def _take(self, line: dict[str, Any]) -> None:
        if not self.header:
            if line["format"] != _FORMAT:
                raise ValueError("of another version")
            self.header = line
            self._keys = {
                (method, index, quantity)
                for method in range(len(line["methods"]))
                for index, name in enumerate(line["metrics"])
                for quantity in cdam.METRICS[name.partition(":")[0]].quantities
            }
        elif "run" in line:
            self.seconds, self._run = self.seconds + self._run, 0.0
        elif "protocol" in line:
            self.protocol = dict(line["protocol"])
        else:
            record = _record(line)
            self._check_whole(record, line["seconds"])
            self.places[record.id] = self.end, record.digest, record.failed
            self._run = max(self._run, line["seconds"])

    def _check_whole(self, record: Record, seconds: float) -> None:
        texts = record.id, record.digest, record.code, record.message
        numbers = [seconds, *(value for *_, value, _ in record.values)]
        if not all(isinstance(text, str) for text in texts) or not all(map(math.isfinite, numbers)):
            raise ValueError("of another type, or not finite")
        keys = [value[:3] for value in record.values]
        if keys and (len(keys) != len(self._keys) or set(keys) != self._keys):
            raise ValueError("not the values of these methods and metrics")
        for *key, _, curve in record.values:
            if key[2] == PEAKED:
                as_hits(curve)
            if curve is None:
                continue
            if curve.dtype.kind not in "if" or len(curve) != 2:
                raise ValueError("no curve")
            if self._curves.setdefault(tuple(key), curve.shape) != curve.shape:
                raise ValueError("a curve of another length")


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first thing in which two headers differ, for people."""
    for name, value in wanted.items():
        if name not in _FREE and found.get(name) != value:
            its = name.replace("_", " ")
            if isinstance(value, str) and len(value) == 64:  # a digest says nothing to people
                return f"it has another {its}"
            return f"its {its}: {_brief(found.get(name))}, now: {_brief(value)}"
    return ""


def _brief(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "none" if value in {None, ""} else str(value)


def _words(method: int, metric: int, quantity: str, value: float, curve: NDArray[Any] | None) -> list[Any]:
    words: list[Any] = [method, metric, quantity, value]
    if curve is not None:  # as many digits as they travelled with
        words.append([[float(f"{number:.9g}") for number in row] for row in curve.tolist()])
    return words


def _record(line: Mapping[str, Any]) -> Record:
    error = line.get("error", {})
    values = [(*words[:4], np.array(words[4]) if len(words) > 4 else None) for words in line.get("values", ())]
    if not values and not error:
        raise ValueError("neither values nor an error")
    return Record(line["id"], line["digest"], values, error.get("code", ""), error.get("message", ""))
