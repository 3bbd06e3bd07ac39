"""A linear head on a backbone, and maybe the backbone's last blocks with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cdam_engine import SplitViT, UnsupportedArchitectureError
from cdam_engine.fingerprint import fingerprint
from cdam_server.compute.device import find_device
from cdam_server.compute.loading import Backbone
from cdam_server.compute.weights.files import StateDict
from cdam_server.compute.weights.heads import linear_head
from cdam_server.settings.load_error import LoadError
from cdam_server.settings.specs import Task
from cdam_training import convex
from cdam_training.loop import Epoch, Loop, Recipe, batches_of
from cdam_training.losses import LOSSES, scaling_of
from cdam_training.state import State
from cdam_training.tail import Tail
from cdam_training.trunk_outputs import FreshOutputs, KeptOutputs, Rows, Sources, TrainingRows, digest_of
from cdam_training.views import Augmentation


@dataclass(frozen=True)
class Options:
    """What is trained, and on what.

    Attributes:
        blocks: How many of the last blocks are trained with the head.
        keep: Whether what the trunk makes of the images is kept; always where blocks are trained.
        views: Views of each training image that are kept; the first is the image as it is served.
        augmentation: How training images are varied.
        dropout: In the blocks, see `Tail`.
        token_dropout: See `Tail`.
        penalties: Of a head that is fitted to its minimum; None: trained in epochs.
        kept: Folder for it, which several trainings may share; None: in the training's own.
        keep_limit: Bytes that may be kept on disk.
        keep_dtype: float32 or float16.
        workers: Processes that read images ahead.
        device: Where to compute.
    """

    blocks: int = 0
    keep: bool = False
    views: int = 1
    augmentation: Augmentation = field(default_factory=Augmentation)
    dropout: float = 0.0
    token_dropout: float = 0.0
    penalties: tuple[float, ...] | None = None
    kept: Path | None = None
    keep_limit: int = 20_000_000_000
    keep_dtype: str = "float32"
    workers: int = 0
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class Images:
    """What is learnt from.

    Attributes:
        paths: The files.
        targets: Class indices (n), or numbers (n, C).
        task: What they mean.
        outputs: C, how many outputs there are.
        train, validation, test: Indices of the images.
        digest: Of all of it.
        content: Digest of the files alone, in their order.
    """

    paths: Sequence[Path]
    targets: Tensor
    task: Task
    outputs: int
    train: Rows
    validation: Rows
    test: Rows
    digest: str
    content: str


@dataclass(frozen=True, eq=False)
class TrainedHead:
    """What came out.

    Attributes:
        weight: (C, D).
        bias: (C).
        tuned: Everything else that was trained, now or before, by its names in the model's state dict.
        history: The epochs, or what was found with each penalty.
        kept: What the trunk makes of the images that are not trained on.
        tail: The tail, with these numbers.
    """

    weight: Tensor
    bias: Tensor
    tuned: StateDict
    history: Sequence[Epoch] | Sequence[convex.Fit]
    kept: KeptOutputs
    tail: Tail

    @property
    def device(self) -> torch.device:
        """Where the tail is."""
        return self.tail.head.weight.device

    def outputs(self, images: Rows) -> Tensor:
        """What the model says of images as they are served, (n, C), on the CPU."""
        self.tail.eval()
        with torch.no_grad():
            return torch.cat([self.tail(x).logits.cpu() for _, x in self.kept.in_parts(images)])


class Progress(Protocol):
    """Who is told how far it is."""

    def reading(self, done: int, total: int) -> None:
        """So many files have been read."""

    def trunk(self, done: int, total: int) -> None:
        """So many images have gone through the trunk."""

    def training(self, done: int, total: int, history: Sequence[Epoch]) -> None:
        """So many steps are done."""

    def fitting(self, fits: Sequence[convex.Fit], total: int) -> None:
        """So many penalties of so many have been tried."""


def train_head(
    backbone: Backbone, images: Images, options: Options, recipe: Recipe, work: Path, progress: Progress
) -> TrainedHead:
    """Train a head, and the blocks that the options name.

    The same arguments on the same machine give the same bits, whether the training was interrupted or not.

    Args:
        backbone: The model; it is changed.
        images: What is learnt from.
        options: What is trained.
        recipe: How.
        work: Folder for what is kept meanwhile; a training that was interrupted goes on from there.
        progress: Is told how far it is.

    Raises:
        LoadError: The model can't be trained so, or `work` is of another training; the message names the option.
    """
    training = HeadTraining(backbone, images, options, recipe, work)
    training.kept.fill(progress.trunk)
    history = training.loop(progress.training) if options.penalties is None else training.fit(progress.fitting)
    return training.finished(history)


class HeadTraining:
    """What the steps of a training have in common.

    Args:
        backbone: The model; it is changed.
        images: What is learnt from.
        options: What is trained.
        recipe: How.
        work: Folder for what is kept meanwhile.
        start: Weight (C, D) and bias (C) that the head starts from; None: zeros.
        key: What else decides the result, by name.

    Attributes:
        kept: What the trunk makes of the images.
        tail: What is trained.

    Raises:
        LoadError: The model can't be trained so.
    """

    def __init__(
        self,
        backbone: Backbone,
        images: Images,
        options: Options,
        recipe: Recipe,
        work: Path,
        *,
        start: tuple[Tensor, Tensor] | None = None,
        key: Mapping[str, Any] | None = None,
    ) -> None:
        self._backbone = backbone
        self._images = images
        self._options = options
        self._recipe = recipe
        self._work = work
        device = find_device(options.device)
        model = fingerprint(backbone.module, backbone.architecture, backbone.settings)
        self.tail = _tail(backbone, images.outputs, options, device)
        self._put(*(start or self._first_guess()))
        self._sources = Sources(
            images.paths,
            backbone.data_config,
            options.augmentation,
            options.views,
            recipe.seed,
            options.workers,
            device,
        )
        self._keeps_train = bool(options.keep or options.blocks)
        self.kept = KeptOutputs(
            self.tail,
            self._sources,
            train=images.train if self._keeps_train else images.train[:0],
            plain=np.concatenate((images.train,) * self._keeps_train + (images.validation, images.test)),
            folder=options.kept or work / "kept",
            key={"model": self._entering(), "images": images.content},
            limit=options.keep_limit,
            dtype=options.keep_dtype,
        )
        self._scaling = scaling_of(images.task, images.targets[torch.from_numpy(images.train)])
        scaled = images.targets if self._scaling is None else self._scaling.apply(images.targets)
        self._targets = scaled.to(device)
        self._loss = LOSSES[images.task]
        self._key = {
            "model": model,
            "dataset": images.digest,
            "split": digest_of(images.train, images.validation),
            **_deciding(options),
            "drops": self.tail.drops,
            **(key or {}),
        }
        self._rows: TrainingRows = self.kept
        if not self._keeps_train:
            batches = partial(batches_of, recipe, len(images.train))
            self._rows = FreshOutputs(self.tail, self._sources, images.train, batches)

    def _first_guess(self) -> tuple[Tensor, Tensor]:
        """A head that says how frequent each output is, and knows nothing more."""
        images, weight = self._images, torch.zeros_like(self.tail.head.weight)
        targets = images.targets[torch.from_numpy(images.train)]
        match images.task:
            case Task.MULTI_CLASS:
                bias = torch.log(torch.bincount(targets, minlength=images.outputs) / len(targets))
            case Task.MULTI_LABEL | Task.BINARY:
                bias = torch.logit(targets.reshape(len(targets), -1).float().mean(0))
            case Task.REGRESSION:  # of scaled targets
                bias = torch.zeros(images.outputs)
        return weight, bias.to(weight)

    def _entering(self) -> str:
        """Fingerprint of what makes the kept numbers: whatever is tuned after it, they stay the same."""
        tail, backbone = self.tail, self._backbone
        own = {id(tensor) for tensor in tail.head.state_dict(keep_vars=True).values()}
        named = backbone.module.state_dict(keep_vars=True)

        def counts(name: str) -> bool:
            return id(named[name]) not in own and (not tail.blocks or tail.vit.place_of(name) < tail.first)

        return fingerprint(backbone.module, backbone.architecture, backbone.settings, counts=counts)

    def _targets_of(self, images: Rows) -> Tensor:
        return self._targets[torch.from_numpy(images)]

    def fit(self, tell: Callable[[Sequence[convex.Fit], int], None]) -> Sequence[convex.Fit]:
        """The head that makes the loss and a penalty least."""
        images, penalties = self._images, self._options.penalties
        assert penalties is not None
        if len(penalties) > 1 and not len(images.validation):
            raise LoadError("l2", "there are no validation images to choose among penalties by: give one")
        latents, which = self.kept.all_views()
        validation = images.validation
        head, fits = convex.fit(
            (latents, self._targets_of(images.train[which])),
            (self.kept.plain(validation), self._targets_of(validation)) if len(validation) else None,
            images.outputs,
            self._loss,
            penalties,
            State(self._work / "fit.pt", {**self._key, "penalties": penalties}),
            tell,
        )
        self._put(head.weight, head.bias)
        return fits

    def loop(self, tell: Callable[[int, int, Sequence[Epoch]], None]) -> Sequence[Epoch]:
        """Epochs of steps."""
        loop = Loop(
            (self.tail.head_parameters, self.tail.tuned),
            self._recipe,
            len(self._images.train),
            self.loss,
            self.validation_loss if len(self._images.validation) else None,
            State(self._work / "training.pt", self._key),
        )
        loop.run(tell)
        return loop.history

    def loss(self, some: Rows, epoch: int) -> Tensor:
        """Of some training images, by their places among these; leaves the tail in training mode."""
        entering = self._rows(some, epoch)  # before the tail is in training mode: the trunk must not be
        self.tail.train(bool(self.tail.blocks))
        targets = self._targets_of(self._images.train[some])
        if not self._recipe.mixup:
            return self._loss(self.tail(entering).logits, targets)
        share = float(np.random.default_rng((self._recipe.seed, epoch, *some)).beta(*(self._recipe.mixup,) * 2))
        other = torch.randperm(len(some)).to(entering.device)
        logits = self.tail(torch.lerp(entering[other], entering, share)).logits
        return share * self._loss(logits, targets) + (1 - share) * self._loss(logits, targets[other])

    def validation_loss(self) -> float:
        """Of the validation images; leaves the tail in eval mode."""
        images = self._images.validation
        self.tail.eval()
        with torch.no_grad():
            sums = [
                float(self._loss(self.tail(x).logits, self._targets_of(images[part]))) * len(x)
                for part, x in self.kept.in_parts(images)
            ]
        return sum(sums) / len(images)

    def finished(self, history: Sequence[Any]) -> TrainedHead:
        """What came out."""
        self.tail.eval()
        if self._scaling is not None:
            self._put(*self._scaling.fold(self.tail.head.weight.detach().cpu(), self.tail.head.bias.detach().cpu()))
        own = self._backbone.module.state_dict()
        tuned = {name: own[name].detach().cpu() for name in sorted({*self._backbone.tuned, *self.tail.tuned})}
        weight, bias = self.tail.head.weight.detach().cpu(), self.tail.head.bias.detach().cpu()
        for name, tensor in {"head.weight": weight, "head.bias": bias, **tuned}.items():
            if not torch.isfinite(tensor).all():
                setting, remedy = ("l2", "penalty") if self._options.penalties else ("lr", "learning rate")
                raise LoadError(setting, f"what came out is not finite ({name}): take a smaller {remedy}")
        return TrainedHead(weight, bias, tuned, history, self.kept, self.tail)

    def _put(self, weight: Tensor, bias: Tensor) -> None:
        with torch.no_grad():
            self.tail.head.weight.copy_(weight)
            self.tail.head.bias.copy_(bias)


def _tail(backbone: Backbone, outputs: int, options: Options, device: torch.device) -> Tail:
    head = linear_head(backbone.module, outputs, "model")
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    backbone.module.eval().to(device)
    try:
        vit = SplitViT(backbone.module)
    except UnsupportedArchitectureError as error:
        raise LoadError("model", f"a head for it could not be explained: {error}") from error
    return Tail(vit, head, blocks=options.blocks, dropout=options.dropout, token_dropout=options.token_dropout)


def _deciding(options: Options) -> Mapping[str, Any]:
    """What of the options decides the result."""
    indifferent = {"kept", "keep_limit", "workers", "penalties"}
    return {name: value for name, value in asdict(options).items() if name not in indifferent}
