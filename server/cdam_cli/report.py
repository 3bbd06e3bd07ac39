"""What `cdam explain` shows and writes of each answer."""

import dataclasses
import json
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

import cdam
from cdam_cli.spelling import parameters

SHORT_ID = 12  # digits of an id that stand for it
_LARGE = 512  # longer side of an overlay of a small image, in pixels


@dataclass
class Report:
    """What is shown and written of each answer.

    Attributes:
        out: Folder for files; None: none.
        as_json: Print JSON lines in place of tables.
        shared_scale: One scale of colours for all maps of an image.
        blocks: Show patches as blocks.
        sheet: Also write a contact sheet.
        box: Draw and tell the box of each map at this fraction of its maximum; None: none.
    """

    out: Path | None
    as_json: bool
    shared_scale: bool
    blocks: bool
    sheet: bool
    box: float | None = None
    _taken: set[str] = field(default_factory=set)

    def add(self, path: Path, explanation: cdam.Explanation) -> None:
        """Show and write one image's answer."""
        stem = self._free(path.stem, "")
        files = self._write_overlays(stem, explanation) if self.out else [None] * len(explanation)
        answer = as_json(path, explanation, files, self.box)
        if self.out:
            self._write_text(f"{stem}.json", json.dumps(answer))
            if self.sheet:
                picture = cdam.render.sheet(
                    explanation,
                    shared_scale=self.shared_scale,
                    interpolation=self._interpolation,
                    title=path.name,
                    box=self.box,
                )
                picture.save(self.out / f"{stem}.sheet.png")
        if self.as_json:
            click.echo(json.dumps(answer))
        else:
            click.echo(table(path, explanation, files, self.box))

    @property
    def _interpolation(self) -> cdam.Interpolation:
        return "nearest" if self.blocks else "bicubic"

    def _write_overlays(self, stem: str, explanation: cdam.Explanation) -> list[Path | None]:
        assert self.out is not None
        self.out.mkdir(parents=True, exist_ok=True)
        scale = cdam.render.limit(explanation) if self.shared_scale else None
        zoom = max(1, round(_LARGE / max(explanation.image_size)))
        files: list[Path | None] = []
        for relevance in explanation:
            parts = [stem, relevance.label, relevance.method.kind]
            file = self.out / self._free(".".join(safe(part) for part in parts if part), ".png")
            relevance.overlay(scale=scale, interpolation=self._interpolation, zoom=zoom, box=self.box).save(file)
            files.append(file)
        return files

    def _write_text(self, name: str, text: str) -> None:
        assert self.out is not None
        (self.out / name).write_text(text + "\n", encoding="utf-8")

    def _free(self, stem: str, suffix: str) -> str:
        """A file name that this run has not used: images in different folders may share their stem."""
        stem = safe(stem)
        name, number = stem + suffix, 1
        while name.lower() in self._taken:  # some file systems don't tell cases apart
            number += 1
            name = f"{stem}-{number}{suffix}"
        self._taken.add(name.lower())
        return name


def safe(text: str) -> str:
    """The text with what file names can't hold replaced, and of a length that they can; never a hidden file's."""
    tame = re.sub(r"[^\w.+-]+", "_", text)
    return re.sub(r"^_*\.[._]*", "_", tame).rstrip("._")[:80] or "_"


def printable(text: str) -> str:
    """A text of somebody's with what would steer a terminal, or hide, spelled out."""
    return "".join(
        ascii(letter)[1:-1] if unicodedata.category(letter) in {"Cc", "Cf", "Cs", "Zl", "Zp"} else letter
        for letter in text
    )


def as_json(
    path: Path, explanation: cdam.Explanation, files: Sequence[Path | None], box: float | None = None
) -> dict[str, Any]:
    """Everything that an answer says, in JSON's types; boxes at a fraction of the maximum, if asked for."""
    return {
        "image": str(path),
        "request_id": explanation.request_id,
        "model": explanation.model,
        "fingerprint": explanation.fingerprint,
        "patch_grid": explanation.patch_grid,
        "region": dataclasses.asdict(explanation.region),
        "image_size": explanation.image_size,
        "input_size": explanation.input_size,
        "seconds": {name: getattr(explanation.timing, name) for name in ("decode", "queue", "trunk", "tail", "total")},
        "token_cache_hit": explanation.token_cache_hit,
        "maps": [
            {
                "label": relevance.label,
                "method": relevance.method.kind,
                "parameters": {
                    name: dataclasses.asdict(value) if isinstance(value, cdam.Noise) else value
                    for name, value in parameters(relevance.method).items()
                },
                "target": _target(relevance.target.target) if relevance.target else None,
                "output_index": relevance.target.output_index if relevance.target else None,
                "value": relevance.target.value if relevance.target else None,
                "probability": relevance.target.probability if relevance.target else None,
                "prefix_share": relevance.prefix_share,
                "overlay": str(file) if file else None,
                **({} if box is None else {"box": _asdict(relevance.box(box))}),
                "scores": relevance.scores.tolist(),
                "value_part": relevance.parts.value.tolist() if relevance.parts else None,
                "key_part": relevance.parts.key.tolist() if relevance.parts else None,
                "standard_error": None if relevance.standard_error is None else relevance.standard_error.tolist(),
                "completeness_residual": relevance.completeness_residual,
                "steps": relevance.steps,
            }
            for relevance, file in zip(explanation, files, strict=True)
        ],
    }


def table(path: Path, explanation: cdam.Explanation, files: Sequence[Path | None], box: float | None = None) -> str:
    """A line for each map: the target, the model's answer to it, how much speaks for and against it, and where."""
    logits = all(target.probability is not None for target in explanation.targets)
    concepts = any(_ids(relevance) for relevance in explanation)
    heads = (
        "target",
        "method",
        "logit" if logits and explanation.targets else "value",
        "probability",
        "for",
        "against",
    )
    boxes = [] if box is None else ["box: left, top, right, bottom"]
    rows = [(*heads, *(["concept"] if concepts else []), *boxes, "file")]
    for relevance, file in zip(explanation, files, strict=True):
        target, scores = relevance.target, relevance.scores
        probability = target.probability if target else None
        rows.append(
            (
                relevance.label or "-",
                relevance.method.kind,
                f"{target.value:.3f}" if target else "-",
                f"{probability:.1%}" if probability is not None else "-",
                f"{scores.clip(min=0).sum():+.4f}",
                f"{scores.clip(max=0).sum():+.4f}",
                *([_ids(relevance) or "-"] if concepts else []),
                *([] if box is None else [_corners(relevance.box(box))]),
                str(file or "-"),
            )
        )
    height, width = explanation.patch_grid
    milliseconds = 1000 * explanation.timing.total
    head = f"{path}  {explanation.model}, {height} x {width} patches, {milliseconds:.1f} ms"
    return "\n".join([head, *columns(rows, right={2, 3, 4, 5}), ""])


def _asdict(box: cdam.Region | None) -> dict[str, float] | None:
    return None if box is None else dataclasses.asdict(box)


def _corners(box: cdam.Region | None) -> str:
    return "-" if box is None else ", ".join(f"{edge:g}" for edge in dataclasses.astuple(box))


def _target(target: cdam.Output | cdam.Concept | cdam.Contrast) -> dict[str, Any]:
    """What was explained, in JSON's types."""
    match target:
        case cdam.Contrast():
            return {"contrast": {side: _target(getattr(target, side)) for side in ("positive", "negative")}}
        case cdam.Concept():
            return {"concept": {"id": target.id, "name": target.label, "similarity": target.similarity}}
        case _:
            return {"output": target.selector}


def _ids(relevance: cdam.RelevanceMap) -> str:
    """The first digits of the ids of concepts that were explained."""
    target = relevance.target.target if relevance.target else None
    sides = (target.positive, target.negative) if isinstance(target, cdam.Contrast) else (target,)
    return " - ".join(side.id[:SHORT_ID] for side in sides if isinstance(side, cdam.Concept) and side.id)


def columns(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> Iterator[str]:
    """Lines with the cells of each column one below the other, those of `right` aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield ("  " + "  ".join(cells)).rstrip()
