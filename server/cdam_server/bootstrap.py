"""Where objects meet: settings in, a running server out."""

import asyncio
import platform
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, closing, contextmanager, suppress
from functools import partial
from time import monotonic
from typing import Final

import grpc
import structlog
import timm
import torch
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cdam import __version__
from cdam.v1 import explainer_service_pb2, explainer_service_pb2_grpc
from cdam_engine import TokenCache
from cdam_server.compute.architectures import check_explainable, none_explainable
from cdam_server.compute.device import find_device
from cdam_server.compute.loading import LoadedModel, load_model, share_weights
from cdam_server.compute.models import Catalog, ServedModel
from cdam_server.compute.scheduling import Bounds, ByteBudget, Pool, Scheduler
from cdam_server.compute.warmup import warm_up
from cdam_server.compute.work import Works
from cdam_server.operation.admin import AdminServer
from cdam_server.operation.health import Health
from cdam_server.operation.telemetry import Telemetry
from cdam_server.operation.tracing import Tracing
from cdam_server.operation.watchdog import Watchdog
from cdam_server.rpc.decode import Limits
from cdam_server.rpc.images import ImageLimits
from cdam_server.rpc.interceptors import RequestInterceptor
from cdam_server.rpc.servicer import ExplainerServicer
from cdam_server.rpc.stream import StreamServer
from cdam_server.settings.config import MIB, Settings, unknown_variables
from cdam_server.settings.specs import check_files
from cdam_server.store import ConceptStore
from cdam_server.store.cache import CachedStore
from cdam_server.store.sqlite import SqliteStore
from cdam_server.usecases.concepts import ConceptUseCase
from cdam_server.usecases.evaluate import EvaluateUseCase, EvaluationTools
from cdam_server.usecases.explain import ExplainUseCase
from cdam_server.usecases.images import Images
from cdam_server.usecases.registration import RegisterUseCase
from cdam_server.usecases.resolve import ExplainLimits, Resolver

SERVICE = explainer_service_pb2.DESCRIPTOR.services_by_name["ExplainerService"].full_name

# Ratio to max_pending. So many calls at once, open streams among them, are read at all: refusing takes time and memory, too.
_MAX_CALLS: Final = 4
# Ratio to max_pending. One request in so many may be a registration, and one in so many an evaluation: each is many jobs.
_REGISTRATIONS: Final = 4
_EVALUATIONS: Final = 8
# Ratio to max_pending_mib. Samples of evaluations that wait take one part in so many at most.
_EVALUATION_MEMORY: Final = 4
# Batches at once on a GPU: one is staged while another is computed. On a CPU, whose cores are better used by several
# than by one: at most so many, each with a core of its own.
_GPU_SLOTS: Final = 2
_MAX_CPU_SLOTS: Final = 4
# Seconds in which calls that arrived with the last answer are refused, not dropped.
_ARRIVALS_SECONDS: Final = 0.2
# Seconds. The event loop and the workers want the interpreter in turns, hundreds of times a batch.
_SWITCH_SECONDS: Final = 0.0005
# Seconds between heartbeats of the event loop; gRPC health hears of a change no later.
_HEARTBEAT_SECONDS: Final = 0.2
# Seconds without a heartbeat until the event loop counts as hanging.
_STALL_SECONDS: Final = 10.0
# Seconds for refusals and answers that are on their way when the API's port closes.
_GRACE_SECONDS: Final = 1.0

_log = structlog.get_logger("cdam.server")


class ServerFailedError(Exception):
    """Nothing can be computed any more: only a new process helps."""


class Application:
    """A server with its parts; `start`, then `stop`, both in one event loop.

    Args:
        settings: The settings.
        catalog: The models, loaded.

    Attributes:
        address: Where the API is served, once started.
        failed: Set when nothing can be computed any more.
    """

    def __init__(self, settings: Settings, catalog: Catalog) -> None:
        self._settings = settings
        self._catalog = catalog
        self._telemetry = Telemetry()
        self._store = CachedStore(_store(settings), observer=self._telemetry)
        self._ready = self._accepting = False
        self._draining = asyncio.Event()
        self._heartbeat = monotonic()
        self._health = Health(live=self._live, ready=lambda: self._ready, service=SERVICE)
        self._health_service = health.aio.HealthServicer()
        self.address = ""
        self.failed = asyncio.Event()

    async def start(self) -> None:
        """Open the ports, warm the models up, and only then report ready; what fails leaves nothing open.

        Raises:
            OSError: A port is taken.
            StoreUnusableError: The store of concepts must not be used as it is.
            ValueError: A model can't be used, or tracing.
        """
        async with AsyncExitStack() as resources:
            await self._open(resources)
            largest = min(self._settings.max_batch_size, self._settings.max_pending)
            await warm_up(self._catalog, self._scheduler, largest)
            self._watchdog.start()  # not before: compiling is silent for minutes
            self._telemetry.jobs_admitted.reset()  # without those of the warm-up
            self._ready = self._accepting = True
            await self._health.publish_to(self._health_service)
            self._resources = resources.pop_all()
        _log.info("ready", models=[served.loaded.name for served in self._catalog])

    async def _open(self, resources: AsyncExitStack) -> None:
        """Open all that must be closed; the admin port early, so that probes are answered while the rest closes."""
        settings, telemetry = self._settings, self._telemetry
        self._loop = asyncio.get_running_loop()
        self._scheduler = Scheduler(
            bounds=Bounds(
                settings.max_pending,
                settings.max_pending_passes,
                settings.max_pending_mib * MIB,
                settings.deadline_margin,
            ),
            max_batch_size=settings.max_batch_size,
            max_queue_delay=settings.max_queue_delay_microseconds / 1e6,
            slots=settings.compute_slots or self._default_slots,
            observer=telemetry,
            on_failure=self._fail,
        )
        self._scheduler.start()
        resources.callback(self._scheduler.abandon)
        self._decoders = resources.enter_context(closing(Pool(settings.decode_threads, "decode")))
        self._describe()
        admin = resources.enter_context(closing(AdminServer(settings.admin_address, telemetry.registry, self._health)))
        watchdog = Watchdog(lambda: self._scheduler.silent_seconds, settings.watchdog_seconds, self._give_up)
        self._watchdog = resources.enter_context(closing(watchdog))
        self._tracing = Tracing(settings.tracing_endpoint)
        resources.push_async_callback(asyncio.to_thread, self._tracing.close)
        resources.push_async_callback(_cancel, asyncio.create_task(self._beat(), name="heartbeat"))
        resources.push_async_callback(self._store.close)  # also where opening it fails half-way
        await self._store.open()
        await self._serve(resources)
        _log.info("listening", address=self.address, admin_port=admin.port)

    async def stop(self) -> None:
        """Report NOT_SERVING, wait, refuse new requests, finish those in flight, close."""
        settings = self._settings
        async with self._resources:
            self._ready = False
            await self._health.publish_to(self._health_service)
            _log.info("draining", wait_seconds=settings.drain_wait_seconds, seconds=settings.drain_seconds)
            if not self.failed.is_set():
                await asyncio.sleep(settings.drain_wait_seconds)
            self._accepting = False
            self._draining.set()
            # gRPC's own stop drops calls that have arrived but not begun; until all others are answered, new ones are
            # told UNAVAILABLE instead.
            with suppress(TimeoutError):
                async with asyncio.timeout(settings.drain_seconds):
                    await self._interceptor.wait_until_idle()
                    await self._scheduler.close()
            await asyncio.sleep(_ARRIVALS_SECONDS)
        _log.info("stopped")

    async def _serve(self, resources: AsyncExitStack) -> None:
        settings = self._settings
        self._interceptor = RequestInterceptor(self._telemetry, lambda: self._accepting, self._tracing)
        server = grpc.aio.server(
            interceptors=[self._interceptor],
            options=_options(settings),
            maximum_concurrent_rpcs=_MAX_CALLS * settings.max_pending,
        )
        resources.push_async_callback(server.stop, _GRACE_SECONDS)
        explainer_service_pb2_grpc.add_ExplainerServiceServicer_to_server(self._servicer(), server)
        await self._health.publish_to(self._health_service)
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
        settings = self._settings
        models = self._catalog.facts
        concepts = ConceptUseCase(models, self._store)
        resolver = Resolver(
            models, concepts, ExplainLimits(settings.max_targets, settings.max_patches, settings.max_passes)
        )
        works = Works(self._catalog, self._telemetry)
        images = Images(self._scheduler, self._decoders, self._telemetry, works)
        limits = Limits(
            ImageLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels),
            max_targets=settings.max_targets,
            max_samples=settings.max_samples,
            max_concept_images=settings.max_concept_images,
        )
        budget = ByteBudget(settings.max_pending_mib * MIB)
        streams = StreamServer(self._telemetry, self._draining, max_items=settings.max_stream_items, budget=budget)
        register = RegisterUseCase(
            resolver, self._store, images, budget, most=max(1, settings.max_pending // _REGISTRATIONS)
        )
        evaluate = EvaluateUseCase(
            EvaluationTools(resolver, self._scheduler, self._decoders, self._telemetry, works),
            max_passes=settings.max_evaluation_passes,
            max_pending_passes=settings.max_pending_passes,
            most=max(1, settings.max_pending // _EVALUATIONS),
        )
        evaluations = StreamServer(
            self._telemetry,
            self._draining,
            max_items=settings.max_stream_items,
            budget=ByteBudget(settings.max_pending_mib * MIB // _EVALUATION_MEMORY),
        )
        return ExplainerServicer(
            models, ExplainUseCase(resolver, images), concepts, register, evaluate, limits, streams, evaluations
        )

    def _describe(self) -> None:
        """Metrics that say what this server is, and those that are asked for only when they are read."""
        telemetry, cache = self._telemetry, self._catalog.cache
        telemetry.pending.set_function(lambda: self._scheduler.waiting)
        telemetry.cache_bytes.set_function(lambda: 0 if cache is None else cache.bytes)
        if self._on_gpu:
            telemetry.device_memory.set_function(torch.cuda.memory_allocated)
        telemetry.build.info(
            {
                "version": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "timm": timm.__version__,
            }
        )
        for served in self._catalog:
            loaded = served.loaded
            telemetry.models.labels(loaded.name).info(
                {"architecture": loaded.architecture, "fingerprint": loaded.fingerprint}
            )

    @property
    def _default_slots(self) -> int:
        return _GPU_SLOTS if self._on_gpu else min(_MAX_CPU_SLOTS, torch.get_num_threads())

    @property
    def _on_gpu(self) -> bool:
        return any(next(served.loaded.module.parameters()).is_cuda for served in self._catalog)

    async def _beat(self) -> None:
        while True:
            self._heartbeat = monotonic()
            await self._health.publish_to(self._health_service)
            await asyncio.sleep(_HEARTBEAT_SECONDS)

    def _live(self) -> bool:
        """Whether the event loop turns and the workers work."""
        return monotonic() - self._heartbeat < _STALL_SECONDS and self._scheduler.alive

    def _give_up(self) -> None:
        """The computing stands still; called in the watchdog's thread."""
        seconds = self._settings.watchdog_seconds
        error = ServerFailedError(f"the computing has stood still for {seconds:g} s")
        _log.critical("stuck", seconds=seconds)
        with suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._scheduler.fail, error)

    def _fail(self, error: BaseException) -> None:
        _log.critical("failed", exc_info=error)
        self._ready = self._accepting = False
        self.failed.set()


async def _cancel(task: asyncio.Task[None]) -> None:
    """Cancel a task, and wait until it has ended."""
    task.cancel()
    await asyncio.wait([task])


def warn_of_unknown_variables() -> None:
    """Log the names of environment variables that were not read, with those that may have been meant."""
    unknown = unknown_variables()
    for name, similar in unknown.items():
        if similar:
            _log.warning("unknown environment variable", name=name, similar=similar)
    if others := [
        name for name, similar in unknown.items() if not similar
    ]:  # in one line: another program's, it may be
        _log.warning("unknown environment variables", names=others)


def load_catalog(settings: Settings) -> Catalog:
    """Load every model of the settings; all of them are looked at before the first one is built.

    Raises:
        LoadError: A model can't be loaded, none can be explained, or the device can't be used; the message says why.
    """
    specs = settings.specs()
    check_files(specs)
    check_explainable(specs)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = find_device(settings.device)
    cache = TokenCache(settings.token_cache_mib * MIB) if settings.token_cache_mib else None
    models: list[ServedModel] = []
    for number, spec in enumerate(specs, 1):
        _log.info("loading", model=spec.name, number=number, of=len(specs))
        loaded = load_model(spec, device=device)
        alike = [its for its in models if its.loaded.architecture == loaded.architecture]
        share_weights(loaded.module, [its.loaded.module for its in alike])
        served = ServedModel(
            loaded,
            precision=settings.precision,
            compiled_batch_sizes=_batch_sizes(settings) if settings.compile else (),
            cache=cache,
            trunk_of=next(filter(partial(_share_a_trunk, loaded), alike), None),
        )
        if served.trunk_of is not None:
            _log.info("shares its trunk", model=spec.name, with_model=served.trunk_of.loaded.name)
        if served.unsupported is not None:
            _log.warning("model can't be explained", model=spec.name, reason=str(served.unsupported))
        models.append(served)
    if all(served.unsupported is not None for served in models):
        raise none_explainable({served.loaded.name: str(served.unsupported) for served in models})
    return Catalog(models, cache)


def _share_a_trunk(loaded: LoadedModel, other: ServedModel) -> bool:
    """Whether a model may use another one's trunk: one of its own, and the same."""
    return (
        other.trunk_of is None
        and other.unsupported is None
        and (loaded.trunk_fingerprint == other.loaded.trunk_fingerprint)
    )


async def serve(settings: Settings, catalog: Catalog) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Raises:
        ServerFailedError: Nothing can be computed any more; those who waited have been told.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    application = Application(settings, catalog)
    stopping = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stopping.set)
    starting, told = asyncio.create_task(application.start()), asyncio.create_task(stopping.wait())
    await asyncio.wait((starting, told), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        _log.info("stopped before it was ready")
        await _cancel(starting)
        return
    await starting
    failed = asyncio.create_task(application.failed.wait())
    await asyncio.wait((told, failed), return_when=asyncio.FIRST_COMPLETED)
    await application.stop()
    if application.failed.is_set():
        raise ServerFailedError("the device is lost, or the computing stands still; the log says more")


@contextmanager
def serve_in_background(settings: Settings) -> Iterator[str]:
    """A server in a thread of this process, ready when the block is entered; yields its address."""
    catalog = load_catalog(settings)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="server", daemon=True)
    thread.start()
    try:
        application = Application(settings, catalog)
        asyncio.run_coroutine_threadsafe(application.start(), loop).result()
        try:
            yield application.address
        finally:
            asyncio.run_coroutine_threadsafe(application.stop(), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


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


def _batch_sizes(settings: Settings) -> tuple[int, ...]:
    """Powers of two up to the largest batch that there can be, and that one."""
    largest = min(settings.max_batch_size, settings.max_pending)
    return (*(1 << step for step in range((largest - 1).bit_length())), largest)


def _options(settings: Settings) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.so_reuseport", 0),  # a second server on the port is a mistake, not a share
        ("grpc.max_connection_age_ms", round(1000 * settings.max_connection_age_seconds)),
        # Peers that vanished without a word hold no stream open.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]
