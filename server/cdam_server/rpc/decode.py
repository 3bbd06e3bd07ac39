"""From the API's messages to the use cases' words; every complaint names the field."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from cdam.v1 import common_pb2, explain_pb2, method_pb2, target_pb2
from cdam_engine import (
    Attention,
    AttentionRollout,
    Cdam,
    Concept,
    InputXGradient,
    IntegratedCdam,
    IntegratedGradients,
    Method,
    Noise,
    Output,
    PartialLrp,
    PatchMaskPrediction,
    RelevancePropagation,
    SmoothCdam,
    SmoothGrad,
    TokenAblation,
    TopK,
)
from cdam_engine.methods import Quadrature
from cdam_engine.preprocess import Resize
from cdam_engine.targets import Similarity
from cdam_server.concepts import ConceptId, ConceptName
from cdam_server.errors import InvalidArgumentError
from cdam_server.explain import Command
from cdam_server.images import Picture
from cdam_server.resolve import ConceptSelected, ContrastNamed, OutputNamed, Side, Wanted
from cdam_server.rpc.images import ImageLimits, decode_image

_REQUEST_ID = re.compile(r"[\x20-\x7e]{0,128}")
_CONCEPT_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_METHODS = 16
_MAX_NAME = 256
# Numbers beyond these overflow in float32, where the squares of a thousand of them are summed.
_MAX_NOISE = 1e6
_MAX_VECTOR = 1e15
_RANK = {
    explain_pb2.PRIORITY_UNSPECIFIED: 0,
    explain_pb2.PRIORITY_LOW: 1,
    explain_pb2.PRIORITY_NORMAL: 0,
    explain_pb2.PRIORITY_HIGH: -1,
}
_RESIZE: Mapping[int, Resize] = {
    common_pb2.RESIZE_MODE_UNSPECIFIED: "model",
    common_pb2.RESIZE_MODE_MODEL: "model",
    common_pb2.RESIZE_MODE_SQUASH: "squash",
}
_SIMILARITY: Mapping[int, Similarity] = {
    target_pb2.SIMILARITY_UNSPECIFIED: "dot",
    target_pb2.SIMILARITY_DOT: "dot",
    target_pb2.SIMILARITY_COSINE: "cosine",
    target_pb2.SIMILARITY_L2: "l2",
}
_QUADRATURE: Mapping[int, Quadrature] = {
    method_pb2.QUADRATURE_UNSPECIFIED: "riemann_right",
    method_pb2.QUADRATURE_RIEMANN_RIGHT: "riemann_right",
    method_pb2.QUADRATURE_GAUSS_LEGENDRE: "gauss_legendre",
}


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        image: What its image may weigh.
        max_targets: Largest number of targets.
        max_samples: Largest number of draws, or of points on a path.
        max_concept_images: Most images of a concept.
    """

    image: ImageLimits
    max_targets: int
    max_samples: int
    max_concept_images: int


def explain_command(request: explain_pb2.ExplainRequest, limits: Limits, timeout: float | None, caller: str) -> Command:
    """The command of an Explain request; its image is decoded only when the command is carried out.

    Args:
        request: The request.
        limits: Limits of a request.
        timeout: Seconds that the caller will still wait, or None.
        caller: Who asks.

    Raises:
        InvalidArgumentError: A field is missing or wrong.
    """
    check_name(request.model, "model")
    if not request.HasField("image"):
        raise InvalidArgumentError("image", "is required")
    if request.priority not in _RANK:
        raise InvalidArgumentError("priority", f"{request.priority} is not a priority")
    methods = _methods(request, limits)
    return Command(
        model=request.model,
        picture=Picture(
            open=partial(decode_image, request.image, limits.image),
            resize=resize(request.preprocessing, "preprocessing"),
            timeout=timeout,
            rank=_RANK[request.priority],
            caller=caller,
            bytes=request.ByteSize(),
        ),
        targets=_targets(request, limits, methods),
        methods=methods,
        input_size=input_size(request.preprocessing),
    )


def request_id(request: explain_pb2.ExplainRequest) -> str:
    """The request's id, or one made for it.

    Raises:
        InvalidArgumentError: It is too long, or can't be printed.
    """
    if not _REQUEST_ID.fullmatch(request.request_id):
        raise InvalidArgumentError("request_id", "must be at most 128 printable ASCII characters")
    return request.request_id or uuid4().hex


def check_name(name: str, field: str) -> None:
    """Refuse a name that no error message could carry.

    Raises:
        InvalidArgumentError: It is too long.
    """
    if len(name) > _MAX_NAME:
        raise InvalidArgumentError(field, f"has {len(name)} characters; at most {_MAX_NAME} are allowed")


# --- targets


def _targets(request: explain_pb2.ExplainRequest, limits: Limits, methods: tuple[Method, ...]) -> tuple[Wanted, ...]:
    count = len(request.targets)
    if not count and any(method.needs_target for method in methods):
        raise InvalidArgumentError("targets", "at least one is required, unless all methods do without")
    if count > limits.max_targets:
        raise InvalidArgumentError("targets", f"{count} targets; at most {limits.max_targets} a request")
    return tuple(decode_target(target, f"targets[{position}]") for position, target in enumerate(request.targets))


def decode_target(target: target_pb2.Target, field: str) -> Wanted:
    """The target.

    Args:
        target: The message.
        field: Its path from the request's root, for errors.

    Raises:
        InvalidArgumentError: It is none, or names or vectors in it can't be.
    """
    match target.WhichOneof("kind"):
        case "top_k":
            return TopK(target.top_k.k)
        case "contrast":
            contrast = target.contrast
            return ContrastNamed(
                _side(contrast.positive, f"{field}.contrast.positive"),
                _side(contrast.negative, f"{field}.contrast.negative"),
            )
        case None:
            raise InvalidArgumentError(field, "is empty: set output, top_k, concept or contrast")
        case _:
            return _side(target, field)


def _side(target: target_pb2.Target | target_pb2.ScalarTarget, field: str) -> Side:
    """The output or concept of a target, or of one side of a contrast."""
    match target.WhichOneof("kind"):
        case "output":
            return _output(target.output, f"{field}.output")
        case "concept":
            return _concept(target.concept, f"{field}.concept")
        case _:
            raise InvalidArgumentError(field, "is empty: set output or concept")


def _output(output: target_pb2.OutputTarget, field: str) -> Output | OutputNamed:
    match output.WhichOneof("selector"):
        case "index":
            return Output(output.index)
        case "name":
            check_name(output.name, f"{field}.name")
            return OutputNamed(output.name)
        case _:
            raise InvalidArgumentError(field, "is empty: set index or name")


def _concept(concept: target_pb2.ConceptTarget, field: str) -> Concept | ConceptSelected:
    if concept.similarity not in _SIMILARITY:
        raise InvalidArgumentError(f"{field}.similarity", f"{concept.similarity} is not a similarity")
    similarity = _SIMILARITY[concept.similarity]
    match concept.WhichOneof("selector"):
        case "vector":
            vector = float_vector(concept.vector, f"{field}.vector")
            return Concept.of(vector, similarity)
        case "name":
            return ConceptSelected(ConceptName(concept_name(concept.name, f"{field}.name")), similarity)
        case "id":
            return ConceptSelected(ConceptId(digest(concept.id, f"{field}.id")), similarity)
        case _:
            raise InvalidArgumentError(field, "is empty: set name, id or vector")


def concept_name(name: str, field: str) -> str:
    """The name of a concept.

    Raises:
        InvalidArgumentError: It can't be one.
    """
    if not _CONCEPT_NAME.fullmatch(name):
        raise InvalidArgumentError(field, "must be 1 to 128 of letters, digits, '.', '_' and '-'")
    return name


def digest(text: str, field: str) -> str:
    """A SHA-256 in hexadecimal.

    Raises:
        InvalidArgumentError: It is none.
    """
    if not _DIGEST.fullmatch(text):
        raise InvalidArgumentError(field, "must be 64 hexadecimal digits, in lower case")
    return text


def float_vector(tensor: common_pb2.FloatTensor, field: str) -> NDArray[np.float32]:
    """A concept's vector, of whatever length.

    Raises:
        InvalidArgumentError: It is no vector, or not finite.
    """
    if len(tensor.shape) != 1:
        raise InvalidArgumentError(field, f"must have a shape of one axis, not {len(tensor.shape)}")
    if len(tensor.data) != 4 * tensor.shape[0]:
        message = f"has {len(tensor.data)} bytes of data; {tensor.shape[0]} float32 values are {4 * tensor.shape[0]}"
        raise InvalidArgumentError(field, message)
    values = np.frombuffer(tensor.data, "<f4").astype(np.float32)
    if not (np.abs(values) <= _MAX_VECTOR).all():
        raise InvalidArgumentError(field, f"must be finite, and nowhere larger than {_MAX_VECTOR:g}")
    return values


# --- methods


def _methods(request: explain_pb2.ExplainRequest, limits: Limits) -> tuple[Method, ...]:
    if len(request.methods) > _MAX_METHODS:
        raise InvalidArgumentError("methods", f"{len(request.methods)} methods; at most {_MAX_METHODS} a request")
    methods = (decode_method(method, f"methods[{i}]", limits.max_samples) for i, method in enumerate(request.methods))
    return tuple(methods) or (Cdam(),)


def decode_method(method: method_pb2.Method, field: str, max_samples: int) -> Method:
    """The method.

    Args:
        method: The message.
        field: Its path from the request's root, for errors.
        max_samples: Largest number of draws, or of points on a path.

    Raises:
        InvalidArgumentError: It is none, or a parameter is out of bounds.
    """
    kind = method.WhichOneof("kind")
    if kind is None:
        raise InvalidArgumentError(field, "is empty: set the kind of method")
    return _METHODS[kind](getattr(method, kind), f"{field}.{kind}", max_samples)


def _cdam(method: method_pb2.CdamMethod, field: str, most: int) -> Cdam:  # noqa: ARG001 - as all of the table
    return Cdam(parts=method.parts)


def _smooth_cdam(method: method_pb2.SmoothCdamMethod, field: str, most: int) -> SmoothCdam:
    return SmoothCdam(**_draws(method, field, most))


def _integrated_cdam(method: method_pb2.IntegratedCdamMethod, field: str, most: int) -> IntegratedCdam:
    if method.HasField("tolerance") and not 0 < method.tolerance < math.inf:
        raise InvalidArgumentError(f"{field}.tolerance", f"must be finite and more than 0, not {method.tolerance:g}")
    tolerance = method.tolerance if method.HasField("tolerance") else None
    return IntegratedCdam(**_path(method, field, most), tolerance=tolerance)


def _attention(method: method_pb2.AttentionMethod, field: str, most: int) -> Attention:  # noqa: ARG001 - likewise
    heads = tuple(method.heads)
    if len(set(heads)) < len(heads):
        raise InvalidArgumentError(f"{field}.heads", "names a head twice")
    return Attention(heads=heads)


def _smooth_grad(method: method_pb2.SmoothGradMethod, field: str, most: int) -> SmoothGrad:
    return SmoothGrad(**_draws(method, field, most))


def _integrated_gradients(method: method_pb2.IntegratedGradientsMethod, field: str, most: int) -> IntegratedGradients:
    return IntegratedGradients(**_path(method, field, most))


def _plain(method: type[Method]) -> Callable[[Any, str, int], Method]:
    """The decoder of a method that has no parameters in the API."""
    return lambda _message, _field, _most: method()


# By the names of the API's oneof; the last argument is the largest number of draws or steps.
_METHODS: Final[Mapping[str, Callable[[Any, str, int], Method]]] = {
    "cdam": _cdam,
    "smooth_cdam": _smooth_cdam,
    "integrated_cdam": _integrated_cdam,
    "attention": _attention,
    "attention_rollout": _plain(AttentionRollout),
    "relevance_propagation": _plain(RelevancePropagation),
    "partial_lrp": _plain(PartialLrp),
    "input_x_gradient": _plain(InputXGradient),
    "smooth_grad": _smooth_grad,
    "integrated_gradients": _integrated_gradients,
    "token_ablation": _plain(TokenAblation),
    "patch_mask_prediction": _plain(PatchMaskPrediction),
}


def _draws(method: method_pb2.SmoothCdamMethod | method_pb2.SmoothGradMethod, field: str, most: int) -> dict[str, Any]:
    """What is said about draws; the rest is left to the engine's defaults."""
    said: dict[str, Any] = {}
    if method.HasField("samples"):
        said["samples"] = _number(method.samples, f"{field}.samples", most)
    if method.HasField("seed"):
        said["seed"] = method.seed
    level = method.noise.WhichOneof("level")
    if level is not None:
        value = getattr(method.noise, level)
        if not 0 <= value <= _MAX_NOISE:
            raise InvalidArgumentError(f"{field}.noise.{level}", f"must be from 0 to {_MAX_NOISE:g}, not {value:g}")
        said["noise"] = Noise(value, relative=level == "relative")
    return said


def _path(
    method: method_pb2.IntegratedCdamMethod | method_pb2.IntegratedGradientsMethod, field: str, most: int
) -> dict[str, Any]:
    """What is said about the path of an integral; the rest is left to the engine's defaults."""
    if method.quadrature not in _QUADRATURE:
        raise InvalidArgumentError(f"{field}.quadrature", f"{method.quadrature} is not a quadrature")
    said: dict[str, Any] = {"quadrature": _QUADRATURE[method.quadrature]}
    if method.HasField("steps"):
        said["steps"] = _number(method.steps, f"{field}.steps", most)
    return said


def _number(value: int, field: str, most: int) -> int:
    if not 1 <= value <= most:
        raise InvalidArgumentError(field, f"must be from 1 to {most}, not {value}")
    return value


# --- preprocessing


def resize(preprocessing: common_pb2.Preprocessing, field: str) -> Resize:
    """Which part of an image the model sees.

    Raises:
        InvalidArgumentError: There is no such mode.
    """
    if preprocessing.resize_mode not in _RESIZE:
        raise InvalidArgumentError(f"{field}.resize_mode", f"{preprocessing.resize_mode} is not a resize mode")
    return _RESIZE[preprocessing.resize_mode]


def input_size(preprocessing: common_pb2.Preprocessing) -> tuple[int, int] | None:
    """(height, width) in pixels, or None for the model's own; whether the model takes it, only the model knows."""
    if not preprocessing.HasField("input_size"):
        return None
    return preprocessing.input_size.height, preprocessing.input_size.width
