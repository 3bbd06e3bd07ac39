"""timm's VisionTransformer: ViT, DeiT, DINO, DINOv2, CLIP and SigLIP towers, and those with a convolutional stem."""

from __future__ import annotations

from typing import Any, cast

from timm.models import vision_transformer
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor

from cdam_engine.families.base import Family, Readout


class VisionTransformerFamily(Family):
    """See the module."""

    model_class = vision_transformer.VisionTransformer
    block_classes = (vision_transformer.Block,)

    @classmethod
    def knows(cls, model: Any) -> bool:
        return super().knows(model) and not isinstance(model, VisionTransformerDistilled)

    def embed(self, pixels: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        model = self.model
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixels))))  # noqa: SLF001
        return x, [{}] * len(model.blocks)


class DistilledFamily(VisionTransformerFamily):
    """DeiT with a distillation token: two heads read two tokens; the latent is the tokens' mean."""

    model_class = VisionTransformerDistilled
    readout = Readout.CLS_AND_DISTILLATION_TOKENS

    @classmethod
    def knows(cls, model: Any) -> bool:
        return super(VisionTransformerFamily, cls).knows(model)

    def logits(self, x: Tensor, latent: Tensor) -> Tensor:
        return cast("Tensor", self.model.forward_head(x))
