"""Where a server is, and how it is spoken to: address, TLS, token, retries, limits."""

import ipaddress
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote

import grpc
import grpc.aio

SERVICE = "cdam.v1.ExplainerService"

MetadataLike: TypeAlias = Mapping[str, str | bytes] | Iterable[tuple[str, str | bytes]]
"""Headers that go with every call."""

MAX_RETRIES = 4  # gRPC's own limit is five attempts

# Those that are safe to repeat: all that are unary.
_UNARY = ("Explain", "ConceptRegister", "GetConcept", "ListConcepts", "DeleteConcept", "ListModels", "GetModel")


@dataclass(frozen=True, kw_only=True)
class TLS:
    """TLS, and who vouches for whom. Each is a path to a PEM file, or its bytes.

    Attributes:
        ca: Certificates that the server's is checked against; None: the usual public ones.
        cert: The client's own certificate chain, for mutual TLS.
        key: Its private key.
        server_name: The name that the server's certificate is for, where it isn't the address's.
    """

    ca: str | os.PathLike[str] | bytes | None = None
    cert: str | os.PathLike[str] | bytes | None = None
    key: str | os.PathLike[str] | bytes | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("mutual TLS takes both cert and key")

    def __repr__(self) -> str:
        return "TLS(...)"  # a key may be among the fields

    def credentials(self) -> grpc.ChannelCredentials:
        """What grpc makes a channel with."""
        return grpc.ssl_channel_credentials(_pem(self.ca), _pem(self.key), _pem(self.cert))


@dataclass(frozen=True, kw_only=True)
class Connection:
    """How a client speaks to its server. With it, the generated stubs of `cdam.v1` and of gRPC's health and reflection do so too.

    channel = client.connection.channel()
    stub = explainer_service_pb2_grpc.ExplainerServiceStub(channel)
    stub.GetModel(request, timeout=client.connection.timeout, metadata=client.connection.metadata)

    Attributes:
        address: As grpc names it: host:port, dns:///host:port, ipv4:, ipv6:, unix:path.
        credentials: Those of TLS; None for plaintext.
        metadata: Headers of every call, the token among them; a channel does not send them by itself.
        options: grpc's channel options.
        timeout: Seconds that a call may take unless it says otherwise.
    """

    address: str
    credentials: grpc.ChannelCredentials | None
    metadata: tuple[tuple[str, str | bytes], ...]
    options: tuple[tuple[str, Any], ...]
    timeout: float

    def __repr__(self) -> str:
        return f"Connection({self.address!r})"  # the metadata is secret

    def channel(self, *options: tuple[str, Any]) -> grpc.Channel:
        """A new channel, which is the caller's to close.

        Args:
            options: More of grpc's channel options, or others in place of the client's.
        """
        merged = tuple((dict(self.options) | dict(options)).items())
        if self.credentials is None:
            return grpc.insecure_channel(self.address, merged)
        return grpc.secure_channel(self.address, self.credentials, merged)

    def aio_channel(self, *options: tuple[str, Any]) -> grpc.aio.Channel:
        """As `channel`, for the running event loop."""
        merged = tuple((dict(self.options) | dict(options)).items())
        if self.credentials is None:
            return grpc.aio.insecure_channel(self.address, merged)
        return grpc.aio.secure_channel(self.address, self.credentials, merged)


def connection(
    address: str,
    *,
    timeout: float,
    token: str | None,
    tls: TLS | bool | None,
    metadata: MetadataLike,
    max_message_bytes: int,
    retries: int,
    allow_plaintext_token: bool,
    user_agent: str,
) -> Connection:
    """Check what a client was given.

    Raises:
        ValueError: if something of it can't be, or a token would travel in plaintext to another machine.
        OSError: if a certificate can't be read.
    """
    if not 0 <= retries <= MAX_RETRIES:
        raise ValueError(f"retries is 0 to {MAX_RETRIES} (gRPC's limit), got {retries}")
    if max_message_bytes < 1:
        raise ValueError(f"max_message_bytes is at least 1, got {max_message_bytes}")
    tls = TLS() if tls is True else tls or None
    headers = [(key.lower(), value) for key, value in _pairs(metadata)]
    if token is not None:
        if tls is None and not allow_plaintext_token and not is_local(address):
            raise ValueError(
                f"refusing to send a token in plaintext to {address}: set tls, or allow_plaintext_token=True "
                "where something else encrypts the connection"
            )
        if not re.fullmatch(r"[\x21-\x7e]+", token):
            raise ValueError("a token is printable ASCII without spaces")
        headers.append(("authorization", f"Bearer {token}"))
    options: list[tuple[str, Any]] = [
        ("grpc.primary_user_agent", user_agent),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.service_config", json.dumps(service_config(address, retries))),
        # A request larger than this buffer (256 KiB by default) would be sent once and never again.
        ("grpc.per_rpc_retry_buffer_size", max_message_bytes),
        ("grpc.enable_retries", int(retries > 0)),
        # Else all clients of a process share a connection, and so one of the server's front ends.
        ("grpc.use_local_subchannel_pool", 1),
        # By default a second passes before the first new attempt to connect: longer than most of the retries.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 5000),
    ]
    if is_local(address):
        options.append(("grpc.enable_http_proxy", 0))  # what stays on this machine is no proxy's business
    if tls is not None and tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return Connection(
        address=address,
        credentials=tls.credentials() if tls else None,
        metadata=tuple(headers),
        options=tuple(options),
        timeout=checked_timeout(timeout),
    )


def service_config(address: str, retries: int) -> dict[str, Any]:
    """The service config for gRPC: retries, and calls spread over all of a ``dns:`` name's addresses.

    Unavailable servers are asked again after about 0.1, 0.2, 0.4 and 0.8 s, or when they themselves say
    (``grpc-retry-pushback-ms``); a server that keeps failing gets no retries on top until calls succeed again.
    """
    config: dict[str, Any] = {}
    if address.startswith("dns:"):
        config["loadBalancingConfig"] = [{"round_robin": {}}]
    if retries:
        config["methodConfig"] = [
            {
                "name": [{"service": SERVICE, "method": method} for method in _UNARY],
                "retryPolicy": {
                    "maxAttempts": retries + 1,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
        config["retryThrottling"] = {"maxTokens": 100, "tokenRatio": 0.5}
    return config


def checked_timeout(timeout: float) -> float:
    """The timeout, in seconds: a call always has a deadline."""
    if not (timeout > 0 and math.isfinite(timeout)):
        raise ValueError(f"timeout is a positive number of seconds, got {timeout}")
    return timeout


def is_local(address: str) -> bool:
    """Whether the address stays on this machine: a unix socket or a loopback address."""
    scheme, _, rest = address.partition(":")
    if scheme in {"unix", "unix-abstract"}:
        return True
    if scheme in {"ipv4", "ipv6"}:
        return all(_is_loopback(_host(unquote(endpoint))) for endpoint in rest.split(","))
    if scheme == "dns":
        address = rest.rpartition("/")[2]
    return _is_loopback(_host(address))


def _host(endpoint: str) -> str:
    if endpoint.startswith("["):
        return endpoint[1:].partition("]")[0]
    return endpoint.partition(":")[0] if endpoint.count(":") == 1 else endpoint


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _pairs(metadata: MetadataLike) -> Iterable[tuple[str, str | bytes]]:
    return metadata.items() if isinstance(metadata, Mapping) else metadata


def _pem(source: str | os.PathLike[str] | bytes | None) -> bytes | None:
    return source if source is None or isinstance(source, bytes) else Path(source).read_bytes()
