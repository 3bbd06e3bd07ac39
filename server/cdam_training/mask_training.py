"""The classifier, trained to say of each patch's token where its classes are.

After Kang, Heo and Choe (2024), "Improving ViT interpretability with patch-level mask prediction". Of the paper only the
abstract is public: maps are probabilities by class from one forward pass, no parameter is added, and binary masks of less
than 1 % of the training images are enough. The loss, the batches and every number here are a reconstruction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cdam_engine import SplitViT
from cdam_engine.evaluation.geometry import Geometry
from cdam_engine.families import Readout
from cdam_server.compute.loading import Backbone
from cdam_server.settings.load_error import LoadError
from cdam_server.settings.specs import Task
from cdam_training.datasets import Dataset
from cdam_training.heads import HeadTraining, Images, Options
from cdam_training.loop import Recipe
from cdam_training.masks import MaskKind, Masks, PatchMask, choose
from cdam_training.trunk_outputs import Rows

OF_MASKS: Final = Recipe(batch_size=16, optimizer="adamw", lr=5e-4, block_lr=1e-4, schedule="one_cycle")
"""What does well from a model that classifies already."""

_AT_ONCE = 16  # images whose patches are read out together


@dataclass(frozen=True)
class MaskOptions:
    """How masks are learnt from.

    Attributes:
        kind: What they mean.
        share: Of the training images, how many may be learnt from with their masks; of the validation images likewise.
        weight: Of the patches' loss beside the images' loss.
        images: With masks, in each step.
        balanced: Whether patches inside an object count together as much as those outside.
    """

    kind: MaskKind
    share: float = 0.01
    weight: float = 1.0
    images: int = 8
    balanced: bool = True


def log_odds(logits: Tensor, images: Tensor, outputs: Tensor, task: Task) -> Tensor:
    """The logit of an output's probability at each patch, (K, P), for K pairs of image and output.

    Args:
        logits: Of each patch's token, (B, P, C).
        images: Of the pairs, (K,).
        outputs: Likewise.
        task: A softmax over outputs for multi_class, a sigmoid of each otherwise.
    """
    its = logits[images]
    own = its.gather(2, outputs[:, None, None].expand(-1, its.shape[1], 1))[..., 0]
    if task is not Task.MULTI_CLASS:
        return own
    is_own = F.one_hot(outputs, logits.shape[2]).bool()[:, None]
    return own - its.masked_fill(is_own, -torch.inf).logsumexp(dim=2)


def patch_loss(logits: Tensor, masks: Sequence[PatchMask], task: Task, *, balanced: bool = False) -> Tensor:
    """Binary cross-entropy of each output's probability at each patch: the mean over images of the sum over outputs.

    The target of a patch is 1 where more than half of its decided pixels belong to the output. Of an output that is what
    is averaged over the patches that have a decided pixel.

    Args:
        logits: What the classifier says of each patch's token, (B, P, C).
        masks: Of the images.
        task: What the outputs mean.
        balanced: Whether the patches inside count as much as those outside, where there are both.
    """
    device = logits.device
    images = torch.arange(len(masks)).repeat_interleave(torch.tensor([len(mask.outputs) for mask in masks]))
    outputs = torch.from_numpy(np.concatenate([mask.outputs for mask in masks]))
    inside = torch.from_numpy(np.concatenate([mask.targets for mask in masks])).to(device, logits.dtype)
    decided = torch.from_numpy(np.stack([mask.decided > 0 for mask in masks]))[images].to(device, logits.dtype)
    odds = log_odds(logits, images.to(device), outputs.to(device), task)
    losses = F.binary_cross_entropy_with_logits(odds, inside, reduction="none")
    return (losses * _weights(inside, decided, balanced=balanced)).sum() / len(masks)


def _weights(inside: Tensor, decided: Tensor, *, balanced: bool) -> Tensor:
    """Of the patches of each pair, (K, P), with the sum 1; 0 where nothing is decided."""
    even = decided / decided.sum(1, keepdim=True).clamp(min=1)
    if not balanced:
        return even
    sides = [decided * side for side in (inside, 1 - inside)]
    both = (sides[0].sum(1, keepdim=True) > 0) & (sides[1].sum(1, keepdim=True) > 0)
    halves = sum(side / side.sum(1, keepdim=True).clamp(min=1) / 2 for side in sides)
    return torch.where(both, halves, even)


class MaskTraining(HeadTraining):
    """A training with masks; the head starts from the model's own.

    Args:
        backbone: The model; it is changed.
        dataset: Whose rows have masks.
        images: What is learnt from.
        options: What is trained; at least one block.
        with_masks: How masks are learnt from.
        recipe: How.
        work: Folder for what is kept meanwhile.
        start: The model's own classifier, weight (C, D) and bias (C).

    Attributes:
        masks: Of the dataset, in the model's patches.
        train: The training images that are learnt from with their masks.
        validation: Likewise of the validation images, whose loss decides which epoch is taken.

    Raises:
        DatasetError: Something is wrong with the masks.
        LoadError: The model can't be trained so.
    """

    def __init__(
        self,
        backbone: Backbone,
        dataset: Dataset,
        images: Images,
        options: Options,
        with_masks: MaskOptions,
        recipe: Recipe,
        work: Path,
        start: tuple[Tensor, Tensor],
    ) -> None:
        _check_readout(backbone)
        key = {"masks": asdict(with_masks), "start": _sum_of(start)}
        super().__init__(backbone, images, options, recipe, work, start=start, key=key)
        vit = self.tail.vit
        geometry = Geometry(vit.input_size, vit.patch_size, vit.grid(vit.input_size))
        self.masks = Masks(dataset, with_masks.kind, self._sources, geometry)
        self._with = with_masks
        self.train = self._chosen(images.train)
        self.validation = self._chosen(images.validation)
        if not len(self.train):
            raise LoadError("mask", "no training image has a mask: there is nothing to learn from")
        self._places = np.searchsorted(images.train, self.train)
        for row in (*self.train, *self.validation):
            self.masks.of(int(row))  # what is wrong with one is said before anything is computed

    def _chosen(self, side: Rows) -> Rows:
        having = self.masks.having(side)
        number = max(1, round(self._with.share * len(side))) if len(having) else 0
        return choose(self.masks.dataset, having, number, self._recipe.seed)

    def loss(self, some: Rows, epoch: int) -> Tensor:
        """See `HeadTraining`; with the patches of some images that have masks, drawn anew in every step."""
        of_images = super().loss(some, epoch)
        drawn = torch.randperm(len(self._places))[: self._with.images].numpy()
        views = self.kept.drawn(self._places[drawn], epoch)
        logits = self.tail.with_patches(self.kept(self._places[drawn], epoch))[1]
        masks = [self.masks.of(int(row), int(view)) for row, view in zip(self.train[drawn], views, strict=True)]
        return of_images + self._with.weight * self._patch_loss(logits, masks)

    def validation_loss(self) -> float:
        """See `HeadTraining`; with the patches of the images that were chosen."""
        loss = super().validation_loss()
        if not len(self.validation):
            return loss
        parts = [
            float(self._patch_loss(logits, [self.masks.of(int(row)) for row in rows])) * len(rows)
            for rows, _, logits in self.answers(self.validation)
        ]
        return loss + self._with.weight * sum(parts) / len(self.validation)

    def answers(self, images: Rows) -> Iterator[tuple[Rows, Tensor, Tensor]]:
        """What the classifier says of images as they are served: some images, (n, C), and of their patches, (n, P, C)."""
        self.tail.eval()
        for part, x in self.kept.in_parts(images, _AT_ONCE):
            with torch.no_grad():
                whole, patches = self.tail.with_patches(x)
            yield images[part], whole.logits, patches

    def _patch_loss(self, logits: Tensor, masks: Sequence[PatchMask]) -> Tensor:
        return patch_loss(logits, masks, self._images.task, balanced=self._with.balanced)


def _check_readout(backbone: Backbone) -> None:
    if SplitViT(backbone.module).readout is Readout.ATTENTION_POOL:
        raise LoadError(
            "model",
            "its classifier reads what attention pooled, which no single patch token resembles: it can't say of "
            "a patch what it says of an image",
        )


def _sum_of(start: tuple[Tensor, Tensor]) -> str:
    return hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in start)).hexdigest()
