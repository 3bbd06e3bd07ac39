"""The document's tables from the journals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy.stats import spearmanr

from benchmarks import published
from benchmarks.photographs import claims, drawing, high_norms, sigmas
from benchmarks.photographs.concepts import KINDS
from benchmarks.photographs.measuring import AGREEMENT, BOXES, decode_mask
from benchmarks.photographs.reading import (
    GEOMETRY,
    Part,
    Record,
    by_pixel,
    every,
    order,
    read,
    stronger,
    sure,
    tau,
)
from benchmarks.sheets import Column, decode, header_of, insert, markdown, table, together
from benchmarks.verdicts import Estimate, Floats, claims_table, estimate, mean
from real.backbone import INPUT

DOCUMENT: Final = Path("docs/benchmarks/photos.md")
IMAGES: Final = Path("docs/images")

_AGREEMENT: Final = 5
_LOCALISATION: Final = 6
_CORRECT: Final = (
    Column("A_MIF", 0, "a_mif", -1, 0, published.A_MIF),
    Column("A_LIF", 0, "a_lif", 1, 0, published.A_LIF),
    Column("A_LIF-MIF", 0, "a_lif_mif", 1, 0, published.A_LIF_MIF),
    Column("box: mean r", 1, "box_mean", 1, 2, published.A_BOX),
)
_SINGLE: Final = (
    Column("A_MIF", 0, "a_mif", -1, 0, published.VAL_A_MIF),
    Column("A_LIF", 0, "a_lif", 1, 0, published.VAL_A_LIF),
    Column("A_LIF-MIF", 0, "a_lif_mif", 1, 0, published.VAL_A_LIF_MIF),
    Column("box: mean r", 1, "box_mean", 1, 2, published.VAL_A_BOX),
)
_DISCRIMINATING: Final = (
    Column("delta A_LIF-MIF", 7, "delta_a_lif_mif", 1, 0, published.DELTA_A_LIF_MIF),
    Column("delta box: mean r", 7, "delta_box_mean", 1, 2, published.DELTA_A_BOX),
    Column("delta A_MIF", 7, "delta_a_mif", -1, 0),
    Column("delta A_LIF", 7, "delta_a_lif", 1, 0),
)
_COMPACT: Final = (
    Column("signed", 2, "compactness", 1, 2, published.COMPACTNESS),
    Column("absolute", 3, "compactness", 1),
    Column("Gini", 4, "gini", 1),
)
_MASKS: Final = (
    Column("energy", _AGREEMENT, "energy", 1),
    Column("pointing game", _AGREEMENT, "pointing_game", 1),
    Column("AUROC", _AGREEMENT, "auroc", 1),
    Column("patch IoU", _AGREEMENT, "patch_iou", 1),
)
_FOUND: Final = (
    Column("CorLoc", _LOCALISATION, "corloc", 1),
    Column("IoU of the box", _LOCALISATION, "box_iou", 1),
    Column("pixel AP", _LOCALISATION, "pixel_ap", 1),
)
_SHEETS: Final[Mapping[str, tuple[str, tuple[Column, ...]]]] = {
    "correctness": ("multi", _CORRECT),
    "class_discrimination": ("multi", _DISCRIMINATING),
    "compactness": ("multi", _COMPACT),
    "masks": ("multi", _MASKS),
    "localisation": ("multi", _FOUND),
    "single": ("single", _SINGLE),
    "single_localisation": ("single", _FOUND),
    "single_masks": ("single", _MASKS),
}
_ORDERED: Final = (
    ("table 1, compactness", "multi", _COMPACT[0]),
    *((f"table 2, {column.title}", "multi", column) for column in _CORRECT),
    *((f"table 3, {column.title}", "multi", column) for column in _DISCRIMINATING[:2]),
    *((f"table S1, {column.title}", "single", column) for column in _SINGLE),
)
_SHOWN: Final = ("cdam", "smooth_cdam", "integrated_cdam", "relevance_propagation", "attention")


def report(results: Path, name: str, *, write: bool) -> Iterator[str]:
    """All tables, to be printed; put into the document, too, if asked for."""
    parts = _parts(results, name)
    blocks = dict(_blocks(results, name, parts))
    for title, block in blocks.items():
        yield f"\n{title}: {block}"
    if write:
        DOCUMENT.write_text(insert(DOCUMENT.read_text(), blocks))
        for path in drawing.draw(parts.get("multi"), IMAGES):
            yield f"wrote {path}"


def _blocks(results: Path, name: str, parts: Mapping[str, Part]) -> Iterator[tuple[str, str]]:
    if parts:
        yield "model", _model(results, name, parts)
    for sheet, (part, columns) in _SHEETS.items():
        if part in parts:
            its = parts[part]
            yield sheet, f"{len(its.kept)} photographs:\n\n{markdown(its.results(), columns)}"
    if parts:
        yield "peaks", _peaks(parts)
    seeds = sorted({path.name.split("-")[0] for path in results.glob("*-multi-*.jsonl")} - {name})
    others = {seed: _parts(results, seed) for seed in seeds}
    if parts:
        yield from _against_the_paper(results, name, parts, others)
    if "multi" in parts:
        its = parts["multi"]
        yield "choices", _choices(its)
        yield "classes", _classes(its)
        yield "high_norms", _high_norms(its)
        yield "attention", _attention(its)
        yield "unnormalised", _unnormalised(its)
    paths = sorted(results.glob(f"{name}-concepts-*.jsonl"))
    if paths:
        yield "concepts", _concepts(paths)
    if text := sigmas.markdown(results, name):
        yield "sigmas", text
    models = {seed: its["multi"] for seed, its in {name: parts, **others}.items() if "multi" in its}
    if len(models) > 1:
        yield "seeds", _seeds(models)


def _against_the_paper(
    results: Path, name: str, parts: Mapping[str, Part], others: Mapping[str, Mapping[str, Part]]
) -> Iterator[tuple[str, str]]:
    """Pixels are ranked as there, where they were measured; of the other models sums over patches."""
    pixels = sorted(results.glob(f"{name}-pixels-*.jsonl"))
    ranked = by_pixel(parts["multi"], pixels) if "multi" in parts and pixels else None
    held = {seed: list(claims.every_claim(its.get("multi"), its.get("single"))) for seed, its in others.items()}
    yield "claims", claims_table(list(claims.every_claim(ranked or parts.get("multi"), parts.get("single"))), held)
    yield "orders", _orders(parts, ranked)
    if ranked is not None:
        yield "pixels", _pixels(parts["multi"], ranked, pixels)


def _parts(results: Path, name: str) -> dict[str, Part]:
    """What was measured of a model."""
    found = {part: read(sorted(results.glob(f"{name}-{part}-*.jsonl"))) for part in ("multi", "single")}
    return {part: its for part, its in found.items() if its is not None}


def _model(results: Path, name: str, parts: Mapping[str, Part]) -> str:
    found = []
    paths = sorted(results.glob(f"{name}-concepts-*.jsonl"))
    if paths:
        its = header_of(paths[0])["average_precision"]
        low, high = its["interval"]
        found.append(f"Mean average precision on the val split: {its['mean']:.3f} ({low:.3f} to {high:.3f}).")
    for title, part in (("X_multi", "multi"), ("X_single", "single")):
        if part in parts:
            its = parts[part]
            turns = np.array([value for record in its.records for value in record.right])
            found.append(
                f"{title}: {len(its.records)} photographs; the logit of {np.mean(turns > 0):.0%} of the right classes is positive."
            )
    if parts:
        header = next(iter(parts.values())).header
        journals = [path for part in parts for path in results.glob(f"{name}-{part}-*.jsonl")]
        measured = " and ".join(sorted({_measured_with(header_of(path)) for path in journals}))
        noise = header["sigmas"]
        found.append(
            f"Sigma of Smooth CDAM {noise['smooth_cdam']:g}, of SmoothGrad {noise['smooth_grad']:g} of the range. "
            f"Model `{header['model'][:12]}`; measured with {measured}."
        )
    return " ".join(found)


def _measured_with(header: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{key} {value}" for key, value in header["versions"].items())
    return f"{versions} on {header.get('gpu', 'a CPU')}"


def _peaks(parts: Mapping[str, Part]) -> str:
    """MaxBoxAcc, which is no mean over photographs."""
    names = next(iter(parts.values())).names
    rows = [
        [f"`{name}`", *(part.peak(name, _LOCALISATION).text() if name in part.names else "" for part in parts.values())]
        for name in names
    ]
    titles = {"multi": "X_multi", "single": "X_single"}
    return table(["MaxBoxAcc", *(titles[part] for part in parts)], rows)


def _orders(parts: Mapping[str, Part], ranked: Part | None) -> str:
    rows = []
    for title, part, column in _ORDERED:
        if part in parts:
            theirs = [column.published[method] for method in published.METHODS]
            both = [parts[part], ranked if part == "multi" else None]
            ours = [its and its.columns(published.METHODS, column.metric, column.quantity) for its in both]
            rows.append([title, *("" if its is None else order(its, theirs).text() for its in ours)])
    return table(["", "sums over patches", "single pixels, as the paper"], rows)


def _pixels(part: Part, ranked: Part, paths: Sequence[Path]) -> str:
    """The methods that differentiate for pixels: ranked by pixel, and their sums over patches; for scale, CDAM."""
    sums = by_pixel(part, paths, "patches")
    assert sums is not None
    columns = (*_CORRECT, *_DISCRIMINATING[:2], _COMPACT[0])
    names = header_of(paths[0])["methods"]
    rows = []
    for name in (*published.CDAM, *names):
        versions = [("single pixels", ranked), ("sums over patches", sums)] if name in names else [("patches", ranked)]
        for title, its in versions:
            cells = [mean(its.column(name, each.metric, each.quantity)) for each in columns]
            shown = [_half(cell, each.digits) for cell, each in zip(cells, columns, strict=True)]
            rows.append([f"`{name}`", title, *shown])
        theirs = [f"{each.published[name]:g}" for each in columns]
        rows.append(["", "*paper*", *theirs])
    head = ["", "scores of", *(each.title for each in columns[:-1]), "compactness"]
    return f"{len(ranked.kept)} photographs:\n\n{table(head, rows)}"


def _half(its: Estimate, digits: int) -> str:
    return f"{its.value:.{digits}f} ± {(its.high - its.low) / 2:.{digits}f}"


def _choices(part: Part) -> str:
    """The main columns under other choices of the right class."""
    columns = (_CORRECT[2], _CORRECT[3], *_DISCRIMINATING[:2])
    rows = []
    for title, turns in (
        ("both classes take their turn", every),
        ("only where its logit is positive", sure),
        ("only the class with the larger logit", stronger),
    ):
        its = Part(part.header, part.records, turns)
        best: list[str] = []
        if not its.kept:
            rows.append([f"{title} (0)", *[""] * len(columns)])
            continue
        for column in columns:
            means = its.columns(published.METHODS, column.metric, column.quantity).mean(0)
            first = np.argsort(-means)[:3]
            best.append(", ".join(f"`{published.METHODS[k]}` {means[k]:.{column.digits}f}" for k in first))
        rows.append([f"{title} ({len(its.kept)})", *best])
    return table(["right class (photographs)", *(f"{column.title}: the first three" for column in columns)], rows)


def _classes(part: Part) -> str:
    """Patch IoU and energy by class, of turns."""
    names, found = part.header["classes"], []
    for index, name in enumerate(names):
        turns = [(record, turn) for record in part.records for turn in record.turns if record.classes[turn] == index]
        if turns:
            ious = [
                np.mean([record.values[turn][method, _AGREEMENT, "patch_iou"] for record, turn in turns])
                for method in (*_SHOWN, "random")
            ]
            found.append([name, str(len(turns)), *(f"{value:.2f}" for value in ious)])
    return table(["class", "maps", *(f"`{method}`" for method in _SHOWN), "*random*"], found)


def _high_norms(part: Part) -> str:
    limit = high_norms.threshold(np.concatenate([record.norms for record in part.records]))
    high = {record.id: (record.norms > limit.value).reshape(GEOMETRY.grid) for record in part.records}
    some = [record for record in part.records if high[record.id].any()]
    kind = (
        "the lowest point between two modes"
        if limit.modes > 1
        else "median + 3 robust standard deviations of the log norms, which have one mode"
    )
    covered = [GEOMETRY.shares(np.any(record.masks, 0)) for record in some]
    background = [shares[high[record.id]] < 0.5 for shares, record in zip(covered, some, strict=True)]
    everywhere = np.mean([GEOMETRY.shares(np.any(record.masks, 0)) < 0.5 for record in part.records])
    count = np.mean([high[record.id].mean() for record in part.records])
    text = (
        f"Threshold {limit.value:.1f} ({kind}): {count:.2%} of the patches, in {len(some)} of {len(part.records)} photographs. "
        f"{np.concatenate(background).mean():.0%} of them lie outside both classes' masks, of all patches {everywhere:.0%}."
        if some
        else f"Threshold {limit.value:.1f} ({kind}): no patch."
    )
    rows = [_high_norm_row(part, method, high) for method in part.names if method not in {"random", "mask"}]
    head = [
        "",
        "share on them",
        "box: mean r",
        "... without them",
        "energy",
        "... without them",
        "A_LIF-MIF, photographs with them",
        "without them",
    ]
    return f"{text}\n\n{table(head, rows)}"


def _high_norm_row(part: Part, method: str, high: Mapping[str, Any]) -> list[str]:
    """How much of a map is there, and what changes if it is set to zero there."""

    def zeroed(metric: Any, quantity: str) -> Floats:
        def value(record: Record, turn: int) -> float:
            its = _map(record, method, turn)
            return record.measured(metric, turn, high_norms.zeroed(its, high[record.id]))[quantity]

        return claims.of_maps(part, value)

    share = claims.of_maps(part, lambda record, turn: high_norms.share(_map(record, method, turn), high[record.id]))
    box, energy = part.column(method, 1, "box_mean"), part.column(method, _AGREEMENT, "energy")
    fidelity = part.column(method, 0, "a_lif_mif")
    there = np.array([high[record.id].any() for record in part.kept])
    halves = [mean(fidelity[its]).text(0) if its.any() else "" for its in (there, ~there)]
    changed = [mean(zeroed(BOXES, "box_mean") - box), mean(zeroed(AGREEMENT, "energy") - energy)]
    return [
        f"`{method}`",
        f"{share.mean():.1%}",
        f"{box.mean():.2f}",
        _signed(changed[0]),
        f"{energy.mean():.2f}",
        _signed(changed[1]),
        *halves,
    ]


def _signed(its: Estimate) -> str:
    if math.isinf(its.high - its.low):
        return f"{its.value:+.3f}"
    return f"{its.value:+.3f} ({its.low:+.3f} to {its.high:+.3f})"


def _map(record: Record, method: str, turn: int) -> Any:
    return record.maps[method][turn]


def _attention(part: Part) -> str:
    sizes = np.array([claims.by_attention(record) for record in part.kept])
    row = [f"{value:.3f}" for value in sizes.mean(0)]
    rank = [
        np.mean([_rho(record.maps["attention"][0], np.abs(scores)) for scores in record.maps["cdam"]])
        for record in part.kept
    ]
    found = mean(np.array(rank))
    deciles = table(["decile of attention", *(str(k) for k in range(1, 11))], [["mean size of CDAM", *row]])
    return f"{deciles}\n\nSpearman's rho of attention and the size of CDAM within a photograph: {found.text()}."


def _unnormalised(part: Part) -> str:
    """How the map by gradients for unnormalised tokens, times themselves, lies to CDAM."""
    r = mean(claims.correlations(part, "unnormalised_cdam", "cdam"))
    size = claims.of_maps(
        part,
        lambda record, turn: float(
            np.abs(record.maps["unnormalised_cdam"][turn]).max() / np.abs(record.maps["cdam"][turn]).max()
        ),
    )
    return f"The largest score is {size.mean():.1e} of CDAM's; r of the two maps {r.text()}."


def _rho(first: Any, second: Any) -> float:
    """Spearman's rho of two maps."""
    return float(spearmanr(first.ravel(), second.ravel()).statistic)


def _concepts(paths: Sequence[Path]) -> str:
    """Of each kind: how often the mean score inside the own mask exceeds that inside the other's; energy."""
    told: list[list[list[float]]] = []
    for line in together(paths):
        shares = [GEOMETRY.shares(decode_mask(its, INPUT)) for its in line["masks"]]
        turns = [
            [_told(decode(text).reshape(GEOMETRY.grid), shares[turn], shares[1 - turn]) for text in maps]
            for turn, maps in enumerate(line["maps"])
        ]
        told.append(np.mean(turns, axis=0).tolist())
    found = np.array(told)  # photographs, kinds, own > other and energy
    rows = []
    for k, kind in enumerate(KINDS):
        more, energy = (estimate(found[:, k, q], lambda its: float(its.mean())) for q in (0, 1))
        cells = [more.text(), energy.text()]
        if k:
            cells += [_signed(estimate(found[:, k, q] - found[:, 0, q], lambda its: float(its.mean()))) for q in (0, 1)]
        rows.append([kind, *cells, *[""] * (4 - len(cells))])
    counts = header_of(paths[0])["examples"]
    head = ["CDAM of", "own > other", "energy", "own > other, less the class's", "energy, less the class's"]
    text = f"{len(found)} photographs, both classes of each; concepts of {min(counts)} to {max(counts)} photographs for training"
    return f"{text}:\n\n{table(head, rows)}"


def _told(scores: Any, own: Any, other: Any) -> tuple[float, float]:
    inside, elsewhere = ((scores * share).sum() / share.sum() for share in (own, other))
    positive = np.maximum(scores, 0)
    return float(inside > elsewhere), float((positive * own).sum() / positive.sum()) if positive.any() else 0.0


def _seeds(parts: Mapping[str, Part]) -> str:
    """The main columns of every seed, on the photographs that all have."""
    shared = set.intersection(*({record.id for record in part.records} for part in parts.values()))
    its = {
        seed: Part(part.header, [record for record in part.records if record.id in shared])
        for seed, part in parts.items()
    }
    columns = (_CORRECT[2], _CORRECT[3], *_DISCRIMINATING[:2], _MASKS[0])
    means = {
        (seed, column): part.columns(published.METHODS, column.metric, column.quantity).mean(0)
        for seed, part in its.items()
        for column in columns
    }
    rows = [
        [f"`{method}`", *(f"{means[seed, column][k]:.{column.digits}f}" for column in columns for seed in its)]
        for k, method in enumerate(published.METHODS)
    ]
    first, second = list(its)[:2]
    rows.append(
        [
            "Kendall's tau of the first two",
            *(
                text
                for column in columns
                for text in (f"{tau(means[first, column], means[second, column]):.2f}", *[""] * (len(its) - 1))
            ),
        ]
    )
    head = ["", *(f"{column.title}, {seed}" for column in columns for seed in its)]
    return f"{len(shared)} photographs:\n\n{table(head, rows)}"
