"""timm's VisionTransformerRelPos: relative positions in the place of absolute ones."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import vision_transformer_relpos as relpos
from torch import Tensor

from cdam_engine.families.base import Family


class RelativePositionFamily(Family):
    """See the module."""

    model_class = relpos.VisionTransformerRelPos
    block_classes = (relpos.RelPosBlock,)

    def embed(self, pixels: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        model = self.model
        x = model.patch_embed(pixels)
        if model.cls_token is not None:
            x = torch.cat((model.cls_token.expand(len(x), -1, -1), x), dim=1)
        shared = None if model.shared_rel_pos is None else model.shared_rel_pos.get_bias()
        return x, [{"shared_rel_pos": shared}] * len(model.blocks)
