"""What probes are told: whether the process works, and whether it takes requests."""

from collections.abc import Callable

from grpc_health.v1 import health, health_pb2


class Health:
    """Two facts, read at every probe.

    Args:
        live: Whether the process works; to gRPC that is the service ``""``. A drain does not change it.
        ready: Whether requests are taken.
        service: Full name of the API's service, which is healthy when requests are taken.
    """

    def __init__(self, live: Callable[[], bool], ready: Callable[[], bool], service: str) -> None:
        self.live = live
        self.ready = ready
        self._facts = {"": live, service: ready}

    async def publish_to(self, servicer: health.aio.HealthServicer) -> None:
        """Set the status of each service in grpc_health's servicer, which answers with the last status set."""
        for service, fact in self._facts.items():
            status = health_pb2.HealthCheckResponse
            await servicer.set(service, status.SERVING if fact() else status.NOT_SERVING)
