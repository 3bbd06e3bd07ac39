"""Which modules are known to work token by token, so that what becomes of one token depends on no other."""

from __future__ import annotations

from typing import Any, Final

import timm.layers
from timm.models import vision_transformer
from torch import nn

from cdam_engine.attention import is_changed

# Of a module that is not listed nobody knows: then all rows of the last attention are computed, which is slower and
# right for all. Only exact types count, since a subclass may have other code.
_NAMES_IN_TORCH: Final = (
    "Dropout",
    "ELU",
    "GELU",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "Identity",
    "LeakyReLU",
    "Linear",
    "Mish",
    "ReLU",
    "ReLU6",
    "SELU",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Softsign",
    "Tanh",
)
_NAMES_IN_TIMM: Final = (
    "DropPath",
    "GELU",
    "GELUTanh",
    "GluMlp",
    "LayerScale",
    "Mlp",
    "QuickGELU",
    "Sigmoid",
    "SwiGLU",
    "SwiGLUPacked",
    "Swish",
    "Tanh",
)
# Norms are token-wise over the last axis alone.
_NORMS_IN_TORCH: Final = ("LayerNorm", "RMSNorm")
_NORMS_IN_TIMM: Final = ("LayerNorm", "LayerNormFp32", "RmsNorm", "RmsNormFp32", "SimpleNorm", "SimpleNormFp32")


def _types(room: Any, names: tuple[str, ...]) -> set[type[nn.Module]]:
    """Those that the installed version has."""
    return {getattr(room, name) for name in names if hasattr(room, name)}


_NORMS: Final = _types(nn, _NORMS_IN_TORCH) | _types(timm.layers, _NORMS_IN_TIMM)
_TOKEN_WISE: Final = (
    _types(nn, _NAMES_IN_TORCH) | _types(timm.layers, _NAMES_IN_TIMM) | {vision_transformer.LayerScale} | _NORMS
)


def is_token_wise(module: nn.Module) -> bool:
    """Whether a module and all of its parts are known to work token by token, and nothing hooks into them."""
    return all(type(part) in _TOKEN_WISE and not is_changed(part) and _is_over_width(part) for part in module.modules())


def _is_over_width(part: nn.Module) -> bool:
    shape: Any = getattr(part, "normalized_shape", (1,))
    return type(part) not in _NORMS or isinstance(shape, int) or len(shape) == 1
