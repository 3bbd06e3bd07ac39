"""timm's Beit: BEiT and BEiT v2, with relative positions of each block's own or shared ones."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import beit
from torch import Tensor

from cdam_engine.families.base import Family


class BeitFamily(Family):
    """See the module."""

    model_class = beit.Beit
    block_classes = (beit.Block,)

    def embed(self, pixels: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        model = self.model
        x = model.patch_embed(pixels)
        x = torch.cat((model.cls_token.expand(len(x), -1, -1), x), dim=1)
        if model.pos_embed is not None:
            x = x + model.pos_embed
        bias = model.rel_pos_bias() if model.rel_pos_bias is not None else None
        return model.pos_drop(x), [{"shared_rel_pos_bias": bias}] * len(model.blocks)
