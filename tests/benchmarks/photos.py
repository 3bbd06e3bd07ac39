"""The papers' benchmarks on photographs: PASCAL VOC with masks, and a DINOv2 ViT-S/14 trained on for its classes.

    python tests/benchmarks/photos.py --name seed0 sigma --weights seed0.safetensors        # 1: noise of what draws
    python tests/benchmarks/photos.py --name seed0 measure --weights seed0.safetensors      # 2: X_multi
    python tests/benchmarks/photos.py --name seed0 measure --weights seed0.safetensors --part single
    python tests/benchmarks/photos.py --name seed0 pixels --weights seed0.safetensors       # maps over pixels, not patches
    python tests/benchmarks/photos.py --name seed0 concepts --weights seed0.safetensors     # also the model's own figures
    python tests/benchmarks/photos.py report --write

`measure` appends what it finds of each photograph to a file in `results/photos/` and goes on where it stopped. `--shard
0/2` and `1/2` side by side take every second photograph each, with one thread. Photographs come in an order drawn by
seed, so those of an unfinished run are a random sample. `report` computes all tables, claims and figures from these
files alone. Data: see `tests/real/voc.py`. The weights: docs/benchmarks/photos.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.photographs import choice, concepts, measuring, pixelwise, reporting, sigmas
from benchmarks.sheets import Journal, together
from cdam_engine import Explainer
from cdam_server.settings.load_error import LoadError
from real.voc import photographs

RESULTS: Final = Path("results/photos")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", default="seed0", help="of the model, in the results' file names")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("sigma", "choose the noise of Smooth CDAM and SmoothGrad on photographs for training"),
        ("measure", "measure photographs"),
        ("pixels", "measure maps over pixels of the methods that differentiate for them"),
        ("concepts", "maps of concepts, and the model's mean average precision"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument(
            "--weights", type=Path, required=True, help="the model's whole state dict, or a file of `cdam train`"
        )
        command.add_argument("--backbone", type=Path, help="the checkpoint that a file of `cdam train` was trained on")
        command.add_argument("--device", default="cpu", help="where to compute: cpu, cuda")
        command.add_argument("--shard", default="0/1", help="every how manieth photograph, as 0/2 and 1/2")
        command.add_argument("--photographs", type=int, help="only the first ones; default: all")
        if name == "measure":
            command.add_argument("--part", choices=("multi", "single"), default="multi")
        if name in {"measure", "pixels"}:
            command.add_argument(
                "--sigmas",
                type=float,
                nargs=2,
                metavar=("SMOOTH_CDAM", "SMOOTH_GRAD"),
                help="default: as `sigma` found",
            )
        if name == "sigma":
            command.add_argument("--method", choices=tuple(sigmas.LEVELS), action="append", help="default: both")
    report = commands.add_parser("report", help="tables, claims and figures from what was measured")
    report.add_argument("--write", action="store_true", help="put them into the document")
    arguments = parser.parse_args()
    if not re.fullmatch(r"\w+", arguments.name):
        parser.error(f"--name: {arguments.name!r}, but it is of letters, digits and _")
    try:
        _COMMANDS[arguments.command](arguments)
    except (LoadError, LookupError, ValueError) as error:
        sys.exit(str(error))


def _sigma(arguments: argparse.Namespace) -> None:
    explainer = _explainer(arguments)
    for kind in arguments.method or sigmas.LEVELS:
        its = sigmas.protocol(kind)
        tool = measuring.Measuring(explainer, its)
        print(f"{kind}: about {tool.evaluator.passes()} passes a photograph", file=sys.stderr)
        chosen = choice.trained(photographs(), arguments.photographs or sigmas.IMAGES[kind])
        journal = _journal(arguments, f"sigma_{kind}", measuring.header(explainer, its))
        for one in _shard(arguments, chosen):
            if one.id not in journal.known:
                journal.add(sigmas.record(tool, explainer, one))
                print(kind, one.id, file=sys.stderr)


def _measure(arguments: argparse.Namespace) -> None:
    explainer = _explainer(arguments)
    noise = _noise(arguments)
    its = measuring.protocol(arguments.part, noise)
    tool = measuring.Measuring(explainer, its)
    print(f"about {tool.evaluator.passes()} passes a photograph", file=sys.stderr)
    voc = photographs()
    chosen = choice.several(voc)
    if arguments.part == "single":
        chosen = choice.alone(voc, len(chosen))
    journal = _journal(
        arguments, arguments.part, measuring.header(explainer, its, classes=voc.classes, sigmas=asdict(noise))
    )
    for done in measuring.measure(tool, _shard(arguments, chosen[: arguments.photographs]), journal):
        print(arguments.part, done, file=sys.stderr)


def _pixels(arguments: argparse.Namespace) -> None:
    explainer, noise = _explainer(arguments), _noise(arguments)
    its = pixelwise.protocol(noise)
    tool = measuring.Measuring(explainer, its)
    journal = _journal(arguments, "pixels", measuring.header(explainer, its, sigmas=asdict(noise)))
    for one in _shard(arguments, choice.several(photographs())[: arguments.photographs]):
        if one.id not in journal.known:
            journal.add(pixelwise.record(tool, explainer, one))
            print("pixels", one.id, file=sys.stderr)


def _noise(arguments: argparse.Namespace) -> measuring.Sigmas:
    if arguments.sigmas:
        return measuring.Sigmas(*arguments.sigmas)
    return sigmas.chosen_sigmas(arguments.results, arguments.name)


def _concepts(arguments: argparse.Namespace) -> None:
    explainer, voc = _explainer(arguments), photographs()
    kept = {
        split: concepts.outputs(explainer, voc, split, arguments.results / f"{arguments.name}-outputs-{split}.npz")
        for split in ("train", "val")
    }
    head = measuring.header(explainer, None, classes=voc.classes)
    head |= {"average_precision": concepts.summary(kept["val"], voc.classes), "examples": concepts.counts(voc)}
    journal = _journal(arguments, "concepts", head)
    plain, centred = concepts.vectors(voc, kept["train"])
    for one in _shard(arguments, choice.several(voc)[: arguments.photographs]):
        if one.id not in journal.known:
            journal.add(concepts.record(explainer, one, plain, centred))


def _report(arguments: argparse.Namespace) -> None:
    for line in reporting.report(arguments.results, arguments.name, write=arguments.write):
        print(line)


_COMMANDS: Final = {
    "sigma": _sigma,
    "measure": _measure,
    "pixels": _pixels,
    "concepts": _concepts,
    "report": _report,
}


def _explainer(arguments: argparse.Namespace) -> Explainer:
    if _of(arguments.shard)[1] > 1:
        torch.set_num_threads(1)
    return measuring.load(arguments.weights, arguments.backbone, arguments.device)


def _journal(arguments: argparse.Namespace, part: str, header: dict[str, object]) -> Journal:
    first, step = _of(arguments.shard)
    journal = Journal(arguments.results / f"{arguments.name}-{part}-{first}of{step}.jsonl", header)
    others = sorted(arguments.results.glob(f"{arguments.name}-{part}-*.jsonl"))
    journal.known |= {line["id"] for line in together(others)}  # what was measured with another number of shards
    return journal


def _shard(arguments: argparse.Namespace, chosen: Sequence[choice.Chosen]) -> list[choice.Chosen]:
    first, step = _of(arguments.shard)
    return list(islice(chosen, first, None, step))


def _of(shard: str) -> tuple[int, int]:
    first, slash, step = shard.partition("/")
    if not (slash and first.isdigit() and step.isdigit() and int(first) < int(step)):
        raise ValueError(f"--shard: {shard!r}, but it is like 0/2 or 1/2")
    return int(first), int(step)


if __name__ == "__main__":
    main()
