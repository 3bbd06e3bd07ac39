"""What the CDAM paper says in words, held against what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np

from benchmarks.photographs.measuring import BOXES, TIMES_NORMALISED
from benchmarks.photographs.published import CDAM, METHODS
from benchmarks.photographs.reading import Part, Record
from benchmarks.verdicts import Claim, Estimate, Floats, estimate, mean

_FIDELITY: Final = (0, "a_lif_mif")
_BOXES: Final = (1, "box_mean")
_COMPACTNESS: Final = (2, "compactness")
_DELTA_FIDELITY: Final = (7, "delta_a_lif_mif")
_DELTA_BOXES: Final = (7, "delta_box_mean")
_OTHERS: Final = tuple(name for name in METHODS if name not in CDAM)


def of_several(part: Part) -> list[Claim]:
    """Those about X_multi."""
    return [
        _best("Smooth CDAM has the best fidelity (A_LIF-MIF) on X_multi", part, "smooth_cdam", _FIDELITY, 0),
        _best("Integrated CDAM has the best box sensitivity on X_multi", part, "integrated_cdam", _BOXES, 2),
        *(
            _ahead(f"the three CDAM variants lead class discrimination, by {what}", part, CDAM, _OTHERS, *column)
            for what, column in (("delta A_LIF-MIF", (_DELTA_FIDELITY, 0)), ("boxes", (_DELTA_BOXES, 2)))
        ),
        _insensitive(part),
        _anticorrelated(part),
        _ahead(
            "CDAM, Integrated CDAM and Input x Gradient are the most compact",
            part,
            ("cdam", "integrated_cdam", "input_x_gradient"),
            tuple(name for name in METHODS if name not in {"cdam", "integrated_cdam", "input_x_gradient"}),
            _COMPACTNESS,
            2,
        ),
        _ahead(
            "relevance propagation is the least compact",
            part,
            tuple(name for name in METHODS if name != "relevance_propagation"),
            ("relevance_propagation",),
            _COMPACTNESS,
            2,
        ),
        _zero_attention(part),
        _alike(part),
        *(
            _difference(
                f"Integrated CDAM measures better than CDAM, by {what}", part, "integrated_cdam", "cdam", *column
            )
            for what, column in (("A_LIF-MIF", (_FIDELITY, 0)), ("boxes", (_BOXES, 2)))
        ),
        _difference(
            "Smooth CDAM spreads more widely than CDAM (compactness)", part, "cdam", "smooth_cdam", _COMPACTNESS, 2
        ),
        *(
            _difference(
                f"gradients for normalised tokens are far better than for unnormalised ones, by {what}",
                part,
                "cdam",
                "unnormalised_cdam",
                *column,
            )
            for what, column in (("A_LIF-MIF", (_FIDELITY, 0)), ("boxes", (_BOXES, 2)))
        ),
        _times_normalised(part),
    ]


def of_single(part: Part) -> list[Claim]:
    """Those about X_val, tested on X_single."""
    return [
        _best("relevance propagation has the best fidelity on X_val", part, "relevance_propagation", _FIDELITY, 0),
        _best("Integrated CDAM has the best box sensitivity on X_val", part, "integrated_cdam", _BOXES, 2),
    ]


def _best(text: str, part: Part, method: str, column: tuple[int, str], digits: int) -> Claim:
    return _ahead(text, part, (method,), tuple(name for name in METHODS if name != method), column, digits)


def _ahead(
    text: str, part: Part, first: Sequence[str], rest: Sequence[str], column: tuple[int, str], digits: int
) -> Claim:
    """The lowest mean of the first against the highest of the rest."""
    rows, count = part.columns([*first, *rest], *column), len(first)
    found = estimate(rows, lambda its: float(its.mean(0)[:count].min() - its.mean(0)[count:].max()))
    means = rows.mean(0)
    low, high = first[int(means[:count].argmin())], rest[int(means[count:].argmax())]
    return Claim(text, f"`{low}` - `{high}`: {found.text(digits)}", found)


def _difference(text: str, part: Part, first: str, second: str, column: tuple[int, str], digits: int) -> Claim:
    found = mean(part.column(first, *column) - part.column(second, *column))
    return Claim(text, f"`{first}` - `{second}`: {found.text(digits)}", found)


def _insensitive(part: Part) -> Claim:
    """At 0 is: less than a tenth of what the weakest variant of CDAM has."""
    names = ("partial_lrp", "smooth_grad", "attention")
    rows = part.columns([*names, *CDAM], *_DELTA_FIDELITY)
    share = estimate(rows, lambda its: float(np.abs(its.mean(0)[:3]).max() / np.abs(its.mean(0)[3:].min())))
    found = Estimate(0.1 - share.value, 0.1 - share.high, 0.1 - share.low)
    text = "partial LRP, SmoothGrad and attention tell no class from another (delta A_LIF-MIF)"
    return Claim(
        text, f"the largest of the three, as a share of the weakest CDAM: {share.text()}; at most 0.1 agrees", found
    )


def _anticorrelated(part: Part) -> Claim:
    """A_LIF'-MIF' of the wrong class's map is that of the right one's less the difference."""
    rows = part.columns(CDAM, *_FIDELITY) - part.columns(CDAM, *_DELTA_FIDELITY)
    found = estimate(rows, lambda its: -float(its.mean(0).max()))
    highest = CDAM[int(rows.mean(0).argmax())]
    its = Estimate(-found.value, -found.high, -found.low)
    return Claim(
        "maps of the wrong class are anti-correlated: their A_LIF-MIF is negative", f"`{highest}`: {its.text(0)}", found
    )


def by_attention(record: Record, bins: int = 10) -> Floats:
    """Mean size of CDAM's scores, relative to the largest, by deciles of attention, lowest first; mean over turns."""
    attention = record.maps["attention"][0].ravel()
    groups = np.array_split(np.argsort(attention, kind="stable"), bins)
    sizes = [np.abs(scores.ravel()) / np.abs(scores).max() for scores in record.maps["cdam"]]
    means: Floats = np.array([[its[group].mean() for group in groups] for its in sizes]).mean(0)
    return means


def largest_where_attention_is_low(record: Record, share: float = 0.1) -> float:
    """Of the patches with the least attention, the largest size of a score of CDAM, relative to the map's largest."""
    attention = record.maps["attention"][0].ravel()
    low = np.argsort(attention, kind="stable")[: round(share * attention.size)]
    return float(np.mean([np.abs(its.ravel()[low]).max() / np.abs(its).max() for its in record.maps["cdam"]]))


def _zero_attention(part: Part) -> Claim:
    """Attention is a softmax and never 0: the tenth with the least of it stands for that."""
    largest = mean(np.array([largest_where_attention_is_low(record) for record in part.kept]))
    found = Estimate(0.05 - largest.value, 0.05 - largest.high, 0.05 - largest.low)
    return Claim(
        "where attention is 0, CDAM is 0",
        f"in the tenth of the patches with the least attention the largest score is {largest.text(3)} of the map's; at most 0.05 agrees",
        found,
    )


def correlations(part: Part, first: str, second: str) -> Floats:
    """Pearson's r of two methods' maps, of each photograph the mean over its turns."""
    return np.array(
        [
            np.mean(
                [
                    np.corrcoef(record.maps[first][turn].ravel(), record.maps[second][turn].ravel())[0, 1]
                    for turn in part.turns(record)
                ]
            )
            for record in part.kept
        ]
    )


def _alike(part: Part) -> Claim:
    r = mean(correlations(part, "integrated_cdam", "cdam"))
    found = Estimate(r.value - 0.9, r.low - 0.9, r.high - 0.9)
    return Claim(
        "Integrated CDAM can mostly not be told from CDAM by the eye",
        f"r of the two maps: {r.text()}; at least 0.9 agrees",
        found,
    )


def _times_normalised(part: Part) -> Claim:
    """No image was perturbed in its order, so it is by boxes alone."""
    other = of_maps(
        part, lambda record, turn: record.measured(BOXES, turn, record.maps[TIMES_NORMALISED][turn])["box_mean"]
    )
    found = mean(part.column("cdam", *_BOXES) - other)
    text = "... and if those gradients are multiplied by the normalised tokens, by boxes"
    return Claim(text, f"difference: {found.text()}", found)


def of_maps(part: Part, value: Callable[[Record, int], float]) -> Floats:
    """A number of each photograph, the mean over its turns."""
    return np.array([np.mean([value(record, turn) for turn in part.turns(record)]) for record in part.kept])


def every_claim(several: Part | None, single: Part | None) -> Iterator[Claim]:
    """Of what was measured."""
    if several is not None:
        yield from of_several(several)
    if single is not None:
        yield from of_single(single)
