"""The document's figures: maps beside the paper's figures 12 and 13 in form, without the crops, and scores by distance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.lung.measuring import BEFORE, MALIGNANCY, OUTPUTS
from benchmarks.lung.reading import Floats, Part, Record, has_rim
from benchmarks.lung.regions import CENTRE, GRID, PATCH, disc
from benchmarks.sheets import FAMILY
from real.lidc import BIOMARKERS, SIDE

_METHODS: Final = ("attention", "cdam", "smooth_cdam", "integrated_cdam", "relevance_propagation")
_PROFILES: Final = ("cdam", "integrated_cdam", "relevance_propagation", "attention", BEFORE)
_BINS: Final = np.arange(-5.0, 6.5, 1.0)
"""Patches from the disc's edge, negative inside."""
_COLOURS: Final = ("#0b3c6f", "#5b9bd5", "#ffffff", "#f4a04c", "#a34700")
"""Against, and for: as in the paper blue and orange."""


def draw(part: Part, folder: Path) -> list[Path]:
    """All figures, as PNG."""
    import matplotlib as mpl

    mpl.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    shown = chosen(part)
    return [
        _draw_malignancy(shown, folder / "nodules_malignancy.png"),
        _draw_biomarkers(shown, folder / "nodules_biomarkers.png"),
        _draw_profiles(part, folder / "nodules_profiles.png"),
    ]


def chosen(part: Part, each: int = 3) -> list[Record]:
    """Of the first seed, the first malignant and benign nodules of an order drawn by seed that have a rim and that the model tells."""
    first = min(part.headers)
    its = [record for record in part.records if record.seed == first and has_rim(record)]
    drawn = [its[place] for place in np.random.default_rng(0).permutation(len(its))]
    right = [record for record in drawn if (record.outputs[MALIGNANCY] > 0) == (record.truth[MALIGNANCY] > 0)]
    return [record for kind in (1, 0) for record in [one for one in right if one.truth[MALIGNANCY] == kind][:each]]


def _draw_malignancy(shown: Sequence[Record], path: Path) -> Path:
    figure, axes = _grid(len(shown), len(_METHODS), 1.55)
    for row, record in zip(axes, shown, strict=True):
        for axis, method in zip(row, _METHODS, strict=True):
            _draw_map(axis, record, record.map(method, "malignancy"))
        kind = "malignant" if record.truth[MALIGNANCY] else "benign"
        row[0].set_ylabel(f"{kind}, {_diameter(record)}\nlogit {record.outputs[MALIGNANCY]:+.1f}", fontsize=9)
    for axis, method in zip(axes[0], _METHODS, strict=True):
        axis.set_title(_titled(method).replace(" p", "\np"), fontsize=10)
    return _save(figure, path)


def _draw_biomarkers(shown: Sequence[Record], path: Path) -> Path:
    figure, axes = _grid(len(shown), len(BIOMARKERS), 1.35)
    for row, record in zip(axes, shown, strict=True):
        for index, (axis, name) in enumerate(zip(row, BIOMARKERS, strict=True)):
            _draw_map(axis, record, record.map("cdam", name))
            axis.set_xlabel(f"{record.outputs[index]:.1f}; rated {record.truth[index]:.1f}", fontsize=7.5, labelpad=2)
        kind = "malignant" if record.truth[MALIGNANCY] else "benign"
        row[0].set_ylabel(f"{kind}\n{_diameter(record)}", fontsize=9)
    for axis, name in zip(axes[0], BIOMARKERS, strict=True):
        axis.set_title(name, fontsize=10)
    return _save(figure, path)


def _diameter(record: Record) -> str:
    return f"{record.truth[BIOMARKERS.index('diameter')]:.0f} mm"


def _titled(method: str) -> str:
    return (
        method.replace("_", " ").replace("cdam", "CDAM").replace("smooth", "Smooth").replace("integrated", "Integrated")
    )


def _grid(rows: int, columns: int, side: float) -> tuple[Any, Any]:
    from matplotlib import pyplot as plt

    return plt.subplots(
        rows, columns, figsize=(side * columns + 0.5, side * rows + 0.3), layout="constrained", squeeze=False
    )


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def _draw_map(axis: Any, record: Record, scores: Floats) -> None:
    """Scores on a scale of their own, up to the 99th percentile of sizes; the disc dashed, what is bright solid."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Circle

    size = float(np.quantile(np.abs(scores), 0.99))
    colours = LinearSegmentedColormap.from_list("evidence", _COLOURS)
    axis.imshow(scores, cmap=colours, vmin=-size, vmax=size, extent=(0, SIDE, SIDE, 0), interpolation="nearest")
    axis.add_patch(Circle((CENTRE, CENTRE), record.radius, fill=False, color="#333333", lw=0.9, ls=(0, (3, 2))))
    if record.bright is not None:
        middles = np.arange(SIDE) + 0.5
        axis.contour(middles, middles, record.bright, levels=[0.5], colors="black", linewidths=0.9)
    axis.set(xticks=[], yticks=[], xlim=(0, SIDE), ylim=(SIDE, 0))


def profile(record: Record, scores: Floats) -> Floats:
    """The mean score of patches by the distance of their middles from the disc's edge, (bins,); NaN where there are none."""
    middles = (np.arange(GRID) + 0.5) * PATCH
    distance = disc(record.radius)(*np.meshgrid(middles, middles, indexing="ij")) / PATCH
    place = np.digitize(distance.ravel(), _BINS) - 1
    inside = (place >= 0) & (place < len(_BINS) - 1)
    sums, counts = (np.bincount(place[inside], weights, len(_BINS) - 1) for weights in (scores.ravel()[inside], None))
    found: Floats = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
    return found


def _draw_profiles(part: Part, path: Path) -> Path:
    from matplotlib import pyplot as plt

    its = part.where(has_rim).records
    x = (_BINS[:-1] + _BINS[1:]) / 2
    figure, axes = plt.subplots(3, 3, figsize=(11, 8.4), layout="constrained", sharex=True, sharey=True)
    for axis, output in zip(axes.ravel(), OUTPUTS, strict=True):
        axis.axvspan(-1, 1, color="#eeeeee", lw=0)
        axis.axhline(0, color="#888888", lw=0.8)
        for method in _PROFILES:
            rows = np.array([profile(record, record.map(method, output)) for record in its])
            there = (~np.isnan(rows)).sum(0)
            kept = there >= 20
            mean, error = np.nanmean(rows[:, kept], 0), np.nanstd(rows[:, kept], 0) / np.sqrt(there[kept])
            colour, style = FAMILY[method.split(",", maxsplit=1)[0]], "--" if method == BEFORE else "-"
            axis.plot(x[kept], mean, color=colour, ls=style, lw=1.8, label=_titled(method))
            axis.fill_between(x[kept], mean - 1.96 * error, mean + 1.96 * error, color=colour, alpha=0.15, lw=0)
        axis.set_yscale("symlog", linthresh=1, linscale=1)
        axis.set_yticks([-10, -3, -1, 0, 1, 3, 10], ["-10", "-3", "-1", "0", "1", "3", "10"])
        axis.set_title(output, fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("patches from the disc's edge")
    for axis in axes[:, 0]:
        axis.set_ylabel("score / mean size of scores")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return _save(figure, path)
