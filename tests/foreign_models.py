"""Small models of other libraries: their sizes, how they are loaded, and whether they are still the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cdam_server.compute.loading import LoadedModel, LoadError, ModelSpec, load_model

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
"""Of transformers' configurations."""
TEXT = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 1}
"""Of open_clip's text tower."""


def spec(architecture: str, **settings: Any) -> ModelSpec:
    return ModelSpec.model_validate({"name": "m", "architecture": architecture, **settings})


def load(architecture: str, **settings: Any) -> LoadedModel:
    return load_model(spec(architecture, **settings))


def refusal(architecture: str, **settings: Any) -> str:
    """The message of a model that is refused; always one line."""
    with pytest.raises(LoadError) as caught:
        load(architecture, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def difference(loaded: LoadedModel, forward: Callable[[Tensor], Tensor], size: tuple[int, int] = (32, 32)) -> float:
    """Of outputs, relative to the largest."""
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = forward(pixels)
        return float((loaded.module(pixels) - expected).abs().max() / expected.abs().max())
