"""Masks as counts of a patch's pixels: against slices of the picture; what does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from cdam_engine.evaluation.geometry import Geometry
from cdam_engine.families import Grid
from cdam_engine.preprocess import DataConfig
from cdam_images import upright_indices
from cdam_server.specs import Task
from cdam_training.datasets import Dataset, read_dataset
from cdam_training.errors import DatasetError
from cdam_training.masks import MaskKind, Masks, check_kind, choose
from cdam_training.trunk_outputs import Sources
from cdam_training.views import Augmentation, View, load_batches, view_of_indices

CONFIG = DataConfig((32, 48), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "squash")
GEOMETRY = Geometry((32, 48), (16, 16), Grid(2, 3))
LABELS = ("cat", "dog", "owl")


def write(
    folder: Path, masks: list[Image.Image | None], targets: list[str], size: tuple[int, int] = (48, 32), fill: int = 2
) -> Path:
    """A table of images, each of its own grey, with masks; targets by lines. To its end rows that a dataset has to have."""
    labels = sorted({label for target in targets for label in target.split(";")})
    rows = [*zip(masks, targets, strict=True), *((None, label) for label in labels * fill)]
    lines = ["image,target,mask"]
    for number, (mask, target) in enumerate(rows):
        Image.new("RGB", size, (number, number, number)).save(folder / f"{number}.png")
        if mask is not None:
            mask.save(folder / f"{number}_mask.png")
        lines.append(f"{number}.png,{target},{'' if mask is None else f'{number}_mask.png'}")
    path = folder / "rows.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def read(path: Path, task: Task) -> Dataset:
    return read_dataset(path, task=task, targets=["target"], mask="mask")


def of_first(path: Path, task: Task, kind: MaskKind, config: DataConfig = CONFIG) -> Any:
    """The mask of the table's first row."""
    data = read(path, task)
    masks = Masks(data, kind, Sources([row.image for row in data.rows], config), GEOMETRY)
    (row,) = (number for number, its in enumerate(data.rows) if its.image.name == "0.png")
    return masks.of(row)


def indices(**places: slice) -> NDArray[np.uint8]:
    numbers = np.zeros((32, 48), np.uint8)
    for name, columns in places.items():
        numbers[:, columns] = int(name.removeprefix("n"))
    return numbers


def test_classes_of_several_labels_are_counted_in_patches(tmp_path: Path) -> None:
    numbers = indices(n1=slice(0, 20), n3=slice(20, 32), n255=slice(40, 48))
    path = write(tmp_path, [Image.fromarray(numbers), None], ["cat;owl", "dog"])
    mask = of_first(path, Task.MULTI_LABEL, MaskKind.CLASSES)
    assert mask.outputs.tolist() == [0, 1, 2]
    assert mask.decided.tolist() == [256, 256, 128, 256, 256, 128]
    assert mask.inside.tolist() == [[256, 64, 0] * 2, [0] * 6, [0, 192, 0] * 2]
    assert mask.targets.tolist() == [[True, False, False] * 2, [False] * 6, [False, True, False] * 2]


def test_half_of_a_patch_is_not_most_of_it(tmp_path: Path) -> None:
    numbers = indices(n1=slice(0, 8), n2=slice(16, 25), n255=slice(33, 48))
    numbers[0, 32] = 3
    path = write(tmp_path, [Image.fromarray(numbers), None], ["cat", "dog;owl"])
    mask = of_first(path, Task.MULTI_LABEL, MaskKind.CLASSES)
    assert mask.targets[:, :3].tolist() == [[False, False, False], [False, True, False], [False, False, False]]
    assert mask.decided[2] == 16
    assert mask.inside[2, 2] == 1


def test_classes_where_an_image_has_one_are_those_that_are_there(tmp_path: Path) -> None:
    path = write(tmp_path, [Image.fromarray(indices(n3=slice(0, 16))), None, None], ["cat", "dog", "owl"])
    mask = of_first(path, Task.MULTI_CLASS, MaskKind.CLASSES)
    assert mask.outputs.tolist() == [0, 2], "its own, and the one that the mask shows"
    assert mask.inside.tolist() == [[0] * 6, [256, 0, 0] * 2]


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "RGBA", "P", "I;16"])
def test_an_object_is_what_is_neither_black_nor_transparent(tmp_path: Path, mode: str) -> None:
    inside = indices(n1=slice(16, 48)) > 0
    match mode:
        case "I;16":
            drawn = Image.fromarray(inside.astype(np.uint16))
        case "RGBA":
            drawn = Image.fromarray(np.dstack([np.full((32, 48, 3), 200), inside * 255]).astype(np.uint8))
        case "P":
            drawn = Image.fromarray(inside.astype(np.uint8) * 5).convert("P")
        case _:
            drawn = Image.fromarray(inside.astype(np.uint8) * 255).convert(mode)
    path = write(tmp_path, [drawn, None], ["owl", "cat"])
    mask = of_first(path, Task.MULTI_CLASS, MaskKind.OBJECT)
    assert mask.outputs.tolist() == [1]
    assert mask.inside.tolist() == [[0, 256, 256] * 2]
    assert mask.decided.tolist() == [256] * 6


def test_an_object_of_a_binary_task(tmp_path: Path) -> None:
    empty, left = Image.fromarray(indices()), Image.fromarray(indices(n1=slice(0, 16)))
    path = write(tmp_path, [empty, left], ["0", "1"])
    assert of_first(path, Task.BINARY, MaskKind.OBJECT).inside.tolist() == [[0] * 6], (
        "nothing is there, and it is known"
    )
    for number, target in enumerate(["1", "0"]):
        folder = tmp_path / f"other{number}"
        folder.mkdir()
        path = write(folder, [[empty, left][number], None], [target, str(number)])
        with pytest.raises(DatasetError, match=["is empty", "has pixels of an object, but 'target' is 0"][number]):
            of_first(path, Task.BINARY, MaskKind.OBJECT)


def test_a_mask_is_cut_and_padded_as_its_image_is(tmp_path: Path) -> None:
    numbers = np.zeros((64, 48), np.uint8)
    numbers[:32] = 1
    path = write(tmp_path, [Image.fromarray(numbers), None], ["cat", "dog;owl"], size=(48, 64))
    cut = DataConfig((32, 48), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
    mask = of_first(path, Task.MULTI_LABEL, MaskKind.CLASSES, cut)
    assert mask.inside[0].tolist() == [256, 256, 256, 0, 0, 0], "16 rows are cut away above and below"
    padded = DataConfig((32, 48), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "border")
    mask = of_first(path, Task.MULTI_LABEL, MaskKind.CLASSES, padded)
    assert mask.inside[0].tolist() == [64, 256, 64, 0, 0, 0], "12 columns are padded on each side"
    assert mask.decided.tolist() == [256] * 6


def test_views_of_a_mask_are_those_of_its_image(tmp_path: Path) -> None:
    numbers = np.kron(np.random.default_rng(0).integers(0, 2, (4, 6)), np.ones((40, 40))).astype(np.uint8)
    Image.fromarray(numbers * 255).convert("RGB").save(tmp_path / "picture.png")
    augmentation = Augmentation(scale=(0.3, 0.8))
    views = [View(tmp_path / "picture.png", number, (5, 1)) for number in range(12)]
    (pixels,) = load_batches([views], CONFIG, augmentation)
    for view, its in zip(views, pixels, strict=True):
        shown = view_of_indices(numbers, view, CONFIG, augmentation)
        assert shown.shape == (32, 48)
        assert float(np.mean((its[..., 0].numpy() > 127) == (shown > 0))) > 0.93  # but for edges, which are smoothed
    assert len({view_of_indices(numbers, view, CONFIG, augmentation).tobytes() for view in views}) > 8


def test_index_images_are_read_as_they_are(tmp_path: Path) -> None:
    numbers = np.arange(12, dtype=np.uint8).reshape(3, 4)
    palette = Image.fromarray(numbers).convert("P")
    palette.putpalette([255 - value for value in range(256) for _ in range(3)])
    for image in (Image.fromarray(numbers), palette):
        assert upright_indices(image).tolist() == numbers.tolist()
        assert upright_indices(image, orientation=6).tolist() == np.rot90(numbers, -1).tolist()
    palette.save(tmp_path / "four_bits.png", bits=4)
    with Image.open(tmp_path / "four_bits.png") as opened:
        assert upright_indices(opened).tolist() == numbers.tolist()
    assert upright_indices(Image.fromarray(numbers % 2 == 1)).tolist() == (numbers % 2).tolist()
    with pytest.raises(ValueError, match="not mode RGB"):
        upright_indices(Image.new("RGB", (2, 2)))


def test_grey_index_images_of_few_bits(tmp_path: Path) -> None:
    """Pillow scales them to 0..255; it can't write them, so the file is put together here."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    for bits, row, expected in ((4, b"\x01\x2f", [0, 1, 2, 15]), (2, b"\x1b", [0, 1, 2, 3])):
        header = struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0)
        file = tmp_path / f"{bits}.png"
        parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\x00" + row)) + chunk(b"IEND", b"")
        file.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
        with Image.open(file) as opened:
            assert upright_indices(opened).tolist() == [expected]


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        (
            lambda: Image.fromarray(indices(n4=slice(3, 5), n9=slice(7, 8))),
            "has the values 4, 9; there may be 0 .none.,",
        ),
        (lambda: Image.new("L", (48, 31)), "is 31 x 48 .height x width., but the image is 32 x 48"),
        (lambda: Image.new("RGB", (48, 32)), "an index image has one channel .*, not mode RGB"),
        (lambda: Image.new("I;16", (48, 32)), "not mode I;16"),
    ],
)
def test_masks_that_do_not_fit_are_refused(tmp_path: Path, drawn: Callable[[], Image.Image], message: str) -> None:
    path = write(tmp_path, [drawn(), None], ["cat", "dog;owl"])
    with pytest.raises(DatasetError, match=message) as caught:
        of_first(path, Task.MULTI_LABEL, MaskKind.CLASSES)
    assert str(caught.value).startswith("rows.csv, line 2: the mask 0_mask.png ")
    assert "\n" not in str(caught.value)


def test_an_empty_mask_of_an_object_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [Image.new("L", (48, 32)), None], ["cat", "dog"])
    with pytest.raises(DatasetError, match="is empty: nothing is of the image's class; leave the cell empty"):
        of_first(path, Task.MULTI_CLASS, MaskKind.OBJECT)


def test_a_damaged_mask_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [Image.fromarray(indices(n1=slice(0, 30))), None], ["cat", "dog"])
    file = tmp_path / "0_mask.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(DatasetError, match=r"line 2: 0_mask\.png can.t be read"):
        of_first(path, Task.MULTI_CLASS, MaskKind.OBJECT)


@pytest.mark.parametrize(
    ("task", "kind", "targets", "message"),
    [
        (Task.REGRESSION, MaskKind.OBJECT, ["1", "2"], "a regression has no classes"),
        (Task.MULTI_LABEL, MaskKind.OBJECT, ["cat", "dog"], "masks of multi_label are of the kind classes, not object"),
        (Task.BINARY, MaskKind.CLASSES, ["0", "1"], "masks of binary are of the kind object, not classes"),
    ],
)
def test_kinds_that_a_task_has_not(
    tmp_path: Path, task: Task, kind: MaskKind, targets: list[str], message: str
) -> None:
    data = read(write(tmp_path, [Image.fromarray(indices(n1=slice(0, 9))), None], targets), task)
    with pytest.raises(DatasetError, match=message):
        check_kind(data, kind)


def test_without_any_mask_there_is_nothing_to_learn(tmp_path: Path) -> None:
    data = read(write(tmp_path, [None, None], ["cat", "dog"]), Task.MULTI_CLASS)
    with pytest.raises(DatasetError, match="no image has a mask; --mask names the column"):
        check_kind(data, MaskKind.OBJECT)


def test_few_images_are_drawn_of_as_many_classes_as_possible(tmp_path: Path) -> None:
    targets = ["cat"] * 30 + ["dog"] * 3 + ["owl"] * 2
    data = read(write(tmp_path, [None] * len(targets), targets, fill=0), Task.MULTI_CLASS)
    rows = np.arange(len(data))
    chosen = {seed: choose(data, rows, 3, seed) for seed in range(20)}
    for its in chosen.values():
        assert sorted({data.rows[row].value for row in its.tolist()}) == [0, 1, 2]
    assert len({tuple(its.tolist()) for its in chosen.values()}) > 10
    assert choose(data, rows, 3, 7).tolist() == chosen[7].tolist()
    assert len({data.rows[row].value for row in choose(data, rows, 2, 0).tolist()}) == 2
    assert choose(data, rows, 99, 0).tolist() == rows.tolist()
    of_some = choose(data, rows[5:], 12, 0)
    assert of_some.min() >= 5
    assert (np.diff(of_some) > 0).all()


def test_labels_that_come_together_count_together(tmp_path: Path) -> None:
    targets = ["cat;dog", "owl"] * 2 + ["cat"] * 20
    data = read(write(tmp_path, [None] * len(targets), targets, fill=0), Task.MULTI_LABEL)
    for seed in range(10):
        labels = np.array([data.rows[row].value for row in choose(data, np.arange(len(data)), 3, seed).tolist()])
        assert labels.any(0).all()
    assert torch.tensor(labels).shape == (3, 3)
