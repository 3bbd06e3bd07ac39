# ruff: noqa: N802 - the generated base class sets names
"""Tracing, by a real server of the API without a model and a real collector."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any

import grpc
import pytest
import structlog

from cdam.v1 import explain_pb2, explainer_service_pb2_grpc, model_pb2
from cdam_server.errors import InvalidArgumentError
from cdam_server.operation import otlp, tracing
from cdam_server.operation.telemetry import Telemetry
from cdam_server.operation.tracing import Tracing
from cdam_server.rpc.interceptors import RequestInterceptor
from collector import collecting

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
EXPLAIN = "cdam.v1.ExplainerService/Explain"
SERVER_KIND, INTERNAL_KIND = 2, 1


class Servicer(explainer_service_pb2_grpc.ExplainerServiceServicer):
    """Traces stages as the real one does, without the work."""

    async def Explain(self, request: Any, context: Any) -> explain_pb2.ExplainResponse:
        if request.model == "refuse":
            raise InvalidArgumentError("model", "is refused")
        if request.model == "crash":
            raise RuntimeError("a secret")
        started = perf_counter()
        await asyncio.sleep(0.01)
        tracing.stage("decode", started, 0.004, model=request.model)
        tracing.stage("trunk", started + 0.005, 0.003, batch_size=3)
        return explain_pb2.ExplainResponse(request_id=request.request_id)

    async def ListModels(self, request: Any, context: Any) -> model_pb2.ListModelsResponse:
        return model_pb2.ListModelsResponse()

    async def ExplainStream(self, requests: Any, context: Any) -> AsyncIterator[explain_pb2.ExplainStreamResponse]:
        async for _ in requests:
            tracing.stage("decode", perf_counter(), 0.001)
            yield explain_pb2.ExplainStreamResponse()


@asynccontextmanager
async def _served(endpoint: str) -> AsyncIterator[explainer_service_pb2_grpc.ExplainerServiceStub]:
    traced = Tracing(endpoint)
    server = grpc.aio.server(interceptors=[RequestInterceptor(Telemetry(), lambda: True, traced)])
    explainer_service_pb2_grpc.add_ExplainerServiceServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield explainer_service_pb2_grpc.ExplainerServiceStub(channel)
    finally:
        await server.stop(None)
        await asyncio.to_thread(traced.close)


def _traceparent(flags: str = "01") -> tuple[tuple[str, str], ...]:
    return (("traceparent", f"00-{TRACE}-{PARENT}-{flags}"), ("unrelated-bin", b"\xff"))  # type: ignore[return-value]


async def test_an_rpc_and_its_stages() -> None:
    with collecting() as collector, structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as log:
        before = time.time_ns()
        async with _served(collector.endpoint) as stub:
            await stub.Explain(explain_pb2.ExplainRequest(model="demo"), metadata=_traceparent())
        after = time.time_ns()
        rpc, decode, trunk = collector.wait_for(3)
    assert (rpc.name, decode.name, trunk.name) == (EXPLAIN, "decode", "trunk")
    assert {span.trace_id for span in (rpc, decode, trunk)} == {TRACE}
    assert (rpc.parent, decode.parent, trunk.parent) == (PARENT, rpc.span_id, rpc.span_id)
    assert (rpc.kind, decode.kind, trunk.kind) == (SERVER_KIND, INTERNAL_KIND, INTERNAL_KIND)
    assert not rpc.failed
    assert rpc.attributes == {"rpc.system.name": "grpc", "rpc.method": EXPLAIN, "rpc.response.status_code": "OK"}
    assert (decode.attributes, trunk.attributes) == ({"cdam.model": "demo"}, {"cdam.batch_size": 3})
    assert rpc.resource["service.name"] == "cdam-serve"
    # Epoch nanoseconds, and the stages where they belong within the RPC. The clocks may be set apart meanwhile, a little.
    assert before - 1e9 < rpc.start <= decode.start < trunk.start < trunk.end <= rpc.end < after + 1e9
    assert (decode.end - decode.start, trunk.end - trunk.start) == (4_000_000, 3_000_000)
    assert trunk.start - decode.start == pytest.approx(5_000_000, abs=1000)
    (line,) = (line for line in log if line["event"] == "rpc")
    assert (line["trace_id"], line["span_id"]) == (TRACE, rpc.span_id)


async def test_without_a_caller_every_rpc_is_a_trace_of_its_own() -> None:
    with collecting() as collector:
        async with _served(collector.endpoint) as stub:
            requests = [explain_pb2.ExplainRequest(model=str(number)) for number in range(8)]
            await asyncio.gather(*(stub.Explain(request) for request in requests))
            await stub.ListModels(model_pb2.ListModelsRequest(), metadata=(("traceparent", "00-nonsense"),))
        spans = collector.wait_for(8 * 3 + 1)
    rpcs = {span.span_id: span for span in spans if span.kind == SERVER_KIND}
    assert len({span.trace_id for span in rpcs.values()}) == len(rpcs) == 9
    assert all(span.parent == "" for span in rpcs.values())
    stages = [span for span in spans if span.kind == INTERNAL_KIND]
    assert all(rpcs[span.parent].trace_id == span.trace_id for span in stages)
    assert sorted(span.attributes["cdam.model"] for span in stages if span.name == "decode") == [*"01234567"]
    assert len({span.parent for span in stages}) == 8  # none went to another's request


async def test_a_stream_is_one_span() -> None:
    with collecting() as collector:
        async with _served(collector.endpoint) as stub:
            call = stub.ExplainStream(iter([explain_pb2.ExplainStreamRequest()] * 3), metadata=_traceparent())
            assert [answer async for answer in call]
        rpc, *stages = collector.wait_for(4)
    assert rpc.name == "cdam.v1.ExplainerService/ExplainStream"
    assert [(span.name, span.parent) for span in stages] == [("decode", rpc.span_id)] * 3


@pytest.mark.parametrize(
    ("model", "code", "failed"), [("refuse", "INVALID_ARGUMENT", False), ("crash", "INTERNAL", True)]
)
async def test_only_the_servers_failures_are_errors(model: str, code: str, failed: bool) -> None:
    with collecting() as collector:
        async with _served(collector.endpoint) as stub:
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Explain(explain_pb2.ExplainRequest(model=model))
        (rpc,) = collector.wait_for(1)
    assert (rpc.failed, rpc.attributes["rpc.response.status_code"]) == (failed, code)
    assert rpc.attributes.get("error.type") == (code if failed else None)
    assert "secret" not in str(rpc)


async def test_what_the_caller_does_not_sample_is_not_sent_but_logged() -> None:
    with collecting() as collector, structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as log:
        async with _served(collector.endpoint) as stub:
            await stub.Explain(explain_pb2.ExplainRequest(), metadata=_traceparent("00"))
            await stub.ListModels(model_pb2.ListModelsRequest())
        assert [span.name for span in collector.wait_for(1)] == ["cdam.v1.ExplainerService/ListModels"]
    assert next(line for line in log if line["event"] == "rpc")["trace_id"] == TRACE


async def test_opentelemetrys_own_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "maps")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=trial")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    with collecting() as collector:
        async with _served(collector.endpoint) as stub:
            await stub.ListModels(model_pb2.ListModelsRequest())
            await stub.ListModels(model_pb2.ListModelsRequest(), metadata=_traceparent())
        (rpc,) = collector.wait_for(1)
    assert (rpc.parent, rpc.resource["service.name"]) == (PARENT, "maps")
    assert rpc.resource["deployment.environment.name"] == "trial"


@pytest.mark.parametrize("silent", [False, True])
async def test_with_the_collector_away_all_goes_on(silent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "_FLUSH_SECONDS", 0.5)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1000")  # it would go on trying for longer than this test
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as port, structlog.testing.capture_logs() as log:
        endpoint = f"http://127.0.0.1:{port.getsockname()[1]}"
        if not silent:  # else it accepts connections, and never says a word
            port.close()
        async with _served(endpoint) as stub:
            for number in range(20):
                answer = await stub.Explain(explain_pb2.ExplainRequest(request_id=str(number)))
                assert answer.request_id == str(number)
                await asyncio.sleep(0.01)
    assert "the last spans were not sent" in {line["event"] for line in log}
    until = time.monotonic() + 15  # OpenTelemetry by itself would take 30 s
    while any(thread.name.startswith(("tracing", "Otel")) for thread in set(threading.enumerate()) - before):
        assert time.monotonic() < until
        await asyncio.sleep(0.05)


async def test_a_collector_that_comes_back_gets_what_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as port:
        number = port.getsockname()[1]
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    with structlog.testing.capture_logs() as log:
        async with _served(f"http://127.0.0.1:{number}") as stub:
            await stub.ListModels(model_pb2.ListModelsRequest())
            until = time.monotonic() + 30
            while not any(line["event"] == "tracing" for line in log):  # it has tried, and said so
                assert time.monotonic() < until
                await asyncio.sleep(0.02)
            with collecting(number) as collector:
                await asyncio.to_thread(collector.wait_for, 1)
    assert {line["log_level"] for line in log if line["event"] == "tracing"} == {"warning"}


def test_a_wrong_endpoint_is_named() -> None:
    with pytest.raises(ValueError, match=r"tracing_endpoint.*'collector:4317'"):
        Tracing("collector:4317")


def test_a_missing_extra_is_named() -> None:
    code = """
import sys
sys.modules["opentelemetry"] = None  # what `import` takes for not installed
from cdam_server.operation.tracing import Tracing
Tracing().close()
try:
    Tracing("http://localhost:4317")
except ValueError as error:
    print(error)
"""
    assert _python(code) == "opentelemetry is missing: install cdam-serve with its extra `tracing`"


def test_without_tracing_nothing_is_imported() -> None:
    code = """
import sys
from cdam_server.operation import tracing
from cdam_server.rpc import interceptors
off = tracing.Tracing()
span = off.start("cdam.v1.ExplainerService/Explain", (("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),))
tracing.stage("decode", 0.0, 1.0, model="demo")
span.end("OK", None)
off.close()
print(span is off.start("", None), [name for name in sys.modules if name.startswith("opentelemetry")])
"""
    assert _python(code) == "True []"


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
