"""The models, by `cdam train head` alone: one backbone with a head for biomarkers and one for malignancy."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from real.backbone import ARCHITECTURE, INPUT
from real.lidc import BIOMARKERS

TUNED: Final = ("biomarkers", "malignancy")
UNTUNED: Final = ("untuned_biomarkers", "untuned_malignancy")
"""Linear heads on the backbone as it comes, for comparison."""

RECIPE: Final = (
    "--train-blocks 4 --optimizer adamw --lr 2e-3 --block-lr 1e-4 --weight-decay 0.01 --schedule one_cycle "
    "--epochs 8 --token-dropout 0.6 --mixup 0.4 --ema 0.98 --views 2 --crop-scale 1 1"
)
"""Of the biomarkers' training."""


def commands(
    backbone: Path, data: Path, models: Path, seed: int, recipe: str = RECIPE
) -> Iterator[tuple[str, list[str]]]:
    """The arguments of `cdam` for each file of a seed, in order; by the file's name without its suffix.

    Args:
        backbone: The checkpoint.
        data: The folder of `nodules.csv`.
        models: Where to; the seed's files are in a folder of their own.
        seed: Of the split and of all draws.
        recipe: Of the biomarkers' training.
    """
    folder = models / f"seed{seed}"
    size = "x".join(map(str, INPUT))
    model = ["--model", ARCHITECTURE, "--checkpoint", str(backbone), "--input-size", size]
    common = [*model, "--split-by", f"split_{seed}", "--seed", str(seed)]
    ratings = ["--task", "regression", *(word for name in BIOMARKERS for word in ("--target", name))]
    binary = ["--task", "binary", "--target", "malignant"]
    shared = ["--cache-latents", "--kept", str(models / "latents")]
    tuned = ["--cache-latents", "--head", str(folder / "biomarkers.safetensors")]
    for name, its in (
        ("untuned_biomarkers", [*ratings, *shared]),
        ("untuned_malignancy", [*binary, *shared]),
        ("biomarkers", [*ratings, *shlex.split(recipe)]),
        ("malignancy", [*binary, *tuned]),
    ):
        output = folder / f"{name}.safetensors"
        yield name, ["train", "head", str(data / "nodules.csv"), *common, *its, "-o", str(output)]


def train(backbone: Path, data: Path, models: Path, seed: int, device: str, recipe: str = RECIPE) -> None:
    """Run those whose file is not there yet.

    Raises:
        ValueError: One failed.
    """
    for name, arguments in commands(backbone, data, models, seed, recipe):
        file = models / f"seed{seed}" / f"{name}.safetensors"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            words = ["cdam", *arguments, "--device", device]
            print(" ".join(words), file=sys.stderr, flush=True)
            done = subprocess.run([sys.executable, "-m", "cdam_cli", *words[1:]], check=False)
            if done.returncode:
                raise ValueError(f"{file} could not be trained")
