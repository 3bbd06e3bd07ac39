"""Writes the sample scenes that ship with the package: `python -m demo_samples`.

Each is drawn from test sources, which the model never saw, and was picked by eye among those that it reads rightly.
A sample is a PNG and one black-and-white PNG per digit, its exact mask; `samples.json` says what is what.

`loops/` holds a concept: scenes of one digit with a closed loop, `positive_*`, and of one without, `negative_*`; the
first ones by seed, from training sources, so that no digit of theirs is in a sample. Lossless WebP, for its size.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cdam_server.demo import model as demo_model
from cdam_server.demo.scenes import Scene, draw_scene
from demo_model import concepts, figures

PICKED: tuple[tuple[int, int], ...] = ((11, 2), (13, 3), (14, 2), (26, 3), (28, 2), (27, 3))
"""The samples' scenes: (seed, number of digits)."""


def write_samples(folder: Path) -> None:
    """Writes the images, the masks and `samples.json` into a folder.

    Raises:
        ImportError: if scikit-learn is not installed (extra `demo`).
        ValueError: if the shipped model does not rank a scene's digits first; then pick other scenes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scenes = [draw_scene("test", seed, digits) for seed, digits in PICKED]
    with torch.no_grad():
        logits = demo_model.load()(figures.to_input(np.stack([s.image for s in scenes])))
    for row, scene in zip(logits, scenes, strict=True):
        if set(row.topk(len(scene.labels)).indices.tolist()) != set(scene.labels):
            raise ValueError(f"the model misreads scene {scene.seed} with digits {scene.labels}")
    entries = [_write_sample(folder, f"scene{i}", scene) for i, scene in enumerate(scenes, 1)]
    (folder / "samples.json").write_text(json.dumps({"samples": entries}, indent=2) + "\n")


def write_loops(folder: Path) -> None:
    """Writes the concept's images into a folder.

    Raises:
        ImportError: if scikit-learn is not installed (extra `demo`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, digits in (("positive", concepts.LOOPS), ("negative", concepts.NO_LOOPS)):
        for number, scene in enumerate(concepts.example_scenes(digits)):
            path = folder / f"{name}_{number:02}.webp"
            Image.fromarray(scene.image).save(path, lossless=True, quality=100, method=6)


def _write_sample(folder: Path, name: str, scene: Scene) -> dict[str, Any]:
    Image.fromarray(scene.image).save(folder / f"{name}.png", optimize=True)
    objects = []
    for o in scene.objects:
        mask = f"{name}_mask_{o.label}.png"
        Image.fromarray(o.mask).save(folder / mask, optimize=True)
        objects.append({"label": demo_model.LABELS[o.label], "class": o.label, "source": o.source, "mask": mask})
    return {"image": f"{name}.png", "split": scene.split, "seed": scene.seed, "objects": objects}


def main() -> None:
    """Writes the samples where the package reads them, or elsewhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "assets" / "samples")
    folder = parser.parse_args().out
    write_samples(folder)
    write_loops(folder / "loops")


if __name__ == "__main__":
    main()
