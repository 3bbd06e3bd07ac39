"""Where objects meet: settings in, a running server out."""

import asyncio
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from time import monotonic, perf_counter

import grpc
import numpy as np
import structlog
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cdam.v1 import explainer_service_pb2, explainer_service_pb2_grpc
from cdam_engine import Cdam, Concept, Explanation, TokenCache, TopK
from cdam_server.admin import AdminServer
from cdam_server.config import MIB, Settings, unknown_variables
from cdam_server.explain import ExplainUseCase
from cdam_server.loading import load_model
from cdam_server.models import Bucket, Catalog, Job, NonFiniteError, ServedModel
from cdam_server.rpc.decode import Limits
from cdam_server.rpc.images import ImageLimits
from cdam_server.rpc.interceptors import RequestInterceptor
from cdam_server.rpc.servicer import ExplainerServicer
from cdam_server.scheduling import Batcher
from cdam_server.telemetry import Telemetry

SERVICE = explainer_service_pb2.DESCRIPTOR.services_by_name["ExplainerService"].full_name
_DECODERS = 4
_HEARTBEAT_SECONDS = 1.0
_LAST_CALL_SECONDS = 1.0
_log = structlog.get_logger("cdam.server")


class Application:
    """A server with its parts; `start`, then `stop`, both in one event loop.

    Args:
        settings: The settings.
        catalog: The models, loaded.

    Attributes:
        address: Where the API is served, once started.
    """

    def __init__(self, settings: Settings, catalog: Catalog) -> None:
        self._settings = settings
        self._catalog = catalog
        self._telemetry = Telemetry()
        self._ready = False
        self._warm = False
        self._heartbeat = monotonic()
        self.address = ""

    async def start(self) -> None:
        """Open the ports, warm the models up, and only then report ready.

        Raises:
            OSError: A port is taken.
        """
        settings, telemetry = self._settings, self._telemetry
        probes = {"/livez": self._live, "/readyz": lambda: self._ready}
        self._admin = AdminServer(settings.admin_address, telemetry.registry, probes)
        self._batcher: Batcher[Bucket, Job, Explanation] = Batcher(
            self._compute,
            max_batch_size=settings.max_batch_size,
            max_queue_delay=settings.max_queue_delay_microseconds / 1e6,
            max_pending=settings.max_pending,
        )
        telemetry.pending.set_function(lambda: self._batcher.pending)
        self._decoders = ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode")
        self._batcher.start()
        self._pulse = asyncio.create_task(self._beat(), name="heartbeat")
        await self._serve()
        _log.info("listening", address=self.address, admin_port=self._admin.port)
        await self._warm_up()
        self._ready = True
        for service in ("", SERVICE):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        _log.info("ready", models=[served.loaded.name for served in self._catalog])

    async def stop(self) -> None:
        """Report NOT_SERVING, refuse new requests, finish those in flight, close."""
        self._ready = False
        await self._health.enter_graceful_shutdown()
        _log.info("draining", seconds=self._settings.drain_seconds)
        # gRPC's own stop drops calls that have arrived but not begun; until all others are answered, new ones are
        # told UNAVAILABLE instead.
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_seconds):
                await self._interceptor.wait_until_idle()
                await self._batcher.close()
        await self._server.stop(grace=_LAST_CALL_SECONDS)
        self._batcher.abandon()
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._pulse.cancel()
        self._admin.close()
        _log.info("stopped")

    async def _serve(self) -> None:
        settings = self._settings
        self._interceptor = RequestInterceptor(self._telemetry, lambda: self._ready)
        self._server = grpc.aio.server(
            interceptors=[self._interceptor],
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_send_message_length", settings.max_message_bytes),
                ("grpc.so_reuseport", 0),  # a second server on the port is a mistake, not a share
            ],
        )
        explain = ExplainUseCase(
            self._catalog,
            self._batcher,
            self._decoders,
            self._telemetry,
            max_targets=settings.max_targets,
            max_patches=settings.max_patches,
            max_passes=settings.max_passes,
        )
        limits = Limits(
            ImageLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels),
            max_targets=settings.max_targets,
            max_samples=settings.max_samples,
        )
        explainer_service_pb2_grpc.add_ExplainerServiceServicer_to_server(
            ExplainerServicer(explain, limits), self._server
        )
        self._health = health.aio.HealthServicer()
        for service in ("", SERVICE):
            await self._health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        try:
            port = self._server.add_insecure_port(settings.address)
        except RuntimeError as error:
            raise OSError(f"can't listen on {settings.address} (address): is another server there?") from error
        host = settings.address.rpartition(":")[0]
        self.address = settings.address if settings.address.startswith("unix:") else f"{host}:{port}"
        await self._server.start()

    async def _warm_up(self) -> None:
        """Every model's batches, so that no caller pays for lazy initialisation, or for compiling."""
        for served in self._catalog:
            name = served.loaded.name
            if served.unsupported is not None:
                _log.warning("model can't be explained", model=name, reason=str(served.unsupported))
                continue
            started = perf_counter()
            bucket = Bucket(name, served.loaded.data_config.input_size)
            if served.compiled_batch_sizes:
                _log.info("compiling", model=name, batch_sizes=served.compiled_batch_sizes)
            try:
                for size in served.compiled_batch_sizes or (1,):
                    # Jobs that are submitted at once share a batch.
                    await asyncio.gather(*(self._batcher.submit(bucket, job) for job in _warm_up_jobs(served, size)))
            except NonFiniteError as error:
                raise ValueError(f"model {name!r} can't be used: {error}") from error
            except RuntimeError as error:
                if not served.compiled_batch_sizes:
                    raise
                reason = str(error).strip().partition("\n")[0]
                raise ValueError(f"model {name!r} can't be compiled (compile): {reason}") from error
            if served.explainer.cache is not None:
                served.explainer.cache.clear()
            self._telemetry.models.labels(name).info(
                {"architecture": served.loaded.architecture, "fingerprint": served.loaded.fingerprint}
            )
            _log.info("warm", model=name, seconds=round(perf_counter() - started, 3))
        self._warm = True

    def _compute(self, bucket: Bucket, jobs: Sequence[Job]) -> list[Explanation | Exception]:
        """One batch, booked once; called in the batcher's thread."""
        answers = self._catalog.compute(bucket, jobs)
        explained = next((answer for answer in answers if isinstance(answer, Explanation)), None)
        if self._warm and explained is not None:  # each explanation knows the whole batch's times
            self._telemetry.observe_batch(bucket.model, len(jobs), explained.trunk_seconds, explained.method_seconds)
        if self._warm and self._settings.token_cache_mib:
            for job, answer in zip(jobs, answers, strict=True):
                if isinstance(answer, Explanation) and any(method.reads_tokens for method in job.methods):
                    self._telemetry.observe_cache(bucket.model, hit=answer.token_cache_hit)
        return answers

    async def _beat(self) -> None:
        while True:
            self._heartbeat = monotonic()
            await asyncio.sleep(_HEARTBEAT_SECONDS)

    def _live(self) -> bool:
        """Whether the event loop turns and the batcher works."""
        return monotonic() - self._heartbeat < 10 * _HEARTBEAT_SECONDS and self._batcher.alive


def warn_of_unknown_variables() -> None:
    """Log the names of environment variables that were not read, each with the one that may have been meant."""
    for name, similar in unknown_variables().items():
        _log.warning("unknown environment variable", name=name, **({"similar": similar} if similar else {}))


def load_catalog(settings: Settings) -> Catalog:
    """Load every model of the settings.

    Raises:
        LoadError: A model can't be loaded; the message says why.
        ValueError: The device does not exist.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = _device(settings.device)
    cache = TokenCache(settings.token_cache_mib * MIB) if settings.token_cache_mib else None
    models = []
    for spec in settings.specs():
        _log.info("loading", model=spec.name)
        served = ServedModel(
            load_model(spec, device=device),
            precision=settings.precision,
            compiled_batch_sizes=_batch_sizes(settings) if settings.compile else (),
            cache=cache,
        )
        models.append(served)
    return Catalog(models)


async def serve(settings: Settings, catalog: Catalog) -> None:
    """Serve until SIGTERM or SIGINT, then drain."""
    application = Application(settings, catalog)
    stopping = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stopping.set)
    await application.start()
    await stopping.wait()
    await application.stop()


@contextmanager
def serve_in_background(settings: Settings) -> Iterator[str]:
    """A server in a thread of this process, ready when the block is entered; yields its address."""
    catalog = load_catalog(settings)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="server", daemon=True)
    thread.start()
    application = Application(settings, catalog)
    try:
        asyncio.run_coroutine_threadsafe(application.start(), loop).result()
        try:
            yield application.address
        finally:
            asyncio.run_coroutine_threadsafe(application.stop(), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _batch_sizes(settings: Settings) -> tuple[int, ...]:
    """Powers of two up to the largest batch that there can be, and that one."""
    largest = min(settings.max_batch_size, settings.max_pending)
    return (*(1 << step for step in range((largest - 1).bit_length())), largest)


def _warm_up_jobs(served: ServedModel, count: int) -> Iterator[Job]:
    """Jobs with pictures of noise, none like the other: equal ones would be computed once."""
    height, width = served.loaded.data_config.input_size
    noise = np.random.default_rng(count).integers(0, 256, (count, height, width, 3), np.uint8)
    has_outputs = served.loaded.output_count > 0
    target = TopK(1) if has_outputs else Concept(torch.ones(served.explainer.vit.latent_size))
    return (Job(pixels, (target,), (Cdam(),)) for pixels in noise)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} can't be used: {str(error).splitlines()[0]}") from error
    return device
