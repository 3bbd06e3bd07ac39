"""What computes: the models, the scheduler, and who watches over them."""

import asyncio
import gc
import platform
from collections.abc import Callable
from contextlib import AsyncExitStack, closing, suppress
from typing import Final

import structlog
import timm
import torch

from cdam import __version__
from cdam_server.compute.concurrency import LongRequests
from cdam_server.compute.local import LocalCompute
from cdam_server.compute.models import Catalog
from cdam_server.compute.scheduling import Bounds, Scheduler
from cdam_server.compute.warmup import warm_up
from cdam_server.operation.telemetry import Telemetry
from cdam_server.operation.watchdog import Watchdog
from cdam_server.processes.failure import ServerFailedError
from cdam_server.settings.config import MIB, Settings

SWITCH_SECONDS: Final = 0.0005
"""Between two threads that want the interpreter: the event loop and the workers do in turns, hundreds of times a batch."""

# Batches at once on a GPU: one is staged while another is computed. On a CPU, whose cores are better used by several
# than by one: at most so many, each with a core of its own.
_GPU_SLOTS: Final = 2
_MAX_CPU_SLOTS: Final = 4

_log = structlog.get_logger("cdam.server")


def settle() -> None:
    """Have garbage collections pass over what there is now, as it lives as long as the process: each stops all threads while it looks."""
    gc.collect()
    gc.freeze()


class ComputeHost:
    """What computes on one device; `open`, then `warm_up`, both in one event loop.

    Args:
        settings: The settings.
        catalog: The models, loaded.
        telemetry: Metrics.
        on_failure: Called once, in the event loop, when nothing can be computed any more.

    Attributes:
        catalog: As given.
        scheduler: Where work goes, once open.
        compute: What use cases ask, once open.
    """

    scheduler: Scheduler
    compute: LocalCompute

    def __init__(
        self, settings: Settings, catalog: Catalog, telemetry: Telemetry, on_failure: Callable[[BaseException], None]
    ) -> None:
        self.catalog = catalog
        self._settings = settings
        self._telemetry = telemetry
        self._on_failure = on_failure

    def open(self, resources: AsyncExitStack) -> None:
        """Start the workers; what must be closed goes to the resources."""
        settings = self._settings
        self._loop = asyncio.get_running_loop()
        self.scheduler = Scheduler(
            bounds=Bounds(
                settings.max_pending,
                settings.max_pending_passes,
                settings.max_pending_mib * MIB,
                settings.deadline_margin,
            ),
            max_batch_size=settings.max_batch_size,
            max_queue_delay=settings.max_queue_delay_microseconds / 1e6,
            slots=settings.compute_slots or self._default_slots,
            observer=self._telemetry,
            on_failure=self._on_failure,
        )
        self.scheduler.start()
        resources.callback(self.scheduler.abandon)
        watchdog = Watchdog(lambda: self.scheduler.silent_seconds, settings.watchdog_seconds, self._give_up)
        self._watchdog = resources.enter_context(closing(watchdog))
        limits = LongRequests(settings.max_pending)
        self.compute = LocalCompute(self.scheduler, self.catalog, self._telemetry, limits)
        self._describe()

    async def warm_up(self) -> None:
        """Compute every model's batches once; only then is it watched, as compiling is silent for minutes.

        Raises:
            ValueError: A model can't be used.
        """
        await warm_up(self.catalog, self.scheduler, min(self._settings.max_batch_size, self._settings.max_pending))
        self._watchdog.start()
        self._telemetry.jobs_admitted.reset()  # without those of the warm-up

    def _describe(self) -> None:
        """Metrics that say what computes, and those that are asked for only when they are read."""
        telemetry, cache = self._telemetry, self.catalog.cache
        telemetry.pending.set_function(lambda: self.scheduler.waiting)
        telemetry.cache_bytes.set_function(lambda: 0 if cache is None else cache.bytes)
        _log.info("device", device=str(self._device))
        if self._on_gpu:
            telemetry.device_memory.set_function(torch.cuda.memory_allocated)
        telemetry.build.info(
            {
                "version": __version__,
                "python": platform.python_version(),
                "torch": str(torch.__version__),  # a class of torch's own
                "timm": timm.__version__,
            }
        )
        for served in self.catalog:
            loaded = served.loaded
            telemetry.models.labels(loaded.name).info(
                {"architecture": loaded.architecture, "fingerprint": loaded.fingerprint}
            )

    @property
    def _default_slots(self) -> int:
        return _GPU_SLOTS if self._on_gpu else min(_MAX_CPU_SLOTS, torch.get_num_threads())

    @property
    def _device(self) -> torch.device:
        """All models are on one."""
        return next(next(iter(self.catalog)).loaded.module.parameters()).device

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    def _give_up(self) -> None:
        """The computing stands still; called in the watchdog's thread."""
        seconds = self._settings.watchdog_seconds
        error = ServerFailedError(f"the computing has stood still for {seconds:g} s")
        _log.critical("stuck", seconds=seconds)
        with suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self.scheduler.fail, error)
