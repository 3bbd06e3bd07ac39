"""What `cdam evaluate` measures on: a folder of classes, a CSV file, or the demo's scenes. Images are read one by one."""

import csv
import hashlib
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice, zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import click
import numpy as np

import cdam
from cdam_cli.images import some
from cdam_cli.spelling import parse_target, spelled
from cdam_images.folders import is_shown, walk

OPTIONAL: Final = ("wrong_target", "mask", "counterfactual", "wrong_mask")
"""What samples may have beside an image and a target."""

SCENES_SEED: Final = 3_000_000
"""Of the first scene; neither the demo's figures nor its concepts use these."""

_PATHS: Final = ("image", "mask", "counterfactual", "wrong_mask")
_COLUMNS: Final = ("id", *_PATHS, "target", "wrong_target")
_SCENES: Final = re.compile(r"demo-scenes:([1-9][0-9]{0,6})")

FindConcept = Callable[[cdam.Concept], cdam.Concept]
"""From a concept by its name to the version that has it now."""


class Dataset(ABC):
    """Samples in a fixed order, which can be read again and again.

    Attributes:
        name: As given.
        kind: ``folder``, ``csv`` or ``demo-scenes``.
        identity: Digest of what is in it: ids, targets and paths, not the files' content.
        everywhere: Which of `OPTIONAL` every sample has.
        somewhere: Which of them any sample has.
        lacking: Of what some have and others have not, a sample that has not, by its id.
        notes: What its user should know of how it was read.
        limit: How many samples are taken, if not all are.
    """

    name: str
    kind: str
    identity: str
    everywhere: frozenset[str] = frozenset()
    somewhere: frozenset[str] = frozenset()
    lacking: Mapping[str, str] = MappingProxyType({})
    notes: Sequence[str] = ()
    limit: int | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def __iter__(self) -> Iterator[cdam.Sample]:
        """The samples; their files are not opened."""


def open_dataset(text: str, model: cdam.Model, find_concept: FindConcept, limit: int | None = None) -> Dataset:
    """The dataset that the command line means.

    Args:
        text: A folder, a CSV file, or ``demo-scenes:N``.
        model: Whose outputs are its targets.
        find_concept: Finds the concepts that are its targets.
        limit: Take the first so many samples; None: all.

    Raises:
        click.ClickException: if it is none, or not one for this model.
    """
    if text.startswith("demo-scenes"):
        dataset: Dataset = _Scenes(text, model)
    elif Path(text).is_dir():
        dataset = _Folder(text, model)
    elif Path(text).is_file():
        dataset = _Table(text, model, find_concept)
    else:
        raise _nothing(text)
    return dataset if limit is None or limit >= len(dataset) else _Beginning(dataset, limit)


def check_there(text: str) -> None:
    """Check, without a server, that there may be a dataset.

    Raises:
        click.UsageError: if there is none.
    """
    if text.startswith("demo-scenes"):
        if not _SCENES.fullmatch(text):
            raise click.UsageError(f"{text}: demo-scenes:N, with the number of scenes, as in demo-scenes:100")
    elif not Path(text).exists():
        raise _nothing(text)


def _nothing(text: str) -> click.UsageError:
    return click.UsageError(f"{text}: no folder, no CSV file, and not demo-scenes:N")


def digest(sample: cdam.Sample) -> str:
    """Short digest of all that is measured of a sample; empty if a file can't be read."""
    parts = hashlib.sha256()
    try:
        for name in (*_PATHS, "target", "wrong_target"):
            parts.update(f"{name}\0{_content(getattr(sample, name))}\0".encode())
    except OSError:
        return ""
    return parts.hexdigest()[:16]


def _content(value: Any) -> str:
    match value:
        case None:
            return ""
        case Path():
            with value.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        case np.ndarray():
            return f"{value.dtype}{value.shape}{hashlib.sha256(value.tobytes()).hexdigest()}"
        case _:
            return spelled(value)


def _identity(lines: Iterator[str]) -> str:
    parts = hashlib.sha256()
    for line in lines:
        parts.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return parts.hexdigest()


class _Beginning(Dataset):
    """The first samples of another, whose identity it has."""

    limit: int

    def __init__(self, whole: Dataset, limit: int) -> None:
        self._whole, self.limit = whole, limit
        for name in ("name", "kind", "identity", "everywhere", "somewhere", "lacking"):
            setattr(self, name, getattr(whole, name))
        self.notes = (*whole.notes, f"the first {limit} of {len(whole)} samples")

    def __len__(self) -> int:
        return self.limit

    def __iter__(self) -> Iterator[cdam.Sample]:
        return islice(self._whole, self.limit)


class _Folder(Dataset):
    """A sub-folder for each class. Samples take turns over the classes, so that the first ones are of many."""

    kind = "folder"

    def __init__(self, name: str, model: cdam.Model) -> None:
        self.name = name
        self._root = Path(name)
        classes = sorted(path for path in self._root.iterdir() if path.is_dir() and is_shown(path.name))
        if not classes:
            raise click.UsageError(f"{name}: no sub-folders; there is to be one for each class. A CSV file is freer")
        files = {folder.name: walk(folder)[0] for folder in classes}
        if not any(files.values()):
            raise click.UsageError(f"{name}: no JPEG, PNG or WebP file below its folders")
        targets, how = _targets_of(name, list(files), model)
        self.notes = (how,)
        rounds = zip_longest(*([(file, targets[label]) for file in found] for label, found in files.items()))
        self._files = [pair for turn in rounds for pair in turn if pair is not None]
        self.identity = _identity(f"{self._id(file)}\t{spelled(target)}" for file, target in self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[cdam.Sample]:
        return (cdam.Sample(self._id(file), file, target) for file, target in self._files)

    def _id(self, file: Path) -> str:
        return file.relative_to(self._root).as_posix()


def _targets_of(name: str, labels: Sequence[str], model: cdam.Model) -> tuple[dict[str, cdam.Output], str]:
    """The output of each class by its name; or, if no name is one, by its place among all classes."""
    unknown = [label for label in labels if label not in model.output_names]
    if not unknown:
        return {label: cdam.Output(label) for label in labels}, "classes by the folders' names"
    if len(unknown) < len(labels):
        meant = _meant(unknown[0], model.output_names)
        raise click.UsageError(f"{name}: no outputs of {model.name} are called {some(unknown)}{meant}")
    if len(labels) == model.output_count:
        how = f"classes by position: the {len(labels)} folders, sorted, are the model's outputs from 0"
        return {label: cdam.Output(index) for index, label in enumerate(labels)}, how
    raise click.UsageError(
        f"{name}: no outputs of {model.name} are called {some(unknown)}; and for the outputs in their order "
        f"there are {model.output_count}, but {len(labels)} folders"
    )


def _meant(name: str, names: Sequence[str]) -> str:
    near = get_close_matches(name, names, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


class _Table(Dataset):
    """A CSV file. It is read anew each time, so that no list of it is kept."""

    kind = "csv"

    def __init__(self, name: str, model: cdam.Model, find_concept: FindConcept) -> None:
        self.name = name
        self._path = Path(name)
        self._model = model
        self._find_concept = find_concept
        self._targets: dict[str, cdam.Output | cdam.Concept] = {}
        filled: Counter[str] = Counter()
        lacking: dict[str, str] = {}
        self.identity = _identity(self._check(filled, lacking))
        self._length = filled["image"]
        if not self._length:
            raise click.UsageError(f"{name}: no rows below the header")
        self.everywhere = frozenset(column for column in OPTIONAL if filled[column] == self._length)
        self.somewhere = frozenset(column for column in OPTIONAL if filled[column])
        self.lacking = {column: lacking[column] for column in self.somewhere - self.everywhere}
        if unused := sorted(column for column in filled if column not in _COLUMNS):
            self.notes = (f"columns not used: {some(unused)}",)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[cdam.Sample]:
        return (self._sample(line, row) for line, row in self._rows())

    def _check(self, filled: Counter[str], lacking: dict[str, str]) -> Iterator[str]:
        """Every row as a line of text; counts in which columns they have something, and notes who has not."""
        seen: set[bytes] = set()
        for line, row in self._rows():
            sample = self._sample(line, row)
            key = hashlib.sha256(sample.id.encode("utf-8", "surrogateescape")).digest()[:12]
            if key in seen:
                remedy = "ids have to differ" if row.get("id") else "a column `id` can tell them apart"
                raise self._wrong(line, f"{sample.id!r} is there twice; {remedy}")
            seen.add(key)
            filled.update(column for column, cell in row.items() if cell)
            for column in OPTIONAL:
                if not row.get(column):
                    lacking.setdefault(column, sample.id)
            yield "\t".join([sample.id, *(row.get(column, "") for column in _COLUMNS)])

    def _rows(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Lines' numbers and cells by column."""
        try:
            with self._path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file, strict=True)
                header = [column.strip() for column in next(reader, [])]
                self._check_header(header)
                for cells in reader:
                    if len(cells) > len(header):
                        raise self._wrong(reader.line_num, f"{len(cells)} cells, but {len(header)} columns")
                    if any(cells):
                        yield reader.line_num, dict(zip_longest(header, map(str.strip, cells), fillvalue=""))
        except UnicodeDecodeError as error:
            raise click.UsageError(f"{self.name}: not a CSV file in UTF-8") from error
        except csv.Error as error:
            raise self._wrong(reader.line_num, str(error)) from error

    def _check_header(self, header: Sequence[str]) -> None:
        if absent := [column for column in ("image", "target") if column not in header]:
            raise click.UsageError(
                f"{self.name}: no column {' and no column '.join(absent)}; its first line has to name the columns, with "
                f"commas between them: image, target, and as needed {', '.join(OPTIONAL)}, id"
            )
        if len(set(header)) < len(header):
            raise click.UsageError(f"{self.name}: two columns of the same name")
        absent = [column for column in _COLUMNS if column not in header]
        for column in header:
            near = [] if column in _COLUMNS else get_close_matches(column.lower(), absent, 1, cutoff=0.82)
            if near:
                raise click.UsageError(f"{self.name}: {column!r} is no column; did you mean {near[0]!r}?")

    def _sample(self, line: int, row: Mapping[str, str]) -> cdam.Sample:
        if not (row["image"] and row["target"]):
            raise self._wrong(line, "an image and a target are needed")

        def file(column: str) -> Path | None:
            return self._path.parent / row[column] if row.get(column) else None

        return cdam.Sample(
            row.get("id") or row["image"],
            self._path.parent / row["image"],
            self._target(line, row["target"]),
            wrong_target=self._target(line, row["wrong_target"]) if row.get("wrong_target") else None,
            mask=file("mask"),
            counterfactual=file("counterfactual"),
            wrong_mask=file("wrong_mask"),
        )

    def _target(self, line: int, text: str) -> cdam.Output | cdam.Concept:
        if text not in self._targets:
            self._targets[text] = self._found(line, text)
        return self._targets[text]

    def _found(self, line: int, text: str) -> cdam.Output | cdam.Concept:
        names, count = self._model.output_names, self._model.output_count
        if text in names:
            return cdam.Output(text)
        try:
            target = cdam.Output(int(text)) if re.fullmatch(r"[0-9]{1,9}", text) else parse_target(text)
        except click.BadParameter as error:
            raise self._wrong(line, error.message) from error
        match target:
            case cdam.TopK():
                raise self._wrong(line, f"{text!r} is not one target")
            case cdam.Concept():
                return self._find_concept(target)
            case cdam.Output(int(index)) if index >= count:
                raise self._wrong(line, f"{self._model.name} has {count} outputs, no output {index}")
            case cdam.Output(str(name)) if name not in names:
                raise self._wrong(line, f"no output of {self._model.name} is called {name!r}{_meant(name, names)}")
        return target

    def _wrong(self, line: int, message: str) -> click.UsageError:
        return click.UsageError(f"{self.name}, line {line}: {message}")


class _Scenes(Dataset):
    """Scenes of two digits that the demo model never saw: its target is the first, the wrong one the second."""

    kind = "demo-scenes"
    identity = kind  # a scene is a function of its seed
    everywhere = somewhere = frozenset(OPTIONAL)

    def __init__(self, name: str, model: cdam.Model) -> None:
        from cdam_server.demo.scenes import load_digits

        check_there(name)
        try:
            load_digits("test")
        except ImportError as error:
            raise click.ClickException(str(error)) from error
        if not set("0123456789") <= set(model.output_names):
            raise click.UsageError(f"{name}: for a model whose outputs are the digits; {model.name}'s are not")
        self.name = name
        self._length = int(name.partition(":")[2])

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[cdam.Sample]:
        return map(self._sample, range(SCENES_SEED, SCENES_SEED + self._length))

    @staticmethod
    def _sample(seed: int) -> cdam.Sample:
        from cdam_server.demo.scenes import draw_scene

        scene = draw_scene("test", seed, 2)
        right, wrong = scene.objects
        return cdam.Sample(
            f"scene-{seed}",
            scene.image,
            cdam.Output(str(right.label)),
            wrong_target=cdam.Output(str(wrong.label)),
            mask=right.mask,
            counterfactual=scene.without(0).image,
            wrong_mask=wrong.mask,
        )
