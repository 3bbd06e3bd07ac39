"""What the CDAM paper says of lung nodules, held against what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

import numpy as np
from scipy.stats import rankdata

from benchmarks.lung.measuring import MALIGNANCY, OUTPUTS
from benchmarks.lung.reading import Floats, Part, Record, average, has_outside, has_rim
from benchmarks.lung.regions import Regions
from benchmarks.verdicts import Claim, Estimate
from real.lidc import BIOMARKERS

SPICULATED: Final = 3.0
"""Mean rating of spiculation, 1 to 5, from which a nodule counts as spiculated."""
_ZERO: Final = 0.1
_LESSER: Final = 0.1
_ALIKE: Final = 0.5

By = Callable[[Record], Regions | None]
"""Where a nodule's regions come from."""


def by_disc(record: Record) -> Regions | None:
    """The disc of the rated diameter."""
    return record.of_disc


def by_outline(record: Record) -> Regions | None:
    """What is bright, if it has a rim."""
    its = record.of_outline
    return its if its is not None and its.has_rim else None


@dataclass(frozen=True)
class Quantity:
    """A number of a map that a claim is about; scores are relative to their mean size over the map.

    Attributes:
        title: What it is.
        output: Whose map.
        region: Over what its scores are averaged.
        minus: A region whose average is subtracted; empty: none.
    """

    title: str
    output: str
    region: str
    minus: str = ""

    def of(self, record: Record, method: str, by: By = by_disc) -> float:
        """Of a nodule that has the regions."""
        its, scores = by(record), record.map(method, self.output)
        assert its is not None
        found = average(scores, getattr(its, self.region))
        return found - average(scores, getattr(its, self.minus)) if self.minus else found

    def part(self, part: Part) -> Part:
        """The nodules that have the regions."""
        rim = {"rim", "body"} & {self.region, self.minus}
        return part.where(has_rim if rim else has_outside)

    def mean(self, part: Part, method: str, by: By = by_disc) -> Estimate:
        """Over the nodules that have the regions."""
        its = self.part(part).where(lambda record: by(record) is not None)
        return its.mean(lambda record: self.of(record, method, by))


DIAMETER: Final = Quantity("diameter: body", "diameter", "body")
DIAMETER_INSIDE: Final = Quantity("diameter: disc", "diameter", "inside")
DIAMETER_OUTSIDE: Final = Quantity("diameter: outside", "diameter", "outside")
MARGIN: Final = Quantity("margin: rim", "margin", "rim")
MARGIN_BODY: Final = Quantity("margin: body", "margin", "body")
SPHERICITY: Final = Quantity("sphericity: rim", "sphericity", "rim")
SPICULATION: Final = Quantity("spiculation: rim", "spiculation", "rim")
SPICULATION_LOW: Final = Quantity("spiculation: rim - body", "spiculation", "rim", "body")
QUANTITIES: Final = (
    DIAMETER,
    DIAMETER_INSIDE,
    DIAMETER_OUTSIDE,
    MARGIN,
    MARGIN_BODY,
    SPHERICITY,
    SPICULATION,
    SPICULATION_LOW,
)


def lesser_sign(record: Record, method: str) -> float:
    """Of the sizes of malignancy's scores inside the disc, the share of the sign that has less; 0.5: as much of either."""
    scores = record.map(method, "malignancy") * record.of_disc.inside
    evidence, counter = np.maximum(scores, 0).sum(), np.maximum(-scores, 0).sum()
    total = evidence + counter
    return float(min(evidence, counter) / total) if total else 0.0


def likeness(record: Record, method: str) -> float:
    """Mean Pearson's r over the pairs of biomarkers' maps."""
    r = correlations(record, method)
    return float(np.mean([r[pair] for pair in combinations(range(len(BIOMARKERS)), 2)]))


def correlations(record: Record, method: str) -> Floats:
    """Pearson's r of every two outputs' maps, (outputs, outputs)."""
    scores: Floats = np.corrcoef(record.maps[method].reshape(len(OUTPUTS), -1).astype(np.float64))
    return scores


def energy(record: Record, method: str, output: str) -> float:
    """The share of the positive scores inside the disc."""
    positive = np.maximum(record.map(method, output), 0)
    total = positive.sum()
    return float((positive * record.of_disc.inside).sum() / total) if total else 0.0


def auroc(record: Record, method: str, output: str) -> float:
    """Of the scores as a classifier of patches: those of which half is in the disc, against the others."""
    inside = record.of_disc.inside.ravel() >= 0.5
    count = int(inside.sum())
    ranks = rankdata(record.map(method, output).ravel())[inside].sum()
    return float((ranks - count * (count + 1) / 2) / (count * (inside.size - count)))


def without_evidence(record: Record, logits: Sequence[float]) -> float:
    """How much the logit of malignancy falls without what is called evidence inside the disc."""
    return float(record.outputs[MALIGNANCY] - logits[0])


def without_counter_evidence(record: Record, logits: Sequence[float]) -> float:
    """How much the logit of malignancy rises without what is called counter-evidence inside the disc."""
    return float(logits[1] - record.outputs[MALIGNANCY])


def every_claim(part: Part, method: str = "cdam") -> Iterator[Claim]:
    """Of a method's maps."""
    yield from _of_attention(part)
    yield from _of_malignancy(part, method)
    yield from _of_diameter(part, method)
    yield _positive("margin: patches at the nodule's edge get positive scores", MARGIN, part, method)
    yield _negative("margin: patches on the nodule's body get negative scores", MARGIN_BODY, part, method)
    yield _positive("sphericity: patches with the nodule's curvature get positive scores", SPHERICITY, part, method)
    yield from _of_spiculation(part, method)
    yield _of_likeness(part, method)


def _of_attention(part: Part) -> Iterator[Claim]:
    differing = part.values(lambda record: float(np.ptp(record.maps["attention"], axis=0).max())).max()
    yield Claim(
        "attention does not take the classification into account",
        f"maps of the nine outputs, each asked for by itself: largest difference {differing:g}, in {part.count}",
        Estimate(*[-1.0 if differing else 1.0] * 3),
    )
    for kind, malignant in (("benign", 0), ("malignant", 1)):
        its = part.where(lambda record, malignant=malignant: record.truth[MALIGNANCY] == malignant)
        found = its.mean(lambda record: auroc(record, "attention", "malignancy"))
        yield Claim(f"attention is on the nodule: {kind} ones", f"AUROC of the disc {found.text()}", _above(found, 0.5))


def _of_malignancy(part: Part, method: str) -> Iterator[Claim]:
    lesser = part.mean(lambda record: lesser_sign(record, method))
    yield Claim(
        "malignancy: there is evidence and counter-evidence inside the nodule",
        f"the sign that has less has {lesser.text()} of the scores inside the disc; {_LESSER:g} or more agrees",
        _above(lesser, _LESSER),
    )
    its = part.where(lambda record: record.removed is not None)
    if its.records:
        for text, value, moves in (
            ("... and what is positive drives the model towards malignancy", without_evidence, "falls"),
            ("... and what is negative away from it", without_counter_evidence, "rises"),
        ):
            own = its.mean(lambda record, value=value: value(record, record.removed[method]))
            found = its.mean(
                lambda record, value=value: (
                    value(record, record.removed[method]) - value(record, record.removed["random"])
                )
            )
            figure = f"without these patches of the disc the logit {moves} by {own.text()}; more than without random ones by {found.text()}; both must be above 0"
            yield Claim(text, f"{figure}, in {its.count}", min(own, found, key=lambda each: each.low))


def _of_diameter(part: Part, method: str) -> Iterator[Claim]:
    yield _positive("diameter: patches on the nodule's body get positive scores", DIAMETER, part, method)
    yield _positive("... on all of the disc, its edge included", DIAMETER_INSIDE, part, method)
    its = part.where(lambda record: has_rim(record) and has_outside(record))
    share = its.estimate(
        lambda record: (DIAMETER.of(record, method), DIAMETER_OUTSIDE.of(record, method)),
        lambda rows: abs(rows[:, 1].mean() / rows[:, 0].mean()),
    )
    outside = DIAMETER_OUTSIDE.mean(part, method)
    yield Claim(
        "diameter: the background is about 0",
        f"mean score, outside {outside.text()}; its size as a share of the body's: {share.text()}; at most {_ZERO:g} agrees",
        _below(share, _ZERO),
    )


def _of_spiculation(part: Part, method: str) -> Iterator[Claim]:
    its = part.where(lambda record: has_rim(record) and record.truth[OUTPUTS.index("spiculation")] >= SPICULATED)
    for text, quantity in (
        ("spicules get positive scores, in a majority of cases", SPICULATION),
        ("inner bodies tend to get lower scores", SPICULATION_LOW),
    ):
        share = its.mean(lambda record, quantity=quantity: float(quantity.of(record, method) > 0))
        what = "rim positive" if quantity is SPICULATION else "rim above body"
        yield Claim(
            f"spiculation: {text}",
            f"{what} in {share.text()} of {its.count} rated {SPICULATED:g} or more",
            _above(share, 0.5),
        )


def _of_likeness(part: Part, method: str) -> Claim:
    r = part.mean(lambda record: likeness(record, method))
    return Claim(
        "maps of biomarkers are distinct",
        f"mean r of two biomarkers' maps of a nodule: {r.text()}, attention 1; at most {_ALIKE:g} agrees",
        _below(r, _ALIKE),
    )


def _positive(text: str, quantity: Quantity, part: Part, method: str) -> Claim:
    found = quantity.mean(part, method)
    return Claim(text, f"{_said(quantity)} {found.text()}", found)


def _negative(text: str, quantity: Quantity, part: Part, method: str) -> Claim:
    found = quantity.mean(part, method)
    return Claim(text, f"{_said(quantity)} {found.text()}", Estimate(-found.value, -found.high, -found.low))


def _said(quantity: Quantity) -> str:
    return f"mean score, {quantity.title.partition(': ')[2]}"


def _above(found: Estimate, limit: float) -> Estimate:
    return Estimate(found.value - limit, found.low - limit, found.high - limit)


def _below(found: Estimate, limit: float) -> Estimate:
    return Estimate(limit - found.value, limit - found.high, limit - found.low)


def verdicts(part: Part, methods: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each claim about maps of an output, and the verdict on it of each method's maps."""
    found = [list(every_claim(part, method))[3:] for method in methods]
    for same in zip(*found, strict=True):
        yield same[0].text, [claim.verdict for claim in same]
