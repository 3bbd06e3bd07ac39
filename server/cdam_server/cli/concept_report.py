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
from cdam_server.cli.report import columns, printable

_SHORT_ID: Final = 12
_WORST: Final = 5
_BINS: Final = 12
_STEPS: Final = (1, 2, 5, 10, 20)
_LOOSE: Final = 0.1  # mean cosine of two examples
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
            "-" if concept.spread is None else f"{concept.spread:.3f}",
            f"{concept.create_time.astimezone():%Y-%m-%d %H:%M}",
            concept.id[:_SHORT_ID],
            _pairs(concept.labels),
        )
        for concept in concepts
    ]
    return "\n".join(columns(rows, right={1, 3, 4, 5}))


def summary(concept: cdam.RegisteredConcept) -> str:
    """One line on what came of a registration."""
    unchanged = "" if concept.created else ": already registered, nothing changed"
    return f"{concept.name}  version {concept.version} of model {concept.model}, id {concept.id[:_SHORT_ID]}{unchanged}"


def registered(concept: cdam.RegisteredConcept, names: Mapping[str, Path]) -> str:
    """What was registered, and which examples fit worst.

    Args:
        concept: The concept.
        names: The images' files, by digest.
    """
    lines = [
        summary(concept),
        f"  id      {concept.id}",
        f"  made of {_made_of(concept)}",
    ]
    if concept.spread is not None and concept.example_count > 1:
        lines += [f"  spread  {_spread(concept)}", *_hint(concept)]
        lines += ["  the examples that fit worst", *_worst(concept.examples, names)]
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
        "made of": _made_of(concept) + (", as an export says" if concept.imported else ""),
        "brought to": _preparation(concept),
        "content": concept.content_digest,
        "vector": _length(concept),
        "spread": _spread(concept) if concept.example_count > 1 else "",
    }
    lines = [concept.name, *columns([fact for fact in facts.items() if fact[1]])]
    if concept.examples:
        lines += [*_hint(concept), "", *histogram(concept)]
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
    names = [f"{side.size} {name}" for side, name in zip(sides, ("examples", "negatives"), strict=False)]
    label = "cosine to their mean"
    digits = len(str(max(map(np.max, counts))))
    room = max(8, (width - len(label) - 4) // len(sides) - digits - 3)
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


def _worst(examples: Sequence[cdam.ConceptExample], names: Mapping[str, Path]) -> Iterator[str]:
    for example in sorted(examples, key=lambda example: example.cosine)[:_WORST]:
        yield f"    {example.cosine:.3f}  {names.get(example.digest, example.digest)}"


def _spread(concept: cdam.RegisteredConcept) -> str:
    unrelated = concept.example_count**-0.5  # of so many latents in random directions
    return (
        f"{concept.spread:.3f}, the mean cosine of the examples to their mean; of unrelated ones, about {unrelated:.2f}"
    )


def _hint(concept: cdam.RegisteredConcept) -> list[str]:
    if is_loose(concept):
        return [
            "  This is low: to this model the examples have next to nothing in common, and no direction stands for them."
        ]
    return []


def is_loose(concept: cdam.RegisteredConcept) -> bool:
    """Whether the examples lie about as far from each other as what has nothing in common.

    For n directions whose pairs have the mean cosine p, the length s of their mean, which is also their mean cosine to
    it, has s^2 = 1/n + (n - 1)/n p.
    """
    spread, n = concept.spread, concept.example_count
    return spread is not None and n > 1 and (n * spread * abs(spread) - 1) / (n - 1) < _LOOSE


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
