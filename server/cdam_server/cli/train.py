"""`cdam train`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import click

from cdam_server.cli.model_options import FILE, backbone_options, chosen, complain
from cdam_server.cli.report import printable

if TYPE_CHECKING:
    from cdam_server.specs import ModelSpec
    from cdam_training.card import Card
    from cdam_training.command import Source
    from cdam_training.convex import Fit
    from cdam_training.heads import Options
    from cdam_training.loop import Epoch, Recipe
    from cdam_training.metrics import Estimate

Command = TypeVar("Command", bound=Callable[..., Any])

_TASKS: Final = ("multi_class", "multi_label", "binary", "regression")
_SHOWN_BY_OUTPUT: Final = ("average_precision", "pearson_r", "recall")
_OF_EPOCHS: Final = (
    "epochs",
    "batch_size",
    "lr",
    "block_lr",
    "weight_decay",
    "schedule",
    "lr_decay",
    "ema",
    "patience",
)
_MODEL: Final = (
    "models_file",
    "model",
    "pretrained",
    "checkpoint",
    "weights_key",
    "random_weights",
    "head",
    "input_size",
    "resample",
)

_DATASET: Final = """\b
DATASET is one of
  photos/        a folder with a sub-folder of images for each class; or train/, val/ and test/ with these in them
  samples.csv    a column image (paths relative to the file) and target columns, which --target names
  samples.jsonl  the same as JSON, one object a line
Targets are names of classes (multi_class), 0 and 1 in one column (binary) or several (multi_label; or names with ; between
them), or numbers (regression).
"""

_HEAD: Final = f"""Train a linear head on a model's latents, and maybe the model's last blocks.

{_DATASET}
Three ways to train, with the CDAM paper's recipe where it has one:

\b
  (neither option)  images are cropped and mirrored anew for every epoch; the trunk runs each time
  --cache-latents   the trunk runs once; the head that makes the loss least is found, with the L2 penalty
                    that does best on the validation images (give --optimizer to train in epochs instead)
  --train-blocks N  the last N blocks are trained, too; what enters them is kept on disk

A file beside it, with .json in the place of .safetensors, says what was trained on and how good it is. What was interrupted
goes on where it was when the same command is given again.

\b
Examples
  cdam train head photos/ --model vit_small_patch16_224 --pretrained --cache-latents -o head.safetensors
  cdam train head nodules.csv --task regression --target diameter --group-by patient --train-blocks 2 \\
      --model vit_small_patch14_dinov2 --checkpoint dino.safetensors -o diameter.safetensors
  cdam serve --model vit_small_patch16_224 --pretrained --head head.safetensors
"""


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(options), command)


_share = click.FloatRange(0, 1, max_open=True)

_dataset_options = _options(
    click.argument("dataset", type=click.Path(exists=True, path_type=Path)),
    click.option(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Where to write, .safetensors.",
    ),
    click.option("--config", type=FILE, envvar="CDAM_CONFIG", help="YAML file of settings, as for `cdam serve`."),
    backbone_options,
    click.option("--only", metavar="NAME", help="The model of the file to take.  [if there is one alone]"),
    click.option("--task", type=click.Choice(_TASKS), help="What the targets mean.  [a folder: multi_class]"),
    click.option("--target", "targets", multiple=True, metavar="COLUMN", help="Target column; repeatable."),
    click.option("--group-by", metavar="COLUMN", help="Rows with the same value stay on one side of the split."),
    click.option("--split-by", metavar="COLUMN", help="Column with train, val or test.  [drawn at random]"),
    click.option("--validation", type=_share, help="Share of the rows to choose by.  [0.15]"),
    click.option("--test", type=_share, help="Share of the rows to measure on.  [0.15]"),
    click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of all draws."),
    click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1, mps."),
    click.option("--workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that read images."),
    click.option(
        "--work",
        metavar="FOLDER",
        type=click.Path(file_okay=False, path_type=Path),
        help="Where to keep what an interrupted training needs.  [FILE.work, removed at the end]",
    ),
    click.option(
        "--kept",
        metavar="FOLDER",
        type=click.Path(file_okay=False, path_type=Path),
        help="Where to keep what the trunk makes of the images, for several trainings.  [in the work folder]",
    ),
    click.option("--keep-limit", default=20.0, show_default=True, metavar="GB", help="How much may be kept on disk."),
    click.option(
        "--keep-dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True, help="Of it."
    ),
    click.option("--overwrite", is_flag=True, help="Replace the file, and forget an interrupted training."),
)

_training_options = _options(
    click.option("--epochs", type=click.IntRange(1), help="Passes over the training images.  [10]"),
    click.option("--batch-size", type=click.IntRange(1), help="Images in a step.  [128; with blocks 16]"),
    click.option("--optimizer", metavar="NAME", help="As timm calls it: adam, adamw, sgd, ...  [adam]"),
    click.option("--lr", type=click.FloatRange(0, min_open=True), help="Learning rate of the head.  [3e-4]"),
    click.option("--block-lr", type=click.FloatRange(0, min_open=True), help="Learning rate of the blocks."),
    click.option("--weight-decay", type=click.FloatRange(0), help="Of weights, not of biases and norms.  [0]"),
    click.option(
        "--schedule",
        type=click.Choice(["constant", "exponential", "cosine", "one_cycle"]),
        help="How learning rates change.  [constant; with blocks exponential]",
    ),
    click.option("--lr-decay", type=click.FloatRange(0, 1), help="Of the exponential schedule, an epoch.  [0.95]"),
    click.option(
        "--ema",
        type=click.FloatRange(0, 1, max_open=True),
        help="Decay, a step, of the running average of what is trained that is kept in its place; 0: none.",
    ),
    click.option(
        "--patience",
        type=click.IntRange(0),
        help="Stop after so many epochs without a better validation loss; 0: never.",
    ),
    click.option("--views", type=click.IntRange(1), default=1, show_default=True, help="Views kept of an image."),
    click.option(
        "--crop-scale",
        type=float,
        nargs=2,
        default=(0.08, 1.0),
        show_default=True,
        help="Share of the image in a crop.",
    ),
    click.option("--flip", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="Chance to be mirrored."),
)


@click.group()
def train() -> None:
    """Train heads and last blocks of models, from labelled images."""


@train.command(help=_HEAD, short_help="A linear head, maybe with the last blocks.")
@_dataset_options
@click.option("--cache-latents", is_flag=True, help="Run the trunk once, and keep the latents.")
@click.option("--train-blocks", type=click.IntRange(1), help="How many of the last blocks are trained with the head.")
@_training_options
@click.option("--l2", type=click.FloatRange(0), multiple=True, help="L2 penalty to try, repeatable.  [10 to 1e-5]")
@click.option("--dropout", type=_share, default=0.0, show_default=True, help="In the blocks that are trained.")
@click.option("--token-dropout", type=_share, default=0.0, show_default=True, help="Share of patch tokens left out.")
def head(**options: Any) -> None:
    """Train a head."""
    _check_head(options)
    with complain(), _installed():
        from cdam_training.command import run_head

        output: Path = options["output"]
        work = _work_folder(options)
        spec = _spec(options)
        with Bars() as bars:
            card = run_head(spec, _source(options), _trained(options), _recipe(options), output, work, bars)
    if options["work"] is None:
        shutil.rmtree(work)
    click.echo(
        f"{output}: {card.model.trained}, {len(card.outputs)} outputs; what it is: {output.with_suffix('.json')}"
    )
    for note in card.data.notes:
        click.echo(f"note: {note}", err=True)
    for line in _summary(card):
        click.echo(line)


_LISTED: Final = 12  # outputs, in a summary


def _summary(card: Card) -> Iterator[str]:
    """The metrics of every side, a line each."""
    for side, scores in card.metrics.items():
        clusters = "" if scores.clusters == scores.rows else f", {scores.clusters} groups"
        yield f"{side} ({scores.rows} images{clusters})"
        for name, estimate in scores.estimates.items():
            yield f"  {name:<24}{_estimate(estimate)}"
        for name, its in scores.by_output.items():
            if name not in _SHOWN_BY_OUTPUT:
                continue
            for output, estimate in list(its.items())[:_LISTED]:
                yield f"  {name:<24}{_estimate(estimate)}  {printable(output)}"
            if len(its) > _LISTED:
                yield f"  {name:<24}of {len(its) - _LISTED} more outputs in the card"


def _estimate(estimate: Estimate) -> str:
    if estimate.value is None:
        return f"undefined: {estimate.note}"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:8.4g}"
    return f"{estimate.value:8.4g}  ({estimate.low:.4g} to {estimate.high:.4g})"


def _check_head(options: dict[str, Any]) -> None:
    """Refuse options that would change nothing."""
    cached, blocks = options["cache_latents"], options["train_blocks"]
    if cached and blocks:
        raise click.UsageError("--cache-latents keeps what comes after all blocks: with --train-blocks leave it out")
    epochs = [name for name in _OF_EPOCHS if options[name] is not None]
    if cached and epochs and options["optimizer"] is None:
        raise click.UsageError(f"{_flag(epochs[0])} is of training in epochs: give --optimizer, too, or leave it out")
    if options["l2"] and (not cached or options["optimizer"] is not None):
        raise click.UsageError("--l2 is of the head that --cache-latents finds without --optimizer: see --weight-decay")
    if not blocks:
        for name in ("block_lr", "dropout", "token_dropout"):
            if options[name]:
                raise click.UsageError(f"{_flag(name)} is of blocks: give --train-blocks, too, or leave it out")
    if options["views"] > 1 and not cached and not blocks:
        raise click.UsageError("--views is of what is kept: without --cache-latents every epoch has views of its own")
    if options["cache_latents"] and not options["l2"] and options["optimizer"] is None and options["validation"] == 0:
        raise click.UsageError(
            "--validation: the L2 penalty is chosen on validation images; give one --l2 to go without"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _trained(options: dict[str, Any]) -> Options:
    from cdam_training.convex import PENALTIES
    from cdam_training.heads import Options
    from cdam_training.views import Augmentation

    fitted = options["cache_latents"] and options["optimizer"] is None
    return Options(
        blocks=options["train_blocks"] or 0,
        keep=options["cache_latents"],
        views=options["views"],
        augmentation=Augmentation(scale=options["crop_scale"], flip=options["flip"]),
        dropout=options["dropout"],
        token_dropout=options["token_dropout"],
        penalties=(tuple(sorted(set(options["l2"]), reverse=True)) or PENALTIES) if fitted else None,
        kept=options["kept"],
        keep_limit=round(options["keep_limit"] * 1e9),
        keep_dtype=options["keep_dtype"],
        workers=options["workers"],
        device=options["device"],
    )


def _recipe(options: dict[str, Any]) -> Recipe:
    from cdam_training.loop import OF_BLOCKS, Recipe

    usual = OF_BLOCKS if options["train_blocks"] else Recipe()
    given = {name: options[name] for name in (*_OF_EPOCHS, "optimizer") if options[name] is not None}
    return replace(usual, **given, seed=options["seed"])


def _source(options: dict[str, Any]) -> Source:
    from cdam_training.command import Source

    names = ("dataset", "task", "targets", "group_by", "split_by", "validation", "test", "seed")
    return Source(*(options[name] for name in names))


def _spec(options: dict[str, Any]) -> ModelSpec:
    """The settings of the model to train on."""
    from cdam_server import logs
    from cdam_server.config import Settings
    from cdam_server.specs import check_files

    settings = Settings.load(options["config"], **{name: options[name] for name in _MODEL})
    logs.configure(settings.log_format, "error")
    specs = chosen(settings.specs(), options["only"])
    if len(specs) > 1:
        raise click.UsageError(f"--only: say which model; there are {', '.join(spec.name for spec in specs)}")
    check_files(specs)
    return specs[0]


def _work_folder(options: dict[str, Any]) -> Path:
    """Where an interrupted training is kept, after a look at what is there."""
    output: Path = options["output"]
    if output.suffix != ".safetensors":
        raise click.UsageError(f"--output: {output} must end in .safetensors")
    if not output.parent.is_dir():
        raise click.UsageError(f"--output: there is no folder {output.parent}")
    if output.exists() and not options["overwrite"]:
        raise click.UsageError(f"--output: {output} is there already; --overwrite replaces it")
    work: Path = options["work"] or output.with_suffix(".work")
    if options["overwrite"]:
        for file in ("training.pt", "fit.pt"):
            (work / file).unlink(missing_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    return work


@contextmanager
def _installed() -> Iterator[None]:
    """What is not installed, as an error of the command line."""
    try:
        import sklearn
        import tqdm

        assert sklearn
        assert tqdm
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error.name} is missing: install cdam-serve with its extra `train`") from error
    yield


class Bars:
    """How far a training is, on the terminal."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._title = ""

    def __enter__(self) -> Self:
        """Nothing is shown yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the last bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def reading(self, done: int, total: int) -> None:
        """See `cdam_training.heads.Progress`."""
        self._show("reading images", done, total)

    def trunk(self, done: int, total: int) -> None:
        """See `cdam_training.heads.Progress`."""
        self._show("trunk", done, total)

    def training(self, done: int, total: int, history: Sequence[Epoch]) -> None:
        """See `cdam_training.heads.Progress`."""
        last = history[-1] if history else None
        losses = {} if last is None else {"loss": last.loss, "validation": last.validation_loss}
        self._show("training", done, total, losses)

    def fitting(self, fits: Sequence[Fit], total: int) -> None:
        """See `cdam_training.heads.Progress`."""
        last = fits[-1]
        self._show("fitting", len(fits), total, {"l2": last.l2, "validation": last.validation_loss})

    def _show(self, title: str, done: int, total: int, told: dict[str, float | None] | None = None) -> None:
        from tqdm import tqdm

        if title != self._title:
            if self._bar is not None:
                self._bar.close()
            self._bar, self._title = tqdm(total=total, initial=done, desc=title, disable=None), title
        shown = {name: f"{value:.4g}" for name, value in (told or {}).items() if value is not None}
        if shown:
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(done - self._bar.n)
