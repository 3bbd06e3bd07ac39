"""What goes into an evaluation, and what comes of it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cdam._errors import MalformedResponse
from cdam._images import ImageLike, MaskLike
from cdam._metrics import Evaluated, Metric
from cdam._targets import TargetLike


@dataclass(frozen=True, eq=False)
class Sample:
    """An image of an evaluation, with what is known about it.

    Attributes:
        id: Keys the sample's random draws; unique in its evaluation.
        image: As for `Client.explain`.
        target: The right target, of one value.
        wrong_target: A wrong target, where a metric compares the two.
        mask: Where the target's object is, of the image's size.
        counterfactual: The image without the target's object, of the same size.
        wrong_mask: Where the wrong target's object is; what the mask anchors show for the wrong target.
    """

    id: str
    image: ImageLike
    target: TargetLike
    wrong_target: TargetLike | None = None
    mask: MaskLike | None = None
    counterfactual: ImageLike | None = None
    wrong_mask: MaskLike | None = None


@dataclass(frozen=True, eq=False)
class MetricValue:
    """One number of one sample.

    Attributes:
        method_index: Index of the method, as evaluated.
        metric_index: Index of the metric, as evaluated.
        quantity: Which of the metric's quantities.
        value: The value.
        curve: What it is the area or the mean of, if it is one: shape (2, points), abscissae then ordinates, read-only.
    """

    method_index: int
    metric_index: int
    quantity: str
    value: float
    curve: NDArray[np.float32] | None = None


@dataclass(frozen=True, eq=False)
class SampleResult:
    """What came of one sample: all its values or an error.

    Attributes:
        id: The sample's id.
        values: By method, then by metric, then in the order of the metric's quantities; empty if it failed.
        error: Why it failed; None if it did not.
    """

    id: str
    values: tuple[MetricValue, ...] = ()
    error: Exception | None = None

    def result(self) -> tuple[MetricValue, ...]:
        """The values.

        Raises:
            Exception: the sample's error, if it failed.
        """
        if not self.values:
            raise self.error or MalformedResponse("neither values nor an error")
        return self.values


@dataclass(frozen=True)
class EvaluationProtocol:
    """What is measured, and how.

    Attributes:
        methods: Methods and anchors, with their defaults filled in.
        metrics: Metrics, with their defaults filled in.
        seed: With a sample's id it fixes every draw.
        resize: How images are brought to the model's input; None: the model's own way.
        input_size: (height, width) of the model's input; None: its own.
        bootstrap_resamples: Resamples for the intervals.
    """

    methods: tuple[Evaluated, ...]
    metrics: tuple[Metric, ...]
    seed: int
    resize: str | None
    input_size: tuple[int, int] | None
    bootstrap_resamples: int


@dataclass(frozen=True)
class EvaluationStarted:
    """What an evaluation is of, as the first server to answer has it.

    Attributes:
        model: The model's name.
        fingerprint: The model's fingerprint, the same on all servers.
        protocol: What is measured, and how.
    """

    model: str
    fingerprint: str
    protocol: EvaluationProtocol


@dataclass(frozen=True)
class EvaluationProgress:
    """How far an evaluation is.

    Attributes:
        done: Samples that have their results.
        failed: Those of them that failed.
        expected: How many there will be, if it is known.
        rate: Samples a second, lately; 0 before the second.
        remaining: Estimate of the seconds left, if it can be told.
    """

    done: int
    failed: int
    expected: int | None
    rate: float
    remaining: float | None
