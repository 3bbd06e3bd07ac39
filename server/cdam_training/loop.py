"""The training loop: steps, epochs, early stopping, and what is needed to go on after a kill."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from timm.optim import Adahessian, create_optimizer_v2
from torch import Tensor, nn
from torch.optim import lr_scheduler

from cdam_server.settings.load_error import LoadError, reason
from cdam_training.state import State

Schedule = Literal["constant", "exponential", "cosine", "one_cycle"]

_SAVE_EVERY = 30.0  # seconds; an epoch's end is always saved


@dataclass(frozen=True)
class Recipe:
    """How parameters are trained. The defaults are those of the CDAM paper for a head.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images in a step.
        optimizer: timm's name of it.
        lr: Learning rate of the head, and of the blocks where there is no other for them.
        block_lr: Learning rate of the blocks.
        weight_decay: Of weights, not of biases and norms.
        schedule: How learning rates change; "exponential" multiplies them by `lr_decay` after each epoch.
        lr_decay: See `schedule`.
        ema: Decay, a step, of the running average of the parameters that is validated and kept in their place; 0: none.
        clip: Largest norm of the gradient; 0: any.
        mixup: Alpha of mixup (Zhang et al. 2018, Algorithm 1), of what enters the part that is trained; 0: none.
        patience: Epochs without a better validation loss after which training ends; 0: none.
        seed: Of everything that is drawn.
    """

    epochs: int = 10
    batch_size: int = 128
    optimizer: str = "adam"
    lr: float = 3e-4
    block_lr: float | None = None
    weight_decay: float = 0.0
    schedule: Schedule = "constant"
    lr_decay: float = 0.95
    ema: float = 0.0
    clip: float = 0.0
    mixup: float = 0.0
    patience: int = 0
    seed: int = 0


OF_BLOCKS: Final = Recipe(epochs=50, batch_size=16, schedule="exponential", clip=1.0, patience=5)
"""For blocks: the CDAM paper's epochs and rates (its batch size is not stated), and an end that its text does not have."""


@dataclass(frozen=True)
class Epoch:
    """What an epoch left.

    Attributes:
        number: From 1.
        loss: Mean over the training images, while they were trained on.
        validation_loss: Mean over the validation images at the end; None if there are none.
    """

    number: int
    loss: float
    validation_loss: float | None


class Loop:
    """Trains parameters; whatever is drawn depends on seed, epoch and step alone.

    Args:
        parameters: Of the head, and of blocks, by name.
        recipe: How.
        rows: How many training images there are.
        loss: The mean loss of some of them, by their indices; in which epoch they are asked for.
        validate: The validation loss; None if there are no validation images.
        state: Where what is needed to go on is kept.

    Attributes:
        history: The epochs so far.

    Raises:
        LoadError: `state` is of another training.
    """

    def __init__(
        self,
        parameters: tuple[Mapping[str, nn.Parameter], Mapping[str, nn.Parameter]],
        recipe: Recipe,
        rows: int,
        loss: Callable[[NDArray[np.int64], int], Tensor],
        validate: Callable[[], float] | None,
        state: State,
    ) -> None:
        head, blocks = parameters
        self._recipe = recipe
        self._rows = rows
        self._loss = loss
        self._validate = validate
        self._state = state.with_key(**asdict(recipe))
        self._parameters = {**blocks, **head}
        self._optimizer = _optimizer(head, blocks, recipe)
        self._schedule = _schedule(self._optimizer, recipe, self.steps_an_epoch)
        self._average = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._step = 0
        self._sum = 0.0
        self.history: list[Epoch] = []
        self._best: dict[str, Tensor] | None = None
        self._saved = time.monotonic()
        if (kept := self._state.load()) is not None:
            self._restore(kept)

    @property
    def steps_an_epoch(self) -> int:
        """The last one of an epoch takes the rest of the images."""
        return math.ceil(self._rows / self._recipe.batch_size)

    @property
    def best(self) -> Epoch | None:
        """The epoch with the least validation loss; the last one where there is no validation."""
        if not self.history or self._validate is None:
            return self.history[-1] if self.history else None
        return min(self.history, key=lambda epoch: (epoch.validation_loss, epoch.number))

    @property
    def is_done(self) -> bool:
        """Whether all epochs are done, or the last ones were no better."""
        best, recipe = self.best, self._recipe
        waited = 0 if best is None else len(self.history) - best.number
        return len(self.history) >= recipe.epochs or bool(recipe.patience and waited >= recipe.patience)

    def run(self, tell: Callable[[int, int, Sequence[Epoch]], None]) -> None:
        """Train to the end and leave the best epoch's numbers in the parameters.

        Args:
            tell: Called after each step with the number of steps done and to be done, and the epochs so far.

        Raises:
            LoadError: The loss is no longer finite.
        """
        while not self.is_done:
            self._train_step()
            if self._step % self.steps_an_epoch == 0:
                self._end_epoch()
            elif time.monotonic() - self._saved > _SAVE_EVERY:
                self._save()
            tell(self._step, self._recipe.epochs * self.steps_an_epoch, self.history)
        if self._best is not None:
            self._put(self._best)

    def _train_step(self) -> None:
        recipe = self._recipe
        epoch, place = divmod(self._step, self.steps_an_epoch)
        rows = batches_of(recipe, self._rows, epoch)[place]
        with torch.random.fork_rng(devices=_devices(self._parameters)):
            torch.manual_seed(int(np.random.SeedSequence((recipe.seed, epoch, place)).generate_state(1)[0]))
            loss = self._loss(rows, epoch)
        if not torch.isfinite(loss):
            raise LoadError("lr", f"the loss is no longer finite in epoch {epoch + 1}: take a lower learning rate")
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if self._recipe.clip:
            nn.utils.clip_grad_norm_(self._parameters.values(), self._recipe.clip)
        try:
            self._optimizer.step()
        except RuntimeError as error:
            if "overflow" not in str(error):
                raise
            raise LoadError("lr", "a step is larger than a number may be: take a lower learning rate") from error
        self._schedule.step()
        self._follow()
        self._sum += float(loss.detach()) * len(rows)
        self._step += 1

    def _follow(self) -> None:
        """The running average, which starts as a plain mean so that the first steps do not linger."""
        decay = min(self._recipe.ema, self._step / (self._step + 1)) if self._recipe.ema else 0.0
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                self._average[name].lerp_(parameter, 1 - decay)

    def _end_epoch(self) -> None:
        current = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._put(self._average)
        loss = None if self._validate is None else self._validate()
        self.history.append(Epoch(len(self.history) + 1, self._sum / self._rows, loss))
        self._sum = 0.0
        if self.best is self.history[-1]:
            self._best = {name: value.clone() for name, value in self._average.items()}
        self._put(current)
        self._save()

    def _put(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(values[name])

    def _save(self) -> None:
        self._state.save(
            {
                "step": self._step,
                "sum": self._sum,
                "history": [asdict(epoch) for epoch in self.history],
                "parameters": {name: parameter.detach() for name, parameter in self._parameters.items()},
                "average": self._average,
                "best": self._best,
                "optimizer": self._optimizer.state_dict(),
                "schedule": self._schedule.state_dict(),
            }
        )
        self._saved = time.monotonic()

    def _restore(self, kept: Mapping[str, Any]) -> None:
        self._step, self._sum = kept["step"], kept["sum"]
        self.history = [Epoch(**epoch) for epoch in kept["history"]]
        self._average = self._beside_parameters(kept["average"])
        self._best = None if kept["best"] is None else self._beside_parameters(kept["best"])
        self._put(kept["parameters"])
        self._optimizer.load_state_dict(kept["optimizer"])
        self._schedule.load_state_dict(kept["schedule"])

    def _beside_parameters(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each on its parameter's device."""
        return {name: value.to(self._parameters[name].device) for name, value in values.items()}


def batches_of(recipe: Recipe, rows: int, epoch: int) -> list[NDArray[np.int64]]:
    """Which rows each step of an epoch takes: every row once, in an order drawn for the epoch."""
    order = np.random.default_rng((recipe.seed, epoch)).permutation(rows)
    return [order[start : start + recipe.batch_size] for start in range(0, rows, recipe.batch_size)]


def _optimizer(
    head: Mapping[str, nn.Parameter], blocks: Mapping[str, nn.Parameter], recipe: Recipe
) -> torch.optim.Optimizer:
    rates = ((head, recipe.lr), (blocks, recipe.block_lr or recipe.lr))
    groups = [
        {"params": its, "lr": rate, "weight_decay": recipe.weight_decay if matrices else 0.0}
        for parameters, rate in rates
        for matrices in (True, False)
        if (its := [p for p in parameters.values() if (p.ndim > 1) is matrices])
    ]
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(groups, recipe.optimizer, lr=recipe.lr)
    except (ValueError, AssertionError, TypeError) as error:
        raise LoadError("optimizer", f"timm can't make {recipe.optimizer!r}: {reason(error)}") from error
    if isinstance(optimizer, Adahessian):
        raise LoadError("optimizer", f"{recipe.optimizer!r} needs second derivatives, which are not made: take another")
    return optimizer


def _schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> lr_scheduler.LRScheduler:
    """Stepped after each step, not after each epoch."""
    total = recipe.epochs * steps
    match recipe.schedule:
        case "constant":
            return lr_scheduler.ConstantLR(optimizer, 1.0)
        case "exponential":
            return lr_scheduler.StepLR(optimizer, steps, recipe.lr_decay)
        case "cosine":
            return lr_scheduler.CosineAnnealingLR(optimizer, total)
        case "one_cycle":
            peaks = [group["lr"] for group in optimizer.param_groups]
            try:
                return lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=total)
            except ValueError as error:
                raise LoadError(
                    "schedule", f"one_cycle is for optimizers with momentum, not {recipe.optimizer!r}: take another"
                ) from error


def _devices(parameters: Mapping[str, nn.Parameter]) -> list[torch.device]:
    return [device for device in {p.device for p in parameters.values()} if device.type == "cuda"]
