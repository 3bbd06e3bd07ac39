"""Probes of a real server, by gRPC on the API's port and by HTTP on the admin port: under load, and through a drain."""

from __future__ import annotations

import signal
import threading
from importlib.resources import files
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from calls import output, request
from cdam.v1 import explainer_service_pb2_grpc
from processes import ServerProcess, serving

SCENE = (files("cdam_server.demo") / "assets" / "samples" / "scene1.png").read_bytes()
SERVICE = "cdam.v1.ExplainerService"
SERVING, NOT_SERVING = 1, 2


def _statuses(server: ServerProcess) -> dict[str, int]:
    """What each service's status is on the API's port, by a new connection."""
    with grpc.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        return {
            service: health.Check(health_pb2.HealthCheckRequest(service=service), timeout=30).status
            for service in ("", SERVICE)
        }


def _pages(server: ServerProcess) -> tuple[int, int]:
    return server.get("/livez")[0], server.get("/readyz")[0]


def test_a_drain_ends_readiness_and_not_life(tmp_path: Path) -> None:
    with serving(tmp_path / "log", "--drain-wait-seconds", "5") as server:
        assert _statuses(server) == {"": SERVING, SERVICE: SERVING}
        assert _pages(server) == (200, 200)
        with grpc.insecure_channel(server.address) as channel:
            watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            assert next(watched).status == SERVING
            server.process.send_signal(signal.SIGTERM)
            assert next(watched).status == NOT_SERVING
            assert _statuses(server) == {"": SERVING, SERVICE: NOT_SERVING}
            assert _pages(server) == (200, 503)
            with pytest.raises(grpc.RpcError):  # a watcher does not keep the process
                next(watched)
        assert server.process.wait(timeout=60) == 0


def test_load_fails_no_probe(tmp_path: Path) -> None:
    stop = threading.Event()
    with (
        serving(tmp_path / "log", "--token-cache-mib", "0") as server,
        grpc.insecure_channel(server.address) as channel,
    ):

        def call() -> None:
            stub = explainer_service_pb2_grpc.ExplainerServiceStub(channel)
            while not stop.is_set():
                stub.Explain(request(SCENE, output(3)))

        callers = [threading.Thread(target=call) for _ in range(16)]
        for caller in callers:
            caller.start()
        try:
            for _ in range(20):
                assert _statuses(server) == {"": SERVING, SERVICE: SERVING}
                assert _pages(server) == (200, 200)
        finally:
            stop.set()
            for caller in callers:
                caller.join()
