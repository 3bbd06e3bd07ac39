"""SIGTERM under load: what was let in is answered, what comes later is refused, the exit code is 0."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections import Counter
from importlib.resources import files
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from calls import method
from cdam.v1 import common_pb2, explain_pb2, explainer_service_pb2_grpc, target_pb2
from faults.callers import Innocents, noise, raw_request
from processes import ServerProcess, serving

SCENE = (files("cdam_server.demo") / "assets" / "samples" / "scene1.png").read_bytes()


def test_sigterm_under_load(tmp_path: Path) -> None:
    target = target_pb2.Target(top_k=target_pb2.TopKTarget(k=3))
    request = explain_pb2.ExplainRequest(image=common_pb2.Image(encoded=SCENE), targets=[target])
    codes: Counter[str] = Counter()
    stop = threading.Event()
    with serving(tmp_path / "log") as server, grpc.insecure_channel(server.address) as channel:
        stub = explainer_service_pb2_grpc.ExplainerServiceStub(channel)

        def call() -> None:
            while not stop.is_set():
                try:
                    stub.Explain(request, timeout=30)
                    codes["OK"] += 1
                except grpc.RpcError as error:
                    codes[error.code().name] += 1
                    time.sleep(0.05)

        callers = [threading.Thread(target=call) for _ in range(8)]
        for caller in callers:
            caller.start()
        while codes["OK"] < 20:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(timeout=60)
        stop.set()
        for caller in callers:
            caller.join()
    assert code == 0
    # gRPC itself cancels calls that arrive in the very moment of closing; none of those was let in.
    assert set(codes) <= {"OK", "UNAVAILABLE", "CANCELLED"}, codes
    assert server.log_lines()[-1]["event"] == "stopped"
    calls = [line["code"] for line in server.log_lines() if line["event"] == "rpc"]
    assert set(calls) <= {"OK", "UNAVAILABLE"}
    assert calls.count("OK") == codes["OK"]


def test_sigterm_during_the_warm_up(tmp_path: Path) -> None:
    flags = ("--model", "vit_base_patch16_224", "--random-weights", "--max-batch-size", "256")
    server = ServerProcess(tmp_path / "log", *flags)
    try:
        until = time.monotonic() + 120
        while not any(line["event"] == "warming up" for line in server.log_lines()):
            assert time.monotonic() < until
            time.sleep(0.1)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0
        assert "ready" not in [line["event"] for line in server.log_lines()]
    finally:
        server.process.kill()
        server.process.wait()


def test_sigterm_while_loading(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "log", "--model", "vit_large_patch16_224", "--random-weights")
    try:
        time.sleep(5)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) in (0, -signal.SIGTERM)  # the latter before the command has begun
    finally:
        server.process.kill()
        server.process.wait()


def test_abandoned_work_does_not_outlast_the_drain(tmp_path: Path) -> None:
    target = target_pb2.Target(top_k=target_pb2.TopKTarget(k=10))
    size = common_pb2.Size(height=768, width=768)
    request = explain_pb2.ExplainRequest(
        image=common_pb2.Image(encoded=SCENE),
        targets=[target],
        preprocessing=common_pb2.Preprocessing(input_size=size),
    )
    flags = ("--drain-seconds", "1", "--max-patches", "40000")
    with serving(tmp_path / "log", *flags) as server, grpc.insecure_channel(server.address) as channel:
        call = explainer_service_pb2_grpc.ExplainerServiceStub(channel).Explain.future(request, timeout=60)
        time.sleep(2)  # it is being computed now, for the better part of a minute
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=20) == 0
        assert call.exception() is not None


def test_a_drain_that_waits_for_clients_to_notice(tmp_path: Path) -> None:
    """Until the wait is over all is served but readiness; then what was begun is finished, and open streams end."""
    flags = ("--drain-wait-seconds", "4", "--token-cache-mib", "0", "--max-passes", "100000")
    plain, long = raw_request(noise(0)), raw_request(noise(0, 72), methods=[method("token_ablation")])
    ask = health_pb2.HealthCheckRequest()
    with serving(tmp_path / "log", *flags) as server, grpc.insecure_channel(server.address) as channel:
        stub, health = explainer_service_pb2_grpc.ExplainerServiceStub(channel), health_pb2_grpc.HealthStub(channel)
        sending: queue.Queue[explain_pb2.ExplainStreamRequest | None] = queue.Queue()
        stream = stub.ExplainStream(iter(sending.get, None))
        sending.put(explain_pb2.ExplainStreamRequest(request=raw_request(noise(0), request_id="one")))
        assert next(stream).HasField("response")
        heavy = stub.Explain.future(long, timeout=120)
        with Innocents(server.address, count=4) as innocents:
            server.process.send_signal(signal.SIGTERM)
            while server.get("/readyz")[0] == 200:
                time.sleep(0.01)
            assert stub.Explain(plain, timeout=30).maps
            sending.put(explain_pb2.ExplainStreamRequest(request=raw_request(noise(0), request_id="two")))
            assert next(stream).HasField("response")
            assert (server.get("/livez")[0], health.Check(ask, timeout=30).status) == (200, 1)
            innocents.wait_for_more()
            assert set(innocents.codes) == {"OK"}
            with pytest.raises(grpc.RpcError) as ended:
                next(stream)
            assert heavy.result().maps
            assert server.process.wait(timeout=60) == 0
        sending.put(None)
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    assert set(innocents.codes) <= {"OK", "UNAVAILABLE", "CANCELLED"}
    lines = [line for line in server.log_lines() if line["event"] == "rpc"]
    (line,) = (line for line in lines if line["method"] == "ExplainStream")
    assert (line["code"], line["items"], line["failures"]) == ("UNAVAILABLE", 2, 0)
    # All that was let in was answered, and received: the innocents' first calls are counted apart.
    answered = sum(line["code"] == "OK" for line in lines if line["method"] == "Explain")
    assert answered == innocents.codes["OK"] + innocents.count + len([plain, long])
