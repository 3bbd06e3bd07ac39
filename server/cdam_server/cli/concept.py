"""`cdam concept`."""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
from numpy.typing import NDArray

import cdam
from cdam._images import encode_image
from cdam_server.cli import concept_report
from cdam_server.cli.explain import Failure, Server, connection_options, describe, server_from
from cdam_server.cli.images import find_images
from cdam_server.cli.report import safe
from cdam_server.cli.spelling import CONCEPT_NAME, model_option, parse_size

_SUFFIX = ".safetensors"
_MANY = 16  # images from which on a bar shows how far they are

_REGISTER = """Register the concept NAME: of the IMAGEs the mean, as the model sees them; less the mean of the negatives.

IMAGE is a JPEG, PNG or WebP file, a folder, which stands for all images below, or a pattern in quotes. Any number will
do; many travel one by one, without a --timeout. With --vector FILE.npy the concept is that vector instead.

What is registered already is not registered again. If NAME has other content, --replace makes a new version of it.

\b
Examples
  cdam concept register loops loops/
  cdam concept register stripes 'zebras/**/*.jpg' --negative horses/ --label team=vision
  cdam concept register loops loops/ more/ --replace --expected-version 3
  cdam concept register axis --vector axis.npy --model biomarkers
  cdam explain scene.png -t concept:loops
"""


@click.group()
def concept() -> None:
    """Register concepts, and see which there are.

    A concept is a direction in what a model makes of images, named, and learned from examples. `cdam explain -t
    concept:NAME` shows where in an image it is.
    """


@contextmanager
def _failures(server: Server, request: dict[str, Any] | None = None) -> Iterator[None]:
    """Ends the run with one line that says what is wrong."""
    try:
        yield
    except (cdam.Unavailable, cdam.Unauthenticated, cdam.PermissionDenied) as error:
        raise Failure(f"{server.address}: {describe(error)}") from error
    except cdam.RpcError as error:
        raise Failure(describe(error, request)) from error
    except cdam.CdamError as error:
        raise Failure(str(error)) from error
    except OSError as error:
        raise Failure(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from error


def _labels(_context: click.Context, _parameter: click.Parameter, words: Sequence[str]) -> dict[str, str]:
    labels = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise click.BadParameter(f"{word!r} is not KEY=VALUE")
        labels[key] = value
    return labels


def _label_option(help_text: str) -> Callable[[Any], Any]:
    return click.option("--label", "labels", multiple=True, callback=_labels, metavar="KEY=VALUE", help=help_text)


_expected_version = click.option(
    "--expected-version",
    type=click.IntRange(min=0),
    metavar="N",
    help="Only if the name's newest version is this one; 0: if the name is free.",
)
_replace = click.option("--replace", is_flag=True, help="If NAME has other content, make a new version of it.")
_json = click.option("--json", "as_json", is_flag=True, help="Print everything that is known, as JSON.")


@concept.command(help=_REGISTER)
@click.argument("name")
@click.argument("images", nargs=-1, metavar="IMAGE...")
@click.option(
    "--negative",
    "--negatives",
    "negatives",
    multiple=True,
    metavar="IMAGE",
    help="What does not show it: a file, a folder or a pattern; repeatable.",
)
@click.option(
    "--vector",
    metavar="FILE.npy",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The vector itself, as numpy.save writes it.",
)
@model_option
@click.option("--description", default="", help="For people.")
@_label_option("For finding it again; repeatable.")
@click.option("--resize", type=click.Choice(get_args(cdam.Resize)), help="As for `cdam explain`.")
@click.option(
    "--input-size",
    metavar="HxW",
    callback=lambda _ctx, _param, text: parse_size(text) if text else None,
    help="As for `cdam explain`.",
)
@_replace
@_expected_version
@connection_options
def register(
    *, name: str, images: tuple[str, ...], negatives: tuple[str, ...], vector: Path | None, **options: Any
) -> None:
    """Register a concept."""
    if (vector is None) != bool(images) or (vector is not None and negatives):
        raise click.UsageError("a concept is made of IMAGEs, or of a --vector alone")
    settings = ("model", "description", "labels", "resize", "input_size", "replace", "expected_version")
    request = {setting: options.pop(setting) for setting in settings}
    files = {"examples": find_images(images), "negatives": find_images(negatives)}
    if twice := set(files["examples"]) & set(files["negatives"]):
        raise click.UsageError(f"{min(twice)}: both an example and a negative")
    values = None if vector is None else _read_vector(vector)
    server = server_from(**options)
    with (
        _failures(server, {**request, **files}),
        server.client() as client,
        _progress(len(files["examples"]) + len(files["negatives"])) as progress,
    ):
        found = client.register_concept(
            name, files["examples"], negatives=files["negatives"], vector=values, **request, progress=progress
        )
    with _failures(server):
        names = {_digest(file): file for file in files["examples"]}
    click.echo(concept_report.registered(found, names))


def _read_vector(file: Path) -> NDArray[Any]:
    try:
        vector = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise click.UsageError(f"--vector {file}: not as numpy.save writes an array of numbers") from error
    if not (isinstance(vector, np.ndarray) and vector.ndim == 1 and np.issubdtype(vector.dtype, np.number)):
        raise click.UsageError(f"--vector {file}: not one row of numbers")
    return vector


@contextmanager
def _progress(count: int) -> Iterator[Callable[[int], None] | None]:
    """On a terminal, a bar for many images."""
    if count < _MANY or not sys.stderr.isatty():
        yield None
        return
    with click.progressbar(length=count, label="images", file=sys.stderr, show_pos=True) as bar:
        yield lambda done: bar.update(done - bar.pos)


def _digest(file: Path) -> str:
    """The digest by which the server knows an image of this file."""
    image = encode_image(file)
    if image.WhichOneof("source") == "encoded":
        return hashlib.sha256(image.encoded).hexdigest()
    raw = image.raw
    return hashlib.sha256(f"{raw.height} {raw.width} {raw.channels}\n".encode() + raw.data).hexdigest()


@concept.command("list")
@click.option("--model", default="", metavar="NAME", help="Only concepts of this model.")
@_label_option("Only those that have it; repeatable.")
@_json
@connection_options
def list_concepts(*, model: str, labels: dict[str, str], as_json: bool, **connection: Any) -> None:
    """List the newest versions of all concepts."""
    server = server_from(**connection)
    with _failures(server), server.client() as client:
        found = list(client.concepts(model=model, labels=labels))
    if as_json:
        click.echo(json.dumps([concept_report.as_json(one) for one in found], indent=2))
    else:
        click.echo(concept_report.table(found) if found else "no concepts")


@concept.command()
@click.argument("name", required=False)
@click.option("--id", "concept_id", metavar="ID", help="The version of this id, by whatever name.")
@model_option
@_json
@connection_options
def show(*, name: str | None, concept_id: str | None, model: str, as_json: bool, **connection: Any) -> None:
    """Show all that is known of the concept NAME, and how well its examples fit."""
    if (name is None) == (concept_id is None):
        raise click.UsageError("NAME or --id, one of them")
    if concept_id is not None and model:
        raise click.UsageError("--id goes without --model")
    server = server_from(**connection)
    with _failures(server), server.client() as client:
        found = client.concept(name, id=concept_id, model=model)
    click.echo(json.dumps(concept_report.as_json(found)) if as_json else concept_report.shown(found))


@concept.command()
@click.argument("name")
@click.option("--model", required=True, metavar="NAME", help="Its model.")
@_expected_version
@click.option("--yes", is_flag=True, help="Don't ask.")
@connection_options
def delete(*, name: str, model: str, expected_version: int | None, yes: bool, **connection: Any) -> None:
    """Free the name NAME. Its versions can still be shown, and explained with, by their ids."""
    server = server_from(**connection)
    with _failures(server), server.client() as client:
        if not yes:
            if not sys.stdin.isatty():
                raise click.UsageError("there is no terminal to ask on: --yes deletes without")
            there = client.concept(name, model=model)
            click.confirm(f"Delete {name}, version {there.version} of model {model}?", abort=True)
            expected_version = there.version if expected_version is None else expected_version
        gone = client.delete_concept(name, model=model, expected_version=expected_version)
    click.echo(f"{name} of model {model} is deleted; version {gone.version} has the id {gone.id}")


@concept.command()
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="All concepts, into DIR/MODEL/NAME.safetensors.")
@click.option(
    "--model", default="", metavar="NAME", help="Its model; without it, the server's default, with --all all."
)
@click.option("-o", "--out", metavar="FILE|DIR", type=click.Path(path_type=Path), help="[NAME.safetensors; --all: .]")
@connection_options
def export(*, name: str | None, everything: bool, model: str, out: Path | None, **connection: Any) -> None:
    """Write the concept NAME to a file, to be imported by another server of the same model."""
    if (name is None) != everything:
        raise click.UsageError("NAME or --all, one of them")
    if everything and out is not None and out.exists() and not out.is_dir():
        raise click.UsageError(f"-o {out}: with --all, a folder")
    server = server_from(**connection)
    with _failures(server), server.client() as client:
        if name is not None:
            target = out or Path(name + _SUFFIX)
            click.echo(
                client.export_concept(name, target / (name + _SUFFIX) if target.is_dir() else target, model=model)
            )
            return
        written: set[str] = set()
        for found in client.concepts(model=model):
            if not re.fullmatch(CONCEPT_NAME, found.name):
                raise Failure(f"{found.name!r} is no name of a concept, and may be a path")
            file = (out or Path()) / safe(found.model) / (found.name + _SUFFIX)
            # Names that differ by letters that file names can't hold, or by their case.
            if str(file).casefold() in written:
                file = file.with_name(f"{found.name}_{found.id[:8]}{_SUFFIX}")
            written.add(str(file).casefold())
            file.parent.mkdir(parents=True, exist_ok=True)
            click.echo(client.export_concept(found, file))


@concept.command("import")
@click.argument("files", nargs=-1, required=True, metavar="FILE|DIR...", type=click.Path(exists=True, path_type=Path))
@click.option("--name", metavar="NAME", help="Another name; for a single FILE.")
@click.option("--model", default="", metavar="NAME", help="The model; without it, the one that the concept is of.")
@_replace
@connection_options
def import_concepts(*, files: tuple[Path, ...], name: str | None, model: str, replace: bool, **connection: Any) -> None:
    """Register concepts that were exported; of a DIR, all below it."""
    every = [file for path in files for file in (sorted(path.rglob("*" + _SUFFIX)) if path.is_dir() else [path])]
    if not every:
        raise click.UsageError(f"no {_SUFFIX} file below {', '.join(map(str, files))}")
    if name is not None and len(every) != 1:
        raise click.UsageError(f"--name is for a single file, not for {len(every)}")
    server = server_from(**connection)
    failed = 0
    with server.client() as client:
        for file in every:
            try:
                with _failures(server):
                    found = client.import_concept(file, name=name, model=model, replace=replace)
            except Failure as failure:
                if isinstance(failure.__cause__, cdam.Unavailable | cdam.Unauthenticated | cdam.PermissionDenied):
                    raise  # the next would fare no better
                failed += 1
                said = failure.format_message()
                click.echo(f"Error: {said if str(file) in said else f'{file}: {said}'}", err=True)
            else:
                click.echo(f"{file}  {concept_report.summary(found)}")
    sys.exit(1 if failed else 0)
