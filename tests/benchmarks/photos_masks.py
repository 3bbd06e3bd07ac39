"""What masks of a few photographs teach a classifier: `cdam train masks` on VOC, with 1 % of the masks, with 5 %, with all.

    python tests/benchmarks/photos_masks.py --checkpoint backbone.safetensors --work masks/

trains the last two blocks of a DINOv2 ViT-S/14 and a linear head on VOC's train split (or takes a --head that
`cdam train head` wrote, or with --whole a checkpoint that has its classifier), and from there once with each share of the
masks, and once as if there were none: the control. What is measured is VOC's val split, which nothing is chosen by. CDAM
and attention, before and after, stand beside it on the first of these images. What is done is kept in the folder: called
again, it goes on. Options of `cdam train masks` follow after --. The table is written into the folder, too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

import cdam_engine as engine
from cdam_engine.evaluation.geometry import Geometry
from cdam_engine.preprocess import prepare
from cdam_images import upright_rgb
from cdam_server.loading import load_model, load_models_file
from cdam_server.specs import Task
from cdam_training.datasets import read_dataset
from cdam_training.mask_metrics import pixel_average_precision
from cdam_training.masks import MaskKind, Masks
from cdam_training.trunk_outputs import Sources
from real.voc import photographs, write_dataset, write_models

ROWS = (
    ("mAP of classification", "", "mean_average_precision"),
    ("AP of pixels", "_masks", "mean_mask_average_precision"),
    ("IoU at .5", "_masks", "mean_mask_iou"),
    ("class IoU at .5", "_masks", "mean_class_iou"),
    ("Brier", "_masks", "mean_mask_brier"),
)


METHODS = {
    "patch mask prediction": engine.PatchMaskPrediction("sigmoid"),
    "CDAM": engine.Cdam(),
    "attention": engine.Attention(),
}


def cdam(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "cdam_server.cli", *map(str, arguments)], check=True)


def compared(models: Path, dataset: Path, count: int) -> dict[str, float]:
    """AP of pixels of methods' maps, the mean over classes, on the first test images; of the model as it is."""
    model = load_model(load_models_file(models)[0])
    explainer, vit = engine.Explainer(model.module), engine.SplitViT(model.module)
    data = read_dataset(dataset, task=Task.MULTI_LABEL, targets=["labels"], split_by="split", mask="mask")
    geometry = Geometry(vit.input_size, vit.patch_size, vit.grid(vit.input_size))
    masks = Masks(data, MaskKind.CLASSES, Sources([row.image for row in data.rows], model.data_config), geometry)
    found: dict[str, defaultdict[int, list[float]]] = {name: defaultdict(list) for name in METHODS}
    for row in [row for row, its in enumerate(data.rows) if its.split == "test"][:count]:
        with Image.open(data.rows[row].image) as opened:
            pixels = prepare(upright_rgb(opened), model.data_config).pixels
        mask = masks.of(row)
        there = np.flatnonzero(mask.inside.sum(1)).tolist()
        asked = [engine.Output(output) for output in there]
        (explanation,) = explainer.explain(torch.from_numpy(pixels)[None], [asked], [[*METHODS.values()]])
        for its in explanation.maps:
            for output in there if its.target_index is None else [there[its.target_index]]:
                value = pixel_average_precision(
                    its.scores.ravel().astype(np.float64),
                    mask.inside[output].astype(np.float64),
                    mask.decided.astype(np.float64),
                )
                found[[*METHODS][its.method_index]][output].append(value)
    return {name: float(np.mean([np.mean(values) for values in its.values()])) for name, its in found.items()}


def table(cards: Mapping[str, dict[str, Any]], methods: Mapping[str, Mapping[str, float]], count: int) -> Iterator[str]:
    """In Markdown, a column for each training."""
    yield "| | before | " + " | ".join(cards) + " |"
    yield "|---" * (len(cards) + 2) + "|"
    for title, part, name in ROWS:
        cells = [shown(next(iter(cards.values()))["metrics"][f"test{part}_before"]["estimates"][name])]
        cells += [shown(card["metrics"][f"test{part}"]["estimates"][name]) for card in cards.values()]
        yield f"| {title} | {' | '.join(cells)} |"
    yield ""
    yield f"AP of pixels on the first {count} val images | " + " | ".join(METHODS)
    for name, its in methods.items():
        yield f"{name} | " + " | ".join(f"{value:.3f}" for value in its.values())


def shown(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})"


def models_file(path: Path, checkpoint: Path, head: Path | None) -> Path:
    write_models(path, checkpoint, head)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the backbone, or with --whole a whole model")
    parser.add_argument("--whole", action="store_true", help="the checkpoint has a classifier of VOC's 20 classes")
    parser.add_argument("--head", type=Path, help="what `cdam train head` made of the backbone  [made anew]")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.05, 0.2, 1.0])
    parser.add_argument("--val", type=int, default=511, metavar="IMAGES", help="of the val split that are measured on")
    parser.add_argument("--compare", type=int, default=120, metavar="IMAGES", help="with CDAM and attention")
    parser.add_argument("rest", nargs="*", metavar="OPTION", help="after --: more options of `cdam train masks`")
    given = parser.parse_args()
    work: Path = given.work
    work.mkdir(parents=True, exist_ok=True)
    dataset = work / "voc.jsonl"
    write_dataset(photographs(), dataset, given.val)
    shared = ["--task", "multi_label", "--target", "labels", "--split-by", "split", "--keep-dtype", "float16"]
    shared += ["--kept", work / "kept"]
    head = given.head
    if head is None and not given.whole:
        head = work / "head.safetensors"
        if not head.exists():
            models = models_file(work / "backbone.yaml", given.checkpoint, None)
            recipe = ["--train-blocks", 2, "--epochs", 4, "--token-dropout", 0.2]
            cdam("train", "head", dataset, "--models-file", models, *shared, *recipe, "-o", head)
    models = models_file(work / "before.yaml", given.checkpoint, head)
    cards = {}
    methods = {"before": compared(models, dataset, given.compare)}
    trainings = [("control", 0.01, ["--mask-weight", 1e-9])]
    trainings += [(f"masks_{share:g}", share, []) for share in given.shares]
    trainings += [("unbalanced", given.shares[-1], ["--no-balance-masks"])]
    for name, share, own in trainings:
        weights = work / f"{name}.safetensors"
        if not weights.exists():
            more = ["--mask", "mask", "--masked-share", share, *own, *given.rest]
            cdam("train", "masks", dataset, "--models-file", models, *shared, *more, "-o", weights)
        card = json.loads(weights.with_suffix(".json").read_text())
        images = f"{share:.0%} ({card['recipe']['masks']['train']} images)"
        title = {"control": "no masks", "unbalanced": f"{images}, not balanced"}.get(name, images)
        cards[title] = card
        if name != "control":
            methods[title] = compared(
                models_file(work / f"{name}.yaml", given.checkpoint, weights), dataset, given.compare
            )
    text = "\n".join(table(cards, methods, given.compare))
    (work / "masks.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
