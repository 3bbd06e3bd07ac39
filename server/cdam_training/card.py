"""The card of a training: one JSON file beside the weights that says what they are, and how to have them again.

Keys are sorted and numbers are written in full: two cards of the same training differ in its time alone. Of paths only
the last part is written.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final

import numpy as np

from cdam_server.settings.specs import FOLDER, Task
from cdam_training.datasets import Dataset
from cdam_training.metrics import Scores
from cdam_training.splits import Splits

SCHEMA_VERSION: Final = 1
"""Of the file; another one whenever a field goes or means something else."""

_PACKAGES: Final = ("cdam-serve", "numpy", "scikit-learn", "timm", "torch")


def installed_versions() -> dict[str, str | None]:
    """Of Python and the packages that compute; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


@dataclass(frozen=True)
class ModelPart:
    """The model that was trained.

    Attributes:
        name: As it is asked for.
        architecture: As its settings have it.
        fingerprint: Of the backbone before the training.
        trained_fingerprint: Of the whole model after it; empty: not known.
        trained: What was trained, such as ``head`` or ``head and the last 2 blocks``.
        blocks_trained: How many of the last blocks.
        parameters_trained: How many numbers.
    """

    name: str
    architecture: str
    fingerprint: str
    trained_fingerprint: str = ""
    trained: str = "head"
    blocks_trained: int = 0
    parameters_trained: int = 0


@dataclass(frozen=True)
class SidePart:
    """One side of the split.

    Attributes:
        rows: How many.
        clusters: How many groups; without groups rows, copies taken together.
        examples: How many there are of each class; of labels the positive ones. Empty for a regression.
        values: Of a regression's outputs: mean, standard deviation (of the rows, not an estimate), least and largest.
    """

    rows: int
    clusters: int
    examples: Mapping[str, int] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class DataPart:
    """What it was trained on.

    Attributes:
        name: The file's or folder's own name.
        kind: ``folder``, ``csv`` or ``jsonl``.
        digest: As of `Dataset`.
        rows: How many.
        group_by: The column of the groups.
        split: How the rows came to their sides.
        split_seed: Of what was drawn; None: nothing was.
        shares: Of the sides that were drawn, the share that was asked for.
        sides: By name: train, validation, test; those that have rows.
        notes: As of `Dataset`.
    """

    name: str
    kind: str
    digest: str
    rows: int
    group_by: str | None
    split: str
    split_seed: int | None
    shares: Mapping[str, float]
    sides: Mapping[str, SidePart]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Card:
    """All of it.

    Attributes:
        task: What the outputs mean.
        outputs: Their names.
        model: What was trained.
        data: On what.
        recipe: Every option with the value that it had, defaults included.
        curve: For each epoch what was followed: losses, the learning rate, a score.
        metrics: By side of the split.
        started: When, in UTC.
        seconds: How long the run took that finished it.
        notes: What its user should look at.
        versions: Of Python and the packages that compute.
    """

    task: Task
    outputs: Sequence[str]
    model: ModelPart
    data: DataPart
    recipe: Mapping[str, Any]
    curve: Sequence[Mapping[str, Any]]
    metrics: Mapping[str, Scores]
    started: datetime
    seconds: float
    notes: Sequence[str] = ()
    versions: Mapping[str, str | None] = field(default_factory=installed_versions)

    def to_json(self) -> str:
        """The file's text.

        Raises:
            ValueError: A number is not finite, or something is of a type that JSON has not; the message names its place.
        """
        content = {"schema_version": SCHEMA_VERSION, **_plain(self, "card")}
        content["model"] = _public(content["model"])
        content["recipe"] = _public(content["recipe"])
        return json.dumps(content, ensure_ascii=False, indent=2, sort_keys=True, allow_nan=False) + "\n"


def write_card(card: Card, path: Path) -> None:
    """Write a card; the file is there as a whole or not at all.

    Raises:
        ValueError: As of `Card.to_json`.
        OSError: It can't be written.
    """
    text = card.to_json()
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def data_part(dataset: Dataset, splits: Splits) -> DataPart:
    """What a card says of a dataset and how it was divided."""
    return DataPart(
        name=dataset.name,
        kind=dataset.kind,
        digest=dataset.digest,
        rows=len(dataset),
        group_by=dataset.group_by,
        split=splits.how,
        split_seed=splits.seed,
        shares={str(split): share for split, share in splits.shares.items()},
        sides={split: _side(dataset, indices) for split, indices in splits.items()},
        notes=dataset.notes,
    )


def now() -> datetime:
    """The time, in UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0)


def _side(dataset: Dataset, indices: Any) -> SidePart:
    targets = dataset.targets(indices)
    clusters = len(np.unique(dataset.clusters(indices)))
    match dataset.task:
        case Task.MULTI_CLASS:
            counts = np.bincount(targets, minlength=len(dataset.outputs))
        case Task.MULTI_LABEL | Task.BINARY:
            counts = (targets > 0).sum(0)
        case Task.REGRESSION:
            return SidePart(len(indices), clusters, values=_summary(dataset.outputs, targets.astype(np.float64)))
    return SidePart(len(indices), clusters, dict(zip(dataset.outputs, counts.tolist(), strict=True)))


def _summary(outputs: Sequence[str], targets: Any) -> dict[str, dict[str, float]]:
    parts = {"mean": targets.mean(0), "std": targets.std(0), "min": targets.min(0), "max": targets.max(0)}
    return {
        output: {name: float(values[index]) for name, values in parts.items()} for index, output in enumerate(outputs)
    }


def _plain(value: Any, where: str) -> Any:
    """In JSON's types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {part.name: _plain(getattr(value, part.name), f"{where}.{part.name}") for part in fields}
    return _leaf(value, where)


def _leaf(value: Any, where: str) -> str | int | float | None:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Path):
        value = value.name
    if isinstance(value, datetime):
        value = value.astimezone(UTC).isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}, which JSON has not")
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"{where} is a {type(value).__name__}, which JSON has not")


def _public(value: Any) -> Any:
    """Without the folders of absolute paths, which say who trained and where."""
    match value:
        case dict():
            return {key: _public(item) for key, item in value.items()}
        case list():
            return [_public(item) for item in value]
        case str():
            prefix = FOLDER if value.startswith(FOLDER) else ""
            path = value.removeprefix(prefix)
            if PurePosixPath(path).is_absolute() or path.startswith("~"):
                return prefix + PurePosixPath(path).name
            if PureWindowsPath(path).is_absolute():
                return prefix + PureWindowsPath(path).name
    return value
