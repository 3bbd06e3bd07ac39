"""What the CDAM paper reads from its tables, held against values of the same methods on other samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from benchmarks.published import CDAM, METHODS
from benchmarks.verdicts import Claim, Estimate, Floats, estimate, mean
from cdam_engine.evaluation import Metric


@dataclass(frozen=True)
class Quantity:
    """What a table has a column of.

    Attributes:
        metric: The metric's kind.
        name: Of the quantity.
        digits: After the point.
    """

    metric: str
    name: str
    digits: int


FIDELITY: Final = Quantity("fidelity", "a_lif_mif", 0)
BOXES: Final = Quantity("box_sensitivity", "box_mean", 2)
COMPACTNESS: Final = Quantity("compactness", "compactness", 2)
DELTA_FIDELITY: Final = Quantity("class_discrimination", "delta_a_lif_mif", 0)
DELTA_BOXES: Final = Quantity("class_discrimination", "delta_box_mean", 2)
_COMPACT: Final = ("cdam", "integrated_cdam", "input_x_gradient")


def indices(metrics: Sequence[Metric]) -> dict[str, int]:
    """Where a protocol has the first metric of each kind."""
    return {metric.kind: index for index, metric in reversed(list(enumerate(metrics)))}


Values = Callable[[Sequence[str], Quantity], Floats]
"""A quantity of methods on every sample, (samples, methods)."""


def of_several(values: Values) -> Iterator[Claim]:
    """Those about X_multi: images that show a right class and a wrong one."""
    yield best("Smooth CDAM has the best fidelity (A_LIF-MIF) on X_multi", values, "smooth_cdam", FIDELITY)
    yield best("Integrated CDAM has the best box sensitivity on X_multi", values, "integrated_cdam", BOXES)
    for what, quantity in (("delta A_LIF-MIF", DELTA_FIDELITY), ("boxes", DELTA_BOXES)):
        yield ahead(f"the three CDAM variants lead class discrimination, by {what}", values, CDAM, _but(CDAM), quantity)
    yield _insensitive(values)
    yield _anticorrelated("A_LIF-MIF", values, FIDELITY, DELTA_FIDELITY)
    yield _anticorrelated("boxes", values, BOXES, DELTA_BOXES)
    text = "CDAM, Integrated CDAM and Input x Gradient are the most compact"
    yield ahead(text, values, _COMPACT, _but(_COMPACT), COMPACTNESS)
    last = ("relevance_propagation",)
    yield ahead("relevance propagation is the least compact", values, _but(last), last, COMPACTNESS)
    for what, quantity in (("A_LIF-MIF", FIDELITY), ("boxes", BOXES)):
        text = f"Integrated CDAM measures better than CDAM, by {what}"
        yield difference(text, values, "integrated_cdam", "cdam", quantity)
    text = "Smooth CDAM spreads more widely than CDAM (compactness)"
    yield difference(text, values, "cdam", "smooth_cdam", COMPACTNESS)


def of_single(values: Values) -> Iterator[Claim]:
    """Those about X_val: images whatever they show."""
    yield best("relevance propagation has the best fidelity on X_val", values, "relevance_propagation", FIDELITY)
    yield best("Integrated CDAM has the best box sensitivity on X_val", values, "integrated_cdam", BOXES)


def best(text: str, values: Values, method: str, quantity: Quantity) -> Claim:
    """That a method leads the paper's others."""
    return ahead(text, values, (method,), _but((method,)), quantity)


def ahead(text: str, values: Values, first: Sequence[str], rest: Sequence[str], quantity: Quantity) -> Claim:
    """The lowest mean of the first against the highest of the rest."""
    rows, count = values([*first, *rest], quantity), len(first)
    found = estimate(rows, lambda its: float(its.mean(0)[:count].min() - its.mean(0)[count:].max()))
    means = rows.mean(0)
    low, high = first[int(means[:count].argmin())], rest[int(means[count:].argmax())]
    return Claim(text, f"`{low}` - `{high}`: {found.text(quantity.digits)}", found)


def difference(text: str, values: Values, first: str, second: str, quantity: Quantity) -> Claim:
    """The mean of the first less that of the second."""
    rows = values([first, second], quantity)
    found = mean(rows[:, 0] - rows[:, 1])
    return Claim(text, f"`{first}` - `{second}`: {found.text(quantity.digits)}", found)


def _but(methods: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in METHODS if name not in methods)


def _insensitive(values: Values) -> Claim:
    """At 0 is: less than a tenth of what the weakest variant of CDAM has."""
    rows = values(["partial_lrp", "smooth_grad", "attention", *CDAM], DELTA_FIDELITY)
    share = estimate(rows, lambda its: float(np.abs(its.mean(0)[:3]).max() / np.abs(its.mean(0)[3:].min())))
    found = Estimate(0.1 - share.value, 0.1 - share.high, 0.1 - share.low)
    text = "partial LRP, SmoothGrad and attention tell no class from another (delta A_LIF-MIF)"
    figure = f"the largest of the three, as a share of the weakest CDAM: {share.text()}; at most 0.1 agrees"
    return Claim(text, figure, found)


def _anticorrelated(what: str, values: Values, quantity: Quantity, delta: Quantity) -> Claim:
    """What the wrong class's map measures is what the right one's does, less the difference."""
    rows = values(CDAM, quantity) - values(CDAM, delta)
    found = estimate(rows, lambda its: -float(its.mean(0).max()))
    highest = CDAM[int(rows.mean(0).argmax())]
    its = Estimate(-found.value, -found.high, -found.low)
    text = f"maps of the wrong class are anti-correlated: by {what} they measure below 0"
    return Claim(text, f"`{highest}`: {its.text(quantity.digits)}", found)
