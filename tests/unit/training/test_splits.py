"""Every row on one side, no group on two, the same for the same seed, and something to learn of every output."""

from __future__ import annotations

import hashlib
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("sklearn", reason="splits are drawn with the extra `train`")

from cdam_server.settings.specs import Task
from cdam_training.datasets import SPLITS, Dataset, Row, Split, read_dataset
from cdam_training.errors import DatasetError
from cdam_training.splits import Splits, split_dataset
from cdam_training.values import Value
from small_datasets import write_csv


def dataset(
    task: Task,
    values: Sequence[Value],
    *,
    groups: Sequence[object] | None = None,
    sides: Sequence[Split] | None = None,
    contents: Sequence[object] | None = None,
) -> Dataset:
    """Rows without files, in the order of their content."""
    rows = [
        Row(
            Path(f"{index}.png"),
            f"line {index}",
            hashlib.sha256(str(index if contents is None else contents[index]).encode()).hexdigest(),
            value,
            None if groups is None else str(groups[index]),
            None if sides is None else sides[index],
        )
        for index, value in enumerate(values)
    ]
    first = values[0]
    count = 1 + max(value for value in values if isinstance(value, int)) if isinstance(first, int) else len(first)
    return Dataset(
        "data.csv",
        "csv",
        task,
        tuple(f"o{index}" for index in range(count)),
        tuple(sorted(rows, key=lambda row: row.content)),
        "",
        None if groups is None else "scan",
        None if sides is None else "side",
    )


def partition(splits: Splits, rows: int) -> None:
    """Check that every row is on one side, in ascending order."""
    sides = [splits.of(split) for split in SPLITS]
    assert sorted(np.concatenate(sides).tolist()) == list(range(rows))
    assert all((np.diff(side) > 0).all() for side in sides)
    assert all(side.dtype == np.int64 for side in sides)


def shares(splits: Splits) -> tuple[float, float]:
    rows = sum(len(splits.of(split)) for split in SPLITS)
    return len(splits.validation) / rows, len(splits.test) / rows


MULTI_CLASS = dataset(Task.MULTI_CLASS, [index % 4 for index in range(400)])


def test_the_shares_by_default() -> None:
    splits = split_dataset(MULTI_CLASS)
    partition(splits, 400)
    assert shares(splits) == (0.15, 0.15)
    assert (splits.seed, splits.shares) == (0, {"test": 0.15, "validation": 0.15})
    assert splits.how == (
        "test: 60 of 400 rows drawn with seed 0, stratified; validation: 60 of 340 rows drawn with seed 0, stratified"
    )


@pytest.mark.parametrize(
    ("validation", "test"), [(0.2, 0.1), (0.0, 0.3), (0.01, 0.0), (0.0, 0.0), (0.3, 0.6), (0.13, 0.29), (1 / 3, 1 / 3)]
)
@pytest.mark.parametrize("task", list(Task))
def test_shares_are_met(task: Task, validation: float, test: float) -> None:
    found = dataset(task, [values(task, index) for index in range(900)])
    splits = split_dataset(found, validation=validation, test=test)
    partition(splits, 900)
    assert shares(splits) == pytest.approx((validation, test), abs=0.01)
    assert (splits.seed is None) == (validation == test == 0)


def values(task: Task, index: int) -> Value:
    match task:
        case Task.MULTI_CLASS:
            return index % 3
        case Task.MULTI_LABEL:
            return (float(index % 2), float(index % 50 == 0), float(index % 7 < 3))
        case Task.BINARY:
            return (float(index % 9 == 0),)
        case Task.REGRESSION:
            return (index / 10, -(float(index) ** 2))


def test_classes_are_stratified() -> None:
    found = dataset(Task.MULTI_CLASS, [int(index % 20 == 0) for index in range(2000)])
    for split, indices in split_dataset(found, seed=5).items():
        assert found.targets(indices).mean() == pytest.approx(0.05, abs=0.005), split


def test_the_rarest_label_is_stratified() -> None:
    found = dataset(Task.MULTI_LABEL, [(float(index % 2), float(index % 50 == 0)) for index in range(1000)])
    counts = [int(found.targets(indices)[:, 1].sum()) for _, indices in split_dataset(found, seed=1).items()]
    assert counts == [14, 3, 3]


def test_a_class_of_two_keeps_an_example_to_learn_from() -> None:
    found = dataset(Task.MULTI_CLASS, [0] * 100 + [1] * 2 + [2] * 3)
    for seed in range(30):
        splits = split_dataset(found, seed=seed)
        partition(splits, 105)
        assert set(found.targets(splits.train).tolist()) == {0, 1, 2}


def test_a_rare_class_is_on_every_side_for_some_seed() -> None:
    found = dataset(Task.MULTI_CLASS, [0] * 90 + [1] * 3 + [2] * 3 + [3] * 3)
    seen: dict[Split, set[int]] = {split: set() for split in SPLITS}
    for seed in range(60):
        for split, indices in split_dataset(found, seed=seed).items():
            seen[split] |= set(found.targets(indices).tolist())
    assert seen == {split: {0, 1, 2, 3} for split in SPLITS}


def test_every_row_is_drawn_as_often() -> None:
    """Binomial counts over seeds: no place in the file, and no class, is favoured."""
    found = dataset(Task.MULTI_CLASS, [index % 7 % 3 for index in range(100)])
    drawn = np.zeros(100)
    for seed in range(300):
        drawn[split_dataset(found, seed=seed, validation=0, test=0.2).test] += 1
    assert drawn.sum() == 300 * 20
    assert drawn.std() < 1.3 * (300 * 0.2 * 0.8) ** 0.5
    assert abs(drawn - 60).max() < 4.5 * (300 * 0.2 * 0.8) ** 0.5


def test_many_small_classes() -> None:
    """Fewer rows of a class than folds: the shares are near, and no class goes without."""
    found = dataset(Task.MULTI_CLASS, [index // 4 for index in range(800)])
    splits = split_dataset(found)
    partition(splits, 800)
    assert shares(splits) == pytest.approx((0.15, 0.15), abs=0.02)
    assert len(set(found.targets(splits.train).tolist())) == 200
    assert "not stratified" in splits.how


def test_seeds_differ_and_repeat() -> None:
    first, again, other = (split_dataset(MULTI_CLASS, seed=seed) for seed in (3, 3, 4))
    assert all(np.array_equal(first.of(split), again.of(split)) for split in SPLITS)
    assert not np.array_equal(first.test, other.test)
    assert not np.array_equal(first.validation, other.validation)


@settings(max_examples=40, deadline=None)
@given(
    task=st.sampled_from(Task),
    groups=st.lists(st.integers(1, 9), min_size=12, max_size=40),
    seed=st.integers(0, 2**32 - 1),
    wanted=st.tuples(st.sampled_from([0.0, 0.1, 0.15, 0.3]), st.sampled_from([0.0, 0.1, 0.15, 0.3])),
    data=st.randoms(use_true_random=False),
)
def test_no_group_is_on_two_sides(
    task: Task, groups: list[int], seed: int, wanted: tuple[float, float], data: random.Random
) -> None:
    names = [f"g{index}" for index, size in enumerate(groups) for _ in range(size)]
    data.shuffle(names)
    found = dataset(task, [values(task, index) for index in range(len(names))], groups=names)
    try:
        splits = split_dataset(found, seed=seed, validation=wanted[0], test=wanted[1])
    except DatasetError as error:
        assume("to train on" not in str(error))  # a rare label may lie in one group alone
        raise
    partition(splits, len(names))
    sides = [{found.rows[index].group for index in splits.of(split)} for split in SPLITS]
    assert sum(map(len, sides)) == len(set(names))
    assert [bool(side) for side in sides[1:]] == [share > 0 for share in wanted]
    again = split_dataset(found, seed=seed, validation=wanted[0], test=wanted[1])
    assert all(np.array_equal(splits.of(split), again.of(split)) for split in SPLITS)


@settings(max_examples=60, deadline=None)
@given(
    copies=st.lists(st.integers(1, 4), min_size=20, max_size=60),
    task=st.sampled_from(Task),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_copy_is_on_two_sides(copies: list[int], task: Task, seed: int) -> None:
    contents = [index for index, count in enumerate(copies) for _ in range(count)]
    found = dataset(task, [values(task, index) for index in contents], contents=contents)
    try:
        splits = split_dataset(found, seed=seed)
    except DatasetError as error:
        assume("to train on" not in str(error))
        raise
    partition(splits, len(contents))
    sides = [{found.rows[index].content for index in splits.of(split)} for split in SPLITS]
    assert sum(map(len, sides)) == len(copies)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_order_of_the_file_is_nothing(tmp_path: Path, grouped: bool) -> None:
    rows: list[dict[str, Any]] = [
        {"label": "abc"[index % 3], "scan": f"s{index // 4}", "image": f"images/{index}.png"} for index in range(60)
    ]

    def sides(name: str) -> dict[str, Split]:
        options: dict[str, Any] = {"group_by": "scan"} if grouped else {}
        found = read_dataset(tmp_path / name, task=Task.MULTI_CLASS, targets=["label"], **options)
        splits = split_dataset(found, seed=7)
        return {found.rows[index].image.name: split for split, indices in splits.items() for index in indices}

    write_csv(tmp_path / "images.csv", [{}] * 60)
    write_csv(tmp_path / "a.csv", rows)
    random.Random(1).shuffle(rows)
    write_csv(tmp_path / "b.csv", rows)
    assert sides("a.csv") == sides("b.csv")


# --- By a column


SIDES: list[Split] = [("train", "train", "train", "validation", "test")[index % 5] for index in range(100)]  # type: ignore[list-item]


def test_a_column_is_taken_as_it_is() -> None:
    found = dataset(Task.MULTI_CLASS, [index % 3 for index in range(100)], sides=SIDES)
    splits = split_dataset(found, seed=9)
    partition(splits, 100)
    assert all(found.rows[index].split == split for split, indices in splits.items() for index in indices)
    assert (splits.how, splits.seed, splits.shares) == ("by 'side'", None, {})


def test_a_side_that_the_column_lacks_is_drawn_where_it_is_asked_for() -> None:
    sides: list[Split] = ["train" if side == "validation" else side for side in SIDES]
    found = dataset(Task.MULTI_CLASS, [index % 2 for index in range(100)], sides=sides)
    assert len(split_dataset(found).validation) == 0
    splits = split_dataset(found, validation=0.25)
    partition(splits, 100)
    assert len(splits.validation) == 20
    assert {found.rows[index].split for index in splits.test} == {"test"}
    assert splits.how == "by 'side'; validation: 20 of 80 rows drawn with seed 0, stratified"


def test_groups_of_the_training_rows_alone_are_drawn_from() -> None:
    groups = [index // 4 for index in range(100)]
    sides: list[Split] = ["test" if group % 5 == 0 else "train" for group in groups]
    found = dataset(Task.REGRESSION, [(float(index),) for index in range(100)], sides=sides, groups=groups)
    splits = split_dataset(found, validation=0.25, seed=2)
    partition(splits, 100)
    assert (len(splits.validation), len(splits.test)) == (20, 20)
    by_side = [{found.rows[index].group for index in splits.of(split)} for split in SPLITS]
    assert sum(map(len, by_side)) == 25


@pytest.mark.parametrize("share", [0.2, 0.0])
def test_a_share_of_what_the_column_says_is_refused(share: float) -> None:
    found = dataset(Task.MULTI_CLASS, [index % 3 for index in range(100)], sides=SIDES)
    with pytest.raises(
        DatasetError, match=rf"data.csv: 'side' says which rows are for test; leave its share out, {share:g}"
    ):
        split_dataset(found, test=share)


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [
        (Task.MULTI_CLASS, [0, 0, 1, 1], "of 'o1' there would be no example to train on"),
        (
            Task.BINARY,
            [(0.0,), (0.0,), (1.0,), (1.0,)],
            "of 'o0' there would be only positive or only negative examples to train on",
        ),
        (
            Task.MULTI_LABEL,
            [(0.0, 1.0), (1.0, 1.0), (1.0, 0.0), (1.0, 0.0)],
            "of 'o1' there would be only positive or only negative examples to train on",
        ),
        (
            Task.REGRESSION,
            [(1.0, 2.0), (1.0, 3.0), (5.0, 2.0), (4.0, 2.0)],
            "of 'o0' there would be only one value to train on",
        ),
    ],
)
def test_a_column_that_leaves_nothing_to_learn_is_refused(task: Task, values: Sequence[Value], message: str) -> None:
    found = dataset(task, values, sides=["train", "train", "test", "test"])
    with pytest.raises(DatasetError) as error:
        split_dataset(found)
    assert str(error.value) == f"data.csv: {message}"


def test_a_column_without_training_rows_is_refused() -> None:
    found = dataset(Task.MULTI_CLASS, [0, 1, 0, 1], sides=["test"] * 4)
    with pytest.raises(DatasetError, match=r"data.csv: by side no rows are for training"):
        split_dataset(found)


# --- Refused


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["validation", "test"])
def test_impossible_shares(side: str, share: float) -> None:
    with pytest.raises(DatasetError, match=rf"the share of {side} must be at least 0 and less than 1, not"):
        split_dataset(MULTI_CLASS, **{side: share})  # type: ignore[arg-type]


def test_shares_that_leave_nothing() -> None:
    with pytest.raises(DatasetError, match=r"the shares of test and validation leave nothing to train on: 1.1"):
        split_dataset(MULTI_CLASS, validation=0.5, test=0.6)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_impossible_seeds(seed: int) -> None:
    with pytest.raises(DatasetError, match=rf"the seed must be 0 to 4294967295, not {seed}"):
        split_dataset(MULTI_CLASS, seed=seed)


def test_one_group_can_not_be_divided() -> None:
    found = dataset(Task.MULTI_CLASS, [0, 1] * 10, groups=["a"] * 20)
    message = r"data.csv: nothing can be drawn for test: there is one group by 'scan' to train on"
    with pytest.raises(DatasetError, match=message):
        split_dataset(found)


def test_a_class_in_one_group_can_not_be_held_out() -> None:
    """Its group stays in training; and where every group has a class of its own, nothing can be drawn."""
    groups = [index // 5 for index in range(40)]
    found = dataset(Task.MULTI_CLASS, [int(group == 3) for group in groups], groups=groups)
    for seed in range(10):
        assert 1 in found.targets(split_dataset(found, seed=seed).train)
    found = dataset(Task.MULTI_CLASS, groups, groups=groups)
    with pytest.raises(
        DatasetError, match=r"data.csv: no 0.15 of the rows can be drawn for test that leaves enough to learn"
    ):
        split_dataset(found)


def test_two_groups_are_divided() -> None:
    found = dataset(Task.MULTI_CLASS, [0, 1] * 10, groups=[index // 10 for index in range(20)])
    splits = split_dataset(found, validation=0)
    partition(splits, 20)
    assert (len(splits.train), len(splits.test)) == (10, 10)


def test_scikit_learn_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    with pytest.raises(
        ImportError, match=r"splits are drawn by scikit-learn: install cdam-serve with its extra `train`"
    ):
        split_dataset(MULTI_CLASS)
    found = replace(MULTI_CLASS, split_by="side", rows=tuple(replace(row, split="train") for row in MULTI_CLASS.rows))
    assert Counter(split for split, _ in split_dataset(found).items()) == {"train": 1}
