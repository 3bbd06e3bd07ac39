"""From journals back to numbers: values of every photograph, its maps, and metrics that take no more passes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import kendalltau

from benchmarks.photographs.maps import Recorded
from benchmarks.photographs.measuring import BOXES, decode_mask
from benchmarks.sheets import Curve, Results, common_header, decode, mean_curves, together
from benchmarks.verdicts import Estimate, Floats, estimate
from cdam.statistics import PEAKED, Statistics
from cdam_engine import Output
from cdam_engine.evaluation import Anchor, BoxSensitivity, Metric, Sample
from cdam_engine.evaluation.geometry import Geometry
from cdam_engine.evaluation.perturbation import MapOf
from cdam_engine.evaluation.subject import Subject
from cdam_engine.families import Grid
from real.backbone import INPUT

GEOMETRY: Final = Geometry(INPUT, (14, 14), Grid(16, 16))
_SEED: Final = 0  # of the protocols
_DISCRIMINATION: Final = 7  # index of the metric in the protocol of X_multi

Key = tuple[str, int, str]
"""Method's name, index of the metric, quantity."""


@dataclass(frozen=True, eq=False)
class Record:
    """What a journal has of a photograph.

    Attributes:
        id: The photograph's name.
        classes: Those that took their turn as the right one.
        logits: Of all classes, (C,).
        values: Of each turn.
        curves: Likewise, of the values that have one: abscissae and ordinates.
        maps: By name: of each turn, (turns, h, w).
        boxes: The right class's logit of the photograph and of its variations with a box, (turns, 1 + boxes).
        norms: Of the patches' tokens where they enter the last block, (h * w,).
        masks: Where the right class is, (turns, H, W).
    """

    id: str
    classes: tuple[int, ...]
    logits: Floats
    values: Sequence[Mapping[Key, float]]
    curves: Sequence[Mapping[Key, Any]]
    maps: Mapping[str, NDArray[np.float32]]
    boxes: NDArray[np.float32]
    norms: NDArray[np.float32]
    masks: NDArray[np.bool_]

    @property
    def turns(self) -> range:
        """How often a class took its turn as the right one."""
        return range(len(self.classes))

    @property
    def right(self) -> Floats:
        """The right class's logit of each turn."""
        return self.logits[list(self.classes)]

    @classmethod
    def of(cls, line: Mapping[str, Any], names: Sequence[str]) -> Record:
        """The record of a journal's line."""
        return cls(
            line["id"],
            tuple(line["classes"]),
            np.array(line["logits"]),
            [{(names[m], k, q): value for m, k, q, value, *_ in turn} for turn in line["values"]],
            [{(names[m], k, q): curve[0] for m, k, q, _, *curve in turn if curve} for turn in line["values"]],
            {
                name: np.stack([decode(its) for its in found]).reshape(-1, *GEOMETRY.grid)
                for name, found in line["maps"].items()
            },
            np.stack([decode(its) for its in line["boxes"]]),
            decode(line["norms"]),
            np.stack([decode_mask(its, INPUT) for its in line["masks"]]),
        )

    def measured(
        self, metric: Metric, turn: int, scores: NDArray[np.float32], boxes: BoxSensitivity = BOXES
    ) -> dict[str, float]:
        """A metric that asks the model about no more than boxes, of any map of a turn.

        Args:
            metric: The metric.
            turn: The turn.
            scores: The map, (h, w).
            boxes: The boxes that the model was asked about.
        """
        sample = Sample(self.id, torch.empty(0), Output(0), mask=self.masks[turn])
        subject = Subject(sample, GEOMETRY, torch.empty(0), frozenset())
        its = MapOf(Recorded())
        subject.maps[its] = scores
        asked = boxes.images_of_sample(_SEED, self.id, GEOMETRY)
        answers = torch.from_numpy(self.boxes[turn].astype(np.float64))[:, None]
        subject.answer(asked, answers, answers)
        return {quantity: found.value for quantity, found in metric.measure(its, _SEED, subject).items()}


Turns = Callable[[Record], Sequence[int]]
"""Which turns of a photograph count."""


def every(record: Record) -> Sequence[int]:
    """All."""
    return record.turns


def sure(record: Record) -> Sequence[int]:
    """Those whose right class the model sees: its logit is positive."""
    return [turn for turn in record.turns if record.right[turn] > 0]


def stronger(record: Record) -> Sequence[int]:
    """The one whose right class has the larger logit."""
    return [int(np.argmax(record.right))]


@dataclass(frozen=True, eq=False)
class Part:
    """What was measured of a part.

    Attributes:
        header: The journals'.
        records: Of every photograph.
        turns: Which turns count.
    """

    header: Mapping[str, Any]
    records: Sequence[Record]
    turns: Turns = every

    @property
    def names(self) -> list[str]:
        """Of all that is compared."""
        return list(self.header["methods"])

    @cached_property
    def kept(self) -> list[Record]:
        """Photographs of which a turn counts."""
        return [record for record in self.records if len(self.turns(record))]

    def column(self, *key: Any) -> Floats:
        """A quantity of every photograph, the mean over its turns, (photographs,)."""
        return np.array([np.mean([record.values[turn][key] for turn in self.turns(record)]) for record in self.kept])

    def columns(self, methods: Sequence[str], metric: int, quantity: str) -> Floats:
        """Likewise of several methods, (photographs, methods)."""
        return np.stack([self.column(method, metric, quantity) for method in methods], axis=1)

    def peak(self, method: str, metric: int) -> Estimate:
        """MaxBoxAcc: of the mean curve over photographs, each the mean over its turns, the maximum."""
        key = (method, metric, PEAKED)
        rows = [np.mean([np.array(record.curves[k][key])[1] for k in self.turns(record)], 0) for record in self.kept]
        return estimate(np.array(rows), lambda its: float(its.mean(0).max()))

    def results(self) -> Results:
        """Means and intervals for tables."""
        names = self.names
        statistics = Statistics(len(names))
        for record in self.kept:
            turns = [record.values[turn] for turn in self.turns(record)]
            rows = [
                (names.index(name), metric, quantity, float(np.mean([its[name, metric, quantity] for its in turns])))
                for name, metric, quantity in turns[0]
                if quantity != PEAKED  # its curve is of hits, and the mean over turns is none
            ]
            statistics.add(record.id, rows)
        anchors = [anchor.value for anchor in Anchor]
        return Results([n for n in names if n not in anchors], [n for n in names if n in anchors], statistics.table())

    def curves(self) -> dict[Curve, Floats]:
        """Mean curves, for the figure."""
        found: dict[Curve, list[Any]] = defaultdict(list)
        for record in self.kept:
            for turn in self.turns(record):
                for (name, metric, quantity), curve in record.curves[turn].items():
                    found[self.names.index(name), metric, quantity].append(curve)
        return mean_curves(found)


def by_pixel(part: Part, paths: Sequence[Path], scores: str = "pixels") -> Part | None:
    """The part with the methods that differentiate for pixels as `photos.py pixels` measured them; None if it did not.

    What it did not measure of them is left out.

    Args:
        part: X_multi.
        paths: The journals of `photos.py pixels`.
        scores: "pixels", or "patches": their sums over patches.

    Raises:
        ValueError: They do not belong together.
    """
    found = {line["id"]: line[scores] for line in together(paths)}
    kept = [record for record in part.records if record.id in found]
    if not kept:
        return None
    header = common_header(paths)
    if header["model"] != part.header["model"]:
        raise ValueError(f"{paths[0]}: of another model than the rest")
    names, places = header["methods"], (0, 1, 2, _DISCRIMINATION)  # where this part has the metrics of those journals
    records = []
    for record in kept:
        values = [
            {key: value for key, value in old.items() if key[0] not in names}
            | {(names[m], places[k], q): value for m, k, q, value, *_ in new}
            for old, new in zip(record.values, found[record.id], strict=True)
        ]
        records.append(replace(record, values=values))
    return Part(part.header, records, part.turns)


def read(paths: Sequence[Path], turns: Turns = every) -> Part | None:
    """A part's journals; None if there is none.

    Raises:
        ValueError: They do not belong together.
    """
    found = together(paths)
    header = common_header(paths)
    return Part(header, [Record.of(line, header["methods"]) for line in found], turns) if found else None


def order(rows: Floats, published: Sequence[float]) -> Estimate:
    """Kendall's tau-b of the methods' means, of rows (photographs, methods), with what a paper has."""
    return estimate(rows, lambda its: tau(its.mean(0), published))


def tau(ours: Floats | Sequence[float], theirs: Floats | Sequence[float]) -> float:
    """Kendall's tau-b; 0 where one side is all equal, so that there is no order."""
    if len(set(map(float, ours))) < 2 or len(set(map(float, theirs))) < 2:
        return 0.0
    return float(kendalltau(ours, theirs).statistic)
