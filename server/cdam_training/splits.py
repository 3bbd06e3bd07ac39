"""Which rows are learnt from, which say when to stop, and which are measured on: by a column, or drawn by a seed.

Sides are drawn with scikit-learn's folds: of q folds that are alike, p are taken, with p / q near the share that is asked
for. Groups stay together (`StratifiedGroupKFold`), and without groups copies of a picture do (`StratifiedKFold` over
pictures). Folds are alike in classes; of several labels in the rarest label of each row; of numbers in size alone.
The draw depends on the seed and on the rows, not on their order.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cdam_server.settings.load_error import few
from cdam_server.settings.specs import Task
from cdam_training.datasets import SPLITS, Dataset, Split
from cdam_training.errors import DatasetError

SHARE: Final = 0.15
"""Of all rows, for validation and again for the test, where nothing is said."""

_MAX_SEED: Final = 2**32 - 1  # scikit-learn's
_FOLDS: Final = 100  # at most: a share is met to a percent
_NEAR: Final = 0.4  # how far a share of stratified folds may be from the one that is asked for, relative to it

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Splits:
    """The rows of each side, by their indices in ascending order; no row is on two sides.

    Attributes:
        train: To learn from; (n,).
        validation: To choose by, such as when to stop; may be empty.
        test: To measure on; may be empty.
        how: How the rows came to their sides, in words.
        seed: Of the draws; None if nothing was drawn.
        shares: Of the sides that were drawn, the share that was asked for.
    """

    train: Indices
    validation: Indices
    test: Indices
    how: str
    seed: int | None = None
    shares: Mapping[Split, float] = field(default_factory=dict)

    def of(self, split: Split) -> Indices:
        """The rows of a side."""
        indices: Indices = getattr(self, split)
        return indices

    def items(self) -> Iterator[tuple[Split, Indices]]:
        """The sides that have rows."""
        return ((split, self.of(split)) for split in SPLITS if len(self.of(split)))


def split_dataset(
    dataset: Dataset, *, seed: int = 0, validation: float | None = None, test: float | None = None
) -> Splits:
    """Divide a dataset's rows.

    Where the dataset says the split, it is taken as it is; a side that it lacks is drawn from its training rows if a share
    is given. Where it says none, both sides are drawn.

    Args:
        dataset: The rows.
        seed: Of the draws, 0 to 2^32 - 1.
        validation: Share of the rows that are divided; 0: no such side. None: 0.15 where the dataset says no split.
        test: Likewise.

    Raises:
        DatasetError: The shares are impossible, a side would be empty, or nothing could be learnt of an output from the
            training rows.
        ImportError: scikit-learn is not installed (extra `train`).
    """
    if not 0 <= seed <= _MAX_SEED:
        raise DatasetError(f"the seed must be 0 to {_MAX_SEED}, not {seed}")
    given = {split: np.array([row.split == split for row in dataset.rows]) for split in SPLITS}
    pool = np.flatnonzero(given["train"]) if dataset.split_by else np.arange(len(dataset))
    sides: dict[Split, Indices] = {split: np.flatnonzero(given[split]) for split in SPLITS}
    if not len(pool):
        raise DatasetError(f"{dataset.name}: by {dataset.split_by} no rows are for training")
    shares = _shares(dataset, sides, {"test": test, "validation": validation})
    if lacking := _not_learnable(dataset, pool):
        raise DatasetError(f"{dataset.name}: {lacking}")
    how = [f"by {dataset.split_by!r}"] if dataset.split_by else []
    taken = 0.0
    for split, share in shares.items():
        if share:
            pool, sides[split], said = _draw(dataset, pool, share / (1 - taken), seed, split)
            how.append(f"{split}: {said}")
            taken += share
    drawn = {split: share for split, share in shares.items() if share}
    said = "; ".join(how) or "all rows are for training"
    return Splits(pool, sides["validation"], sides["test"], said, seed if drawn else None, drawn)


def _shares(
    dataset: Dataset, sides: Mapping[Split, Indices], asked: Mapping[Split, float | None]
) -> dict[Split, float]:
    """What share is to be drawn of each side."""
    shares: dict[Split, float] = {}
    for split, share in asked.items():
        if share is not None and not 0 <= share < 1:
            raise DatasetError(f"the share of {split} must be at least 0 and less than 1, not {share:g}")
        if share is not None and len(sides[split]):
            raise DatasetError(
                f"{dataset.name}: {dataset.split_by!r} says which rows are for {split}; leave its share out, {share:g}"
            )
        default = 0.0 if dataset.split_by else SHARE
        shares[split] = default if share is None else share
    if sum(shares.values()) >= 1:
        raise DatasetError(f"the shares of {' and '.join(shares)} leave nothing to train on: {sum(shares.values()):g}")
    return shares


def _draw(dataset: Dataset, pool: Indices, share: float, seed: int, split: Split) -> tuple[Indices, Indices, str]:
    """What stays of a pool of rows, what is drawn from it, and how, in words."""
    clusters = np.unique(dataset.clusters(pool), return_inverse=True)[1]
    units = int(clusters.max()) + 1
    if units < 2:
        one = "row" if dataset.group_by is None else f"group by {dataset.group_by!r}"
        raise DatasetError(f"{dataset.name}: nothing can be drawn for {split}: there is one {one} to train on")
    grouped = dataset.group_by is not None
    strata = _strata(dataset, pool)
    first = np.unique(clusters, return_index=True)[1]
    most = int(np.bincount(strata if grouped else strata[first]).max())
    part = _part(share, min(units, most))
    if len(np.unique(strata)) > 1 and part.denominator <= most and abs(part - share) <= _NEAR * share:
        how = "stratified"
    else:
        strata, part, how = np.zeros_like(strata), _part(share, units), "not stratified"
    if grouped:
        fold_of = _folds(strata, clusters, part.denominator, seed)
    else:  # rows of a cluster are copies, and one of them stands for all
        fold_of = _folds(strata[first], None, part.denominator, seed)[clusters]
    lacking = ""
    # A rare class lies in folds that are next to each other, and in the same ones for every seed: those that are taken lie
    # apart, and the seed says with which they begin.
    apart = np.arange(part.numerator) * part.denominator // part.numerator
    begin = int(np.random.default_rng(seed).integers(part.denominator))
    for start in range(begin, begin + part.denominator):
        taken = np.isin(fold_of, (start + apart) % part.denominator)
        if taken.any() and not (lacking := _not_learnable(dataset, pool[~taken])):
            by = f", groups by {dataset.group_by!r} kept together" if grouped else ""
            return pool[~taken], pool[taken], f"{taken.sum()} of {len(pool)} rows drawn with seed {seed}, {how}{by}"
    raise DatasetError(
        f"{dataset.name}: no {share:.3g} of the rows can be drawn for {split} that leaves enough to learn from: {lacking}"
    )


def _part(share: float, most: int) -> Fraction:
    """The fraction nearest to a share, less than 1 and not 0, with a denominator of at most so many."""
    most = max(2, min(most, _FOLDS))
    part = Fraction(share).limit_denominator(most)
    return min(max(part, Fraction(1, most)), Fraction(most - 1, most))


def _folds(strata: Indices, groups: Indices | None, folds: int, seed: int) -> Indices:
    """The fold of each row, from 0; rows of a group have the same."""
    try:
        from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
    except ImportError as error:
        raise ImportError("splits are drawn by scikit-learn: install cdam-serve with its extra `train`") from error
    kind: Any = StratifiedKFold if groups is None else StratifiedGroupKFold
    splitter = kind(folds, shuffle=True, random_state=seed)
    fold_of = np.empty(len(strata), np.int64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        for fold, (_, taken) in enumerate(splitter.split(strata, strata, groups)):
            fold_of[taken] = fold
    return fold_of


def _strata(dataset: Dataset, rows: Indices) -> Indices:
    """What folds are to be alike in: (n,) from 0."""
    targets = dataset.targets(rows)
    match dataset.task:
        case Task.MULTI_CLASS:
            kinds = targets
        case Task.BINARY | Task.MULTI_LABEL:
            # The rarest label of a row, for which a bad draw would matter most; rows without labels are one kind.
            rarest_first = np.argsort(targets.sum(0), kind="stable")
            ordered = targets[:, rarest_first] > 0
            kinds = np.where(ordered.any(1), ordered.argmax(1), targets.shape[1])
        case Task.REGRESSION:
            kinds = np.zeros(len(rows), np.int64)
    return np.unique(kinds, return_inverse=True)[1].astype(np.int64)


def _not_learnable(dataset: Dataset, rows: Indices) -> str:
    """What can't be learnt from these rows, in words; empty if all can."""
    targets = dataset.targets(rows)
    if not len(rows):
        return "no rows are left for training"
    match dataset.task:
        case Task.MULTI_CLASS:
            lacking, what = np.bincount(targets, minlength=len(dataset.outputs)) == 0, "no example"
        case Task.BINARY | Task.MULTI_LABEL:
            lacking, what = np.ptp(targets, axis=0) == 0, "only positive or only negative examples"
        case Task.REGRESSION:
            lacking, what = np.ptp(targets, axis=0) == 0, "only one value"
    names = [repr(dataset.outputs[index]) for index in np.flatnonzero(lacking)]
    return f"of {few(names)} there would be {what} to train on" if names else ""
