"""How much noise Smooth CDAM and SmoothGrad add: as much as gives the best fidelity on photographs for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.photographs.choice import Chosen, sample
from benchmarks.photographs.measuring import Measuring, Sigmas
from benchmarks.sheets import as_lists, table, together
from cdam_engine import Explainer, Method, Noise, SmoothCdam, SmoothGrad
from cdam_engine.evaluation import Fidelity, Protocol

LEVELS: Final = {
    "smooth_cdam": (0.01, 0.02, 0.05, 0.1, 0.2, 0.3),
    "smooth_grad": (0.02, 0.05, 0.1, 0.2),
}
"""Standard deviations tried, relative to the range of what noise is added to."""
IMAGES: Final = {"smooth_cdam": 100, "smooth_grad": 40}
"""Photographs for training that each method is tried on; the paper takes 200."""


def protocol(kind: str) -> Protocol:
    """The method with each standard deviation, and fidelity of few points."""
    tried: tuple[Method, ...] = (
        tuple(SmoothCdam(samples=50, noise=Noise(level)) for level in LEVELS[kind])
        if kind == "smooth_cdam"
        else tuple(SmoothGrad(samples=10, noise=Noise(level)) for level in LEVELS[kind])
    )
    return Protocol(tried, (Fidelity(points=4),))


def record(measuring: Measuring, explainer: Explainer, chosen: Chosen) -> dict[str, Any]:
    """A journal's line of a photograph.

    Raises:
        SampleError: It can't be measured.
    """
    (found,) = measuring.measure(sample(chosen, explainer.data_config))
    return {"id": chosen.id, "classes": list(chosen.classes), "values": as_lists(found)}


@dataclass(frozen=True)
class Tried:
    """What was found of a standard deviation.

    Attributes:
        level: The standard deviation.
        mean: A_LIF-MIF.
        error: Its standard error.
        photographs: How many.
    """

    level: float
    mean: float
    error: float
    photographs: int


def read(kind: str, paths: Sequence[Path]) -> list[Tried]:
    """What was found, in the order of `LEVELS`; of nothing, nothing."""
    rows = [
        [value for _, _, quantity, value, *_ in line["values"] if quantity == "a_lif_mif"] for line in together(paths)
    ]
    if not rows:
        return []
    found = np.array(rows)
    error = found.std(0, ddof=min(1, len(found) - 1)) / np.sqrt(len(found))
    return [
        Tried(level, float(mean), float(its), len(found))
        for level, mean, its in zip(LEVELS[kind], found.mean(0), error, strict=True)
    ]


def best(tried: Sequence[Tried]) -> float:
    """The standard deviation of the highest A_LIF-MIF."""
    return max(tried, key=lambda one: one.mean).level


def chosen_sigmas(results: Path, name: str) -> Sigmas:
    """Those found best.

    Raises:
        ValueError: Nothing was tried.
    """
    found = {}
    for kind in LEVELS:
        tried = read(kind, sorted(results.glob(f"{name}-sigma_{kind}-*.jsonl")))
        if not tried:
            raise ValueError(f"{results}: no {name}-sigma_{kind}-*.jsonl: run `sigma` first, or give --sigmas")
        found[kind] = best(tried)
    return Sigmas(**found)


def markdown(results: Path, name: str) -> str:
    """A table of what was tried; the best in bold."""
    parts = []
    for kind in LEVELS:
        tried = read(kind, sorted(results.glob(f"{name}-sigma_{kind}-*.jsonl")))
        if tried:
            top = best(tried)
            cells = [
                f"**{one.mean:.0f} ± {1.96 * one.error:.0f}**"
                if one.level == top
                else f"{one.mean:.0f} ± {1.96 * one.error:.0f}"
                for one in tried
            ]
            levels = [f"{one.level:g}" for one in tried]
            found = table(["sigma", *levels], [["A_LIF-MIF", *cells]])
            parts.append(f"`{kind}`, {tried[0].photographs} photographs:\n\n{found}")
    return "\n\n".join(parts)
