"""What the client commands say when something fails: one line, in the words of the command line."""

import re
from collections.abc import Mapping
from typing import IO, Any

import click

import cdam
from cdam_cli.spelling import spelled


class Failure(click.ClickException):
    """Ends the run with one line on stderr and exit code 1."""


class Aborted(click.ClickException):
    """Ends the run as the user told it to, likewise."""

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"Aborted: {self.message}.", err=file is None, file=file)


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


def describe(error: cdam.RpcError, request: Mapping[str, Any] | None = None) -> str:
    """One line for people: what is wrong with which option, or with the server."""
    match error:
        case cdam.Unavailable() if error.retry_after is None:
            return _unreachable(error)
        case cdam.Unauthenticated():
            return f"wants other credentials, see --token-file ({_first_line(error)})"
        case cdam.AlreadyExists() | cdam.VersionMismatch():
            return _conflict(error, request or {})
        case cdam.DeadlineExceeded():
            return "no answer in time, see --timeout"
        case _ if error.violations:
            return "; ".join(_blamed(wrong, request or {}) for wrong in error.violations)
        case _:
            return _said(error)


def describe_os(error: OSError) -> str:
    """One line for people: what is wrong with which file."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def _said(error: cdam.RpcError) -> str:
    if isinstance(error, cdam.Unimplemented) and not error.reason:
        return _OTHER_PORT
    return _first_line(error) or error.code.name.lower().replace("_", " ")


def _blamed(wrong: cdam.FieldViolation, request: Mapping[str, Any]) -> str:
    """What is wrong with a field of the request; of some it speaks for itself."""
    if wrong.field in {"examples", "negatives", "model_fingerprint"}:
        return wrong.description
    return f"{_option(wrong.field, request)}: {wrong.description}"


def _conflict(error: cdam.AlreadyExists | cdam.VersionMismatch, request: Mapping[str, Any]) -> str:
    if isinstance(error, cdam.AlreadyExists):
        return f"{error.name} is there already, with other content; --replace makes a new version"
    name, expected = request.get("name", "the name"), request.get("expected_version")
    if error.current_version == 0:
        return f"{name} is free, and has no version {expected}"
    if expected == 0:
        return f"{name} is at version {error.current_version}, not free"
    return f"{name} is at version {error.current_version}, not {expected}"


def _option(field: str, request: Mapping[str, Any]) -> str:
    """What the command line calls a field of the request."""
    subject, _, rest = field.partition(".")
    if subject == "sample" and rest:
        part, _, source = rest.partition(".")
        inside = source.removeprefix("encoded").removeprefix("raw").lstrip(".")
        return f"{part}.{inside}" if inside else part
    path = rest if subject in {"spec", "protocol"} else field
    for prefix, option in _OPTIONS.items():
        if found := re.match(rf"{re.escape(prefix)}(?:\[(\d+)\])?(?:[.[ ]|$)", path):
            values = request.get(prefix, ())
            if found[1] and int(found[1]) < len(values):
                return f"{option} {spelled(values[int(found[1])])}"
            return f"{option} {values!r}" if values and prefix == "name" else option
    return field


def _unreachable(error: cdam.RpcError) -> str:
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
