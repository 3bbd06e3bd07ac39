"""What can go wrong in a request, as the service sees it.

    ServiceError
    ├── InvalidArgumentError     bad image, bad field, over a limit of the request
    ├── NotFoundError            unknown model, concept, output
    ├── AlreadyExistsError       a concept's name taken with other content
    ├── FailedPreconditionError  concept of another model; method that this architecture can't serve
    │   ├── AbortedError            a concept is not at the expected version
    │   └── ExhaustedError          out of memory with a batch of one; no space to store
    ├── OverloadedError          the queue is full
    │   └── UnavailableError        draining, not ready; the store is down
    └── DeadlineError            the deadline passed in the queue

Each maps to one gRPC status in `cdam_server.rpc.status`. Messages are for the caller: they never hold a path of the
server or a traceback. An error that is about a field says which, relative to what raised it; whoever hands a part of a
request on puts its own place before it (`within`), and `cdam_server.rpc.fields` makes it a path of the API.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

# Seconds. What a refused caller is told where nobody can tell how long it takes: soon, since most such states are short.
RETRY_AFTER_SECONDS: Final = 1.0
# Seconds. Work that is already on the server tries again at least so often: it is here, and asking costs next to nothing.
_MAX_PAUSE_SECONDS: Final = 2.0


class ServiceError(Exception):
    """Base of all errors that a caller is told about.

    Args:
        message: What is wrong, and what would be right.
        field: Which field it is about; empty: all that was given; None: none.

    Attributes:
        description: The message without the field.
        field: As given.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.description = message
        self.field = field

    def __str__(self) -> str:
        """The message for the caller."""
        return f"{self.field}: {self.description}" if self.field else self.description


@contextmanager
def within(place: str) -> Iterator[None]:
    """Errors about fields of what is in this place of the request, ``targets[2]`` for example."""
    try:
        yield
    except ServiceError as error:
        if error.field is not None:
            error.field = f"{place}.{error.field}" if error.field else place
        raise


class InvalidArgumentError(ServiceError):
    """A field of the request is wrong.

    Args:
        field: Which one.
        message: What is wrong with it, and what would be right.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message, field)


class _ResourceError(ServiceError):
    """It is about something that the request names.

    Args:
        kind: ``model``, ``output`` or ``concept``.
        name: Its name.
        message: What the caller can do about it.
        field: Which field names it.
    """

    def __init__(self, kind: str, name: str, message: str, field: str | None = None) -> None:
        super().__init__(message, field)
        self.kind = kind
        self.name = name


class NotFoundError(_ResourceError):
    """Something that the request names does not exist."""


class AlreadyExistsError(_ResourceError):
    """What the request would make exists, and is something else."""


class FailedPreconditionError(ServiceError):
    """The request is fine, but not for this model, or not as things are.

    Args:
        reason: UPPER_SNAKE_CASE, stable, for programs.
        message: For people.
        field: Which field it is about.
        metadata: Further facts, for programs.
    """

    def __init__(self, reason: str, message: str, field: str | None = None, **metadata: str) -> None:
        super().__init__(message, field)
        self.reason = reason
        self.metadata = metadata


class OverloadedError(ServiceError):
    """The queue is full; come back after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float = RETRY_AFTER_SECONDS) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def pause(self) -> float:
        """Seconds until work on the server tries again, others each time, so that not all of it comes back at once."""
        return min(self.retry_after, _MAX_PAUSE_SECONDS) * random.uniform(0.5, 1.5)  # noqa: S311


class ExhaustedError(FailedPreconditionError):
    """There is no memory for the request alone, or no space to store what it made."""


class AbortedError(FailedPreconditionError):
    """What the request would change has been changed by someone else."""


class DeadlineError(ServiceError):
    """The caller's deadline passed before the work began."""


class UnavailableError(OverloadedError):
    """The server is starting or going down; try another, or this one after `retry_after` seconds."""
