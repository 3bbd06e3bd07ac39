"""`cdam serve --tracing-endpoint`: spans of real work at a real collector."""

from __future__ import annotations

import itertools
from importlib.resources import files
from pathlib import Path

import grpc
import pytest

from calls import output, request
from cdam.v1 import explainer_service_pb2_grpc
from collector import collecting
from processes import free_ports, serving

SCENE = (files("cdam_server.demo") / "assets" / "samples" / "scene1.png").read_bytes()
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_an_explanation_and_its_stages(tmp_path: Path) -> None:
    with collecting() as collector:
        with serving(tmp_path / "log", "--tracing-endpoint", collector.endpoint) as server:
            with grpc.insecure_channel(server.address) as channel:
                stub = explainer_service_pb2_grpc.ExplainerServiceStub(channel)
                metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
                answer = stub.Explain(request(SCENE, output(3), request_id="abc"), metadata=metadata)
            server.process.terminate()  # the last spans are sent at the end
            assert server.process.wait(timeout=60) == 0
        spans = {span.name: span for span in collector.wait_for(5)}
    rpc = spans.pop("cdam.v1.ExplainerService/Explain")
    assert (rpc.trace_id, rpc.parent, rpc.failed) == (TRACE, PARENT, False)
    assert sorted(spans) == ["decode", "queue", "tail", "trunk"]
    for name, span in spans.items():
        assert (span.trace_id, span.parent) == (TRACE, rpc.span_id)
        assert rpc.start <= span.start <= span.end <= rpc.end
        assert span.end - span.start == pytest.approx(getattr(answer.timing, name).ToNanoseconds(), abs=2000)
    stages = sorted(spans.values(), key=lambda span: span.start)
    assert all(first.end <= second.start + 1000 for first, second in itertools.pairwise(stages))
    (line,) = (line for line in server.log_lines() if line["event"] == "rpc")
    assert (line["request_id"], line["trace_id"], line["span_id"]) == ("abc", TRACE, rpc.span_id)


def test_without_a_collector_requests_are_served_and_the_end_is_orderly(tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{free_ports(1)[0]}"
    with serving(tmp_path / "log", "--tracing-endpoint", endpoint) as server:
        with grpc.insecure_channel(server.address) as channel:
            stub = explainer_service_pb2_grpc.ExplainerServiceStub(channel)
            for _ in range(3):
                assert stub.Explain(request(SCENE, output(3))).maps
        server.process.terminate()
        assert server.process.wait(timeout=60) == 0
    events = [line["event"] for line in server.log_lines()]  # JSON throughout
    assert events[-1] == "stopped"
    assert "the last spans were not sent" in events
