"""A sample while it is being measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdam_engine.evaluation.blur import blurred
from cdam_engine.evaluation.geometry import Enlargement, Geometry
from cdam_engine.evaluation.perturbation import MapOf, Order, Perturbation, Picture
from cdam_engine.evaluation.sample import Sample, SampleError
from cdam_engine.methods.prediction import Activation, activated
from cdam_engine.targets import Output
from cdam_engine.transfer import send

Scores = NDArray[np.floating[Any]]


class Subject:
    """A sample, its maps, what variations of its image are composed of, and what the model says of them.

    Args:
        sample: The sample.
        geometry: Of its image.
        pixels: Its normalised image on the model's device, shape (C, H, W).
        activations: What is made of an output's logit, beside the logit itself.

    Attributes:
        sample: The sample.
        geometry: Of its image.
        maps: Its maps, shape (h, w).
        randomised: The right target's maps of the models with ever more random weights.
        difference: Where the counterfactual differs, shape (H, W), if there is one.
        waiting: Variations that the model has not yet been asked about.
    """

    def __init__(self, sample: Sample, geometry: Geometry, pixels: Tensor, activations: frozenset[Activation]) -> None:
        self.sample = sample
        self.geometry = geometry
        self.maps: dict[MapOf, Scores] = {}
        self.randomised: list[dict[MapOf, Scores]] = []
        self.difference: NDArray[np.bool_] | None = None
        self.waiting = 0
        self._pictures: dict[Picture, Tensor] = {"clean": pixels}
        self._activations: tuple[Activation, ...] = ("identity", *sorted(activations - {"identity"}))
        self._enlarged: dict[tuple[MapOf, Enlargement], Scores] = {}
        self._ranks: dict[Order, Tensor] = {}
        self._answers: dict[Perturbation, NDArray[np.float64]] = {}

    @property
    def pixels(self) -> Tensor:
        """The normalised image on the model's device, shape (C, H, W)."""
        return self._pictures["clean"]

    def show(self, picture: Picture, pixels: Tensor) -> None:
        """Take in a picture (C, H, W) that the sample came with."""
        self._pictures[picture] = pixels

    def picture(self, picture: Picture) -> Tensor:
        """A picture on the model's device, shape (C, H, W)."""
        if picture not in self._pictures:
            if isinstance(picture, float):
                self._pictures[picture] = blurred(self.pixels, picture)
            elif picture == "mean_colour":
                self._pictures[picture] = torch.zeros_like(self.pixels)
        return self._pictures[picture]

    def enlarged(self, its: MapOf, enlargement: Enlargement) -> Scores:
        """A map over the image's pixels, shape (H, W)."""
        key = its, enlargement
        if key not in self._enlarged:
            self._enlarged[key] = self.geometry.enlarge(self.maps[its], enlargement)
        return self._enlarged[key]

    def ranks(self, order: Order) -> Tensor:
        """The rank of every pixel, or of its patch, from 0, on the model's device, shape (H, W), int32."""
        if order not in self._ranks:
            scores = self.maps[order.map] if order.enlargement is None else self.enlarged(order.map, order.enlargement)
            keys = send(torch.from_numpy(scores), self.pixels.device).flatten()
            # + 0: no negative zeros, which a sort by bits would put before the others.
            first_to_last = torch.sort((keys if order.least_first else -keys) + 0.0, stable=True).indices
            ranks = torch.empty_like(first_to_last, dtype=torch.int32)
            ranks[first_to_last] = torch.arange(len(keys), dtype=torch.int32, device=keys.device)
            ranks = ranks.view(scores.shape)
            self._ranks[order] = ranks if order.unit == "pixel" else self.geometry.spread(ranks)
        return self._ranks[order]

    def answer(self, perturbations: Sequence[Perturbation], latent: Tensor, logits: Tensor) -> None:
        """Take in what the model says of variations of the image.

        Args:
            perturbations: n variations.
            latent: Of each, shape (n, D), float64, on the CPU.
            logits: Likewise, shape (n, C).
        """
        target = self.sample.target
        said = [
            activated(logits, activation)[:, target.index] if isinstance(target, Output) else target(latent, logits)
            for activation in self._activations
        ]
        self._answers.update(zip(perturbations, torch.stack(said, dim=1).numpy(), strict=True))

    def knows(self, perturbation: Perturbation) -> bool:
        """Whether the model's answer to a variation is known."""
        return perturbation in self._answers

    def values(self, perturbations: Sequence[Perturbation], activation: Activation = "identity") -> NDArray[np.float64]:
        """The right target's value of each variation, shape (n,).

        Args:
            perturbations: The variations.
            activation: What is made of an output's logit; targets that are no outputs stay as they are.

        Raises:
            SampleError: One is not finite.
        """
        readout = self._activations.index(activation)
        values = np.array([self._answers[perturbation][readout] for perturbation in perturbations])
        if not np.isfinite(values).all():
            raise SampleError("image", "the model's answer to it, or to a variation of it, is not finite")
        return values
