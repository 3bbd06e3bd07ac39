"""Models and samples to measure on, and what the references say to a protocol: where the two vocabularies meet."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import nn

from cdam_engine import Explainer, Method, Output
from cdam_engine.evaluation import (
    Anchor,
    BoxSensitivity,
    ClassDiscrimination,
    Compactness,
    Counterfactual,
    Evaluator,
    Fidelity,
    InsertionDeletion,
    Localisation,
    MaskAgreement,
    Measured,
    Metric,
    Protocol,
    Randomisation,
    Sample,
    SampleError,
    Sparseness,
)
from cdam_server.demo import model as demo
from reference import evaluation_references as references
from reference.evaluation_references import Array, Number, Numbers
from reference.method_expectations import function
from reference.models import BY_ID, build, randomise, require

Key = tuple[int, int, str]
"""Index of the method, index of the metric, quantity."""


@dataclass(frozen=True, eq=False)
class Setting:
    """A model, and the same in double precision for the references."""

    model: nn.Module
    truth: nn.Module
    size: tuple[int, int]
    patch: tuple[int, int]
    grid: tuple[int, int]
    outputs: int

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype


@functools.lru_cache(maxsize=3)
def setting(name: str, dtype: torch.dtype = torch.float64) -> Setting:
    if name == "demo":
        model: Any = demo.load().to(dtype)
        size, patch, grid, outputs = (64, 64), (4, 4), (16, 16), 10
    elif name == "padded":
        model, size, patch, grid, outputs = _flexible().to(dtype), (40, 54), (16, 16), (3, 4), 7
    elif name == "one_patch":
        model, size, patch, grid, outputs = _flexible().to(dtype), (16, 16), (16, 16), (1, 1), 7
    elif name == "headless":
        model, size, patch, grid, outputs = _flexible(0).to(dtype), (32, 48), (16, 16), (2, 3), 1
    else:
        case = BY_ID[name]
        require(case)
        model, size, grid, outputs = build(case, dtype), case.image_size, case.grid, case.outputs
        patch = tuple(model.patch_embed.patch_size)
    return Setting(model, copy.deepcopy(model).double(), size, patch, grid, outputs)


def _flexible(outputs: int = 7) -> Any:
    """A model that takes images of any size, and fills up the last patches of those that they don't divide."""
    options = {"dynamic_img_size": True, "dynamic_img_pad": True, "depth": 2, "embed_dim": 48, "num_heads": 3}
    with torch.random.fork_rng():
        model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, num_classes=outputs, **options)
    randomise(model, seed=3)
    return model.eval()


def sample(its: Setting, number: int = 0, **changes: Any) -> Sample:
    """A sample with all that a metric may ask for: an object, a second one, and the image without the first."""
    draw = torch.Generator().manual_seed(number)
    height, width = its.size
    channels = next(its.model.patch_embed.parameters()).shape[1]
    image = (torch.randn(channels, height, width, generator=draw) * 0.8 + 0.2).to(its.dtype)
    mask, wrong = np.zeros(its.size, bool), np.zeros(its.size, bool)
    mask[height // 4 : height // 4 + height // 3, 2 : width // 2 + 1] = True
    wrong[height // 2 :, width // 2 + 2 :] = True
    without = torch.where(torch.from_numpy(mask), image.mean((1, 2), keepdim=True), image)
    return replace(
        Sample(
            id=f"sample {number}",
            image=image,
            target=Output(number % its.outputs),
            wrong_target=Output((number + 1) % its.outputs),
            mask=mask,
            counterfactual=without,
            wrong_mask=wrong,
        ),
        **changes,
    )


def in_uint8(given: Sample) -> Sample:
    """The same in the 256 levels of a picture."""

    def levels(image: Any) -> NDArray[np.uint8]:
        return (image.double() * 40 + 128).clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()

    return replace(given, image=levels(given.image), counterfactual=levels(given.counterfactual))


def measure(
    its: Setting, protocol: Protocol, samples: Sequence[Sample], batch_size: int = 32
) -> list[dict[Key, Number]]:
    """The engine's numbers, one dict a sample."""
    evaluator = Evaluator(Explainer(its.model), protocol, input_size=its.size, batch_size=batch_size)
    return [numbers_of(protocol, answer) for answer in evaluator.evaluate(samples)]


def numbers_of(protocol: Protocol, answer: Measured | SampleError) -> dict[Key, Number]:
    """What was measured of a sample, if it has all that is promised, in the order that is promised."""
    assert isinstance(answer, Measured), answer
    keys = [(value.method_index, value.metric_index, value.quantity) for value in answer.values]
    assert keys == [
        (i, j, quantity)
        for i in range(len(protocol.methods))
        for j, metric in enumerate(protocol.metrics)
        for quantity in metric.quantities
    ]
    return {key: Number(value.value, value.curve) for key, value in zip(keys, answer.values, strict=True)}


class Expectation:
    """What the references say to a sample.

    Args:
        its: The model.
        protocol: What is asked.
        given: The sample.
    """

    def __init__(self, its: Setting, protocol: Protocol, given: Sample) -> None:
        self._its, self._protocol, self._sample = its, protocol, given
        self._image = normalised(its, given.image)
        self._f = references.values(its.truth, function(given.target))
        self._compares = any(isinstance(metric, ClassDiscrimination) for metric in protocol.metrics)

    def numbers(self) -> dict[Key, Number]:
        return {
            (i, j, quantity): number
            for i, method in enumerate(self._protocol.methods)
            for j, metric in enumerate(self._protocol.metrics)
            for quantity, number in self._metric(metric, method).items()
        }

    def map(self, method: Method | Anchor, side: str, model: nn.Module | None = None) -> NDArray[np.floating]:
        """The engine's map of this sample for its right or its wrong target.

        Each is asked for by itself; in single precision as the evaluator does, both at once where they are compared,
        because the last bits differ.
        """
        its, given = self._its, self._sample
        match method:
            case Anchor.RANDOM:
                return references.random_map(self._protocol.seed, given.id, side, its.grid)
            case Anchor():
                mask = given.mask if side == "right" else given.wrong_mask
                assert mask is not None
                share = references.patch_share(mask, its.grid, its.patch)
                return share if method is Anchor.MASK else 1 - share
        target = given.target if side == "right" else given.wrong_target
        assert target is not None
        image = torch.from_numpy(given.image) if isinstance(given.image, np.ndarray) else given.image
        wanted = [target]
        if its.dtype == torch.float32 and model is None and self._compares and method.needs_target:
            assert given.wrong_target is not None
            wanted = [given.target, given.wrong_target]
        (explanation,) = Explainer(model or its.model).explain(image[None], [wanted], [[method]])
        return explanation.maps[wanted.index(target) if method.needs_target else 0].scores

    def _metric(self, metric: Metric, method: Method | Anchor) -> Numbers:  # noqa: C901, PLR0911
        its, given = self._its, self._sample
        scores = self.map(method, "right")
        match metric:
            case Fidelity():
                return self._fidelity(metric, scores)
            case BoxSensitivity():
                return self._boxes(metric, scores)
            case ClassDiscrimination(fidelity, box_sensitivity):
                right, wrong = (
                    self._fidelity(fidelity, shown) | self._boxes(box_sensitivity, shown)
                    for shown in (scores, self.map(method, "wrong"))
                )
                return references.class_discrimination(right, wrong)
            case Compactness(threshold, absolute):
                return references.compactness(scores, threshold, absolute=absolute)
            case MaskAgreement(enlargement):
                assert given.mask is not None
                return references.mask_agreement(scores, given.mask, its.patch, enlargement)
            case Localisation():
                assert given.mask is not None
                return references.localisation(scores, given.mask, its.patch, **dataclasses.asdict(metric))
            case InsertionDeletion():
                f = self._f
                if isinstance(given.target, Output):
                    f = references.values(its.truth, function(given.target), metric.activation)
                return references.insertion_deletion(
                    f,
                    self._image,
                    scores,
                    its.patch,
                    unit=metric.unit,
                    steps=metric.steps,
                    blur_sigma=metric.blur_sigma,
                    enlargement=metric.enlargement,
                )
            case Sparseness():
                return references.sparseness(scores)
            case Randomisation(absolute):
                others = [
                    scores if isinstance(method, Anchor) else self.map(method, "right", randomised)
                    for randomised in references.cascade(its.model, self._protocol.seed)
                ]
                return references.randomisation(scores, others, absolute=absolute)
            case Counterfactual():
                without = normalised(its, given.counterfactual)
                differ = _differ(given.image, given.counterfactual)
                return references.counterfactual(self._f, self._image, without, differ, scores, its.patch)
        raise AssertionError(metric)

    def _fidelity(self, metric: Fidelity, scores: NDArray[np.floating]) -> Numbers:
        return references.fidelity(
            self._f,
            self._image,
            scores,
            self._its.patch,
            unit=metric.unit,
            blur_sigma=metric.blur_sigma,
            points=metric.points,
            enlargement=metric.enlargement,
        )

    def _boxes(self, metric: BoxSensitivity, scores: NDArray[np.floating]) -> Numbers:
        return references.box_sensitivity(
            self._f,
            self._image,
            scores,
            self._its.patch,
            self._protocol.seed,
            self._sample.id,
            box_sizes=metric.box_sizes,
            count=metric.boxes,
            blur_sigma=metric.blur_sigma,
            enlargement=metric.enlargement,
        )


def normalised(its: Setting, image: Any) -> Array:
    if not isinstance(image, np.ndarray):
        return image.double().numpy()
    config = timm.data.resolve_model_data_config(its.model)
    scaled = image.transpose(2, 0, 1).astype(np.float64) / 255
    mean, std = (np.array(config[key])[:, None, None] for key in ("mean", "std"))
    return (scaled - mean) / std


def _differ(one: Any, other: Any) -> NDArray[np.bool_]:
    if isinstance(one, np.ndarray):
        return (one != other).any(2)
    return (one != other).any(0).numpy()
