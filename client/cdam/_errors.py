# ruff: noqa: N818 - the leaves are named as gRPC names their status codes
"""What can go wrong, as a caller sees it.

    CdamError
    ├── ImageError               (also a ValueError) what was given is no image
    ├── ConceptFileError         (also a ValueError) a file is no exported concept
    ├── MalformedResponse        the server's answer contradicts itself
    └── RpcError                 the call failed: code, message, request_id, field, violations
        ├── InvalidArgument      a field of the request is wrong
        ├── NotFound             no such model, output or concept: kind, name
        ├── AlreadyExists        a concept's name is taken: kind, name
        ├── FailedPrecondition   not with this model: reason, metadata
        ├── Aborted              something changed meanwhile: reason, metadata
        │   └── VersionMismatch  a concept's newest version is not the expected one: current_version
        ├── ResourceExhausted    too large for the server: reason
        │   └── Overloaded       the server's queue is full: retry_after
        ├── Unavailable          starting, going down, or out of reach: retry_after
        ├── DeadlineExceeded     the call's timeout passed
        ├── Unimplemented        part of the API that this server doesn't serve: reason
        ├── Unauthenticated      no credentials, or wrong ones
        ├── PermissionDenied     credentials that don't allow this
        └── Internal             the server's fault: error_id, which its log also has

A wrong type or a contradiction in the caller's own arguments is a plain TypeError or ValueError, raised before
anything is sent.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_DETAILS_KEY = "grpc-status-details-bin"


class CdamError(Exception):
    """Base of all errors of this package."""


class ImageError(CdamError, ValueError):
    """What was given as an image can't be read as one."""


class ConceptFileError(CdamError, ValueError):
    """A file is not a concept that was exported, or is damaged."""


class MalformedResponse(CdamError):
    """The server's answer contradicts itself, for example an array whose bytes don't fill its shape."""


@dataclass(frozen=True)
class FieldViolation:
    """One wrong field of a request.

    Attributes:
        field: Path from the request's root, for example ``targets[2].output.index``.
        description: What is wrong with it.
    """

    field: str
    description: str


class RpcError(CdamError):
    """A call failed.

    Attributes:
        code: The gRPC status code.
        message: What the server, or the transport, says about it.
        request_id: The request's id, where the server sent it; else empty.
        violations: Each field of the request that it is about, where the server names any.
    """

    violations: tuple[FieldViolation, ...] = ()

    def __init__(
        self, message: str = "", *, code: grpc.StatusCode = grpc.StatusCode.UNKNOWN, request_id: str = ""
    ) -> None:
        # Everything but the message has a default, so that errors survive pickling.
        super().__init__(message)
        self.code = code
        self.message = message
        self.request_id = request_id

    @property
    def field(self) -> str:
        """Path of the first field that it is about; empty if the server named none."""
        return self.violations[0].field if self.violations else ""


class InvalidArgument(RpcError):
    """A field of the request is wrong: see `violations` and `field`."""


class NotFound(RpcError):
    """Something that the request names does not exist.

    Attributes:
        kind: ``model``, ``output`` or ``concept``.
        name: The name that was not found.
    """

    kind: str = ""
    name: str = ""


class AlreadyExists(RpcError):
    """A name is taken, with other content.

    Attributes:
        kind: ``concept``.
        name: The name that is taken.
    """

    kind: str = ""
    name: str = ""


class FailedPrecondition(RpcError):
    """The request is fine, but not for this model.

    Attributes:
        reason: UPPER_SNAKE_CASE, for programs.
        metadata: Further facts, for programs.
    """

    reason: str = ""
    metadata: Mapping[str, str] = {}


class Aborted(RpcError):
    """Something is not as the request expects it.

    Attributes:
        reason: UPPER_SNAKE_CASE, for programs.
        metadata: Further facts, for programs.
    """

    reason: str = ""
    metadata: Mapping[str, str] = {}


class VersionMismatch(Aborted):
    """The newest version of a concept's name is not the expected one; nothing was changed."""

    @property
    def current_version(self) -> int | None:
        """The newest version, 0 if the name is free; None if the server didn't say."""
        said = self.metadata.get("current_version", "")
        return int(said) if said.isdecimal() else None


class ResourceExhausted(RpcError):
    """The request is larger than the server, or the transport, can take. Repeating it won't help.

    Attributes:
        reason: UPPER_SNAKE_CASE, for programs; empty if the transport refused the message.
    """

    reason: str = ""


class Overloaded(ResourceExhausted):
    """The server has no room for the request, or could not answer it in time; try again later.

    Attributes:
        retry_after: Seconds to wait, as the server advises.
    """

    retry_after: float | None = None


class Unavailable(RpcError):
    """The server is starting, going down, or out of reach. Retries, if any, are used up.

    Attributes:
        retry_after: Seconds to wait, as the server advises; None if it didn't say.
    """

    retry_after: float | None = None


class DeadlineExceeded(RpcError):
    """The call's timeout passed."""


class Unimplemented(RpcError):
    """A part of the API that this server does not serve.

    Attributes:
        reason: UPPER_SNAKE_CASE, for programs.
    """

    reason: str = ""


class Unauthenticated(RpcError):
    """The server wants credentials, or doesn't know those that it got."""


class PermissionDenied(RpcError):
    """The credentials don't allow this."""


class Internal(RpcError):
    """Something broke in the server.

    Attributes:
        error_id: Found again in the server's log.
    """

    error_id: str = ""


_BY_CODE: dict[grpc.StatusCode, type[RpcError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.ABORTED: Aborted,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNIMPLEMENTED: Unimplemented,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.INTERNAL: Internal,
}


@dataclass
class _Details:
    """google.rpc's details, those that this API uses."""

    violations: tuple[FieldViolation, ...] = ()
    kind: str = ""
    name: str = ""
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    retry_after: float | None = None
    error_id: str = ""
    request_id: str = ""

    def add_bad_request(self, detail: error_details_pb2.BadRequest) -> None:
        self.violations += tuple(FieldViolation(v.field, v.description) for v in detail.field_violations)

    def add_resource_info(self, detail: error_details_pb2.ResourceInfo) -> None:
        self.kind, self.name = detail.resource_type.rpartition(".")[2], detail.resource_name  # cdam.v1.model

    def add_error_info(self, detail: error_details_pb2.ErrorInfo) -> None:
        self.reason, self.metadata = detail.reason, dict(detail.metadata)
        self.error_id = self.metadata.get("error_id", "")

    def add_retry_info(self, detail: error_details_pb2.RetryInfo) -> None:
        self.retry_after = detail.retry_delay.seconds + detail.retry_delay.nanos / 1e9

    def add_request_info(self, detail: error_details_pb2.RequestInfo) -> None:
        self.request_id = detail.request_id


_READERS: dict[type[Any], Callable[[_Details, Any], None]] = {
    error_details_pb2.BadRequest: _Details.add_bad_request,
    error_details_pb2.ResourceInfo: _Details.add_resource_info,
    error_details_pb2.ErrorInfo: _Details.add_error_info,
    error_details_pb2.RetryInfo: _Details.add_retry_info,
    error_details_pb2.RequestInfo: _Details.add_request_info,
}


def error_from_status(code: grpc.StatusCode, message: str, details: Iterable[AnyMessage] = ()) -> RpcError:
    """The error for a status and its google.rpc details; details of other kinds are passed over."""
    found = _Details()
    for packed in details:
        for message_type, read in _READERS.items():
            if packed.Is(message_type.DESCRIPTOR):
                with suppress(DecodeError):  # the code and the message still stand
                    read(found, message_type.FromString(packed.value))
    kind = _BY_CODE.get(code, RpcError)
    if kind is ResourceExhausted and found.retry_after is not None:
        kind = Overloaded
    if kind is Aborted and found.reason == "VERSION_MISMATCH":
        kind = VersionMismatch
    error = kind(message, code=code, request_id=found.request_id)
    # A leaf's class attributes are what it has to say: fill those in, and no others.
    for name in ("violations", "kind", "name", "reason", "metadata", "retry_after", "error_id"):
        if hasattr(kind, name):
            setattr(error, name, getattr(found, name))
    return error


def error_from_rpc(error: Any) -> RpcError:
    """The error for what grpc raised, by a blocking call or by grpc.aio; that one is its cause."""
    status = status_pb2.Status()
    try:
        for key, value in error.trailing_metadata() or ():
            if key == _DETAILS_KEY:
                status.ParseFromString(value)
    except DecodeError:
        status.Clear()
    translated = error_from_status(error.code() or grpc.StatusCode.UNKNOWN, error.details() or "", status.details)
    translated.__cause__ = error
    return translated
