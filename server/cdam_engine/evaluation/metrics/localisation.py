"""Weakly supervised localisation: does a box drawn from the map find the object?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cdam_engine.evaluation.geometry import Enlargement, Geometry
from cdam_engine.evaluation.metrics.base import Better, Cost, Found, Metric, OfMaps, one_of
from cdam_engine.evaluation.numerics import Floats, curve
from cdam_engine.evaluation.perturbation import MapOf
from cdam_engine.evaluation.sample import Field
from cdam_engine.evaluation.subject import Scores, Subject
from cdam_engine.methods.base import at_least_one
from cdam_engine.pauses import pause
from cdam_images.components import components, highest_iou

Normalisation = Literal["max", "min_max"]
"""How a map is scaled before it is thresholded: by its largest score, so that 0 stays 0; or from its least, which becomes 0."""

_AT_ONCE: Final = 1 << 22  # pixels of masks, 4 MiB


@dataclass(frozen=True)
class Localisation(OfMaps, Metric):
    """Whether a box drawn from the map finds the object, and whether the scores find its pixels.

    The map is enlarged and normalised, image by image. A box is the tightest one around the largest connected component
    (8-connectivity) of the pixels that are at least some level. The mask is of a class, not of an object: the tightest box
    around each of its components is the truth, and the one that fits best counts, so that one of several objects is enough.

    - ``box_acc``: the share of levels from 0 to 1 at which the box is right, its IoU at least `iou`; with whether it is by
      level, the curve. Over samples the curve's mean is BoxAcc of Choe et al. (CVPR 2020), and its maximum, of
      the table alone, their MaxBoxAcc.
    - ``corloc``: 1 if the box at the level `threshold` is right, else 0 (correct localisation, Deselaers et al. 2012);
      ``box_iou``: its IoU. The default is the level of Zhou et al. (CAM, 2016).
    - ``pixel_ap``: average precision of the scores as a classifier of the pixels, of each sample by itself. PxAP of Choe et
      al. pools the pixels of all samples, so that scores are compared between images and large objects count more.

    Where there is no box nothing is right, and the IoU is 0: normalised by its maximum, a map without a positive score has
    none at any level; from its minimum, a constant map has that of the whole image at level 0 alone.

    Attributes:
        normalisation: ``max``, S / max S, after Zhou et al.: what speaks against the target, or not at all, is never inside
            above level 0. ``min_max``, (S - min S) / (max S - min S), as Choe et al. do: for maps without a sign.
        threshold: The level of ``corloc`` and ``box_iou``.
        iou: From which IoU on a box is right.
        points: Levels of the curve: k / points for k = 0 to points - 1.
        all_components: Whether the boxes of all components are tried and the best counts (MaxBoxAccV2 of Choe et al.,
            TPAMI 2022), else the largest one's.
        enlargement: Of the map.
    """

    kind: ClassVar[str] = "localisation"
    better: ClassVar[Better] = {"box_acc": "higher", "corloc": "higher", "box_iou": "higher", "pixel_ap": "higher"}
    requires: ClassVar[tuple[Field, ...]] = ("mask",)

    normalisation: Normalisation = "max"
    threshold: float = 0.2
    iou: float = 0.5
    points: int = 100
    all_components: bool = False
    enlargement: Enlargement = "bilinear"

    def __post_init__(self) -> None:
        one_of("normalisation", self.normalisation, get_args(Normalisation))
        one_of("enlargement", self.enlargement, get_args(Enlargement))
        for name in ("threshold", "iou"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)}, but it is greater than 0, and at most 1")
        at_least_one("points", self.points)

    def cost(self, geometry: Geometry) -> Cost:
        return Cost(levels=self.points)

    def measure(self, its: MapOf, seed: int, subject: Subject) -> dict[str, Found]:
        pause(subject.pixels.device)  # of many maps and points this takes seconds
        mask = subject.sample.mask
        assert mask is not None
        pixels = subject.enlarged(its, self.enlargement)
        truths, scaled = components(mask[None]).box, self._normalised(pixels)
        levels = np.arange(self.points) / self.points
        *ious, iou = self._ious(scaled, np.append(levels, self.threshold), truths)
        hits = (np.array(ious) >= self.iou).astype(np.float64)
        return {
            "box_acc": Found(float(hits.mean()), curve(levels, hits)),
            "corloc": Found(float(iou >= self.iou)),
            "box_iou": Found(float(iou)),
            "pixel_ap": Found(_average_precision(pixels, mask)),
        }

    def _normalised(self, pixels: Scores) -> Scores:
        """The map of which 1 is the largest score; below 0 where there is no box."""
        low, high = pixels.min(), pixels.max()
        if self.normalisation == "min_max":
            return (pixels - low) / (high - low) if high > low else np.zeros_like(pixels)
        return pixels / high if high > 0 else np.full_like(pixels, -np.inf)

    def _ious(self, pixels: Scores, levels: Floats, truths: NDArray[np.intp]) -> Floats:
        """At each level, how well the box around the pixels of at least that score fits the truth; 0 if there are none."""
        ious = np.zeros(len(levels))
        step = max(1, _AT_ONCE // pixels.size)
        for start in range(0, len(levels), step):
            found = components(pixels >= levels[start : start + step, None, None])
            if not self.all_components:
                found = found.largest()
            np.maximum.at(ious, start + found.mask, highest_iou(found.box, truths))
        return ious


def _average_precision(pixels: Scores, mask: NDArray[np.bool_]) -> float:
    """The sum over the scores of (recall - recall at the next higher score) x precision; equal scores come together."""
    order = np.argsort(-pixels, axis=None)
    scores, inside = pixels.ravel()[order], mask.ravel()[order]
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    hits = inside.cumsum()[last]
    precision, gained = hits / (last + 1), np.diff(hits, prepend=0)
    return float(precision @ gained / hits[-1])
