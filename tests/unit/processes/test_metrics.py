"""One page of several processes: sums where sums are meant, and nothing that was counted is lost with a process."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from cdam_server.processes.metrics import MergedMetrics, Page, snapshot


def _process(calls: int, *, up: int) -> CollectorRegistry:
    registry = CollectorRegistry()
    counter = Counter("calls", "Calls.", ["code"], registry=registry)
    counter.labels("OK").inc(calls)
    Gauge("cdam_pending_requests", "Waiting.", registry=registry).set(calls)
    Gauge("cdam_store_up", "Up.", registry=registry).set(up)
    histogram = Histogram("seconds", "Time.", buckets=(1, 2), registry=registry)
    for _ in range(calls):
        histogram.observe(1.5)
    Info("build", "What.", registry=registry).info({"version": "1"})
    Info("model", "Which.", registry=registry)  # of which nothing is known here
    return registry


@dataclass(eq=False)
class _Its:
    alive: bool = True


def _values(merged: MergedMetrics) -> dict[str, float]:
    lines = generate_latest(merged).decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_a_page_of_two() -> None:
    pages = {_Its(): snapshot(_process(3, up=1)), _Its(): snapshot(_process(4, up=0))}
    found = _values(MergedMetrics(lambda: list(pages.items())))
    assert found['calls_total{code="OK"}'] == 7
    assert found["cdam_pending_requests"] == 7
    assert found["cdam_store_up"] == 0
    assert (found['seconds_bucket{le="1.0"}'], found['seconds_bucket{le="2.0"}'], found["seconds_count"]) == (0, 7, 7)
    assert found["seconds_sum"] == 7 * 1.5
    assert found['build_info{version="1"}'] == 1
    assert "model_info" not in found


def test_the_page_has_what_is_of_this_process_alone() -> None:
    own = CollectorRegistry()
    Gauge("cdam_processes", "There.", ["kind"], registry=own).labels("compute").set(2)
    pages = [(_Its(), snapshot(_process(3, up=1)))]
    merged = MergedMetrics(lambda: pages, own)
    assert _values(merged)['cdam_processes{kind="compute"}'] == 2
    assert _values(merged)['calls_total{code="OK"}'] == 3


def test_what_a_dead_process_counted_still_counts() -> None:
    other = _Its()
    pages: dict[_Its, Page | None] = {_Its(): snapshot(_process(3, up=1)), other: snapshot(_process(4, up=1))}
    merged = MergedMetrics(lambda: list(pages.items()))
    _values(merged)
    other.alive = False
    merged.keep(other)
    pages[_Its()] = snapshot(_process(1, up=1))
    del pages[other]
    found = _values(merged)
    assert found['calls_total{code="OK"}'] == 3 + 4 + 1
    assert found["seconds_count"] == 3 + 4 + 1
    assert found["cdam_pending_requests"] == 3 + 1  # nobody waits for the dead


def test_a_process_that_does_not_answer_counts_with_what_it_said() -> None:
    other = _Its()
    pages: dict[_Its, Page | None] = {_Its(): snapshot(_process(3, up=1)), other: snapshot(_process(4, up=1))}
    merged = MergedMetrics(lambda: list(pages.items()))
    before = _values(merged)
    pages[other] = None
    assert _values(merged) == before


def test_a_process_that_dies_while_all_are_asked_counts_once() -> None:
    other = _Its()
    pages: dict[_Its, Page | None] = {_Its(): snapshot(_process(3, up=1)), other: snapshot(_process(4, up=1))}

    def gather() -> list[tuple[_Its, Page | None]]:
        answers = list(pages.items())
        if len(asked) == 1:
            other.alive = False
            merged.keep(other)
        asked.append(len(answers))
        return answers

    asked: list[int] = []
    merged = MergedMetrics(gather)
    before = _values(merged)['calls_total{code="OK"}']
    for _ in range(2):
        assert _values(merged)['calls_total{code="OK"}'] == before == 7
