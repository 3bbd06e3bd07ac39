"""What the supervisor and its children tell each other."""

from __future__ import annotations

from typing import Any, NamedTuple

from cdam_server.processes.metrics import Page


class Ready(NamedTuple):
    """From a child: it works.

    Attributes:
        models: What is known of the models, pickled; of a compute process.
        address: Where it serves the API; of a front end.
    """

    models: bytes = b""
    address: str = ""


class Ended(NamedTuple):
    """From a child: it failed, and exits.

    Attributes:
        reason: A `wire.Failed`; None: the log has said it.
    """

    reason: Any = None


class Metrics(NamedTuple):
    """From a child: its metrics."""

    page: Page


class SendMetrics(NamedTuple):
    """To a child: send your metrics."""


class SetReady(NamedTuple):
    """To a front end: whether health says that requests are taken; from the first yes on they are."""

    value: bool


class Device(NamedTuple):
    """To a front end: a device's process listens, again."""

    number: int


class Drain(NamedTuple):
    """To a front end: refuse new requests, finish those in flight within so many seconds, and exit."""

    seconds: float


class Close(NamedTuple):
    """To a compute process: finish what was let in within so many seconds, and exit."""

    seconds: float
