"""From a sample to a subject: checked, on the model's device, its maps made."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdam_engine import targets
from cdam_engine.evaluation.draws import generator
from cdam_engine.evaluation.evaluated import Anchor
from cdam_engine.evaluation.geometry import Geometry
from cdam_engine.evaluation.perturbation import CLEAN, MapOf
from cdam_engine.evaluation.protocol import Protocol
from cdam_engine.evaluation.randomisation import RandomisedModels
from cdam_engine.evaluation.sample import Sample, SampleError
from cdam_engine.evaluation.subject import Scores, Subject
from cdam_engine.explainer import Explainer
from cdam_engine.methods.base import Method
from cdam_engine.pauses import pause
from cdam_engine.preprocess import normalise
from cdam_engine.targets import Scalar, TopK
from cdam_engine.transfer import send


class Preparation:
    """Makes samples ready to be measured.

    Args:
        explainer: Of the model, without a token cache.
        protocol: What is measured.
        geometry: Of the samples.

    Raises:
        UnsupportedMethodError: The model can't serve a method.
        TypeError: A method is something else.
    """

    def __init__(self, explainer: Explainer, protocol: Protocol, geometry: Geometry) -> None:
        self._explainer = explainer
        self._protocol = protocol
        self._geometry = geometry
        different = dict.fromkeys(protocol.methods)
        self._methods = [its for its in different if isinstance(its, Method)]
        self._anchors = [its for its in different if isinstance(its, Anchor)]
        for other in different:
            if not isinstance(other, Method | Anchor):
                raise TypeError(f"a method is one of cdam_engine's, such as Cdam(), or an anchor, not {other!r}")
        for method in self._methods:
            explainer.check(method)
        self._required = protocol.required()
        self._compares = "wrong_target" in self._required
        self._randomises = any(metric.randomised for metric in protocol.metrics)
        self._randomised = RandomisedModels(explainer, protocol.seed)
        self._activations = frozenset(metric.activation for metric in protocol.metrics)

    @property
    def required(self) -> frozenset[str]:
        """The optional fields of a sample that must be there; the others are not looked at."""
        return frozenset(self._required)

    @property
    def answers_clean(self) -> bool:
        """Whether the model's answer to the clean image comes with the maps."""
        return bool(self._methods)

    def passes(self) -> float:
        """About how many forward passes the maps of a sample take."""
        if not self._methods:
            return 0
        patches = self._geometry.grid.h * self._geometry.grid.w
        randomised = self._randomised.parts * self._explainer.cost(self._methods, 1, patches) if self._randomises else 0
        return self._explainer.cost(self._methods, 1 + self._compares, patches) + randomised

    def prepare(self, sample: Sample) -> Subject:
        """A sample with its maps.

        Raises:
            SampleError: It can't be measured.
        """
        self._check(sample)
        pixels = self._pixels("image", sample.image)
        subject = Subject(sample, self._geometry, pixels, self._activations)
        if "counterfactual" in self._required:
            assert sample.counterfactual is not None
            subject.show("counterfactual", self._pixels("counterfactual", sample.counterfactual))
            subject.difference = _difference(sample)
        pause(pixels.device)
        subject.maps = self._maps(subject) | {
            MapOf(anchor, wrong): self._anchor(anchor, sample, wrong=wrong)
            for anchor in self._anchors
            for wrong in (False, True)[: 1 + self._compares]
        }
        if self._randomises:
            for explainer in self._randomised.explainers():
                pause(pixels.device)
                subject.randomised.append(self._explained(explainer, subject, [sample.target]))
        return subject

    def _check(self, sample: Sample) -> None:
        wanted = {"target": sample.target} | ({"wrong_target": sample.wrong_target} if self._compares else {})
        for required, by in self._required.items():
            if getattr(sample, required) is None:
                raise SampleError(required, f"is required by {by}")
        for field, target in wanted.items():
            self._check_target(field, target)
        if self._compares and sample.wrong_target == sample.target:
            raise SampleError("wrong_target", "is the right target")
        for field in ("mask", "wrong_mask"):
            if field in self._required:
                self._check_mask(field, getattr(sample, field))

    def _check_target(self, field: str, target: Scalar | None) -> None:
        if target is None:
            raise SampleError(field, "is required")
        if isinstance(target, TopK):
            raise SampleError(field, "stands for several outputs; a sample's is one")
        vit = self._explainer.vit
        try:
            targets.check([target], vit.num_outputs, vit.latent_size)
        except (IndexError, ValueError, TypeError) as error:
            raise SampleError(field, str(error)) from error

    def _check_mask(self, field: str, mask: NDArray[np.bool_]) -> None:
        if mask.shape != self._geometry.input_size or mask.dtype != np.bool_:
            size = " x ".join(map(str, self._geometry.input_size))
            raise SampleError(field, f"of shape {mask.shape} and type {mask.dtype}, not {size} and bool")
        judges = any("mask" in metric.requires for metric in self._protocol.metrics)
        if field == "mask" and judges and mask.all() == mask.any():
            raise SampleError(field, "is full: nothing lies outside" if mask.any() else "is empty: nothing lies inside")

    def _pixels(self, field: str, image: NDArray[np.uint8] | Tensor) -> Tensor:
        """Normalised input on the model's device, shape (C, H, W)."""
        try:
            given = (
                image.detach() if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
            )  # may be read-only
        except TypeError as error:
            raise SampleError(field, f"is no array: {error}") from error
        weight = next(self._explainer.vit.model.parameters())
        size, channels = tuple(self._geometry.input_size), self._explainer.vit.channels
        if given.dtype == torch.uint8:
            if given.shape != (*size, channels):
                raise SampleError(field, f"of shape {tuple(given.shape)}, not {(*size, channels)}")
            return normalise(send(given[None], weight.device), self._explainer.data_config, weight.dtype)[0]
        if given.shape != (channels, *size) or not given.is_floating_point():
            raise SampleError(
                field, f"of shape {tuple(given.shape)} and type {given.dtype}, not {(channels, *size)} and float"
            )
        if not bool(given.isfinite().all()):
            raise SampleError(field, "has values that are not finite")
        return send(given.clone(), weight.device, weight.dtype)

    def _maps(self, subject: Subject) -> dict[MapOf, Scores]:
        sample = subject.sample
        both = [sample.target, sample.wrong_target] if self._compares else [sample.target]
        return self._explained(self._explainer, subject, [target for target in both if target is not None], learn=True)

    def _explained(
        self, explainer: Explainer, subject: Subject, wanted: list[Scalar], *, learn: bool = False
    ) -> dict[MapOf, Scores]:
        """The methods' maps, of one sample alone so that they are the same whatever else is evaluated."""
        if not self._methods:
            return {}
        (explanation,) = explainer.explain(subject.pixels[None], [wanted], [self._methods])
        if learn:
            latent, logits = (
                torch.from_numpy(part).double()[None] for part in (explanation.latent, explanation.logits)
            )
            subject.answer([CLEAN], latent, logits)
        maps = {MapOf(self._methods[its.method_index], its.target_index == 1): its.scores for its in explanation.maps}
        if not all(np.isfinite(scores).all() for scores in maps.values()):
            raise SampleError("image", "a map of it is not finite")
        return maps

    def _anchor(self, anchor: Anchor, sample: Sample, *, wrong: bool) -> NDArray[np.floating[Any]]:
        if anchor is Anchor.RANDOM:
            rng = generator(self._protocol.seed, sample.id, "map", "wrong" if wrong else "right")
            return rng.standard_normal(self._geometry.grid)
        mask = sample.wrong_mask if wrong else sample.mask
        assert mask is not None
        shares = self._geometry.shares(mask)
        return shares if anchor is Anchor.MASK else 1 - shares


def _difference(sample: Sample) -> NDArray[np.bool_]:
    """Where image and counterfactual differ, as they came, shape (H, W)."""
    before, after = (
        np.asarray(its.detach().cpu() if isinstance(its, Tensor) else its)
        for its in (sample.image, sample.counterfactual)
    )
    if before.dtype != after.dtype:
        raise SampleError("counterfactual", f"is {after.dtype}, but the image is {before.dtype}")
    difference: NDArray[np.bool_] = (before != after).any(axis=2 if before.dtype == np.uint8 else 0)
    if not difference.any():
        raise SampleError("counterfactual", "does not differ from the image")
    return difference
