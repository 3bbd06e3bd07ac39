"""timm's Cait: patches attend among themselves first, then [CLS] alone attends to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from timm.models import cait
from torch import Tensor, nn

from cdam_engine.errors import UnsupportedArchitectureError, UnsupportedMethodError
from cdam_engine.families.base import Family, Grid, Readout, layer_scale


class ClassAttentionFamily(Family):
    """See the module. The last attention is the last class attention: it changes [CLS] alone, which reads all tokens."""

    model_class = cait.Cait
    block_classes = (cait.LayerScaleBlockClassAttn,)

    @property
    def blocks(self) -> Sequence[Any]:
        return (*self.model.blocks, *(self.model.blocks_token_only or ()))

    @property
    def containers(self) -> Sequence[nn.Module]:
        return (self.model.blocks, *([its] if (its := self.model.blocks_token_only) is not None else []))

    @property
    def readout(self) -> Readout:
        if self.model.global_pool == "avg":
            raise UnsupportedArchitectureError(
                "NO_READOUT",
                "its average pooling reads patches that no class attention changes: use global_pool='token'",
            )
        return super().readout

    def embed(self, pixels: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """See `Family`. [CLS] is there from the start, but takes part from the first class attention on."""
        model = self.model
        x = model.pos_drop(model.patch_embed(pixels) + model.pos_embed)
        return torch.cat((model.cls_token.expand(len(x), -1, -1), x), dim=1), [{}] * len(self.blocks)

    def run(self, index: int, x: Tensor, arguments: Mapping[str, Any], grid: Grid) -> Tensor:
        token, patches = x[:, :1], x[:, 1:]
        if index < len(self.model.blocks):
            patches = self.blocks[index](patches)
        else:
            token = self.blocks[index](patches, token)
        return torch.cat((token, patches), dim=1)

    def add(self, block: Any, residual: Tensor, attended: Tensor) -> Tensor:
        x = residual + block.drop_path(layer_scale(block, 1, attended))
        return cast("Tensor", x + block.drop_path(layer_scale(block, 2, block.mlp(block.norm2(x)))))

    def check_attend(self) -> None:
        raise UnsupportedMethodError(
            "UNKNOWN_BLOCK", "its talking heads and class attention are no attention of tokens on all tokens"
        )
