"""CLIP checkpoints of open_clip, converted, against open_clip's own modules: image embeddings and maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.factory import get_model_config
from open_clip.model import CLIP, CustomTextCLIP, _build_vision_tower
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn

from cdam_engine import Concept, Explainer
from cdam_engine.preprocess import normalise, prepare
from cdam_server.compute.conversions.open_clip import Description, convert, recognise
from cdam_server.compute.conversions.tensors import ConversionError
from reference import foreign

VISION = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 48, "head_width": 16, "mlp_ratio": 2.1}
TEXT = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 1}
ONE_TOWER: dict[str, dict[str, Any]] = {
    "plain": {},
    "quick_gelu": {"quick_gelu": True},
    "one_layer_other_heads": {"layers": 1, "width": 40, "head_width": 8},
    "layer_scale": {"ls_init_value": 0.1},
    "clipa": {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
    "average_of_normalised": {"pool_type": "avg"},
    "other_eps_and_gelu": {"norm_kwargs": {"eps": 1e-2}, "act_kwargs": {"approximate": "tanh"}},
}
TIMM_TOWERS: dict[str, dict[str, Any]] = {
    "siglip": {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"},
    "head": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None},
    "projection": {"timm_model_name": "test_vit2", "timm_pool": "", "timm_proj": "linear"},
    "projection_with_bias": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj_bias": True},
}


def _one_tower(kind: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    changes = dict(ONE_TOWER[kind])
    quick = changes.pop("quick_gelu", False)
    vision = {**VISION, **changes}
    model = CLIP(24, vision_cfg=vision, text_cfg=TEXT, quick_gelu=quick, init_logit_bias=-3.0)
    return foreign.randomise(model.to(dtype)), {"vision_cfg": vision, "text_cfg": TEXT, "quick_gelu": quick}


def _timm_tower(kind: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    vision = {"image_size": 160, **TIMM_TOWERS[kind]}
    embed = 96 if kind == "siglip" else 24
    model = CustomTextCLIP(embed, vision_cfg=vision, text_cfg=TEXT)
    return foreign.randomise(model.to(dtype)), {"vision_cfg": vision, "text_cfg": TEXT}


def _check(model: nn.Module, config: dict[str, Any], norm1: nn.Module, prefix: int, size: int, fp64: bool) -> None:
    dtype, tolerance = (torch.float64, 1e-10) if fp64 else (torch.float32, 1e-5)
    tensors = model.state_dict()
    assert recognise(tensors)
    converted = convert(tensors, Description.from_config({"model_cfg": config}))
    ours = converted.build().to(dtype).eval()
    ours.load_state_dict(converted.weights)
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        expected, found = model.encode_image(pixels), ours(pixels)
    scale = expected.abs().max()
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * scale
    vector = torch.randn(expected.shape[1], generator=torch.Generator().manual_seed(2)).to(dtype)
    scores = foreign.cdam(model, norm1, model.encode_image, pixels, vector).scores[:, prefix:]
    explanations = Explainer(ours).explain(pixels, [[Concept(vector)]] * 2)
    maps = torch.stack([torch.as_tensor(item.maps[0].scores).flatten() for item in explanations])
    assert (maps - scores).abs().max() <= 2 * tolerance * scores.abs().max()
    assert explanations[0].latent.shape == (expected.shape[1],)
    assert converted.text.logit_scale == pytest.approx(model.logit_scale.item())


@pytest.mark.parametrize("kind", ONE_TOWER)
@pytest.mark.parametrize("fp64", [False, True], ids=["fp32", "fp64"])
def test_embeddings_and_maps_equal_open_clip(kind: str, fp64: bool) -> None:
    model, config = _one_tower(kind, torch.float64 if fp64 else torch.float32)
    _check(model, config, model.visual.transformer.resblocks[-1].ln_1, 1, 32, fp64)


@pytest.mark.parametrize("kind", TIMM_TOWERS)
@pytest.mark.parametrize("fp64", [False, True], ids=["fp32", "fp64"])
def test_embeddings_and_maps_of_timm_towers_equal_open_clip(kind: str, fp64: bool) -> None:
    model, config = _timm_tower(kind, torch.float64 if fp64 else torch.float32)
    trunk = model.visual.trunk
    _check(model, config, trunk.blocks[-1].norm1, trunk.num_prefix_tokens, 160, fp64)


def test_the_text_tower_and_openais_extras_are_left_out_by_name() -> None:
    model, config = _one_tower("quick_gelu", torch.float32)
    tensors = {**model.state_dict(), "input_resolution": torch.tensor(32), "context_length": torch.tensor(8)}
    converted = convert(tensors, Description.from_config({"model_cfg": config}))
    assert [note.split("(")[0].strip() for note in converted.notes[1:]] == [
        "left out: the text tower",
        "left out: sizes that OpenAI's archives repeat",
    ]
    assert converted.text.logit_bias == pytest.approx(model.logit_bias.item())
    with pytest.raises(ConversionError, match=r"holds more than the model: visual\.extra"):
        convert({**tensors, "visual.extra": torch.zeros(1)}, Description.from_config({"model_cfg": config}))


@pytest.mark.parametrize("name", open_clip.list_models())
def test_names_stand_for_what_open_clip_has(name: str) -> None:
    """Every name that is known here means what open_clip means by it; the others are refused."""
    theirs = get_model_config(name)
    vision = theirs.get("vision_cfg")
    try:
        ours = Description.from_name(name).model
    except ConversionError:
        return
    assert isinstance(vision, dict)
    assert bool(ours.get("quick_gelu")) == bool(theirs.get("quick_gelu"))
    mine = ours["vision_cfg"]
    if "timm_model_name" in mine:
        assert mine == {key: vision[key] for key in mine}
        return
    assert mine["head_width"] == vision.get("head_width", 64)
    assert mine["patch_size"] == vision["patch_size"]
    sizes = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size", "ls_init_value"}
    assert {key: value for key, value in mine.items() if key not in sizes} == {
        key: value for key, value in vision.items() if key not in sizes
    }


@pytest.mark.parametrize(
    "name",
    [
        "ViT-S-32-alt",
        "ViT-M-16-alt",
        "ViT-B-16-plus-240",
        "ViT-L-14-336-quickgelu",
        "ViT-H-14-CLIPA",
        "ViT-g-14",
        "ViT-bigG-14",
        "ViT-e-14",
        "ViT-SO400M-14-SigLIP-384",
        "ViT-gopt-16-SigLIP2-256",
    ],
)
def test_full_size_towers_have_timms_shapes_and_open_clips_heads(name: str) -> None:
    """Without memory for the numbers."""
    config = get_model_config(name)
    with torch.device("meta"):
        tower = _build_vision_tower(config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False))
    converted = convert({f"visual.{key}": x for key, x in tower.state_dict().items()}, Description.from_name(name))
    with torch.device("meta"):
        model = timm.create_model(converted.architecture, **converted.model_kwargs)
        if converted.readout is not None:
            converted.readout.install(model)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert {key: tuple(tensor.shape) for key, tensor in converted.weights.items()} == shapes
    attention = tower.trunk.blocks[0].attn if hasattr(tower, "trunk") else tower.transformer.resblocks[0].attn
    assert model.blocks[0].attn.num_heads == attention.num_heads


def test_how_many_names_are_known() -> None:
    def known(name: str) -> bool:
        try:
            Description.from_name(name)
        except ConversionError:
            return False
        return True

    assert {"ViT-B-32", "ViT-L-14-336-quickgelu", "ViT-bigG-14-CLIPA-336", "ViT-SO400M-14-SigLIP-384"} <= {
        name for name in open_clip.list_models() if known(name)
    }
    assert not any(known(name) for name in ("RN50", "ViT-S-B-32", "EVA02-B-16", "vit-b-32", "ViT-Q-14"))


@pytest.mark.parametrize(
    "content",
    [
        {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
        {"interpolation": "bilinear"},
        {"mean": 0.5, "std": 0.5, "interpolation": "bicubic", "resize_mode": "squash"},
        {},
    ],
    ids=["mean", "bilinear", "squash", "nothing"],
)
def test_preprocessing_equals_open_clips(content: dict[str, Any]) -> None:
    model, config = _one_tower("plain", torch.float32)
    description = Description.from_config({"model_cfg": config, "preprocess_cfg": content})
    data_config = convert(model.state_dict(), description).data_config
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (101, 143, 3), np.uint8))
    expected = image_transform_v2(PreprocessCfg(**{"size": 32, **content}), is_train=False)(picture)
    found = normalise(torch.from_numpy(prepare(picture, data_config).pixels)[None], data_config)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def _tensors(**more: Tensor) -> dict[str, Tensor]:
    return {**_one_tower("plain", torch.float32)[0].state_dict(), **more}


@pytest.mark.parametrize(
    ("vision", "reason"),
    [
        ({"attentional_pool": True}, "vision_cfg has attentional_pool, which timm has no equal of"),
        ({"qk_norm": True}, "vision_cfg has qk_norm"),
        ({"layers": [3, 4, 6, 3]}, "the image tower is a ResNet"),
        ({"pool_type": "none"}, "pool_type is 'none'; known are tok and avg"),
        ({"head_width": 36}, "head_width is 36, which does not divide the width 48"),
        ({"patch_size": 16}, "has patches of 16 pixels, the checkpoint 8"),
        ({"act_kwargs": {"slope": 1}}, "act_kwargs or norm_kwargs hold what timm has no equal of"),
        ({"timm_model_name": "nonsense"}, "timm_model_name is nonsense, which timm"),
        ({"timm_model_name": "test_vit", "timm_pool": "abs_attn"}, "timm_pool is 'abs_attn' and timm_proj 'linear'"),
        ({"timm_model_name": "test_resnet", "timm_proj": "none"}, "test_resnet is no Vision Transformer"),
    ],
)
def test_towers_that_timm_has_no_equal_of_are_refused(vision: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConversionError, match=reason):
        convert(_tensors(), Description.from_config({"model_cfg": {"vision_cfg": {**VISION, **vision}}}))


def test_nobody_said_which_gelu() -> None:
    with pytest.raises(ConversionError, match=r"does not say whether .* QuickGELU, .* open_clip:ViT-B-32-quickgelu"):
        convert(_tensors(), None)


def test_the_model_size_is_checked_against_the_name() -> None:
    with pytest.raises(ConversionError, match="ViT-B-32 has patches of 32 pixels, the checkpoint 8"):
        convert(_tensors(), Description.from_name("ViT-B-32"))
