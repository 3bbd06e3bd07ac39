"""Small ViTs, their checkpoints, and whether a loaded model is the same network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from cdam_server.compute.loading import LoadedModel, LoadError, ModelSpec, load_model

ARCHITECTURE = "vit_tiny_patch16_224"
SHAPE: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}
"""Of a network that is built in milliseconds; with 32 x 32 pixels it has four patches."""

StateDict = dict[str, Tensor]


def vit(num_classes: int = 3, seed: int = 1, architecture: str = ARCHITECTURE, **kwargs: Any) -> nn.Module:
    """A network in which no parameter is trivially zero or one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = timm.create_model(
            architecture, num_classes=num_classes, **{"img_size": 32, **SHAPE, **kwargs}
        )
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def prefixed(weights: StateDict, prefix: str) -> StateDict:
    return {prefix + name: tensor for name, tensor in weights.items()}


def body(model: nn.Module) -> StateDict:
    """Weights without the classifier."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}


def load(content: object, folder: Path, **settings: Any) -> LoadedModel:
    """Load a pickled checkpoint into the small architecture."""
    path = folder / "checkpoint.pth"
    torch.save(content, path)
    kwargs = {"img_size": 32, **SHAPE, **settings.pop("model_kwargs", {})}
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    return load_model(
        ModelSpec(**{"name": "m", "architecture": ARCHITECTURE, "checkpoint": path, "model_kwargs": kwargs, **settings})
    )


def refusal(content: object, folder: Path, **settings: Any) -> str:
    """The message of a checkpoint that is refused, without the file's path; always one line."""
    with pytest.raises(LoadError) as caught:
        load(content, folder, **settings)
    assert "\n" not in caught.value.message
    return caught.value.message.replace(str(folder), "")


def difference(loaded: LoadedModel, model: nn.Module, size: tuple[int, int] = (32, 32)) -> float:
    """Largest difference of logits or latents on random images."""
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own, other = loaded.module(images), model(images)
    assert own.shape == other.shape
    return float((own - other).abs().max())
