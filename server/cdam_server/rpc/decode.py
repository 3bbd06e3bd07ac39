"""From the API's messages to the use cases' words; every complaint names the field."""

import re
from functools import partial
from uuid import uuid4

from cdam.v1 import common_pb2, explain_pb2, method_pb2, target_pb2
from cdam_engine import Output, TopK
from cdam_engine.preprocess import Resize
from cdam_server.errors import InvalidArgumentError, NotImplementedYetError
from cdam_server.explain import Command, OutputNamed
from cdam_server.rpc.images import ImageLimits, decode_image

_REQUEST_ID = re.compile(r"[\x20-\x7e]{0,128}")
_MAX_METHODS = 16
_MAX_NAME = 256
_RANK = {
    explain_pb2.PRIORITY_UNSPECIFIED: 0,
    explain_pb2.PRIORITY_LOW: 1,
    explain_pb2.PRIORITY_NORMAL: 0,
    explain_pb2.PRIORITY_HIGH: -1,
}
_RESIZE: dict[int, Resize] = {
    common_pb2.RESIZE_MODE_UNSPECIFIED: "model",
    common_pb2.RESIZE_MODE_MODEL: "model",
    common_pb2.RESIZE_MODE_SQUASH: "squash",
}


def explain_command(
    request: explain_pb2.ExplainRequest, limits: ImageLimits, max_targets: int, timeout: float | None
) -> Command:
    """The command of an Explain request; its image is decoded only when the command is carried out.

    Raises:
        InvalidArgumentError: A field is missing or wrong.
        NotImplementedYetError: The request needs what this version does not serve.
    """
    check_name(request.model, "model")
    if not request.HasField("image"):
        raise InvalidArgumentError("image", "is required")
    if not request.targets:
        raise InvalidArgumentError("targets", "at least one is required")
    if len(request.targets) > max_targets:
        raise InvalidArgumentError("targets", f"{len(request.targets)} targets; at most {max_targets} a request")
    if request.priority not in _RANK:
        raise InvalidArgumentError("priority", f"{request.priority} is not a priority")
    if len(request.methods) > _MAX_METHODS:
        raise InvalidArgumentError("methods", f"{len(request.methods)} methods; at most {_MAX_METHODS} a request")
    for position, method in enumerate(request.methods):
        _check_method(method, f"methods[{position}]")
    return Command(
        model=request.model,
        open_image=partial(decode_image, request.image, limits),
        targets=tuple(_target(target, f"targets[{i}]") for i, target in enumerate(request.targets)),
        resize=_resize(request.preprocessing),
        input_size=_input_size(request.preprocessing),
        timeout=timeout,
        rank=_RANK[request.priority],
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


def _target(target: target_pb2.Target, field: str) -> Output | TopK | OutputNamed:
    match target.WhichOneof("kind"):
        case "output":
            return _output(target.output, f"{field}.output")
        case "top_k":
            return TopK(target.top_k.k)
        case None:
            raise InvalidArgumentError(field, "is empty: set output, top_k, concept or contrast")
        case kind:
            raise NotImplementedYetError(
                "TARGET_NOT_IMPLEMENTED", f"{field}.{kind}: this version explains outputs only", target=str(kind)
            )


def _output(output: target_pb2.OutputTarget, field: str) -> Output | OutputNamed:
    match output.WhichOneof("selector"):
        case "index":
            return Output(output.index)
        case "name":
            check_name(output.name, f"{field}.name")
            return OutputNamed(output.name)
        case _:
            raise InvalidArgumentError(field, "is empty: set index or name")


def _check_method(method: method_pb2.Method, field: str) -> None:
    kind = method.WhichOneof("kind")
    if kind is None:
        raise InvalidArgumentError(field, "is empty: set the kind of method")
    if kind != "cdam":
        raise NotImplementedYetError(
            "METHOD_NOT_IMPLEMENTED", f"{field}.{kind}: this version serves cdam only", method=kind
        )
    if method.cdam.parts:
        raise NotImplementedYetError(
            "METHOD_NOT_IMPLEMENTED", f"{field}.cdam.parts: this version does not split maps", method=kind
        )


def _resize(preprocessing: common_pb2.Preprocessing) -> Resize:
    if preprocessing.resize_mode not in _RESIZE:
        raise InvalidArgumentError("preprocessing.resize_mode", f"{preprocessing.resize_mode} is not a resize mode")
    return _RESIZE[preprocessing.resize_mode]


def _input_size(preprocessing: common_pb2.Preprocessing) -> tuple[int, int] | None:
    if not preprocessing.HasField("input_size"):
        return None
    return preprocessing.input_size.height, preprocessing.input_size.width
