"""Heads on kept latents: how long they take, and whether they are as good as scikit-learn's.

    python tests/benchmarks/training.py [--images 1000]

Scenes of one digit, the demo model's backbone; `LogisticRegression` gets the same latents, the same images to train on
and to choose the penalty by. Prints a table and keeps results/training.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression

from cdam_engine.preprocess import normalise, prepare
from cdam_server.compute.loading import load_backbone
from cdam_server.demo.scenes import draw_scene
from cdam_server.settings.specs import DEMO, ModelSpec
from cdam_training.command import images_of
from cdam_training.convex import PENALTIES
from cdam_training.datasets import Dataset, read_dataset
from cdam_training.heads import Options, train_head
from cdam_training.loop import Recipe
from cdam_training.splits import split_dataset

HELD: Final = 0.2
SPEC: Final = ModelSpec(name=DEMO, architecture=DEMO)


@dataclass(frozen=True)
class Row:
    """One way to get a head.

    Attributes:
        what: The way.
        trunk_seconds: For what the trunk makes of all images.
        head_seconds: For the head.
        accuracy: On the test images.
    """

    what: str
    trunk_seconds: float | None
    head_seconds: float
    accuracy: float


class Clock:
    """How long the parts take; a `cdam_training.heads.Progress`."""

    def __init__(self) -> None:
        self.began = perf_counter()
        self.trunk_done = self.began

    def reading(self, done: int, total: int) -> None:
        """Not timed."""

    def trunk(self, done: int, total: int) -> None:
        """The last call is the end of it."""
        self.trunk_done = perf_counter()

    def training(self, done: int, total: int, history: object) -> None:
        """Ends with the call."""

    def fitting(self, fits: object, total: int) -> None:
        """Ends with the call."""


def draw(folder: Path, count: int) -> Dataset:
    """Scenes of one digit, in a folder for each digit."""
    for number in range(count):
        scene = draw_scene("train", 900_000 + number, 1)
        (digit,) = scene.objects
        place = folder / str(digit.label)
        place.mkdir(exist_ok=True, parents=True)
        Image.fromarray(scene.image).save(place / f"{number}.png")
    return read_dataset(folder)


def ours(what: str, dataset: Dataset, options: Options, recipe: Recipe, work: Path) -> Row:
    """By `cdam train head`."""
    splits = split_dataset(dataset, validation=HELD, test=HELD)
    clock = Clock()
    trained = train_head(load_backbone(SPEC), images_of(dataset, splits), options, recipe, work, clock)
    end = perf_counter()
    said = trained.outputs(splits.test).argmax(1).numpy()
    right = float((said == dataset.targets(splits.test)).mean())
    return Row(what, clock.trunk_done - clock.began, end - clock.trunk_done, right)


def latents(dataset: Dataset) -> NDArray[np.float64]:
    """The model's own, one image after the other."""
    backbone = load_backbone(SPEC)
    with torch.no_grad():
        inputs = (
            normalise(
                torch.from_numpy(prepare(Image.open(row.image), backbone.data_config).pixels)[None],
                backbone.data_config,
            )
            for row in dataset.rows
        )
        return torch.cat([backbone.module(each) for each in inputs]).double().numpy()


def theirs(dataset: Dataset) -> Row:
    """By scikit-learn, over the same penalties."""
    splits, x, y = split_dataset(dataset, validation=HELD, test=HELD), latents(dataset), dataset.targets()
    began = perf_counter()
    mean, deviation = x[splits.train].mean(0), x[splits.train].std(0)
    x = (x - mean) / np.where(deviation > 0, deviation, 1)
    best: tuple[float, Any] | None = None
    for l2 in PENALTIES:
        model = LogisticRegression(C=1 / (l2 * len(splits.train)), max_iter=5000)
        model.fit(x[splits.train], y[splits.train])
        log = model.predict_log_proba(x[splits.validation])
        loss = -log[np.arange(len(log)), y[splits.validation]].mean()
        if best is None or loss < best[0]:
            best = loss, model
    assert best is not None
    score = best[1].score(x[splits.test], y[splits.test])
    return Row("scikit-learn, LogisticRegression", None, perf_counter() - began, float(score))


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| head | trunk, s | head, s | test accuracy |", "|---|---|---|---|"]
    for row in rows:
        trunk = "" if row.trunk_seconds is None else f"{row.trunk_seconds:.1f}"
        lines.append(f"| {row.what} | {trunk} | {row.head_seconds:.1f} | {row.accuracy:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Draw, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        dataset = draw(Path(scratch) / "scenes", args.images)
        kept = Path(scratch) / "kept"
        rows = [
            ours(
                "fitted", dataset, Options(keep=True, penalties=PENALTIES, kept=kept), Recipe(), Path(scratch) / "fit"
            ),
            theirs(dataset),
            ours("Adam, 3e-4, 10 epochs", dataset, Options(keep=True, kept=kept), Recipe(), Path(scratch) / "ten"),
            ours(
                "Adam, 3e-4, 200 epochs",
                dataset,
                Options(keep=True, kept=kept),
                Recipe(epochs=200),
                Path(scratch) / "many",
            ),
        ]
    print(table(rows))
    out = Path("results/training.json")
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps([asdict(row) for row in rows], indent=2))


if __name__ == "__main__":
    main()
