"""`cdam explain`."""

import glob
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import cdam
from cdam_cli.connections import Server, connection_options, local_server, server_from
from cdam_cli.failures import Failure, describe
from cdam_cli.hints import hint
from cdam_cli.images import find_images, tell_left_out
from cdam_cli.report import Report
from cdam_cli.spelling import (
    Given,
    method_option,
    model_option,
    parse_minus,
    preprocessing_options,
    target_option,
    targets_or_default,
)
from cdam_images.folders import once

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
@preprocessing_options()
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
