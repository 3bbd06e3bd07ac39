"""What the trunk makes of images, on disk: whole, or refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cdam_engine.preprocess import DataConfig
from cdam_server.settings.load_error import LoadError
from cdam_training.errors import DatasetError
from cdam_training.files import locked
from cdam_training.kept import Kept
from cdam_training.state import State
from cdam_training.views import PLAIN, Augmentation, View, load_batches


def kept(folder: Path) -> Kept:
    return Kept(folder, {"model": "m"}, (5,), 40, limit=10_000)


def filled(folder: Path) -> torch.Tensor:
    rows = torch.arange(200.0).reshape(40, 5) + 1
    for _ in kept(folder).fill(lambda its: rows[its.start : its.stop]):
        pass
    return rows


@pytest.mark.parametrize("name", ["rows.npy", "done.npy"])
@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"x" * len(data)])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    rows = filled(tmp_path)
    assert torch.equal(kept(tmp_path).take(np.arange(40)), rows)
    file = tmp_path / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(LoadError, match=f"kept: .*{name} is damaged: remove"):
        kept(tmp_path)


def test_no_room_is_said_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(LoadError, match=r"kept: there is no room for .* \(No space left on device\)"):
        kept(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} <= {"kept.json", "lock"}


def test_a_state_that_can_not_be_written_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    state = State(tmp_path / "fit.pt", {})
    state.save({"step": 1})
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(LoadError, match=r"work: .*fit.pt can't be written: No space left on device"):
        state.save({"step": 2})
    content = state.load()
    assert content is not None
    assert content["step"] == 1


def test_a_folder_is_used_by_one_process(tmp_path: Path) -> None:
    with (
        locked(tmp_path, "work"),
        pytest.raises(LoadError, match="work: another `cdam train` is using"),
        locked(tmp_path, "work"),
    ):
        pass
    with locked(tmp_path, "work"):
        pass


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_can_not_be_read_is_named(tmp_path: Path, workers: int) -> None:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(data, "PNG")
    (tmp_path / "good.png").write_bytes(data.getvalue())
    (tmp_path / "cut.png").write_bytes(data.getvalue()[:2000])
    config = DataConfig((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
    views = [[View(tmp_path / name, PLAIN, ())] for name in ("good.png", "cut.png")]
    batches = load_batches(views, config, Augmentation(), workers=workers)
    assert next(batches).shape == (1, 32, 32, 3)
    with pytest.raises(DatasetError, match=r"^[^\n]*cut.png: can't be read as an image \(OSError: .* leave it out$"):
        next(batches)


def test_a_bomb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    config = DataConfig((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
    with pytest.raises(DatasetError, match=r"bomb.png: can't be read as an image \(DecompressionBombError"):
        next(load_batches([[View(tmp_path / "bomb.png", PLAIN, ())]], config, Augmentation()))
