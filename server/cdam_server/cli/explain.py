"""`cdam explain`, and how the client commands reach a server."""

import glob
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, TypeVar, get_args

import click

import cdam
from cdam_images.folders import once
from cdam_server.cli.hints import hint
from cdam_server.cli.images import find_images, tell_left_out
from cdam_server.cli.report import Report
from cdam_server.cli.spelling import (
    Given,
    method_option,
    model_option,
    parse_minus,
    parse_size,
    spelled,
    target_option,
    targets_or_default,
)

Command = TypeVar("Command", bound=Callable[..., Any])

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

_HELP = """Explain images: one map for each target and method, orange where the image speaks for it, blue against it.

IMAGE is a JPEG, PNG or WebP file, a folder, which stands for all such files below it, or a pattern in quotes. For each, this writes to the folder given by -o an overlay for every map,
IMAGE.TARGET.METHOD.png, and IMAGE.json with all scores and where on the image they lie.

\b
A TARGET is one of
  tench        the output of this name (`cdam models --json` lists them); a number is a name first
  #3, index:3  the output of this index, from 0
  top:3        the three outputs with the highest values
  name:top:3   the output that is really called so
  concept:loops          the concept of this name (`cdam concept list`), compared by the dot product
  concept:loops:cosine   by the cosine, or l2
  concept:id=1f0c...     a version of it, by its whole id (`cdam concept show` prints it)

Without any, the output with the highest value is explained. With --minus, each TARGET is explained minus that output
or concept: what speaks for the one and against the other.

\b
A METHOD is a name, or a name with parameters
  smooth_cdam
  smooth_cdam:samples=20,seed=3,noise=0.1    (a fraction of the range; noise=absolute:0.5)
  integrated_cdam:steps=100,quadrature=gauss_legendre
  attention:heads=0+2

`cdam models` says which methods a model serves.

\b
Examples
  cdam explain scene.png
  cdam explain scene.png --target 7 --target top:3 -o out
  cdam explain scene.png --target 7 --minus 3 --method cdam --method integrated_cdam:steps=20
  cdam explain scene.png --target concept:loops --minus concept:strokes
  cdam explain *.jpg --target tench --server dns:///cdam.example.org:8001 --tls --token-file token
  cdam explain scene.png --target 7 --box 0.2      (where is it?)
  cdam explain scene.png --json | jq '.maps[] | {label, probability}'
  cdam explain scene.png --local      (no server needed; with the extra `server` installed)
"""


class Failure(click.ClickException):
    """Ends the run with one line on stderr and exit code 1."""


class Aborted(click.ClickException):
    """Ends the run as the user told it to, likewise."""

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"Aborted: {self.message}.", err=file is None, file=file)


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
            raise Failure(f"{error.filename}: {error.strerror}") from error


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
            help="Seconds for each call, retries included.",
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
def local_server(model: str) -> Iterator[tuple[str, str]]:
    """A server in this process, on a socket that nobody else sees; yields its address and the model to ask it for.

    Args:
        model: Where the environment names a file of models (CDAM_MODELS_FILE), one of these; else a timm architecture
            or ``demo``. Empty: what the environment says (CDAM_MODEL, CDAM_CHECKPOINT, ...), or the demo model.
    """
    try:
        from pydantic import ValidationError

        from cdam_server import bootstrap, logs
        from cdam_server.config import Settings
        from cdam_server.loading import LoadError
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


@click.command(help=_HELP)
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@target_option
@click.option(
    "--minus",
    metavar="TARGET",
    callback=lambda _ctx, _param, text: parse_minus(text) if text is not None else None,
    help="Explain each target minus this one.",
)
@method_option
@click.option(
    "-o", "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder to write to.  [.; with --json: none]"
)
@model_option
@click.option(
    "--resize",
    type=click.Choice(get_args(cdam.Resize)),
    help="model: as it was evaluated, mostly the centre of the image; squash: all of it.",
)
@click.option(
    "--input-size",
    metavar="HxW",
    callback=lambda _ctx, _param, text: parse_size(text) if text else None,
    help="The model's input in pixels, where it is flexible.",
)
@click.option("--shared-scale", is_flag=True, help="One scale of colours for all maps of an image, to compare them.")
@click.option("--blocks", is_flag=True, help="Show each patch as a block instead of a smooth map.")
@click.option(
    "--box",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="FRACTION",
    help="Draw and print, for each map, the box around the largest connected part of the image that scores at least this "
    "fraction of the map's maximum; 0.2 is usual. In pixels of the image.",
)
@click.option("--sheet", is_flag=True, help="Also write IMAGE.sheet.png: the image and its maps side by side.")
@click.option("--json", "as_json", is_flag=True, help="Print each image's answer as a line of JSON, not as a table.")
@click.option(
    "--local",
    is_flag=True,
    help="Explain in this process, without a server: with CDAM_CHECKPOINT and so on, and the concepts of this machine's "
    "--data-dir, CDAM_DATA_DIR (cdam serve --help).",
)
@connection_options
def explain(
    images: tuple[str, ...],
    targets: tuple[Given, ...],
    minus: cdam.Output | cdam.Concept | None,
    *,
    local: bool,
    **options: Any,
) -> None:
    """Explain every image; exit with 1 if one failed."""
    look = {name: options.pop(name) for name in ("shared_scale", "blocks", "box", "sheet", "as_json", "out")}
    request = {name: options.pop(name) for name in ("methods", "model", "resize", "input_size")}
    request["targets"] = _targets(targets, minus, request["methods"])
    if look["out"] is None and not look["as_json"]:
        look["out"] = Path()
    if look["sheet"] and look["out"] is None:
        raise click.UsageError("--sheet with --json needs a folder: -o DIR")
    report = Report(**look)
    server = server_from(**options)
    files, failed = _files(images)
    if local and files:
        with local_server(request["model"]) as (address, request["model"]):
            failed += _explain_all(files, Server(address, {"timeout": server.arguments["timeout"]}), request, report)
    elif files:
        failed += _explain_all(files, server, request, report)
    sys.exit(1 if failed else 0)


def _files(words: Sequence[str]) -> tuple[list[Path], int]:
    """The images that are meant, each once, and how many words mean none; a file that is not there fails when read."""
    files: list[Path] = []
    others: list[Path] = []
    failed = 0
    for word in words:
        if Path(word).exists() or glob.has_magic(word):
            try:
                found = find_images([word])
            except click.UsageError as error:
                failed += 1
                click.echo(f"Error: {error.message}", err=True)
            else:
                files += found.images
                others += found.left_out
        else:
            files.append(Path(word))
    tell_left_out(once(others))
    return once(files), failed


def _targets(
    targets: Sequence[Given], minus: cdam.Output | cdam.Concept | None, methods: Sequence[cdam.Method]
) -> tuple[cdam.Target, ...]:
    """What to explain, by the command line's words for it."""
    if minus is not None:
        if not targets or any(isinstance(target, cdam.TopK) for target in targets):
            raise click.UsageError("--minus needs a --target to be subtracted from: outputs or concepts, no top:K")
        return tuple(cdam.Contrast(target, minus) for target in targets if not isinstance(target, cdam.TopK))
    return targets_or_default(targets, methods)


def _explain_all(images: Sequence[Path], server: Server, request: dict[str, Any], report: Report) -> int:
    """Explain every image, and return how many failed."""
    failed = 0
    with server.client() as client:
        for path in images:
            try:
                report.add(path, client.explain(path, **request))
            except (cdam.Unavailable, cdam.Unauthenticated, cdam.PermissionDenied) as error:
                raise Failure(f"{server.address}: {describe(error)}") from error  # the next image would fare no better
            except (cdam.NotFound, cdam.FailedPrecondition) as error:  # likewise
                meant = hint(client, error, request["model"]) if isinstance(error, cdam.NotFound) else ""
                raise Failure(describe(error, request) + meant) from error
            except cdam.RpcError as error:
                failed += 1
                click.echo(f"Error: {path}: {describe(error, request)}", err=True)
            except cdam.CdamError as error:
                failed += 1
                click.echo(f"Error: {error}", err=True)
            except OSError as error:
                failed += 1
                click.echo(f"Error: {error.filename or path}: {error.strerror or error}", err=True)
    return failed


_OTHER_PORT = (
    "this port does not serve cdam's API; is it the admin port? The API's is 8001 if it was not told otherwise"
)
_OPTIONS = {
    "targets": "--target",
    "methods": "--method",
    "metrics": "--metric",
    "model": "--model",
    "preprocessing.resize_mode": "--resize",
    "preprocessing.input_size": "--input-size",
    "image": "the image",
    "examples": "example",
    "negatives": "negative",
    "name": "NAME",
    "id": "--id",
    "labels": "--label",
    "description": "--description",
    "vector": "--vector",
    "expected_version": "--expected-version",
}


def describe(error: cdam.RpcError, request: dict[str, Any] | None = None) -> str:
    """One line for people: what is wrong with which option, or with the server."""
    match error:
        case cdam.InvalidArgument() if error.violations:
            return "; ".join(_blamed(v.field, v.description, request or {}) for v in error.violations)
        case cdam.Unavailable() if error.retry_after is None:
            return _nobody(error)
        case cdam.Unauthenticated():
            return f"wants other credentials, see --token-file ({_first_line(error)})"
        case cdam.AlreadyExists() | cdam.VersionMismatch():
            return _conflict(error, request or {})
        case cdam.DeadlineExceeded():
            return "no answer in time, see --timeout"
        case _:
            return _said(error, request or {})


def _said(error: cdam.RpcError, request: dict[str, Any]) -> str:
    if isinstance(error, cdam.Unimplemented) and not error.reason:
        return _OTHER_PORT
    line = _first_line(error) or error.code.name.lower().replace("_", " ")
    if found := re.match(r"([\w.[\]]+): ", line):  # the path of a field
        return _blamed(found[1], line[found.end() :], request)
    return line


def _blamed(path: str, wrong: str, request: dict[str, Any]) -> str:
    """What is wrong with a field of the request; of some it speaks for itself."""
    return wrong if path in {"examples", "negatives", "model_fingerprint"} else f"{_option(path, request)}: {wrong}"


def _conflict(error: cdam.AlreadyExists | cdam.VersionMismatch, request: dict[str, Any]) -> str:
    if isinstance(error, cdam.AlreadyExists):
        return f"{error.name} is there already, with other content; --replace makes a new version"
    name, expected = request.get("name", "the name"), request.get("expected_version")
    if error.current_version == 0:
        return f"{name} is free, and has no version {expected}"
    if expected == 0:
        return f"{name} is at version {error.current_version}, not free"
    return f"{name} is at version {error.current_version}, not {expected}"


def _option(path: str, request: dict[str, Any]) -> str:
    """What the command line calls a field of the request."""
    for prefix, option in _OPTIONS.items():
        if found := re.match(rf"(?:spec\.|protocol\.)?{re.escape(prefix)}(?:\[(\d+)\])?(?:[.[ ]|$)", path):
            values = request.get(prefix, ())
            if found[1] and int(found[1]) < len(values):
                return f"{option} {spelled(values[int(found[1])])}"
            return f"{option} {values!r}" if values and prefix == "name" else option
    return path


def _nobody(error: cdam.RpcError) -> str:
    """The transport's words, cut to the system's where these say it: no server there, or no such host."""
    line = _first_line(error)
    if found := re.search(r"Failed to connect to remote host: (?:connect: )?([^:()]+?)(?: \(\d+\))?$", line):
        return f"no server answers there ({found[1]}); start one: cdam serve"
    if "Domain name not found" in line:
        return "no host has this name"
    if "http1.x server" in line:
        return _OTHER_PORT
    return f"no server answers there ({line})"


def _first_line(error: cdam.RpcError) -> str:
    return error.message.strip().partition("\n")[0]
