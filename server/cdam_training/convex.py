"""A linear head on kept latents, fitted to the minimum of its convex loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Final

import torch
from torch import Tensor

from cdam_training.state import State

Loss = Callable[[Tensor, Tensor], Tensor]
"""From outputs (n, C) and targets to the mean over rows of the sum over outputs."""

PENALTIES: Final = tuple(10.0 ** (power / 2) for power in range(2, -11, -1))
"""From 10 down to 1e-5: strong ones first, from where the weaker ones are reached fast."""

_ROWS: Final = 1 << 16  # at once, so that memory stays bounded
_ITERATIONS: Final = 500


@dataclass(frozen=True)
class Fit:
    """What was found with a penalty.

    Attributes:
        l2: The penalty.
        loss: Mean over the training rows, without the penalty.
        validation_loss: Mean over the validation rows; None without any.
    """

    l2: float
    loss: float
    validation_loss: float | None


@dataclass(frozen=True, eq=False)
class Linear:
    """weight (C, D) and bias (C), float64."""

    weight: Tensor
    bias: Tensor

    def __call__(self, latents: Tensor) -> Tensor:
        """Outputs (n, C) of latents (n, D)."""
        return latents.double() @ self.weight.T + self.bias


def fit(
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor] | None,
    outputs: int,
    loss: Loss,
    penalties: Sequence[float],
    state: State,
    tell: Callable[[Sequence[Fit], int], None],
) -> tuple[Linear, list[Fit]]:
    """Minimise the mean loss plus `l2` / 2 times the squared weights, of standardised latents, for each penalty.

    The one with the least validation loss is taken; without validation rows there must be one penalty alone. Each is
    found by L-BFGS from the solution before, in float64, so that a fit that was interrupted goes on to the same numbers.

    Args:
        train: Latents (n, D) and targets.
        validation: Likewise.
        outputs: C.
        loss: See `Loss`.
        penalties: Values of `l2`, in the order in which they are tried.
        state: Where what is needed to go on is kept.
        tell: Called after each penalty, with how many there are.

    Returns:
        The head for latents as they are, and what was found with each penalty.

    Raises:
        LoadError: `state` is of another fit.
    """
    latents, targets = train[0].double(), train[1]
    mean, deviation = latents.mean(0), latents.std(0, correction=0)
    deviation[deviation < 1e-6 * deviation.max().clamp(min=1e-30)] = 1.0  # constant: its weight stays 0
    latents = (latents - mean) / deviation
    weight, bias = latents.new_zeros((outputs, latents.shape[1])), latents.new_zeros(outputs)
    fits: list[Fit] = []
    best: Linear | None = None
    if (kept := state.load()) is not None:
        fits = [Fit(**each) for each in kept["fits"]]
        weight, bias = (part.to(latents.device) for part in kept["last"])
        best = Linear(*(part.to(latents.device) for part in kept["best"]))
    for l2 in penalties[len(fits) :]:
        weight, bias = _minimise(latents, targets, weight, bias, loss, l2)
        plain = weight / deviation
        head = Linear(plain, bias - plain @ mean)
        found = Fit(l2, _mean(head, *train, loss), None if validation is None else _mean(head, *validation, loss))
        if best is None or (found.validation_loss is not None and found.validation_loss < _least(fits)):
            best = head
        fits.append(found)
        state.save({"fits": [asdict(each) for each in fits], "last": (weight, bias), "best": (best.weight, best.bias)})
        tell(fits, len(penalties))
    assert best is not None
    return best, fits


def _least(fits: Sequence[Fit]) -> float:
    return min(fit.validation_loss for fit in fits if fit.validation_loss is not None)


def _mean(head: Linear, latents: Tensor, targets: Tensor, loss: Loss) -> float:
    parts = zip(torch.split(latents, _ROWS), torch.split(targets, _ROWS), strict=True)
    return float(sum(loss(head(some), its) * len(some) for some, its in parts) / len(latents))


def _minimise(
    latents: Tensor, targets: Tensor, weight: Tensor, bias: Tensor, loss: Loss, l2: float
) -> tuple[Tensor, Tensor]:
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_ITERATIONS,
        tolerance_grad=1e-8,
        tolerance_change=1e-13,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        penalty = l2 / 2 * weight.square().sum()
        penalty.backward()  # type: ignore[no-untyped-call]
        total = float(penalty.detach())
        for some, its in zip(torch.split(latents, _ROWS), torch.split(targets, _ROWS), strict=True):
            part = loss(some @ weight.T + bias, its) * (len(some) / len(latents))
            part.backward()  # type: ignore[no-untyped-call]
            total += float(part.detach())
        return total

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
