"""`cdam concept`."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

import cdam
from cdam_cli import concept_report
from cdam_cli.connections import Server, connection_options, failures, server_from
from cdam_cli.failures import Aborted, Failure, describe
from cdam_cli.images import digests, find_images, some, tell_left_out
from cdam_cli.report import safe
from cdam_cli.spelling import CONCEPT_ID, CONCEPT_NAME, WHOLE_ID, model_option, preprocessing_options
from cdam_images.folders import once, walk

_SUFFIX = ".safetensors"
_ONE_MESSAGE = 64  # images that the client sends in one message, at most
_MANY = 16  # images from which on a bar shows how far they are

_REGISTER = """Register the concept NAME: the mean of what the model makes of the IMAGEs, less that of the negatives.

IMAGE is a JPEG, PNG or WebP file, a folder, which stands for all such files below it, or a pattern in quotes; up to the
server's --max-concept-images, negatives counted in. Many travel one by one, without a --timeout. With --vector FILE.npy
the concept is that vector instead.

To repeat a registration is harmless. If NAME has other content, --replace makes a new version of it.

\b
Examples
  cdam concept register loops loops/
  cdam concept register stripes 'zebras/**/*.jpg' --negative horses/ --label team=vision
  cdam concept register loops loops/ more/ --replace --expected-version 3
  cdam concept register axis --vector axis.npy --model biomarkers
  cdam explain scene.png -t concept:loops
"""


_LIST = """List concepts, the newest version of each name.

\b
Examples
  cdam concept list
  cdam concept list --model demo --label team=vision
  cdam concept list --json | jq -r '.[] | [.name, .id] | @tsv'
"""

_SHOW = """Show the concept NAME: its whole id, and how well its examples fit.

\b
Examples
  cdam concept show loops
  cdam concept show --id 1f0c...     (64 digits)
  cdam concept show loops --json | jq '.examples | min_by(.cosine)'
"""

_DELETE = """Delete the name NAME. Its versions stay available by their ids.

\b
Example
  cdam concept delete loops --model demo
"""

_EXPORT = """Write the concept NAME, or all, to files for other servers of the same model. Files that are there are replaced.

\b
Examples
  cdam concept export loops
  cdam concept export --all -o concepts/
"""

_IMPORT = """Register concepts that were exported. A DIR stands for all .safetensors files below it.

\b
Examples
  cdam concept import loops.safetensors
  cdam concept import concepts/ --server other:8001
"""


@click.group()
def concept() -> None:
    """Register, list, show, delete, export and import concepts.

    A concept is a named direction in a model's latent space, made from example images or, for CLIP and SigLIP, from
    texts. `cdam explain -t concept:NAME` shows where in an image it is.
    """


def _labels(_context: click.Context, _parameter: click.Parameter, words: Sequence[str]) -> dict[str, str]:
    labels = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise click.BadParameter(f"{word!r} is not KEY=VALUE")
        if key in labels:
            raise click.BadParameter(f"{key!r} is given twice")
        labels[key] = value
    return labels


def label_option(help_text: str) -> Callable[[Any], Any]:
    return click.option("--label", "labels", multiple=True, callback=_labels, metavar="KEY=VALUE", help=help_text)


expected_version_option = click.option(
    "--expected-version",
    type=click.IntRange(min=0),
    metavar="N",
    help="Only if the name's newest version is this one; 0: if the name is free.",
)
replace_option = click.option("--replace", is_flag=True, help="If NAME has other content, make a new version of it.")
_json = click.option("--json", "as_json", is_flag=True, help="Print everything that is known, as JSON.")


@concept.command(help=_REGISTER, short_help="Register a concept, of images or a vector.")
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
@label_option("For finding it again; repeatable.")
@preprocessing_options("each image", "; `cdam explain` may use another")
@replace_option
@expected_version_option
@connection_options
def register(
    *, name: str, images: tuple[str, ...], negatives: tuple[str, ...], vector: Path | None, **options: Any
) -> None:
    """Register a concept."""
    if (vector is None) != bool(images) or (vector is not None and negatives):
        raise click.UsageError("a concept is made of IMAGEs, or of a --vector alone")
    settings = ("model", "description", "labels", "resize", "input_size", "replace", "expected_version")
    request = {setting: options.pop(setting) for setting in settings}
    found, against = find_images(images), find_images(negatives)
    files = {"examples": found.images, "negatives": against.images}
    if len(both := [*files["examples"], *files["negatives"]]) > len(different := once(both)):
        twice = next(file for file in both if file not in different or both.count(file) > 1)
        raise click.UsageError(f"{twice}: both an example and a negative")
    values = None if vector is None else _read_vector(vector)
    server = server_from(**options)
    known = digests(both)
    _tell_what_is_left_out([*found.left_out, *against.left_out], files, known)
    with (
        failures(server, {"name": name, **request, **files}),
        server.client() as client,
        _progress(len(known)) as progress,
        _ending(name, len(known), server, progress) as sent,
    ):
        client.model(request["model"])  # fails at once where an upload would be tried again and again
        concept = client.register_concept(
            name, files["examples"], negatives=files["negatives"], vector=values, **request, progress=sent
        )
    names = {known[file]: file for file in reversed(files["examples"])}
    words = {word: request[word] for word in ("description", "labels")}
    click.echo(concept_report.registered(concept, names, **words))


def _tell_what_is_left_out(
    others: Sequence[Path], files: Mapping[str, Sequence[Path]], known: Mapping[Path, str]
) -> None:
    tell_left_out(others)
    if twice := [file for side in files.values() for file in _repeated(side, known)]:
        click.echo(f"left out: {len(twice)} duplicate{'s' * (len(twice) > 1)}: {some(twice)}", err=True)


def _repeated(files: Sequence[Path], known: Mapping[Path, str]) -> Iterator[Path]:
    """Files with the content of one before them."""
    seen: set[str] = set()
    for file in files:
        if known[file] in seen:
            yield file
        seen.add(known[file])


@contextmanager
def _ending(
    name: str, count: int, server: Server, progress: Callable[[int], None] | None
) -> Iterator[Callable[[int], None]]:
    """Says what came of a registration that ends early; yields what is to be told how many images were sent."""
    sent = 0

    def tell(done: int) -> None:
        nonlocal sent
        sent = max(sent, done)  # of all attempts: the first may have been whole, and its answer lost
        if progress is not None:
            progress(done)

    def nothing() -> bool:  # the last image, and in one message every one, may have been all that the server needed
        return sent < count and (sent > 0 or count > _ONE_MESSAGE)

    try:
        yield tell
    except KeyboardInterrupt:
        doubtful = f"probably nothing was registered; `cdam concept show {name}` tells"
        raise Aborted("nothing was registered" if nothing() else doubtful) from None
    except cdam.Unavailable as error:
        if not sent:
            raise
        registered = "nothing was registered; " if nothing() else ""
        raise Failure(f"{server.address}: {describe(error)}; {registered}repeat the command") from error


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


@concept.command("list", help=_LIST)
@click.option("--model", default="", metavar="NAME", help="Only concepts of this model.")
@label_option("Only those that have it; repeatable.")
@_json
@connection_options
def list_concepts(*, model: str, labels: dict[str, str], as_json: bool, **connection: Any) -> None:
    """List concepts."""
    server = server_from(**connection)
    with failures(server), server.client() as client:
        found = list(client.concepts(model=model, labels=labels))
        if not found:
            _check_model(client, model)
    if as_json:
        click.echo(json.dumps([concept_report.as_json(one) for one in found], indent=2))
    else:
        click.echo(concept_report.table(found) if found else "no concepts")


@concept.command(help=_SHOW, short_help="Show what is known of a concept.")
@click.argument("name", required=False)
@click.option("--id", "concept_id", metavar="ID", help="A version by its whole id, of 64 digits.")
@model_option
@_json
@connection_options
def show(*, name: str | None, concept_id: str | None, model: str, as_json: bool, **connection: Any) -> None:
    """Show a concept."""
    if (name is None) == (concept_id is None):
        raise click.UsageError("NAME or --id, one of them")
    if concept_id is not None and model:
        raise click.UsageError("--id goes without --model")
    if concept_id is not None and not re.fullmatch(CONCEPT_ID, concept_id):
        raise click.UsageError(f"--id: {WHOLE_ID}")
    server = server_from(**connection)
    with failures(server, {"model": model}), server.client() as client:
        found = client.concept(name, id=concept_id, model=model)
    click.echo(json.dumps(concept_report.as_json(found)) if as_json else concept_report.shown(found))


@concept.command(help=_DELETE)
@click.argument("name")
@click.option("--model", required=True, metavar="NAME", help="Its model; for safety, none by default.")
@expected_version_option
@click.option("--yes", is_flag=True, help="Don't ask.")
@connection_options
def delete(*, name: str, model: str, expected_version: int | None, yes: bool, **connection: Any) -> None:
    """Delete a concept."""
    server = server_from(**connection)
    request = {"name": name, "model": model, "expected_version": expected_version}
    with failures(server, request), server.client() as client:
        if not yes:
            if not sys.stdin.isatty():
                raise click.UsageError("there is no terminal to ask on: --yes deletes without")
            there = client.concept(name, model=model)
            click.confirm(f"Delete {name}, version {there.version} of model {model}?", abort=True)
            expected_version = there.version if expected_version is None else expected_version
        gone = client.delete_concept(name, model=model, expected_version=expected_version)
    click.echo(f"{name} of model {model} is deleted; version {gone.version} has the id {gone.id}")


@concept.command(help=_EXPORT, short_help="Write concepts to files, for other servers.")
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="All concepts, into DIR/MODEL/NAME.safetensors.")
@click.option(
    "--model", default="", metavar="NAME", help="Its model; without it, the server's default, with --all all."
)
@click.option(
    "-o", "--out", metavar="FILE|DIR/", help="A file, or a folder, made if need be.  [NAME.safetensors; --all: .]"
)
@connection_options
def export(*, name: str | None, everything: bool, model: str, out: str | None, **connection: Any) -> None:
    """Export a concept, or all."""
    if (name is None) != everything:
        raise click.UsageError("NAME or --all, one of them")
    target = Path(out or ".")
    if everything and target.exists() and not target.is_dir():
        raise click.UsageError(f"-o {out}: with --all, a folder")
    server = server_from(**connection)
    with failures(server, {"model": model}), server.client() as client:
        if name is not None:
            folder = out is None or out.endswith(("/", os.sep)) or target.is_dir()
            # The concept comes first, so that a name that is none leaves no folder behind.
            _export(client, client.concept(name, model=model), target / _file_name(name) if folder else target)
            return
        written: set[str] = set()
        for found in client.concepts(model=model):
            if not re.fullmatch(CONCEPT_NAME, found.name):
                raise Failure(f"{found.name!r} is no name of a concept, and may be a path")
            file = plain = target / safe(found.model) / _file_name(found.name)
            number = 1
            while str(file).casefold() in written:  # by names that differ in case, or in what file names can't hold
                number += 1
                file = plain.with_name(f"{plain.stem}_{number}{_SUFFIX}")
            written.add(str(file).casefold())
            _export(client, found, file)
        if not written:
            _check_model(client, model)
            click.echo("no concepts", err=True)


def _check_model(client: cdam.Client, model: str) -> None:
    """Fail if there is no model of this name: where no concept was found, a typo may be why."""
    if model:
        client.model(model)


def _file_name(name: str) -> str:
    """What a concept's file is called; never one that is hidden."""
    return ("_" if name.startswith(".") else "") + name + _SUFFIX


def _export(client: cdam.Client, found: cdam.RegisteredConcept, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    click.echo(client.export_concept(found, file))


@concept.command("import", help=_IMPORT)
@click.argument("files", nargs=-1, required=True, metavar="FILE|DIR...", type=click.Path(exists=True, path_type=Path))
@click.option("--name", metavar="NAME", help="Another name; for a single FILE.")
@click.option("--model", default="", metavar="NAME", help="The model; without it, the one that the concept is of.")
@replace_option
@connection_options
def import_concepts(*, files: tuple[Path, ...], name: str | None, model: str, replace: bool, **connection: Any) -> None:
    """Import concepts."""
    every = once(file for path in files for file in (walk(path, {_SUFFIX})[0] if path.is_dir() else [path]))
    if not every:
        raise click.UsageError(f"no {_SUFFIX} file below {', '.join(map(str, files))}")
    if name is not None and len(every) != 1:
        raise click.UsageError(f"--name is for a single file, not for {len(every)}")
    server = server_from(**connection)
    failed = 0
    with server.client() as client:
        for file in every:
            try:
                with failures(server):
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
