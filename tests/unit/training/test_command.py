"""What `cdam train` tells of what it found."""

from __future__ import annotations

import pytest

from cdam_training.command import notes
from cdam_training.convex import Fit
from cdam_training.loop import Epoch


def epochs(*losses: float | None) -> list[Epoch]:
    return [Epoch(number, 1.0, loss) for number, loss in enumerate(losses, start=1)]


def fits(*losses: float | None) -> list[Fit]:
    return [Fit(l2, 1.0, loss) for l2, loss in zip((10.0, 0.1, 0.001), losses, strict=True)]


@pytest.mark.parametrize(
    ("history", "told"),
    [
        (epochs(3, 2, 1), "epoch 3, the last, does best on the validation images: more --epochs may do better"),
        (epochs(3, 1, 1), None),
        (epochs(3, 1, 2), None),
        (epochs(1), None),
        (epochs(None, None), None),
        (
            fits(3, 2, 1),
            "--l2 0.001, the smallest tried, does best on the validation images: smaller ones may do better",
        ),
        (fits(1, 2, 3), "--l2 10, the largest tried, does best on the validation images: larger ones may do better"),
        (fits(2, 1, 3), None),
        (fits(None, None, None), None),
    ],
)
def test_the_best_at_the_end_of_what_was_tried_is_told(history: list[Epoch] | list[Fit], told: str | None) -> None:
    assert notes(history) == (() if told is None else (told,))
