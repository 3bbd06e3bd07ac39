"""From the API's messages to the use cases' words; every complaint names the field."""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from cdam.v1 import common_pb2, explain_pb2, target_pb2
from cdam_engine import Cdam, Concept, Method, Output, TopK
from cdam_engine.preprocess import Resize
from cdam_engine.targets import Similarity
from cdam_server.errors import InvalidArgumentError
from cdam_server.rpc.images import ImageLimits, decode_image
from cdam_server.rpc.methods import decode_method
from cdam_server.usecases.concepts import ConceptId, ConceptName
from cdam_server.usecases.explain import ExplainCommand
from cdam_server.usecases.images import ImageRequest
from cdam_server.usecases.resolve import ConceptSelected, ContrastNamed, OutputNamed, Side, Wanted

_REQUEST_ID = re.compile(r"[\x20-\x7e]{0,128}")
_CONCEPT_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_METHODS = 16
_MAX_NAME = 256
_MAX_NAME_BYTES = 768  # as an error shows it, which has it up to four times in 8 KiB of trailers
_MAX_VECTOR = 1e15  # beyond it numbers overflow in float32, where the squares of a thousand of them are summed
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


def explain_command(
    request: explain_pb2.ExplainRequest, limits: Limits, timeout: float | None, caller: str
) -> ExplainCommand:
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
    return ExplainCommand(
        model=request.model,
        image=ImageRequest(
            open=partial(decode_image, request.image, limits.image),
            resize=resize(request.preprocessing, "preprocessing"),
            timeout=timeout,
            rank=_RANK[request.priority],
            caller=caller,
            bytes=request.ByteSize(),
            content=lambda: request.image.encoded or request.image.raw.data,
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
    return request.request_id or f"{random.getrandbits(128):032x}"


def check_name(name: str, field: str) -> None:
    """Refuse a name that no error message could carry.

    Raises:
        InvalidArgumentError: It is too long.
    """
    if len(name) > _MAX_NAME:
        raise InvalidArgumentError(field, f"has {len(name)} characters; at most {_MAX_NAME} are allowed")
    if (shown := len(repr(name).encode())) > _MAX_NAME_BYTES + 2:
        raise InvalidArgumentError(field, f"takes {shown - 2} bytes to show; at most {_MAX_NAME_BYTES} are allowed")


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
