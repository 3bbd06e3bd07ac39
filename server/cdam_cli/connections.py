"""How the client commands reach a server, and end if that, or what they ask of it, fails."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import click

import cdam
from cdam_cli.failures import Failure, describe, describe_os
from cdam_cli.hints import hint

Command = TypeVar("Command", bound=Callable[..., Any])

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@dataclass(frozen=True)
class Server:
    """How to reach a server: `Client`'s arguments."""

    address: str
    arguments: dict[str, Any] = field(repr=False)

    def client(self) -> cdam.Client:
        """A client for it."""
        try:
            return cdam.Client(self.address, **self.arguments)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        except OSError as error:
            raise Failure(describe_os(error)) from error


def connection_options(command: Command, *, several: bool = False) -> Command:
    """The options that say how to reach a server; the command gets them as `**connection`.

    Args:
        command: The command.
        several: --server can be repeated; the command gets `addresses` in place of `address`.
    """
    options = [
        click.option(
            "--server",
            "addresses" if several else "address",
            default=["localhost:8001"] if several else "localhost:8001",
            multiple=several,
            envvar="CDAM_SERVER",
            show_default=True,
            metavar="ADDRESS",
            help="Its host:port; dns:///host:port to use all addresses of a name; unix:/path."
            + (" Repeatable: they share the work." if several else ""),
        ),
        click.option(
            "--timeout",
            type=click.FloatRange(0, min_open=True),
            default=30.0,
            show_default=True,
            help="Seconds for each call, with its retries where the command makes any.",
        ),
        click.option("--token", envvar="CDAM_TOKEN", help="Bearer token. Better kept in CDAM_TOKEN or a file."),
        click.option("--token-file", type=_FILE, help="File with the bearer token."),
        click.option(
            "--allow-plaintext-token",
            is_flag=True,
            help="Send the token without TLS to another machine: where something else encrypts.",
        ),
        click.option("--tls", is_flag=True, help="Use TLS, with the usual certificate authorities."),
        click.option("--ca", type=_FILE, help="Use TLS, with these certificate authorities (PEM)."),
        click.option("--cert", type=_FILE, help="For mutual TLS: the client's certificate (PEM)."),
        click.option("--key", type=_FILE, help="For mutual TLS: its private key (PEM)."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def server_from(
    *,
    address: str,
    timeout: float,
    token: str | None,
    token_file: Path | None,
    tls: bool,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    allow_plaintext_token: bool,
) -> Server:
    """The server that the connection options mean."""
    if token_file is not None:
        token = token_file.read_text(encoding="utf-8").strip()
    if (cert is None) != (key is None):
        raise click.UsageError("--cert and --key go together")
    secure = cdam.TLS(ca=ca, cert=cert, key=key) if tls or ca or cert else None
    arguments = {"timeout": timeout, "token": token, "tls": secure, "allow_plaintext_token": allow_plaintext_token}
    return Server(address, arguments)


@contextmanager
def failures(server: Server, request: dict[str, Any] | None = None) -> Iterator[None]:
    """Ends the run with one line that says what is wrong."""
    try:
        yield
    except cdam.NotFound as error:
        with server.client() as client:
            meant = hint(client, error, (request or {}).get("model", ""))
        raise Failure(describe(error, request) + meant) from error
    except (cdam.Unavailable, cdam.Unauthenticated, cdam.PermissionDenied) as error:
        raise Failure(f"{server.address}: {describe(error)}") from error
    except cdam.RpcError as error:
        raise Failure(describe(error, request)) from error
    except cdam.CdamError as error:
        raise Failure(str(error)) from error
    except OSError as error:
        raise Failure(describe_os(error)) from error


@contextmanager
def local_server(model: str) -> Iterator[tuple[str, str]]:
    """A server in this process, on a socket that nobody else sees; yields its address and the model to ask it for.

    Args:
        model: Where the environment names a file of models (CDAM_MODELS_FILE), one of these; else a timm architecture
            or ``demo``. Empty: what the environment says (CDAM_MODEL, CDAM_CHECKPOINT, ...), or the demo model.
    """
    try:
        from pydantic import ValidationError

        from cdam_server import bootstrap
        from cdam_server.compute.loading import LoadError
        from cdam_server.operation import logs
        from cdam_server.settings.config import Settings
    except ModuleNotFoundError as error:
        raise Failure(f"--local needs {error.name}: install cdam-serve with its extra `server`") from error
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="cdam-"))
        try:
            flags: dict[str, Any] = {
                "address": f"unix:{folder}/api",
                "admin_address": "127.0.0.1:0",
                "log_level": "warning",
            }
            settings = Settings.load(**flags)
            if settings.models_file is None and model:
                settings, model = Settings.load(**flags, model=model), ""
            logs.configure(settings.log_format, settings.log_level)
            address = stack.enter_context(bootstrap.serve_in_background(settings))
        except ValidationError as error:
            raise Failure("--local: " + "; ".join(map(_blamed_variable, error.errors()))) from error
        except (LoadError, ValueError, OSError) as error:
            raise Failure(f"--local: {_plain(error)}") from error
        yield address, model


def _blamed_variable(error: Mapping[str, Any]) -> str:
    """What is wrong with a setting, which --local reads from the environment alone."""
    said = str(error["msg"]).removeprefix("Value error, ")
    return f"CDAM_{str(error['loc'][0]).upper()}: {said}" if error["loc"] else said


def _plain(error: Exception) -> str:
    """The message, without the frame that pydantic puts around those of settings."""
    details = getattr(error, "errors", None)
    return "; ".join(item["msg"].removeprefix("Value error, ") for item in details()) if details else str(error)
