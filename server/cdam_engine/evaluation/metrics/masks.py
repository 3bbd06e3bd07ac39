"""Mask agreement: does the map lie on the object?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

import numpy as np
from numpy.typing import NDArray

from cdam_engine.evaluation.geometry import Enlargement
from cdam_engine.evaluation.metrics.base import Better, Found, Metric, OfMaps, one_of
from cdam_engine.evaluation.numerics import midranks
from cdam_engine.evaluation.perturbation import MapOf
from cdam_engine.evaluation.sample import Field
from cdam_engine.evaluation.subject import Scores, Subject


@dataclass(frozen=True)
class MaskAgreement(OfMaps, Metric):
    """Whether the map lies on the object.

    Sources: energy, Wang et al. (Score-CAM, 2020); pointing game, Zhang et al. (2016), without tolerance.

    Attributes:
        enlargement: Of the map, but for the IoU of patches.
    """

    kind: ClassVar[str] = "mask_agreement"
    better: ClassVar[Better] = {"energy": "higher", "pointing_game": "higher", "auroc": "higher", "patch_iou": "higher"}
    requires: ClassVar[tuple[Field, ...]] = ("mask",)

    enlargement: Enlargement = "bilinear"

    def __post_init__(self) -> None:
        one_of("enlargement", self.enlargement, get_args(Enlargement))

    def measure(self, its: MapOf, seed: int, subject: Subject) -> dict[str, Found]:
        mask = subject.sample.mask
        assert mask is not None
        pixels = subject.enlarged(its, self.enlargement)
        return {
            "energy": Found(_energy(pixels, mask)),
            "pointing_game": Found(float(mask[pixels == pixels.max()].mean())),
            "auroc": Found(_auroc(pixels, mask)),
            "patch_iou": Found(_patch_iou(subject.maps[its], subject.geometry.shares(mask))),
        }


def _energy(pixels: Scores, mask: NDArray[np.bool_]) -> float:
    positive = np.maximum(pixels, 0).astype(np.float64)
    total = float(positive.sum())
    return float(positive[mask].sum()) / total if total else 0.0


def _auroc(pixels: Scores, mask: NDArray[np.bool_]) -> float:
    """The probability that a pixel inside scores higher than one outside, ties counting half (Mann and Whitney)."""
    inside = int(mask.sum())
    outside = mask.size - inside
    ranks = midranks(pixels)[mask.ravel()].sum()
    return float((ranks - inside * (inside + 1) / 2) / (inside * outside))


def _patch_iou(scores: Scores, shares: NDArray[np.float64]) -> float:
    """Of the patches on the object and as many that score highest."""
    on_object = shares >= min(0.5, shares.max())
    highest = np.zeros(scores.size, np.bool_)
    highest[np.argsort(-scores, axis=None, kind="stable")[: on_object.sum()]] = True
    both = int((on_object.ravel() & highest).sum())
    return both / int((on_object.ravel() | highest).sum())
