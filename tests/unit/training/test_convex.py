"""Heads fitted to their minimum, against scikit-learn's solvers on the same latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge

from cdam_server.settings.load_error import LoadError
from cdam_server.settings.specs import Task
from cdam_training.convex import Fit, Linear, fit
from cdam_training.losses import LOSSES, scaling_of
from cdam_training.state import State

ROWS, WIDTH = 400, 24


def latents(seed: int = 0) -> NDArray[np.float64]:
    """Of different scale and far from zero, one of them constant."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(ROWS, WIDTH)) @ rng.normal(size=(WIDTH, WIDTH))
    mixed[:, 5] = 3.0
    return mixed * np.geomspace(0.01, 30, WIDTH) + rng.normal(size=WIDTH) * 5


def standardised(values: NDArray[np.float64]) -> NDArray[np.float64]:
    deviation = values.std(0)
    deviation[5] = 1.0
    return (values - values.mean(0)) / deviation


def fitted(
    targets: NDArray[np.generic],
    task: Task,
    outputs: int,
    l2: tuple[float, ...],
    folder: Path,
    validation: int = 0,
) -> tuple[Linear, list[Fit]]:
    x, y = torch.from_numpy(latents()), torch.from_numpy(targets)
    held = (x[:validation], y[:validation]) if validation else None
    train = x[validation:], y[validation:]
    state = State(folder / "fit.pt", {"l2": l2})
    return fit(train, held, outputs, LOSSES[task], l2, state, lambda *_: None)


def test_classes_as_scikit_learn(tmp_path: Path) -> None:
    classes = standardised(latents())[:, :4].argmax(1)
    head, _ = fitted(classes, Task.MULTI_CLASS, 4, (0.01,), tmp_path)
    theirs = LogisticRegression(C=1 / (0.01 * ROWS), tol=1e-10, max_iter=5000).fit(standardised(latents()), classes)
    ours = head(torch.from_numpy(latents())).softmax(1).numpy()
    np.testing.assert_allclose(ours, theirs.predict_proba(standardised(latents())), atol=1e-5)


@pytest.mark.parametrize("task", [Task.BINARY, Task.MULTI_LABEL])
def test_labels_as_scikit_learn(task: Task, tmp_path: Path) -> None:
    count = 1 if task is Task.BINARY else 3
    labels = (standardised(latents())[:, :count] > [0.3, -0.5, 1.2][:count]).astype(np.float32)
    head, _ = fitted(labels, task, count, (0.02,), tmp_path)
    ours = head(torch.from_numpy(latents())).numpy()
    for output in range(count):
        model = LogisticRegression(C=1 / (0.02 * ROWS), tol=1e-10, max_iter=5000)
        theirs = model.fit(standardised(latents()), labels[:, output]).decision_function(standardised(latents()))
        np.testing.assert_allclose(ours[:, output], theirs, atol=1e-4)


def test_numbers_as_scikit_learn_and_in_their_own_unit(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    numbers = (standardised(latents()) @ rng.normal(size=(WIDTH, 2)) + rng.normal(size=(ROWS, 2))) * [40, 0.01] + [
        900,
        -3,
    ]
    wide = torch.from_numpy(numbers)
    scaling = scaling_of(Task.REGRESSION, wide)
    assert scaling is not None
    x = torch.from_numpy(latents())
    scaled = scaling.apply(wide).double()
    state = State(tmp_path / "fit.pt", {})
    head, _ = fit((x, scaled), None, 2, LOSSES[Task.REGRESSION], (0.1,), state, lambda *_: None)
    weight, bias = scaling.fold(head.weight, head.bias)
    scale = numbers.std(0)
    # The mean over rows of |y - t|^2 and l2 / 2 |w|^2 is, in Ridge's terms, alpha = l2 n / 2.
    theirs = Ridge(alpha=0.1 * ROWS / 2).fit(standardised(latents()), (numbers - numbers.mean(0)) / scale)
    expected = theirs.predict(standardised(latents())) * scale + numbers.mean(0)
    np.testing.assert_allclose((x @ weight.T + bias).numpy(), expected, rtol=1e-5, atol=1e-5 * scale.max())


def test_the_penalty_that_does_best_on_validation_is_taken(tmp_path: Path) -> None:
    noisy = standardised(latents())[:, :3] + np.random.default_rng(3).normal(size=(ROWS, 3))
    classes = noisy.argmax(1)
    penalties = (10.0, 1.0, 0.1, 0.01, 1e-4)
    head, fits = fitted(classes, Task.MULTI_CLASS, 3, penalties, tmp_path, validation=100)
    losses = {each.l2: each.validation_loss for each in fits}
    best = min(losses, key=lambda l2: losses[l2] or 0)
    assert best not in {10.0, 1e-4}, "otherwise this test tells nothing"
    x, y = torch.from_numpy(latents()), torch.from_numpy(classes)
    found = torch.nn.functional.cross_entropy(head(x[:100]), y[:100])
    assert float(found) == pytest.approx(losses[best], rel=1e-12)
    for each in fits:
        model = LogisticRegression(C=1 / (each.l2 * 300), tol=1e-10, max_iter=5000)
        mean, deviation = latents()[100:].mean(0), latents()[100:].std(0)
        deviation[5] = 1.0
        theirs = model.fit((latents()[100:] - mean) / deviation, classes[100:])
        log = theirs.predict_log_proba((latents()[:100] - mean) / deviation)
        assert each.validation_loss == pytest.approx(-log[np.arange(100), classes[:100]].mean(), rel=1e-3)


def test_an_interrupted_fit_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    classes = standardised(latents())[:, :3].argmax(1)
    x, y = torch.from_numpy(latents()), torch.from_numpy(classes)
    penalties = (1.0, 0.1, 0.01)
    (whole, stopped), loss = (tmp_path / "whole.pt", tmp_path / "stopped.pt"), LOSSES[Task.MULTI_CLASS]
    held = x[:50], y[:50]
    expected, _ = fit((x, y), held, 3, loss, penalties, State(whole, {}), lambda *_: None)

    def stop(fits: object, total: int) -> None:
        raise KeyboardInterrupt

    for _ in penalties:
        with pytest.raises(KeyboardInterrupt):
            fit((x, y), held, 3, loss, penalties, State(stopped, {}), stop)
    found, fits = fit((x, y), held, 3, loss, penalties, State(stopped, {}), stop)  # nothing is left to be told
    assert torch.equal(found.weight, expected.weight)
    assert torch.equal(found.bias, expected.bias)
    assert len(fits) == 3
    with pytest.raises(LoadError, match="another data"):
        State(stopped, {"data": "other"}).load()
