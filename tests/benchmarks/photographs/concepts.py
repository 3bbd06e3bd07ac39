"""Concepts on photographs: the mean latent of a class's photographs, explained, against the class's own map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.photographs.choice import Chosen, examples, mask, pixels
from benchmarks.photographs.measuring import device_of, digest, encode_mask
from benchmarks.sheets import encode
from cdam_engine import Concept, Explainer, Output, Target, mean_concept
from cdam_engine.preprocess import normalise
from cdam_server.settings.specs import Task
from cdam_training.metrics import measure
from real.voc import Photograph, Photographs

EXAMPLES: Final = 30
"""A concept's examples, as the paper has them; of a class with fewer photographs, all."""
KINDS: Final = ("class", "dot", "cosine", "l2", "dot, centred")
"""The class's logit; similarity to its concept; the dot product with the concept less the mean of all photographs."""

_BATCH: Final = 16


@dataclass(frozen=True, eq=False)
class Outputs:
    """What the model makes of all photographs of a split.

    Attributes:
        names: Of the photographs.
        latents: (B, D).
        logits: (B, C).
        labels: Which classes each shows, (B, C).
    """

    names: tuple[str, ...]
    latents: NDArray[np.float32]
    logits: NDArray[np.float32]
    labels: NDArray[np.bool_]


def outputs(explainer: Explainer, voc: Photographs, split: str, path: Path) -> Outputs:
    """What the model makes of a split, kept in a file.

    Raises:
        ValueError: The file is another model's.
    """
    shown: tuple[Photograph, ...] = getattr(voc, split)
    model = digest(explainer)
    if not path.exists():
        found = [torch.cat([part[k] for part in _run(explainer, shown)]) for k in (0, 1)]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, latents=found[0].numpy(), logits=found[1].numpy(), model=model)
    kept = np.load(path)
    if str(kept["model"]) != model:
        raise ValueError(f"{path}: of model {kept['model']}, not {model}: give another --name, or remove it")
    return Outputs(tuple(one.path.stem for one in shown), kept["latents"], kept["logits"], voc.labels(shown))


def _run(explainer: Explainer, shown: Sequence[Photograph]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    found = []
    for start in range(0, len(shown), _BATCH):
        images = np.stack([pixels(one.path, explainer.data_config) for one in shown[start : start + _BATCH]])
        x = normalise(torch.from_numpy(images).to(device_of(explainer)), explainer.data_config)
        latent, logits = explainer.outputs(x)
        found.append((latent.cpu(), logits.cpu()))
    return iter(found)


def summary(its: Outputs, classes: Sequence[str]) -> dict[str, Any]:
    """Mean average precision with its 95 % interval, as `cdam train` reports it."""
    found = measure(Task.MULTI_LABEL, classes, its.labels.astype(np.float32), its.logits)
    mean = found.estimates["mean_average_precision"]
    return {"mean": mean.value, "interval": [mean.low, mean.high]}


def counts(voc: Photographs) -> list[int]:
    """How many examples each class's concept has."""
    return [len(examples(voc, index, EXAMPLES)) for index in range(len(voc.classes))]


def vectors(voc: Photographs, trained: Outputs) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of each class its concept, and the concept less the mean of all photographs for training; both (C, D)."""
    place = {name: row for row, name in enumerate(trained.names)}
    rows = [[place[one.path.stem] for one in examples(voc, index, EXAMPLES)] for index in range(len(voc.classes))]
    plain = [mean_concept(trained.latents[its]).vector for its in rows]
    centred = [mean_concept(trained.latents[its], trained.latents).vector for its in rows]
    return np.stack(plain), np.stack(centred)


def targets(index: int, plain: NDArray[np.float32], centred: NDArray[np.float32]) -> list[Target]:
    """What is explained of a class, in the order of `KINDS`."""
    vector = torch.from_numpy(plain[index])
    return [
        Output(index),
        Concept(vector, "dot"),
        Concept(vector, "cosine"),
        Concept(vector, "l2"),
        Concept(torch.from_numpy(centred[index]), "dot"),
    ]


def record(
    explainer: Explainer, chosen: Chosen, plain: NDArray[np.float32], centred: NDArray[np.float32]
) -> dict[str, Any]:
    """A journal's line of a photograph: CDAM of both classes and their concepts, and the masks."""
    config = explainer.data_config
    images = torch.from_numpy(pixels(chosen.photograph.path, config))[None]
    wanted = [target for index in chosen.classes for target in targets(index, plain, centred)]
    (found,) = explainer.explain(images, [wanted])
    scores = [encode(relevance.scores) for relevance in found.maps]
    return {
        "id": chosen.id,
        "classes": list(chosen.classes),
        "logits": found.logits.tolist(),
        "maps": [scores[k * len(KINDS) : (k + 1) * len(KINDS)] for k in range(len(chosen.classes))],
        "masks": [encode_mask(mask(chosen.photograph.mask, index, config.input_size)) for index in chosen.classes],
    }
