"""The admin port: plain HTTP with metrics and probes; never the API.

It has threads of its own, so that neither a busy event loop nor load on the API can fail a probe. `prometheus_client`
writes the metrics, and the standard library speaks HTTP, one request a connection.
"""

import io
import socket
import threading
from collections.abc import Iterable
from contextlib import suppress
from http import HTTPStatus
from socketserver import TCPServer
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import structlog
from prometheus_client import CollectorRegistry, make_wsgi_app

from cdam_server.operation.health import Health

_CONNECTIONS: Final = 64  # far more than probes and scrapers need; each holds a thread
_SILENCE_SECONDS: Final = 5.0  # as long as the most patient probe of deploy/ waits
_POLL_SECONDS: Final = 0.1  # how long closing may wait for the accepting thread
_log = structlog.get_logger("cdam.admin")


class AdminServer:
    """Serves ``/metrics``, ``/livez`` and ``/readyz`` until closed.

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
            self._server = _Server(address, _application(registry, health))
        except OSError as error:
            raise OSError(f"can't listen on {address} (admin_address): {error.strerror or error}") from error
        self.port = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name="admin", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening, and close every connection."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _application(registry: CollectorRegistry, health: Health) -> WSGIApplication:
    """What is answered to GET; HEAD is answered by the same headers, and all else is refused."""
    metrics = make_wsgi_app(registry)  # answers GET alone
    probes = {"/livez": health.live, "/readyz": health.ready}
    paths = "".join(f"{path}\n" for path in ["/metrics", *probes])

    def get(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            page: Iterable[bytes] = metrics(environ, start_response)
            return page
        if path not in probes:
            return _text(start_response, HTTPStatus.NOT_FOUND, paths)
        if probes[path]():
            return _text(start_response, HTTPStatus.OK, "ok\n")
        return _text(start_response, HTTPStatus.SERVICE_UNAVAILABLE, "no\n")

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            match environ["REQUEST_METHOD"]:
                case "GET":
                    return get(environ, start_response)
                case "HEAD":
                    get(environ | {"REQUEST_METHOD": "GET"}, start_response)
                    return iter([b""])  # of no known length: a list would be announced as an empty page
            allowed = ("Allow", "GET, HEAD")
            return _text(start_response, HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD\n", allowed)
        except Exception:
            _log.exception("admin request failed", path=environ["PATH_INFO"])
            raise  # the library answers 500

    return application


def _text(start_response: StartResponse, status: HTTPStatus, body: str, *headers: tuple[str, str]) -> list[bytes]:
    start_response(f"{status.value} {status.phrase}", [("Content-Type", "text/plain"), *headers])
    return [body.encode()]


class _Server(WSGIServer):
    """Answers each connection in a thread of its own; a connection too many makes it close the oldest one."""

    request_queue_size = 128

    def __init__(self, address: str, application: WSGIApplication) -> None:
        host, _, port = address.rpartition(":")
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._lock = threading.Lock()
        self._connections: dict[threading.Thread, socket.socket] = {}  # the oldest first
        super().__init__((host.strip("[]"), int(port)), _RequestHandler)
        self.set_app(application)

    def server_bind(self) -> None:
        """Bind; `HTTPServer` would also ask DNS for this host's name, which may take long and is not used."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]  # typed for Unix too
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the connection's thread."""
        thread = threading.Thread(
            target=self._answer, args=(request, client_address), name="admin-connection", daemon=True
        )
        with self._lock:
            if len(self._connections) >= _CONNECTIONS:
                _disconnect(self._connections.pop(next(iter(self._connections))))
            thread.start()
            self._connections[thread] = request

    def server_close(self) -> None:
        """Close the port and every connection."""
        super().server_close()
        with self._lock:
            threads = list(self._connections)
            for connection in self._connections.values():
                _disconnect(connection)
        for thread in threads:
            thread.join(_SILENCE_SECONDS)

    def _answer(self, request: socket.socket, client_address: Any) -> None:
        try:
            request.settimeout(_SILENCE_SECONDS)
            with suppress(OSError):  # the client is silent or gone, or was disconnected
                self.finish_request(request, client_address)
        except Exception as error:  # noqa: BLE001 - one connection's failure is no other's
            _log.error("admin connection failed", exc_info=error)
        finally:
            with self._lock:
                self._connections.pop(threading.current_thread(), None)  # unless it was the oldest of too many
            self.shutdown_request(request)


class _RequestHandler(WSGIRequestHandler):
    default_request_version = "HTTP/1.0"  # else clients of HTTP/2 are refused without a status, as by HTTP/0.9

    def get_stderr(self) -> io.StringIO:
        """Not standard error, which is the log's: the application logs its own failures."""
        return io.StringIO()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Probes are not worth a line."""


def _disconnect(connection: socket.socket) -> None:
    """End a connection that another thread reads, so that the thread ends."""
    with suppress(OSError):  # it is closed already
        connection.shutdown(socket.SHUT_RDWR)
