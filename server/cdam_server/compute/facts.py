"""What is known of the models that are served and of work for them, as plain values: all that a request is checked against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cdam_engine import ExplainerFacts, Refusal
from cdam_engine.evaluation import Protocol
from cdam_engine.methods.prediction import Activation
from cdam_engine.preprocess import DataConfig
from cdam_server.errors import FailedPreconditionError, NotFoundError
from cdam_server.settings.specs import Task

_ACTIVATIONS: Final[dict[Task, Activation]] = {
    Task.MULTI_CLASS: "softmax",
    Task.MULTI_LABEL: "sigmoid",
    Task.BINARY: "sigmoid",
    Task.REGRESSION: "identity",
}


@dataclass(frozen=True)
class ModelFacts:
    """Of one model.

    Attributes:
        name: To ask for it by.
        architecture: timm's name without tag; what a converted model was; or ``demo``.
        fingerprint: Of architecture, preprocessing and weights.
        task: What its outputs mean.
        output_names: In order; empty if there are none. Several outputs may share one.
        output_count: 0 for a backbone without head, which serves concepts only.
        data_config: How it wants its images.
        explainer: What can be explained of it, and how; None if nothing can.
        refusals: The methods that it can't serve, by their names.
        batches_with: Name of the first of the models that share its trunk, and with it batches.
        resampled: What was resampled to another geometry, in words; empty if nothing.
        model_kwargs: What the architecture was built with beyond its name.
    """

    name: str
    architecture: str
    fingerprint: str
    task: Task
    output_names: tuple[str, ...]
    output_count: int
    data_config: DataConfig
    explainer: ExplainerFacts | None
    refusals: Mapping[str, Refusal]
    batches_with: str
    resampled: str = ""
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def explained(self) -> ExplainerFacts:
        """What can be explained of it, and how.

        Raises:
            FailedPreconditionError: CDAM is not defined for the architecture.
        """
        if self.explainer is None:
            refusal = next(iter(self.refusals.values()))  # the same for all methods
            message = f"model {self.name!r}: {refusal.message}"
            raise FailedPreconditionError(refusal.reason, message, model=self.name)
        return self.explainer

    @property
    def activation(self) -> Activation:
        """What turns its logits into probabilities."""
        return _ACTIVATIONS[self.task]

    def probabilities(self, logits: NDArray[np.floating]) -> NDArray[np.float64] | None:
        """What a classifier's logits mean, shape (C,): softmax over classes, or a sigmoid for each label; None: a regression."""
        values = logits.astype(np.float64)
        match self.activation:
            case "softmax":
                exponentials = np.exp(values - values.max(initial=-np.inf))
                return np.asarray(exponentials / exponentials.sum())
            case "sigmoid":
                return np.asarray(0.5 * (1.0 + np.tanh(0.5 * values)))  # no overflow at either end
            case "identity":
                return None

    def patches(self, input_size: tuple[int, int]) -> int:
        """Number of patches of an input that it takes."""
        grid = self.explained.sizes.grid(input_size)
        return grid.h * grid.w

    def times_larger(self, input_size: tuple[int, int]) -> float:
        """Patches of this input divided by those of the model's own, which limits are set for; at least 1."""
        if input_size == self.data_config.input_size:
            return 1.0
        return max(1.0, self.patches(input_size) / self.patches(self.data_config.input_size))


class Models:
    """All models of a server by name; the first is the default.

    Args:
        models: At least one.
    """

    def __init__(self, models: Sequence[ModelFacts]) -> None:
        self._models = {model.name: model for model in models}
        self.default = models[0]

    def __iter__(self) -> Iterator[ModelFacts]:
        """The models, default first, then by name."""
        others = (model for model in self._models.values() if model is not self.default)
        return iter([self.default, *sorted(others, key=lambda model: model.name)])

    def get(self, name: str) -> ModelFacts:
        """The model of this name; the default model for an empty name.

        Raises:
            NotFoundError: There is none.
        """
        if not name:
            return self.default
        if name not in self._models:
            raise NotFoundError("model", name, f"there is no model {name!r}; the server has {', '.join(self._models)}")
        return self._models[name]


class Bucket(NamedTuple):  # compared and hashed many times a request
    """What the images of a batch have in common.

    Attributes:
        model: Name of the first of the models that share their trunk.
        input_size: (height, width) in pixels.
    """

    model: str
    input_size: tuple[int, int]


@dataclass(frozen=True)
class EvaluationBucket:
    """What the samples of a batch have in common.

    Attributes:
        model: Name of the model.
        input_size: (height, width) in pixels.
        protocol: What is measured.
    """

    model: str
    input_size: tuple[int, int]
    protocol: Protocol


@dataclass(frozen=True)
class EvaluationFacts:
    """What is known of an evaluation before its first sample.

    Attributes:
        passes: About how many forward passes through the whole model a sample takes.
        required: The optional fields of a sample that must be there.
    """

    passes: int
    required: frozenset[str]


class NonFiniteError(ArithmeticError):
    """The model answered with NaN or infinity; the caller is told of an internal error, since it can't do better."""
