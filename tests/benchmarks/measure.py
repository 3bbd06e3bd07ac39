"""Turns, bars and the table.

All contestants of a row take turns in every round, the model's plain forward pass among them, so that a noisy machine
is noisy for all; who begins changes from round to round. A figure is the median over rounds of (contestant / forward
pass of the same round). Short ones are called again and again, for a tenth of a second, after a call that does not count.
"""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from cdam_engine import Explanation

OURS: Final = "cdam-serve"
FORWARD: Final = "forward"
TOLERANCE: Final = 1e-4  # of the largest score
_AT_LEAST: Final = 0.1  # seconds that a contestant runs in a round, in several calls if they are short


class SkippedError(Exception):
    """A row can't be measured here; the message says why."""


@dataclass(frozen=True)
class Contestant:
    """A way to do what a row is about.

    Attributes:
        run: Does it; returns explanations or the scores of all patches.
        same_map: Whether its map must be ours.
    """

    run: Callable[[], Any]
    same_map: bool = True


@dataclass(frozen=True)
class Bar:
    """What must be reached.

    Attributes:
        limit: At most this ratio to the forward pass; or at least this often as fast as a contestant.
        faster_than: The contestant's name.
    """

    limit: float
    faster_than: str | None = None

    def __str__(self) -> str:
        if self.faster_than is None:
            return f"<= {self.limit}"
        return f">= {self.limit:g} x as fast as {self.faster_than}"

    def value(self, ratios: Mapping[str, float]) -> float:
        """What is compared with the limit."""
        return ratios[OURS] if self.faster_than is None else ratios[self.faster_than] / ratios[OURS]

    def met(self, ratios: Mapping[str, float]) -> bool:
        """Whether it is reached."""
        value = self.value(ratios)
        return value <= self.limit if self.faster_than is None else value >= self.limit


@dataclass(frozen=True)
class Measured:
    """What came out.

    Attributes:
        forward: The plain forward pass: its median time in seconds, or its memory in bytes.
        ratios: Each contestant's ratio to it.
        rounds: How many rounds each contestant's ratio is the median of.
    """

    forward: float
    ratios: Mapping[str, float]
    rounds: Mapping[str, int] = field(default_factory=dict)


def take_turns(
    forward: Callable[[], Any],
    contestants: Mapping[str, Contestant],
    device: torch.device,
    *,
    rounds: int,
    seconds: float,
    check: bool,
) -> Measured:
    """Time the contestants, after a round that warms them up and in which their maps are compared.

    Args:
        forward: The plain forward pass.
        contestants: Who takes part, by name.
        device: Where they work.
        rounds: How many rounds at most.
        seconds: A contestant drops out after about so many; of one that needs more for a single round, the first
            round counts.
        check: Whether to compare maps.

    Raises:
        SkippedError: Maps that must be the same are not.
    """
    forward()
    everyone = {FORWARD: Contestant(forward, same_map=False), **contestants}
    firsts, results = {}, {}
    for name, contestant in everyone.items():
        firsts[name], results[name] = _time(contestant.run, device)
    if check:
        _compare({name: results[name] for name, contestant in everyone.items() if contestant.same_map})
    results.clear()
    ratios = {name: [firsts[name] / firsts[FORWARD]] for name in contestants}
    left = {name: min(rounds, int(seconds / firsts[name])) for name in contestants}
    forwards = [firsts[FORWARD]]
    for turn in range(max(left.values())):
        names = [FORWARD, *(name for name in contestants if left[name] > turn)]
        start = turn % len(names)
        took = {
            name: _time(everyone[name].run, device, again=firsts[name] < _AT_LEAST)[0]
            for name in names[start:] + names[:start]
        }
        forwards = [*forwards, took[FORWARD]] if turn else [took[FORWARD]]
        for name in names[1:]:
            ratio = took[name] / took[FORWARD]
            ratios[name] = [*ratios[name], ratio] if turn else [ratio]
    return Measured(
        statistics.median(forwards),
        {name: statistics.median(its) for name, its in ratios.items()},
        {name: len(its) for name, its in ratios.items()},
    )


def scores(result: list[Explanation] | Tensor) -> Tensor:
    """The maps of a contestant's result, one row an image: shape (B, targets * patches)."""
    if isinstance(result, Tensor):
        return result.detach().cpu().flatten(1)
    maps = [np.stack([item.scores for item in explanation.maps]) for explanation in result]
    return torch.from_numpy(np.stack(maps)).flatten(1)


def _compare(results: Mapping[str, Any]) -> None:
    maps = {name: scores(result) for name, result in results.items()}
    largest = max(float(its.abs().max()) for its in maps.values())
    for name, its in maps.items():
        off = float((its - maps[OURS]).abs().max()) / largest
        if not off <= TOLERANCE:
            raise SkippedError(f"{name} has another map, off by {off:.0e} of the largest score")


def _time(function: Callable[[], Any], device: torch.device, *, again: bool = False) -> tuple[float, Any]:
    """Seconds of a call, and what it returned; `again`: the mean of as many calls as a tenth of a second holds."""
    gc.collect()  # what others left behind is not this one's to clear away
    result = None
    if again:
        result = function()  # so that the caches of the machine are this one's, too
    _synchronise(device)
    started, calls = perf_counter(), 0
    while not calls or (again and perf_counter() - started < _AT_LEAST):
        result = function()
        calls += 1
    _synchronise(device)
    return (perf_counter() - started) / calls, result


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Report:
    """Prints a table line by line and keeps a JSON file in step with it.

    Args:
        machine: What it is measured on.
        out: Where the JSON goes.
    """

    def __init__(self, machine: Mapping[str, object], out: Path) -> None:
        self._machine, self._out = dict(machine), out
        self._rows: list[dict[str, object]] = []
        print(", ".join(f"{key} {value}" for key, value in machine.items()), "\n")
        print(f"| model | batch | what | {OURS} | must reach | met | others, ratio to the forward pass | forward |")
        print("|---|---|---|---|---|---|---|---|")

    def add(
        self,
        row: str,
        model: str,
        batch: int,
        what: str,
        bars: tuple[Bar, ...],
        measured: Measured,
        *,
        unit: str = "ms",
        note: str = "",
    ) -> None:
        """A row; every ratio is one to the forward pass."""
        ratios = measured.ratios
        others = [f"{name} {_number(ratio)}" for name, ratio in ratios.items() if name != OURS]
        forward = 1000 * measured.forward if unit == "ms" else measured.forward / 2**20
        reached = [f"{bar.value(ratios):.2f} x" for bar in bars if bar.faster_than]
        self._line(
            model,
            batch,
            what,
            "; ".join([_number(ratios[OURS]), *reached]),
            "; ".join(map(str, bars)) or "-",
            ("yes" if all(bar.met(ratios) for bar in bars) else "no") if bars else "-",
            "; ".join([*others, *([note] if note else [])]) or "-",
            f"{forward:.0f} {unit}" if forward >= 10 else f"{forward:.1f} {unit}",
        )
        self._keep(
            {
                "row": row,
                "model": model,
                "batch": batch,
                "what": what,
                "forward": measured.forward,
                "unit": "s" if unit == "ms" else "bytes",
                "ratios": {name: round(ratio, 5) for name, ratio in ratios.items()},
                "rounds": dict(measured.rounds),
                "bars": [
                    {"bar": str(bar), "value": round(bar.value(ratios), 5), "met": bar.met(ratios)} for bar in bars
                ],
                "note": note,
            }
        )

    def skip(self, row: str, model: str, batch: int, what: str, reason: str) -> None:
        """A row that was not measured."""
        self._line(model, batch, what, "-", "-", "-", f"not measured: {reason}", "-")
        self._keep({"row": row, "model": model, "batch": batch, "what": what, "skipped": reason})

    def _line(self, *cells: object) -> None:
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)

    def _keep(self, row: dict[str, object]) -> None:
        self._rows.append(row)
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._out.write_text(json.dumps({"machine": self._machine, "rows": self._rows}, indent=2) + "\n")


def _number(ratio: float) -> str:
    return f"{ratio:.4f}" if ratio < 0.1 else f"{ratio:.3f}" if ratio < 2 else f"{ratio:.1f}"
