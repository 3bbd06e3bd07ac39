"""What to measure of explanations: one frozen class for each metric of the API, with the API's names and defaults."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import ClassVar, Literal, TypeAlias, cast, get_args

from cdam._methods import Method, MethodKind, MethodLike, as_method
from cdam.statistics import CORRELATION, PEAK

MetricKind: TypeAlias = Literal[
    "fidelity",
    "box_sensitivity",
    "class_discrimination",
    "compactness",
    "mask_agreement",
    "insertion_deletion",
    "sparseness",
    "randomisation",
    "counterfactual",
    "localisation",
]
"""A metric's name."""

Better: TypeAlias = Literal["higher", "lower"]
"""Which values of a quantity are better."""

PerturbationUnit: TypeAlias = Literal["pixel", "patch"]
"""What is ranked and perturbed."""

Enlargement: TypeAlias = Literal["bilinear", "nearest"]
"""How a map over the patch grid becomes one over the input's pixels."""

Normalisation: TypeAlias = Literal["max", "min_max"]
"""How a map is scaled before it is thresholded: by its largest score, or from its least to its largest."""

AnchorName: TypeAlias = Literal["random", "mask", "inverted_mask"]


class Anchor(Enum):
    """A map that is no explanation, to see what a metric can tell."""

    RANDOM = "random"
    """Independent random scores."""
    MASK = "mask"
    """The sample's mask."""
    INVERTED_MASK = "inverted_mask"
    """The sample's mask, inverted."""

    @property
    def kind(self) -> str:
        """Its name, as of a method."""
        return self.value


class _Metric:
    """What all metrics have in common.

    Attributes:
        kind: The metric's name.
        quantities: What it measures of each sample, and which values are better; None: neither.
        requires: The optional fields of a sample that must be there.
    """

    kind: ClassVar[MetricKind]
    quantities: ClassVar[Mapping[str, Better | None]]
    requires: ClassVar[tuple[str, ...]] = ()


def _quantities(**better: Better | None) -> Mapping[str, Better | None]:
    return MappingProxyType(better)


@dataclass(frozen=True)
class Fidelity(_Metric):
    """The target's value as more and more of the image is blurred, most (MIF) or least (LIF) important parts first.

    Attributes:
        unit: What is ranked; None: pixels.
        blur_sigma: Of the Gaussian blur, in pixels at an input of 224 x 224, scaled with the input's size; None: 14.
        points: Points on a curve between 0 and 100 %, both included; None: 11.
        enlargement: How the map is enlarged, where pixels are ranked; None: bilinear.
    """

    kind: ClassVar[MetricKind] = "fidelity"
    quantities: ClassVar[Mapping[str, Better | None]] = _quantities(
        a_mif="lower", a_lif="higher", a_lif_mif="higher", mean_mif="lower", mean_lif="higher"
    )
    unit: PerturbationUnit | None = None
    blur_sigma: float | None = None
    points: int | None = None
    enlargement: Enlargement | None = None


@dataclass(frozen=True)
class BoxSensitivity(_Metric):
    """Pearson's correlation, over random square boxes, of the scores' sum and the target's drop when the box is blurred.

    Attributes:
        box_sizes: Sides in pixels of the model's input; empty: 1/8, 2/8, 3/8 and 4/8 of its shorter side.
        boxes: Boxes of each size; None: 100.
        blur_sigma: As for `Fidelity`.
        enlargement: As for `Fidelity`.
    """

    kind: ClassVar[MetricKind] = "box_sensitivity"
    quantities: ClassVar[Mapping[str, Better | None]] = _quantities(box_mean="higher", box_area="higher")
    box_sizes: tuple[int, ...] = ()
    boxes: int | None = None
    blur_sigma: float | None = None
    enlargement: Enlargement | None = None


@dataclass(frozen=True)
class ClassDiscrimination(_Metric):
    """Fidelity and box sensitivity of the right target's map minus those of the wrong one's, both on the right target.

    Attributes:
        fidelity: The fidelity that is compared.
        box_sensitivity: The box sensitivity that is compared.
    """

    kind: ClassVar[MetricKind] = "class_discrimination"
    quantities: ClassVar[Mapping[str, Better | None]] = _quantities(
        delta_a_mif="lower",
        delta_a_lif="higher",
        delta_a_lif_mif="higher",
        delta_box_mean="higher",
        delta_box_area="higher",
    )
    requires: ClassVar[tuple[str, ...]] = ("wrong_target",)
    fidelity: Fidelity = field(default_factory=Fidelity)
    box_sensitivity: BoxSensitivity = field(default_factory=BoxSensitivity)


@dataclass(frozen=True)
class Compactness(_Metric):
    """The share of patches whose score is at most a small fraction of the largest.

    Attributes:
        threshold: The fraction of the largest score; None: 0.05.
        absolute: Whether absolute values are taken first; else negative scores count as small.
    """

    kind: ClassVar[MetricKind] = "compactness"
    quantities: ClassVar[Mapping[str, Better | None]] = _quantities(compactness="higher")
    threshold: float | None = None
    absolute: bool = False


@dataclass(frozen=True)
class MaskAgreement(_Metric):
    """Whether the map lies on the object.

    Attributes:
        enlargement: How the map is enlarged, but for the IoU of patches; None: bilinear.
    """

    kind: ClassVar[MetricKind] = "mask_agreement"
    quantities: ClassVar[Mapping[str, Better | None]] = _quantities(
        energy="higher", pointing_game="higher", auroc="higher", patch_iou="higher"
    )
    requires: ClassVar[tuple[str, ...]] = ("mask",)
    enlargement: Enlargement | None = None


@dataclass(frozen=True)
class Localisation(_Metric):
    """Whether a box drawn from the map finds the object, and whether the scores find its pixels.

    In the table also ``max_box_acc``, the largest share of samples whose box is right at one and the same level: MaxBoxAcc of
    Choe et al. (CVPR 2020).

    Attributes:
        normalisation: How the map is scaled; None: by its largest score.
        threshold: The level of ``corloc`` and ``box_iou``; None: 0.2.
        iou: From which intersection over union with a box of the mask on a box is right; None: 0.5.
        points: Levels of the curve of ``box_acc``; None: 100.
        all_components: Whether the boxes of all connected components are tried and the best counts, else the largest one's.
        enlargement: How the map is enlarged; None: bilinear.
    """

    kind: ClassVar[MetricKind] = "localisation"
    quantities: ClassVar[Mapping[str, Better | None]] = _quantities(
        box_acc="higher", corloc="higher", box_iou="higher", pixel_ap="higher"
    )
    requires: ClassVar[tuple[str, ...]] = ("mask",)
    normalisation: Normalisation | None = None
    threshold: float | None = None
    iou: float | None = None
    points: int | None = None
    all_components: bool = False
    enlargement: Enlargement | None = None


@dataclass(frozen=True)
class InsertionDeletion(_Metric):
    """The target's probability as the most important parts are put into a blurred image, or deleted.

    Attributes:
        unit: As for `Fidelity`.
        steps: Steps from nothing to all; None: one for each patch.
        blur_sigma: Of the image that insertion starts from, as for `Fidelity`; None: 5.
        enlargement: As for `Fidelity`.
    """

    kind: ClassVar[MetricKind] = "insertion_deletion"
    quantities: ClassVar[Mapping[str, Better | None]] = _quantities(
        insertion="higher", deletion="lower", insertion_deletion="higher"
    )
    unit: PerturbationUnit | None = None
    steps: int | None = None
    blur_sigma: float | None = None
    enlargement: Enlargement | None = None


@dataclass(frozen=True)
class Sparseness(_Metric):
    """Gini index of the absolute scores."""

    kind: ClassVar[MetricKind] = "sparseness"
    quantities: ClassVar[Mapping[str, Better | None]] = _quantities(gini="higher")


@dataclass(frozen=True)
class Randomisation(_Metric):
    """Spearman's correlation with the map of the model whose weights are drawn anew; nearer 0 is better.

    Attributes:
        absolute: Whether absolute values are taken first.
    """

    kind: ClassVar[MetricKind] = "randomisation"
    quantities: ClassVar[Mapping[str, Better | None]] = _quantities(
        randomisation_mean="lower", randomisation_all="lower"
    )
    absolute: bool = False


@dataclass(frozen=True)
class Counterfactual(_Metric):
    """The target's true change when the object is not there, against the change that the map tells."""

    kind: ClassVar[MetricKind] = "counterfactual"
    quantities: ClassVar[Mapping[str, Better | None]] = _quantities(
        true_change=None, map_change=None, sign_agreement="higher"
    )
    requires: ClassVar[tuple[str, ...]] = ("counterfactual",)


Metric: TypeAlias = (
    Fidelity
    | BoxSensitivity
    | ClassDiscrimination
    | Compactness
    | MaskAgreement
    | InsertionDeletion
    | Sparseness
    | Randomisation
    | Counterfactual
    | Localisation
)
MetricLike: TypeAlias = MetricKind | Metric
"""A metric, or the name of one with its defaults."""

Evaluated: TypeAlias = Method | Anchor
"""What an evaluation compares."""
EvaluatedLike: TypeAlias = MethodKind | AnchorName | Evaluated
"""A method or an anchor, or the name of one."""

METRICS: dict[str, type[Metric]] = {metric.kind: metric for metric in get_args(Metric)}
"""Every metric, by name."""

BETTER: Mapping[str, Better | None] = MappingProxyType(
    {name: better for metric in METRICS.values() for name, better in metric.quantities.items()}
    | {CORRELATION: "higher", PEAK: "higher"}
)
"""Which values of a quantity are better, of every quantity of a table; None: neither."""

_ANCHORS = {anchor.value: anchor for anchor in Anchor}


def as_metrics(metrics: MetricLike | Sequence[MetricLike]) -> tuple[Metric, ...]:
    """The metrics that are meant, of one or several."""
    if isinstance(metrics, str | Metric):
        return (_as_metric(metrics),)
    return tuple(_as_metric(metric) for metric in metrics)


def as_evaluated(methods: EvaluatedLike | Sequence[EvaluatedLike]) -> tuple[Evaluated, ...]:
    """The methods and anchors that are meant, of one or several."""
    if isinstance(methods, str | Evaluated):
        return (_as_evaluated(methods),)
    return tuple(_as_evaluated(method) for method in methods)


def _as_metric(metric: MetricLike) -> Metric:
    if isinstance(metric, Metric):
        return metric
    if not isinstance(metric, str):
        raise TypeError(f"a metric is one of cdam's classes or a name, not {type(metric).__name__}")
    if metric not in METRICS:
        raise ValueError(f"no metric {metric!r}; there are {', '.join(METRICS)}")
    return METRICS[metric]()


def _as_evaluated(method: EvaluatedLike) -> Evaluated:
    if isinstance(method, Anchor):
        return method
    if isinstance(method, str) and method in _ANCHORS:
        return _ANCHORS[method]
    return as_method(cast("MethodLike", method))
