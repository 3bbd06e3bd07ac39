"""The API over what computes: the gRPC server with its use cases, the store of concepts and the decoders."""

import asyncio
from contextlib import AsyncExitStack, closing, suppress
from time import monotonic
from typing import Final

import grpc
import structlog
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cdam.v1 import explainer_service_pb2, explainer_service_pb2_grpc
from cdam_server.compute.facts import Models
from cdam_server.compute.interface import Compute
from cdam_server.compute.scheduling import ByteBudget, Pool
from cdam_server.operation.health import Health
from cdam_server.operation.telemetry import Telemetry
from cdam_server.operation.tracing import Tracing
from cdam_server.rpc.decode import Limits
from cdam_server.rpc.images import ImageLimits
from cdam_server.rpc.interceptors import RequestInterceptor
from cdam_server.rpc.servicer import ExplainerServicer
from cdam_server.rpc.stream import StreamServer
from cdam_server.settings.config import MIB, Settings
from cdam_server.store import ConceptStore
from cdam_server.store.cache import CachedStore, OtherWriters
from cdam_server.store.sqlite import SqliteStore
from cdam_server.usecases.concepts import ConceptUseCase
from cdam_server.usecases.evaluate import EvaluateUseCase, EvaluationTools
from cdam_server.usecases.explain import ExplainUseCase
from cdam_server.usecases.images import Images
from cdam_server.usecases.registration import RegisterUseCase
from cdam_server.usecases.resolve import ExplainLimits, Resolver

SERVICE: Final = explainer_service_pb2.DESCRIPTOR.services_by_name["ExplainerService"].full_name

# Ratio to max_pending. So many calls at once, open streams among them, are read at all: refusing takes time and memory, too.
_MAX_CALLS: Final = 4
# Ratio to max_pending_mib. Samples of evaluations that wait take one part in so many at most.
_EVALUATION_MEMORY: Final = 4
# Seconds in which calls that arrived with the last answer are refused, not dropped.
_ARRIVALS_SECONDS: Final = 0.2
# Seconds between heartbeats of the event loop; gRPC health hears of a change no later.
_HEARTBEAT_SECONDS: Final = 0.2
# Seconds for refusals and answers that are on their way when the API's port closes.
_GRACE_SECONDS: Final = 1.0

_log = structlog.get_logger("cdam.server")


class FrontEnd:
    """The API, served from one event loop: `open`, then `drain`.

    Args:
        settings: The settings.
        models: What is known of the models.
        compute: What computes.
        telemetry: Metrics.
        health: What probes are told.
        of: How many front ends share the server's bounds on memory, and its port.
        others: Those that write to the same store.

    Attributes:
        accepting: Whether requests are taken; while they aren't, they are answered UNAVAILABLE.
        address: Where the API is served, once open.
        beat: When the event loop last turned, by `time.monotonic`.
    """

    def __init__(
        self,
        settings: Settings,
        models: Models,
        compute: Compute,
        telemetry: Telemetry,
        health: Health,
        of: int = 1,
        others: OtherWriters | None = None,
    ) -> None:
        self.accepting = False
        self.address = ""
        self.beat = monotonic()
        self._settings = settings
        self._models = models
        self._compute = compute
        self._telemetry = telemetry
        self._health = health
        self._of = of
        self._others = others
        self._draining = asyncio.Event()
        self._health_service = health_service()

    async def open(self, resources: AsyncExitStack, *, reuse_port: bool = False) -> None:
        """Open the store and the port; what must be closed goes to the resources.

        Raises:
            OSError: The port is taken.
            StoreUnusableError: The store of concepts must not be used as it is.
            ValueError: Tracing can't be used, or the store.
        """
        settings = self._settings
        self._decoders = resources.enter_context(closing(Pool(settings.decode_threads, "decode")))
        self._tracing = Tracing(settings.tracing_endpoint)
        resources.push_async_callback(asyncio.to_thread, self._tracing.close)
        resources.push_async_callback(cancel, asyncio.create_task(self._keep_beating(), name="heartbeat"))
        self._store = CachedStore(_store(settings), observer=self._telemetry, others=self._others)
        resources.push_async_callback(self._store.close)  # also where opening it fails half-way
        await self._store.open()
        await self._serve(resources, reuse_port=reuse_port)

    @property
    def of_a_unix_socket(self) -> bool:
        """Whether it is served at a path, which no two can share."""
        return self._settings.address.startswith("unix:")

    async def publish(self) -> None:
        """Tell those who watch gRPC health what is true now."""
        await self._health.publish_to(self._health_service)

    async def drain(self, seconds: float) -> None:
        """Refuse new requests, and wait for those in flight, so many seconds at most."""
        self.accepting = False
        self._draining.set()
        # gRPC's own stop drops calls that have arrived but not begun; until all others are answered, new ones are
        # told UNAVAILABLE instead.
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._interceptor.wait_until_idle()

    async def last_arrivals(self) -> None:
        """Wait for calls that arrived with the last answer, and are refused."""
        await asyncio.sleep(_ARRIVALS_SECONDS)

    async def _serve(self, resources: AsyncExitStack, *, reuse_port: bool) -> None:
        settings = self._settings
        self._interceptor = RequestInterceptor(self._telemetry, lambda: self.accepting, self._tracing)
        server = grpc.aio.server(
            interceptors=[self._interceptor],
            options=_options(settings, reuse_port=reuse_port),
            maximum_concurrent_rpcs=_MAX_CALLS * settings.max_pending,
        )
        resources.push_async_callback(server.stop, _GRACE_SECONDS)
        explainer_service_pb2_grpc.add_ExplainerServiceServicer_to_server(self._servicer(), server)
        await self.publish()
        health_pb2_grpc.add_HealthServicer_to_server(self._health_service, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        try:
            port = server.add_insecure_port(settings.address)
        except RuntimeError as error:
            raise OSError(f"can't listen on {settings.address} (address): is another server there?") from error
        host = settings.address.rpartition(":")[0]
        self.address = settings.address if settings.address.startswith("unix:") else f"{host}:{port}"
        await server.start()

    def _servicer(self) -> ExplainerServicer:
        """The API over its use cases."""
        settings, models, compute, telemetry = self._settings, self._models, self._compute, self._telemetry
        concepts = ConceptUseCase(models, self._store)
        resolver = Resolver(
            models, concepts, ExplainLimits(settings.max_targets, settings.max_patches, settings.max_passes)
        )
        images = Images(compute, self._decoders, telemetry)
        limits = Limits(
            ImageLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels),
            max_targets=settings.max_targets,
            max_samples=settings.max_samples,
            max_concept_images=settings.max_concept_images,
        )
        memory = settings.max_pending_mib * MIB // self._of
        budget = ByteBudget(memory)
        streams = StreamServer(telemetry, self._draining, max_items=settings.max_stream_items, budget=budget)
        register = RegisterUseCase(resolver, self._store, images, compute, budget)
        evaluate = EvaluateUseCase(
            EvaluationTools(resolver, compute, self._decoders, telemetry),
            max_passes=settings.max_evaluation_passes,
            max_pending_passes=settings.max_pending_passes,
        )
        evaluations = StreamServer(
            telemetry,
            self._draining,
            max_items=settings.max_stream_items,
            budget=ByteBudget(memory // _EVALUATION_MEMORY),
        )
        return ExplainerServicer(
            models, ExplainUseCase(resolver, images), concepts, register, evaluate, limits, streams, evaluations
        )

    async def _keep_beating(self) -> None:
        while True:
            self.beat = monotonic()
            await self.publish()
            await asyncio.sleep(_HEARTBEAT_SECONDS)


def health_service() -> health.aio.HealthServicer:
    """A servicer of gRPC health, which knows nothing yet."""
    return health.aio.HealthServicer()


async def cancel(task: asyncio.Task[None]) -> None:
    """Cancel a task, and wait until it has ended."""
    task.cancel()
    await asyncio.wait([task])


def _store(settings: Settings) -> ConceptStore:
    """Where concepts are kept.

    Raises:
        ValueError: The extra that it needs is not installed.
    """
    url = settings.store.get_secret_value()
    if not url:
        store = SqliteStore(settings.data_dir)
        _log.info("store", file=str(store.file))
        return store
    try:
        from cdam_server.store.postgres import PostgresStore
    except ModuleNotFoundError as error:
        message = f"store: {error.name} is missing: install cdam-serve with its extra `postgres`"
        raise ValueError(message) from error
    return PostgresStore(url)


def _options(settings: Settings, *, reuse_port: bool) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        # Front ends of one server share its port; a second server on it is a mistake.
        ("grpc.so_reuseport", int(reuse_port)),
        ("grpc.max_connection_age_ms", round(1000 * settings.max_connection_age_seconds)),
        # Peers that vanished without a word hold no stream open.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]
