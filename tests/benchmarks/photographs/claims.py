"""What the CDAM paper says in words, held against what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from benchmarks import table_claims
from benchmarks.photographs.measuring import BOXES as ASKED
from benchmarks.photographs.measuring import TIMES_NORMALISED, Sigmas, protocol
from benchmarks.photographs.reading import Part, Record
from benchmarks.table_claims import BOXES, FIDELITY, Values, difference, indices
from benchmarks.verdicts import Claim, Estimate, Floats, mean

_ALIKE: Final = 0.9  # r of two maps that look the same
_METRICS: Final = indices(protocol("multi", Sigmas(0, 0)).metrics)


def values_of(part: Part) -> Values:
    """The part's quantities."""
    return lambda methods, quantity: part.columns(methods, _METRICS[quantity.metric], quantity.name)


def of_several(part: Part) -> Iterator[Claim]:
    """Those about X_multi."""
    values = values_of(part)
    yield from table_claims.of_several(values)
    yield _zero_attention(part)
    yield _alike(part)
    for what, quantity in (("A_LIF-MIF", FIDELITY), ("boxes", BOXES)):
        text = f"gradients for normalised tokens are better than for unnormalised ones (far better, it says), by {what}"
        yield difference(text, values, "cdam", "unnormalised_cdam", quantity)
    yield _times_normalised(part)


def of_single(part: Part) -> Iterator[Claim]:
    """Those about X_val, tested on X_single."""
    yield from table_claims.of_single(values_of(part))


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
    """ "For most samples" is: for more than half."""
    r = correlations(part, "integrated_cdam", "cdam")
    most = mean((r >= _ALIKE).astype(np.float64))
    found = Estimate(most.value - 0.5, most.low - 0.5, most.high - 0.5)
    return Claim(
        "Integrated CDAM can mostly not be told from CDAM by the eye",
        f"r of the two maps is {_ALIKE} or more on {most.text()} of the photographs; more than half agrees. Mean r: {mean(r).text()}",
        found,
    )


def _times_normalised(part: Part) -> Claim:
    """No image was perturbed in its order, so it is by boxes alone."""
    other = of_maps(
        part, lambda record, turn: record.measured(ASKED, turn, record.maps[TIMES_NORMALISED][turn])["box_mean"]
    )
    found = mean(values_of(part)(["cdam"], BOXES)[:, 0] - other)
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
