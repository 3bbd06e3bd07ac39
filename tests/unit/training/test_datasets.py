"""From folders, CSV files and manifests to rows: the right values, leaks found, one digest wherever the files lie."""

from __future__ import annotations

import csv
import hashlib
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cdam_server.settings.specs import Task
from cdam_training.datasets import Dataset, read_dataset
from cdam_training.errors import DatasetError
from small_datasets import pixel, write_csv, write_manifest


def folder(root: Path, classes: Mapping[str, int]) -> Path:
    number = 0
    for name, count in classes.items():
        for place in range(count):
            pixel(root / name / f"{place}.png", number)
            number += 1
    return root


def by_file(dataset: Dataset) -> dict[str, Any]:
    return {f"{row.image.parent.name}/{row.image.name}": row.value for row in dataset.rows}


def values(path: Path, **options: Any) -> list[Any]:
    """The values in the file's order."""
    dataset = read_dataset(path, **options)
    return [row.value for row in sorted(dataset.rows, key=lambda row: int(row.where.removeprefix("line ")))]


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(DatasetError) as error:
        read_dataset(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{path.parent}/", "")


# --- Folders


def test_a_folder_of_classes(tmp_path: Path) -> None:
    root = folder(tmp_path / "pets", {"dog": 2, "cat": 3, "b/ird": 0})
    pixel(root / "b" / "deep" / "er" / "x.PNG", 90)
    pixel(root / "b" / "y.png", 91)
    dataset = read_dataset(root)
    assert (dataset.name, dataset.kind, dataset.task) == ("pets", "folder", Task.MULTI_CLASS)
    assert dataset.outputs == ("b", "cat", "dog")
    assert by_file(dataset) == {
        "er/x.PNG": 0, "b/y.png": 0, "cat/0.png": 1, "cat/1.png": 1, "cat/2.png": 1, "dog/0.png": 2, "dog/1.png": 2,
    }  # fmt: skip
    assert dataset.targets().dtype == np.int64
    assert dataset.targets().tolist() == [row.value for row in dataset.rows]
    assert dataset.split_by is None
    assert dataset.notes == ()


def test_what_is_hidden_is_passed_over_and_what_is_no_image_is_told(tmp_path: Path) -> None:
    root = folder(tmp_path / "pets", {"dog": 2, "cat": 2, ".git": 2, "__MACOSX": 2})
    (root / "dog" / "._0.png").write_bytes(b"resource fork")
    (root / "dog" / "notes.txt").write_text("good dogs")
    pixel(root / "loose.png", 50)
    dataset = read_dataset(root)
    assert dataset.outputs == ("cat", "dog")
    assert len(dataset) == 4
    assert dataset.notes == ("files passed over: dog/notes.txt, loose.png",)


def test_files_with_odd_names_are_told_in_one_line(tmp_path: Path) -> None:
    root = folder(tmp_path / "pets", {"dog": 2, "cat": 2})
    (root / "dog" / "a\nb\x1b.txt").write_text("")
    assert read_dataset(root).notes == (r"files passed over: 'dog/a\nb\x1b.txt'",)
    (root / "dog" / "a\nb.png").write_bytes(b"no picture")
    assert refused(root) == r"pets, 'dog/a\nb.png': 'a\nb.png' is no JPEG, PNG or WebP image"
    path = write_csv(tmp_path / "a.csv", [{"mm": n, "odd\nname": 1} for n in range(3)])
    assert read_dataset(path, task=Task.REGRESSION, targets=["mm"]).notes == (r"columns not used: 'odd\nname'",)


def test_a_folder_of_splits(tmp_path: Path) -> None:
    sides = {f"{side}/{label}": 2 for side in ("train", "val", "test") for label in ("cat", "dog")}
    dataset = read_dataset(folder(tmp_path / "pets", sides))
    assert dataset.outputs == ("cat", "dog")
    assert dataset.split_by == "folders"
    found = [row.split for row in dataset.rows]
    assert {side: found.count(side) for side in found} == {"train": 4, "validation": 4, "test": 4}
    assert all(row.image.parent.parent.name[:3] == str(row.split)[:3] for row in dataset.rows)


def test_classes_called_train_and_test_are_classes(tmp_path: Path) -> None:
    dataset = read_dataset(folder(tmp_path / "vehicles", {"train": 2, "test": 2}))
    assert (dataset.outputs, dataset.split_by) == (("test", "train"), None)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({}, "pets: has no sub-folders; there must be one for each class"),
        ({"cat": 3}, "pets: there is one class alone, 'cat'; nothing can be learnt from it"),
        ({"cat": 3, "dog": 0}, "pets/dog: has no JPEG, PNG or WebP file below it, and is no class therefore"),
        (
            {"cat": 3, "dog": 1, "eel": 2, "fox": 1},
            "pets: of 2 classes there is one example alone, none to measure on: 'dog', 'fox'; add some, or leave it out",
        ),
        (
            {"train/cat": 2, "train/dog": 2, "cat": 2},
            "pets: has folders for splits, 'train', and others, 'cat'; take them apart",
        ),
        ({"val/cat": 2, "validation/cat": 2}, "pets: has a folder val and a folder validation; keep one"),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, classes: Mapping[str, int], message: str) -> None:
    root = folder(tmp_path / "pets", classes)
    root.mkdir(exist_ok=True)
    for name in classes:
        (root / name).mkdir(exist_ok=True)
    assert refused(root) == message


def test_a_folder_has_neither_columns_nor_another_task(tmp_path: Path) -> None:
    root = folder(tmp_path / "pets", {"dog": 2, "cat": 2})
    assert refused(root, task=Task.BINARY).startswith("pets: a folder of classes is the task multi_class; binary needs")
    for option in ({"targets": ["x"]}, {"group_by": "x"}, {"split_by": "x"}, {"mask": "x"}):
        assert refused(root, **option).startswith("pets: a folder of classes has no columns")


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    assert refused(tmp_path / "pets") == "pets: there is no such file or folder"


# --- Tables: values


def test_classes_are_sorted_names(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "a.csv", [{"label": name} for name in ("dog", "Äffchen", "cat", "dog", "cat", "Äffchen")]
    )
    dataset = read_dataset(path, task=Task.MULTI_CLASS)
    assert dataset.outputs == ("cat", "dog", "Äffchen")
    assert values(path, task=Task.MULTI_CLASS) == [1, 2, 0, 1, 0, 2]


@pytest.mark.parametrize("write", [write_csv, write_manifest])
def test_classes_that_are_numbers_are_in_their_order(tmp_path: Path, write: Any) -> None:
    path = write(
        tmp_path / ("a.csv" if write is write_csv else "a.jsonl"), [{"grade": n} for n in (10, 9, -1, 10, 9, -1)]
    )
    dataset = read_dataset(path, task=Task.MULTI_CLASS)
    assert dataset.outputs == ("-1", "9", "10")
    assert values(path, task=Task.MULTI_CLASS) == [2, 1, 0, 2, 1, 0]


def test_one_number_in_two_spellings_is_refused(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [{"grade": cell} for cell in ("1", "01", "1", "01")])
    assert (
        refused(path, task=Task.MULTI_CLASS)
        == "a.csv, column 'grade': '01' and '1' are one number, spelled in two ways"
    )


def test_names_that_may_be_mistakes_are_noted(tmp_path: Path) -> None:
    names = 2 * ("cat", "Cat", "c\u200bat", "black dog", "black\u00a0dog", "nan")
    dataset = read_dataset(write_csv(tmp_path / "a.csv", [{"label": name} for name in names]), task=Task.MULTI_CLASS)
    assert dataset.notes == (
        "different outputs with almost the same name: 'Cat', 'cat', 'c\\u200bat'",
        "different outputs with almost the same name: 'black dog', 'black\\xa0dog'",
        "outputs with a name that other programs write for nothing: 'nan'",
    )


def test_numbers_taken_for_classes_are_noticed(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [{"size": n / 7} for n in range(9)])
    assert refused(path, task=Task.MULTI_CLASS).endswith("are these numbers, for the task regression?")


def test_labels_in_columns(tmp_path: Path) -> None:
    cells = [(1, "true", 0), (0, "TRUE", 1), ("1.0", "false", 0), ("0", "0", "1")]
    path = write_csv(tmp_path / "a.csv", [dict(zip("abc", row, strict=True)) for row in cells])
    dataset = read_dataset(path, task=Task.MULTI_LABEL, targets=["c", "a", "b"])
    assert dataset.outputs == ("c", "a", "b")
    assert values(path, task=Task.MULTI_LABEL, targets=["c", "a", "b"]) == [(0, 1, 1), (1, 0, 1), (0, 1, 0), (1, 0, 0)]
    assert (dataset.targets().dtype, dataset.targets().shape) == (np.float32, (4, 3))


def test_labels_in_one_column(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [{"labels": cell} for cell in ("dog; cat", "", "cat", "dog")])
    assert read_dataset(path, task=Task.MULTI_LABEL).outputs == ("cat", "dog")
    assert values(path, task=Task.MULTI_LABEL) == [(1, 1), (0, 0), (1, 0), (0, 1)]
    path = write_manifest(tmp_path / "a.jsonl", [{"labels": cell} for cell in (["dog", "cat"], [], "cat", ["dog"])])
    assert values(path, task=Task.MULTI_LABEL) == [(1, 1), (0, 0), (1, 0), (0, 1)]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["a;b", "a;", "b"], "a.csv, line 3, column 'labels': 'a;' has an empty label"),
        (["a;b", "a;b;a", "b"], "a.csv, line 3, column 'labels': 'a;b;a' has a label twice"),
        (["", "", ""], "a.csv, column 'labels': there are no labels in it"),
        (
            ["0", "1", "1"],
            "a.csv, column 'labels': is one column of 0 and 1: take the task binary, or a column for each label",
        ),
        (
            ["a", "a", ""],
            "a.csv, column 'labels': there is one label alone, 'a'; make it a column of 0 and 1, task binary",
        ),
        (
            ["a;b", "a;b", "a", "", ""],
            None,
        ),
        (
            ["a;b", "a", "a", "", ""],
            (
                "a.csv, column 'labels': of 5 rows one alone is positive for 'b'; there must be two, one to learn from and one "
                "to measure on; add some, or leave it out"
            ),
        ),
    ],
)
def test_labels_that_are_refused(tmp_path: Path, cells: Sequence[str], message: str | None) -> None:
    path = write_csv(tmp_path / "a.csv", [{"labels": cell} for cell in cells])
    if message is None:
        assert len(read_dataset(path, task=Task.MULTI_LABEL)) == len(cells)
    else:
        assert refused(path, task=Task.MULTI_LABEL) == message


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, "is missing; no labels are an empty list, []"),
        ([True], "[True] is no list of names"),
        ([["a"]], "[['a']] is no list of names"),
        ({"a": 1}, "{'a': 1} is no single value"),
        (["a", " "], "['a', ' '] has an empty label"),
        (["a", "a "], "['a', 'a '] has a label twice"),
    ],
)
def test_lists_of_labels_that_are_refused(tmp_path: Path, cell: Any, message: str) -> None:
    path = write_manifest(tmp_path / "a.jsonl", [{"labels": ["a", "b"]}, {"labels": cell}])
    assert refused(path, task=Task.MULTI_LABEL) == f"a.jsonl, line 2, column 'labels': {message}"


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", "\ud800", "a\u2028b"])
def test_names_of_outputs_are_on_one_line(tmp_path: Path, name: str) -> None:
    path = write_manifest(tmp_path / "a.jsonl", [{"labels": [name, "a"]}, {"labels": [name, "a"]}, {}, {}])
    path.write_text(path.read_text().replace('.png"}', '.png", "labels": []}'))
    message = f"a.jsonl: the output {name!r} must have a name, without line breaks and control characters"
    assert refused(path, task=Task.MULTI_LABEL) == message
    path = write_manifest(tmp_path / "b.jsonl", [{name: n} for n in range(3)])
    assert refused(path, task=Task.REGRESSION) == message.replace("a.jsonl", "b.jsonl")


def test_commas_in_labels_are_noted(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [{"labels": cell} for cell in ("a,b", "a,b", "c", "c")])
    assert read_dataset(path, task=Task.MULTI_LABEL).notes == (
        "labels with a comma in them (labels are separated by ';'): 'a,b'",
    )


def test_binary(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [{"sick": cell} for cell in (1, 0, "true", "False")])
    dataset = read_dataset(path, task=Task.BINARY)
    assert dataset.outputs == ("sick",)
    assert values(path, task=Task.BINARY) == [(1,), (0,), (1,), (0,)]
    assert (dataset.targets().dtype, dataset.targets().shape) == (np.float32, (4, 1))


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (
            ["benign", "malignant"],
            "a.csv, line 2, column 'sick': 'benign' is none of 0, 1, true and false (1 and true are positive)",
        ),
        (
            [1, 1, 1],
            (
                "a.csv: of 3 rows none is negative for 'sick'; there must be two, one to learn from and one to measure on; add some, "
                "or leave it out"
            ),
        ),
    ],
)
def test_binary_that_is_refused(tmp_path: Path, cells: Sequence[Any], message: str) -> None:
    path = write_csv(tmp_path / "a.csv", [{"sick": cell} for cell in cells])
    assert refused(path, task=Task.BINARY) == message


@pytest.mark.parametrize("task", [Task.BINARY, Task.MULTI_CLASS])
def test_tasks_of_one_column(tmp_path: Path, task: Task) -> None:
    path = write_csv(tmp_path / "a.csv", [{"a": n % 2, "b": n % 2} for n in range(4)])
    assert f"a.csv: {task} has one target column, not 'a', 'b'" in refused(path, task=task, targets=["a", "b"])


def test_regression(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [{"mm": n / 10, "hu": -n} for n in (3, 1, 2)])
    dataset = read_dataset(path, task=Task.REGRESSION, targets=["hu", "mm"])
    assert dataset.outputs == ("hu", "mm")
    assert values(path, task=Task.REGRESSION, targets=["hu", "mm"]) == [(-3, 0.3), (-1, 0.1), (-2, 0.2)]
    assert (dataset.targets().dtype, dataset.targets().shape) == (np.float32, (3, 2))
    assert dataset.targets(np.array([2, 0])).tolist() == dataset.targets()[[2, 0]].tolist()


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["1", "2", "wide"], "a.csv, line 4, column 'mm': 'wide' is no number"),
        (["1", "", "3"], "a.csv, line 3, column 'mm': is empty"),
        (["1", "1e300", "3"], "a.csv, line 3, column 'mm': '1e300' is too large for 32 bits"),
        (["2", "2.0", "2"], "a.csv, column 'mm': is 2 in every row; nothing can be learnt from it"),
        (["1", "1.000000001"], "a.csv, column 'mm': is 1 in every row; nothing can be learnt from it"),
    ],
)
def test_regression_that_is_refused(tmp_path: Path, cells: Sequence[str], message: str) -> None:
    path = write_csv(tmp_path / "a.csv", [{"mm": cell} for cell in cells])
    assert refused(path, task=Task.REGRESSION) == message


# --- Tables: columns and files


def test_a_task_is_never_guessed(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [{"sick": n % 2} for n in range(4)])
    assert "give the task (--task): multi_class, multi_label, binary, regression" in refused(path)


def test_targets_are_not_guessed_among_several(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [{"sick": n % 2, "mm": n, "scan": n} for n in range(4)])
    assert (
        refused(path, task=Task.BINARY)
        == "a.csv: say which columns are the targets (--target); there are sick, mm, scan"
    )
    assert refused(path, task=Task.BINARY, targets=["sik"]) == "a.csv: no column 'sik'; did you mean 'sick'?"
    assert (
        refused(path, task=Task.BINARY, targets=["sick"], group_by="sick") == "a.csv: column 'sick' is asked for twice"
    )
    assert refused(path, task=Task.REGRESSION, targets=["mm", "mm"]) == "a.csv: column 'mm' is asked for twice"
    assert read_dataset(path, task=Task.BINARY, targets=["sick"]).notes == ("columns not used: mm, scan",)


def test_a_file_with_images_alone(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [{}, {}])
    assert (
        refused(path, task=Task.BINARY)
        == "a.csv: say which columns are the targets (--target); there are none beside image"
    )


def test_groups_splits_and_masks(tmp_path: Path) -> None:
    sides = ("train", "val", "validation", "test", "train", "test")
    rows = [
        {"sick": n % 2, "scan": f"s{n // 2 if n < 1 else n}", "side": side, "mask": "m.png" if n == 3 else ""}
        for n, side in enumerate(sides)
    ]
    pixel(tmp_path / "m.png", 200)
    path = write_csv(tmp_path / "a.csv", rows)
    dataset = read_dataset(path, task=Task.BINARY, group_by="scan", split_by="side", mask="mask")
    found = sorted(dataset.rows, key=lambda row: row.where)
    assert [row.split for row in found] == ["train", "validation", "validation", "test", "train", "test"]
    assert [row.group for row in found] == [row["scan"] for row in rows]
    assert [row.mask for row in found] == [None, None, None, tmp_path / "m.png", None, None]
    assert found[3].mask_content == hashlib.sha256((tmp_path / "m.png").read_bytes()).hexdigest()
    assert (dataset.group_by, dataset.split_by) == ("scan", "side")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "none.png"}, "column 'image': the file 'none.png' is not there (paths are relative to a.csv)"),
        ({"image": "images"}, "column 'image': the file 'images' is a folder (paths are relative to a.csv)"),
        (
            {"image": "images\\0.png"},
            (
                "column 'image': the file 'images\\\\0.png' is not there (paths are relative to a.csv); parts of a path have / "
                "between them"
            ),
        ),
        ({"image": ""}, "column 'image': is empty"),
        ({"image": "a\0b.png"}, "column 'image': the file 'a\\x00b.png' is not there (paths are relative to a.csv)"),
        (
            {"image": "x" * 300},
            f"column 'image': the file '{'x' * 36}... can't be read (File name too long) (paths are relative to a.csv)",
        ),
        ({"scan": "a\nb"}, "column 'scan': 'a\\nb' has line breaks or control characters"),
        ({"mask": "none.png"}, "column 'mask': the file 'none.png' is not there (paths are relative to a.csv)"),
        ({"scan": " "}, "column 'scan': is empty"),
        ({"side": "dev"}, "column 'side': 'dev' is none of train, val, validation, test"),
        ({"side": ""}, "column 'side': is empty"),
    ],
)
def test_cells_that_are_refused(tmp_path: Path, change: Mapping[str, str], message: str) -> None:
    rows = [{"sick": n % 2, "scan": n, "side": "train", "mask": ""} for n in range(4)]
    path = write_csv(tmp_path / "a.csv", [*rows, {"image": "images/0.png", **rows[0], **change}])
    options = {"task": Task.BINARY, "targets": ["sick"], "group_by": "scan", "split_by": "side", "mask": "mask"}
    assert refused(path, **options) == f"a.csv, line 6, {message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"no picture", "is no JPEG, PNG or WebP image"), (b"GIF89a", "is no JPEG, PNG or WebP image")],
)
def test_files_that_are_no_images(tmp_path: Path, content: bytes, message: str) -> None:
    path = write_csv(tmp_path / "a.csv", [{"mm": n} for n in range(3)])
    (tmp_path / "images" / "1.png").write_bytes(content)
    assert refused(path, task=Task.REGRESSION) == f"a.csv, line 3: 1.png {message}"


@pytest.mark.parametrize("again", ["images/0.png", "./images/../images/0.png", "linked.png"])
def test_an_image_has_one_row(tmp_path: Path, again: str) -> None:
    pixel(tmp_path / "images" / "0.png", 0)
    (tmp_path / "linked.png").symlink_to(tmp_path / "images" / "0.png")
    path = write_csv(tmp_path / "a.csv", [{"mm": 0}, {"mm": 1}, {"mm": 0, "image": again}])
    assert refused(path, task=Task.REGRESSION) == "a.csv, line 4: has the image of line 2; each image must have one row"


# --- Leaks


def copies(tmp_path: Path, **change: Any) -> Path:
    rows = [{"mm": n, "scan": f"s{n}", "side": "train"} for n in range(4)]
    pixel(tmp_path / "copy.png", 1)
    return write_csv(tmp_path / "a.csv", [*rows, {"image": "copy.png", **rows[1], **change}])


OPTIONS: Mapping[str, Any] = {"task": Task.REGRESSION, "targets": ["mm"], "group_by": "scan", "split_by": "side"}


def test_copies_that_agree_are_noted(tmp_path: Path) -> None:
    dataset = read_dataset(copies(tmp_path), **OPTIONS)
    assert dataset.notes == (
        "images that are copies of others, byte for byte: 1; they count as often as they are there",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm": 7}, ", but another target, 7 and not 1; leave one out"),
        ({"side": "test", "scan": "s9"}, ", and is in test, not in train: that is a leak; leave one out"),
        ({"scan": "s9"}, ", but is of group 's9', not 's1'; leave one out"),
    ],
)
def test_copies_that_disagree_are_refused(tmp_path: Path, change: Mapping[str, Any], message: str) -> None:
    path = copies(tmp_path, **change)
    assert refused(path, **OPTIONS) == f"a.csv, line 6: has the same picture as line 3, byte for byte{message}"


def test_one_picture_in_two_classes_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "pets", {"cat": 2, "dog": 2})
    shutil.copy(root / "cat" / "1.png", root / "dog" / "copy.png")
    assert refused(root) == (
        "pets, dog/copy.png: has the same picture as cat/1.png, byte for byte, but another target, 'dog' and not 'cat'; "
        "leave one out"
    )


def test_a_group_on_two_sides_is_refused(tmp_path: Path) -> None:
    rows = [{"mm": n, "scan": n // 2, "side": "test" if n == 3 else "train"} for n in range(4)]
    assert refused(write_csv(tmp_path / "a.csv", rows), **OPTIONS) == (
        "a.csv, line 5: group '1' is in test, and in train in line 4: that is a leak"
    )


def test_groups_of_one_are_noted(tmp_path: Path) -> None:
    rows = [{"mm": n, "scan": n, "side": "train"} for n in range(4)]
    dataset = read_dataset(write_csv(tmp_path / "a.csv", rows), **OPTIONS)
    assert dataset.notes == ("every row has a group of its own by 'scan'; is it the right column?",)


def test_clusters(tmp_path: Path) -> None:
    dataset = read_dataset(copies(tmp_path), task=Task.REGRESSION, targets=["mm"])
    contents = [row.content for row in dataset.rows]
    clusters = dataset.clusters()
    assert len(set(clusters.tolist())) == 4
    assert all((a == b) == (x == y) for a, x in zip(clusters, contents) for b, y in zip(clusters, contents))  # noqa: B905
    rows = [{"mm": n, "scan": "ab"[n % 2]} for n in range(5)]
    grouped = read_dataset(write_csv(tmp_path / "b.csv", rows), task=Task.REGRESSION, targets=["mm"], group_by="scan")
    assert grouped.clusters().tolist() == ["ab".index(str(row.group)) for row in grouped.rows]
    assert grouped.clusters(np.array([3])).tolist() == [grouped.clusters()[3]]


# --- The digest


def digest(path: Path, **options: Any) -> str:
    return read_dataset(path, task=Task.REGRESSION, targets=["mm"], **options).digest


ROWS = [{"mm": n, "scan": n // 2, "side": "train" if n < 4 else "test"} for n in range(6)]


def test_the_digest_is_of_what_is_learnt_from(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ROWS)
    plain = digest(path)
    assert re.fullmatch(r"[0-9a-f]{64}", plain)
    seen = {
        plain,
        digest(path, group_by="scan"),
        digest(path, split_by="side"),
        digest(path, group_by="scan", split_by="side"),
    }
    changed = write_csv(tmp_path / "b.csv", [{**row, "mm": 7 if row["mm"] == 5 else row["mm"]} for row in ROWS])
    seen.add(digest(changed))
    seen.add(digest(write_csv(tmp_path / "c.csv", ROWS[:5])))
    pixel(tmp_path / "images" / "3.png", 99)
    seen.add(digest(path))
    assert len(seen) == 7


def test_the_digest_is_the_same_wherever_files_lie_and_in_any_order(tmp_path: Path) -> None:
    here = read_dataset(write_csv(tmp_path / "here" / "a.csv", ROWS), **OPTIONS)
    rows = [{**row, "image": f"p/x{9 - n}.png"} for n, row in enumerate(ROWS)]
    for n, row in enumerate(rows):
        pixel(tmp_path / "there" / str(row["image"]), n)
    random.Random(3).shuffle(rows)
    there = read_dataset(write_csv(tmp_path / "there" / "other.csv", rows), **OPTIONS)
    manifest = read_dataset(write_manifest(tmp_path / "there" / "a.jsonl", rows), **OPTIONS)
    assert here.digest == there.digest == manifest.digest
    assert [row.content for row in here.rows] == [row.content for row in there.rows]
    assert np.array_equal(here.targets(), there.targets())


def test_the_digest_of_a_folder_is_of_content_and_classes(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", {"cat": 2, "dog": 3})
    two = folder(tmp_path / "else" / "two", {"cat": 2, "dog": 3})
    (two / "cat" / "0.png").rename(two / "cat" / "renamed.PNG")
    assert read_dataset(one).digest == read_dataset(two).digest
    (two / "cat").rename(two / "lynx")
    assert read_dataset(one).digest != read_dataset(two).digest


def test_progress_wraps_all_files(tmp_path: Path) -> None:
    seen: list[Path] = []

    def progress(files: Sequence[Path]) -> Sequence[Path]:
        seen.extend(files)
        return files

    pixel(tmp_path / "m.png", 77)
    path = write_csv(tmp_path / "a.csv", [{"mm": n, "mask": "m.png"} for n in range(3)])
    read_dataset(path, task=Task.REGRESSION, targets=["mm"], mask="mask", progress=progress)
    assert sorted(file.name for file in seen) == ["0.png", "1.png", "2.png", "m.png"]


def test_hostile_names_stay_below(tmp_path: Path) -> None:
    """Quotes, commas, unicode and blanks in names are names."""
    names = ["a b.png", "at 1\u202fPM.png", "c,d.png", 'e"f.png', "ü/ö.png", "-x.png"]
    for number, name in enumerate(names):
        pixel(tmp_path / name, number)
    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "mm"), *((name, number) for number, name in enumerate(names))])
    dataset = read_dataset(path, task=Task.REGRESSION)
    assert {str(row.image.relative_to(tmp_path)): row.value for row in dataset.rows} == {
        name: (float(number),) for number, name in enumerate(names)
    }


CELLS = st.one_of(
    st.sampled_from(
        ["0", "1", "1.5", "nan", "true", "a;b", ";", "train", "images/0.png", "images", "/", "..", "1,5", "x" * 300]
    ),
    st.text(max_size=8),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 5), CELLS, CELLS, CELLS, CELLS), min_size=1, max_size=6),
    task=st.sampled_from(Task),
    asked=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
@pytest.mark.parametrize("write", [write_csv, write_manifest])
def test_any_cells_are_read_or_refused_in_one_line(
    tmp_path: Path,
    write: Any,
    rows: Sequence[tuple[int, str, str, str, str]],
    task: Task,
    asked: tuple[bool, bool, bool],
) -> None:
    columns = ("image", "target", "scan", "side", "mask")
    table = [dict(zip(columns, (f"images/{row[0]}.png", *row[1:]), strict=True)) for row in rows]
    for number in range(6):
        pixel(tmp_path / "images" / f"{number}.png", number)
    try:
        path = write(tmp_path / ("a.csv" if write is write_csv else "a.jsonl"), table)
    except (UnicodeEncodeError, csv.Error):
        return
    options = {
        name: column
        for name, column, there in zip(("group_by", "split_by", "mask"), columns[2:], asked, strict=True)
        if there
    }
    message = ""
    try:
        dataset = read_dataset(path, task=task, targets=["target"], **options)
        assert len(dataset) == len(rows)
        assert np.isfinite(dataset.targets()).all()
        assert len(dataset.targets()) == len(dataset.clusters()) == len(rows)
    except DatasetError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1
    assert message.isprintable()
