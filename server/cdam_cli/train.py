"""`cdam train`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from cdam_cli.training import (
    DATASET,
    OF_EPOCHS,
    Bars,
    Finite,
    block_options,
    dataset_options,
    given_recipe,
    kept_options,
    run,
    training_options,
)

if TYPE_CHECKING:
    from cdam_server.settings.specs import ModelSpec
    from cdam_training.card import Card
    from cdam_training.command import Source
    from cdam_training.heads import Options

_HEAD: Final = f"""Train a linear head on a model's latents, and maybe the model's last blocks.

{DATASET}
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


@click.group()
def train() -> None:
    """Train heads and last blocks of models, from labelled images."""


@train.command(help=_HEAD, short_help="A linear head, maybe with the last blocks.")
@dataset_options
@click.option("--cache-latents", is_flag=True, help="Run the trunk once, and keep the latents.")
@click.option("--train-blocks", type=click.IntRange(1), help="How many of the last blocks are trained with the head.")
@training_options
@click.option("--l2", type=Finite(0), multiple=True, help="L2 penalty to try, repeatable.  [10 to 1e-5]")
@block_options
def head(**options: Any) -> None:
    """Train a head."""
    _check_head(options)

    def train(spec: ModelSpec, source: Source, output: Path, work: Path, bars: Bars) -> Card:
        from cdam_training.command import run_head
        from cdam_training.loop import OF_BLOCKS, Recipe

        usual = OF_BLOCKS if options["train_blocks"] else Recipe()
        recipe = replace(usual, **given_recipe(options))
        return run_head(spec, source, _trained(options), recipe, output, work, bars)

    run(options, train)


def _check_head(options: dict[str, Any]) -> None:
    """Refuse options that would change nothing."""
    cached, blocks = options["cache_latents"], options["train_blocks"]
    if cached and blocks:
        raise click.UsageError("--cache-latents keeps what comes after all blocks: with --train-blocks leave it out")
    epochs = [name for name in OF_EPOCHS if options[name] is not None]
    if cached and epochs and options["optimizer"] is None:
        raise click.UsageError(f"{_flag(epochs[0])} is of training in epochs: give --optimizer, too, or leave it out")
    if options["l2"] and (not cached or options["optimizer"] is not None):
        raise click.UsageError("--l2 is of the head that --cache-latents finds without --optimizer: see --weight-decay")
    if not blocks:
        for name in ("block_lr", "dropout", "token_dropout"):
            if options[name]:
                raise click.UsageError(f"{_flag(name)} is of blocks: give --train-blocks, too, or leave it out")
    _check_patience(options)
    if options["views"] > 1 and not cached and not blocks:
        raise click.UsageError("--views is of what is kept: without --cache-latents every epoch has views of its own")
    if options["cache_latents"] and not options["l2"] and options["optimizer"] is None and options["validation"] == 0:
        raise click.UsageError(
            "--validation: the L2 penalty is chosen on validation images; give one --l2 to go without"
        )


def _check_patience(options: dict[str, Any]) -> None:
    if options["patience"] and options["validation"] == 0:
        raise click.UsageError("--patience waits for a better validation loss: without validation images leave it out")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _trained(options: dict[str, Any]) -> Options:
    from cdam_training.convex import PENALTIES

    fitted = options["cache_latents"] and options["optimizer"] is None
    return replace(
        kept_options(options),
        blocks=options["train_blocks"] or 0,
        keep=options["cache_latents"],
        penalties=(tuple(sorted(set(options["l2"]), reverse=True)) or PENALTIES) if fitted else None,
    )


_MASKS: Final = f"""Train a model's classifier to say of each patch where its classes are.

{DATASET}
The model brings a linear classifier, in its checkpoint or as --head. It is applied to each patch's token, and trained with
masks of a few images, together with the classification of all training images; the last blocks and the final norm are
trained with it, and no parameter is added. Maps of the method patch_mask_prediction are then probabilities by class.
After Kang, Heo and Choe (2024), of which only the abstract is public: a reconstruction.

\b
Masks are images of their image's own size; cells of the column may be empty. What their pixels mean:
  object   0 is outside, anything else inside the object of the image's own class (multi_class, binary)
  classes  n is inside the n-th output, from 1; 0 none of them, 255 undecided (multi_label, multi_class)

\b
Example
  cdam train masks photos.jsonl --task multi_label --target labels --mask mask --split-by split \\
      --model vit_small_patch14_dinov2 --checkpoint dino.safetensors --head tuned.safetensors -o masks.safetensors
  cdam serve --model vit_small_patch14_dinov2 --checkpoint dino.safetensors --head masks.safetensors
  cdam explain photo.jpg -t dog -m patch_mask_prediction
"""


@train.command(help=_MASKS, short_help="A classifier that tells where its classes are.")
@dataset_options
@click.option("--mask", required=True, metavar="COLUMN", help="Column with the masks' paths.")
@click.option(
    "--mask-kind",
    type=click.Choice(["object", "classes"]),
    help="What pixels mean.  [multi_label: classes; else object]",
)
@click.option(
    "--masked-share",
    type=Finite(0, 1, min_open=True),
    default=0.01,
    show_default=True,
    help="Share of the training images whose masks are learnt from; of the validation images likewise.",
)
@click.option(
    "--mask-weight",
    type=Finite(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Of the patches' loss beside the images'.",
)
@click.option(
    "--masks-per-step", type=click.IntRange(1), default=8, show_default=True, help="Images with masks in each step."
)
@click.option(
    "--balance-masks/--no-balance-masks",
    default=True,
    show_default=True,
    help="Let patches inside an object count together as much as those outside.",
)
@click.option(
    "--train-blocks", type=click.IntRange(1), default=2, show_default=True, help="How many of the last are trained."
)
@training_options
@block_options
def masks(**options: Any) -> None:
    """Train with masks."""
    _check_patience(options)

    def train(spec: ModelSpec, source: Source, output: Path, work: Path, bars: Bars) -> Card:
        from cdam_server.settings.specs import Task
        from cdam_training.mask_command import run_masks
        from cdam_training.mask_training import OF_MASKS, MaskOptions
        from cdam_training.masks import MaskKind

        usual = MaskKind.CLASSES if source.task == Task.MULTI_LABEL else MaskKind.OBJECT
        with_masks = MaskOptions(
            MaskKind(options["mask_kind"] or usual),
            options["masked_share"],
            options["mask_weight"],
            options["masks_per_step"],
            options["balance_masks"],
        )
        trained = replace(kept_options(options), blocks=options["train_blocks"], keep=True)
        recipe = replace(OF_MASKS, **given_recipe(options))
        return run_masks(spec, source, trained, with_masks, recipe, output, work, bars)

    run(options, train)
