"""Explanations of Vision Transformers: torch and timm, no service.

>>> import timm, torch
>>> from cdam_engine import Explainer, IntegratedCdam, TopK
>>> model = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
>>> (explanation,) = Explainer(model).explain(torch.randn(1, 3, 224, 224), [[TopK(2)]], [[IntegratedCdam()]])
>>> explanation.maps[0].scores.shape
(14, 14)
"""

from cdam_engine.cache import TokenCache
from cdam_engine.concepts import Formed, mean_concept
from cdam_engine.errors import UnsupportedArchitectureError, UnsupportedError, UnsupportedMethodError
from cdam_engine.explainer import Asked, Explainer, explain_together
from cdam_engine.explanation import ExplainedTarget, Explanation, RelevanceMap
from cdam_engine.facts import ExplainerFacts, Refusal
from cdam_engine.families import Grid, Readout
from cdam_engine.methods import (
    METHODS,
    Attention,
    AttentionRollout,
    Cdam,
    InputXGradient,
    IntegratedCdam,
    IntegratedGradients,
    Method,
    Noise,
    PartialLrp,
    PatchMaskPrediction,
    RelevancePropagation,
    SmoothCdam,
    SmoothGrad,
    TokenAblation,
)
from cdam_engine.pauses import interruptible
from cdam_engine.targets import Concept, Contrast, Output, Target, TopK
from cdam_engine.vit import SplitViT
from cdam_images import upright_rgb

__all__ = [
    "METHODS",
    "Asked",
    "Attention",
    "AttentionRollout",
    "Cdam",
    "Concept",
    "Contrast",
    "ExplainedTarget",
    "Explainer",
    "ExplainerFacts",
    "Explanation",
    "Formed",
    "Grid",
    "InputXGradient",
    "IntegratedCdam",
    "IntegratedGradients",
    "Method",
    "Noise",
    "Output",
    "PartialLrp",
    "PatchMaskPrediction",
    "Readout",
    "Refusal",
    "RelevanceMap",
    "RelevancePropagation",
    "SmoothCdam",
    "SmoothGrad",
    "SplitViT",
    "Target",
    "TokenAblation",
    "TokenCache",
    "TopK",
    "UnsupportedArchitectureError",
    "UnsupportedError",
    "UnsupportedMethodError",
    "explain_together",
    "interruptible",
    "mean_concept",
    "upright_rgb",
]
