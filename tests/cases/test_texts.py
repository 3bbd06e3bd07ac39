"""Texts as targets, as people compute them with CLIP models: the right vector, or a refusal that names what was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import cdam
from cdam_cli import main
from cdam_cli.text_vectors import TextModel, TextModelError
from small_clip import VISION, Folder, save, served

CAT, PICTURE, DOG = "a photo of a cat", "a picture of a cat", "a photo of a dog"

Register = Callable[..., Result]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A model in which it matters which GELU it has."""
    root = tmp_path_factory.mktemp("texts")
    drawn = save(root / "drawn", "clip").model
    with torch.no_grad():
        for block in drawn.visual.transformer.resblocks:
            block.mlp.c_fc.weight.mul_(0.5)
            block.mlp.c_proj.weight.mul_(30)
    return save(root / "clip", "clip", weights_of=drawn)


@pytest.fixture(scope="module")
def client(clip: Folder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[cdam.Client]:
    """Of a server of the model's image tower, as it is and with other preprocessing."""
    entry = {"name": "clip", "architecture": f"local-dir:{clip.path}"}
    washed = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    models = [entry, {**entry, "name": "unnormalised", "preprocessing": washed}]
    with served(tmp_path_factory.mktemp("server"), models) as client:
        yield client


@pytest.fixture
def register(client: cdam.Client, monkeypatch: pytest.MonkeyPatch) -> Register:
    monkeypatch.setenv("CDAM_SERVER", client.connection.address)

    def register(folder: Folder, *words: str) -> Result:
        command = ["concept", "text", "case", CAT, "--text-model", f"local-dir:{folder.path}", *words]
        return CliRunner().invoke(main, command)

    return register


def refused(done: Result) -> str:
    assert (done.exit_code, done.stdout, len(done.stderr.splitlines())) == (1, "", 1), done.output
    return done.stderr


# --- the vector


def test_the_same_text_is_the_same_vector_of_length_one(clip: Folder) -> None:
    """open_clip#913: a text's similarity to itself was .49. open_clip#862: and another one each time."""
    first, again = (TextModel.load(f"local-dir:{clip.path}").vector([CAT]) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert np.dot(first, first) == pytest.approx(1, abs=1e-6)


def test_dropout_of_training_is_off(tmp_path: Path, clip: Folder) -> None:
    """open_clip#862: dropout, left on as in training, makes each answer another one."""
    folder = save(tmp_path / "dropout", "clip", vision_cfg={**VISION, "patch_dropout": 0.5})
    text = TextModel.load(f"local-dir:{folder.path}")
    assert not text.model.training
    np.testing.assert_array_equal(text.image_vector(text.probe()), text.image_vector(text.probe()))


def test_texts_are_brought_to_length_one_before_their_mean_and_after(clip: Folder) -> None:
    """CLIP_benchmark#90, DepthCLIP#1: why twice? Because a mean of unit vectors is none. Histo-TransCLIP#3: forgotten."""
    tokens = open_clip.get_tokenizer(f"local-dir:{clip.path}")([CAT, DOG])
    with torch.no_grad():
        embeddings = clip.model.encode_text(tokens).double().numpy()
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    assert abs(lengths[0] / lengths[1] - 1) > 0.01  # so that it matters
    mean = (embeddings / lengths).mean(0)
    assert np.linalg.norm(mean) < 0.998
    found = TextModel.load(f"local-dir:{clip.path}").vector([CAT, DOG])
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean), rtol=0, atol=1e-6)


def test_the_cosine_is_of_two_unit_vectors(client: cdam.Client, clip: Folder) -> None:
    """fashion-clip#31: one of them was normalised, the other not. clip.cpp#54: none."""
    text = TextModel.load(f"local-dir:{clip.path}")
    probe = text.probe()
    for scale in (1, 1000):
        concept = cdam.Concept(vector=scale * text.image_vector(probe), similarity="cosine")
        assert client.explain(probe, concept, model="clip").targets[0].value == pytest.approx(1, abs=1e-5)
    asked = cdam.Concept(vector=text.vector([CAT]), similarity="cosine")
    image = clip.model.encode_image(clip.transform(probe), normalize=True)
    expected = (image @ clip.directions(CAT).T).item()
    assert client.explain(probe, asked, model="clip").targets[0].value == pytest.approx(expected, abs=1e-5)


# --- the tokenizer


def test_a_text_too_long_is_named_among_several(clip: Folder) -> None:
    """CLIP#212, CLIP#468, ultralytics#22647: an error that does not tell which; open_clip cuts it off without a word."""
    long = "one two three four five six seven eight nine"
    with pytest.raises(TextModelError, match=r"^'one two .* nine'\.\.\. is longer than the 10 tokens") as caught:
        TextModel.load(f"local-dir:{clip.path}").vector([CAT, long, DOG])
    assert caught.value.setting == "prompt"


def test_few_characters_may_be_many_tokens(clip: Folder) -> None:
    """CLIP#212: 44 words, and more than 77 tokens, since digits count one by one."""
    text = TextModel.load(f"local-dir:{clip.path}")
    assert len(text.vector(["rooms 12 to 34"])) == 24
    with pytest.raises(TextModelError, match="longer than the 10 tokens"):
        text.vector(["rooms 123456789"])


def test_the_tokenizer_is_the_models_own(tmp_path: Path) -> None:
    """open_clip#1118: a SigLIP model with CLIP's tokenizer, cut to the length that fits: an answer, and no right one."""
    folder = save(tmp_path / "siglip", "siglip")
    text = TextModel.load(f"local-dir:{folder.path}")
    assert text.tokenizer([CAT]).tolist() == [[3, 4, 6, 3, 8, 1, 0, 0, 0, 0]]
    np.testing.assert_allclose(text.vector([CAT]), folder.directions(CAT)[0], rtol=0, atol=1e-6)


def test_a_string_is_not_a_list_of_letters(clip: Folder) -> None:
    with pytest.raises(TextModelError, match="is one text where a list of texts belongs"):
        TextModel.load(f"local-dir:{clip.path}").vector(CAT)


# --- two towers of one training


def test_the_served_tower_has_the_wrong_gelu(register: Register, tmp_path: Path, clip: Folder) -> None:
    """pytorch-image-models#1754 and #2031, open_clip#771 and #915, sugar-crepe#7, vision-language-models-are-bows#35:
    weights that were trained with QuickGELU answer in a tower with GELU, plausibly and wrong.
    """
    other = save(tmp_path / "gelu", "clip", weights_of=clip.model, quick_gelu=False)
    assert "clip is not the image tower of" in refused(register(other, "--model", "clip"))
    assert register(clip, "--model", "clip").exit_code == 0


def test_the_served_tower_gets_other_pixels(register: Register, clip: Folder) -> None:
    """open_clip#204: mean and std of another training."""
    said = refused(register(clip, "--model", "unnormalised"))
    assert "unnormalised is not the image tower of" in said


def test_another_size_of_the_same_family(register: Register, tmp_path: Path) -> None:
    """Tamm_Code#1: text vectors of ViT-g-14 for images of ViT-bigG-14."""
    other = save(tmp_path / "wider", "clip", embed_dim=32)
    assert "makes vectors of 32 numbers, the latents of clip have 24" in refused(register(other, "--model", "clip"))


@pytest.mark.parametrize(
    ("name", "tag"), [("ViT-B-32", "openai"), ("ViT-B-32", "metaclip_400m"), ("ViT-B-32", "laion400m_e32")]
)
def test_a_tag_that_wants_another_activation(name: str, tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip#441 and #771: open_clip warns of a QuickGELU mismatch, and goes on."""
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *_args, **_more: "weights.pt")
    with pytest.raises(TextModelError, match=rf"^{tag} can't be loaded \(UserWarning: QuickGELU mismatch") as caught:
        TextModel.load(name, tag)
    assert caught.value.setting == "text-weights"


def test_no_text_tower_at_all(tmp_path: Path) -> None:
    """UniMed-CLIP#9: weights of the image tower alone leave a random text tower behind."""
    folder = save(tmp_path / "half", "clip")
    weights = folder.path / "open_clip_model.safetensors"
    visual = {name: tensor for name, tensor in load_file(weights).items() if name.startswith(("visual.", "logit"))}
    save_file(visual, weights)
    with pytest.raises(TextModelError, match=r"half can't be loaded \(.*"):
        TextModel.load(f"local-dir:{folder.path}")
