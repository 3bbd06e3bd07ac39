"""The `cdam` command."""

import click

from cdam import __version__
from cdam_cli.bench import bench
from cdam_cli.check import check
from cdam_cli.concept import concept
from cdam_cli.concept_text import text
from cdam_cli.evaluate import evaluate
from cdam_cli.explain import explain
from cdam_cli.models import models
from cdam_cli.serve import serve
from cdam_cli.train import train


@click.group()
@click.version_option(__version__, prog_name="cdam")
def main() -> None:
    """Explain what a Vision Transformer sees: serve explanations, or ask a server for them."""


concept.add_command(text)
for command in (serve, check, explain, models, concept, evaluate, train, bench):
    main.add_command(command)
