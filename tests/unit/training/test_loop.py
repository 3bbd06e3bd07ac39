"""The training loop, against the same steps written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from cdam_server.settings.load_error import LoadError
from cdam_training.loop import Epoch, Loop, Recipe, batches_of
from cdam_training.state import State

X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, :3] + 0.5 * torch.randn(50, 3, generator=torch.Generator().manual_seed(1))).argmax(1)


class Small:
    """A head and a block, in a loop."""

    def __init__(self, recipe: Recipe, file: Path, validation: list[float] | None = None) -> None:
        self.head, self.block = nn.Linear(6, 3), nn.Linear(6, 6)
        for layer in (self.head, self.block):
            nn.init.constant_(layer.weight, 0.1)
            nn.init.zeros_(layer.bias)
        self.drop = nn.Dropout(0.3)
        self.coming = iter(validation or [])
        self.loop = Loop(
            (dict(self.head.named_parameters(prefix="head")), dict(self.block.named_parameters(prefix="block"))),
            recipe,
            len(X),
            self.loss,
            (lambda: next(self.coming)) if validation is not None else None,
            State(file, {"data": 1}),
        )

    def loss(self, rows: NDArray[np.int64], epoch: int) -> Tensor:
        return F.cross_entropy(self.head(self.drop(torch.relu(self.block(X[rows])))), Y[rows])

    def run(self, steps: int | None = None) -> dict[str, Tensor]:
        def tell(done: int, total: int, history: object) -> None:
            if done == steps:
                raise KeyboardInterrupt

        if steps is None:
            self.loop.run(tell)
        else:
            with pytest.raises(KeyboardInterrupt):
                self.loop.run(tell)
        return {**self.head.state_dict(prefix="head."), **self.block.state_dict(prefix="block.")}


def test_every_row_once_an_epoch_in_an_order_of_its_own() -> None:
    recipe = Recipe(batch_size=16, seed=3)
    first, second = (batches_of(recipe, 50, epoch) for epoch in (0, 1))
    assert [len(batch) for batch in first] == [16, 16, 16, 2]
    assert sorted(np.concatenate(first).tolist()) == list(range(50))
    assert np.concatenate(first).tolist() != np.concatenate(second).tolist()
    assert np.concatenate(batches_of(recipe, 50, 1)).tolist() == np.concatenate(second).tolist()
    assert np.concatenate(batches_of(Recipe(batch_size=16, seed=4), 50, 0)).tolist() != np.concatenate(first).tolist()


def test_steps_of_adam_as_the_paper_says(tmp_path: Path) -> None:
    """Adam written out (Kingma and Ba 2015, Algorithm 1), with the CDAM paper's rate, against the loop's."""
    small = Small(Recipe(epochs=3, batch_size=20), tmp_path / "state.pt")
    small.drop.p = 0.0
    values = {
        f"{part}.{name}": parameter.detach().clone().requires_grad_()
        for part, layer in (("block", small.block), ("head", small.head))
        for name, parameter in layer.named_parameters()
    }
    first = {name: torch.zeros_like(value) for name, value in values.items()}
    second = {name: torch.zeros_like(value) for name, value in values.items()}
    step = 0
    for epoch in range(3):
        for rows in batches_of(Recipe(batch_size=20), len(X), epoch):
            hidden = torch.relu(X[rows] @ values["block.weight"].T + values["block.bias"])
            loss = F.cross_entropy(hidden @ values["head.weight"].T + values["head.bias"], Y[rows])
            gradients = torch.autograd.grad(loss, list(values.values()))
            step += 1
            for (name, value), gradient in zip(values.items(), gradients, strict=True):
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                ratio = (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.999**step)).sqrt() + 1e-8)
                value.data -= 3e-4 * ratio
    found = small.run()
    for name, value in values.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-5, atol=1e-6)


def test_the_running_average_is_validated_and_kept(tmp_path: Path) -> None:
    plain = Small(Recipe(epochs=2, batch_size=10, lr=1e-2), tmp_path / "plain.pt")
    steps: list[dict[str, Tensor]] = []
    plain.loop.run(lambda *_: steps.append({n: v.clone() for n, v in plain.head.state_dict().items()}))
    expected = steps[0]
    for number, values in enumerate(steps[1:], 1):
        decay = min(0.8, number / (number + 1))
        expected = {name: decay * value + (1 - decay) * values[name] for name, value in expected.items()}
    averaged = Small(Recipe(epochs=2, batch_size=10, lr=1e-2, ema=0.8), tmp_path / "averaged.pt")
    found = averaged.run()
    for name, value in expected.items():
        torch.testing.assert_close(found[f"head.{name}"], value)


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("schedule", ["constant", "exponential", "cosine", "one_cycle"])
@pytest.mark.parametrize("steps", [1, 4, 7, 11])
def test_interrupted_and_resumed_is_uninterrupted(schedule: str, steps: int, ema: float, tmp_path: Path) -> None:
    recipe = Recipe(
        epochs=4, batch_size=16, lr=1e-2, block_lr=1e-3, weight_decay=0.1, schedule=schedule, ema=ema, seed=5
    )  # type: ignore[arg-type]
    expected = Small(recipe, tmp_path / "whole.pt", [3.0, 2.0, 1.0, 4.0])
    numbers = expected.run()
    stopped = Small(recipe, tmp_path / "stopped.pt", [3.0, 2.0, 1.0, 4.0])
    stopped.run(steps)
    resumed = Small(recipe, tmp_path / "stopped.pt", [3.0, 2.0, 1.0, 4.0][len(stopped.loop.history) :])
    assert len(resumed.loop.history) == len(stopped.loop.history)
    for name, value in resumed.run().items():
        assert torch.equal(value, numbers[name]), name
    assert resumed.loop.history == expected.loop.history


def test_the_learning_rates_of_the_paper_for_blocks(tmp_path: Path) -> None:
    recipe = Recipe(epochs=3, batch_size=25, lr=1.0, block_lr=0.1, schedule="exponential", optimizer="sgd")
    small = Small(recipe, tmp_path / "state.pt")
    seen: list[list[float]] = []
    optimizer = small.loop._optimizer
    optimizer.register_step_pre_hook(lambda *_: seen.append([group["lr"] for group in optimizer.param_groups]))
    small.run()
    assert np.allclose([rates[0] for rates in seen], [1, 1, 0.95, 0.95, 0.9025, 0.9025])
    assert np.allclose([rates[-1] for rates in seen], np.array([1, 1, 0.95, 0.95, 0.9025, 0.9025]) * 0.1)


def test_the_best_epoch_is_kept_and_patience_ends(tmp_path: Path) -> None:
    recipe = Recipe(epochs=50, batch_size=25, lr=1e-2, patience=3)
    small = Small(recipe, tmp_path / "state.pt", [5.0, 4.0, 4.5, 4.0, 4.2, 9.0])
    best: dict[str, Tensor] = {}

    def tell(done: int, total: int, history: list[Epoch]) -> None:
        if done == 4:
            best.update({n: v.clone() for n, v in small.head.state_dict().items()})

    small.loop.run(tell)  # type: ignore[arg-type]
    assert [epoch.number for epoch in small.loop.history] == [1, 2, 3, 4, 5]
    assert small.loop.best is not None
    assert small.loop.best.number == 2, "the first of equals"
    assert all(torch.equal(value, best[name]) for name, value in small.head.state_dict().items())


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path: Path) -> None:
    small = Small(Recipe(lr=1e30, optimizer="sgd", epochs=9), tmp_path / "state.pt")
    with pytest.raises(LoadError, match="lr: the loss is no longer finite in epoch"):
        small.run()


def test_the_state_of_another_training_is_refused(tmp_path: Path) -> None:
    Small(Recipe(epochs=2), tmp_path / "state.pt").run()
    with pytest.raises(LoadError, match=r"work: .* another batch_size, lr: name another folder"):
        Small(Recipe(epochs=2, lr=1.0, batch_size=2), tmp_path / "state.pt")
    (tmp_path / "state.pt").write_bytes(b"half a file")
    with pytest.raises(LoadError, match="is damaged"):
        Small(Recipe(epochs=2), tmp_path / "state.pt")
