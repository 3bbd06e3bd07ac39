"""Evaluations by both clients against real servers of the demo model: one, several, and some that go down."""

from __future__ import annotations

import asyncio
import io
import signal
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cdam
from calls import SAMPLES
from cdam._evaluate import Evaluate
from cdam.v1 import evaluation_pb2
from processes import ServerProcess, serving
from tables import assert_same

SCENES = [(SAMPLES / f"scene{number}.png").read_bytes() for number in range(1, 7)]
COUNT = 30
HOW: dict[str, Any] = {
    "methods": ["cdam", cdam.Attention(heads=(0,)), "mask"],
    "metrics": [
        cdam.Fidelity(points=3, unit="patch"),
        cdam.BoxSensitivity(box_sizes=(32,), boxes=8),
        "compactness",
        "mask_agreement",
        "localisation",
        "sparseness",
        "counterfactual",
    ],
    "seed": 11,
    "bootstrap_resamples": 200,
}


def sample(number: int) -> cdam.Sample:
    """A scene with some box for a mask, and without what is in the box."""
    rng = np.random.default_rng(number)
    top, left = rng.integers(0, 40, 2)
    mask = np.zeros((64, 64), bool)
    mask[top : top + 20, left : left + 20] = True
    with Image.open(io.BytesIO(SCENES[number % 6])) as scene:
        pixels = np.asarray(scene.convert("RGB")).copy()
    pixels[mask] = 127
    return cdam.Sample(f"scene {number}", SCENES[number % 6], number % 10, mask=mask, counterfactual=pixels)


def some(count: int) -> Iterator[cdam.Sample]:
    return map(sample, range(count))


Collect = Callable[..., tuple[dict[str, cdam.SampleResult], cdam.Table]]


@pytest.fixture(params=["blocking", "asyncio"])
def collect(request: pytest.FixtureRequest) -> Collect:
    """All of an evaluation, by a client of either kind; `each` is called with the number of results as they come."""

    def all_of(results: list[cdam.SampleResult], evaluation: Any) -> tuple[dict[str, cdam.SampleResult], cdam.Table]:
        assert len({result.id for result in results}) == len(results)
        return {result.id: result for result in results}, evaluation.table

    def blocking(address: str, samples: Any, *, each: Callable[[int], object] = str, **how: Any) -> Any:
        results = []
        with cdam.Client(address) as client, client.evaluate(samples, **HOW | how) as evaluation:
            for result in evaluation:
                results.append(result)
                each(len(results))
        return all_of(results, evaluation)

    def asynchronous(address: str, samples: Any, *, each: Callable[[int], object] = str, **how: Any) -> Any:
        async def run() -> Any:
            results = []
            async with (
                cdam.AsyncClient(address) as client,
                client.evaluate(samples, **HOW | how) as evaluation,
            ):
                async for result in evaluation:
                    results.append(result)
                    each(len(results))
            return all_of(results, evaluation)

        return asyncio.run(run())

    return blocking if request.param == "blocking" else asynchronous


@pytest.fixture(scope="module")
def expected(server_address: str) -> cdam.Table:
    """The table of all samples, of one server that is left in peace."""
    with cdam.Client(server_address) as client:
        client.wait_until_ready(60)
        evaluation = client.evaluate(some(COUNT), **HOW)
        assert [result.error for result in evaluation if result.error] == []
        return evaluation.table


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with serving(tmp_path / "log") as server:
        yield server


def test_the_table_is_the_servers(
    server_address: str, collect: Collect, expected: cdam.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[evaluation_pb2.EvaluateResponse] = []

    def parse(_: Evaluate, data: bytes) -> evaluation_pb2.EvaluateResponse:
        heard.append(evaluation_pb2.EvaluateResponse.FromString(data))
        return heard[-1]

    monkeypatch.setattr(Evaluate, "parse", parse)
    _, table = collect(server_address, some(COUNT))
    assert heard[0].WhichOneof("payload") == "started"
    assert heard[-1].WhichOneof("payload") == "table"
    assert_same(table, decoded(heard[-1].table), 1e-9)
    assert_same(table, expected, 1e-6)
    assert len(table.rows) == 3 * (5 + 2 + 1 + 4 + 5 + 1 + 4)
    assert len(table.comparisons) == 3 * (5 + 2 + 1 + 4 + 5 + 1 + 4)


def decoded(table: evaluation_pb2.EvaluationTable) -> cdam.Table:
    def optional(message: Any, name: str) -> float | None:
        return getattr(message, name) if message.HasField(name) else None

    return cdam.Table(
        rows=tuple(
            cdam.Row(
                *(row.method_index, row.metric_index, row.quantity, row.mean),
                *(optional(row, name) for name in ("standard_error", "interval_low", "interval_high")),
                row.samples,
            )
            for row in table.rows
        ),
        comparisons=tuple(
            cdam.Comparison(
                *(pair.method_index, pair.other_method_index, pair.metric_index, pair.quantity, pair.mean_difference),
                *(optional(pair, name) for name in ("interval_low", "interval_high")),
            )
            for pair in table.comparisons
        ),
        samples=table.samples,
        failures=table.failures,
    )


def test_every_metric_and_what_it_is_of(server_address: str) -> None:
    samples = [
        cdam.Sample("0", SCENES[0], "7", wrong_target=3, mask=sample(0).mask, counterfactual=sample(0).counterfactual),
        cdam.Sample("1", SCENES[0], cdam.Contrast(7, "3"), wrong_target="1", mask=sample(1).mask),
    ]
    told: list[cdam.EvaluationProgress] = []
    with cdam.Client(server_address) as client:
        metrics = [
            cdam.Fidelity(points=3),
            *(kind for kind in cdam.METRICS if kind not in {"fidelity", "counterfactual"}),
        ]
        first = client.evaluate(samples[:1], methods=["cdam", "input_x_gradient"], metrics="counterfactual")
        (result,) = first
        assert [value.quantity for value in result.result()] == ["true_change", "map_change", "sign_agreement"] * 2
        model = client.model()
        evaluation = client.evaluate(
            samples, methods="cdam", metrics=metrics, input_size=(64, 64), progress=told.append
        )
        results = list(evaluation)
    assert [result.error for result in results] == [None, None]
    assert [progress.done for progress in told] == [1, 2]
    assert evaluation.started is not None
    assert (evaluation.started.model, evaluation.started.fingerprint) == (model.name, model.fingerprint)
    protocol = evaluation.started.protocol
    assert protocol.methods == (cdam.Cdam(),)
    assert protocol.metrics[0] == cdam.Fidelity(unit="pixel", blur_sigma=14, points=3, enlargement="bilinear")
    assert [metric.kind for metric in protocol.metrics] == [kind for kind in cdam.METRICS if kind != "counterfactual"]
    assert (protocol.seed, protocol.input_size, protocol.bootstrap_resamples) == (0, (64, 64), 1000)
    for result in results:
        assert all(np.isfinite(value.value) for value in result.values)
        curves = {value.quantity: value.curve for value in result.values if value.curve is not None}
        assert {"a_mif", "a_lif", "box_area", "insertion", "deletion", "randomisation_mean"} <= set(curves)
        np.testing.assert_array_equal(curves["a_mif"][0], [0, 50, 100])
        assert all(a <= b for a, b in pairwise(curves["insertion"][0]))


def test_a_sample_that_lacks_something_fails_alone(server_address: str, collect: Collect) -> None:
    bare = cdam.Sample("bare", SCENES[0], 7)
    unknown = cdam.Sample("unknown", SCENES[0], "unicorn", mask=sample(0).mask, counterfactual=SCENES[1])
    small = cdam.Sample("small", SCENES[0], 7, mask=np.ones((3, 3), bool), counterfactual=SCENES[1])
    broken = cdam.Sample("broken", SCENES[0][:200], 7)
    results, table = collect(server_address, [bare, sample(0), unknown, small, sample(1), broken])
    errors = {name: result.error for name, result in results.items() if result.error}
    assert {name: type(error) for name, error in errors.items()} == {
        "bare": cdam.InvalidArgument,
        "unknown": cdam.NotFound,
        "small": cdam.InvalidArgument,
        "broken": cdam.InvalidArgument,
    }
    assert (table.samples, table.failures) == (2, 4)


def test_two_servers_come_to_the_same(
    server_address: str, server: ServerProcess, collect: Collect, expected: cdam.Table
) -> None:
    results, table = collect(server_address, some(COUNT), servers=[server.address], window=4)
    assert [result.error for result in results.values() if result.error] == []
    assert_same(table, expected, 1e-6)
    (line,) = (line for line in server.log_lines() if line.get("method") == "Evaluate")
    assert line["code"] == "OK"
    assert 0 < int(str(line["items"])) < COUNT


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_that_ends_in_the_middle_changes_nothing(
    server_address: str, server: ServerProcess, collect: Collect, expected: cdam.Table, how: signal.Signals
) -> None:
    def end_it(results: int) -> None:
        if results == 10:
            server.process.send_signal(how)

    results, table = collect(server.address, some(COUNT), servers=[server_address], window=4, each=end_it)
    assert server.process.wait(timeout=60) == (0 if how is signal.SIGTERM else -signal.SIGKILL)
    assert [result.error for result in results.values() if result.error] == []
    assert_same(table, expected, 1e-6)


def test_a_cut_evaluation_goes_on_at_another_server(
    server_address: str, server: ServerProcess, collect: Collect, expected: cdam.Table
) -> None:
    """As behind a load balancer: one address, of which the server that answers changes."""

    def kill_it(results: int) -> None:
        if results == 10:
            server.process.kill()

    results, table = collect(f"ipv4:{server.address},{server_address}", some(COUNT), window=4, each=kill_it)
    assert [result.error for result in results.values() if result.error] == []
    assert_same(table, expected, 1e-6)
