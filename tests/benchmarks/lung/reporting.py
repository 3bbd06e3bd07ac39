"""The document's tables from the journals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.lung import claims, drawing
from benchmarks.lung.claims import QUANTITIES, by_outline
from benchmarks.lung.measuring import BEFORE, MALIGNANCY, OUTPUTS
from benchmarks.lung.reading import ANCHORS, Floats, Part, Record, has_outside, has_rim, read
from benchmarks.sheets import insert, table
from benchmarks.verdicts import Estimate, claims_table
from real.lidc import BIOMARKERS

DOCUMENT: Final = Path("docs/benchmarks/nodules.md")
IMAGES: Final = Path("docs/images")
_CDAM: Final = ("cdam", "smooth_cdam", "integrated_cdam")
_PUBLISHED: Final = 0.85
"""The paper's best accuracy on its test set."""


def report(results: Path, *, write: bool) -> Iterator[str]:
    """All tables, to be printed; put into the document, with its figures, if asked for.

    Raises:
        ValueError: Nothing was measured.
    """
    part = read(results)
    if part is None:
        raise ValueError(f"{results}: no seed*.jsonl: run `measure` first")
    blocks = dict(_blocks(part))
    for title, block in blocks.items():
        yield f"\n{title}: {block}"
    if write:
        DOCUMENT.write_text(insert(DOCUMENT.read_text(), blocks))
        for path in drawing.draw(part, IMAGES):
            yield f"wrote {path}"


def _blocks(part: Part) -> Iterator[tuple[str, str]]:
    yield "models", _models(part)
    yield "malignancy", _malignancy(part)
    yield "biomarkers", _biomarkers(part)
    yield "left_out", _left_out(part)
    yield "claims", claims_table(list(claims.every_claim(part)))
    yield "verdicts", _verdicts(part)
    yield "quantities", _quantities(part)
    yield "answers", _answers(part)
    yield "removed", _removed(part)
    yield "agreement", _agreement(part)
    yield "correlations", _correlations(part)


def _models(part: Part) -> str:
    first = next(iter(part.headers.values()))
    sides = ", ".join(
        f"{seed}: {its['sides']['train']} / {its['sides']['validation']} / {its['sides']['test']}"
        for seed, its in part.headers.items()
    )
    recipe, versions = first["recipe"], ", ".join(f"{key} {value}" for key, value in first["versions"].items())
    return (
        f"Nodules for training / validation / test by seed: {sides}. Trained: {first['trained']}, {first['epochs']} epochs, "
        f"{recipe['optimizer']}, {recipe['block_lr']:g} (blocks) and {recipe['lr']:g} (head), {recipe['schedule'].replace('_', ' ')}, batches "
        f"of {recipe['batch_size']}, {recipe['token_dropout']:.0%} of the patch tokens dropped, mixup {recipe['mixup']:g}, running average "
        f"{recipe['ema']:g}, {recipe['views']} views. {versions}."
    )


def _malignancy(part: Part) -> str:
    head = [
        "test accuracy",
        *(f"seed {seed}" for seed in part.headers),
        "all",
        "AUROC",
        "mean rating more than 0.5 from 3",
    ]
    rows = []
    for name, which in (("untuned backbone", "untuned"), ("tuned on the biomarkers", "outputs")):
        by_seed = [part.where(lambda record, seed=seed: record.seed == seed) for seed in part.headers]
        sure = part.where(lambda record: abs(record.mean_malignancy - 3) > 0.5)
        accuracies = [f"{its.values(lambda record, which=which: _right(record, which)).mean():.3f}" for its in by_seed]
        rows.append(
            [
                name,
                *accuracies,
                part.mean(lambda record, which=which: _right(record, which)).text(3),
                _auroc(part, which).text(3),
                sure.mean(lambda record, which=which: _right(record, which)).text(3),
            ]
        )
    gain = part.mean(lambda record: _right(record, "outputs") - _right(record, "untuned"))
    return f"{table(head, rows)}\n\nTuned less untuned: {gain.text(3)}. The paper's best: {_PUBLISHED:g}."


def _right(record: Record, which: str) -> float:
    logit: float = getattr(record, which)[MALIGNANCY]
    return float((logit > 0) == (record.truth[MALIGNANCY] > 0))


def _auroc(part: Part, which: str) -> Estimate:
    """The mean over seeds, each with a model of its own."""
    return part.estimate(
        lambda record: (record.seed, getattr(record, which)[MALIGNANCY], record.truth[MALIGNANCY]),
        lambda rows: _mean_of_seeds(rows, lambda its: _auroc_of(its[:, 1], its[:, 2] > 0)),
    )


def _auroc_of(scores: Floats, positive: NDArray[np.bool_]) -> float:
    above = scores[positive][:, None] - scores[~positive]
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def _mean_of_seeds(rows: Floats, statistic: Callable[[Floats], float]) -> float:
    return float(np.mean([statistic(rows[rows[:, 0] == seed]) for seed in np.unique(rows[:, 0])]))


def _biomarkers(part: Part) -> str:
    rows = []
    for index, name in enumerate(BIOMARKERS):
        cells = [_over_seeds(part, index, its).text() for its in (_r_before, _r_after, _gain)]
        rows.append([name, *cells])
    return table(["Pearson's r, mean over seeds", "untuned backbone", "tuned", "tuned less untuned"], rows)


def _over_seeds(part: Part, index: int, statistic: Callable[[Floats], float]) -> Estimate:
    return part.estimate(
        lambda record: (record.seed, record.truth[index], record.untuned[index], record.outputs[index]),
        lambda rows: _mean_of_seeds(rows, statistic),
    )


def _r_before(rows: Floats) -> float:
    return float(np.corrcoef(rows[:, 1], rows[:, 2])[0, 1])


def _r_after(rows: Floats) -> float:
    return float(np.corrcoef(rows[:, 1], rows[:, 3])[0, 1])


def _gain(rows: Floats) -> float:
    return _r_after(rows) - _r_before(rows)


def _left_out(part: Part) -> str:
    outside, rim = part.where(has_outside), part.where(has_rim)
    outlined = rim.where(lambda record: by_outline(record) is not None)
    small = part.where(lambda record: record.of_disc.body.sum() < 2)
    return (
        f"Of {part.count} in the tests of {len(part.headers)} seeds, {rim.count} have a rim that can be told from a body: {small.count} are too "
        f"small (less than two patches lie more than a patch inside the edge), the others so large that the rim leaves the crop. {outside.count} "
        f"have surroundings. By what is bright, {outlined.count} of those with a rim have one."
    )


def _verdicts(part: Part) -> str:
    methods = [*(name for name in part.methods if name != "attention"), "random"]
    rows = [[text, *found] for text, found in claims.verdicts(part, methods)]
    return table(["", *(_name(name) for name in methods)], rows)


def _quantities(part: Part) -> str:
    names = [*part.methods, BEFORE, *ANCHORS]
    head = [
        "",
        *(quantity.title for quantity in QUANTITIES),
        "malignancy: lesser sign inside",
        "r of two biomarkers' maps",
    ]
    rows = []
    for name in names:
        cells = [_cell(quantity.mean(part, name)) for quantity in QUANTITIES]
        lesser = part.mean(lambda record, name=name: claims.lesser_sign(record, name))
        alike = part.mean(lambda record, name=name: claims.likeness(record, name))
        rows.append([_name(name), *cells, _cell(lesser), _cell(alike)])
    for name in _CDAM:
        cells = [_cell(quantity.mean(part, name, by_outline)) for quantity in QUANTITIES]
        rows.append([f"{_name(name)}, by what is bright", *cells, "", ""])
    return table(head, rows)


def _name(name: str) -> str:
    return f"*{name}*" if name in ANCHORS else f"`{name}`"


def _cell(its: Estimate) -> str:
    return f"{its.value:.2f} ± {(its.high - its.low) / 2:.2f}"


def _answers(part: Part) -> str:
    """CDAM's regions for nodules of which the model says more than of the median one, and less."""
    rows = []
    for index, name in enumerate(OUTPUTS):
        middle = float(np.median(part.values(lambda record, index=index: record.outputs[index])))
        for word, kept in (("above", True), ("below", False)):
            its = part.where(
                lambda record, index=index, middle=middle, kept=kept: (
                    has_rim(record) and (record.outputs[index] > middle) == kept
                )
            )
            cells = [
                _cell(claims.Quantity("", name, region).mean(its, "cdam")) for region in ("body", "rim", "outside")
            ]
            rows.append([f"{name}, {word} {middle:.3g}", its.count, *cells])
    return table(["the model's answer", "nodules", "body", "rim", "outside"], rows)


def _removed(part: Part) -> str:
    """What happens to the logit without what a map marks inside the disc, replaced and blurred."""
    its = part.where(lambda record: record.removed is not None)
    rows = []
    for name in [*(name for name in part.methods if name != "attention"), "random", "disc"]:
        cells = [
            _moved(some, which, name, value)
            for some, which in ((its, "removed"), (part, "blurred"))
            for value in (claims.without_evidence, claims.without_counter_evidence)
        ]
        rows.append([_name(name), *cells])
    ways = (f"replaced, {its.count}", f"blurred, {part.count}")
    head = [
        "",
        *(f"{what}: {way}" for way in ways for what in ("falls without evidence", "rises without counter-evidence")),
    ]
    return table(head, rows)


def _moved(part: Part, which: str, name: str, value: Callable[[Record, Sequence[float]], float]) -> str:
    """The mean over all nodules; nothing marked, nothing moved."""
    its = part.where(lambda record: name in getattr(record, which))
    if not its.records:
        return ""
    return its.mean(lambda record: value(record, getattr(record, which)[name])).text()


def _agreement(part: Part) -> str:
    shown = ("malignancy", "diameter")
    head = ["", *(f"{output}: {what}" for output in shown for what in ("energy", "AUROC"))]
    rows = [
        [
            _name(name),
            *(
                _cell(part.mean(lambda record, name=name, output=output, value=value: value(record, name, output)))
                for output in shown
                for value in (claims.energy, claims.auroc)
            ),
        ]
        for name in [*part.methods, BEFORE, *ANCHORS]
    ]
    return table(head, rows)


def _correlations(part: Part) -> str:
    r = np.mean([claims.correlations(record, "cdam") for record in part.records], axis=0)
    answers = _ratings(part)
    rows = [
        [name, *(_pair(r, answers, row, column) for column in range(len(OUTPUTS)))] for row, name in enumerate(OUTPUTS)
    ]
    return table(["", *OUTPUTS], rows)


def _pair(maps: Floats, answers: Floats, row: int, column: int) -> str:
    return "" if row == column else f"{maps[row, column]:.2f}" if row > column else f"*{answers[row, column]:.2f}*"


def _ratings(part: Part) -> Floats:
    """Pearson's r of the model's answers over nodules, within seeds."""
    stacks = [np.array([record.outputs for record in part.records if record.seed == seed]) for seed in part.headers]
    found: Floats = np.mean([np.corrcoef(stack.T) for stack in stacks], axis=0)
    return found
