"""What the metrics' quantities say, and which way is better."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from cdam import BETTER


@dataclass(frozen=True)
class Quantity:
    """One of a metric's quantities.

    Attributes:
        says: What it is, in a line.
        of_truth: Whether a map of the object's mask has to do better than a random one; else it is of the map's form, or
            of the model.
        curve: The title of its curve, if it has one.
        axes: The names of the curve's axes.
        better: ``higher``, ``lower``, or ``nearer 0``; None: neither.
    """

    says: str
    of_truth: bool = True
    curve: str = ""
    axes: tuple[str, str] = ("", "")
    better: str | None = None

    @property
    def arrow(self) -> str:
        """A sign for which way is better."""
        return {"higher": "↑", "lower": "↓", "nearer 0": "→0"}.get(self.better or "", "")

    def best(self, means: Mapping[int, float]) -> int | None:
        """The key of the best mean; None if none is better."""
        orders: dict[str, Callable[[float], float]] = {"higher": float.__neg__, "lower": float, "nearer 0": abs}
        if self.better is None or not means:
            return None
        order = orders[self.better]
        return min(means, key=lambda key: order(means[key]))

    def improves(self, mean: float, difference: float) -> bool:
        """Whether a mean that exceeds another by this is the better one."""
        if self.better == "nearer 0":
            return abs(mean) < abs(mean - difference)
        return (difference > 0) == (self.better == "higher")


@dataclass(frozen=True)
class Described:
    """A metric, for people.

    Attributes:
        title: Its name.
        says: What it asks.
        source: Where it comes from.
    """

    title: str
    says: str
    source: str


_BLURRED: Final = ("blurred, %", "the target's value")
_PROBABILITY: Final = "the target's probability"

METRICS: Final[Mapping[str, Described]] = {
    "fidelity": Described(
        "Fidelity",
        "The target's value as more and more of the image is blurred: the most important first (MIF), and the least "
        "important first (LIF). A true map makes the first fall fast and the second fall late.",
        "Brocki, Binda and Chung (2024), after Samek et al. (2017)",
    ),
    "box_sensitivity": Described(
        "Box sensitivity",
        "Correlation, over random boxes, of the sum of the scores in the box and of how much the target falls when the box is "
        "blurred.",
        "Brocki, Binda and Chung (2024), after Ancona et al. (2018)",
    ),
    "class_discrimination": Described(
        "Class discrimination",
        "What the metrics say of the map for the right target less what they say of the map for a wrong one. A map that is "
        "the same for every target has exactly 0.",
        "Brocki, Binda and Chung (2024)",
    ),
    "compactness": Described(
        "Compactness",
        "The share of patches whose score is next to nothing. It speaks of how a map reads, not of whether it is true.",
        "Brocki, Binda and Chung (2024), after Nguyen and Martinez (2020)",
    ),
    "mask_agreement": Described(
        "Mask agreement",
        "Whether the map lies on the object. The mask itself, as an anchor, shows the best that can be had.",
        "Energy: Wang et al. (2020); pointing game: Zhang et al. (2016)",
    ),
    "localisation": Described(
        "Localisation",
        "Whether the box around the map's largest connected part is the object's: its intersection over union with the box of "
        "a connected part of the mask is large enough. And whether the scores find the object's pixels.",
        "Choe et al. (2020); the fixed level: Zhou et al. (2016)",
    ),
    "insertion_deletion": Described(
        "Insertion and deletion",
        "The target's probability as the most important parts are put into a blurred image, or taken out of the image.",
        "Petsiuk, Das and Saenko (2018)",
    ),
    "sparseness": Described(
        "Sparseness",
        "How few patches hold most of the scores. It speaks of how a map reads, not of whether it is true.",
        "Chalasani et al. (2020)",
    ),
    "randomisation": Described(
        "Randomised weights",
        "Rank correlation with the map of a model whose weights are drawn anew, from the head down. A map that stays the "
        "same does not explain the model. Anchors know no model, and have 1.",
        "Adebayo et al. (2018)",
    ),
    "counterfactual": Described(
        "Counterfactual removal",
        "The target's true change when the object is not there, against the sum of the scores where the image changed.",
        "Exact, where the image without the object is known",
    ),
}

_KNOWN: Final[Mapping[str, Quantity]] = {
    "a_mif": Quantity("area under the curve, most important first", curve="most important first", axes=_BLURRED),
    "a_lif": Quantity("area under the curve, least important first", curve="least important first", axes=_BLURRED),
    "a_lif_mif": Quantity("the area between the two curves"),
    "mean_mif": Quantity("mean of the curve, most important first"),
    "mean_lif": Quantity("mean of the curve, least important first"),
    "box_mean": Quantity("mean of the correlations over the boxes' sizes"),
    "box_area": Quantity(
        "area under the correlations over the boxes' side",
        curve="by the boxes' size",
        axes=("side of the box, % of the input", "Pearson's r"),
    ),
    "delta_a_mif": Quantity("a_mif, right map less wrong map"),
    "delta_a_lif": Quantity("a_lif, right map less wrong map"),
    "delta_a_lif_mif": Quantity("a_lif_mif, right map less wrong map"),
    "delta_box_mean": Quantity("box_mean, right map less wrong map"),
    "delta_box_area": Quantity("box_area, right map less wrong map"),
    "compactness": Quantity("share of patches with a score close to zero", of_truth=False),
    "energy": Quantity("share of the positive scores that lies on the object"),
    "pointing_game": Quantity("how often the highest score lies on the object"),
    "auroc": Quantity("the scores as a classifier of the object's pixels"),
    "patch_iou": Quantity("the object's patches against as many of the highest scored"),
    "box_acc": Quantity(
        "share of the levels at which the box is right",
        curve="right boxes by level",
        axes=("level of the normalised map", "share of samples"),
    ),
    "corloc": Quantity("how often the box at the fixed level is right"),
    "box_iou": Quantity("intersection over union of that box and the object's"),
    "pixel_ap": Quantity("average precision of the scores as a classifier of the object's pixels, sample by sample"),
    "max_box_acc": Quantity("how often the box is right at the one level that is best for all samples"),
    "insertion": Quantity("area under the curve", curve="insertion", axes=("share put in", _PROBABILITY)),
    "deletion": Quantity("area under the curve", curve="deletion", axes=("share taken out", _PROBABILITY)),
    "insertion_deletion": Quantity("insertion less deletion"),
    "gini": Quantity("Gini index of the absolute scores", of_truth=False),
    "randomisation_mean": Quantity(
        "mean of the correlations over the parts",
        of_truth=False,
        curve="from the head down",
        axes=("parts drawn anew", "Spearman's correlation"),
    ),
    "randomisation_all": Quantity("correlation with all weights drawn anew", of_truth=False),
    "true_change": Quantity("how much the target changes; the same for every method", of_truth=False),
    "map_change": Quantity("how much the map says that it changes", of_truth=False),
    "sign_agreement": Quantity("how often the two have the same sign"),
    "change_correlation": Quantity("Pearson's correlation of the two over the samples"),
}
_NEARER: Final = frozenset({"randomisation_mean", "randomisation_all"})  # a correlation below 0 is no better than 0


def quantity(name: str) -> Quantity:
    """What is known of a quantity; a newer server may have one that is not."""
    found = _KNOWN.get(name, Quantity(name, of_truth=False, curve=name))
    return replace(found, better="nearer 0" if name in _NEARER else BETTER.get(name))


def metric(kind: str) -> Described:
    """What is known of a metric."""
    return METRICS.get(kind, Described(kind, "", ""))
