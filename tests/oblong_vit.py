"""A small model whose grid is not square, and images with two objects for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer

from cdam_engine import Output
from cdam_engine.evaluation import Sample
from cdam_engine.preprocess import DataConfig

SIZE = (24, 32)
PATCH = 8
CONFIG = DataConfig(SIZE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 1.0, "center")


def vit(**changes: Any) -> VisionTransformer:
    """Five outputs and three blocks, unless told otherwise; no parameter is trivially zero or one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        arguments: dict[str, Any] = {"num_classes": 5, "depth": 3, "num_heads": 2} | changes
        model = VisionTransformer(img_size=SIZE, patch_size=PATCH, embed_dim=24, **arguments)
        for parameter in model.parameters():
            parameter.data.normal_(std=0.3)
    return model.eval()


def image(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8)


def sample(seed: int, **changes: Any) -> Sample:
    mask, other = np.zeros((2, *SIZE), bool)
    mask[3:15, 5:19] = True
    other[10:20, 20:30] = True
    pixels = image(seed)
    without = np.where(mask[..., None], np.uint8(128), pixels)
    return replace(Sample(f"sample {seed}", pixels, Output(1), Output(3), mask, without, other), **changes)
