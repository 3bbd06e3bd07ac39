"""The architectures that can be explained: one small class each says what is its own.

To add one: a subclass of `Family` in a file of its own, and its place in `FAMILIES`; a line in `tests/reference/models.py`
compares it with a backward pass through the untouched model.
"""

from __future__ import annotations

from torch import nn

from cdam_engine.errors import UnsupportedArchitectureError
from cdam_engine.families.base import (
    Embedded,
    Family,
    Grid,
    Readout,
    TailOutput,
    TrunkOutput,
    layer_scale,
)
from cdam_engine.families.beit import BeitFamily
from cdam_engine.families.class_attention import ClassAttentionFamily
from cdam_engine.families.eva import EvaFamily
from cdam_engine.families.relative_position import RelativePositionFamily
from cdam_engine.families.sam import SamFamily
from cdam_engine.families.vision_transformer import DistilledFamily, VisionTransformerFamily

__all__ = [
    "FAMILIES",
    "Embedded",
    "Family",
    "Grid",
    "Readout",
    "TailOutput",
    "TrunkOutput",
    "family_of",
    "layer_scale",
]

FAMILIES: tuple[type[Family], ...] = (
    VisionTransformerFamily,
    DistilledFamily,
    EvaFamily,
    BeitFamily,
    RelativePositionFamily,
    ClassAttentionFamily,
    SamFamily,
)


def family_of(model: nn.Module) -> Family:
    """The model's family.

    Raises:
        UnsupportedArchitectureError: It is of none that is known here, or runs code of its own.
    """
    for family in FAMILIES:
        if family.knows(model):
            return family(model)
    raise UnsupportedArchitectureError("UNKNOWN_ARCHITECTURE", f"{type(model).__name__} {_why_not(model)}")


def _why_not(model: nn.Module) -> str:
    """What keeps a model of no known family from being explained, as far as can be seen."""
    inner = [name for name, part in model.named_modules() if name and any(family.knows(part) for family in FAMILIES)]
    if inner:
        return (
            f"wraps a model that can be explained: give its part {inner[0]!r}, with what comes after it as its head, if the "
            "wrapper does nothing else"
        )
    parts = [type(module).__name__ for module in model.modules()]
    if not any("attention" in name.lower() or "attn" in name.lower() for name in parts):
        return "is no Vision Transformer: it has no attention to explain"
    reductions = {info["reduction"] for info in getattr(model, "feature_info", ()) or () if "reduction" in info}
    if len(reductions) > 1:
        return (
            "is hierarchical: it merges its tokens on the way, so that those of its last attention are no patches of the "
            "image, as CDAM needs them"
        )
    known = ", ".join(family.model_class.__name__ for family in FAMILIES)
    return (
        f"is not one of the Vision Transformers that can be split at their last attention: timm's {known}, with their "
        "own forward pass"
    )
