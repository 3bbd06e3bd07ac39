"""`cdam train head`, as a user runs it: from images to a file that is served; killed and resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression

import cdam
from cdam_cli import main
from cdam_engine.preprocess import DataConfig, normalise, prepare
from cdam_server.compute.loading import load_model, load_models_file
from cdam_server.settings.load_error import LoadError
from cdam_server.settings.specs import ModelSpec, Task
from processes import serving
from small_models import ARCHITECTURE, SHAPE, vit
from trained import check_same_when_killed, read_card

CLASSES = ("blue", "green", "red")


def picture(kind: int, seed: int) -> Image.Image:
    """Noise, on which one channel is somewhat brighter."""
    rng = np.random.default_rng((kind, seed))
    pixels = rng.integers(0, 170, (36, 48, 3))
    pixels[:, :, 2 - kind] += rng.integers(20, 80)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images by class, a table of the same, and a backbone's checkpoint with a models file."""
    path = tmp_path_factory.mktemp("training")
    rows = ["image,brightness,is_red,who"]
    for kind, name in enumerate(CLASSES):
        (path / "photos" / name).mkdir(parents=True)
        for number in range(40):
            image = picture(kind, number)
            file = path / "photos" / name / f"{number}.png"
            image.save(file)
            bright = float(np.asarray(image).mean())
            rows.append(f"{file.relative_to(path)},{bright * 10:.2f},{int(name == 'red')},p{number % 15}")
    (path / "samples.csv").write_text("\n".join(rows) + "\n")
    torch.save(vit(0, seed=3, depth=3).state_dict(), path / "backbone.pth")
    kwargs = {"img_size": 32, **SHAPE, "depth": 3}
    entry = {"name": "small", "architecture": ARCHITECTURE, "checkpoint": "backbone.pth", "model_kwargs": kwargs}
    (path / "models.yaml").write_text(json.dumps({"models": [entry]}))
    return path


def arguments(folder: Path, dataset: str, *more: str) -> list[str]:
    return ["train", "head", str(folder / dataset), "--models-file", str(folder / "models.yaml"), *more]


def run(folder: Path, dataset: str, *more: str) -> Result:
    return CliRunner().invoke(main, arguments(folder, dataset, *more))


def models_file(folder: Path, path: Path, *heads: Path) -> Path:
    """The same backbone, with heads."""
    (entry,) = json.loads((folder / "models.yaml").read_text())["models"]
    entry["checkpoint"] = str(folder / "backbone.pth")
    models = [{**entry, "name": head.stem, "head": str(head)} for head in heads]
    path.write_text(json.dumps({"models": models}))
    return path


def latents(folder: Path, images: Sequence[Path]) -> torch.Tensor:
    """timm's own, of the images as they are served."""
    model = timm.create_model(ARCHITECTURE, num_classes=0, img_size=32, **{**SHAPE, "depth": 3}).eval()
    model.load_state_dict(torch.load(folder / "backbone.pth"))
    config = DataConfig.from_timm(model)
    with torch.no_grad():
        parts = [
            model(normalise(torch.from_numpy(prepare(Image.open(image), config).pixels)[None], config))
            for image in images
        ]
    return torch.cat(parts)


def test_a_head_on_kept_latents_is_as_good_as_scikit_learns(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "head.safetensors"
    done = run(folder, "photos", "--cache-latents", "--l2", "0.01", "-o", str(out))
    assert done.exit_code == 0, done.output
    card = read_card(out)
    test, train = card["data"]["sides"]["test"], card["data"]["sides"]["train"]
    assert test["rows"] + train["rows"] + card["data"]["sides"]["validation"]["rows"] == 120
    # The same split and latents, by scikit-learn.
    from cdam_training.datasets import read_dataset
    from cdam_training.splits import split_dataset

    dataset = read_dataset(folder / "photos")
    splits = split_dataset(dataset, seed=0)
    x, y = latents(folder, [row.image for row in dataset.rows]).double().numpy(), dataset.targets()
    mean, deviation = x[splits.train].mean(0), x[splits.train].std(0)
    model = LogisticRegression(C=1 / (0.01 * len(splits.train)), tol=1e-10, max_iter=10_000)
    model.fit((x[splits.train] - mean) / deviation, y[splits.train])
    theirs = model.score((x[splits.test] - mean) / deviation, y[splits.test])
    assert card["metrics"]["test"]["estimates"]["accuracy"]["value"] == pytest.approx(theirs, abs=1e-12)
    weights = load_file(out)
    ours = x @ weights["head.weight"].numpy().T.astype(np.float64) + weights["head.bias"].numpy()
    expected = model.decision_function((x - mean) / deviation)
    np.testing.assert_allclose(
        ours - ours.mean(1, keepdims=True), expected - expected.mean(1, keepdims=True), atol=1e-3
    )
    assert not (tmp_path / "head.work").exists()


def test_two_heads_on_one_tuned_backbone_are_served_with_one_trunk(folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "bright.safetensors", tmp_path / "red.safetensors"
    done = run(
        *(folder, "samples.csv", "--task", "regression", "--target", "brightness", "--group-by", "who"),
        *("--train-blocks", "1", "--epochs", "60", "--lr", "0.01", "--block-lr", "0.003", "-o", str(first)),
    )
    assert done.exit_code == 0, done.output
    assert read_card(first)["data"]["group_by"] == "who"
    r = read_card(first)["metrics"]["test"]["by_output"]["pearson_r"]["brightness"]["value"]
    assert r > 0.4
    models = models_file(folder, tmp_path / "tuned.yaml", first)
    command = ["train", "head", str(folder / "samples.csv"), "--models-file", str(models), "--task", "binary"]
    done = CliRunner().invoke(main, [*command, "--target", "is_red", "--cache-latents", "-o", str(second)])
    assert done.exit_code == 0, done.output
    assert {*load_file(first)} == {*load_file(second)}, "the second head comes with what the first has tuned"
    served = models_file(folder, tmp_path / "served.yaml", first, second)
    image = picture(2, 1)
    with serving(tmp_path / "log", "--models-file", str(served)) as server, cdam.Client(server.address) as client:
        bright = client.explain(image, "brightness", model="bright")
        red = client.explain(image, "is_red", model="red")
        assert bright.targets[0].value == pytest.approx(float(np.asarray(image).mean()) * 10, rel=0.1)
        assert np.isfinite(red.targets[0].value)
        told = {name: client.model(name) for name in ("bright", "red")}
    assert (told["bright"].task, told["red"].task) == ("regression", "binary")
    one, other = (load_model(spec).trunk_fingerprint for spec in load_models_file(served))
    assert one == other, "what makes the server keep and run the trunk once"


def test_what_was_tuned_is_part_of_the_file_and_bound_to_its_backbone(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned.safetensors"
    assert run(folder, "photos", "--train-blocks", "2", "--epochs", "1", "-o", str(out)).exit_code == 0
    names = {*load_file(out)}
    assert {"head.weight", "head.bias", "norm.weight", "blocks.1.attn.qkv.weight", "blocks.2.mlp.fc2.bias"} <= names
    assert not any(name.startswith(("blocks.0.", "patch_embed", "pos_embed")) for name in names)
    torch.save(vit(0, seed=4, depth=3).state_dict(), tmp_path / "other.pth")
    models = json.loads(models_file(folder, tmp_path / "m.yaml", out).read_text())
    models["models"][0]["checkpoint"] = str(tmp_path / "other.pth")
    (tmp_path / "m.yaml").write_text(json.dumps(models))
    refused = CliRunner().invoke(main, ["check", "--models-file", str(tmp_path / "m.yaml")])
    assert refused.exit_code == 1
    assert "tuned.safetensors was trained on another backbone" in refused.output


@pytest.mark.parametrize(
    "way",
    [
        ("--cache-latents", "--views", "3"),
        ("--epochs", "12", "--batch-size", "8", "--lr", "0.01"),
        ("--train-blocks", "2", "--epochs", "12", "--token-dropout", "0.3", "--dropout", "0.1"),
    ],
    ids=["fit", "epochs", "blocks"],
)
def test_killed_and_resumed_is_uninterrupted(folder: Path, tmp_path: Path, way: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "cdam_cli", *arguments(folder, "photos", *way)]
    check_same_when_killed(command, tmp_path, ("kept/done.npy", "training.pt", "fit.pt"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--cache-latents", "--train-blocks", "1"), "--cache-latents keeps what comes after all blocks"),
        (("--cache-latents", "--epochs", "3"), "--epochs is of training in epochs: give --optimizer"),
        (("--l2", "0.1"), "--l2 is of the head that --cache-latents finds"),
        (("--dropout", "0.1"), "--dropout is of blocks"),
        (("--views", "2"), "--views is of what is kept"),
        (("--train-blocks", "3"), "train-blocks: the model has 3 blocks"),
        (("--cache-latents", "--keep-limit", "1e-6"), "need 0.0 GB"),
        (("--optimizer", "sdg"), "optimizer: timm can't make 'sdg'"),
        (("--cache-latents", "--validation", "0"), "--validation: the L2 penalty is chosen on validation images"),
        (("--device", "cuda:7"), "device: cuda:7 can't be used here"),
        (("--device", "meta"), "device: meta can't be used here"),
        (("--task", "regression"), "a folder of classes is the task multi_class"),
        (("--keep-limit", "inf"), "inf is not finite"),
        (("--cache-latents", "--l2", "nan"), "nan is not finite"),
        (("--cache-latents", "--l2", "1e300"), "l2: what came out is not finite (head.weight)"),
        (("--crop-scale", "1", "0.1"), "the least share, 1, is more than the largest, 0.1"),
        (("--crop-scale", "-1", "1"), "-1.0 is not in the range"),
        (("--lr", "1e38"), "lr: "),
        (("--lr", "1e38", "--optimizer", "sgd"), "lr: "),
        (("--train-blocks", "1", "--block-lr", "1e38"), "lr: "),
        (("--patience", "2", "--validation", "0"), "--patience waits for a better validation loss"),
        (("--optimizer", "adahessian"), "optimizer: 'adahessian' needs second derivatives"),
        (("--optimizer", "adagrad", "--schedule", "one_cycle"), "schedule: one_cycle is for optimizers with momentum"),
    ],
)
def test_what_can_not_be_is_refused_in_a_line(
    folder: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    done = run(folder, "photos", *more, "-o", str(tmp_path / "x.safetensors"))
    assert done.exit_code in {1, 2}
    assert message in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "x.safetensors").exists()


def test_nothing_is_overwritten(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    out.write_bytes(b"precious")
    done = run(folder, "photos", "--cache-latents", "-o", str(out))
    assert "is there already; --overwrite replaces it" in done.output
    assert out.read_bytes() == b"precious"
    for name in ("models.yaml", "backbone.pth"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    mine = (tmp_path / "models.yaml").rename(tmp_path / "y.json")
    command = ["train", "head", str(folder / "photos"), "--models-file", str(mine), "--cache-latents"]
    before = mine.read_bytes()
    for more in ((), ("--overwrite",)):
        refused = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "y.safetensors"), *more])
        assert "y.json" in refused.output
        assert refused.exit_code == 2
        assert mine.read_bytes() == before, "the card would have its name"
    other = tmp_path / "x.pth"
    assert "must end in .safetensors" in run(folder, "photos", "--cache-latents", "-o", str(other)).output


def test_another_training_does_not_go_on_in_the_folder(folder: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "x.safetensors", ("--work", str(tmp_path / "work"))
    assert run(folder, "photos", "--optimizer", "adam", "--cache-latents", "-o", str(out), *work).exit_code == 0
    again = ("--optimizer", "adam", "--lr", "0.1", "--cache-latents", "-o", str(tmp_path / "y.safetensors"), *work)
    refused = run(folder, "photos", *again)
    assert "holds a training with another lr" in refused.output
    assert run(folder, "photos", *again, "--overwrite").exit_code == 0


@pytest.mark.parametrize("way", [("--cache-latents",), ("--train-blocks", "1", "--epochs", "1")], ids=["fit", "blocks"])
def test_a_training_of_other_rows_does_not_go_on(folder: Path, tmp_path: Path, way: tuple[str, ...]) -> None:
    work = ("--work", str(tmp_path / "work"))
    assert run(folder, "photos", *way, *work, "-o", str(tmp_path / "x.safetensors")).exit_code == 0
    for split in (("--seed", "1"), ("--test", "0.4"), ("--validation", "0.3")):
        refused = run(folder, "photos", *way, *work, *split, "-o", str(tmp_path / "y.safetensors"))
        assert "holds a training with another " in refused.output, "or what it was trained on would be measured on"
        assert "split" in refused.output


@pytest.mark.parametrize("way", [("--cache-latents",), ("--train-blocks", "1", "--epochs", "1")], ids=["fit", "blocks"])
def test_what_is_kept_is_not_taken_for_that_of_a_model_of_the_same_weights(
    folder: Path, tmp_path: Path, way: tuple[str, ...]
) -> None:
    kept = ("--kept", str(tmp_path / "kept"))
    assert run(folder, "photos", *way, *kept, "-o", str(tmp_path / "x.safetensors")).exit_code == 0
    models = json.loads((folder / "models.yaml").read_text())
    models["models"][0]["checkpoint"] = str(folder / "backbone.pth")
    models["models"][0]["model_kwargs"]["num_heads"] = 4  # no tensor tells it
    other = tmp_path / "other.yaml"
    other.write_text(json.dumps(models))
    command = ["train", "head", str(folder / "photos"), "--models-file", str(other), *way, *kept]
    refused = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "y.safetensors")])
    assert "holds what another model made of other images" in refused.output


def test_an_interrupted_training_of_another_model_is_begun_anew_if_asked(folder: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "x.safetensors", tmp_path / "x.work"
    command = [sys.executable, "-m", "cdam_cli", *arguments(folder, "photos", "--cache-latents", "-o", str(out))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (work / "kept" / "done.npy").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 1
    assert said.splitlines()[-1] == "Aborted: the same command goes on from here."
    models = json.loads((folder / "models.yaml").read_text())
    models["models"][0]["checkpoint"] = str(folder / "backbone.pth")
    models["models"][0]["model_kwargs"]["num_heads"] = 4
    (tmp_path / "other.yaml").write_text(json.dumps(models))
    other = ["train", "head", str(folder / "photos"), "--models-file", str(tmp_path / "other.yaml"), "--cache-latents"]
    refused = CliRunner().invoke(main, [*other, "-o", str(out)])
    assert f"kept: {work / 'kept'} holds what another model made of other images: remove it" in refused.output
    assert CliRunner().invoke(main, [*other, "-o", str(out), "--overwrite"]).exit_code == 0


def test_a_dataset_that_is_refused_leaves_no_folder(folder: Path, tmp_path: Path) -> None:
    for number in range(6):
        picture(0, number).save(tmp_path / f"{number}.png")
    cut = tmp_path / "4.png"
    cut.write_bytes(cut.read_bytes()[:-500])
    rows = [f"{number}.png,{'ab'[number % 2]}" for number in range(6)]
    (tmp_path / "rows.csv").write_text("\n".join(["image,kind", *rows]))
    models = str(folder / "models.yaml")
    command = ["train", "head", str(tmp_path / "rows.csv"), "--models-file", models, "--task", "multi_class"]
    refused = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "x.safetensors")])
    assert "rows.csv, line 6: 4.png can't be read as an image" in refused.output
    assert not (tmp_path / "x.work").exists()


def test_a_head_is_served_for_the_task_that_it_was_trained_for(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    assert run(folder, "photos", "--cache-latents", "--l2", "1", "-o", str(out)).exit_code == 0
    (entry,) = json.loads(models_file(folder, tmp_path / "m.yaml", out).read_text())["models"]
    spec = ModelSpec(**entry)
    assert load_model(spec).task == "multi_class"
    with pytest.raises(
        LoadError, match="task: the head was trained for multi_class, not regression: leave the task out"
    ):
        load_model(ModelSpec(**entry, task=Task.REGRESSION))


def test_what_the_models_own_settings_drop_is_part_of_the_training(folder: Path, tmp_path: Path) -> None:
    way = ("--train-blocks", "1", "--epochs", "1", "--work", str(tmp_path / "work"))
    out = tmp_path / "x.safetensors"
    assert run(folder, "photos", *way, "-o", str(out)).exit_code == 0
    assert read_card(out)["recipe"]["drops"] == {}
    models = json.loads((folder / "models.yaml").read_text())
    models["models"][0]["checkpoint"] = str(folder / "backbone.pth")
    models["models"][0]["model_kwargs"] |= {"drop_path_rate": 0.2, "proj_drop_rate": 0.1}
    (tmp_path / "dropping.yaml").write_text(json.dumps(models))
    command = ["train", "head", str(folder / "photos"), "--models-file", str(tmp_path / "dropping.yaml"), *way]
    command += ["-o", str(tmp_path / "y.safetensors")]
    assert "holds a training with another drops" in CliRunner().invoke(main, command).output
    assert CliRunner().invoke(main, [*command, "--overwrite"]).exit_code == 0
    found = read_card(tmp_path / "y.safetensors")["recipe"]["drops"]
    assert {round(rate, 6) for rate in found.values()} == {0.2, 0.1}
    assert found["0.drop_path1"] == pytest.approx(0.2)  # the last block's, which drops most


def test_nothing_is_removed_but_what_training_has_made(folder: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "x.safetensors", tmp_path / "x.work"
    work.mkdir()
    (work / "notes.txt").write_text("precious")
    kept = work / "kept"
    assert run(folder, "photos", "--cache-latents", "--kept", str(kept), "-o", str(out)).exit_code == 0
    assert {file.name for file in work.iterdir()} == {"kept", "notes.txt"}
    assert (kept / "rows.npy").exists(), "it was asked for"
    (tmp_path / "y.work").write_text("")
    refused = run(folder, "photos", "--cache-latents", "-o", str(tmp_path / "y.safetensors"))
    assert "--work: " in refused.output
    assert "y.work is no folder" in refused.output
