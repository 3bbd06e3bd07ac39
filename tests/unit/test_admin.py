"""The admin port: HTTP and gRPC health on one port, however badly its clients behave."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry, Counter

from cdam.v1 import explainer_service_pb2_grpc, model_pb2
from cdam_server import admin
from cdam_server.admin import AdminServer
from cdam_server.health import Health

SERVICE = "cdam.v1.ExplainerService"
SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3


@dataclass
class Facts:
    """What the server under test says of itself."""

    live: bool = True
    ready: bool = True


class Admin:
    """An admin server, what it is told, and how to ask it."""

    def __init__(self) -> None:
        self.facts = Facts()
        self.health = Health(lambda: self.facts.live, lambda: self.facts.ready, SERVICE)
        registry = CollectorRegistry()
        Counter("tests", "Counts tests.", registry=registry).inc(3)
        self.server = AdminServer("127.0.0.1:0", registry, self.health)
        self.address = f"127.0.0.1:{self.server.port}"

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{self.address}{path}", timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def check(self, service: str) -> int:
        """A check as the kubelet makes it, by a connection of its own."""
        with self.channel() as channel:
            request = health_pb2.HealthCheckRequest(service=service)
            return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=30).status)

    def channel(self) -> grpc.Channel:
        # A pool of one's own: else a connection of an earlier channel is used again.
        return grpc.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)])

    def connect(self, *sent: bytes) -> socket.socket:
        """A bare connection that has sent this much."""
        connection = socket.create_connection(("127.0.0.1", self.server.port), timeout=30)
        for part in sent:
            connection.sendall(part)
        return connection


@pytest.fixture
def served() -> Iterator[Admin]:
    served = Admin()
    yield served
    served.server.close()


def test_http_and_grpc_say_the_same(served: Admin) -> None:
    for live, ready in ((True, True), (True, False), (False, False), (False, True)):
        served.facts.live, served.facts.ready = live, ready
        assert (served.get("/livez")[0], served.get("/readyz")[0]) == (200 if live else 503, 200 if ready else 503)
        assert served.check("") == (SERVING if live else NOT_SERVING)
        assert served.check(SERVICE) == (SERVING if ready else NOT_SERVING)
    assert "tests_total 3.0" in served.get("/metrics")[1]
    assert served.get("/nothing") == (404, "/metrics\n/livez\n/readyz\n")


def test_one_connection_hears_of_every_change(served: Admin) -> None:
    with served.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for ready in (True, False) * 20:
            served.facts.ready = ready
            answer = stub.Check(health_pb2.HealthCheckRequest(service=SERVICE))
            assert answer.status == (SERVING if ready else NOT_SERVING)


def test_an_unknown_service(served: Admin) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        served.check("cdam.v1.Oracle")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    with served.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watched = stub.Watch(health_pb2.HealthCheckRequest(service="cdam.v1.Oracle"))
        assert next(watched).status == SERVICE_UNKNOWN
        watched.cancel()


def test_the_list_of_services(served: Admin) -> None:
    served.facts.ready = False
    with served.channel() as channel:
        answer = health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest())
    assert {name: item.status for name, item in answer.statuses.items()} == {"": SERVING, SERVICE: NOT_SERVING}


def test_a_watch_hears_of_a_drain_and_the_process_stays_live(served: Admin) -> None:
    with served.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        ready = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=30)
        live = stub.Watch(health_pb2.HealthCheckRequest(service=""), timeout=30)
        assert next(ready).status == next(live).status == SERVING
        served.facts.ready = False
        assert next(ready).status == NOT_SERVING
        served.facts.live = False  # had it heard of the drain, this would not be the next it hears
        assert next(live).status == NOT_SERVING
        served.facts.ready = True
        assert next(ready).status == SERVING


def test_watchers_leave_room_for_checks(served: Admin) -> None:
    with served.channel() as first, served.channel() as second:
        watches: list[Any] = []
        for number in range(admin._WATCHERS):
            stub = health_pb2_grpc.HealthStub((first, second)[number % 2])
            watches.append(stub.Watch(health_pb2.HealthCheckRequest(service="")))
            assert next(watches[-1]).status == SERVING
        one_too_many = health_pb2_grpc.HealthStub(first).Watch(health_pb2.HealthCheckRequest(service=""))
        with pytest.raises(grpc.RpcError) as caught:
            next(one_too_many)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert served.check("") == SERVING
        watches[0].cancel()  # and its place is free again

        def watch_again() -> bool:
            watch = health_pb2_grpc.HealthStub(first).Watch(health_pb2.HealthCheckRequest(service=""))
            try:
                return int(next(watch).status) == SERVING
            except grpc.RpcError:
                return False

        _wait_until(watch_again)


def test_neither_the_api_nor_metrics_over_grpc(served: Admin) -> None:
    with served.channel() as channel:
        with pytest.raises(grpc.RpcError) as caught:
            explainer_service_pb2_grpc.ExplainerServiceStub(channel).ListModels(model_pb2.ListModelsRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        for path in ("/metrics", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(path)(b"")
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("cut", [1, 3, 13, 14, 17])
def test_a_preface_in_two_pieces(served: Admin, cut: int) -> None:
    preface, settings = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", bytes(3) + b"\x04" + bytes(5)
    with served.connect(preface[:cut]) as connection:
        time.sleep(0.1)
        connection.sendall(preface[cut:] + settings)
        assert connection.recv(9)[3] == 4  # a SETTINGS frame: HTTP/2 answers


def test_http_in_pieces_and_other_verbs(served: Admin) -> None:
    for request, status in ((b"GET /livez HTTP/1.0\r\n\r\n", b"200"), (b"PRINT /livez HTTP/1.0\r\n\r\n", b"501")):
        with served.connect() as connection:
            for byte in request:
                connection.sendall(bytes([byte]))
                time.sleep(0.002)
            assert connection.recv(100).split()[1] == status


@pytest.mark.parametrize("sent", [b"", b"P", b"PRI * HTTP", b"GET /livez", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"])
def test_half_open_connections_are_borne(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "_SILENCE_SECONDS", 1000)  # so that only the bound helps
    served = Admin()
    idle = [served.connect(sent) for _ in range(3 * admin._CONNECTIONS)]
    assert served.get("/livez")[0] == 200
    assert served.check("") == served.check(SERVICE) == SERVING
    _wait_until(lambda: len(_threads("admin-connection")) <= admin._CONNECTIONS)
    for connection in idle:
        connection.close()
    _wait_until(lambda: not _threads("admin-connection"))
    served.server.close()


@pytest.mark.parametrize("sent", [b"", b"PRI", b"GET /livez"])
def test_the_silent_are_hung_up_on(served: Admin, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "_SILENCE_SECONDS", 0.2)
    with served.connect(sent) as connection:
        while connection.recv(1000):  # what is half of a request may be answered with an error
            pass


def test_garbage_after_the_preface_harms_nobody_else(served: Admin) -> None:
    with served.channel() as channel:
        watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert next(watched).status == SERVING
        for number in range(20):
            with served.connect(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([255 - number]) * 5000):
                pass
        assert served.check("") == SERVING
        served.facts.ready = False
        assert next(watched).status == NOT_SERVING


def test_closing_leaves_no_thread_and_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "_SILENCE_SECONDS", 1000)  # nobody goes by himself
    before = set(threading.enumerate())
    served = Admin()
    channel = served.channel()
    watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
    assert next(watched).status == SERVING
    idle = [served.connect(sent) for sent in (b"", b"P", b"GET /livez", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")]
    assert served.get("/livez")[0] == 200
    served.server.close()
    with pytest.raises(grpc.RpcError):
        next(watched)
    channel.close()
    assert not _threads("admin-connection")
    _wait_until(lambda: set(threading.enumerate()) <= before)  # gRPC's threads need a moment
    with pytest.raises(ConnectionError):
        served.connect()
    for connection in idle:
        connection.close()


def test_a_taken_port_is_named_and_leaves_nothing(served: Admin) -> None:
    before = threading.active_count()
    with pytest.raises(OSError, match=rf"{served.address} \(admin_address\)"):
        AdminServer(served.address, CollectorRegistry(), served.health)
    _wait_until(lambda: threading.active_count() <= before)


def test_a_watcher_keeps_no_process_that_fails() -> None:
    code = """
import threading
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry
from cdam_server.admin import AdminServer
from cdam_server.health import Health
server = AdminServer("127.0.0.1:0", CollectorRegistry(), Health(lambda: True, lambda: False, "service"))
channel = grpc.insecure_channel(f"127.0.0.1:{server.port}")
watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
next(watched)
print(sum(thread.name == "admin-grpc" for thread in threading.enumerate()), flush=True)
raise SystemExit(3)  # without closing anything
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("1\n", "", 3)


async def test_the_apis_port_says_the_same() -> None:
    facts = Facts(ready=False)
    known = Health(lambda: facts.live, lambda: facts.ready, SERVICE)
    server = grpc.aio.server()
    servicer = health.aio.HealthServicer()
    await known.publish_to(servicer)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert (await stub.Check(health_pb2.HealthCheckRequest(service=""))).status == SERVING
        watched = aiter(stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=30))
        assert (await anext(watched)).status == NOT_SERVING
        for ready in (True, False):
            facts.ready = ready
            await known.publish_to(servicer)
            assert (await anext(watched)).status == (SERVING if ready else NOT_SERVING)
        assert (await stub.Check(health_pb2.HealthCheckRequest(service=""))).status == SERVING
    await server.stop(None)


async def test_a_hanging_event_loop_holds_up_no_probe(served: Admin) -> None:
    seen: list[tuple[int, int]] = []

    def probe() -> None:
        served.facts.live = False  # as a heartbeat that has stopped would say
        seen.append((served.get("/livez")[0], served.check("")))

    prober = threading.Thread(target=probe)
    prober.start()
    prober.join()  # in the event loop's thread, which does nothing else meanwhile
    assert seen == [(503, NOT_SERVING)]


def _threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


def _wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)
