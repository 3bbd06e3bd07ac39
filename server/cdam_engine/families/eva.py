"""timm's Eva: EVA-02, DINOv3, Perception Encoder and other ViTs with rotary positions."""

from __future__ import annotations

from typing import Any

from timm.models import eva
from torch import Tensor

from cdam_engine.families.base import Family


class EvaFamily(Family):
    """See the module."""

    model_class = eva.Eva
    block_classes = (eva.EvaBlock,)

    def embed(self, pixels: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        model = self.model
        x, rope = model._pos_embed(model.patch_embed(pixels))  # noqa: SLF001
        x = model.norm_pre(x)
        # "Mixed" rotary positions are learned block by block.
        ropes = rope if getattr(model, "rope_mixed", False) else [rope] * len(model.blocks)
        return x, [{"rope": rope} for rope in ropes]
