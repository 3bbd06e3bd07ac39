"""Weakly supervised localisation: does a box drawn from the map find the object?"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from cdam_engine.evaluation.found import Found
from cdam_engine.evaluation.numerics import Floats, curve
from cdam_engine.evaluation.perturbation import MapOf
from cdam_engine.evaluation.protocol import Localisation
from cdam_engine.evaluation.subject import Scores, Subject
from cdam_engine.pauses import pause
from cdam_images.components import components, highest_iou

_AT_ONCE: Final = 1 << 22  # pixels of masks, 4 MiB


def localisation(metric: Localisation, subject: Subject, its: MapOf) -> dict[str, Found]:
    """See `Localisation`.

    Args:
        metric: The protocol.
        subject: The sample, with a mask that is neither empty nor full.
        its: The map.
    """
    pause(subject.pixels.device)  # of many maps and points this takes seconds
    mask = subject.sample.mask
    assert mask is not None
    pixels = subject.enlarged(its, metric.enlargement)
    truths, scaled = components(mask[None]).box, _normalised(metric, pixels)
    levels = np.arange(metric.points) / metric.points
    *ious, iou = _ious(metric, scaled, np.append(levels, metric.threshold), truths)
    hits = (np.array(ious) >= metric.iou).astype(np.float64)
    return {
        "box_acc": Found(float(hits.mean()), curve(levels, hits)),
        "corloc": Found(float(iou >= metric.iou)),
        "box_iou": Found(float(iou)),
        "pixel_ap": Found(_average_precision(pixels, mask)),
    }


def _normalised(metric: Localisation, pixels: Scores) -> Scores:
    """The map of which 1 is the largest score; below 0 where there is no box."""
    low, high = pixels.min(), pixels.max()
    if metric.normalisation == "min_max":
        return (pixels - low) / (high - low) if high > low else np.zeros_like(pixels)
    return pixels / high if high > 0 else np.full_like(pixels, -np.inf)


def _ious(metric: Localisation, pixels: Scores, levels: Floats, truths: NDArray[np.intp]) -> Floats:
    """At each level, how well the box around the pixels of at least that score fits the truth; 0 if there are none."""
    ious = np.zeros(len(levels))
    step = max(1, _AT_ONCE // pixels.size)
    for start in range(0, len(levels), step):
        found = components(pixels >= levels[start : start + step, None, None])
        if not metric.all_components:
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
