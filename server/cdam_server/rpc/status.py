"""One table from errors to gRPC statuses with google.rpc details."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from uuid import uuid4

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from cdam_server import errors

DOMAIN = "cdam.v1"
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"


@dataclass(frozen=True)
class Status:
    """What a caller is told.

    Attributes:
        code: The gRPC status code.
        message: For a developer to read.
        details: google.rpc messages.
        retry_after: Seconds after which it may go better, or None.
        error_id: For an internal error: the id under which the log has it.
    """

    code: grpc.StatusCode
    message: str
    details: Sequence[Message] = ()
    retry_after: float | None = None
    error_id: str = ""

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """The details as gRPC carries them."""
        if not self.details:
            return ()
        # gRPC's own retries don't read RetryInfo; this they do.
        pushback = () if self.retry_after is None else ((PUSHBACK_KEY, str(round(1000 * self.retry_after))),)
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in self.details:
            packed = AnyMessage()
            packed.Pack(detail)
            status.details.append(packed)
        return ((DETAILS_KEY, status.SerializeToString()), *pushback)


def _bad_request(error: errors.ServiceError) -> Message:
    violation = error_details_pb2.BadRequest.FieldViolation(field=error.field or "", description=error.description)
    detail: Message = error_details_pb2.BadRequest(field_violations=[violation])
    return detail


def _resource_info(error: errors.NotFoundError | errors.AlreadyExistsError) -> Message:
    detail: Message = error_details_pb2.ResourceInfo(
        resource_type=f"{DOMAIN}.{error.kind}", resource_name=error.name, description=str(error)
    )
    return detail


def _error_info(error: errors.FailedPreconditionError) -> Message:
    detail: Message = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    return detail


def _retry_info(error: errors.OverloadedError) -> Message:
    delay = Duration()
    delay.FromNanoseconds(int(error.retry_after * 1e9))
    detail: Message = error_details_pb2.RetryInfo(retry_delay=delay)
    return detail


# The first row whose class fits counts, so subclasses stand before their bases.
_TABLE: tuple[tuple[type[errors.ServiceError], grpc.StatusCode, Callable[..., Message] | None], ...] = (
    (errors.InvalidArgumentError, grpc.StatusCode.INVALID_ARGUMENT, None),
    (errors.NotFoundError, grpc.StatusCode.NOT_FOUND, _resource_info),
    (errors.AlreadyExistsError, grpc.StatusCode.ALREADY_EXISTS, _resource_info),
    (errors.AbortedError, grpc.StatusCode.ABORTED, _error_info),
    (errors.ExhaustedError, grpc.StatusCode.RESOURCE_EXHAUSTED, _error_info),
    (errors.FailedPreconditionError, grpc.StatusCode.FAILED_PRECONDITION, _error_info),
    (errors.UnavailableError, grpc.StatusCode.UNAVAILABLE, _retry_info),
    (errors.OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED, _retry_info),
    (errors.DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED, None),
)


def status_of(error: Exception, request_id: str = "") -> Status:
    """The status for an error; anything that is not in the table is internal, and only its id is told."""
    about = [error_details_pb2.RequestInfo(request_id=request_id)] if request_id else []
    for kind, code, detail in _TABLE:
        if isinstance(error, kind):
            field = [_bad_request(error)] if isinstance(error, errors.ServiceError) and error.field else []
            details = [*([detail(error)] if detail else []), *field, *about]
            return Status(code, str(error), details, getattr(error, "retry_after", None))
    error_id = uuid4().hex
    info = error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"error_id": error_id})
    return Status(grpc.StatusCode.INTERNAL, f"internal error {error_id}", [info, *about], error_id=error_id)
