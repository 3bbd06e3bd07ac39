"""A checkpoint of another geometry than the architecture's is refused with the settings that match; it is resampled only
where that was asked for, and then it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import nn

from cdam_server.compute.loading import LoadError, ModelSpec, load_model
from small_models import ARCHITECTURE, difference, load, refusal, vit


def paste(message: str) -> dict[str, Any]:
    """The keyword arguments that a refusal says to set."""
    text = message.partition("model_kwargs: ")[2]
    kwargs: dict[str, Any] = yaml.safe_load(text[: text.index("}") + 1])
    return kwargs


# --- refused, with what fits


@pytest.mark.parametrize(
    "trained",
    [
        {"patch_size": 8, "img_size": 112},  # as many positions as 224 / 16
        {"patch_size": 16, "img_size": 128},
        {"patch_size": 16, "img_size": 256},  # SDA-FAS#1: 257 positions
        {"patch_size": 16, "img_size": 32},  # solo-learn#218: 5 positions
        {"patch_size": 32, "img_size": 224},
        {"patch_size": 8, "img_size": 224},
    ],
)
def test_what_a_refusal_says_can_be_pasted(trained: dict[str, int], tmp_path: Path) -> None:
    """pytorch-image-models#2120, #1794: patch embedding and positions are resampled without a word."""
    model = vit(**trained)
    said = refusal(model.state_dict(), tmp_path, model_kwargs={"img_size": None})
    kwargs = paste(said)
    assert kwargs == {name: value for name, value in trained.items() if kwargs.get(name) or value != 16}
    loaded = load(model.state_dict(), tmp_path, model_kwargs={"img_size": None, **kwargs})
    size = trained["img_size"]
    assert loaded.data_config.input_size == (size, size)
    assert difference(loaded, model, (size, size)) == 0
    assert not loaded.resampled


def test_a_patch_embedding_is_not_resampled_for_an_input_size(tmp_path: Path) -> None:
    model = vit(patch_size=8, img_size=112)
    for size in ((112, 112), (224, 224)):
        said = refusal(model.state_dict(), tmp_path, model_kwargs={"img_size": None}, input_size=size)
        assert "patches of 8 x 8 pixels" in said
        assert paste(said) == {"patch_size": 8, "img_size": 112}


def test_what_the_settings_say_of_the_file_must_be_so(tmp_path: Path) -> None:
    said = refusal(vit(img_size=64).state_dict(), tmp_path, model_kwargs={"img_size": 32})
    assert "4 x 4 for 64 x 64" in said
    assert paste(said) == {"img_size": 64}
    assert "input_size: [32, 32]" in said


@pytest.mark.parametrize(
    ("trained", "words"),
    [
        ({"depth": 3}, ["depth 3 (the architecture 2)", "depth: 3"]),
        ({"embed_dim": 48, "num_heads": 3}, ["width 48", "embed_dim: 48, num_heads: ..."]),
        ({"in_chans": 1}, ["channels 1 (the architecture 3)", "in_chans: 1"]),
        ({"mlp_ratio": 2.0}, ["mlp_ratio: 2"]),
        ({"reg_tokens": 4}, ["reg_tokens: 4"]),
        ({"init_values": 0.1}, ["init_values: 0.00001"]),
        ({"qkv_bias": False}, ["qkv_bias: false"]),
        ({"qk_norm": True}, ["qk_norm: true"]),
        ({"pre_norm": True}, ["pre_norm: true"]),
        ({"global_pool": "avg"}, ["global_pool: avg"]),
        ({"no_embed_class": True}, ["model_kwargs: {no_embed_class: true}"]),
    ],
)
def test_other_networks_say_what_they_are(trained: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    said = refusal(vit(**trained).state_dict(), tmp_path)
    assert all(word in said for word in words), said


def test_an_input_size_that_patches_do_not_fit(tmp_path: Path) -> None:
    for settings, name in (
        ({"input_size": (50, 50)}, "input_size"),
        ({"model_kwargs": {"img_size": 40}}, "model_kwargs"),
    ):
        with pytest.raises(LoadError, match=r"not a multiple of the patch size 16 x 16") as caught:
            load(vit().state_dict(), tmp_path, **{"model_kwargs": {"img_size": None}, **settings})
        assert caught.value.setting == name


def test_a_common_size_is_called_by_its_architecture(tmp_path: Path) -> None:
    """pytorch-image-models#1011: weights of a larger ViT."""
    small = timm.create_model("vit_small_patch16_224", num_classes=3)
    nothing = {"embed_dim": None, "depth": None, "num_heads": None, "img_size": None}
    assert "is it vit_small_patch16_224?" in refusal(small.state_dict(), tmp_path, model_kwargs=nothing)


def test_heads_must_be_told_with_a_width(tmp_path: Path) -> None:
    said = refusal(vit().state_dict(), tmp_path, model_kwargs={"num_heads": None})
    assert "num_heads" in said


def test_one_more_prefix_token(tmp_path: Path) -> None:
    """PathoDuet#11: 198 positions, because of a second token of its own."""
    weights = vit(img_size=224).state_dict()
    weights["pos_embed"] = torch.zeros(1, 198, 32)
    said = refusal(weights, tmp_path, model_kwargs={"img_size": None})
    assert "198 positions" in said
    assert "1 prefix tokens" in said
    assert "with 2" in said


# --- asked for


def test_positions_for_an_input_size(tmp_path: Path) -> None:
    """dinov2#120, dinov2#41: trained at 518, used at 224. Equal to plain bicubic resampling of the grid."""
    model = vit(patch_size=14, img_size=518)
    kwargs = {"img_size": None, "patch_size": 14}
    loaded = load(model.state_dict(), tmp_path, model_kwargs=kwargs, input_size=(224, 224))
    assert loaded.resampled == "positions from 37 x 37 to 16 x 16"
    assert loaded.data_config.input_size == (224, 224)
    positions = model.state_dict()["pos_embed"]
    grid = positions[:, 1:].reshape(1, 37, 37, 32).permute(0, 3, 1, 2)
    resampled = F.interpolate(grid, (16, 16), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(1, 256, 32)
    expected = torch.cat([positions[:, :1], resampled], dim=1)
    torch.testing.assert_close(loaded.module.state_dict()["pos_embed"], expected)


def test_an_oblong_input_size(tmp_path: Path) -> None:
    loaded = load(vit().state_dict(), tmp_path, model_kwargs={"img_size": None}, input_size=(48, 64))
    assert loaded.resampled == "positions from 2 x 2 to 3 x 4"
    assert loaded.module(torch.zeros(1, 3, 48, 64)).shape == (1, 3)


def test_everything_may_be_resampled_if_that_is_said(tmp_path: Path) -> None:
    model = vit(patch_size=8, img_size=64)
    loaded = load(model.state_dict(), tmp_path, resample=True)
    assert loaded.resampled == "patch embedding from 8 x 8 to 16 x 16 pixels; positions from 8 x 8 to 2 x 2"
    assert loaded.data_config.input_size == (32, 32)
    again = vit(patch_size=8, img_size=64)
    again.set_input_size(img_size=32, patch_size=16)  # type: ignore[operator]
    assert difference(loaded, again) < 1e-6


def test_resampling_changes_the_fingerprint(tmp_path: Path) -> None:
    weights = vit(img_size=64).state_dict()
    whole = load(weights, tmp_path, model_kwargs={"img_size": 64})
    small = load(weights, tmp_path, model_kwargs={"img_size": 64}, input_size=(32, 32))
    assert small.resampled == "positions from 4 x 4 to 2 x 2"
    assert whole.fingerprint != small.fingerprint


# --- grids that are not square


def test_an_oblong_grid_of_a_square_count(tmp_path: Path) -> None:
    """dino#8: 16 positions may be 4 x 4 or 2 x 8; guessing scrambles the picture."""
    model = vit(img_size=(32, 128))
    said = refusal(model.state_dict(), tmp_path, model_kwargs={"img_size": None}, input_size=(32, 128))
    assert "4 x 4 or of 2 x 8" in said
    told = load(model.state_dict(), tmp_path, model_kwargs={"img_size": [32, 128]})
    assert difference(told, model, (32, 128)) == 0
    assert not told.resampled
    square = vit(img_size=64)
    resampled = load(square.state_dict(), tmp_path, model_kwargs={"img_size": 64}, input_size=(32, 128))
    assert resampled.resampled == "positions from 4 x 4 to 2 x 8"


def test_an_oblong_grid(tmp_path: Path) -> None:
    model = vit(img_size=(32, 48))
    assert "no square grid" in refusal(model.state_dict(), tmp_path)
    for settings in ({"model_kwargs": {"img_size": [32, 48]}}, {"input_size": (32, 48)}):
        assert difference(load(model.state_dict(), tmp_path, **settings), model, (32, 48)) == 0
    larger = load(model.state_dict(), tmp_path, model_kwargs={"img_size": [32, 48]}, input_size=(64, 64))
    assert larger.resampled == "positions from 2 x 3 to 4 x 4"


def test_the_default_grid_in_another_shape(tmp_path: Path) -> None:
    """196 positions are 14 x 14 to timm, whatever the settings say; here the settings are right."""
    model = vit(img_size=(112, 448))
    loaded = load(model.state_dict(), tmp_path, model_kwargs={"img_size": [112, 448]})
    assert difference(loaded, model, (112, 448)) == 0


@pytest.mark.filterwarnings("ignore::UserWarning")  # timm's resampling of tables, in torch's words
@pytest.mark.parametrize("architecture", ["beit_base_patch16_224", "beitv2_base_patch16_224"])
def test_relative_positions(architecture: str, tmp_path: Path) -> None:
    model = vit(architecture=architecture, img_size=64)
    said = refusal(model.state_dict(), tmp_path, architecture=architecture)
    assert "4 x 4 for 64 x 64" in said
    exact = load(model.state_dict(), tmp_path, architecture=architecture, model_kwargs={"img_size": 64})
    assert difference(exact, model, (64, 64)) == 0
    if hasattr(model, "set_input_size"):
        loaded = load(
            model.state_dict(),
            tmp_path,
            architecture=architecture,
            model_kwargs={"img_size": None},
            input_size=(32, 32),
        )
        assert loaded.resampled == "positions from 4 x 4 to 2 x 2"


def test_rotary_positions_have_no_size(tmp_path: Path) -> None:
    architecture = "vit_small_patch16_dinov3"
    model = vit(0, architecture=architecture, img_size=64)
    loaded = load(model.state_dict(), tmp_path, architecture=architecture)
    assert loaded.data_config.input_size == (32, 32)
    assert not loaded.resampled


# --- settings of an architecture


def test_keyword_arguments_that_are_misspelled(tmp_path: Path) -> None:
    said = refusal(vit().state_dict(), tmp_path, model_kwargs={"patchsize": 16})
    assert "does not take patchsize; is it patch_size" in said


def test_preprocessing_is_the_models(tmp_path: Path) -> None:
    """Nothing in a checkpoint tells with which mean it was trained."""
    given = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear", "crop_pct": 0.5}
    loaded = load(vit().state_dict(), tmp_path, preprocessing={**given, "crop_mode": "border"})
    found = loaded.data_config
    assert (found.mean, found.std, found.interpolation, found.crop_pct, found.crop_mode) == (*given.values(), "border")
    assert loaded.fingerprint != load(vit().state_dict(), tmp_path).fingerprint


@pytest.mark.parametrize(
    "preprocessing",
    [{"mean": [0.5, 0.5]}, {"std": [0, 1, 1]}, {"crop_pct": 1.5}, {"interpolation": "random"}, {"crop": 1}, 3],
)
def test_preprocessing_that_makes_no_sense(preprocessing: Any) -> None:
    with pytest.raises(ValueError, match="preprocessing"):
        ModelSpec(name="m", architecture=ARCHITECTURE, random_weights=True, preprocessing=preprocessing)


# --- timm's own folders and weights


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, nn.Module]:
    """As timm.models.push_to_hf_hub writes it (pytorch-image-models#2476, #2067)."""
    model = vit()
    timm.models.save_for_hf(
        model,
        str(tmp_path),
        model_config={"label_names": ["benign", "malignant", "unsure"]},
        model_args={"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2},
    )
    return tmp_path, model


def test_a_folder_of_timms(folder: tuple[Path, nn.Module]) -> None:
    path, model = folder
    loaded = load_model(ModelSpec(name="m", architecture=f"local-dir:{path}"))
    assert difference(loaded, model) == 0
    assert loaded.architecture == ARCHITECTURE
    assert loaded.output_names == ("benign", "malignant", "unsure")


def test_a_folder_of_timms_as_a_checkpoint(folder: tuple[Path, nn.Module]) -> None:
    path, model = folder
    kwargs = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
    spec = ModelSpec(name="m", architecture=ARCHITECTURE, checkpoint=Path(f"local-dir:{path}"), model_kwargs=kwargs)
    assert difference(load_model(spec), model) == 0


def test_a_folder_with_other_weights_than_its_configuration_says(folder: tuple[Path, nn.Module]) -> None:
    path, _ = folder
    save_file(vit(patch_size=8, img_size=32).state_dict(), path / "model.safetensors")
    with pytest.raises(LoadError, match="patches of 8 x 8"):
        load_model(ModelSpec(name="m", architecture=f"local-dir:{path}"))


def test_a_patch_size_for_weights_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytorch-image-models#2120: patch_size=8 with weights of patch 16 resamples them in silence."""
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: None)
    spec = ModelSpec(name="m", architecture=ARCHITECTURE, pretrained=True, model_kwargs={"patch_size": 8})
    with pytest.raises(LoadError, match="patch_size"):
        load_model(spec)


def test_an_input_size_for_weights_from_the_hub_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: None)
    loaded = load_model(ModelSpec(name="m", architecture=ARCHITECTURE, pretrained=True, input_size=(96, 96)))
    assert loaded.resampled == "positions from those for 224 x 224 pixels to those for 96 x 96"


def test_dinov2s_own_checkpoints_with_registers(tmp_path: Path) -> None:
    """pytorch-image-models#2014, dinov2#356: register_tokens, mask_token and a position for [CLS], which timm adds to [CLS] itself."""
    architecture = "vit_small_patch14_reg4_dinov2"
    model = vit(0, architecture=architecture, img_size=56)
    own = dict(model.state_dict())
    first = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(3))
    weights = {name: tensor for name, tensor in own.items() if name not in {"reg_token", "cls_token", "pos_embed"}}
    weights |= {
        "register_tokens": own["reg_token"],
        "mask_token": torch.zeros(1, 32),
        "cls_token": own["cls_token"] - first,
        "pos_embed": torch.cat([first, own["pos_embed"]], dim=1),
    }
    content = {"teacher": {f"backbone.{name}": tensor for name, tensor in weights.items()}}
    kwargs = {"img_size": 56}
    loaded = load(content, tmp_path, architecture=architecture, model_kwargs=kwargs)
    assert difference(loaded, model, (56, 56)) < 1e-5
    assert not loaded.resampled
    smaller = load(content, tmp_path, architecture=architecture, model_kwargs=kwargs, input_size=(28, 28))
    assert smaller.resampled == "positions from 4 x 4 to 2 x 2"
    assert "4 x 4 for 56 x 56" in refusal(content, tmp_path, architecture=architecture, model_kwargs={"img_size": 28})


def test_names_of_transformers_say_where_they_belong(tmp_path: Path) -> None:
    weights = {
        "vit.embeddings.cls_token": torch.ones(1, 1, 32),
        "vit.embeddings.position_embeddings": torch.ones(1, 5, 32),
        "vit.embeddings.patch_embeddings.projection.weight": torch.ones(32, 3, 16, 16),
        "vit.encoder.layer.0.attention.attention.query.weight": torch.ones(32, 32),
    }
    assert "local-dir:PATH" in refusal(weights, tmp_path)
