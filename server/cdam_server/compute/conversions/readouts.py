"""Readouts that other libraries' models have and timm's do not: put in the place of timm's own.

All are part of what timm computes with `forward_head(x, pre_logits=True)`, so their outcome is the latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn


class Readout(Protocol):
    """A dataclass whose fields decide what is computed."""

    def install(self, model: nn.Module) -> None:
        """Puts itself into a timm model."""
        ...


@dataclass(frozen=True)
class Projection:
    """The pooled output, projected: the space in which CLIP compares images and texts.

    Attributes:
        size: Of the embedding, which becomes the latent.
        bias: Whether it adds one.
    """

    size: int
    bias: bool = False

    def install(self, model: nn.Module) -> None:
        """Puts itself behind the pooling and its norm, as ``fc_norm``, or ``fc_norm.1`` where there is such a norm."""
        its = cast("Any", model)
        projection = nn.Linear(its.embed_dim, self.size, bias=self.bias)
        its.fc_norm = projection if isinstance(its.fc_norm, nn.Identity) else nn.Sequential(its.fc_norm, projection)
        its.head_hidden_size = self.size


@dataclass(frozen=True)
class HiddenLayer:
    """The pooled output, through a linear layer and tanh: torchvision's `representation_size`.

    Attributes:
        size: Of the hidden layer, whose output becomes the latent.
    """

    size: int

    def install(self, model: nn.Module) -> None:
        """Puts itself between pooling and head; its weights are ``fc_norm.0.weight`` and ``fc_norm.0.bias``."""
        its = cast("Any", model)
        its.fc_norm = nn.Sequential(nn.Linear(its.embed_dim, self.size), nn.Tanh())
        its.head_hidden_size = self.size
        if isinstance(its.head, nn.Linear):
            its.head = nn.Linear(self.size, its.head.out_features)


@dataclass(frozen=True)
class ClassTokenAndPatchMean:
    """[CLS] and the mean of the patch tokens, one after the other: what DINOv2's classifiers read."""

    def install(self, model: nn.Module) -> None:
        """Puts itself in the place of timm's attention pooling, which also reads all tokens."""
        its = cast("Any", model)
        its.attn_pool = _ClassTokenAndPatchMean(its.num_prefix_tokens)
        its.pool_include_prefix = True
        its.head_hidden_size = 2 * its.embed_dim
        if isinstance(its.head, nn.Linear):
            its.head = nn.Linear(2 * its.embed_dim, its.head.out_features)


class _ClassTokenAndPatchMean(nn.Module):
    readout = "cls_token_and_average_pool"  # read by the engine

    def __init__(self, num_prefix_tokens: int) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, x: Tensor) -> Tensor:
        """From tokens (B, N, D) to (B, 2 D)."""
        return torch.cat((x[:, 0], x[:, self.num_prefix_tokens :].mean(dim=1)), dim=1)
