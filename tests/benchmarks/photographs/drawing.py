"""The document's figures: curves, and maps without the photographs, which may not be passed on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.photographs.reading import GEOMETRY, Part, Record
from benchmarks.sheets import draw_curves

_METHODS: Final = ("cdam", "smooth_cdam", "integrated_cdam", "attention", "relevance_propagation", "input_x_gradient")
_PHOTOGRAPHS: Final = 4


def draw(part: Part | None, folder: Path) -> list[Path]:
    """Both figures of X_multi, as PNG; maps of the first photographs whose classes the model sees both, if there are any."""
    if part is None:
        return []
    import matplotlib as mpl

    mpl.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    curves = draw_curves(part.results(), part.curves(), "the right class", folder / "photos_curves.png")
    shown = [record for record in part.records if record.right.min() > 0][:_PHOTOGRAPHS]
    return [curves, _draw_maps(part, shown, folder / "photos_maps.png")] if shown else [curves]


def _draw_maps(part: Part, shown: Sequence[Record], path: Path) -> Path:
    """Of some photographs: maps of every class, the own mask's outline and the other's."""
    from matplotlib import pyplot as plt

    turns = [(record, turn) for record in shown for turn in record.turns]
    figure, axes = plt.subplots(
        len(turns), len(_METHODS), figsize=(1.5 * len(_METHODS), 1.5 * len(turns)), layout="constrained", squeeze=False
    )
    for row, (record, turn) in zip(axes, turns, strict=True):
        for axis, method in zip(row, _METHODS, strict=True):
            _draw_map(axis, record, method, turn)
        row[0].set_ylabel(part.header["classes"][record.classes[turn]], fontsize=8)
    for axis, method in zip(axes[0], _METHODS, strict=True):
        axis.set_title(method.replace("_", " "), fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


def _draw_map(axis: Any, record: Record, method: str, turn: int) -> None:
    scores = record.maps[method][turn]
    size = np.abs(scores).max()
    down, across = GEOMETRY.input_size
    axis.imshow(scores, cmap="RdBu_r", vmin=-size, vmax=size, extent=(0, across, down, 0), interpolation="nearest")
    for other, style in ((turn, "solid"), (1 - turn, "dotted")):
        axis.contour(record.masks[other], levels=[0.5], colors="black", linewidths=0.8, linestyles=style)
    axis.set(xticks=[], yticks=[])
