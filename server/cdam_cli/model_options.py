"""Options that describe models, of every command that loads one, and what is said where they are wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

if TYPE_CHECKING:
    from cdam_server.settings.specs import ModelSpec

Command = TypeVar("Command", bound=Callable[..., Any])

FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)
_PATH: Final = click.Path(path_type=Path)  # hf-hub: and local-dir: are no paths to look for

_OF_BACKBONE: Final = (
    click.option(
        "--models-file",
        type=FILE,
        help="YAML file of one or several models, with all settings: model_kwargs, preprocessing and head_layers have no "
        "option.",
    ),
    click.option(
        "--model",
        metavar="NAME",
        help="timm architecture; hf-hub:ORG/NAME or local-dir:PATH of timm, transformers or open_clip, with weights; "
        "torchvision:NAME or open_clip:NAME, with a checkpoint; or demo.  [demo]",
    ),
    click.option("--pretrained", is_flag=True, default=None, help="Fetch timm's weights from the hub."),
    click.option(
        "--checkpoint",
        metavar="FILE",
        type=_PATH,
        help="Weights: .safetensors; .pth, .pt, .bin, .ckpt or .tar without pickled code; hf-hub:ORG/NAME; local-dir:PATH.",
    ),
    click.option(
        "--weights-key",
        metavar="KEY",
        help="The part of the checkpoint that holds the weights, if several do: teacher.",
    ),
    click.option("--random-weights", is_flag=True, default=None, help="Weights drawn at random, to measure speed."),
    click.option("--head", type=_PATH, metavar="FILE", help="Linear head for a headless backbone: weight and bias."),
    click.option(
        "--input-size", metavar="SIZE", help="Pixels, 224 or 224x336 (height x width): positions are resampled to it."
    ),
    click.option(
        "--resample",
        is_flag=True,
        default=None,
        help="Let the checkpoint's patch embedding and positions be resampled to the architecture's.",
    ),
)
_OF_OUTPUTS: Final = (
    click.option("--model-name", metavar="NAME", help="Name that requests use.  [the architecture]"),
    click.option(
        "--outputs", metavar="FILE", type=_PATH, help="Names of the outputs: text, one a line, or JSON; or imagenet-1k."
    ),
    click.option(
        "--task", type=click.Choice(["multi_class", "multi_label", "binary", "regression"]), help="What outputs mean."
    ),
    click.option(
        "--num-outputs",
        type=click.IntRange(min=0),
        help="Number of outputs; 0: none, for concepts alone.  [as many as the classifier has]",
    ),
)


def model_options(command: Command) -> Command:
    """Add all options to a command."""
    return _with(command, (*_OF_BACKBONE, *_OF_OUTPUTS))


def backbone_options(command: Command) -> Command:
    """Add those that matter to a model whose classifier is left out."""
    return _with(command, _OF_BACKBONE)


def _with(command: Command, options: Sequence[Callable[[Command], Command]]) -> Command:
    return reduce(lambda decorated, option: option(decorated), reversed(options), command)


def chosen(specs: list[ModelSpec], only: str | None) -> list[ModelSpec]:
    """The model of this name; None: all.

    Raises:
        click.UsageError: There is none of this name.
    """
    if only is None:
        return specs
    found = [spec for spec in specs if spec.name == only]
    if not found:
        raise click.UsageError(
            f"--only: there is no model {only!r}; there are {', '.join(spec.name for spec in specs)}"
        )
    return found


@contextmanager
def complain() -> Iterator[None]:
    """What is wrong with settings or models, as errors of the command line.

    Raises:
        click.ClickException: With one line for people.
    """
    try:
        from pydantic import ValidationError

        from cdam_server.settings.config import Settings
        from cdam_server.settings.validation import problems
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error.name} is missing: install cdam-serve with its extra `server`") from error
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("cdam"):
            raise
        raise click.ClickException(f"{error.name} is missing: install cdam-serve with its extra `server`") from error
    except ValidationError as error:
        raise click.UsageError("\n".join(problems(error, Settings))) from error
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
