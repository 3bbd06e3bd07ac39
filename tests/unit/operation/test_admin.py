"""The admin port: metrics and probes over HTTP, however badly its clients behave."""

from __future__ import annotations

import gzip
import http.client
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry, Counter, Gauge
from structlog.testing import capture_logs

from cdam.v1 import explainer_service_pb2_grpc, model_pb2
from cdam_server.operation import admin
from cdam_server.operation.admin import AdminServer
from cdam_server.operation.health import Health

SERVICE = "cdam.v1.ExplainerService"
SERVING, NOT_SERVING = 1, 2


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
        self.registry = CollectorRegistry()
        Counter("tests", "Counts tests.", registry=self.registry).inc(3)
        self.server = AdminServer("127.0.0.1:0", self.registry, self.health)
        self.address = f"127.0.0.1:{self.server.port}"

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{self.address}{path}", timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def ask(self, verb: str, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of any request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        connection.request(verb, path, headers=headers)
        answer = connection.getresponse()
        found = answer.status, dict(answer.getheaders()), answer.read()
        connection.close()
        return found

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


def test_the_probes_say_what_is_so_now(served: Admin) -> None:
    for live, ready in ((True, True), (True, False), (False, False), (False, True)):
        served.facts.live, served.facts.ready = live, ready
        assert (served.get("/livez")[0], served.get("/readyz")[0]) == (200 if live else 503, 200 if ready else 503)
    assert "tests_total 3.0" in served.get("/metrics")[1]
    assert served.get("/nothing") == (404, "/metrics\n/livez\n/readyz\n")


def test_metrics_in_the_form_that_is_asked_for(served: Admin) -> None:
    status, headers, plain = served.ask("GET", "/metrics")
    assert (status, headers["Content-Type"].split(";")[0]) == (200, "text/plain")
    assert int(headers["Content-Length"]) == len(plain)
    _, headers, packed = served.ask("GET", "/metrics", **{"Accept-Encoding": "gzip"})
    assert (headers["Content-Encoding"], gzip.decompress(packed)) == ("gzip", plain)
    _, headers, other = served.ask("GET", "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    assert other.endswith(b"# EOF\n")
    assert b"tests_total" not in served.ask("GET", "/metrics?name[]=nothing")[2]


@pytest.mark.parametrize("path", ["/metrics", "/livez", "/readyz", "/nothing"])
def test_head_is_get_without_the_page(served: Admin, path: str) -> None:
    served.facts.ready = False
    status, headers, page = served.ask("GET", path)
    head_status, head_headers, head_page = served.ask("HEAD", path)
    assert (head_status, head_headers["Content-Type"]) == (status, headers["Content-Type"])
    assert (page != b"", head_page) == (True, b"")
    assert "Content-Length" not in head_headers  # which would have to be the page's


@pytest.mark.parametrize("verb", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "PRINT"])
@pytest.mark.parametrize("path", ["/metrics", "/livez"])
def test_other_verbs_are_refused(served: Admin, verb: str, path: str) -> None:
    status, headers, _ = served.ask(verb, path)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_it_speaks_no_grpc(served: Admin) -> None:
    with grpc.insecure_channel(served.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        for call in (
            lambda: explainer_service_pb2_grpc.ExplainerServiceStub(channel).ListModels(model_pb2.ListModelsRequest()),
            lambda: health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "http1" in caught.value.details()
    assert served.get("/livez")[0] == 200


def test_a_page_that_fails_is_logged_and_the_next_is_served(served: Admin, capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> float:
        raise ZeroDivisionError("of a metric")

    Gauge("broken", "Can't be read.", registry=served.registry).set_function(fail)
    with capture_logs() as lines:
        assert served.get("/metrics")[0] == 500
        _wait_until(lambda: not _threads("admin-connection"))
    assert [(line["event"], line["path"]) for line in lines] == [("admin request failed", "/metrics")]
    assert served.get("/livez") == (200, "ok\n")
    assert capfd.readouterr() == ("", "")


def test_http_in_pieces_and_other_verbs(served: Admin) -> None:
    for request, status in ((b"GET /livez HTTP/1.0\r\n\r\n", b"200"), (b"PRINT /livez HTTP/1.0\r\n\r\n", b"405")):
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


def test_the_slow_make_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "_SILENCE_SECONDS", 1000)
    served = Admin()
    stop = threading.Event()
    slow = [served.connect(b"GET /livez HTTP/1.1\r\nX: ") for _ in range(admin._CONNECTIONS)]

    def send_byte_by_byte() -> None:
        while not stop.wait(0.01):
            for connection in slow:
                with suppress(OSError):  # it had to make room
                    connection.sendall(b"x")

    sender = threading.Thread(target=send_byte_by_byte)
    sender.start()
    try:
        assert [served.get("/livez")[0] for _ in range(10)] == [200] * 10
        _wait_until(lambda: len(_threads("admin-connection")) <= admin._CONNECTIONS)
    finally:
        stop.set()
        sender.join()
        for connection in slow:
            connection.close()
        served.server.close()


def test_who_does_not_read_is_disconnected(
    served: Admin, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(admin, "_SILENCE_SECONDS", 0.2)
    size = 30_000_000  # more than the system takes in for a client
    Gauge("long", "A long page.", ["label"], registry=served.registry).labels("x" * size)
    with served.connect(b"GET /metrics HTTP/1.0\r\n\r\n") as connection:
        _wait_until(lambda: bool(_threads("admin-connection")))
        _wait_until(lambda: not _threads("admin-connection"))
        received = 0
        while chunk := connection.recv(1_000_000):
            received += len(chunk)
    assert received < size
    assert capfd.readouterr() == ("", "")


def test_closing_leaves_no_thread_and_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "_SILENCE_SECONDS", 1000)  # nobody goes by himself
    before = set(threading.enumerate())
    served = Admin()
    idle = [served.connect(sent) for sent in (b"", b"P", b"GET /livez")]
    assert served.get("/livez")[0] == 200
    served.server.close()
    _wait_until(lambda: set(threading.enumerate()) <= before)
    with pytest.raises(ConnectionError):
        served.connect()
    for connection in idle:
        connection.close()


def test_a_taken_port_is_named_and_leaves_nothing(served: Admin) -> None:
    before = threading.active_count()
    with pytest.raises(OSError, match=rf"{served.address} \(admin_address\)"):
        AdminServer(served.address, CollectorRegistry(), served.health)
    _wait_until(lambda: threading.active_count() <= before)


def test_no_connection_keeps_a_process_that_fails() -> None:
    code = """
import socket, threading
from prometheus_client import CollectorRegistry
from cdam_server.operation import admin
from cdam_server.operation.health import Health
admin._SILENCE_SECONDS = 1000
server = admin.AdminServer("127.0.0.1:0", CollectorRegistry(), Health(lambda: True, lambda: False, "service"))
idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
while sum(thread.name == "admin-connection" for thread in threading.enumerate()) < 2:
    pass
raise SystemExit(3)  # without closing anything
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 3)


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
    seen: list[int] = []

    def probe() -> None:
        served.facts.live = False  # as a heartbeat that has stopped would say
        seen.append(served.get("/livez")[0])

    prober = threading.Thread(target=probe)
    prober.start()
    prober.join()  # in the event loop's thread, which does nothing else meanwhile
    assert seen == [503]


def _threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


def _wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)
