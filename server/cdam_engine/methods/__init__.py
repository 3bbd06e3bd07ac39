"""The methods, one file a family."""

from __future__ import annotations

from typing import Final

from cdam_engine.methods.ablation import TokenAblation
from cdam_engine.methods.attention import Attention, AttentionRollout
from cdam_engine.methods.base import Method, Noise, Quadrature
from cdam_engine.methods.cdam import Cdam, IntegratedCdam, SmoothCdam
from cdam_engine.methods.gradients import InputXGradient, IntegratedGradients, SmoothGrad
from cdam_engine.methods.prediction import PatchMaskPrediction
from cdam_engine.methods.relevance import PartialLrp, RelevancePropagation

METHODS: Final[dict[str, type[Method]]] = {
    method.kind: method
    for method in (
        Cdam,
        SmoothCdam,
        IntegratedCdam,
        Attention,
        AttentionRollout,
        RelevancePropagation,
        PartialLrp,
        InputXGradient,
        SmoothGrad,
        IntegratedGradients,
        TokenAblation,
        PatchMaskPrediction,
    )
}
"""Every method by its name; each can be made without parameters."""

__all__ = [
    "METHODS",
    "Attention",
    "AttentionRollout",
    "Cdam",
    "InputXGradient",
    "IntegratedCdam",
    "IntegratedGradients",
    "Method",
    "Noise",
    "PartialLrp",
    "PatchMaskPrediction",
    "Quadrature",
    "RelevancePropagation",
    "SmoothCdam",
    "SmoothGrad",
    "TokenAblation",
]
