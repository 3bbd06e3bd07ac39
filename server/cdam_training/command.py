"""What `cdam train` does, from a dataset's path to a file of weights and its card."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cdam_engine.preprocess import normalise, prepare
from cdam_server.compute.loading import Backbone, load_backbone, load_model
from cdam_server.compute.weights.trained import Trained, write_trained
from cdam_server.settings.load_error import LoadError
from cdam_server.settings.specs import ModelSpec, Task
from cdam_training.card import Card, ModelPart, data_part, now, write_card
from cdam_training.convex import Fit
from cdam_training.datasets import Dataset, read_dataset
from cdam_training.heads import Images, Options, Progress, TrainedHead, train_head
from cdam_training.loop import Epoch, Recipe
from cdam_training.metrics import Scores, measure
from cdam_training.splits import Splits, split_dataset
from cdam_training.trunk_outputs import Rows
from cdam_training.views import read_image

_CHECKED = 4  # images
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Source:
    """What to learn from; see `read_dataset` and `split_dataset`."""

    path: Path
    task: Task | None
    targets: Sequence[str]
    group_by: str | None
    split_by: str | None
    validation: float | None
    test: float | None
    seed: int
    mask: str | None = None

    def read(self, progress: Progress) -> tuple[Dataset, Splits]:
        """The rows, and on which side each is.

        Raises:
            DatasetError: Something is wrong with them.
        """

        def told(files: Sequence[Path]) -> Iterator[Path]:
            for done, file in enumerate(files):
                progress.reading(done, len(files))
                yield file
            progress.reading(len(files), len(files))

        dataset = read_dataset(
            self.path,
            task=None if self.task is None else Task(self.task),
            targets=self.targets,
            group_by=self.group_by,
            split_by=self.split_by,
            mask=self.mask,
            progress=told,
        )
        return dataset, split_dataset(dataset, seed=self.seed, validation=self.validation, test=self.test)


def run_head(
    spec: ModelSpec, source: Source, options: Options, recipe: Recipe, output: Path, work: Path, progress: Progress
) -> Card:
    """Train a head, write it and its card, and look whether the server would load it.

    Args:
        spec: Of the model.
        source: What to learn from.
        options: What is trained.
        recipe: How.
        output: The file to write.
        work: Folder for what is kept meanwhile.
        progress: Is told how far it is.

    Returns:
        The card.

    Raises:
        DatasetError: Something is wrong with the dataset.
        LoadError: Something is wrong with the model, or it can't be trained so.
    """
    clock = Clock()
    dataset, splits = source.read(progress)
    backbone = load_backbone(spec)
    trained = train_head(backbone, images_of(dataset, splits), options, recipe, work, progress)
    result = Result(backbone, dataset, splits, options, trained, measured(dataset, splits, trained))
    return write(result, spec, of_recipe(options, recipe), output, clock)


class Clock:
    """When a run began, and how long it takes."""

    def __init__(self) -> None:
        self.started = now()
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since then."""
        return round(time.monotonic() - self._began, 1)


@dataclass(frozen=True, eq=False)
class Result:
    """What a training leaves, and what it was of."""

    backbone: Backbone
    dataset: Dataset
    splits: Splits
    options: Options
    trained: TrainedHead
    metrics: Mapping[str, Scores]


def write(result: Result, spec: ModelSpec, recipe: Mapping[str, Any], output: Path, clock: Clock) -> Card:
    """Write the weights and their card, and look whether the server would load them.

    Args:
        result: What was trained.
        spec: Of the model that it began with.
        recipe: Every option that had a part in it.
        output: The file to write.
        clock: Of this run.

    Raises:
        LoadError: The server would not load them, or they would give other outputs.
    """
    backbone, dataset, trained, blocks = result.backbone, result.dataset, result.trained, result.options.blocks
    about = Trained(str(dataset.task), dataset.outputs, backbone.architecture, backbone.fingerprint)
    # What is not yet looked at has another name: who is killed here goes on when the same command is given again.
    partial = output.with_name(f".{output.stem}.partial.safetensors")
    try:
        write_trained(partial, about, trained.weight, trained.bias, trained.tuned)
        served = _served(spec, partial, dataset, trained)
    except (LoadError, OSError):
        partial.unlink(missing_ok=True)
        raise
    card = Card(
        task=dataset.task,
        outputs=dataset.outputs,
        model=ModelPart(
            name=spec.name,
            architecture=backbone.architecture,
            fingerprint=backbone.fingerprint,
            trained_fingerprint=served,
            trained=f"the head and the last {blocks} blocks" if blocks else "the head",
            blocks_trained=blocks,
            parameters_trained=trained.tail.parameters_trained,
        ),
        data=data_part(dataset, result.splits),
        recipe={**recipe, "drops": trained.tail.drops},
        curve=[asdict(each) for each in trained.history],
        metrics=result.metrics,
        started=clock.started,
        seconds=clock.seconds,
        notes=notes(trained.history),
    )
    partial.replace(output)
    write_card(card, output.with_suffix(".json"))
    return card


def notes(history: Sequence[Epoch] | Sequence[Fit]) -> tuple[str, ...]:
    """What was best at the end of what was tried: beyond it there may be better."""
    judged = [(each.validation_loss, each) for each in history if each.validation_loss is not None]
    if len(judged) < 2:
        return ()
    _, best = min(judged, key=lambda one: one[0])
    if isinstance(best, Epoch):
        if best is not history[-1]:
            return ()
        return (f"epoch {best.number}, the last, does best on the validation images: more --epochs may do better",)
    tried = [fit.l2 for _, fit in judged if isinstance(fit, Fit)]
    for end, edge, beyond in ((max(tried), "largest", "larger"), (min(tried), "smallest", "smaller")):
        if best.l2 == end:
            return (f"--l2 {end:g}, the {edge} tried, does best on the validation images: {beyond} ones may do better",)
    return ()


def measured(dataset: Dataset, splits: Splits, trained: TrainedHead) -> dict[str, Scores]:
    """How good the answers are on the images that were not trained on, by side."""
    return {
        side: measured_rows(dataset, rows, trained.outputs(rows)) for side, rows in splits.items() if side != "train"
    }


def measured_rows(dataset: Dataset, rows: Rows, answers: Tensor) -> Scores:
    """How good answers (n, C) are on some rows (n,)."""
    clusters = dataset.clusters(rows)
    return measure(dataset.task, dataset.outputs, dataset.targets(rows), answers.numpy(), clusters=clusters)


def of_recipe(options: Options, recipe: Recipe) -> dict[str, Any]:
    """Every option that had a part in it."""
    given = asdict(options)
    for name in ("kept", "workers"):
        del given[name]
    if options.penalties is None:
        return {**given, **asdict(recipe)}
    return {**given, "seed": recipe.seed, "optimizer": "L-BFGS"}


def images_of(dataset: Dataset, splits: Splits) -> Images:
    """What training takes of a dataset."""
    digest = hashlib.sha256()
    for row in dataset.rows:
        digest.update(row.content.encode())
    return Images(
        [row.image for row in dataset.rows],
        torch.from_numpy(dataset.targets()),
        dataset.task,
        len(dataset.outputs),
        splits.train,
        splits.validation,
        splits.test,
        dataset.digest,
        digest.hexdigest(),
    )


def _served(spec: ModelSpec, output: Path, dataset: Dataset, trained: TrainedHead) -> str:
    """The fingerprint of the model that a server would load, after it was asked about some images.

    Raises:
        LoadError: It says something else than what was trained.
    """
    # What the settings say of another classifier's outputs is left out: the file says it of its own.
    settings = spec.model_dump(exclude_unset=True, exclude={"head_layers", "num_outputs", "outputs", "task"})
    served = load_model(ModelSpec.model_validate({**settings, "head": output}))
    config = served.data_config
    rows = np.arange(min(_CHECKED, len(dataset)))
    with torch.no_grad():
        for row in rows.tolist():
            pixels = prepare(read_image(dataset.rows[row].image), config).pixels
            inputs = normalise(torch.from_numpy(pixels)[None], config)
            expected = served.module(inputs)
            found = trained.tail(trained.tail.entering(inputs.to(trained.device))).logits.cpu()
            least = 0.0 if dataset.task is Task.REGRESSION else 1.0
            scale = max(least, float(expected.abs().max()))
            if float((found - expected).abs().max()) > _TOLERANCE * scale:
                raise LoadError("output", "the file gives other outputs when it is loaded than in training")
    return served.fingerprint
