"""Prometheus metrics; one object of each, in a registry of their own."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)

from cdam_server.compute.scheduling import Observer
from cdam_server.store.cache import StoreObserver

disable_created_metrics()  # type: ignore[no-untyped-call]  # as many lines again that nobody reads

# 1 ms to 30 s, each bucket 1.67 times the one before.
_SECONDS = tuple(round(0.001 * (30_000 ** (step / 20)), 6) for step in range(21))
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_SHARES = tuple(round(0.1 * step, 1) for step in range(1, 11))


class Telemetry(Observer, StoreObserver):
    """The metrics of one server.

    Attributes:
        registry: Where they are collected from.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.handled = Counter(
            "grpc_server_handled", "RPCs completed, by method and status code.", ["method", "code"], registry=registry
        )
        self.handling = Histogram(
            "grpc_server_handling_seconds",
            "Time from an RPC's arrival to its answer.",
            ["method"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.queue = Histogram(
            "cdam_queue_duration_seconds",
            "Time that requests waited for their batch.",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.compute = Histogram(
            "cdam_compute_duration_seconds",
            "Time in a stage: decode (of a request), trunk (of a batch), tail (of a batch, method by method), evaluate "
            "(of a batch of samples).",
            ["stage", "method", "model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "cdam_batch_size", "Images in a batch.", ["model"], buckets=_SIZES, registry=registry
        )
        self.batch_fill = Histogram(
            "cdam_batch_fill_ratio",
            "Images in a batch, as a share of the most that it may have now.",
            ["model"],
            buckets=_SHARES,
            registry=registry,
        )
        self.cache_hits = Counter(
            "cdam_token_cache_hits", "Images whose trunk did not run: it was known.", ["model"], registry=registry
        )
        self.cache_misses = Counter(
            "cdam_token_cache_misses", "Images whose trunk had to run.", ["model"], registry=registry
        )
        self.pending = Gauge("cdam_pending_requests", "Requests waiting for a batch.", registry=registry)
        self.failures = Counter(
            "cdam_request_failures", "Requests that were not answered with a map.", ["reason"], registry=registry
        )
        self.jobs_admitted = Counter("cdam_admitted", "Requests that were let into the queue.", registry=registry)
        self.jobs_refused = Counter(
            "cdam_refused",
            "Requests that were not: a bound was hit (jobs, cost, bytes), or the deadline could not be kept.",
            ["reason"],
            registry=registry,
        )
        self.jobs_dropped = Counter(
            "cdam_dropped",
            "Requests that were let in and not answered: expired or cancelled.",
            ["reason"],
            registry=registry,
        )
        self.cache_bytes = Gauge("cdam_token_cache_bytes", "Memory that the token cache takes.", registry=registry)
        self.device_memory = Gauge(
            "cdam_device_memory_bytes", "Memory of the GPU that is in use; 0 without one.", registry=registry
        )
        self.store = Histogram(
            "cdam_store_duration_seconds",
            "Time of an operation of the concepts' store, by its name and what came of it.",
            ["method", "code"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.store_up = Gauge("cdam_store_up", "1, or 0 while the concepts' store can't be reached.", registry=registry)
        self.store_up.set(1)
        self.concept_hits = Counter("cdam_concept_cache_hits", "Concepts looked up that were known.", registry=registry)
        self.concept_misses = Counter(
            "cdam_concept_cache_misses", "Concepts looked up that the store was asked for.", registry=registry
        )
        self.models = Info("cdam_model", "Models that are loaded.", ["model"], registry=registry)
        self.build = Info("cdam_build", "What this server is made of.", registry=registry)
        ProcessCollector(registry=registry)
        self._child = cache(_child)

    def observe_rpc(self, method: str, code: str, seconds: float) -> None:
        """Book an RPC that is answered."""
        self._child(self.handled, method, code).inc()
        self._child(self.handling, method).observe(seconds)

    def observe_request(self, model: str, decode_seconds: float, queue_seconds: float) -> None:
        """Book an image that is answered."""
        self._child(self.compute, "decode", "", model).observe(decode_seconds)
        self._child(self.queue, model).observe(queue_seconds)

    def admitted(self) -> None:
        """See `Observer`."""
        self.jobs_admitted.inc()

    def refused(self, reason: str) -> None:
        """See `Observer`."""
        self.jobs_refused.labels(reason).inc()

    def dropped(self, reason: str) -> None:
        """See `Observer`."""
        self.jobs_dropped.labels(reason).inc()

    def observe_store(self, operation: str, seconds: float, outcome: str) -> None:
        """See `StoreObserver`."""
        self.store.labels(operation, outcome).observe(seconds)

    def observe_store_cache(self, *, hit: bool) -> None:
        """See `StoreObserver`."""
        (self.concept_hits if hit else self.concept_misses).inc()

    def observe_store_up(self, *, up: bool) -> None:
        """See `StoreObserver`."""
        self.store_up.set(up)

    def observe_batch(
        self, model: str, size: int, fill: float, trunk_seconds: float, method_seconds: Mapping[str, float]
    ) -> None:
        """Book a batch that has been computed: once, however many requests share it."""
        self.batch_size.labels(model).observe(size)
        self.batch_fill.labels(model).observe(fill)
        if trunk_seconds:  # else no method asked for it
            self.compute.labels("trunk", "", model).observe(trunk_seconds)
        for method, seconds in method_seconds.items():
            self.compute.labels("tail", method, model).observe(seconds)

    def observe_evaluation(self, model: str, seconds: float) -> None:
        """Book a batch of samples that have been measured."""
        self.compute.labels("evaluate", "", model).observe(seconds)

    def observe_cache(self, model: str, *, hit: bool) -> None:
        """Book an image that was looked for in the token cache."""
        (self.cache_hits if hit else self.cache_misses).labels(model).inc()


def _child(metric: Any, *values: str) -> Any:
    """A metric with its labels, which takes longer to look up than to count with."""
    return metric.labels(*values)
