"""`cdam models`."""

import dataclasses
import json
from typing import Any

import click

import cdam
from cdam_cli.connections import connection_options, server_from
from cdam_cli.failures import Failure, describe
from cdam_cli.report import columns

_HELP = """List the models that a server has loaded, its default one first.

\b
Examples
  cdam models
  cdam models --server dns:///cdam.example.org:8001 --tls
  cdam models --json | jq '.[0].output_names'
"""


@click.command(help=_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print everything that is known of them, as JSON.")
@connection_options
def models(*, as_json: bool, **connection: Any) -> None:
    """List the models."""
    server = server_from(**connection)
    try:
        with server.client() as client:
            found = client.models()
    except cdam.RpcError as error:
        raise Failure(f"{server.address}: {describe(error)}") from error
    if as_json:
        click.echo(json.dumps([_as_json(model) for model in found], indent=2))
        return
    rows = [("model", "architecture", "task", "outputs", "input", "patches", "methods")]
    rows += [
        (
            model.name + (" (default)" if model.is_default else ""),
            model.architecture,
            model.task,
            str(model.output_count),
            "{} x {}".format(*model.input_size) + (", flexible" if model.flexible_input_size else ""),
            "{} x {}".format(*model.patch_grid),
            _methods(model),
        )
        for model in found
    ]
    lines = [*columns(rows, right={3})]
    for model in found:
        lines += [*_input(model), *_refusals(model)]
    click.echo("\n".join(lines))


def _methods(model: cdam.Model) -> str:
    count = len(model.methods) + len(model.unsupported)
    return f"all {count}" if model.methods and not model.unsupported else ", ".join(model.methods) or "none"


def _input(model: cdam.Model) -> list[str]:
    """How pixels become a model's input, and what was resampled."""
    its = model.input
    lines = []
    if its is not None:
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (its.mean, its.std))
        kept = f"{its.crop_mode} {its.crop_fraction:g}"
        lines.append(f"  {model.name} is given pixels with mean {mean}, std {std}; {its.interpolation}, {kept}")
    if model.model_kwargs:
        lines.append(f"  {model.name} was built with {json.dumps(dict(model.model_kwargs))}")
    if model.resampled:
        lines.append(f"  {model.name} was resampled: {model.resampled}")
    return lines


def _refusals(model: cdam.Model) -> list[str]:
    """Which methods a model does not serve, a line for each reason."""
    by_reason: dict[str, list[str]] = {}
    for kind, reason in model.unsupported.items():
        by_reason.setdefault(reason, []).append(kind)
    return [f"  {model.name} does not serve {', '.join(kinds)}: {reason}" for reason, kinds in by_reason.items()]


def _as_json(model: cdam.Model) -> dict[str, Any]:
    fields = ((field.name, getattr(model, field.name)) for field in dataclasses.fields(model))
    return {
        name: dict(value)
        if name in {"unsupported", "model_kwargs"}
        else dataclasses.asdict(value)
        if name == "input" and value
        else value
        for name, value in fields
    }
