"""The admin port: plaintext metrics and probes over HTTP, and ``grpc.health.v1`` over gRPC; never the API.

It runs in threads of its own, so that neither a busy event loop nor load on the API can fail a probe.

Kubernetes names a gRPC probe by its port alone, so that HTTP and gRPC share this one. A connection's first bytes tell
them apart; gRPC's is handed on, byte by byte, to a server of its own that listens on the loopback interface and has
nothing but health.
"""

import selectors
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer
from typing import Any, TypeVar
from urllib.parse import urlsplit

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from cdam_server.health import Health, HealthServicer

_PREFACE = b"PRI * HTTP/2.0"  # how every HTTP/2 client begins, and so every gRPC client
_CONNECTIONS = 64
_CALLS = 64
_WATCHERS = 16  # who hold a call for good; the others are for Check
_SILENCE_SECONDS = 5.0
_LOOPBACK = "127.0.0.1"
_T = TypeVar("_T")
_log = structlog.get_logger("cdam.admin")


class AdminServer:
    """Serves ``/metrics``, ``/livez``, ``/readyz`` and ``grpc.health.v1`` on one port until closed.

    Args:
        address: ``host:port``; port 0 takes a free one.
        registry: The metrics.
        health: What the probes are told.

    Attributes:
        port: Where it listens.

    Raises:
        OSError: The port is taken.
    """

    def __init__(self, address: str, registry: CollectorRegistry, health: Health) -> None:
        try:
            self._listener = _Listener(address, registry, health)
        except OSError as error:
            raise OSError(f"can't listen on {address} (admin_address): {error.strerror or error}") from error
        self.port: int = self._listener.server_address[1]
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.1,), name="admin", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving, and hang up on whoever is connected."""
        self._listener.shutdown()
        self._thread.join()
        self._listener.close()


class _Listener(TCPServer):
    """Gives each connection a thread, and to HTTP and gRPC what is theirs."""

    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, address: str, registry: CollectorRegistry, health: Health) -> None:
        host, _, port = address.rpartition(":")
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.registry = registry
        self.health = health
        self._lock = threading.Lock()
        self._connections: deque[socket.socket] = deque()  # the oldest first
        self._threads: set[threading.Thread] = set()
        super().__init__((host.strip("[]"), int(port)), _HttpHandler)
        self._grpc = _HealthServer(health)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Talk to a client in a thread; if there are too many, the oldest makes room."""
        thread = threading.Thread(
            target=self._converse, args=(request, client_address), name="admin-connection", daemon=True
        )
        with self._lock:
            if len(self._connections) >= _CONNECTIONS:
                _hang_up(self._connections.popleft())
            thread.start()
            self._threads.add(thread)
            self._connections.append(request)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Answer, in the client's language."""
        grpc_client = _speaks_http2(request)
        request.settimeout(_SILENCE_SECONDS)
        if grpc_client:
            self._grpc.take(request)
        else:
            super().finish_request(request, client_address)

    def close(self) -> None:
        """Close the port, and end every conversation."""
        self.server_close()
        with self._lock:
            threads = list(self._threads)
            for connection in self._connections:
                _hang_up(connection)
        for thread in threads:
            thread.join(_SILENCE_SECONDS)
        self._grpc.close()

    def _converse(self, request: socket.socket, client_address: Any) -> None:
        try:
            with suppress(OSError):  # it is silent or gone, or was hung up on
                self.finish_request(request, client_address)
        except Exception as error:  # noqa: BLE001 - one connection's failure is no other's
            _log.error("admin connection failed", exc_info=error)
        finally:
            with self._lock:
                with suppress(ValueError):  # if it had to make room
                    self._connections.remove(request)
                self._threads.discard(threading.current_thread())
            self.shutdown_request(request)


class _HttpHandler(BaseHTTPRequestHandler):
    server: _Listener

    def do_GET(self) -> None:
        probes = {"/livez": self.server.health.live, "/readyz": self.server.health.ready}
        path = urlsplit(self.path).path
        if path == "/metrics":
            self._answer(HTTPStatus.OK, generate_latest(self.server.registry), CONTENT_TYPE_LATEST)
        elif path in probes:
            well = probes[path]()
            self._answer(HTTPStatus.OK if well else HTTPStatus.SERVICE_UNAVAILABLE, b"ok\n" if well else b"no\n")
        else:
            self._answer(HTTPStatus.NOT_FOUND, "".join(f"{path}\n" for path in ["/metrics", *probes]).encode())

    def _answer(self, status: HTTPStatus, body: bytes, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Probes are not worth a line."""


class _HealthServer:
    """A gRPC server of health alone, reached by the connections that it is handed."""

    def __init__(self, health: Health) -> None:
        self._server = grpc.server(
            _Threads(),  # type: ignore[arg-type]  # all that is used of a pool is `submit`
            maximum_concurrent_rpcs=_CALLS,
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_concurrent_streams", 16),
                ("grpc.max_receive_message_length", 4096),
                # A peer that is idle, or gone without a word, is hung up on.
                ("grpc.server_handshake_timeout_ms", int(1000 * _SILENCE_SECONDS)),
                ("grpc.max_connection_idle_ms", 60_000),
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 10_000),
            ],
        )
        health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(health, _WATCHERS), self._server)
        self._port = self._server.add_insecure_port(f"{_LOOPBACK}:0")
        self._server.start()

    def take(self, client: socket.socket) -> None:
        """Carry bytes to and fro until either side hangs up."""
        with (
            socket.create_connection((_LOOPBACK, self._port), timeout=_SILENCE_SECONDS) as server,
            selectors.DefaultSelector() as selector,
        ):
            for source, sink in ((client, server), (server, client)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                selector.register(source, selectors.EVENT_READ, (source, sink))
            while True:
                for key, _ in selector.select():
                    source, sink = key.data
                    chunk = source.recv(65536)
                    if not chunk:
                        return
                    sink.sendall(chunk)

    def close(self) -> None:
        """Cancel what is being answered, and stop."""
        self._server.stop(None).wait()


class _Threads(Executor):
    """A thread for each call. Unlike those of a pool, none keeps a process that ends without `close` from ending."""

    def submit(self, call: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        """Call it."""
        future: Future[_T] = Future()

        def run() -> None:
            try:
                future.set_result(call(*args, **kwargs))
            except Exception as error:  # noqa: BLE001 - the future's reader is told
                future.set_exception(error)

        threading.Thread(target=run, name="admin-grpc", daemon=True).start()
        return future


def _speaks_http2(connection: socket.socket) -> bool:
    """Whether a connection begins as HTTP/2 does; what it sent is still there to be read.

    Raises:
        OSError: Nothing was sent for a while, or the client is gone.
    """
    # Python's own timeout would make the call return with the first byte, and peeking again would not wait for more.
    timeout = struct.pack("ll", int(_SILENCE_SECONDS), int(_SILENCE_SECONDS % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
    connection.settimeout(None)
    return connection.recv(len(_PREFACE), socket.MSG_PEEK | socket.MSG_WAITALL) == _PREFACE


def _hang_up(connection: socket.socket) -> None:
    """End a connection that another thread is reading, so that it wakes up."""
    with suppress(OSError):  # it is closed already
        connection.shutdown(socket.SHUT_RDWR)
