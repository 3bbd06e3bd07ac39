"""`cdam check`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cdam_cli.model_options import FILE, chosen, complain, model_options

if TYPE_CHECKING:
    from cdam_server.compute.models import ServedModel
    from cdam_server.settings.specs import ModelSpec

_HELP = """Load a model as a server would, and say what it answers.

Loads the model exactly as `cdam serve` does with the same options, and prints what decides its answers: where the
weights are from, what was taken off, left out or resampled, outputs, preprocessing, methods. With --image the largest
outputs for it; with --expect they are compared with those of your own code, and the exit code is 1 if they differ.
No server is needed.

\b
Examples
  cdam check --model vit_small_patch16_224 --checkpoint model.ckpt --outputs names.txt --image x.jpg
  cdam check --models-file models.yaml --only lesions --image x.jpg --expect logits.json
"""


@click.command(help=_HELP)
@click.option("--config", type=FILE, envvar="CDAM_CONFIG", help="YAML file of settings, as for `cdam serve`.")
@model_options
@click.option("--only", metavar="NAME", help="One model of the file.  [all]")
@click.option("--image", type=FILE, help="JPEG, PNG or WebP file to ask the model about.")
@click.option("--expect", type=FILE, help="JSON list of the outputs that your own code has for the image.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=1e-3,
    show_default=True,
    help="Largest difference to --expect, relative to its largest value where that is above 1.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(
    config: Path | None,
    only: str | None,
    image: Path | None,
    expect: Path | None,
    tolerance: float,
    *,
    as_json: bool,
    **flags: Any,
) -> None:
    """Load models and tell what they are."""
    if expect is not None and image is None:
        raise click.UsageError("--expect needs --image: the outputs are of one")
    with complain():
        from cdam_server.operation import logs
        from cdam_server.settings.config import Settings
        from cdam_server.settings.specs import check_files

        settings = Settings.load(config, **flags)
        logs.configure(settings.log_format, "error")
        specs = chosen(settings.specs(), only)
        if expect is not None and len(specs) > 1:
            raise click.UsageError("--expect is of one model: say which with --only")
        check_files(specs)
        expected = None if expect is None else _numbers(expect)
        found = [_check(spec, image, expected, tolerance) for spec in specs]
    click.echo(json.dumps(found, indent=2) if as_json else "\n\n".join("\n".join(_lines(each)) for each in found))
    if any("error" in each or not each.get("expectation", {}).get("within", True) for each in found):
        raise click.exceptions.Exit(1)


def _numbers(path: Path) -> list[Any]:
    """The outputs in a file of JSON.

    Raises:
        ValueError: There is something else in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--expect: {path} can't be read: {error}") from error
    values = content[0] if isinstance(content, list) and len(content) == 1 and isinstance(content[0], list) else content
    numbers = isinstance(values, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not numbers or not values:
        raise ValueError(f"--expect: {path} must be a JSON list of numbers, one for each output")
    return list(values)


def _check(spec: ModelSpec, image: Path | None, expected: Sequence[float] | None, tolerance: float) -> dict[str, Any]:
    """What is known of one model; an `error` where it can't be served."""
    from cdam_server.compute import checking
    from cdam_server.compute.loading import LoadError, load_model
    from cdam_server.compute.models import ServedModel

    try:
        served = ServedModel(load_model(spec))
    except LoadError as error:
        return {"name": spec.name, "error": str(error)}
    found = {"name": spec.name, **checking.describe(served)}
    if served.unsupported is not None:
        return {**found, "error": f"can't be explained: {served.unsupported}"}
    if image is not None:
        found |= _asked(served, image, expected, tolerance)
    return found


def _asked(served: ServedModel, image: Path, expected: Sequence[float] | None, tolerance: float) -> dict[str, Any]:
    """What the model says of an image."""
    from cdam.v1 import common_pb2
    from cdam_server.compute import checking
    from cdam_server.errors import InvalidArgumentError
    from cdam_server.rpc.images import ImageLimits, decode_image

    try:
        pixels = decode_image(common_pb2.Image(encoded=image.read_bytes()), ImageLimits(), "image")
    except InvalidArgumentError as error:
        raise ValueError(f"--image: {image} {error.description}") from error
    answer = checking.answer(served, pixels)
    found: dict[str, Any] = {
        "image": str(image),
        "logits": answer.logits.tolist(),
        "largest": checking.best(served, answer.logits),
    }
    if expected is not None:
        difference = checking.compare(answer.logits, expected, tolerance)
        found["expectation"] = {**vars(difference), "tolerance": tolerance}
    return found


def _lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"model {found['name']}"
    special = {"name", "error", "not served", "image", "logits", "largest", "expectation"}
    for name, value in found.items():
        if name not in special and value not in ("", [], None):
            yield f"  {name:<18}{_text(name, value)}"
    if "fingerprint" in found and "error" not in found:
        yield from _methods(found["not served"])
    if "image" in found:
        yield f"  {'image':<18}{found['image']}"
        for label, logit, probability in found["largest"]:
            share = "" if probability is None else f"  {probability:7.2%}"
            yield f"    {logit:12.5f}{share}  {label}"
    if "expectation" in found:
        told = found["expectation"]
        verdict = "as expected" if told["within"] else "NOT as expected"
        yield (
            f"  {'outputs':<18}{verdict}: largest difference {told['largest']:.3g} (output {told['index']}: "
            f"{told['found']:.6g}, expected {told['expected']:.6g})"
        )
    if "error" in found:
        yield f"  {'error':<18}{found['error']}"


def _text(name: str, value: Any) -> str:
    if name == "left out":
        more = f" and {len(value) - 4} more" if len(value) > 4 else ""
        return f"{len(value)} tensors: {', '.join(value[:4])}{more}"
    if name == "converted":
        return "; ".join(value)
    if name in {"input size", "patch grid"}:
        return " x ".join(map(str, value))
    if name == "output names":
        return ", ".join(value[:8]) + (f", ... ({len(value)})" if len(value) > 8 else "")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(f"{each:g}" for each in value) if isinstance(value, list) else str(value)


def _methods(refused: dict[str, str]) -> Iterator[str]:
    by_reason: dict[str, list[str]] = {}
    for kind, reason in refused.items():
        by_reason.setdefault(reason, []).append(kind)
    if not refused:
        yield f"  {'methods':<18}all"
    for reason, kinds in by_reason.items():
        yield f"  {'not served':<18}{', '.join(kinds)}: {reason}"
