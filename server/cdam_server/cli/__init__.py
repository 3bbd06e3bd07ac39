"""The `cdam` command."""

import click

from cdam import __version__
from cdam_server.cli.bench import bench
from cdam_server.cli.check import check
from cdam_server.cli.concept import concept
from cdam_server.cli.concept_text import text
from cdam_server.cli.evaluate import evaluate
from cdam_server.cli.explain import explain
from cdam_server.cli.models import models
from cdam_server.cli.serve import serve
from cdam_server.cli.train import train


@click.group()
@click.version_option(__version__, prog_name="cdam")
def main() -> None:
    """Explain what a Vision Transformer sees: serve explanations, or ask a server for them."""


concept.add_command(text)
for command in (serve, check, explain, models, concept, evaluate, train, bench):
    main.add_command(command)
