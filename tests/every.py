"""Every method and every metric of the engine: a new one is in every test that takes its list from here."""

from __future__ import annotations

from cdam_engine import METHODS, IntegratedCdam, IntegratedGradients, Method, SmoothCdam, SmoothGrad
from cdam_engine.evaluation import METRICS, Metric


def metrics(*chosen: Metric) -> tuple[Metric, ...]:
    """One of each kind, in the order of METRICS: these, and the others as they are by default."""
    every = {kind: metric() for kind, metric in METRICS.items()} | {metric.kind: metric for metric in chosen}
    return tuple(every.values())


def short_methods() -> dict[str, Method]:
    """One of each kind, of few draws and steps."""
    short = (SmoothCdam(samples=4), IntegratedCdam(steps=4), SmoothGrad(samples=4), IntegratedGradients(steps=4))
    return {kind: method() for kind, method in METHODS.items()} | {method.kind: method for method in short}
