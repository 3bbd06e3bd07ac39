"""All claims of the papers, held against what was measured of scenes, photographs and lung nodules: one table.

    python tests/benchmarks/claims.py --write

reads the journals that scenes.py, photos.py and nodules.py measure, and the folder of photos_masks.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import photos_masks, scenes
from benchmarks.lung import claims as of_nodules
from benchmarks.lung.reading import read as read_nodules
from benchmarks.photographs import claims as of_photographs
from benchmarks.photographs.reading import by_pixel
from benchmarks.photographs.reading import read as read_photographs
from benchmarks.sheets import insert, lines, table
from benchmarks.verdicts import Claim

DOCUMENT: Final = Path("docs/benchmarks/claims.md")
_VERDICTS: Final = ("agrees", "does not", "can't tell")


def found(results: Path, masks: Path) -> Iterator[tuple[str, list[Claim]]]:
    """What was measured on, and the claims that were tested on it."""
    paths = sorted((results / "scenes").glob("shipped-papers-*.jsonl"))
    if paths:
        yield f"scenes ({sum(1 for path in paths for _ in lines(path))})", scenes.claims(paths)
    photos = results / "photos"
    for seed in sorted({path.name.split("-")[0] for path in photos.glob("seed*-*.jsonl")}):
        for part, classes, of in (
            ("multi", "several classes", of_photographs.of_several),
            ("single", "one class", of_photographs.of_single),
        ):
            its = read_photographs(sorted(photos.glob(f"{seed}-{part}-*.jsonl")))
            if its is None:
                continue
            pixels = sorted(photos.glob(f"{seed}-pixels-*.jsonl")) if part == "multi" else []
            ranked = by_pixel(its, pixels) if pixels else None
            where = f"photographs of {classes}, {seed.replace('seed', 'seed ')} ({len((ranked or its).kept)})"
            yield (where if ranked else f"{where}, by patch"), list(of(ranked or its))
    if all((masks / f"{name}.compared.json").exists() for name in photos_masks.CLAIMED):
        yield "photographs, with masks", list(photos_masks.claims(masks))
    nodules = read_nodules(results / "nodules")
    if nodules is not None:
        yield "lung nodules", list(of_nodules.every_claim(nodules))


def claims(everything: Sequence[tuple[str, Sequence[Claim]]]) -> str:
    """As markdown: each claim once, and below it all that it was tested on."""
    texts = list(dict.fromkeys(claim.text for _, its in everything for claim in its))
    rows = []
    for text in texts:
        shown = text
        for ground, its in everything:
            for claim in its:
                if claim.text == text:
                    rows.append([shown, ground, claim.figure, claim.verdict])
                    shown = ""
    return table(["the papers say", "on", "here, with 95 % interval", ""], rows)


def counts(everything: Sequence[tuple[str, Sequence[Claim]]]) -> str:
    """As markdown: how many claims of each verdict."""
    rows = [
        [ground, *(str(sum(claim.verdict == verdict for claim in its)) for verdict in _VERDICTS)]
        for ground, its in everything
    ]
    return table(["", *_VERDICTS], rows)


def blocks(everything: Sequence[tuple[str, Sequence[Claim]]]) -> Mapping[str, str]:
    """Of the document."""
    return {"counts": counts(everything), "claims": claims(everything)}


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"), help="with scenes, photos and nodules")
    parser.add_argument("--masks", type=Path, default=Path("results/masks"), help="what photos_masks.py --work named")
    parser.add_argument("--write", action="store_true", help="put the tables into the document")
    arguments = parser.parse_args()
    tables = blocks(list(found(arguments.results, arguments.masks)))
    print("\n\n".join(tables.values()))
    if arguments.write:
        DOCUMENT.write_text(insert(DOCUMENT.read_text(), tables))


if __name__ == "__main__":
    main()
