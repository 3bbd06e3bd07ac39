"""What a server would see of a model, and answer for an image, without a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cdam_engine import Cdam, Concept, Explanation, TopK
from cdam_engine.preprocess import prepare
from cdam_server.compute.models import ImageQuery, ServedModel


@dataclass(frozen=True)
class Difference:
    """How far a model's outputs are from those expected.

    Attributes:
        largest: Largest absolute difference.
        index: Of the output that differs most.
        expected: Its value in the expectation.
        found: Its value here.
        within: Whether `largest` is within the tolerance, relative to the largest expected value where that is above 1.
    """

    largest: float
    index: int
    expected: float
    found: float
    within: bool


def describe(served: ServedModel) -> dict[str, Any]:
    """Everything that decides a model's answers, in an order to be read; values are texts, numbers and lists."""
    loaded, config = served.loaded, served.loaded.data_config
    facts: dict[str, Any] = {
        "architecture": loaded.architecture,
        "weights": loaded.weights.source,
        "prefix taken off": loaded.weights.prefix,
        "left out": list(loaded.weights.left_out),
        "converted": list(loaded.weights.notes),
        "resampled": loaded.resampled,
        "task": str(loaded.task),
        "outputs": loaded.output_count,
        "output names": list(loaded.output_names),
        "input size": list(config.input_size),
        "mean": list(config.mean),
        "std": list(config.std),
        "interpolation": config.interpolation,
        "crop": f"{config.crop_mode}, {config.crop_pct:g}",
    }
    if (explained := served.facts.explainer) is not None:
        facts["patch grid"] = list(explained.sizes.grid(config.input_size))
        facts["other input sizes"] = explained.sizes.flexible
        facts["latent"] = explained.latent_size
        facts["readout"] = str(explained.readout)
    facts["not served"] = {kind: refusal.message for kind, refusal in served.facts.refusals.items()}
    facts["fingerprint"] = loaded.fingerprint
    return facts


def answer(served: ServedModel, image: Image.Image) -> Explanation:
    """What the model says of an image: the way that every request takes, for one CDAM.

    Args:
        served: A model that can be explained.
        image: RGB, upright.

    Raises:
        FailedPreconditionError: The model can't be explained.
        Exception: Whatever the computation ended with.
    """
    prepared = prepare(image, served.loaded.data_config)
    latent = served.facts.explained.latent_size
    target = TopK(1) if served.loaded.output_count else Concept(torch.ones(latent))
    (found,) = served.compute([ImageQuery(prepared.pixels, (target,), (Cdam(),))], lambda: None)
    if isinstance(found, Exception):
        raise found
    return found


def best(served: ServedModel, logits: NDArray[np.floating], count: int = 5) -> list[tuple[str, float, float | None]]:
    """The largest outputs: (name, logit, probability where the task has one)."""
    probabilities = served.facts.probabilities(logits)
    order = np.argsort(-logits, kind="stable")[:count]
    names = served.facts.output_names or [f"output {index}" for index in range(len(logits))]
    return [
        (names[i], float(logits[i]), None if probabilities is None else float(probabilities[i])) for i in order.tolist()
    ]


def compare(logits: NDArray[np.floating], expected: Sequence[float], tolerance: float) -> Difference:
    """Compare outputs with those that were expected.

    Raises:
        ValueError: There are others in number, or not all are finite numbers.
    """
    values = np.asarray(expected, dtype=np.float64)
    if values.ndim == 2 and len(values) == 1:
        values = values[0]  # of a batch of one
    if values.shape != logits.shape:
        raise ValueError(f"--expect: {values.size} values are expected, the model has {logits.size} outputs")
    if not np.isfinite(values).all():
        raise ValueError("--expect: not all values are finite")
    differences = np.abs(logits.astype(np.float64) - values)
    index = int(differences.argmax())
    within = differences.max() <= tolerance * max(1.0, np.abs(values).max())
    return Difference(float(differences.max()), index, float(values[index]), float(logits[index]), within=bool(within))
