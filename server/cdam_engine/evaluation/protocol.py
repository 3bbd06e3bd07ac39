"""What is measured, and how: every choice of every metric, the papers' as defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, Final, Literal, get_args

from cdam_engine.methods.base import Method, at_least_one, check_seed
from cdam_engine.methods.prediction import Activation

Unit = Literal["pixel", "patch"]
"""What is ranked and perturbed."""

Enlargement = Literal["bilinear", "nearest"]
"""How a map over the patch grid becomes one over the input's pixels."""


Normalisation = Literal["max", "min_max"]
"""How a map is scaled before it is thresholded: by its largest score, so that 0 stays 0; or from its least, which becomes 0."""


class Anchor(Enum):
    """A map that is no explanation, for scale."""

    RANDOM = "random"
    """Independent standard normal scores."""
    MASK = "mask"
    """The share of each patch that the target's object covers."""
    INVERTED_MASK = "inverted_mask"
    """The share that it does not."""


Evaluated = Method | Anchor
"""What an evaluation compares."""


class Metric:
    """A metric; its fields are its protocol.

    Attributes:
        kind: Its name.
        quantities: What it measures of a sample.
    """

    kind: ClassVar[str]
    quantities: ClassVar[tuple[str, ...]]


@dataclass(frozen=True)
class Fidelity(Metric):
    """The target's value f as more and more of the image is blurred, most (MIF) or least (LIF) important first.

    Source: Brocki, Binda and Chung (TMLR 2024), correctness; after Samek et al. (2017).

    Attributes:
        unit: What is ranked: pixels, by the enlarged map, or whole patches. Equal scores keep raster order, both ways.
        blur_sigma: Of the Gaussian blur, in pixels at an input of 224 x 224; scaled by sqrt(H W) / 224.
        points: Points of a curve, at 0 to 100 % in equal steps.
        enlargement: Of the map, where pixels are ranked.
    """

    unit: Unit = "pixel"
    blur_sigma: float = 14.0
    points: int = 11
    enlargement: Enlargement = "bilinear"

    kind: ClassVar[str] = "fidelity"
    quantities: ClassVar[tuple[str, ...]] = ("a_mif", "a_lif", "a_lif_mif", "mean_mif", "mean_lif")

    def __post_init__(self) -> None:
        _one_of("unit", self.unit, get_args(Unit))
        _one_of("enlargement", self.enlargement, get_args(Enlargement))
        _positive("blur_sigma", self.blur_sigma)
        if self.points < 2:
            raise ValueError(f"points: {self.points}, but a curve has 2 at least")


@dataclass(frozen=True)
class BoxSensitivity(Metric):
    """Pearson's r, over random square boxes, of the scores' sum in a box and f's drop when the box is blurred.

    Source: Brocki, Binda and Chung (TMLR 2024), correctness; after sensitivity-n (Ancona et al. 2018). The boxes of a
    sample are the same for every method and target. Of sums that do not vary, or values of f that vary by no more than
    rounding (a hundred-thousandth), r is 0.

    Attributes:
        box_sizes: Sides in pixels of the model's input; empty: 1/8, 2/8, 3/8 and 4/8 of its shorter side, rounded.
        boxes: Boxes of each size.
        blur_sigma: As for `Fidelity`.
        enlargement: Of the map.
    """

    box_sizes: tuple[int, ...] = ()
    boxes: int = 100
    blur_sigma: float = 14.0
    enlargement: Enlargement = "bilinear"

    kind: ClassVar[str] = "box_sensitivity"
    quantities: ClassVar[tuple[str, ...]] = ("box_mean", "box_area")

    def __post_init__(self) -> None:
        _one_of("enlargement", self.enlargement, get_args(Enlargement))
        _positive("blur_sigma", self.blur_sigma)
        if self.boxes < 2:
            raise ValueError(f"boxes: {self.boxes}, but a correlation needs 2 at least")
        if any(size < 1 for size in self.box_sizes) or list(self.box_sizes) != sorted(set(self.box_sizes)):
            raise ValueError(f"box_sizes: {self.box_sizes}, but sides are at least 1, distinct, and in ascending order")

    def sizes(self, input_size: tuple[int, int]) -> tuple[int, ...]:
        """The sides in pixels, at an input of (height, width).

        Raises:
            ValueError: A box does not fit into the input.
        """
        shorter = min(input_size)
        sizes = self.box_sizes or tuple(dict.fromkeys(max(1, round(shorter * k / 8)) for k in (1, 2, 3, 4)))
        if sizes[-1] > shorter:
            raise ValueError(f"box_sizes: {sizes[-1]}, but the input's shorter side has {shorter} pixels")
        return sizes


@dataclass(frozen=True)
class ClassDiscrimination(Metric):
    """Fidelity and box sensitivity of the map for the right target minus those of the map for the wrong one.

    Both are measured on the right target. Source: Brocki, Binda and Chung (TMLR 2024), class sensitivity.

    Attributes:
        fidelity: The fidelity that is compared.
        box_sensitivity: The box sensitivity that is compared.
    """

    fidelity: Fidelity = field(default_factory=Fidelity)
    box_sensitivity: BoxSensitivity = field(default_factory=BoxSensitivity)

    kind: ClassVar[str] = "class_discrimination"
    quantities: ClassVar[tuple[str, ...]] = (
        "delta_a_mif",
        "delta_a_lif",
        "delta_a_lif_mif",
        "delta_box_mean",
        "delta_box_area",
    )


@dataclass(frozen=True)
class Compactness(Metric):
    """The share of patches whose score is at most a small fraction of the largest; 0 if no score is positive.

    Source: Brocki, Binda and Chung (TMLR 2024), compactness; one minus effective complexity (Nguyen and Martinez 2020).

    Attributes:
        threshold: The fraction of the largest score.
        absolute: Whether absolute values are taken first; else negative scores count as small.
    """

    threshold: float = 0.05
    absolute: bool = False

    kind: ClassVar[str] = "compactness"
    quantities: ClassVar[tuple[str, ...]] = ("compactness",)

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold: {self.threshold}, but a fraction is from 0 to less than 1")


@dataclass(frozen=True)
class MaskAgreement(Metric):
    """Whether the map lies on the object.

    Sources: energy, Wang et al. (Score-CAM, 2020); pointing game, Zhang et al. (2016), without tolerance.

    Attributes:
        enlargement: Of the map, but for the IoU of patches.
    """

    enlargement: Enlargement = "bilinear"

    kind: ClassVar[str] = "mask_agreement"
    quantities: ClassVar[tuple[str, ...]] = ("energy", "pointing_game", "auroc", "patch_iou")

    def __post_init__(self) -> None:
        _one_of("enlargement", self.enlargement, get_args(Enlargement))


@dataclass(frozen=True)
class Localisation(Metric):
    """Whether a box drawn from the map finds the object, and whether the scores find its pixels.

    The map is enlarged and normalised, image by image. A box is the tightest one around the largest connected component
    (8-connectivity) of the pixels that are at least some level. The mask is of a class, not of an object: the tightest box
    around each of its components is the truth, and the one that fits best counts, so that one of several objects is enough.

    - ``box_acc``: the share of levels from 0 to 1 at which the box is right, its IoU at least `iou`; with whether it is by
      level, the curve. Over samples the curve's mean is BoxAcc of Choe et al. (CVPR 2020), and its maximum, of
      the table alone, their MaxBoxAcc.
    - ``corloc``: 1 if the box at the level `threshold` is right, else 0 (correct localisation, Deselaers et al. 2012);
      ``box_iou``: its IoU. The default is the level of Zhou et al. (CAM, 2016).
    - ``pixel_ap``: average precision of the scores as a classifier of the pixels, of each sample by itself. PxAP of Choe et
      al. pools the pixels of all samples, so that scores are compared between images and large objects count more.

    Where there is no box nothing is right, and the IoU is 0: normalised by its maximum, a map without a positive score has
    none at any level; from its minimum, a constant map has that of the whole image at level 0 alone.

    Attributes:
        normalisation: ``max``, S / max S, after Zhou et al.: what speaks against the target, or not at all, is never inside
            above level 0. ``min_max``, (S - min S) / (max S - min S), as Choe et al. do: for maps without a sign.
        threshold: The level of ``corloc`` and ``box_iou``.
        iou: From which IoU on a box is right.
        points: Levels of the curve: k / points for k = 0 to points - 1.
        all_components: Whether the boxes of all components are tried and the best counts (MaxBoxAccV2 of Choe et al.,
            TPAMI 2022), else the largest one's.
        enlargement: Of the map.
    """

    normalisation: Normalisation = "max"
    threshold: float = 0.2
    iou: float = 0.5
    points: int = 100
    all_components: bool = False
    enlargement: Enlargement = "bilinear"

    kind: ClassVar[str] = "localisation"
    quantities: ClassVar[tuple[str, ...]] = ("box_acc", "corloc", "box_iou", "pixel_ap")

    def __post_init__(self) -> None:
        _one_of("normalisation", self.normalisation, get_args(Normalisation))
        _one_of("enlargement", self.enlargement, get_args(Enlargement))
        for name in ("threshold", "iou"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)}, but it is greater than 0, and at most 1")
        at_least_one("points", self.points)


@dataclass(frozen=True)
class InsertionDeletion(Metric):
    """The target's probability as the most important parts are inserted into a blurred image, or deleted.

    Source: Petsiuk, Das and Saenko (RISE, 2018).

    Attributes:
        unit: As for `Fidelity`.
        steps: Steps from nothing to all; None: one for each patch.
        blur_sigma: Of the image that insertion starts from, as for `Fidelity`.
        enlargement: As for `Fidelity`.
        activation: Makes probabilities of the outputs; of targets that are no outputs the values are taken as they are.
    """

    unit: Unit = "pixel"
    steps: int | None = None
    blur_sigma: float = 5.0
    enlargement: Enlargement = "bilinear"
    activation: Activation = "softmax"

    kind: ClassVar[str] = "insertion_deletion"
    quantities: ClassVar[tuple[str, ...]] = ("insertion", "deletion", "insertion_deletion")

    def __post_init__(self) -> None:
        _one_of("unit", self.unit, get_args(Unit))
        _one_of("enlargement", self.enlargement, get_args(Enlargement))
        _one_of("activation", self.activation, get_args(Activation))
        _positive("blur_sigma", self.blur_sigma)
        if self.steps is not None:
            at_least_one("steps", self.steps)


@dataclass(frozen=True)
class Sparseness(Metric):
    """Gini index of the absolute scores; 0 if all are zero. Source: Chalasani et al. (2020)."""

    kind: ClassVar[str] = "sparseness"
    quantities: ClassVar[tuple[str, ...]] = ("gini",)


@dataclass(frozen=True)
class Randomisation(Metric):
    """Spearman's rank correlation with the map of the model whose weights are drawn anew, from the head down.

    Source: Adebayo et al. (2018), cascading randomisation. Every weight tensor is drawn from the normal distribution of
    its own mean and standard deviation, so that signals keep their size. A map that stays the same explains no model.

    Attributes:
        absolute: Whether absolute values are taken first.
    """

    absolute: bool = False

    kind: ClassVar[str] = "randomisation"
    quantities: ClassVar[tuple[str, ...]] = ("randomisation_mean", "randomisation_all")


@dataclass(frozen=True)
class Counterfactual(Metric):
    """f's true change when the object is not there, against the sum of the scores where the two images differ."""

    kind: ClassVar[str] = "counterfactual"
    quantities: ClassVar[tuple[str, ...]] = ("true_change", "map_change", "sign_agreement")


METRICS: Final[dict[str, type[Metric]]] = {
    metric.kind: metric
    for metric in (
        Fidelity,
        BoxSensitivity,
        ClassDiscrimination,
        Compactness,
        MaskAgreement,
        InsertionDeletion,
        Sparseness,
        Randomisation,
        Counterfactual,
        Localisation,
    )
}
"""Every metric by its name; each can be made without parameters."""


@dataclass(frozen=True)
class Protocol:
    """What is compared on what.

    Attributes:
        methods: Methods, and anchors to see what a metric can tell; at least one.
        metrics: At least one.
        seed: With a sample's id it fixes every draw, whatever the order of the samples.
    """

    methods: tuple[Evaluated, ...]
    metrics: tuple[Metric, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one("methods", len(self.methods))
        at_least_one("metrics", len(self.metrics))
        check_seed(self.seed)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: {value!r}, but it is one of {', '.join(known)}")


def _positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: {value}, but it is finite and greater than 0")
