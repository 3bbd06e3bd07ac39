"""What all metrics have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple, Self, get_args

from cdam_engine.evaluation.geometry import Geometry
from cdam_engine.evaluation.numerics import Floats
from cdam_engine.evaluation.perturbation import MapOf, Perturbation
from cdam_engine.evaluation.sample import Field
from cdam_engine.evaluation.subject import Subject
from cdam_engine.methods.prediction import Activation

Better = Mapping[str, Literal["higher", "lower"] | None]
"""What is measured of a sample, in order, and which values are better; None: neither."""


class ParameterError(ValueError):
    """A parameter that does not fit a model.

    Attributes:
        field: Its path from the metric.
        reason: What is wrong with it.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class Found(NamedTuple):
    """A quantity's value.

    Attributes:
        value: The value.
        curve: What it is the area or the mean of, shape (2, points), if it is one.
    """

    value: float
    curve: Floats | None = None


class Cost(NamedTuple):
    """What is taken of a sample beside its maps, counted before any image is listed.

    Attributes:
        images: Perturbed images that the model is asked about, each a pass unless it is shared.
        levels: Levels that boxes are drawn at, which takes no pass.
    """

    images: int = 0
    levels: int = 0


class Metric(ABC):
    """A metric; its fields are its protocol.

    Attributes:
        kind: Its name.
        better: Its quantities, and which values are better.
        quantities: Their names.
        requires: The optional fields of a sample that must be there. Of the wrong target the maps are made, too; a mask
            is neither empty nor full.
        randomised: True if it compares maps of models with random weights, each of which takes the methods' passes.
    """

    kind: ClassVar[str]
    better: ClassVar[Better]
    quantities: ClassVar[tuple[str, ...]]
    requires: ClassVar[tuple[Field, ...]]
    randomised: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        """Refuse a metric that leaves out what nobody else can say.

        Raises:
            TypeError: With what is missing or wrong.
        """
        if missing := [name for name in ("kind", "better", "requires") if not hasattr(cls, name)]:
            raise TypeError(f"metric {cls.__name__} does not say: {', '.join(missing)}")
        if not cls.better or not set(cls.better.values()) <= {"higher", "lower", None}:
            raise TypeError(f"metric {cls.__name__}: better must say of each quantity higher, lower or None")
        if not isinstance(cls.requires, tuple) or not set(cls.requires) <= set(get_args(Field)):
            raise TypeError(f"metric {cls.__name__}: requires must be a tuple of {', '.join(get_args(Field))}")
        cls.quantities = tuple(cls.better)

    @property
    def activation(self) -> Activation:
        """What is made of an output's logit before it is measured."""
        return "identity"

    @abstractmethod
    def resolved(self, geometry: Geometry, activation: Activation | None = None) -> Self:
        """The same, with what a model and its input decide.

        Args:
            geometry: Of the input.
            activation: What makes probabilities of the model's outputs; None: what the metric says.

        Raises:
            ParameterError: A parameter does not fit.
        """

    @abstractmethod
    def cost(self, geometry: Geometry) -> Cost:
        """What it takes for the maps of one method.

        Args:
            geometry: Of the image.
        """

    @abstractmethod
    def images_of_map(self, its: MapOf, geometry: Geometry) -> Sequence[Perturbation]:
        """The images, composed by the scores of a map, that the model is asked about; the same for all samples.

        Args:
            its: The right target's map.
            geometry: Of the image.
        """

    @abstractmethod
    def images_of_sample(self, seed: int, sample: str, geometry: Geometry) -> Sequence[Perturbation]:
        """The images that the model is asked about whatever the scores.

        Args:
            seed: The evaluation's.
            sample: The sample's id.
            geometry: Of the image.
        """

    @abstractmethod
    def measure(self, its: MapOf, seed: int, subject: Subject) -> dict[str, Found]:
        """What it finds, by quantity, in their order.

        Args:
            its: The right target's map.
            seed: The evaluation's.
            subject: The sample; the model has answered for all its images.

        Raises:
            SampleError: An answer is not finite.
        """


class OfMaps:
    """What a metric is that reads maps alone: the model is asked about no image, and decides no parameter."""

    def resolved(self, geometry: Geometry, activation: Activation | None = None) -> Self:
        """See `Metric`."""
        return self

    def cost(self, geometry: Geometry) -> Cost:
        """See `Metric`."""
        return Cost()

    def images_of_map(self, its: MapOf, geometry: Geometry) -> Sequence[Perturbation]:
        """See `Metric`."""
        return ()

    def images_of_sample(self, seed: int, sample: str, geometry: Geometry) -> Sequence[Perturbation]:
        """See `Metric`."""
        return ()


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a word that is none of those known.

    Raises:
        ValueError: It is none.
    """
    if value not in known:
        raise ValueError(f"{name}: {value!r}, but it is one of {', '.join(known)}")


def positive(name: str, value: float) -> None:
    """Refuse a number that is no size.

    Raises:
        ValueError: It is not greater than 0, or not finite.
    """
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: {value}, but it is finite and greater than 0")
