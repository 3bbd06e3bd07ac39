"""Explanations of Vision Transformers: torch and timm, no service.

>>> import timm, torch
>>> from cdam_engine import Explainer, TopK
>>> model = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
>>> explanation, = Explainer(model).explain(torch.randn(1, 3, 224, 224), [[TopK(2)]])
>>> explanation.maps[0].scores.shape
(14, 14)
"""

from cdam_engine.explainer import ExplainedTarget, Explainer, Explanation, RelevanceMap
from cdam_engine.targets import Output, Target, TopK
from cdam_engine.vit import Grid, Readout, SplitViT, UnsupportedArchitectureError

__all__ = [
    "ExplainedTarget",
    "Explainer",
    "Explanation",
    "Grid",
    "Output",
    "Readout",
    "RelevanceMap",
    "SplitViT",
    "Target",
    "TopK",
    "UnsupportedArchitectureError",
]
