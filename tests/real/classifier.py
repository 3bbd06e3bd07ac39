"""A linear multi-label head on the backbone's frozen latents, written as `cdam serve` takes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import timm
import timm.data
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from real.backbone import ARCHITECTURE, INPUT
from real.voc import Photographs

EXAMPLES: Final = 320
"""Photographs that the head is trained on: each costs a pass through the model, and more of them change little."""

_BATCH: Final = 16
_INVERSE_REGULARISATION: Final = 0.03


def build(checkpoint: Path, head: Path | None = None) -> nn.Module:
    """timm's own model with the checkpoint's weights; without a head it gives latents."""
    weights = load_file(checkpoint)
    if head is not None:
        weights |= {f"head.{name}": values for name, values in load_file(head).items()}
    outputs = len(weights["head.bias"]) if head is not None else 0
    model: nn.Module = timm.create_model(ARCHITECTURE, img_size=INPUT, num_classes=outputs).eval()
    model.load_state_dict(weights)
    return model


def pixels(model: nn.Module, image: Path) -> Tensor:
    """The whole photograph as the model's input, `(3, 224, 224)`, by timm's own transform."""
    config = {**timm.data.resolve_model_data_config(model), "input_size": (3, *INPUT), "crop_mode": "squash"}
    with Image.open(image) as opened:
        made: Tensor = timm.data.create_transform(**config)(opened.convert("RGB"))
    return made


def answers(model: nn.Module, images: Sequence[Path]) -> NDArray[np.float32]:
    """What the model makes of each image: latents or logits, `(B, D or C)`."""
    found = []
    with torch.inference_mode():
        for start in range(0, len(images), _BATCH):
            batch = torch.stack([pixels(model, image) for image in images[start : start + _BATCH]])
            found.append(model(batch).numpy())
    return np.concatenate(found)


def train_head(latents: NDArray[np.float32], labels: NDArray[np.bool_]) -> dict[str, Tensor]:
    """A logistic regression for each class on standardised latents; the standardisation folded into the weights.

    Args:
        latents: `(B, D)`.
        labels: `(B, C)`.

    Returns:
        `weight`, `(C, D)`, and `bias`, `(C)`, for plain latents.
    """
    mean, deviation = latents.mean(0, dtype=np.float64), latents.std(0, dtype=np.float64)
    fits = [
        LogisticRegression(C=_INVERSE_REGULARISATION, max_iter=1000).fit((latents - mean) / deviation, column)
        for column in labels.T
    ]
    weight = np.concatenate([fit.coef_ for fit in fits]) / deviation
    bias = np.concatenate([fit.intercept_ for fit in fits]) - weight @ mean
    return {"weight": torch.from_numpy(weight).float(), "bias": torch.from_numpy(bias).float()}


def train_and_write(folder: Path, weights: dict[str, Tensor], voc: Photographs) -> Path:
    """The backbone's checkpoint, a head for its latents, and the models file that `cdam serve` takes; its path.

    Args:
        folder: Where to: backbone.safetensors, head.safetensors, models.yaml.
        weights: The backbone's.
        voc: Of whose first photographs for training the head learns the classes.
    """
    save_file(weights, folder / "backbone.safetensors")
    shown = voc.train[:EXAMPLES]
    latents = answers(build(folder / "backbone.safetensors"), [photograph.path for photograph in shown])
    save_file(train_head(latents, voc.labels(shown)), folder / "head.safetensors")
    entry = {
        "name": "voc",
        "architecture": ARCHITECTURE,
        "input_size": INPUT,
        "checkpoint": "backbone.safetensors",
        "head": "head.safetensors",
        "outputs": voc.classes,
        "task": "multi_label",
    }
    models = folder / "models.yaml"
    models.write_text(json.dumps({"models": [entry]}), encoding="utf-8")  # JSON is YAML
    return models
