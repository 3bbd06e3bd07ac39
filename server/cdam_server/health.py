"""What probes are told: whether the process lives, and whether it takes requests."""

# ruff: noqa: ARG002, N802 - the generated base class sets names and arguments

import threading
from collections.abc import Callable, Iterator

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

_POLL_SECONDS = 0.1  # those who watch hear of a change after so long at the latest


class Health:
    """Two facts, each asked anew whenever somebody wants to know.

    Args:
        live: Whether the process works; to gRPC that is the service ``""``. A drain does not change it.
        ready: Whether requests are taken.
        service: Full name of the API's service, which is healthy when requests are taken.
    """

    def __init__(self, live: Callable[[], bool], ready: Callable[[], bool], service: str) -> None:
        self.live = live
        self.ready = ready
        self._facts = {"": live, service: ready}

    def status(self, service: str) -> int | None:
        """A service's ``ServingStatus``, or None if there is no such service."""
        fact = self._facts.get(service)
        return None if fact is None else _status(well=fact())

    def statuses(self) -> dict[str, int]:
        """The ``ServingStatus`` of each service."""
        return {service: _status(well=fact()) for service, fact in self._facts.items()}

    async def publish_to(self, servicer: health.aio.HealthServicer) -> None:
        """Tell grpc_health's servicer, which answers by what it was told last."""
        for service, status in self.statuses().items():
            await servicer.set(service, status)


class HealthServicer(health_pb2_grpc.HealthServicer):
    """`grpc.health.v1.Health` for a server with threads, where nothing that hangs elsewhere can hold it up.

    Args:
        health: What it answers by.
        watchers: Most calls of Watch at a time, so that they leave room for Check.
    """

    def __init__(self, health: Health, watchers: int) -> None:
        self._health = health
        self._seats = threading.Semaphore(watchers)

    def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """The status of one service, now."""
        status = self._health.status(request.service)
        if status is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return health_pb2.HealthCheckResponse(status=status)

    def List(self, request: object, context: grpc.ServicerContext) -> object:
        """The status of every service, now."""
        statuses = {
            service: health_pb2.HealthCheckResponse(status=status)
            for service, status in self._health.statuses().items()
        }
        return health_pb2.HealthListResponse(statuses=statuses)  # type: ignore[attr-defined]  # the stubs are older

    def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> Iterator[health_pb2.HealthCheckResponse]:
        """The status of one service, now and after each change."""
        gone = threading.Event()
        if not self._seats.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many watch already")
        try:
            last, open_ = None, context.add_callback(gone.set)
            while open_ and not gone.is_set():
                known = self._health.status(request.service)
                status = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN if known is None else known
                if status != last:
                    yield health_pb2.HealthCheckResponse(status=status)
                last = status
                gone.wait(_POLL_SECONDS)
        finally:
            self._seats.release()


def _status(*, well: bool) -> int:
    return health_pb2.HealthCheckResponse.SERVING if well else health_pb2.HealthCheckResponse.NOT_SERVING
