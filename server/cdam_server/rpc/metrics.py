"""Metrics and their messages: one table for both ways."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from cdam.v1 import evaluation_pb2
from cdam_engine.evaluation import (
    METRICS,
    Anchor,
    BoxSensitivity,
    ClassDiscrimination,
    Compactness,
    Counterfactual,
    Fidelity,
    InsertionDeletion,
    Localisation,
    MaskAgreement,
    Metric,
    Randomisation,
    Sparseness,
)
from cdam_server.errors import InvalidArgumentError
from cdam_server.rpc.parameters import Parameter, Parameters, decoded, encoded, number, part, within, word

ANCHORS: Final = {
    Anchor.RANDOM: evaluation_pb2.ANCHOR_RANDOM,
    Anchor.MASK: evaluation_pb2.ANCHOR_MASK,
    Anchor.INVERTED_MASK: evaluation_pb2.ANCHOR_INVERTED_MASK,
}
"""What an evaluation compares beside methods."""

_MAX_BOX_SIZES: Final = 64
_UNIT: Final = word(
    "a unit",
    pixel=evaluation_pb2.PERTURBATION_UNIT_PIXEL,
    patch=evaluation_pb2.PERTURBATION_UNIT_PATCH,
)
_ENLARGEMENT: Final = word(
    "an enlargement",
    bilinear=evaluation_pb2.ENLARGEMENT_BILINEAR,
    nearest=evaluation_pb2.ENLARGEMENT_NEAREST,
)
_NORMALISATION: Final = word(
    "a normalisation",
    max=evaluation_pb2.MAP_NORMALISATION_MAX,
    min_max=evaluation_pb2.MAP_NORMALISATION_MIN_MAX,
)
_BLUR_SIGMA: Final = within(0.01, 1000.0)  # beyond these a Gaussian's taps are not told apart from none, or from a mean
_LEVEL: Final = number("greater than 0 and at most 1", lambda value: 0 < value <= 1)


def _read_sizes(sizes: Sequence[int], field: str, _most: int) -> tuple[int, ...]:
    if len(sizes) > _MAX_BOX_SIZES:
        raise InvalidArgumentError(field, f"{len(sizes)} sizes; at most {_MAX_BOX_SIZES} are allowed")
    if any(size < 1 for size in sizes) or list(sizes) != sorted(set(sizes)):
        raise InvalidArgumentError(field, "must be at least 1, distinct, and in ascending order")
    return tuple(sizes)


_FIDELITY: Final[Parameters] = {
    "unit": _UNIT,
    "enlargement": _ENLARGEMENT,
    "blur_sigma": _BLUR_SIGMA,
    "points": within(2, 1001),
}
_BOX_SENSITIVITY: Final[Parameters] = {
    "box_sizes": Parameter(_read_sizes),
    "enlargement": _ENLARGEMENT,
    "blur_sigma": _BLUR_SIGMA,
    "boxes": within(2, 10_000),
}
PARAMETERS: Final[Mapping[type[Metric], Parameters]] = {
    Fidelity: _FIDELITY,
    BoxSensitivity: _BOX_SENSITIVITY,
    ClassDiscrimination: {
        "fidelity": part(Fidelity, _FIDELITY),
        "box_sensitivity": part(BoxSensitivity, _BOX_SENSITIVITY),
    },
    Compactness: {
        "threshold": number("from 0 to less than 1", lambda value: 0 <= value < 1),
        "absolute": Parameter(),
    },
    MaskAgreement: {"enlargement": _ENLARGEMENT},
    Localisation: {
        "enlargement": _ENLARGEMENT,
        "points": within(1, 1000),
        "normalisation": _NORMALISATION,
        "threshold": _LEVEL,
        "iou": _LEVEL,
        "all_components": Parameter(),
    },
    InsertionDeletion: {
        "unit": _UNIT,
        "enlargement": _ENLARGEMENT,
        "blur_sigma": _BLUR_SIGMA,
        "steps": within(1, 10_000),
    },  # its activation is the model's
    Sparseness: {},
    Randomisation: {"absolute": Parameter()},
    Counterfactual: {},
}
"""What the API says of every metric, by its class; a metric without an entry can't be served."""


def decode_metric(metric: evaluation_pb2.Metric, field: str) -> Metric:
    """The metric.

    Args:
        metric: The message.
        field: Its path from the request's root, for errors.

    Raises:
        InvalidArgumentError: It is none, or a parameter is out of bounds.
    """
    kind = metric.WhichOneof("kind")
    if kind is None:
        raise InvalidArgumentError(field, "is empty: set the kind of metric")
    form = METRICS[kind]
    return decoded(form, PARAMETERS[form], getattr(metric, kind), f"{field}.{kind}")


def encode_metric(metric: Metric) -> evaluation_pb2.Metric:
    """The message of a metric."""
    said: dict[str, Any] = {metric.kind: encoded(PARAMETERS[type(metric)], metric)}
    return evaluation_pb2.Metric(**said)
