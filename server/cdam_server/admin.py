"""The admin port: plaintext metrics and probes over HTTP, never the API.

It runs in threads of its own, so that a busy event loop can't fail a probe that only asks whether the process lives.
"""

import socket
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest


class AdminServer:
    """Serves ``/metrics`` and the probes until closed.

    Args:
        address: ``host:port``; port 0 takes a free one.
        registry: The metrics.
        probes: Path of each probe, for example ``/readyz``, and whether all is well.

    Raises:
        OSError: The port is taken.
    """

    def __init__(self, address: str, registry: CollectorRegistry, probes: Mapping[str, Callable[[], bool]]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = urlsplit(self.path).path
                if path == "/metrics":
                    self._answer(HTTPStatus.OK, generate_latest(registry), CONTENT_TYPE_LATEST)
                elif path in probes:
                    well = probes[path]()
                    status = HTTPStatus.OK if well else HTTPStatus.SERVICE_UNAVAILABLE
                    self._answer(status, b"ok\n" if well else b"not ready\n", "text/plain")
                else:
                    listing = "\n".join(["/metrics", *probes]) + "\n"
                    self._answer(HTTPStatus.NOT_FOUND, listing.encode(), "text/plain")

            def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Probes are not worth a line."""

        host, _, port = address.rpartition(":")

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        try:
            self._server = Server((host.strip("[]"), int(port)), Handler)
        except OSError as error:
            raise OSError(f"can't listen on {address} (admin_address): {error.strerror or error}") from error
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="admin", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
