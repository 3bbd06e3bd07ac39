"""timm's VisionTransformerSAM: tokens on a grid, attention in windows or on the whole, a neck before the pooling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from timm.layers import LayerNorm2d, resample_abs_pos_embed_nhwc
from timm.models import vision_transformer_sam as sam
from torch import Tensor, nn

from cdam_engine.errors import UnsupportedArchitectureError, UnsupportedMethodError
from cdam_engine.families.base import Family, Grid, Readout


class SamFamily(Family):
    """See the module. Tokens travel as (B, N, D) here, and as (B, h, w, D) inside timm's blocks."""

    model_class = sam.VisionTransformerSAM
    block_classes = (sam.Block,)

    num_prefix_tokens = 0

    @property
    def head(self) -> nn.Module:
        return cast("nn.Module", self.model.head.fc)

    @property
    def readout(self) -> Readout:
        """See `Family`. The head pools; its own `global_pool` counts."""
        pool = str(self.model.head.global_pool.pool_type)
        if pool not in {"avg", "max", "avgmax"}:
            raise UnsupportedArchitectureError(
                "NO_READOUT", f"the model's pooling {pool!r} is none of avg, max and avgmax"
            )
        return Readout.AVERAGE_POOL if pool == "avg" else Readout.MAX_POOL

    @property
    def after_attention(self) -> Sequence[nn.Module]:
        block = self.blocks[-1]
        return (
            block.attn.proj,
            block.attn.proj_drop,
            block.ls1,
            block.drop_path1,
            block.norm2,
            block.mlp,
            block.ls2,
            block.drop_path2,
            self.model.neck,
        )

    def embed(self, pixels: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        model = self.model
        x = model.patch_embed(pixels)
        if model.pos_embed is not None:
            x = x + resample_abs_pos_embed_nhwc(model.pos_embed, x.shape[1:3])
        x = model.norm_pre(model.patch_drop(model.pos_drop(x)))
        return x.flatten(1, 2), [{}] * len(model.blocks)

    def run(self, index: int, x: Tensor, arguments: Mapping[str, Any], grid: Grid) -> Tensor:
        return cast("Tensor", self.blocks[index](torch.unflatten(x, 1, grid)).flatten(1, 2))

    def attend(self, tokens: Tensor, arguments: Mapping[str, Any], grid: Grid) -> Tensor:
        """See `Family`. Windows at the edge are padded with zeros after the norm, as timm does it."""
        block = self.blocks[-1]
        x = torch.unflatten(tokens, 1, grid)
        if not block.window_size:
            return cast("Tensor", block.attn(x).flatten(1, 2))
        windows, padded = sam.window_partition(x, block.window_size)
        return cast(
            "Tensor", sam.window_unpartition(block.attn(windows), block.window_size, grid, padded).flatten(1, 2)
        )

    def final_norm(self, x: Tensor, grid: Grid) -> Tensor:
        """See `Family`: the neck, which may mix neighbours."""
        planes = torch.unflatten(x, 1, grid).permute(0, 3, 1, 2)
        return cast("Tensor", self.model.neck(planes).flatten(2).transpose(1, 2))

    def latent(self, x: Tensor) -> Tensor:
        """See `Family`. To the head a row of N patches is as good as a grid: it pools over all."""
        return cast("Tensor", self.model.forward_head(x.transpose(1, 2)[..., None], pre_logits=True))

    def logits(self, x: Tensor, latent: Tensor) -> Tensor:
        return cast("Tensor", self.model.forward_head(x.transpose(1, 2)[..., None]))

    def check_attend(self) -> None:
        raise UnsupportedMethodError(
            "UNKNOWN_BLOCK", "attention in windows is no attention of all tokens on all tokens"
        )

    def check_readout(self) -> None:
        super().check_readout()
        if not isinstance(self.model.neck, nn.Identity | LayerNorm2d):
            raise UnsupportedMethodError(
                "NO_READOUT_TOKEN", "its neck mixes neighbouring tokens before they are pooled"
            )
