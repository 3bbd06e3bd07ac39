"""From the use case's answers to the messages of an evaluation."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from cdam.statistics import Comparison, Row, Table
from cdam.v1 import common_pb2, evaluation_pb2, method_pb2
from cdam_engine import (
    Attention,
    Cdam,
    IntegratedCdam,
    IntegratedGradients,
    Method,
    Noise,
    SmoothCdam,
    SmoothGrad,
)
from cdam_engine.evaluation import (
    Anchor,
    BoxSensitivity,
    ClassDiscrimination,
    Compactness,
    Counterfactual,
    Evaluated,
    Fidelity,
    InsertionDeletion,
    Localisation,
    MaskAgreement,
    Measured,
    Metric,
    Randomisation,
    Sparseness,
    Value,
)
from cdam_server.evaluate import Evaluation
from cdam_server.rpc.encode import preprocessing, tensor

_ANCHOR = {
    Anchor.RANDOM: evaluation_pb2.ANCHOR_RANDOM,
    Anchor.MASK: evaluation_pb2.ANCHOR_MASK,
    Anchor.INVERTED_MASK: evaluation_pb2.ANCHOR_INVERTED_MASK,
}
_UNIT = {
    "pixel": evaluation_pb2.PERTURBATION_UNIT_PIXEL,
    "patch": evaluation_pb2.PERTURBATION_UNIT_PATCH,
}
_ENLARGEMENT = {
    "bilinear": evaluation_pb2.ENLARGEMENT_BILINEAR,
    "nearest": evaluation_pb2.ENLARGEMENT_NEAREST,
}
_NORMALISATION = {
    "max": evaluation_pb2.MAP_NORMALISATION_MAX,
    "min_max": evaluation_pb2.MAP_NORMALISATION_MIN_MAX,
}
_QUADRATURE = {
    "riemann_right": method_pb2.QUADRATURE_RIEMANN_RIGHT,
    "gauss_legendre": method_pb2.QUADRATURE_GAUSS_LEGENDRE,
}


def started(evaluation: Evaluation, expected_samples: int) -> evaluation_pb2.EvaluateResponse:
    """What the evaluation is of, every choice made.

    Args:
        evaluation: The evaluation.
        expected_samples: As the request says.
    """
    protocol, model = evaluation.protocol, evaluation.model
    message = evaluation_pb2.EvaluationProtocol(
        model=model.name,
        methods=map(_evaluated, protocol.methods),
        metrics=map(_metric, protocol.metrics),
        seed=protocol.seed,
        preprocessing=preprocessing(evaluation.resize, evaluation.input_size),
        expected_samples=expected_samples,
        bootstrap_resamples=evaluation.resamples,
    )
    return evaluation_pb2.EvaluateResponse(
        started=evaluation_pb2.EvaluationStarted(
            model=model.name, model_fingerprint=model.fingerprint, protocol=message
        )
    )


def measured(sample_id: str, answer: Measured) -> evaluation_pb2.EvaluateResponse:
    """All that was measured of a sample."""
    values = evaluation_pb2.MetricValues(values=map(_value, answer.values))
    return evaluation_pb2.EvaluateResponse(result=evaluation_pb2.SampleResult(sample_id=sample_id, measured=values))


def failure(sample_id: str, error: common_pb2.ItemError) -> evaluation_pb2.EvaluateResponse:
    """Why a sample could not be measured."""
    return evaluation_pb2.EvaluateResponse(result=evaluation_pb2.SampleResult(sample_id=sample_id, error=error))


def table(found: Table) -> evaluation_pb2.EvaluateResponse:
    """The final table."""
    message = evaluation_pb2.EvaluationTable(
        rows=map(_row, found.rows),
        comparisons=map(_comparison, found.comparisons),
        samples=found.samples,
        failures=found.failures,
    )
    return evaluation_pb2.EvaluateResponse(table=message)


def _value(item: Value) -> evaluation_pb2.MetricValue:
    return evaluation_pb2.MetricValue(
        method_index=item.method_index,
        metric_index=item.metric_index,
        quantity=item.quantity,
        value=item.value,
        curve=None if item.curve is None else tensor(item.curve),
    )


def _row(row: Row) -> evaluation_pb2.EvaluationRow:
    return evaluation_pb2.EvaluationRow(
        method_index=row.method_index,
        metric_index=row.metric_index,
        quantity=row.quantity,
        mean=row.mean,
        standard_error=row.standard_error,
        interval_low=row.interval_low,
        interval_high=row.interval_high,
        samples=row.samples,
    )


def _comparison(comparison: Comparison) -> evaluation_pb2.EvaluationComparison:
    return evaluation_pb2.EvaluationComparison(
        method_index=comparison.method_index,
        other_method_index=comparison.other_method_index,
        metric_index=comparison.metric_index,
        quantity=comparison.quantity,
        mean_difference=comparison.mean_difference,
        interval_low=comparison.interval_low,
        interval_high=comparison.interval_high,
    )


# --- the protocol


def _evaluated(item: Evaluated) -> evaluation_pb2.EvaluatedMethod:
    if isinstance(item, Anchor):
        return evaluation_pb2.EvaluatedMethod(anchor=_ANCHOR[item])
    return evaluation_pb2.EvaluatedMethod(method=_method(item))


def _method(method: Method) -> method_pb2.Method:
    message = method_pb2.Method()
    settings = getattr(message, method.kind)
    settings.SetInParent()  # though it may have no parameters
    match method:
        case Cdam():
            settings.parts = method.parts
        case SmoothCdam() | SmoothGrad():
            settings.samples, settings.seed = method.samples, method.seed
            settings.noise.CopyFrom(_noise(method.noise))
        case IntegratedCdam() | IntegratedGradients():
            settings.steps, settings.quadrature = method.steps, _QUADRATURE[method.quadrature]
            if isinstance(method, IntegratedCdam) and method.tolerance is not None:
                settings.tolerance = method.tolerance
        case Attention():
            settings.heads.extend(method.heads)
    return message


def _noise(noise: Noise) -> method_pb2.Noise:
    return method_pb2.Noise(relative=noise.level) if noise.relative else method_pb2.Noise(absolute=noise.level)


def _metric(metric: Metric) -> evaluation_pb2.Metric:
    return evaluation_pb2.Metric(**{metric.kind: _METRICS[type(metric)](metric)})


def _fidelity(metric: Fidelity) -> evaluation_pb2.FidelityMetric:
    return evaluation_pb2.FidelityMetric(
        unit=_UNIT[metric.unit],
        blur_sigma=metric.blur_sigma,
        points=metric.points,
        enlargement=_ENLARGEMENT[metric.enlargement],
    )


def _box_sensitivity(metric: BoxSensitivity) -> evaluation_pb2.BoxSensitivityMetric:
    return evaluation_pb2.BoxSensitivityMetric(
        box_sizes=metric.box_sizes,
        boxes=metric.boxes,
        blur_sigma=metric.blur_sigma,
        enlargement=_ENLARGEMENT[metric.enlargement],
    )


def _class_discrimination(metric: ClassDiscrimination) -> evaluation_pb2.ClassDiscriminationMetric:
    return evaluation_pb2.ClassDiscriminationMetric(
        fidelity=_fidelity(metric.fidelity), box_sensitivity=_box_sensitivity(metric.box_sensitivity)
    )


def _compactness(metric: Compactness) -> evaluation_pb2.CompactnessMetric:
    return evaluation_pb2.CompactnessMetric(threshold=metric.threshold, absolute=metric.absolute)


def _mask_agreement(metric: MaskAgreement) -> evaluation_pb2.MaskAgreementMetric:
    return evaluation_pb2.MaskAgreementMetric(enlargement=_ENLARGEMENT[metric.enlargement])


def _localisation(metric: Localisation) -> evaluation_pb2.LocalisationMetric:
    return evaluation_pb2.LocalisationMetric(
        normalisation=_NORMALISATION[metric.normalisation],
        threshold=metric.threshold,
        iou=metric.iou,
        points=metric.points,
        all_components=metric.all_components,
        enlargement=_ENLARGEMENT[metric.enlargement],
    )


def _insertion_deletion(metric: InsertionDeletion) -> evaluation_pb2.InsertionDeletionMetric:
    return evaluation_pb2.InsertionDeletionMetric(
        unit=_UNIT[metric.unit],
        steps=metric.steps,
        blur_sigma=metric.blur_sigma,
        enlargement=_ENLARGEMENT[metric.enlargement],
    )


_METRICS: Final[Mapping[type[Metric], Callable[[Any], Any]]] = {
    Fidelity: _fidelity,
    BoxSensitivity: _box_sensitivity,
    ClassDiscrimination: _class_discrimination,
    Compactness: _compactness,
    MaskAgreement: _mask_agreement,
    Localisation: _localisation,
    InsertionDeletion: _insertion_deletion,
    Sparseness: lambda _: evaluation_pb2.SparsenessMetric(),
    Randomisation: lambda metric: evaluation_pb2.RandomisationMetric(absolute=metric.absolute),
    Counterfactual: lambda _: evaluation_pb2.CounterfactualMetric(),
}
