"""A step of a training with masks, computed anew from the files by timm's own model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from cdam_engine.preprocess import normalise
from cdam_server.compute.loading import load_backbone, load_model
from cdam_server.settings.specs import Task, load_models_file
from cdam_training.command import Source, images_of
from cdam_training.heads import Options
from cdam_training.loop import Recipe
from cdam_training.mask_command import own_classifier
from cdam_training.mask_training import MaskOptions, MaskTraining
from cdam_training.masks import MaskKind
from cdam_training.views import Augmentation, View, load_batches, view_of_indices
from masked_pictures import PATCH, SIZE, write_model, write_pictures

AUGMENTATION = Augmentation(scale=(0.4, 0.9))
SEED = 3


class Silent:
    """Tells nobody."""

    def reading(self, done: int, total: int) -> None: ...

    def trunk(self, done: int, total: int) -> None: ...


@pytest.mark.parametrize("epoch", [0, 1])
def test_the_loss_of_a_step_is_that_of_its_images_and_masks(tmp_path: Path, epoch: int) -> None:
    write_pictures(tmp_path, 10)
    spec = load_models_file(write_model(tmp_path))[0]
    source = Source(tmp_path / "several.jsonl", Task.MULTI_LABEL, ["labels"], None, "split", None, None, SEED, "mask")
    dataset, splits = source.read(Silent())  # type: ignore[arg-type]
    start = own_classifier(spec, dataset)
    backbone = load_backbone(spec)
    options = Options(blocks=2, keep=True, views=3, augmentation=AUGMENTATION)
    with_masks = MaskOptions(MaskKind.CLASSES, share=0.5, weight=0.7, images=4, balanced=False)
    recipe = Recipe(batch_size=6, seed=SEED)
    training = MaskTraining(backbone, dataset, images_of(dataset, splits), options, with_masks, recipe, tmp_path, start)
    training.kept.fill(Silent().trunk)
    assert len(training.train) == round(0.5 * len(splits.train))
    rows = np.array([4, 0, 7])
    torch.manual_seed(11)
    found = float(training.loss(rows, epoch).detach())
    # The same, from the files.
    model = load_model(spec.model_copy(update={"task": Task.MULTI_LABEL}))
    views = np.random.default_rng((SEED, epoch)).integers(3, size=len(splits.train))
    assert len({*views[rows].tolist()}) > 1

    def view(place: int) -> View:
        row = int(splits.train[place])
        return View(dataset.rows[row].image, int(views[place]), (row,))

    def answers(places: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        (pixels,) = load_batches([[view(place) for place in places]], model.data_config, AUGMENTATION)
        with torch.no_grad():
            tokens = model.module.forward_features(normalise(pixels, model.data_config))  # type: ignore[operator]
            said = model.module.head(tokens)  # type: ignore[operator]
        return said[:, 0], said[:, 1:]

    targets = torch.from_numpy(dataset.targets(splits.train[rows]))
    expected = F.binary_cross_entropy_with_logits(answers(rows.tolist())[0], targets, reduction="sum") / 3
    torch.manual_seed(11)
    drawn = torch.randperm(len(training.train))[:4].tolist()
    places = [int(np.flatnonzero(splits.train == training.train[number])[0]) for number in drawn]
    inside = []
    for place in places:
        file = dataset.rows[int(splits.train[place])].mask
        assert file is not None
        numbers = view_of_indices(np.asarray(Image.open(file)), view(place), model.data_config, AUGMENTATION)
        tiles = numbers.reshape(SIZE // PATCH, PATCH, SIZE // PATCH, PATCH)
        inside.append([(tiles == output + 1).mean((1, 3)).ravel() > 0.5 for output in range(3)])
    patches = answers(places)[1].transpose(1, 2)
    losses = F.binary_cross_entropy_with_logits(patches, torch.from_numpy(np.array(inside)).float(), reduction="none")
    expected += 0.7 * losses.mean(2).sum() / 4
    assert found == pytest.approx(float(expected), rel=1e-4)
