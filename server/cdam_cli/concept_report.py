"""What `cdam concept` shows of concepts."""

import dataclasses
import math
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

import cdam
from cdam_cli.report import SHORT_ID, columns, printable

_MOST_OUTLIERS: Final = 5
_BINS: Final = 12
_STEPS: Final = (1, 2, 5, 10, 20)
_UNCHANGED: Final = ": already registered, nothing changed"
_LONG: Final = ("vector", "examples", "negatives")


def as_json(concept: cdam.RegisteredConcept) -> dict[str, Any]:
    """Everything that is known of a concept, in JSON's types; of one from a list, without what lists leave out."""
    fields = {field.name: getattr(concept, field.name) for field in dataclasses.fields(concept)}
    del fields["created"]
    fields["labels"] = dict(concept.labels)
    fields["create_time"] = concept.create_time.isoformat()
    if concept.vector is None:
        return {name: value for name, value in fields.items() if name not in _LONG}
    sides = {name: [dataclasses.asdict(example) for example in fields[name]] for name in ("examples", "negatives")}
    return {**fields, **sides, "vector": concept.vector.tolist()}


def table(concepts: Iterable[cdam.RegisteredConcept]) -> str:
    """A line for each concept."""
    rows = [("concept", "version", "model", "examples", "negatives", "spread", "stored", "id", "labels")]
    rows += [
        (
            concept.name,
            str(concept.version),
            printable(concept.model),
            str(concept.example_count or "vector"),
            str(concept.negative_count or "-"),
            f"{concept.spread:.3f}" if concept.spread is not None and concept.example_count > 1 else "-",
            f"{concept.create_time.astimezone():%Y-%m-%d %H:%M}",
            concept.id[:SHORT_ID],
            _pairs(concept.labels),
        )
        for concept in concepts
    ]
    return "\n".join(columns(rows, right={1, 3, 4, 5}))


def summary(concept: cdam.RegisteredConcept) -> str:
    """One line on what came of an import."""
    return f"{_version(concept)}, id {concept.id[:SHORT_ID]}{'' if concept.created else _UNCHANGED}"


def registered(
    concept: cdam.RegisteredConcept, names: Mapping[str, Path], *, description: str = "", labels: Mapping[str, str] = {}
) -> str:
    """What was registered, and which examples hardly belong to the others.

    Args:
        concept: The concept.
        names: The images' files, by digest.
        description: What was given as such.
        labels: What was given as such.
    """
    unchanged = _UNCHANGED
    if other := _others(concept, description, labels):
        unchanged = f": already registered, with {other}; --replace takes yours"
    lines = [
        f"{_version(concept)}{'' if concept.created else unchanged}",
        f"  id      {concept.id}",
        f"  made of {_made_of(concept)}",
    ]
    if concept.spread is not None and concept.example_count > 1:
        lines += [f"  spread  {_spread(concept)}", *_fit(concept.examples, names)]
    if concept.example_count == 1:
        lines.append("  one example: this is that image, not yet a concept")
    return "\n".join(lines)


def shown(concept: cdam.RegisteredConcept) -> str:
    """All facts, and how the cosines of examples and negatives are spread."""
    facts = {
        "version": str(concept.version),
        "id": concept.id,
        "model": f"{printable(concept.model)}, fingerprint {concept.model_fingerprint}",
        "description": printable(concept.description),
        "labels": _pairs(concept.labels),
        "stored": f"{concept.create_time.astimezone():%Y-%m-%d %H:%M:%S %z}",
        "made of": _made_of(concept)
        + (", imported: as the export says, not verified here" if concept.imported else ""),
        "brought to": _preparation(concept),
        "content": concept.content_digest,
        "vector": _length(concept),
        "spread": _spread(concept) if concept.example_count > 1 else "",
    }
    lines = [concept.name, *columns([fact for fact in facts.items() if fact[1]])]
    if concept.examples:
        lines += ["", *histogram(concept)]
    return "\n".join(lines)


def histogram(concept: cdam.RegisteredConcept, width: int | None = None) -> Iterator[str]:
    """How many examples, and negatives, have which cosine to the mean of their own.

    Args:
        concept: A concept with its examples.
        width: In characters; None: the terminal's.
    """
    width = width or shutil.get_terminal_size().columns
    sides = [np.array([example.cosine for example in side]) for side in (concept.examples, concept.negatives) if side]
    edges = _edges(np.concatenate(sides))
    counts = [np.histogram(side, edges)[0] for side in sides]
    names = [
        f"{_count(side.size, name)}, to the {name}s' mean"
        for side, name in zip(sides, ("example", "negative"), strict=False)
    ]
    label = "cosine".rjust(len("-0.00 to -0.00"))
    digits = len(str(max(map(np.max, counts))))
    room = max(*map(len, names), 8, (width - len(label) - 4) // len(sides) - digits - 3)
    unit = max(1.0, max(map(np.max, counts)) / room)
    yield "  ".join([f"  {label}", *(name.ljust(room + digits + 1) for name in names)]).rstrip()
    for row in reversed(range(len(edges) - 1)):
        span = f"{edges[row]:.2f} to {edges[row + 1]:.2f}".rjust(len(label))
        cells = (
            f"{count[row] or '':>{digits}} {_bar(count[row], unit, ink)}".ljust(room + digits + 1)
            for count, ink in zip(counts, _inks(), strict=False)
        )
        yield "  ".join([f"  {span}", *cells]).rstrip()


def _edges(cosines: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round ones, and at most `_BINS` bins between them."""
    low, high = cosines.min(), cosines.max()
    for step in _STEPS:  # in hundredths
        first, last = math.floor(100 * low / step), math.ceil(100 * high / step)
        if last - first <= _BINS:
            break
    return np.arange(first, max(last, first + 1) + 1) * step / 100


def _bar(count: int, unit: float, ink: str) -> str:
    return ink * (max(1, round(count / unit)) if count else 0)


def _inks() -> Sequence[str]:
    """For examples and negatives; what the terminal can't show is not used."""
    try:
        "█░".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return "#-"
    return "█░"


def _fit(examples: Sequence[cdam.ConceptExample], names: Mapping[str, Path]) -> Iterator[str]:
    """The lowest cosine, or, if there are any, those far below the others."""
    far = outliers(examples)
    if not far:
        least = min(examples, key=lambda example: example.cosine)
        yield f"  lowest cosine {least.cosine:.3f}: {names.get(least.digest, least.digest)}"
        return
    yield f"  far from the others, by cosine to the mean: {len(far)} of {len(examples)} examples"
    for example in far[:_MOST_OUTLIERS]:
        yield f"    {example.cosine: .3f}  {names.get(example.digest, example.digest)}"


def outliers(examples: Sequence[cdam.ConceptExample]) -> list[cdam.ConceptExample]:
    """Those that hardly belong to the others, the worst first."""
    # Below 0, or by 0.3 and three robust standard deviations below the median: on the demo's digits this finds an odd
    # one among its like, and none in what varies evenly, be its cosines all low or all high.
    cosines = np.array([example.cosine for example in examples])
    middle = np.median(cosines)
    deviation = 1.4826 * np.median(abs(cosines - middle))
    least = max(0.0, middle - max(3 * deviation, 0.3))
    return sorted((example for example in examples if example.cosine < least), key=lambda example: example.cosine)


def _spread(concept: cdam.RegisteredConcept) -> str:
    return f"{concept.spread:.3f}, the mean cosine of the examples to their mean"


def _version(concept: cdam.RegisteredConcept) -> str:
    return f"{concept.name}  version {concept.version} of model {printable(concept.model)}"


def _others(concept: cdam.RegisteredConcept, description: str, labels: Mapping[str, str]) -> str:
    """Which of the words that were given are not those that are stored."""
    differ = {
        "another description": description not in {"", concept.description},
        "other labels": bool(labels) and dict(labels) != dict(concept.labels),
    }
    return " and ".join(what for what, differs in differ.items() if differs)


def _made_of(concept: cdam.RegisteredConcept) -> str:
    if not concept.example_count:
        return "a vector"
    negatives = f", {_count(concept.negative_count, 'negative')}" if concept.negative_count else ""
    return _count(concept.example_count, "example") + negatives


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _preparation(concept: cdam.RegisteredConcept) -> str:
    if concept.input_size is None:
        return ""
    how = "stretched" if concept.resize == "squash" else "as the model was evaluated"
    return "{} x {} pixels, ".format(*concept.input_size) + how


def _length(concept: cdam.RegisteredConcept) -> str:
    if concept.vector is None:
        return ""
    return f"{concept.vector.size} numbers, length {np.linalg.norm(concept.vector.astype(np.float64)):.4g}"


def _pairs(labels: Mapping[str, str]) -> str:
    return printable(", ".join(f"{key}={value}" for key, value in sorted(labels.items())))
