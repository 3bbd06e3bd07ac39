"""From journals back to numbers: outputs and maps of every test nodule, and what lies in a nodule's regions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.lung.measuring import METHODS, OUTPUTS
from benchmarks.lung.regions import GRID, Regions, disc, outline, regions
from benchmarks.sheets import decode, header_of, lines
from benchmarks.verdicts import Estimate, estimate, mean
from real.lidc import SIDE

Floats = NDArray[np.float64]

ANCHORS: Final = ("disc", "inverted disc", "ring", "random")
"""Maps that know no model: the share of each patch in the disc, outside it, within a patch of its edge, and noise."""


@dataclass(frozen=True, eq=False)
class Record:
    """What a journal has of a nodule.

    Attributes:
        nodule: Its row in the data.
        seed: Of the split.
        scan: What scan it is in.
        radius: Of the disc, in pixels of the crop.
        truth: Ratings, diameter in mm, and whether malignant, (outputs,).
        mean_malignancy: The rating, 1 to 5.
        outputs: The model's, (outputs,).
        untuned: Likewise, of the linear heads on the untuned backbone.
        maps: By method, (outputs, h, w).
        blurred: By method, the logit of malignancy without the evidence inside the disc, and without the counter-evidence.
        removed: Likewise, not blurred but replaced; None: not measured.
        bright: What is above the threshold and hangs together with the middle, (32, 32); None: the middle is not.
    """

    nodule: int
    seed: int
    scan: int
    radius: float
    truth: Floats
    mean_malignancy: float
    outputs: Floats
    untuned: Floats
    maps: Mapping[str, NDArray[np.float32]]
    blurred: Mapping[str, Sequence[float]]
    removed: Mapping[str, Sequence[float]] | None
    bright: NDArray[np.bool_] | None

    @classmethod
    def of(cls, line: Mapping[str, Any], seed: int, removed: Mapping[str, Sequence[float]] | None = None) -> Record:
        """The record of a journal's line, and maybe of what `remove` found."""
        row, bits = int(line["id"]), line["bright"]
        maps = {name: decode(text).reshape(-1, GRID, GRID) for name, text in line["maps"].items()}
        return cls(
            row,
            seed,
            line["scan"],
            line["radius"],
            np.array(line["truth"]),
            line["mean_malignancy"],
            np.array(line["outputs"]),
            np.array(line["untuned"]),
            {**maps, **_anchors(row, line["radius"])},
            line["blurred"],
            removed,
            None if bits is None else unpacked(bits),
        )

    @cached_property
    def of_disc(self) -> Regions:
        """By the disc."""
        return regions(disc(self.radius))

    @cached_property
    def of_outline(self) -> Regions | None:
        """By what is bright; None if nothing is."""
        return None if self.bright is None else regions(outline(self.bright))

    def map(self, method: str, output: str) -> Floats:
        """Scores relative to their mean size over the patches."""
        scores = self.maps[method][OUTPUTS.index(output)].astype(np.float64)
        return relative(scores)


def relative(scores: Floats) -> Floats:
    """Scores relative to their mean size; those of a map that is 0 everywhere are."""
    size = np.abs(scores).mean()
    return scores / size if size else scores


def unpacked(bits: str) -> NDArray[np.bool_]:
    """A mask (32, 32) of a journal."""
    flat = np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8), count=SIDE * SIDE)
    return flat.reshape(SIDE, SIDE).astype(bool)


def _anchors(row: int, radius: float) -> dict[str, NDArray[np.float32]]:
    its = regions(disc(radius))
    noise = np.random.default_rng(row).standard_normal((GRID, GRID))
    found = zip(ANCHORS, (its.inside, 1 - its.inside, its.rim, noise), strict=True)
    return {name: np.broadcast_to(scores, (len(OUTPUTS), GRID, GRID)).astype(np.float32) for name, scores in found}


def average(scores: Floats, shares: Floats) -> float:
    """The mean of a map over a region, by each patch's share in it."""
    return float((scores * shares).sum() / shares.sum())


Value = Callable[[Record], float]


@dataclass(frozen=True, eq=False)
class Part:
    """Test nodules of all seeds; a nodule that is in the test of several counts in each, with that seed's model.

    Attributes:
        headers: The journals', by seed.
        records: Of every nodule.
    """

    headers: Mapping[int, Mapping[str, Any]]
    records: Sequence[Record]

    @property
    def methods(self) -> list[str]:
        """What is compared."""
        return [method.kind for method in METHODS]

    def where(self, kept: Callable[[Record], bool]) -> Part:
        """Those of which something is true."""
        return Part(self.headers, [record for record in self.records if kept(record)])

    def values(self, value: Value) -> Floats:
        """A number of every nodule, (records,)."""
        return np.array([value(record) for record in self.records])

    def mean(self, value: Value) -> Estimate:
        """Its mean; scans are what is resampled."""
        return mean(self.values(value), self.scans)

    def estimate(self, value: Callable[[Record], Sequence[float]], statistic: Callable[[Floats], float]) -> Estimate:
        """A statistic of several numbers of every nodule, (records, numbers); scans are what is resampled."""
        rows = np.array([value(record) for record in self.records])
        return estimate(rows, statistic, self.scans)

    @property
    def scans(self) -> NDArray[np.int64]:
        """Of each record."""
        return np.array([record.scan for record in self.records])

    @property
    def count(self) -> str:
        """How many, in words."""
        return f"{len(self.records)} ({len({record.nodule for record in self.records})} nodules)"


def read(folder: Path) -> Part | None:
    """All journals of a folder; None if there is none.

    Raises:
        ValueError: They are of different protocols.
    """
    paths = sorted(folder.glob("seed*.jsonl"))
    headers = {path: header_of(path) for path in paths}
    for path, header in headers.items():
        for key in ("protocol", "trained"):
            if header[key] != headers[paths[0]][key]:
                raise ValueError(f"{path}: of another {key} than {paths[0]}: remove one of them")
    records = []
    for path, header in headers.items():
        removed = _removed(folder / f"removed{header['seed']}.jsonl", header["model"])
        records += [Record.of(line, header["seed"], removed.get(line["id"])) for line in lines(path)]
    return Part({header["seed"]: header for header in headers.values()}, records) if records else None


def _removed(path: Path, model: str) -> dict[str, Mapping[str, Sequence[float]]]:
    if not path.exists():
        return {}
    if header_of(path)["model"] != model:
        raise ValueError(f"{path}: of another model than the maps: remove it, and run `remove` again")
    return {line["id"]: line["logits"] for line in lines(path)}


def has_rim(record: Record) -> bool:
    """By the disc."""
    return record.of_disc.has_rim


def has_outside(record: Record) -> bool:
    """Whether two patches or more lie more than a patch from the disc."""
    return bool(record.of_disc.outside.sum() >= 2)
