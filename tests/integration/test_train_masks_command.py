"""`cdam train masks`, as a user runs it: maps that fit their masks, served as probabilities; killed and resumed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

import cdam
from cdam_cli import main
from cdam_engine.preprocess import DataConfig, normalise, prepare
from masked_pictures import CLASSES, KWARGS, PATCH, SIZE, picture, write_model, write_pictures
from processes import serving
from small_models import ARCHITECTURE, vit
from trained import check_same_when_killed, read_card

FAST = ("--epochs", "30", "--batch-size", "8", "--lr", "0.01", "--block-lr", "0.003")
SEVERAL = ("several.jsonl", "--task", "multi_label", "--target", "labels", "--mask", "mask", "--split-by", "split")
ONE = ("one.csv", "--task", "multi_class", "--target", "class", "--split-by", "split")
RED = ("one.csv", "--task", "binary", "--target", "is_red", "--split-by", "split")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("masks")
    write_pictures(path)
    write_model(path)
    write_model(path, 1)
    write_model(path, 0)
    return path


def arguments(folder: Path, dataset: str, *more: str, models: str = "models3.yaml") -> list[str]:
    return ["train", "masks", str(folder / dataset), "--models-file", str(folder / models), *more]


def run(folder: Path, dataset: str, *more: str, models: str = "models3.yaml") -> Result:
    return CliRunner().invoke(main, arguments(folder, dataset, *more, models=models))


def estimate(card: dict[str, Any], side: str, name: str) -> float:
    value: float = card["metrics"][side]["estimates"][name]["value"]
    return value


def test_maps_of_labels_fit_their_masks_and_are_served_as_probabilities(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "masks.safetensors"
    done = run(folder, *SEVERAL, "--masked-share", "0.25", *FAST, "-o", str(out))
    assert done.exit_code == 0, done.output
    card = read_card(out)
    rows = card["data"]["sides"]["train"]["rows"]
    assert card["recipe"]["masks"]["train"] == round(0.25 * rows)
    assert "note: learnt from the masks of 9 of 36 training images; the epoch chosen with 3 of 12 valid" in done.output
    assert card["model"]["trained"] == "the head and the last 2 blocks"
    for side in ("validation", "test"):
        assert estimate(card, f"{side}_masks", "mean_mask_iou") > 0.4
        assert (
            estimate(card, f"{side}_masks", "mean_mask_iou")
            > estimate(card, f"{side}_masks_before", "mean_mask_iou") + 0.3
        )
        assert estimate(card, f"{side}_masks", "mean_mask_average_precision") > 0.7
        assert estimate(card, side, "mean_average_precision") > estimate(
            card, f"{side}_before", "mean_average_precision"
        )
    models = json.loads((folder / "models3.yaml").read_text())
    models["models"][0] |= {"head": str(out), "checkpoint": str(folder / "network3.pth")}
    (tmp_path / "models.yaml").write_text(json.dumps(models))
    models_file, network = str(tmp_path / "models.yaml"), tuned_network(folder, out)
    overlaps = []
    with serving(tmp_path / "log", "--models-file", models_file) as server, cdam.Client(server.address) as client:
        for seed, kinds in enumerate([[0, 2], [1, 2], [0, 1]]):
            image, mask = picture(kinds, 1000 + seed)
            found = client.explain(image, list(CLASSES), methods=[cdam.PatchMaskPrediction()])
            maps = np.stack([its.scores for its in found.maps])
            np.testing.assert_allclose(maps, probabilities(network, image), atol=1e-4)
            marked = np.kron(maps, np.ones((PATCH, PATCH))) > 0.5
            for kind in kinds:
                inside = mask == kind + 1
                overlaps.append((marked[kind] & inside).sum() / (marked[kind] | inside).sum())
    assert np.mean(overlaps) > 0.4


def tuned_network(folder: Path, weights: Path) -> torch.nn.Module:
    """timm's own model with the file's tensors."""
    network = vit(3, seed=3, **KWARGS)
    missing, unexpected = network.load_state_dict(load_file(weights), strict=False)
    assert not unexpected
    assert all(name.startswith(("blocks.0.", "patch_embed.", "pos_embed", "cls_token")) for name in missing)
    return network


def probabilities(network: torch.nn.Module, image: Image.Image) -> NDArray[np.float32]:
    """Of each output at each patch, (C, h, w): norm and head of every patch's token."""
    config = DataConfig.from_timm(network)
    pixels = normalise(torch.from_numpy(prepare(image, config).pixels)[None], config)
    with torch.no_grad():
        tokens = network.forward_features(pixels)[0, 1:]  # type: ignore[operator]
        said: NDArray[np.float32] = torch.sigmoid(network.head(tokens)).T.numpy()  # type: ignore[operator]
    return said.reshape(3, SIZE // PATCH, SIZE // PATCH)


def test_the_object_of_an_images_class(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "object.safetensors"
    done = run(folder, *ONE, "--mask", "object", "--masked-share", "0.5", *FAST, "-o", str(out))
    assert done.exit_code == 0, done.output
    card = read_card(out)
    after, before = (
        estimate(card, side, "mean_mask_average_precision") for side in ("test_masks", "test_masks_before")
    )
    assert after > before + 0.3
    assert estimate(card, "test", "accuracy") >= estimate(card, "test_before", "accuracy")
    assert card["recipe"]["masks"]["kind"] == "object"


def test_the_object_of_a_binary_task(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "red.safetensors"
    more = ("--mask", "red", "--masked-share", "0.2", "--no-balance-masks", *FAST)
    done = run(folder, *RED, *more, "-o", str(out), models="models1.yaml")
    assert done.exit_code == 0, done.output
    assert estimate(read_card(out), "test_masks", "mean_mask_iou") > 0.4


def test_a_head_that_was_trained_before_is_gone_on_from(folder: Path, tmp_path: Path) -> None:
    head, out = tmp_path / "head.safetensors", tmp_path / "masks.safetensors"
    models = ("--models-file", str(folder / "models0.yaml"), "--kept", str(tmp_path / "kept"))
    dataset = [str(folder / ONE[0]), *ONE[1:]]
    first = ["train", "head", *dataset, *models, "--train-blocks", "2", *FAST, "-o", str(head)]
    done = CliRunner().invoke(main, first)
    assert done.exit_code == 0, done.output
    kept = (tmp_path / "kept" / "rows.npy").stat().st_mtime_ns
    models_file = json.loads((folder / "models0.yaml").read_text())
    models_file["models"][0] |= {"head": str(head), "checkpoint": str(folder / "network0.pth")}
    (tmp_path / "m.yaml").write_text(json.dumps(models_file))
    second = ["train", "masks", *dataset, "--models-file", str(tmp_path / "m.yaml"), *models[2:], "--mask", "object"]
    done = CliRunner().invoke(main, [*second, "--epochs", "1", "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert estimate(read_card(out), "test_before", "accuracy") == estimate(read_card(head), "test", "accuracy")
    assert (tmp_path / "kept" / "rows.npy").stat().st_mtime_ns == kept, "the trunk did not run again"
    assert {*load_file(out)} == {*load_file(head)}


def test_killed_and_resumed_is_uninterrupted(folder: Path, tmp_path: Path) -> None:
    way = (
        *SEVERAL,
        "--masked-share",
        "0.3",
        "--views",
        "2",
        "--dropout",
        "0.1",
        "--token-dropout",
        "0.2",
        "--epochs",
        "10",
    )
    check_same_when_killed([sys.executable, "-m", "cdam_cli", *arguments(folder, *way)], tmp_path, ("training.pt",))


@pytest.mark.parametrize(
    ("dataset", "models", "message"),
    [
        ((*SEVERAL, "--train-blocks", "3"), "models3.yaml", "train-blocks: the model has 3 blocks"),
        ((*ONE, "--mask", "object"), "models0.yaml", "has no classifier: train one first with `cdam train head`"),
        ((*RED, "--mask", "red"), "models3.yaml", "task: binary is for one output; there are 3"),
        ((*RED, "--mask", "object"), "models1.yaml", "has pixels of an object, but 'is_red' is 0"),
        (
            (*SEVERAL, "--mask-kind", "object"),
            "models3.yaml",
            "masks of multi_label are of the kind classes, not object",
        ),
        (
            (*RED, "--mask", "classes", "--mask-kind", "classes"),
            "models1.yaml",
            "masks of binary are of the kind object",
        ),
        (
            ("one.csv", "--task", "regression", "--target", "is_red", "--mask", "red"),
            "models1.yaml",
            "a regression has no",
        ),
        ((*ONE, "--mask", "masks"), "models3.yaml", "no column 'masks'"),
        ((*SEVERAL, "--masked-share", "0"), "models3.yaml", "masked-share"),
        ((*SEVERAL, "--patience", "2", "--validation", "0"), "models3.yaml", "--patience waits for a better"),
    ],
)
def test_what_can_not_be_is_refused_in_a_line(
    folder: Path, tmp_path: Path, dataset: tuple[str, ...], models: str, message: str
) -> None:
    done = run(folder, *dataset, "-o", str(tmp_path / "x.safetensors"), models=models)
    assert done.exit_code in {1, 2}
    assert message in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "x.safetensors").exists()


def models_of(folder: Path, path: Path, **entry: Any) -> Path:
    whole = {"name": "m", "architecture": ARCHITECTURE, "random_weights": True, "model_kwargs": KWARGS, **entry}
    path.write_text(json.dumps({"models": [whole]}))
    return path


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"task": "multi_label"}, "task: the model's outputs are multi_label, the dataset's multi_class"),
        ({"num_outputs": 4}, "outputs: the model has 4, the dataset 3"),
        ({"outputs": ["red", "green", "blue"]}, "they must be the same, in the same order"),
        (
            {"model_kwargs": {**KWARGS, "global_pool": "map", "class_token": False}},
            "its classifier reads what attention pooled",
        ),
    ],
)
def test_models_that_can_not_be_trained_so(folder: Path, tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    if not {"outputs", "num_outputs"} & entry.keys():
        entry = {**entry, "num_outputs": 3}
    models = models_of(folder, tmp_path / "models.yaml", **entry)
    more = (*ONE[1:], "--mask", "object", "-o", str(tmp_path / "x.safetensors"))
    done = CliRunner().invoke(main, ["train", "masks", str(folder / ONE[0]), "--models-file", str(models), *more])
    assert done.exit_code == 1
    assert message in done.output
    assert "Traceback" not in done.output


def test_a_classifier_of_several_layers_is_refused(folder: Path, tmp_path: Path) -> None:
    shapes = {"0.weight": (5, 32), "0.bias": (5,), "2.weight": (3, 5), "2.bias": (3,)}
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "head.pth")
    entry = {
        "random_weights": False,
        "checkpoint": str(folder / "network0.pth"),
        "head": "head.pth",
        "head_layers": ["linear", "gelu", "linear"],
    }
    models = models_of(folder, tmp_path / "models.yaml", **entry)
    more = (*ONE[1:], "--mask", "object", "-o", str(tmp_path / "x.safetensors"))
    done = CliRunner().invoke(main, ["train", "masks", str(folder / ONE[0]), "--models-file", str(models), *more])
    assert "its classifier must be a single linear layer" in done.output


def test_a_mask_of_another_size_is_refused_before_anything_is_computed(folder: Path, tmp_path: Path) -> None:
    Image.new("L", (SIZE, SIZE + 1), 255).save(tmp_path / "tall.png")
    images = [f"{folder}/images/one{number}.png,{CLASSES[number % 3]},tall.png" for number in range(24)]
    (tmp_path / "rows.csv").write_text("\n".join(["image,class,mask", *images]) + "\n")
    more = ("--task", "multi_class", "--target", "class", "--mask", "mask", "-o", str(tmp_path / "x.safetensors"))
    done = run(folder, str(tmp_path / "rows.csv"), *more)
    assert done.exit_code == 1
    assert f"the mask tall.png is {SIZE + 1} x {SIZE} (height x width), but the image is {SIZE} x {SIZE}" in done.output
    assert not np.load(tmp_path / "x.work" / "kept" / "done.npy").any()


def test_masks_that_show_no_class_are_refused(folder: Path, tmp_path: Path) -> None:
    """Masks of objects, 0 and 255: as masks of classes all of the object would be undecided."""
    Image.fromarray(np.pad(np.full((8, 8), 255, np.uint8), (0, SIZE - 8))).save(tmp_path / "object.png")
    images = [f"{folder}/images/one{number}.png,{CLASSES[number % 3]},object.png" for number in range(24)]
    (tmp_path / "rows.csv").write_text("\n".join(["image,class,mask", *images]) + "\n")
    more = ("--task", "multi_class", "--target", "class", "--mask", "mask", "--mask-kind", "classes")
    done = run(folder, str(tmp_path / "rows.csv"), *more, "-o", str(tmp_path / "x.safetensors"))
    assert done.exit_code == 1
    assert "no mask of the training images shows a class; are they of the kind object?" in done.output


def test_of_several_wrong_masks_the_first_one_is_named(folder: Path, tmp_path: Path) -> None:
    Image.new("L", (SIZE, SIZE + 1), 255).save(tmp_path / "tall.png")
    images = [f"{folder}/images/one{number}.png,{CLASSES[number % 3]},tall.png,test" for number in range(12)]
    images += [f"{folder}/images/one{number}.png,{CLASSES[number % 3]},,train" for number in range(12, 24)]
    images[-1] = images[-1].replace(",,", f",{folder}/images/one23.png,")
    (tmp_path / "rows.csv").write_text("\n".join(["image,class,mask,split", *images]) + "\n")
    more = ("--task", "multi_class", "--target", "class", "--mask", "mask", "--split-by", "split")
    done = run(folder, str(tmp_path / "rows.csv"), *more, "-o", str(tmp_path / "x.safetensors"))
    assert "rows.csv, line 2: the mask tall.png" in done.output
