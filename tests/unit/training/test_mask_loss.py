"""The loss of patches, written out patch by patch in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cdam_server.settings.specs import Task
from cdam_training.mask_training import log_odds, patch_loss
from cdam_training.masks import PatchMask

PATCHES, OUTPUTS = 7, 4


def mask(outputs: list[int], seed: int) -> PatchMask:
    """Patches of 10 pixels; the first has none that is decided."""
    rng = np.random.default_rng(seed)
    decided = np.array([0, *rng.integers(1, 11, PATCHES - 1)], np.int32)
    inside = np.stack([rng.integers(0, decided + 1) for _ in outputs]).astype(np.int32)
    return PatchMask(np.array(outputs), inside, decided)


def plain_loss(logits: Tensor, masks: list[PatchMask], task: Task, *, balanced: bool) -> float:
    total = 0.0
    for its, mask in zip(logits.tolist(), masks, strict=True):
        for output, inside in zip(mask.outputs.tolist(), mask.inside.tolist(), strict=True):
            sides: dict[bool, list[float]] = {True: [], False: []}
            for row, pixels, decided in zip(its, inside, mask.decided.tolist(), strict=True):
                if task is Task.MULTI_CLASS:
                    p = math.exp(row[output]) / sum(map(math.exp, row))
                else:
                    p = 1 / (1 + math.exp(-row[output]))
                if decided:
                    target = pixels / decided > 0.5
                    sides[target].append(-math.log(p if target else 1 - p))
            both = sides[True] + sides[False]
            if balanced and sides[True] and sides[False]:
                total += sum(sum(side) / len(side) / 2 for side in sides.values())
            elif both:
                total += sum(both) / len(both)
    return total / len(masks)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("task", [Task.MULTI_CLASS, Task.MULTI_LABEL, Task.BINARY])
def test_the_loss_is_the_one_in_its_words(task: Task, balanced: bool) -> None:
    count = 1 if task is Task.BINARY else OUTPUTS
    logits = torch.randn((3, PATCHES, count), generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    outputs = {Task.MULTI_CLASS: [[2], [0, 3], [1]], Task.MULTI_LABEL: [[0, 1, 2, 3]] * 3, Task.BINARY: [[0]] * 3}[task]
    masks = [mask(its, seed) for seed, its in enumerate(outputs)]
    expected = plain_loss(logits, masks, task, balanced=balanced)
    assert float(patch_loss(logits, masks, task, balanced=balanced)) == pytest.approx(expected, rel=1e-12)


def test_an_image_of_which_nothing_is_decided_costs_nothing() -> None:
    known = mask([1], 3)
    empty = PatchMask(known.outputs, known.inside * 0, known.decided * 0)
    logits = torch.randn((2, PATCHES, OUTPUTS), generator=torch.Generator().manual_seed(1))
    alone = patch_loss(logits[:1], [known], Task.MULTI_LABEL)
    for balanced in (False, True):
        assert float(patch_loss(logits[1:], [empty], Task.MULTI_LABEL, balanced=balanced)) == 0
    both = patch_loss(logits, [known, empty], Task.MULTI_LABEL)
    assert float(both) == pytest.approx(float(alone) / 2, rel=1e-6)


def test_log_odds_are_the_logit_of_the_methods_probability() -> None:
    logits = torch.randn((2, PATCHES, OUTPUTS), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    images, outputs = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 3])
    softmax = torch.sigmoid(log_odds(logits, images, outputs, Task.MULTI_CLASS))
    torch.testing.assert_close(softmax, logits.softmax(-1)[images, :, outputs], rtol=1e-12, atol=0)
    sigmoid = torch.sigmoid(log_odds(logits, images, outputs, Task.MULTI_LABEL))
    torch.testing.assert_close(sigmoid, logits.sigmoid()[images, :, outputs], rtol=1e-12, atol=0)


def test_certain_patches_have_finite_losses_and_gradients() -> None:
    logits = torch.zeros((1, PATCHES, OUTPUTS))
    logits[..., 1] = 300.0  # a softmax of 1 to the last bit, wrong where the target is 0
    logits.requires_grad_()
    loss = patch_loss(logits, [mask([1], 5)], Task.MULTI_CLASS)
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[..., 1].abs().max() > 0.1
