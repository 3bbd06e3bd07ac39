"""From the messages of an evaluation to the use case's words; every complaint names the field."""

import unicodedata
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any, Final

from PIL import Image

from cdam.v1 import common_pb2, evaluation_pb2
from cdam_engine import TopK
from cdam_engine.evaluation import (
    Anchor,
    BoxSensitivity,
    ClassDiscrimination,
    Compactness,
    Counterfactual,
    Enlargement,
    Evaluated,
    Fidelity,
    InsertionDeletion,
    Localisation,
    MaskAgreement,
    Metric,
    Normalisation,
    Protocol,
    Randomisation,
    Sparseness,
    Unit,
)
from cdam_server.errors import InvalidArgumentError
from cdam_server.evaluate import Plan, SampleOrder
from cdam_server.resolve import WantedScalar
from cdam_server.rpc.decode import Limits, check_name, decode_method, decode_target, input_size, resize
from cdam_server.rpc.images import ImageLimits, decode_image, decode_mask

_MAX_METHODS = 32
_MAX_METRICS = 32
_MAX_POINTS = 1001
_MAX_LEVELS = 1000
_MAX_BOXES = 10_000
_MAX_BOX_SIZES = 64
_MAX_STEPS = 10_000
_MAX_RESAMPLES = 10_000
_RESAMPLES = 1000
_MAX_SAMPLE_ID = 256
_BLUR_SIGMA = (0.01, 1000.0)  # beyond these a Gaussian's taps are not told apart from none, or from a mean
_ANCHOR: Mapping[int, Anchor] = {
    evaluation_pb2.ANCHOR_RANDOM: Anchor.RANDOM,
    evaluation_pb2.ANCHOR_MASK: Anchor.MASK,
    evaluation_pb2.ANCHOR_INVERTED_MASK: Anchor.INVERTED_MASK,
}
_UNIT: Mapping[int, Unit] = {
    evaluation_pb2.PERTURBATION_UNIT_PIXEL: "pixel",
    evaluation_pb2.PERTURBATION_UNIT_PATCH: "patch",
}
_NORMALISATION: Mapping[int, Normalisation] = {
    evaluation_pb2.MAP_NORMALISATION_MAX: "max",
    evaluation_pb2.MAP_NORMALISATION_MIN_MAX: "min_max",
}
_ENLARGEMENT: Mapping[int, Enlargement] = {
    evaluation_pb2.ENLARGEMENT_BILINEAR: "bilinear",
    evaluation_pb2.ENLARGEMENT_NEAREST: "nearest",
}


def plan(protocol: evaluation_pb2.EvaluationProtocol, limits: Limits, caller: str) -> Plan:
    """What is to be measured.

    Args:
        protocol: What the first message says.
        limits: Limits of a request.
        caller: Who asks.

    Raises:
        InvalidArgumentError: A field is missing or wrong.
    """
    check_name(protocol.model, "protocol.model")
    for name, count, most in (
        ("methods", len(protocol.methods), _MAX_METHODS),
        ("metrics", len(protocol.metrics), _MAX_METRICS),
    ):
        if not 1 <= count <= most:
            raise InvalidArgumentError(f"protocol.{name}", f"{count} {name}; from 1 to {most} are allowed")
    methods = tuple(
        _evaluated(item, f"protocol.methods[{i}]", limits.max_samples) for i, item in enumerate(protocol.methods)
    )
    metrics = tuple(_metric(item, f"protocol.metrics[{i}]") for i, item in enumerate(protocol.metrics))
    resamples = protocol.bootstrap_resamples if protocol.HasField("bootstrap_resamples") else _RESAMPLES
    if resamples > _MAX_RESAMPLES:
        raise InvalidArgumentError("protocol.bootstrap_resamples", f"is {resamples}; at most {_MAX_RESAMPLES}")
    return Plan(
        model=protocol.model,
        protocol=Protocol(methods, metrics, protocol.seed),
        resize=resize(protocol.preprocessing, "protocol.preprocessing"),
        input_size=input_size(protocol.preprocessing),
        resamples=resamples,
        caller=caller,
    )


async def samples(
    requests: AsyncIterator[evaluation_pb2.EvaluateRequest],
) -> AsyncIterator[evaluation_pb2.EvaluationSample]:
    """The samples of a stream, behind the protocol.

    Raises:
        InvalidArgumentError: Something else came.
    """
    async for request in requests:
        match request.WhichOneof("payload"):
            case "sample":
                yield request.sample
            case "protocol":
                raise InvalidArgumentError("protocol", "is for the first message alone")
            case _:
                raise InvalidArgumentError("payload", "is empty: set sample")


def sample(message: evaluation_pb2.EvaluationSample, limits: Limits) -> SampleOrder:
    """A sample; its images are decoded only when it is measured.

    Raises:
        InvalidArgumentError: A field is missing or wrong.
    """
    sample_id = message.sample_id
    # Not isprintable: file names have spaces of all kinds, and joined emoji.
    if len(sample_id) > _MAX_SAMPLE_ID or any(unicodedata.category(letter) == "Cc" for letter in sample_id):
        reason = f"must be at most {_MAX_SAMPLE_ID} characters, none of them a control character"
        raise InvalidArgumentError("sample.sample_id", reason)
    for name in ("image", "target"):
        if not message.HasField(name):
            raise InvalidArgumentError(f"sample.{name}", "is required")
    return SampleOrder(
        id=sample_id,
        open_image=partial(decode_image, message.image, limits.image),
        target=_target(message, "target"),
        wrong_target=_target(message, "wrong_target") if message.HasField("wrong_target") else None,
        open_mask=_opener(message, "mask", decode_mask, limits.image),
        open_counterfactual=_opener(message, "counterfactual", decode_image, limits.image),
        open_wrong_mask=_opener(message, "wrong_mask", decode_mask, limits.image),
    )


def _opener(
    message: Any, name: str, decode: Callable[[common_pb2.Image, ImageLimits, str], Image.Image], limits: ImageLimits
) -> Callable[[], Image.Image] | None:
    return partial(decode, getattr(message, name), limits, name) if message.HasField(name) else None


def _target(message: evaluation_pb2.EvaluationSample, name: str) -> WantedScalar:
    target = decode_target(getattr(message, name), f"sample.{name}")
    if isinstance(target, TopK):
        raise InvalidArgumentError(f"sample.{name}.top_k", "has several values; an evaluation is of one")
    return target


def _evaluated(item: evaluation_pb2.EvaluatedMethod, field: str, max_samples: int) -> Evaluated:
    match item.WhichOneof("kind"):
        case "method":
            return decode_method(item.method, f"{field}.method", max_samples)
        case "anchor" if item.anchor in _ANCHOR:
            return _ANCHOR[item.anchor]
        case "anchor":
            raise InvalidArgumentError(f"{field}.anchor", f"{item.anchor} is not an anchor")
        case _:
            raise InvalidArgumentError(field, "is empty: set method or anchor")


# --- metrics


def _metric(metric: evaluation_pb2.Metric, field: str) -> Metric:
    kind = metric.WhichOneof("kind")
    if kind is None:
        raise InvalidArgumentError(field, "is empty: set the kind of metric")
    return _METRICS[kind](getattr(metric, kind), f"{field}.{kind}")


def _fidelity(metric: evaluation_pb2.FidelityMetric, field: str) -> Fidelity:
    said = {**_unit(metric, field), **_enlargement(metric, field), **_blur_sigma(metric, field)}
    return Fidelity(**said, **_number(metric, "points", field, least=2, most=_MAX_POINTS))


def _box_sensitivity(metric: evaluation_pb2.BoxSensitivityMetric, field: str) -> BoxSensitivity:
    sizes = tuple(metric.box_sizes)
    if len(sizes) > _MAX_BOX_SIZES:
        raise InvalidArgumentError(f"{field}.box_sizes", f"{len(sizes)} sizes; at most {_MAX_BOX_SIZES} are allowed")
    if any(size < 1 for size in sizes) or list(sizes) != sorted(set(sizes)):
        raise InvalidArgumentError(f"{field}.box_sizes", "must be at least 1, distinct, and in ascending order")
    said = {**_enlargement(metric, field), **_blur_sigma(metric, field)}
    return BoxSensitivity(box_sizes=sizes, **said, **_number(metric, "boxes", field, least=2, most=_MAX_BOXES))


def _class_discrimination(metric: evaluation_pb2.ClassDiscriminationMetric, field: str) -> ClassDiscrimination:
    return ClassDiscrimination(
        _fidelity(metric.fidelity, f"{field}.fidelity"),
        _box_sensitivity(metric.box_sensitivity, f"{field}.box_sensitivity"),
    )


def _compactness(metric: evaluation_pb2.CompactnessMetric, field: str) -> Compactness:
    if not metric.HasField("threshold"):
        return Compactness(absolute=metric.absolute)
    if not 0 <= metric.threshold < 1:
        raise InvalidArgumentError(f"{field}.threshold", f"must be from 0 to less than 1, not {metric.threshold:g}")
    return Compactness(threshold=metric.threshold, absolute=metric.absolute)


def _mask_agreement(metric: evaluation_pb2.MaskAgreementMetric, field: str) -> MaskAgreement:
    return MaskAgreement(**_enlargement(metric, field))


def _localisation(metric: evaluation_pb2.LocalisationMetric, field: str) -> Localisation:
    said = {**_enlargement(metric, field), **_number(metric, "points", field, least=1, most=_MAX_LEVELS)}
    if metric.normalisation:
        if metric.normalisation not in _NORMALISATION:
            raise InvalidArgumentError(f"{field}.normalisation", f"{metric.normalisation} is not a normalisation")
        said["normalisation"] = _NORMALISATION[metric.normalisation]
    for name in ("threshold", "iou"):
        if metric.HasField(name):
            said[name] = value = getattr(metric, name)
            if not 0 < value <= 1:
                raise InvalidArgumentError(f"{field}.{name}", f"must be greater than 0 and at most 1, not {value:g}")
    return Localisation(all_components=metric.all_components, **said)


def _insertion_deletion(metric: evaluation_pb2.InsertionDeletionMetric, field: str) -> InsertionDeletion:
    said = {**_unit(metric, field), **_enlargement(metric, field), **_blur_sigma(metric, field)}
    return InsertionDeletion(**said, **_number(metric, "steps", field, least=1, most=_MAX_STEPS))


def _sparseness(metric: evaluation_pb2.SparsenessMetric, field: str) -> Sparseness:  # noqa: ARG001 - as all of the table
    return Sparseness()


def _randomisation(metric: evaluation_pb2.RandomisationMetric, field: str) -> Randomisation:  # noqa: ARG001 - likewise
    return Randomisation(absolute=metric.absolute)


def _counterfactual(metric: evaluation_pb2.CounterfactualMetric, field: str) -> Counterfactual:  # noqa: ARG001 - likewise
    return Counterfactual()


# By the names of the API's oneof.
_METRICS: Final[Mapping[str, Callable[[Any, str], Metric]]] = {
    "fidelity": _fidelity,
    "box_sensitivity": _box_sensitivity,
    "class_discrimination": _class_discrimination,
    "compactness": _compactness,
    "mask_agreement": _mask_agreement,
    "localisation": _localisation,
    "insertion_deletion": _insertion_deletion,
    "sparseness": _sparseness,
    "randomisation": _randomisation,
    "counterfactual": _counterfactual,
}


# What is said about a parameter; the rest is left to the engine's defaults.


def _unit(metric: Any, field: str) -> dict[str, Any]:
    if not metric.unit:
        return {}
    if metric.unit not in _UNIT:
        raise InvalidArgumentError(f"{field}.unit", f"{metric.unit} is not a unit")
    return {"unit": _UNIT[metric.unit]}


def _enlargement(metric: Any, field: str) -> dict[str, Any]:
    if not metric.enlargement:
        return {}
    if metric.enlargement not in _ENLARGEMENT:
        raise InvalidArgumentError(f"{field}.enlargement", f"{metric.enlargement} is not an enlargement")
    return {"enlargement": _ENLARGEMENT[metric.enlargement]}


def _blur_sigma(metric: Any, field: str) -> dict[str, Any]:
    if not metric.HasField("blur_sigma"):
        return {}
    least, most = _BLUR_SIGMA
    if not least <= metric.blur_sigma <= most:
        raise InvalidArgumentError(
            f"{field}.blur_sigma", f"must be from {least:g} to {most:g}, not {metric.blur_sigma:g}"
        )
    return {"blur_sigma": metric.blur_sigma}


def _number(metric: Any, name: str, field: str, *, least: int, most: int) -> dict[str, Any]:
    if not metric.HasField(name):
        return {}
    value = getattr(metric, name)
    if not least <= value <= most:
        raise InvalidArgumentError(f"{field}.{name}", f"must be from {least} to {most}, not {value}")
    return {name: value}
