"""What the commands of `cdam train` have in common: options, a run, its progress and its summary."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import click

from cdam_cli.failures import Aborted
from cdam_cli.model_options import FILE, backbone_options, chosen, complain
from cdam_cli.report import printable

if TYPE_CHECKING:
    from cdam_server.settings.specs import ModelSpec
    from cdam_training.card import Card
    from cdam_training.command import Source
    from cdam_training.convex import Fit
    from cdam_training.heads import Options
    from cdam_training.loop import Epoch
    from cdam_training.metrics import Estimate

_EVERY: Final = 15.0  # seconds between two lines, where there is no terminal

Command = TypeVar("Command", bound=Callable[..., Any])

_TASKS: Final = ("multi_class", "multi_label", "binary", "regression")
_SHOWN_BY_OUTPUT: Final = ("average_precision", "pearson_r", "recall", "mask_iou")
OF_EPOCHS: Final = (
    "epochs",
    "batch_size",
    "lr",
    "block_lr",
    "weight_decay",
    "schedule",
    "lr_decay",
    "ema",
    "clip",
    "mixup",
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

DATASET: Final = """\b
DATASET is one of
  photos/        a folder with a sub-folder of images for each class; or train/, val/ and test/ with these in them
  samples.csv    a column image (paths relative to the file) and target columns, which --target names
  samples.jsonl  the same as JSON, one object a line
Targets are names of classes (multi_class), 0 and 1 in one column (binary) or several (multi_label; or names with ; between
them), or numbers (regression).
"""


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(options), command)


class Finite(click.FloatRange):
    """A number in a range; neither infinite nor nan, which is in every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType`."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not finite.", param, ctx)
        return number


def _ordered(_: click.Context, param: click.Parameter, value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise click.BadParameter(f"the least share, {value[0]:g}, is more than the largest, {value[1]:g}", param=param)
    return value


_share = Finite(0, 1, max_open=True)

dataset_options = _options(
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
    click.option(
        "--device",
        default="auto",
        show_default=True,
        help="Where to compute: cpu, cuda, cuda:1, mps; auto: a GPU if there is one.",
    ),
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
    click.option(
        "--keep-limit",
        type=Finite(0),
        default=20.0,
        show_default=True,
        metavar="GB",
        help="How much may be kept on disk.",
    ),
    click.option(
        "--keep-dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True, help="Of it."
    ),
    click.option("--overwrite", is_flag=True, help="Replace the file, and forget an interrupted training."),
)

training_options = _options(
    click.option("--epochs", type=click.IntRange(1), help="Passes over the training images.  [10]"),
    click.option("--batch-size", type=click.IntRange(1), help="Images in a step.  [128; with blocks 16]"),
    click.option("--optimizer", metavar="NAME", help="As timm calls it: adam, adamw, sgd, ...  [adam]"),
    click.option("--lr", type=Finite(0, min_open=True), help="Learning rate of the head.  [3e-4]"),
    click.option("--block-lr", type=Finite(0, min_open=True), help="Learning rate of the blocks."),
    click.option("--weight-decay", type=Finite(0), help="Of weights, not of biases and norms.  [0]"),
    click.option(
        "--schedule",
        type=click.Choice(["constant", "exponential", "cosine", "one_cycle"]),
        help="How learning rates change.  [constant; with blocks exponential]",
    ),
    click.option("--lr-decay", type=Finite(0, 1), help="Of the exponential schedule, an epoch.  [0.95]"),
    click.option(
        "--ema",
        type=Finite(0, 1, max_open=True),
        help="Decay, a step, of the running average of what is trained that is kept in its place; 0: none.  [0]",
    ),
    click.option("--clip", type=Finite(0), help="Largest norm of the gradient; 0: any.  [0; with blocks 1]"),
    click.option(
        "--mixup",
        type=Finite(0),
        help="Alpha of mixup, of what enters the part that is trained; 0: none.  [0]",
    ),
    click.option(
        "--patience",
        type=click.IntRange(0),
        help="Stop after so many epochs without a better validation loss; 0: never.",
    ),
    click.option("--views", type=click.IntRange(1), default=1, show_default=True, help="Views kept of an image."),
    click.option(
        "--crop-scale",
        type=Finite(0, 1, min_open=True),
        nargs=2,
        callback=_ordered,
        default=(0.08, 1.0),
        show_default=True,
        help="Share of the image in a crop.",
    ),
    click.option("--flip", type=Finite(0, 1), default=0.5, show_default=True, help="Chance to be mirrored."),
)


block_options = _options(
    click.option("--dropout", type=_share, default=0.0, show_default=True, help="In the blocks that are trained."),
    click.option(
        "--token-dropout", type=_share, default=0.0, show_default=True, help="Share of patch tokens left out."
    ),
)


Train = Callable[["ModelSpec", "Source", Path, Path, "Bars"], "Card"]
"""Trains, from the model's settings, what to learn from, the file to write, and the folder for what is kept meanwhile."""


def run(options: dict[str, Any], train: Train) -> None:
    """Train, and say what came out."""
    from cdam_training.files import locked

    with complain(), _installed():
        output: Path = options["output"]
        work = _work_folder(options)
        with _unused_removed(work), locked(work, "work"):
            _check_output(options)  # another process may have written it meanwhile
            _forget(options, work)
            spec = _spec(options)
            with Bars() as bars:
                try:
                    card = train(spec, _source(options), output, work, bars)
                except KeyboardInterrupt:
                    raise Aborted("the same command goes on from here") from None
            if options["work"] is None:
                _clear(work, kept=options["kept"] is None)
    outputs = "1 output" if len(card.outputs) == 1 else f"{len(card.outputs)} outputs"
    click.echo(f"{output}: {card.model.trained}, {outputs}; what it is: {output.with_suffix('.json')}")
    for note in (*card.data.notes, *card.notes):
        click.echo(f"note: {note}", err=True)
    for line in _summary(card):
        click.echo(line)


def given_recipe(options: dict[str, Any]) -> dict[str, Any]:
    """What of a recipe the command line says."""
    return {name: options[name] for name in (*OF_EPOCHS, "optimizer", "seed") if options[name] is not None}


_LISTED: Final = 12  # outputs, in a summary


def _summary(card: Card) -> Iterator[str]:
    """The metrics of every side, a line each."""
    for side, scores in card.metrics.items():
        clusters = "" if scores.clusters == scores.rows else f", {scores.clusters} groups"
        yield f"{side} ({scores.rows} images{clusters})"
        for name, estimate in scores.estimates.items():
            yield f"  {name:<28}{_estimate(estimate)}"
        for name, its in scores.by_output.items():
            if name not in _SHOWN_BY_OUTPUT:
                continue
            for output, estimate in list(its.items())[:_LISTED]:
                yield f"  {name:<28}{_estimate(estimate)}  {printable(output)}"
            if len(its) > _LISTED:
                yield f"  {name:<28}of {len(its) - _LISTED} more outputs in the card"


def _estimate(estimate: Estimate) -> str:
    if estimate.value is None:
        return f"undefined: {estimate.note}"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:8.4g}  {estimate.note}".rstrip()
    return f"{estimate.value:8.4g}  ({estimate.low:.4g} to {estimate.high:.4g})"


def kept_options(options: dict[str, Any]) -> Options:
    """What every training has of options."""
    from cdam_server.compute.device import find_device
    from cdam_training.heads import Options
    from cdam_training.views import Augmentation

    return Options(
        views=options["views"],
        augmentation=Augmentation(scale=options["crop_scale"], flip=options["flip"]),
        dropout=options["dropout"],
        token_dropout=options["token_dropout"],
        kept=options["kept"],
        keep_limit=round(options["keep_limit"] * 1e9),
        keep_dtype=options["keep_dtype"],
        workers=options["workers"],
        device=str(find_device(options["device"])),
    )


def _source(options: dict[str, Any]) -> Source:
    from cdam_training.command import Source

    names = ("task", "targets", "group_by", "split_by", "validation", "test", "seed")
    return Source(options["dataset"], **{name: options[name] for name in names}, mask=options.get("mask"))


def _spec(options: dict[str, Any]) -> ModelSpec:
    """The settings of the model to train on."""
    from cdam_server.operation import logs
    from cdam_server.settings.config import Settings
    from cdam_server.settings.specs import check_files

    settings = Settings.load(options["config"], **{name: options[name] for name in _MODEL})
    logs.configure(settings.log_format, "error")
    specs = chosen(settings.specs(), options["only"])
    if len(specs) > 1:
        raise click.UsageError(f"--only: say which model; there are {', '.join(spec.name for spec in specs)}")
    check_files(specs)
    return specs[0]


_STATES: Final = ("training.pt", "fit.pt")


def _work_folder(options: dict[str, Any]) -> Path:
    """Where an interrupted training is kept, after a look at what is there."""
    output: Path = options["output"]
    if output.suffix != ".safetensors":
        raise click.UsageError(f"--output: {output} must end in .safetensors")
    if not output.parent.is_dir():
        raise click.UsageError(f"--output: there is no folder {output.parent}")
    _check_output(options)
    work: Path = options["work"] or output.with_suffix(".work")
    if work.exists() and not work.is_dir():
        raise click.UsageError(f"--work: {work} is no folder; name another one")
    work.mkdir(parents=True, exist_ok=True)
    return work


def _check_output(options: dict[str, Any]) -> None:
    """Nothing is replaced that nobody asked to replace."""
    output: Path = options["output"]
    card = output.with_suffix(".json")
    for file in (output, card):
        if file.exists() and not options["overwrite"]:
            raise click.UsageError(f"--output: {file} is there already; --overwrite replaces it")
    for name in ("dataset", "models_file", "config"):
        if options[name] is not None and options[name].resolve() == card.resolve():
            raise click.UsageError(f"--output: {card}, which is read, would be replaced by the card: take another name")


def _forget(options: dict[str, Any], work: Path) -> None:
    """An interrupted training, if it is to be begun anew."""
    if options["overwrite"]:
        for file in _STATES:
            (work / file).unlink(missing_ok=True)
        if options["kept"] is None:
            shutil.rmtree(work / "kept", ignore_errors=True)


@contextmanager
def _unused_removed(work: Path) -> Iterator[None]:
    """A folder in which nothing was kept is not left behind."""
    from cdam_training.files import LOCK

    try:
        yield
    finally:
        if work.is_dir() and [file.name for file in work.iterdir()] == [LOCK]:
            (work / LOCK).unlink()
            work.rmdir()


def _clear(work: Path, *, kept: bool) -> None:
    """Remove what a training has kept, and the folder if nothing else is in it."""
    from cdam_training.files import LOCK

    for file in (*_STATES, LOCK):
        (work / file).unlink(missing_ok=True)
    if kept:
        shutil.rmtree(work / "kept")
    with suppress(OSError):
        work.rmdir()


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
        self._said = 0.0

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
        self._show("training steps", done, total, losses)

    def fitting(self, fits: Sequence[Fit], total: int) -> None:
        """See `cdam_training.heads.Progress`."""
        last = fits[-1]
        self._show("fitting", len(fits), total, {"l2": last.l2, "validation": last.validation_loss})

    def _show(self, title: str, done: int, total: int, told: dict[str, float | None] | None = None) -> None:
        from tqdm import tqdm

        shown = {name: f"{value:.4g}" for name, value in (told or {}).items() if value is not None}
        if title != self._title:
            if self._bar is not None:
                self._bar.close()
            self._bar, self._title = tqdm(total=total, initial=done, desc=title, disable=None), title
            self._said = 0.0
        if not sys.stderr.isatty():
            self._say(title, done, total, shown)
        elif shown:
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(done - self._bar.n)

    def _say(self, title: str, done: int, total: int, shown: dict[str, str]) -> None:
        """A line now and then, where there is no terminal."""
        if done == total or time.monotonic() - self._said > _EVERY:
            self._said = time.monotonic()
            more = "".join(f", {name} {value}" for name, value in shown.items())
            click.echo(f"{title}: {done} of {total}{more}", err=True)
