"""`cdam explain`, and how the client commands reach a server."""

import json
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, get_args

import click

import cdam

Command = TypeVar("Command", bound=Callable[..., Any])

_LARGE = 512  # longer side of an overlay of a small image, in pixels
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

_HELP = """Explain images: one map for each target and method, orange where the image speaks for it, blue against it.

IMAGE is a JPEG, PNG or WebP file. For each, this writes to the folder given by -o an overlay for every map,
IMAGE.TARGET.METHOD.png, and IMAGE.json with all scores and where on the image they lie.

\b
A TARGET is one of
  tench        the output of this name (`cdam models --json` lists them); a number is a name first
  #3, index:3  the output of this index, from 0
  top:3        the three outputs with the highest values
  name:top:3   the output that is really called so
Without any, the output with the highest value is explained.

\b
Examples
  cdam explain scene.png
  cdam explain scene.png --target 7 --target top:3 -o out
  cdam explain *.jpg --target tench --server dns:///cdam.example.org:8001 --tls --token-file token
  cdam explain scene.png --json | jq '.maps[] | {label, probability}'
  cdam explain scene.png --local      (no server needed; with the extra `server` installed)
"""


class Failure(click.ClickException):
    """Ends the run with one line on stderr and exit code 1."""


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


def connection_options(command: Command) -> Command:
    """The options that say how to reach a server; the command gets them as `**connection`."""
    options = [
        click.option(
            "--server",
            "address",
            default="localhost:8001",
            envvar="CDAM_SERVER",
            show_default=True,
            metavar="ADDRESS",
            help="Its host:port; dns:///host:port to use all addresses of a name; unix:/path.",
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
            raise Failure("--local: " + "; ".join(item["msg"] for item in error.errors())) from error
        except (LoadError, ValueError, OSError) as error:
            raise Failure(f"--local: {_plain(error)}") from error
        yield address, model


def _plain(error: Exception) -> str:
    """The message, without the frame that pydantic puts around those of settings."""
    details = getattr(error, "errors", None)
    return "; ".join(item["msg"].removeprefix("Value error, ") for item in details()) if details else str(error)


def parse_target(text: str) -> cdam.Output | cdam.TopK:
    """The target that the command line spells so; see the command's help.

    Raises:
        click.BadParameter: if it spells none.
    """
    kind, given, rest = text.partition(":")
    if text.startswith("#"):
        return cdam.Output(_whole_number(text[1:], 0, text))
    if given and kind == "index":
        return cdam.Output(_whole_number(rest, 0, text))
    if given and kind == "top":
        return cdam.TopK(_whole_number(rest, 1, text))
    name = text.removeprefix("name:")
    if not name:
        raise click.BadParameter(f"{text!r}: the name is missing")
    return cdam.Output(name)


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of "224x336", or of "224" for both.

    Raises:
        click.BadParameter: if it is no size.
    """
    found = re.fullmatch(r"([1-9][0-9]{0,4})(?:x([1-9][0-9]{0,4}))?", text)
    if not found:
        raise click.BadParameter(f"{text!r} is not HEIGHTxWIDTH in pixels, as in 224x336")
    return int(found[1]), int(found[2] or found[1])


def _whole_number(digits: str, least: int, text: str) -> int:
    if re.fullmatch(r"[0-9]{1,9}", digits) and int(digits) >= least:
        return int(digits)
    raise click.BadParameter(f"{text!r} wants a whole number from {least}; for an output so called, 'name:{text}'")


@click.command(help=_HELP)
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", type=click.Path(path_type=Path))
@click.option(
    "-t",
    "--target",
    "targets",
    multiple=True,
    callback=lambda _ctx, _param, texts: tuple(map(parse_target, texts)),
    help="What to explain; repeatable.  [top:1]",
)
@click.option(
    "-m",
    "--method",
    "methods",
    multiple=True,
    type=click.Choice(list(cdam.METHODS)),
    metavar="METHOD",
    help=f"How; repeatable: {', '.join(cdam.METHODS)}.  [cdam]",
)
@click.option(
    "-o", "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder to write to.  [.; with --json: none]"
)
@click.option("--model", default="", metavar="NAME", help="The model; without it, the server's default.")
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
@click.option("--sheet", is_flag=True, help="Also write IMAGE.sheet.png: the image and its maps side by side.")
@click.option("--json", "as_json", is_flag=True, help="Print each image's answer as a line of JSON, not as a table.")
@click.option(
    "--local",
    is_flag=True,
    help="Explain in this process, without a server; CDAM_CHECKPOINT and so on say with what (cdam serve --help).",
)
@connection_options
def explain(
    images: tuple[Path, ...], targets: tuple[cdam.Output | cdam.TopK, ...], *, local: bool, **options: Any
) -> None:
    """Explain every image; exit with 1 if one failed."""
    look = {name: options.pop(name) for name in ("shared_scale", "blocks", "sheet", "as_json", "out")}
    request = {name: options.pop(name) for name in ("methods", "model", "resize", "input_size")}
    request["targets"] = targets or (cdam.TopK(1),)
    if look["out"] is None and not look["as_json"]:
        look["out"] = Path()
    if look["sheet"] and look["out"] is None:
        raise click.UsageError("--sheet with --json needs a folder: -o DIR")
    report = Report(**look)
    server = server_from(**options)
    if local:
        with local_server(request["model"]) as (address, request["model"]):
            failed = _explain_all(images, Server(address, {"timeout": server.arguments["timeout"]}), request, report)
    else:
        failed = _explain_all(images, server, request, report)
    sys.exit(1 if failed else 0)


def _explain_all(images: Sequence[Path], server: Server, request: dict[str, Any], report: "Report") -> int:
    """Explain every image, and return how many failed."""
    failed = 0
    with server.client() as client:
        for path in images:
            try:
                report.add(path, client.explain(path, **request))
            except (cdam.Unavailable, cdam.Unauthenticated, cdam.PermissionDenied) as error:
                raise Failure(f"{server.address}: {describe(error)}") from error  # the next image would fare no better
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


_OPTIONS = {
    "targets": "--target",
    "methods": "--method",
    "model": "--model",
    "preprocessing.resize_mode": "--resize",
    "preprocessing.input_size": "--input-size",
    "image": "the image",
}


def describe(error: cdam.RpcError, request: dict[str, Any] | None = None) -> str:
    """One line for people: what is wrong with which option, or with the server."""
    match error:
        case cdam.InvalidArgument() if error.violations:
            return "; ".join(f"{_option(v.field, request or {})}: {v.description}" for v in error.violations)
        case cdam.Unavailable() if error.retry_after is None:
            return f"no server answers there ({_first_line(error)})"
        case cdam.Unauthenticated():
            return f"wants other credentials, see --token-file ({_first_line(error)})"
        case cdam.DeadlineExceeded():
            return "no answer in time, see --timeout"
        case _:
            name = error.code.name.lower().replace("_", " ")
            return _first_line(error) or name


def _option(path: str, request: dict[str, Any]) -> str:
    """What the command line calls a field of the request."""
    for prefix, option in _OPTIONS.items():
        if found := re.match(rf"{re.escape(prefix)}(?:\[(\d+)\])?(?:\.|$)", path):
            values = request.get(prefix, ())
            if found[1] and int(found[1]) < len(values):
                return f"{option} {_spelled(values[int(found[1])])}"
            return option
    return path


def _spelled(value: Any) -> str:
    match value:
        case cdam.TopK():
            return f"top:{value.k}"
        case cdam.Output():
            return f"#{value.selector}" if isinstance(value.selector, int) else str(value.selector)
        case _:
            return str(value)


def _first_line(error: cdam.RpcError) -> str:
    return error.message.strip().partition("\n")[0]


@dataclass
class Report:
    """What is shown and written of each answer.

    Attributes:
        out: Folder for files; None: none.
        as_json: Print JSON lines in place of tables.
        shared_scale: One scale of colours for all maps of an image.
        blocks: Show patches as blocks.
        sheet: Also write a contact sheet.
    """

    out: Path | None
    as_json: bool
    shared_scale: bool
    blocks: bool
    sheet: bool
    _taken: set[str] = field(default_factory=set)

    def add(self, path: Path, explanation: cdam.Explanation) -> None:
        """Show and write one image's answer."""
        stem = self._free(path.stem, "")
        files = self._write_overlays(stem, explanation) if self.out else [None] * len(explanation)
        answer = as_json(path, explanation, files)
        if self.out:
            self._write_text(f"{stem}.json", json.dumps(answer))
            if self.sheet:
                picture = cdam.render.sheet(
                    explanation, shared_scale=self.shared_scale, interpolation=self._interpolation, title=path.name
                )
                picture.save(self.out / f"{stem}.sheet.png")
        if self.as_json:
            click.echo(json.dumps(answer))
        else:
            click.echo(table(path, explanation, files))

    @property
    def _interpolation(self) -> cdam.Interpolation:
        return "nearest" if self.blocks else "bicubic"

    def _write_overlays(self, stem: str, explanation: cdam.Explanation) -> list[Path | None]:
        assert self.out is not None
        self.out.mkdir(parents=True, exist_ok=True)
        scale = cdam.render.limit(explanation) if self.shared_scale else None
        zoom = max(1, round(_LARGE / max(explanation.image_size)))
        files: list[Path | None] = []
        for relevance in explanation:
            parts = [stem, relevance.label, relevance.method.kind]
            file = self.out / self._free(".".join(_safe(part) for part in parts if part), ".png")
            relevance.overlay(scale=scale, interpolation=self._interpolation, zoom=zoom).save(file)
            files.append(file)
        return files

    def _write_text(self, name: str, text: str) -> None:
        assert self.out is not None
        (self.out / name).write_text(text + "\n", encoding="utf-8")

    def _free(self, stem: str, suffix: str) -> str:
        """A file name that this run has not used: images in different folders may share their stem."""
        stem = _safe(stem)
        name, number = stem + suffix, 1
        while name.lower() in self._taken:  # some file systems don't tell cases apart
            number += 1
            name = f"{stem}-{number}{suffix}"
        self._taken.add(name.lower())
        return name


def _safe(text: str) -> str:
    """The text with what file names can't hold replaced, and of a length that they can."""
    return re.sub(r"[^\w.+-]+", "_", text).strip("._")[:80] or "_"


def as_json(path: Path, explanation: cdam.Explanation, files: Sequence[Path | None]) -> dict[str, Any]:
    """Everything that an answer says, in JSON's types."""
    region = explanation.region
    return {
        "image": str(path),
        "request_id": explanation.request_id,
        "model": explanation.model,
        "fingerprint": explanation.fingerprint,
        "patch_grid": explanation.patch_grid,
        "region": {"left": region.left, "top": region.top, "right": region.right, "bottom": region.bottom},
        "image_size": explanation.image_size,
        "input_size": explanation.input_size,
        "seconds": {name: getattr(explanation.timing, name) for name in ("decode", "queue", "trunk", "tail", "total")},
        "token_cache_hit": explanation.token_cache_hit,
        "maps": [
            {
                "label": relevance.label,
                "method": relevance.method.kind,
                "output_index": relevance.target.output_index if relevance.target else None,
                "value": relevance.target.value if relevance.target else None,
                "probability": relevance.target.probability if relevance.target else None,
                "prefix_share": relevance.prefix_share,
                "overlay": str(file) if file else None,
                "scores": relevance.scores.tolist(),
            }
            for relevance, file in zip(explanation, files, strict=True)
        ],
    }


def table(path: Path, explanation: cdam.Explanation, files: Sequence[Path | None]) -> str:
    """A line for each map: the target, the model's answer to it, and how much speaks for and against it."""
    probabilities = any(target.probability is not None for target in explanation.targets)
    rows = [("target", "method", "logit" if probabilities else "value", "probability", "for", "against", "file")]
    for relevance, file in zip(explanation, files, strict=True):
        target, scores = relevance.target, relevance.scores
        probability = target.probability if target else None
        rows.append(
            (
                relevance.label or "-",
                relevance.method.kind,
                f"{target.value:.3f}" if target else "-",
                f"{probability:.1%}" if probability is not None else "-",
                f"{scores.clip(min=0).sum():+.4f}",
                f"{scores.clip(max=0).sum():+.4f}",
                str(file or "-"),
            )
        )
    height, width = explanation.patch_grid
    milliseconds = 1000 * explanation.timing.total
    head = f"{path}  {explanation.model}, {height} x {width} patches, {milliseconds:.1f} ms"
    return "\n".join([head, *columns(rows, right={2, 3, 4, 5}), ""])


def columns(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> Iterator[str]:
    """Lines with the cells of each column one below the other, those of `right` aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield ("  " + "  ".join(cells)).rstrip()
