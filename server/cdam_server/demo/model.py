"""The demo's Vision Transformer: a plain timm ViT with 4x4 px patches, so that a 64x64 scene has a 16x16 grid."""

import json
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from timm.models import VisionTransformer

LABELS = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
"""Names of the model's outputs, in order."""

ASSETS: Traversable = resources.files("cdam_server.demo") / "assets"
"""What ships with the package: weights, their held-out figures, sample scenes."""

ARCHITECTURE: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 4,
    "num_classes": len(LABELS),
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 2,
}
"""Keyword arguments of `timm.models.VisionTransformer`."""

DATA_CONFIG: dict[str, Any] = {
    "input_size": (3, 64, 64),
    "fixed_input_size": True,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "num_classes": len(LABELS),
    "label_names": LABELS,
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}
"""timm's `pretrained_cfg`, from which `timm.data.resolve_model_data_config` reads the preprocessing."""


def build(*, dynamic_img_size: bool = False) -> VisionTransformer:
    """The architecture with fresh weights (drawn from torch's global generator), in training mode.

    It maps (B, 3, 64, 64) float32, normalised with mean and std 0.5, to (B, 10) logits; with `dynamic_img_size`, other
    multiples of the patch size too.
    """
    model = VisionTransformer(**ARCHITECTURE, dynamic_img_size=dynamic_img_size)
    model.pretrained_cfg = model.default_cfg = dict(DATA_CONFIG)
    return model


def load() -> VisionTransformer:
    """The trained demo model, on the CPU and in eval mode.

    Raises:
        FileNotFoundError: if the installation lacks the weights.
    """
    with torch.random.fork_rng(devices=[]):  # building draws weights that are replaced at once
        model = build(dynamic_img_size=True)
    model.load_state_dict(load_safetensors((ASSETS / "weights.safetensors").read_bytes()))
    return model.eval()


def shipped_figures() -> dict[str, Any]:
    """The held-out figures of the shipped weights, as `tools/demo_figures.py` measured them.

    Raises:
        FileNotFoundError: if the installation lacks them.
    """
    figures: dict[str, Any] = json.loads((ASSETS / "figures.json").read_text())
    return figures
