"""What masks of a few photographs teach a classifier: `cdam train masks` on VOC, with 1 % of the masks, with 5 %, with all.

    python tests/benchmarks/photos_masks.py --checkpoint backbone.safetensors --work masks/

trains the last two blocks of a DINOv2 ViT-S/14 and a linear head on VOC's train split (or takes a --head that
`cdam train head` wrote, or with --whole a checkpoint that has its classifier), and from there once with each share of the
masks, and once as if there were none: the control. What is measured is VOC's val split, by which nothing was chosen but
that patches are balanced; maps of CDAM and attention, before and after, on the same images. What is done is kept in the
folder: called again, it goes on. Options of `cdam train masks` follow after --. The table is written into the folder, too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

import cdam_engine as engine
from benchmarks.verdicts import Claim, Estimate, Floats, estimate, mean
from cdam_engine.evaluation.geometry import Geometry
from cdam_engine.preprocess import prepare
from cdam_images import upright_rgb
from cdam_server.compute.loading import load_model, load_models_file
from cdam_server.settings.specs import Task
from cdam_training.datasets import read_dataset
from cdam_training.mask_metrics import pixel_average_precision
from cdam_training.masks import MaskKind, Masks
from cdam_training.ranking import average_precision
from cdam_training.trunk_outputs import Sources
from real.voc import photographs, write_dataset, write_models

ROWS = (
    ("mAP of classification", "", "mean_average_precision"),
    ("AP of pixels", "_masks", "mean_mask_average_precision"),
    ("IoU at .5", "_masks", "mean_mask_iou"),
    ("class IoU at .5", "_masks", "mean_class_iou"),
    ("Brier", "_masks", "mean_mask_brier"),
)


PATCHES = "patch mask prediction"
METHODS = {
    PATCHES: engine.PatchMaskPrediction("sigmoid"),
    "CDAM": engine.Cdam(),
    "attention": engine.Attention(),
}
CLAIMED = ("before", "masks_0.01")


@dataclass(frozen=True)
class Compared:
    """What a model says of images, and how good methods' maps of it are.

    Attributes:
        parameters: How many it has.
        logits: Of each image, (images, C).
        labels: Likewise: 1 where the image shows the class.
        maps: Image, method, class of the map, class of the mask, and the map's average precision of the mask's pixels;
            for all classes that the image's mask shows.
    """

    parameters: int
    logits: list[list[float]]
    labels: list[list[float]]
    maps: list[tuple[int, str, int, int, float]]

    def precision(self, method: str, *, other: bool = False) -> Floats:
        """Average precision of each image, the mean over its classes; or of their maps for the other classes' masks.

        Returns:
            (images,); NaN where there is no other class.
        """
        found: list[list[float]] = [[] for _ in self.logits]
        for image, name, of_map, of_mask, value in self.maps:
            if name == method and (of_map != of_mask) == other:
                found[image].append(value)
        return np.array([np.mean(values) if values else np.nan for values in found])


def cdam(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "cdam_cli", *map(str, arguments)], check=True)


def compared(models: Path, dataset: Path, count: int, kept: Path) -> Compared:
    """What the model as it is says of the first test images, and methods' maps of the classes that they show.

    Args:
        models: The models file.
        dataset: As of `cdam train`.
        count: How many images.
        kept: Where it is written; if it is there, it is read.

    Raises:
        ValueError: It is there, and of another number of images.
    """
    if kept.exists():
        known = Compared(**json.loads(kept.read_text()))
        if len(known.logits) != count:
            raise ValueError(
                f"{kept}: of {len(known.logits)} images, not of {count}: remove it, or name another folder"
            )
        return known
    model = load_model(load_models_file(models)[0])
    explainer, vit = engine.Explainer(model.module), engine.SplitViT(model.module)
    data = read_dataset(dataset, task=Task.MULTI_LABEL, targets=["labels"], split_by="split", mask="mask")
    geometry = Geometry(vit.input_size, vit.patch_size, vit.grid(vit.input_size))
    masks = Masks(data, MaskKind.CLASSES, Sources([row.image for row in data.rows], model.data_config), geometry)
    labels = data.targets()
    found = Compared(sum(its.numel() for its in model.module.parameters()), [], [], [])
    for image, row in enumerate([row for row, its in enumerate(data.rows) if its.split == "test"][:count]):
        with Image.open(data.rows[row].image) as opened:
            pixels = prepare(upright_rgb(opened), model.data_config).pixels
        mask = masks.of(row)
        there = np.flatnonzero(mask.inside.sum(1)).tolist()
        asked = [engine.Output(output) for output in there]
        (explanation,) = explainer.explain(torch.from_numpy(pixels)[None], [asked], [[*METHODS.values()]])
        found.logits.append(explanation.logits.tolist())
        found.labels.append(labels[row].tolist())
        for its in explanation.maps:
            method, scores = [*METHODS][its.method_index], its.scores.ravel().astype(np.float64)
            for output in there if its.target_index is None else [there[its.target_index]]:
                for other in there:
                    precision = pixel_average_precision(
                        scores, mask.inside[other].astype(np.float64), mask.decided.astype(np.float64)
                    )
                    found.maps.append((image, method, output, other, precision))
    kept.write_text(json.dumps(asdict(found)))
    return found


def table(cards: Mapping[str, dict[str, Any]], models: Mapping[str, Compared]) -> Iterator[str]:
    """In Markdown, a column for each training."""
    yield "| | before | " + " | ".join(cards) + " |"
    yield "|---" * (len(cards) + 2) + "|"
    for title, part, name in ROWS:
        cells = [shown(next(iter(cards.values()))["metrics"][f"test{part}_before"]["estimates"][name])]
        cells += [shown(card["metrics"][f"test{part}"]["estimates"][name]) for card in cards.values()]
        yield f"| {title} | {' | '.join(cells)} |"
    for method in METHODS:
        cells = [mean(_there(its.precision(method))).text(3) for its in models.values()]
        yield f"| AP of pixels by image, {method} | {' | '.join(cells)} |"


def claims(folder: Path) -> Iterator[Claim]:
    """What the PM paper's abstract says, held against a training with 1 % of the masks.

    Args:
        folder: What `--work` named.
    """
    before, after = (Compared(**json.loads((folder / f"{name}.compared.json").read_text())) for name in CLAIMED)
    more = float(after.parameters - before.parameters)
    yield Claim(
        "patch mask prediction: no extra parameters",
        f"{after.parameters:,} before and after" if not more else f"{more:+,.0f}",
        Estimate(*[-1.0 if more else 1.0] * 3),
    )
    yield _better("... masks for 1 % of the training images suffice", after, PATCHES, before, PATCHES)
    for other in ("attention", "CDAM"):
        yield _better(f"... its maps are better than those of {other}", after, PATCHES, after, other)
    own, others = after.precision(PATCHES), after.precision(PATCHES, other=True)
    found = mean(_there(own - others))
    text = f"AP of the map's own class less that of the other class: {found.text()}, where an image shows several"
    yield Claim("... its maps depend on the class", text, found)
    gained = estimate(
        np.stack([np.array(its) for its in (before.logits, after.logits, before.labels)], axis=1),
        lambda its: _mean_precision(its[:, 1], its[:, 2]) - _mean_precision(its[:, 0], its[:, 2]),
    )
    yield Claim("... it is better in classification, too", f"mAP after less before: {gained.text(3)}", gained)


def _better(text: str, its: Compared, method: str, other: Compared, other_method: str) -> Claim:
    ours, theirs = its.precision(method), other.precision(other_method)
    found = mean(_there(ours - theirs))
    means = f"{np.nanmean(ours):.2f} against {np.nanmean(theirs):.2f}"
    return Claim(text, f"AP of pixels {means}: difference {found.text()}", found)


def _there(values: Floats) -> Floats:
    return values[np.isfinite(values)]


def _mean_precision(scores: Floats, labels: Floats) -> float:
    """Over classes that an image shows."""
    weights = np.ones((1, len(scores)))
    found = [average_precision(its, shown > 0, weights)[0] for its, shown in zip(scores.T, labels.T, strict=True)]
    return float(np.nanmean(found))


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
    parser.add_argument("--compare", type=int, default=511, metavar="IMAGES", help="with CDAM and attention")
    parser.add_argument("rest", nargs="*", metavar="OPTION", help="after --: more options of `cdam train masks`")
    given = parser.parse_args()
    compare = min(given.compare, given.val)
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
    found = {"before": compared(models, dataset, compare, work / "before.compared.json")}
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
        models = models_file(work / f"{name}.yaml", given.checkpoint, weights)
        found[title] = compared(models, dataset, compare, work / f"{name}.compared.json")
        text = "\n".join(table(cards, found))  # of what is done so far
        (work / "masks.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
