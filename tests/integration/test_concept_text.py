"""Concepts of texts: open_clip's own model on one side, its image tower on a running server on the other."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torch import Tensor

import cdam
from cdam_cli import main
from cdam_cli.text_vectors import TextModel, TextModelError
from reference import foreign
from small_clip import CONFIGS, Folder, save, served

Run = Callable[..., Result]

CAT, PICTURE, DOG = "a photo of a cat", "a picture of a cat", "a photo of a dog"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folder]:
    root = tmp_path_factory.mktemp("clip")
    return {**{kind: save(root / kind, kind) for kind in CONFIGS}, "other": save(root / "other", "clip", seed=1)}


@pytest.fixture(scope="module")
def client(folders: dict[str, Folder], tmp_path_factory: pytest.TempPathFactory) -> Iterator[cdam.Client]:
    models = [{"name": kind, "architecture": f"local-dir:{folders[kind].path}"} for kind in CONFIGS]
    with served(tmp_path_factory.mktemp("server"), [*models, {"name": "demo", "architecture": "demo"}]) as client:
        yield client


@pytest.fixture
def run(client: cdam.Client, folders: dict[str, Folder], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`cdam concept text` with the text model `clip`, unless the words say another."""
    monkeypatch.setenv("CDAM_SERVER", client.connection.address)

    def run(*words: str) -> Result:
        model = [] if "--text-model" in words else ["--text-model", f"local-dir:{folders['clip'].path}"]
        return CliRunner().invoke(main, ["concept", "text", *words, *model])

    return run


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (45, 60, 3), np.uint8))


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_map_is_that_of_open_clips_own_cosine(
    kind: str, run: Run, client: cdam.Client, folders: dict[str, Folder]
) -> None:
    folder = folders[kind]
    done = run("cat", CAT, "--model", kind, "--text-model", f"local-dir:{folder.path}")
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    assert done.stdout.splitlines()[0] == f"cat  version 1 of model {kind}"
    assert done.stdout.splitlines()[-1] == "  explain with -t concept:cat:cosine"
    assert client.concept("cat", model=kind).description == '"a photo of a cat"'

    (relevance,) = client.explain(picture(), cdam.Concept("cat", similarity="cosine"), model=kind)
    direction = folder.directions(CAT)[0]

    def cosine(pixels: Tensor) -> Tensor:
        return folder.model.encode_image(pixels, normalize=True) @ direction[:, None]

    expected = foreign.cdam(folder.model, folder.norm1, cosine, folder.transform(picture()), torch.ones(1))
    h, w = relevance.scores.shape
    scores = expected.scores[0, -h * w :].reshape(h, w).numpy()
    assert relevance.target is not None
    assert relevance.target.value == pytest.approx(expected.outputs.item(), abs=1e-6)
    np.testing.assert_allclose(relevance.scores, scores, rtol=0, atol=1e-5 * np.abs(scores).max())


def test_several_texts_are_averaged_and_negative_ones_subtracted(
    run: Run, client: cdam.Client, folders: dict[str, Folder]
) -> None:
    cat, other, dog = folders["clip"].directions(CAT, PICTURE, DOG).double()
    mean = (cat + other) / 2
    mean /= mean.norm()
    run("cats", CAT, PICTURE, "--model", "clip")
    np.testing.assert_allclose(client.concept("cats", model="clip").vector, mean, rtol=0, atol=1e-6)
    done = run("cat_not_dog", CAT, PICTURE, "--negative", DOG, "--model", "clip", "--label", "a=b")
    assert done.exit_code == 0, done.output
    concept = client.concept("cat_not_dog", model="clip")
    np.testing.assert_allclose(concept.vector, mean - dog, rtol=0, atol=1e-6)
    assert concept.description == f'"{CAT}", "{PICTURE}" less "{DOG}"'
    assert dict(concept.labels) == {"a": "b"}
    assert "nothing changed" in run("cat_not_dog", CAT, PICTURE, "--negative", DOG, "--label", "a=b").stdout


def test_the_cosine_of_a_difference_is_the_difference_of_cosines_but_for_a_constant(
    client: cdam.Client, folders: dict[str, Folder]
) -> None:
    """The dot product is that difference times the length of the image's latent."""
    folder = folders["clip"]
    text = TextModel.load(f"local-dir:{folder.path}")
    cat, dog = (cdam.Concept(vector=text.vector([one]), similarity="cosine") for one in (CAT, DOG))
    vector = text.vector([CAT], [DOG])
    targets = [cdam.Contrast(cat, dog), cdam.Concept(vector=vector, similarity="cosine"), cdam.Concept(vector=vector)]
    explanation = client.explain(picture(), targets, model="clip")
    difference, cosine, _ = (relevance.scores for relevance in explanation)
    length = np.linalg.norm(vector)
    np.testing.assert_allclose(length * cosine, difference, rtol=0, atol=1e-5 * np.abs(difference).max())
    values = [target.value for target in explanation.targets]
    latent = folder.model.encode_image(folder.transform(picture())).norm().item()
    assert values[1] * length == pytest.approx(values[0], rel=1e-4)
    assert values[2] == pytest.approx(values[0] * latent, rel=1e-4)


def test_a_model_of_another_training_is_refused(run: Run, client: cdam.Client, folders: dict[str, Folder]) -> None:
    words = ("stray", CAT, "--model", "clip", "--text-model", f"local-dir:{folders['other'].path}")
    done = run(*words)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(
        f"Error: --text-model: clip is not the image tower of local-dir:{folders['other'].path}: of the same image they "
        "make vectors with a cosine of "
    )
    assert done.stderr.endswith(", which should be 1; --unchecked registers all the same\n")
    with pytest.raises(cdam.NotFound):
        client.concept("stray", model="clip")
    assert run(*words, "--unchecked").exit_code == 0
    assert client.concept("stray", model="clip").version == 1


def test_a_trunk_in_bf16_is_the_same_tower(
    folders: dict[str, Folder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tmp_path, model=f"local-dir:{folders['clip'].path}", precision="bf16") as client:
        monkeypatch.setenv("CDAM_SERVER", client.connection.address)
        said = {
            name: CliRunner().invoke(
                main, ["concept", "text", name, CAT, "--text-model", f"local-dir:{folders[name].path}"]
            )
            for name in ("clip", "other")
        }
        assert client.model().precision == "bf16"
    assert said["clip"].exit_code == 0, said["clip"].output
    assert "is not the image tower" in said["other"].stderr


def test_vectors_of_another_length_are_refused(run: Run) -> None:
    for name, size in (("demo", 128), ("siglip", 96)):
        done = run("cat", CAT, "--model", name)
        assert (done.exit_code, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
        assert f"vectors of 24 numbers, the latents of {name} have {size}: " in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((" ",), "TEXT: a text is empty"),
        ((CAT, "--negative", ""), "--negative: a text is empty"),
        ((CAT, "--negative", CAT), "--negative: says the same as the prompts: nothing is left of their difference"),
        ((CAT, "--text-model", "ViT-B-23"), "open_clip .* knows no 'ViT-B-23'; is it ViT-B-32"),
        (
            (CAT, "--text-model", "ViT-B-32"),
            "--text-weights: say which weights ViT-B-32 has: a file, or one of openai,",
        ),
        (
            (CAT, "--text-model", "ViT-B-32", "--text-weights", "opnai"),
            "--text-weights: opnai is neither a file nor a tag of ViT-B-32: a file, or one of openai,",
        ),
        ((CAT, "--text-weights", "x.pt"), "--text-weights: local-dir:.* has its own weights: leave it out"),
        ((CAT, "--text-model", "local-dir:/nowhere"), "--text-model: .*not found: /nowhere"),
        ((CAT, "--model", "nope"), "there is no model 'nope'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words: tuple[str, ...], said: str, run: Run) -> None:
    done = run("wrong", *words)
    assert (done.exit_code, done.stdout, len(done.stderr.splitlines())) == (1, "", 1), done.output
    assert done.stderr.startswith("Error: ")
    assert re.search(said, done.stderr), done.stderr


@pytest.mark.parametrize(("kind", "fitting"), [("clip", 8), ("siglip", 9)])  # of ten: without the marks of the ends
def test_a_text_that_would_be_cut_is_refused(kind: str, fitting: int, run: Run, folders: dict[str, Folder]) -> None:
    text = "one two three four five six seven eight nine one"
    *shorter, longer = (" ".join(text.split()[:count]) for count in (fitting, fitting + 1))
    more = ("--model", kind, "--text-model", f"local-dir:{folders[kind].path}")
    assert run("fits", *shorter, *more).exit_code == 0
    done = run("cut", longer, *more)
    assert done.exit_code == 1
    assert f"is longer than the 10 tokens that local-dir:{folders[kind].path} reads" in done.stderr


def test_weights_are_never_random(folders: dict[str, Folder], tmp_path: Path) -> None:
    config = folders["clip"].path / "open_clip_config.json"
    (tmp_path / config.name).write_text(config.read_text())
    with pytest.raises(TextModelError, match=r"weights .* could not be loaded") as caught:
        TextModel.load(f"local-dir:{tmp_path}")
    assert caught.value.setting == "text-model"
    with pytest.raises(TextModelError, match=r"open_clip_model\.safetensors can't be loaded \(.*width changed"):
        TextModel.load("ViT-B-32", folders["clip"].path / "open_clip_model.safetensors")


def test_weights_from_a_file(folders: dict[str, Folder], tmp_path: Path) -> None:
    (tmp_path / "ViT-small-test.json").write_text(json.dumps(CONFIGS["clip"]))
    open_clip.add_model_config(tmp_path)
    folder = folders["clip"]
    text = TextModel.load("ViT-small-test", folder.path / "open_clip_model.safetensors")
    np.testing.assert_allclose(text.vector([CAT]), folder.directions(CAT)[0], rtol=0, atol=1e-6)


def test_without_open_clip_the_extra_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    done = run("cat", CAT)
    assert done.exit_code == 1
    assert done.stderr == "Error: open_clip is needed for texts: pip install 'cdam-serve[clip]'\n"
