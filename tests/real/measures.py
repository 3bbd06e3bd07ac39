"""What is measured on the real backbone: against the graph that it came from, a full backward pass, and masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

import cdam
from real.backbone import graph_tokens
from real.classifier import pixels
from real.voc import Photograph, Photographs
from reference.cdam_reference import cdam as reference_cdam
from reference.cdam_reference import relative_error

METHODS: Final = ("cdam", "attention")


def token_difference(graph: onnx.ModelProto, model: nn.Module, images: Sequence[Path]) -> tuple[float, float]:
    """How far timm's final tokens are from the graph's: the largest difference, and the lowest cosine of two tokens."""
    batch = torch.stack([pixels(model, image) for image in images])
    expected = torch.from_numpy(graph_tokens(graph, batch.numpy()))
    with torch.inference_mode():
        found = model.forward_features(batch)  # type: ignore[operator]  # nn.Module's attributes are untyped
    assert found.shape == expected.shape
    cosine = torch.cosine_similarity(found.double(), expected.double(), dim=-1)
    return float((found - expected).abs().max()), float(cosine.min())


def service_difference(client: cdam.Client, model: nn.Module, photographs: Iterable[Photograph]) -> tuple[float, float]:
    """How far the service is from timm's own model: logits absolutely, maps relative to their maximum, at worst.

    The maps are compared with those of a full backward pass through the whole model, one class at a time.
    """
    logits, maps = [], []
    for photograph in photographs:
        image = pixels(model, photograph.path)
        for relevance in client.explain(photograph.path, list(photograph.shares), resize="squash"):
            assert relevance.target is not None
            assert relevance.target.output_index is not None
            expected = reference_cdam(model, image, relevance.target.output_index)
            logits.append(abs(relevance.target.value - float(expected.logits[relevance.target.output_index])))
            maps.append(relative_error(torch.tensor(relevance.scores), expected.scores))
    return max(logits), max(maps)


@dataclass(frozen=True)
class Discrimination:
    """How well maps of a class tell it from another one in the same photograph.

    Attributes:
        maps: How many there were: one for each class with a positive logit.
        own_over_other: How often the mean score inside the class's own mask exceeds that inside the other's. Patches
            are weighted by the mask's share of them.
        energy: Share of the positive scores that lies inside the class's own mask, on average.
        covered: Share of the image that this mask covers: the energy of a map that knows nothing.
    """

    maps: int
    own_over_other: float
    energy: float
    covered: float


def discrimination(
    client: cdam.Client, voc: Photographs, photographs: Iterable[Photograph]
) -> dict[str, Discrimination]:
    """By method, over photographs that show two classes each."""
    seen: dict[str, list[tuple[bool, float, float]]] = {method: [] for method in METHODS}
    for photograph in photographs:
        names = list(photograph.shares)
        explanation = client.explain(photograph.path, names, methods=METHODS, resize="squash")
        masks = [voc.covered(photograph, name, explanation.geometry.patch_grid) for name in names]
        positive = [target.value > 0 for target in explanation.targets]
        for method in METHODS:
            # Attention has one map for all targets.
            maps = [relevance.scores for relevance in explanation if relevance.method.kind == method]
            for own, scores in enumerate((maps * 2)[:2]):
                if positive[own]:
                    seen[method].append(_tell_apart(scores, masks[own], masks[1 - own]))
    return {
        method: Discrimination(len(rows), *np.array(rows, np.float64).mean(0).tolist()) for method, rows in seen.items()
    }


def _tell_apart(
    scores: NDArray[np.float32], own: NDArray[np.float32], other: NDArray[np.float32]
) -> tuple[bool, float, float]:
    inside, outside = ((scores * mask).sum() / mask.sum() for mask in (own, other))
    gain = scores.clip(0)
    return bool(inside > outside), float((gain * own).sum() / gain.sum()), float(own.mean())
