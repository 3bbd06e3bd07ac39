"""Every metric's images and its numbers."""

from __future__ import annotations

from collections.abc import Sequence

from cdam_engine.evaluation.boxes import box_images, box_sensitivity
from cdam_engine.evaluation.curves import fidelity, fidelity_images, insertion_deletion, insertion_deletion_images
from cdam_engine.evaluation.found import Found
from cdam_engine.evaluation.geometry import Geometry
from cdam_engine.evaluation.localisation import localisation
from cdam_engine.evaluation.map_metrics import (
    COUNTERFACTUAL_IMAGES,
    compactness,
    counterfactual,
    mask_agreement,
    sparseness,
)
from cdam_engine.evaluation.perturbation import CLEAN, MapOf, Perturbation, map_of
from cdam_engine.evaluation.protocol import (
    METRICS,
    BoxSensitivity,
    ClassDiscrimination,
    Compactness,
    Counterfactual,
    Evaluated,
    Fidelity,
    InsertionDeletion,
    Localisation,
    MaskAgreement,
    Metric,
    Randomisation,
    Sparseness,
)
from cdam_engine.evaluation.randomisation import randomisation
from cdam_engine.evaluation.subject import Subject


def check(metric: Metric, geometry: Geometry) -> None:
    """Refuse what can't be measured of any sample.

    Raises:
        TypeError: It is no metric.
        ValueError: A box does not fit into the input.
    """
    match metric:
        case BoxSensitivity():
            metric.sizes(geometry.input_size)
        case ClassDiscrimination():
            metric.box_sensitivity.sizes(geometry.input_size)
        case _ if not isinstance(metric, tuple(METRICS.values())):
            raise TypeError(f"a metric is one of cdam_engine's, such as Fidelity(), not {metric!r}")


def images_of_map(metric: Metric, evaluated: Evaluated, geometry: Geometry) -> Sequence[Perturbation]:
    """The images, composed by the scores of a map, that the model is asked about; the same for all samples."""
    right, wrong = (map_of(evaluated, wrong=wrong) for wrong in (False, True))
    match metric:
        case Fidelity():
            curves = [*fidelity_images(metric, geometry, right)]
        case ClassDiscrimination():
            curves = [curve for its in (right, wrong) for curve in fidelity_images(metric.fidelity, geometry, its)]
        case InsertionDeletion():
            curves = [*insertion_deletion_images(metric, geometry, right)]
        case _:
            curves = []
    return [image for images in curves for image in images]


def images_of_sample(metric: Metric, seed: int, sample: str, geometry: Geometry) -> Sequence[Perturbation]:
    """The images that the model is asked about whatever the scores, by the sample's id."""
    match metric:
        case BoxSensitivity():
            return [CLEAN, *box_images(metric, seed, sample, geometry.input_size)]
        case ClassDiscrimination():
            return [CLEAN, *box_images(metric.box_sensitivity, seed, sample, geometry.input_size)]
        case Counterfactual():
            return COUNTERFACTUAL_IMAGES
        case _:
            return ()


def measure(metric: Metric, evaluated: Evaluated, seed: int, subject: Subject) -> dict[str, Found]:
    """What a metric finds, by quantity.

    Args:
        metric: The metric.
        evaluated: Whose map it measures.
        seed: The evaluation's.
        subject: The sample; the model has answered for all its images.

    Raises:
        SampleError: An answer is not finite.
    """
    its = map_of(evaluated, wrong=False)
    match metric:
        case Fidelity():
            found = fidelity(metric, subject, its)
        case BoxSensitivity():
            found = box_sensitivity(metric, seed, subject, its)
        case ClassDiscrimination():
            found = _class_discrimination(metric, evaluated, seed, subject)
        case Compactness():
            found = compactness(metric, subject.maps[its])
        case MaskAgreement():
            found = mask_agreement(metric, subject, its)
        case Localisation():
            found = localisation(metric, subject, its)
        case InsertionDeletion():
            found = insertion_deletion(metric, subject, its)
        case Sparseness():
            found = sparseness(subject.maps[its])
        case Randomisation():
            found = randomisation(metric, subject, its)
        case _:
            found = counterfactual(subject, its)
    return found


def _class_discrimination(
    metric: ClassDiscrimination, evaluated: Evaluated, seed: int, subject: Subject
) -> dict[str, Found]:
    def both(its: MapOf) -> dict[str, Found]:
        return fidelity(metric.fidelity, subject, its) | box_sensitivity(metric.box_sensitivity, seed, subject, its)

    right, wrong = (both(map_of(evaluated, wrong=wrong)) for wrong in (False, True))
    differences = {f"delta_{quantity}": right[quantity].value - wrong[quantity].value for quantity in right}
    return {quantity: Found(differences[quantity]) for quantity in metric.quantities}
