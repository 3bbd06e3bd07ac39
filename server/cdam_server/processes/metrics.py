"""The metrics of all processes of a server as one page."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple, Protocol, TypeAlias

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

# How values of several processes become one; sums elsewhere.
_SMALLEST: Final = {"cdam_store_up", "process_start_time_seconds"}
_LARGEST: Final = {"process_max_fds"}
# What a process had counted still counts when it is dead.
_LASTING: Final = {"counter", "histogram"}


class Family(NamedTuple):
    """What a process says of one metric, in plain values: samples by name and labels."""

    name: str
    documentation: str
    type: str
    samples: dict[tuple[str, tuple[tuple[str, str], ...]], float]


Page: TypeAlias = list[Family]


class Process(Protocol):
    """Who has metrics."""

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""


def snapshot(registry: CollectorRegistry) -> Page:
    """What a registry collects now."""
    return [
        Family(
            metric.name,
            metric.documentation,
            metric.type,
            {
                (sample.name, tuple((key, str(value)) for key, value in sample.labels.items())): float(sample.value)
                for sample in metric.samples
            },
        )
        for metric in registry.collect()
        if metric.type != "info" or any(sample.labels for sample in metric.samples)  # else nothing was said yet
    ]


def merge(pages: Iterable[Page]) -> Page:
    """One page of several."""
    families: dict[str, Family] = {}
    for page in pages:
        for family in page:
            merged = families.setdefault(family.name, family._replace(samples={}))
            combine = _combine(family)
            for key, value in family.samples.items():
                merged.samples[key] = combine(merged.samples[key], value) if key in merged.samples else value
    return list(families.values())


class MergedMetrics(CollectorRegistry):
    """The page of all processes.

    Args:
        gather: Asks every process; returns who it is, and its page, or None if it does not say.
        own: Metrics of this process.
    """

    def __init__(
        self, gather: Callable[[], Sequence[tuple[Process, Page | None]]], own: CollectorRegistry | None = None
    ) -> None:
        super().__init__()
        self._gather = gather
        self._own = own
        self._lock = threading.Lock()  # a process may die while it is asked
        self._last: dict[Process, Page] = {}
        self._dead: Page = []
        self.register(_Collector(self._merged))

    def keep(self, process: Process) -> None:
        """The process is dead: what it had counted when it was last asked still counts."""
        with self._lock:
            kept = [family for family in self._last.pop(process, []) if family.type in _LASTING]
            self._dead = merge([self._dead, kept])

    def _merged(self) -> Page:
        pages = self._gather()
        with self._lock:
            for process, page in pages:
                if page is not None and process.alive:
                    self._last[process] = page
            own = [] if self._own is None else snapshot(self._own)
            return merge([own, *self._last.values(), self._dead])


class _Collector(Collector):
    def __init__(self, page: Callable[[], Page]) -> None:
        self._page = page

    def collect(self) -> Iterable[Metric]:
        """See `Collector`."""
        for family in self._page():
            metric = Metric(family.name, family.documentation, family.type)
            for (name, labels), value in family.samples.items():
                metric.add_sample(name, dict(labels), value)
            yield metric

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering asks nobody."""
        return []


def _combine(family: Family) -> Callable[[float, float], float]:
    if family.name in _SMALLEST:
        return min
    if family.name in _LARGEST or family.type == "info":
        return max
    return lambda one, other: one + other
