"""`cdam concept text`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import click
import numpy as np
from numpy.typing import NDArray

import cdam
from cdam_cli import concept_report
from cdam_cli.concept import expected_version_option, label_option, replace_option
from cdam_cli.connections import connection_options, failures, server_from
from cdam_cli.failures import Failure
from cdam_cli.spelling import model_option
from cdam_cli.text_vectors import TextModel, TextModelError, check_installed

_SAME_TOWER: Final = {"fp32": 0.99999, "bf16": 0.99}
"""Cosine between two image embeddings of one tower, at least, by the precision of the served trunk; rounding alone keeps
0.9999999 and 0.999. One with GELU in place of QuickGELU, or other preprocessing, stays below."""
_LISTED: Final = 4
"""Texts of either side that the description holds."""

_HELP = """Register the concept NAME: what TEXTs say, for a model that was trained with texts (CLIP, SigLIP).

The texts' vector is computed here, with open_clip (extra `clip`), by the text tower that was trained along with the
served image tower. Several TEXTs are averaged, each at length 1; --negative texts are subtracted. Explain with the
cosine: -t concept:NAME:cosine.

Whether the served model is that image tower is tried on a made-up image first, and refused if it is another.

\b
Examples
  cdam concept text cat "a photo of a cat" --text-model ViT-B-32 --text-weights laion2b_s34b_b79k
  cdam concept text cat "a photo of a cat" "a drawing of a cat" --negative "a photo of a dog" --text-model local-dir:clip
  cdam explain photo.jpg -t concept:cat:cosine
"""


@click.command(help=_HELP, short_help="Register a concept, of texts.")
@click.argument("name")
@click.argument("prompts", nargs=-1, required=True, metavar="TEXT...")
@click.option("--negative", "negatives", multiple=True, metavar="TEXT", help="What it does not show; repeatable.")
@click.option(
    "--text-model",
    required=True,
    metavar="MODEL",
    help="As open_clip names it: ViT-B-32, hf-hub:ORG/NAME, or local-dir:PATH with open_clip_config.json.",
)
@click.option(
    "--text-weights",
    metavar="TAG|FILE",
    help="Its weights: a tag of open_clip's, from the hub, or a file; none with hf-hub: and local-dir:, which bring theirs.",
)
@click.option("--unchecked", is_flag=True, help="Don't try whether the served model is this model's image tower.")
@model_option
@click.option("--description", help="For people; the texts if left out.")
@label_option("For finding it again; repeatable.")
@replace_option
@expected_version_option
@connection_options
def text(
    *,
    name: str,
    prompts: tuple[str, ...],
    negatives: tuple[str, ...],
    text_model: str,
    text_weights: str | None,
    unchecked: bool,
    description: str | None,
    **options: Any,
) -> None:
    """Register a concept of texts."""
    request = {setting: options.pop(setting) for setting in ("model", "labels", "replace", "expected_version")}
    request["description"] = _described(prompts, negatives) if description is None else description
    server = server_from(**options)
    with _as_failure():
        check_installed()
    with failures(server, {"name": name, **request}), server.client() as client:
        served = client.model(request["model"])  # fails at once where a text model would take its time to load
        with _as_failure():
            tower = TextModel.load(text_model, text_weights)
            vector = tower.vector(prompts, negatives)
        _check_length(served, vector, text_model)
        if not unchecked:
            _check_tower(client, served, tower)
        made = client.register_concept(name, vector=vector, model_fingerprint=served.fingerprint, **request)
    words = {word: request[word] for word in ("description", "labels")}
    click.echo(concept_report.registered(made, {}, **words))
    click.echo(f"  explain with -t concept:{name}:cosine")


def _described(prompts: Sequence[str], negatives: Sequence[str]) -> str:
    """The texts, for people."""
    return " less ".join(_quoted(side) for side in (prompts, negatives) if side)


def _quoted(texts: Sequence[str]) -> str:
    listed = ", ".join(f'"{text}"' for text in texts[:_LISTED])
    return listed + (f" and {len(texts) - _LISTED} more" if len(texts) > _LISTED else "")


def _check_length(served: cdam.Model, vector: NDArray[np.float32], name: str) -> None:
    if served.latent_size != len(vector):
        raise Failure(
            f"--text-model: {name} makes vectors of {len(vector)} numbers, the latents of {served.name} have "
            f"{served.latent_size}: it is not the image tower of this model, with its projection as the last layer"
        )


def _check_tower(client: cdam.Client, served: cdam.Model, tower: TextModel) -> None:
    """Fail if the served model makes something else of an image than the text model's own image tower."""
    probe = tower.probe()
    own = cdam.Concept(vector=tower.image_vector(probe), similarity="cosine")
    # Its own way to take an image may cut one that has the right size already (crop_pct), or must (patches of 14).
    answers = (client.explain(probe, own, model=served.name, resize=way) for way in ("model", "squash"))
    cosine = max(answer.targets[0].value for answer in answers)
    if cosine < _SAME_TOWER[served.precision]:
        raise Failure(
            f"--text-model: {served.name} is not the image tower of {tower.name}: of the same image they make vectors "
            f"with a cosine of {cosine:.6f}, which should be 1; --unchecked registers all the same"
        )


@contextmanager
def _as_failure() -> Iterator[None]:
    """One line that names the option or argument to look at."""
    try:
        yield
    except TextModelError as error:
        where = {"": "", "prompt": "TEXT: "}.get(error.setting, f"--{error.setting}: ")
        raise Failure(f"{where}{error}") from error
