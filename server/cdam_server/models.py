"""The models that a server has loaded, and how one batch of one of them is computed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cdam_engine import Explainer, Explanation, Target, UnsupportedArchitectureError
from cdam_engine.preprocess import normalise
from cdam_server.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    OutOfMemoryError,
)
from cdam_server.loading import LoadedModel


@dataclass(frozen=True, eq=False)
class Job:
    """One image and its targets.

    Attributes:
        pixels: uint8, shape (H, W, 3), at the model's input size.
        targets: What to explain.
    """

    pixels: NDArray[np.uint8]
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Bucket:
    """What the images of a batch have in common: model and input size (height, width)."""

    model: str
    input_size: tuple[int, int]


class ServedModel:
    """A loaded model with its explainer.

    Attributes:
        loaded: The model and what is known about it.
        unsupported: Why CDAM can't be had from it, or None.
    """

    def __init__(self, loaded: LoadedModel, device: torch.device) -> None:
        self.loaded = loaded
        self.unsupported: UnsupportedArchitectureError | None = None
        self._device = device
        self._explainer: Explainer | None = None
        try:
            self._explainer = Explainer(loaded.module)
        except UnsupportedArchitectureError as error:
            self.unsupported = error

    @property
    def explainer(self) -> Explainer:
        """The explainer.

        Raises:
            FailedPreconditionError: CDAM is not defined for the architecture.
        """
        if self._explainer is None:
            assert self.unsupported is not None
            raise FailedPreconditionError(
                self.unsupported.reason, f"model {self.loaded.name!r}: {self.unsupported}", model=self.loaded.name
            )
        return self._explainer

    def output_index(self, name: str, field: str) -> int:
        """The index of the output with this name.

        Raises:
            NotFoundError: There is none.
            InvalidArgumentError: Several outputs share the name.
        """
        matches = [index for index, known in enumerate(self.loaded.output_names) if known == name]
        if not matches:
            similar = difflib.get_close_matches(name, self.loaded.output_names, n=3, cutoff=0.5)
            similar += [known for known in self.loaded.output_names if name and name in known and known not in similar][
                :3
            ]
            hint = f"; is it {' or '.join(map(repr, similar))}?" if similar else ""
            raise NotFoundError(
                "output", name, f"{field}: model {self.loaded.name!r} has no output named {name!r}{hint}"
            )
        if len(matches) > 1:
            raise InvalidArgumentError(field, f"outputs {matches} are all named {name!r}; say which by index")
        return matches[0]

    def compute(self, jobs: Sequence[Job]) -> list[Explanation | Exception]:
        """Explain a batch of images of one size; blocks until the device is done.

        Raises:
            OutOfMemoryError: The batch does not fit into the device's memory.
        """
        try:
            pixels = torch.from_numpy(np.stack([job.pixels for job in jobs])).to(self._device)
            inputs = normalise(pixels, self.loaded.data_config, torch.float32)
            explanations = self.explainer.explain(inputs, [job.targets for job in jobs])
        except RuntimeError as error:
            # On a CPU torch has no class of its own for it.
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            raise OutOfMemoryError("OUT_OF_MEMORY", "the image does not fit into the device's memory") from error
        return [_checked(explanation) for explanation in explanations]


class Catalog:
    """All models of a server by name; the first is the default.

    Args:
        models: At least one.
    """

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = {model.loaded.name: model for model in models}
        self.default = models[0]

    def __iter__(self) -> Iterator[ServedModel]:
        """The models, default first, then by name."""
        rest = (model for model in self._models.values() if model is not self.default)
        return iter([self.default, *sorted(rest, key=lambda model: model.loaded.name)])

    def get(self, name: str) -> ServedModel:
        """The model of this name; the default model for an empty name.

        Raises:
            NotFoundError: There is none.
        """
        if not name:
            return self.default
        if name not in self._models:
            raise NotFoundError("model", name, f"there is no model {name!r}; the server has {', '.join(self._models)}")
        return self._models[name]

    def compute(self, bucket: Bucket, jobs: Sequence[Job]) -> list[Explanation | Exception]:
        """Explain one batch; what the batcher calls in its thread."""
        return self.get(bucket.model).compute(jobs)


def _checked(explanation: Explanation) -> Explanation | Exception:
    """A map that is not finite is no answer."""
    if all(np.isfinite(item.scores).all() for item in explanation.maps) and np.isfinite(explanation.logits).all():
        return explanation
    return NonFiniteError("the model's outputs or gradients for this image are not finite")


class NonFiniteError(ArithmeticError):
    """The model answered with NaN or infinity; the caller is told of an internal error, since it can't do better."""
