"""`cdam check`: what a server would see of a model and answer for an image, against timm itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner, Result
from PIL import Image

from cdam_cli import main
from small_models import ARCHITECTURE, SHAPE, prefixed, vit

NAMES = ["benign", "malignant", "unsure"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A models file, a checkpoint of Lightning's kind, an image and timm's own logits for it."""
    model = vit()
    weights = prefixed(model.state_dict(), "model.") | {"criterion.weight": torch.ones(3)}
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "model.ckpt")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    image.save(tmp_path / "x.png")
    entry = {"name": "lesions", "architecture": ARCHITECTURE, "checkpoint": "model.ckpt", "outputs": NAMES}
    broken = {**entry, "name": "broken", "input_size": [32, 32], "model_kwargs": {**SHAPE, "patch_size": 8}}
    models = [{**entry, "model_kwargs": {"img_size": 32, **SHAPE}}, broken]
    (tmp_path / "models.yaml").write_text(json.dumps({"models": models}))
    config = {**timm.data.resolve_model_data_config(model), "input_size": (3, 32, 32)}
    transform = timm.data.create_transform(**config)
    with torch.no_grad():
        logits = model(transform(image)[None])[0]
    (tmp_path / "logits.json").write_text(json.dumps(logits.tolist()))
    return tmp_path


def run(folder: Path, *more: str, models: tuple[str, ...] = ("--only", "lesions")) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return CliRunner().invoke(main, ["check", "--models-file", "models.yaml", *models, *more])


def test_all_that_decides_an_answer(folder: Path) -> None:
    done = run(folder, "--json")
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)
    assert found["weights"] == "model.ckpt"
    assert found["prefix taken off"] == "state_dict.model."
    assert found["left out"] == ["state_dict.criterion.weight"]
    assert (found["outputs"], found["output names"], found["task"]) == (3, NAMES, "multi_class")
    assert (found["input size"], found["patch grid"], found["latent"]) == ([32, 32], [2, 2], 32)
    assert (found["mean"], found["interpolation"], found["crop"]) == ([0.5, 0.5, 0.5], "bicubic", "center, 0.9")
    assert found["not served"] == {}
    text = run(folder).output
    assert "left out" in text
    assert "fingerprint" in text
    assert "all" in text


def test_outputs_are_timms(folder: Path) -> None:
    expected = json.loads((folder / "logits.json").read_text())
    (found,) = json.loads(run(folder, "--image", "x.png", "--json").stdout)
    np.testing.assert_allclose(found["logits"], expected, atol=1e-5)
    label, logit, probability = found["largest"][0]
    assert label == NAMES[int(np.argmax(expected))]
    assert logit == pytest.approx(max(expected), abs=1e-5)
    assert probability == pytest.approx(np.exp(max(expected)) / np.exp(expected).sum(), rel=1e-4)


def test_an_expectation_that_is_met(folder: Path) -> None:
    done = run(folder, "--image", "x.png", "--expect", "logits.json")
    assert done.exit_code == 0, done.output
    assert "as expected" in done.output
    assert "NOT" not in done.output


def test_an_expectation_that_is_not_met(folder: Path) -> None:
    expected = json.loads((folder / "logits.json").read_text())
    expected[1] += 0.25
    (folder / "logits.json").write_text(json.dumps([expected]))
    done = run(folder, "--image", "x.png", "--expect", "logits.json")
    assert done.exit_code == 1
    assert "NOT as expected: largest difference 0.25 (output 1" in done.output
    assert run(folder, "--image", "x.png", "--expect", "logits.json", "--tolerance", "0.3").exit_code == 0


def test_a_model_that_cannot_be_loaded(folder: Path) -> None:
    done = run(folder, models=())
    assert done.exit_code == 1
    assert "model lesions" in done.output
    assert "patches of 16 x 16 pixels" in done.output


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--expect", "logits.json"], "--expect needs --image"),
        (["--image", "models.yaml"], "models.yaml"),
        (["--image", "x.png", "--expect", "models.yaml"], "a JSON list of numbers"),
    ],
)
def test_what_is_asked_wrongly(flags: list[str], words: str, folder: Path) -> None:
    done = run(folder, *flags)
    assert done.exit_code != 0
    assert words in done.output
    assert "Traceback" not in done.output


def test_other_numbers_of_outputs(folder: Path) -> None:
    (folder / "logits.json").write_text("[1, 2]")
    done = run(folder, "--image", "x.png", "--expect", "logits.json")
    assert done.exit_code == 1
    assert "2 values are expected, the model has 3 outputs" in done.output


def test_a_model_that_is_not_there(folder: Path) -> None:
    assert "there are lesions, broken" in run(folder, models=("--only", "other")).output


def test_no_vit(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["check", "--model", "test_resnet", "--random-weights"])
    assert done.exit_code == 1
    assert "can't be explained" in done.output


@pytest.mark.parametrize("flags", [["--model", "demo"], []])
def test_the_demo(flags: list[str]) -> Any:
    done = CliRunner().invoke(main, ["check", *flags])
    assert done.exit_code == 0, done.output
    assert "the package" in done.output
