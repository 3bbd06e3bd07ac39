"""What `cdam train masks` does, from a dataset's path to a file of weights and its card."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cdam_server.load_error import LoadError, few
from cdam_server.loading import load_backbone, load_model
from cdam_server.specs import ModelSpec
from cdam_server.weights.trained import read_trained
from cdam_training.card import Card
from cdam_training.command import Clock, Result, Source, images_of, measured_rows, of_recipe, write
from cdam_training.datasets import Dataset
from cdam_training.errors import DatasetError
from cdam_training.heads import Options, Progress
from cdam_training.loop import Recipe
from cdam_training.mask_metrics import measure_masks
from cdam_training.mask_training import MaskOptions, MaskTraining, log_odds
from cdam_training.masks import MaskKind, PatchMask, check_kind
from cdam_training.metrics import Scores
from cdam_training.ranking import Floats
from cdam_training.splits import Splits
from cdam_training.trunk_outputs import Rows


def run_masks(
    spec: ModelSpec,
    source: Source,
    options: Options,
    with_masks: MaskOptions,
    recipe: Recipe,
    output: Path,
    work: Path,
    progress: Progress,
) -> Card:
    """Train a model's own classifier with masks, write it and its card, and look whether the server would load it.

    Args:
        spec: Of the model, with a linear classifier.
        source: What to learn from.
        options: What is trained; at least one block.
        with_masks: How masks are learnt from.
        recipe: How.
        output: The file to write.
        work: Folder for what is kept meanwhile.
        progress: Is told how far it is.

    Returns:
        The card. Its metrics are by side, and as ``SIDE_masks`` those of the maps; ``..._before`` before the training.

    Raises:
        DatasetError: Something is wrong with the dataset or its masks.
        LoadError: Something is wrong with the model, or it can't be trained so.
    """
    clock = Clock()
    dataset, splits = source.read(progress)
    check_kind(dataset, with_masks.kind)
    start = own_classifier(spec, dataset)
    backbone = load_backbone(spec)
    images = images_of(dataset, splits)
    training = MaskTraining(backbone, dataset, images, options, with_masks, recipe, work, start)
    _check_all(training, splits)
    training.kept.fill(progress.trunk)
    before = _measured(training, dataset, splits)
    trained = training.finished(training.loop(progress.training))
    after = _measured(training, dataset, splits)
    metrics = {
        name: scores for each in after for name, scores in ((f"{each}_before", before[each]), (each, after[each]))
    }
    told = {
        **of_recipe(options, recipe),
        "masks": {**asdict(with_masks), "train": len(training.train), "validation": len(training.validation)},
    }
    dataset = replace(dataset, notes=(*dataset.notes, _learnt_from(training, splits)))
    return write(Result(backbone, dataset, splits, options, trained, metrics), spec, told, output, clock)


def own_classifier(spec: ModelSpec, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and bias (C) of the linear classifier that a model brings.

    Raises:
        LoadError: It brings none, or one for other outputs than the dataset's.
    """
    found = None if spec.head is None else read_trained(spec.head, "head")
    task = found[0].task if found is not None else spec.task if "task" in spec.model_fields_set else dataset.task
    if task != dataset.task:
        raise LoadError("task", f"the model's outputs are {task}, the dataset's {dataset.task}")
    model = load_model(spec.model_copy(update={"task": dataset.task}))
    if not model.output_count:
        raise LoadError("model", "has no classifier: train one first with `cdam train head`, and give it as --head")
    classifier = model.module.get_classifier()  # type: ignore[operator]
    if not isinstance(classifier, nn.Linear):
        raise LoadError(
            "model", "its classifier must be a single linear layer: its outputs are to be read off each patch"
        )
    if model.output_names and model.output_names != dataset.outputs:
        raise LoadError(
            "outputs",
            f"the model's are {few(model.output_names)}, the dataset's {few(dataset.outputs)}: they must be the same, in "
            "the same order",
        )
    if model.output_count != len(dataset.outputs):
        raise LoadError("outputs", f"the model has {model.output_count}, the dataset {len(dataset.outputs)}")
    bias = classifier.bias if classifier.bias is not None else classifier.weight.new_zeros(len(classifier.weight))
    return classifier.weight.detach().clone(), bias.detach().clone()


def _learnt_from(training: MaskTraining, splits: Splits) -> str:
    """How little locality supervision it was."""
    said = f"learnt from the masks of {len(training.train)} of {len(splits.train)} training images"
    if not len(training.validation):
        return said
    return (
        f"{said}; the epoch chosen with {len(training.validation)} of {len(splits.validation)} validation images' masks"
    )


def _check_all(training: MaskTraining, splits: Splits) -> None:
    """Read the masks that will be learnt from or measured against, before anything is computed.

    Raises:
        DatasetError: One can't be, or none of those that are learnt from shows anything.
    """
    dataset = training.masks.dataset
    rows = {*training.train.tolist(), *training.validation.tolist(), *splits.validation.tolist(), *splits.test.tolist()}
    for row in sorted(rows, key=lambda row: dataset.rows[row].place):
        if dataset.rows[row].mask is not None:
            training.masks.of(row)
    if training.masks.kind is MaskKind.CLASSES and not any(
        training.masks.of(row).inside.any() for row in training.train
    ):
        raise DatasetError(
            f"{dataset.name}: no mask of the training images shows a class; are they of the kind object?"
        )


def _measured(training: MaskTraining, dataset: Dataset, splits: Splits) -> Mapping[str, Scores]:
    """Of the images and of the maps of each side that is not trained on."""
    scores: dict[str, Scores] = {}
    for side, rows in splits.items():
        if side == "train":
            continue
        answers: list[Tensor] = []
        maps = _maps(training, rows, answers)
        having = training.masks.having(rows)
        of_masks = measure_masks(dataset.outputs, maps, dataset.clusters(having)) if len(having) else None
        deque(maps, 0)  # of images without masks the answers are wanted all the same
        scores[side] = measured_rows(dataset, rows, torch.cat(answers))
        if of_masks is not None:
            scores[f"{side}_masks"] = of_masks
    return scores


def _maps(training: MaskTraining, rows: Rows, answers: list[Tensor]) -> Iterator[tuple[PatchMask, Floats]]:
    """The masks of those of some images that have one, with the probabilities of their patches.

    Args:
        training: The model is its.
        rows: The images.
        answers: Gets the outputs of all of them, (n, C) at a time.
    """
    masks = training.masks
    for some, whole, patches in training.answers(rows):
        answers.append(whole.cpu())
        having = {*masks.having(some).tolist()}
        for row, its in zip(some.tolist(), patches, strict=True):
            if row in having:
                mask = masks.of(row)
                outputs = torch.from_numpy(mask.outputs).to(its.device)
                odds = log_odds(its[None], torch.zeros_like(outputs), outputs, masks.dataset.task)
                yield mask, torch.sigmoid(odds).cpu().numpy().astype(np.float64)
