"""Checkpoints of torchvision, converted, against torchvision's own modules."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import vision_transformer

from cdam_engine import Explainer, Output
from cdam_engine.preprocess import normalise, prepare
from cdam_server.compute.conversions import torchvision
from cdam_server.compute.conversions.tensors import ConversionError
from reference import foreign

SIZES = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 100}
KINDS = {
    "plain": {**SIZES, "num_classes": 5},
    "deep": {**SIZES, "num_layers": 4, "num_heads": 5, "hidden_dim": 40, "num_classes": 3},
    "hidden_layer": {**SIZES, "representation_size": 20, "num_classes": 7},
    "one_output": {**SIZES, "num_layers": 1, "num_classes": 1},
}


def _theirs(kwargs: dict[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    return foreign.randomise(vision_transformer.VisionTransformer(**kwargs).to(dtype))


def _old_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {re.sub(r"\.mlp\.0\.", ".mlp.linear_1.", name): tensor for name, tensor in tensors.items()}
    return {re.sub(r"\.mlp\.3\.", ".mlp.linear_2.", name): tensor for name, tensor in renamed.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("old", [False, True], ids=["names", "old_names"])
def test_logits_and_maps_equal_torchvision(kind: str, dtype: torch.dtype, old: bool) -> None:
    kwargs, tolerance = KINDS[kind], 1e-5 if dtype is torch.float32 else 1e-10
    model = _theirs(kwargs, dtype)
    tensors = _old_names(model.state_dict()) if old else model.state_dict()
    assert torchvision.recognise(tensors)
    converted = torchvision.convert(tensors, None, num_heads=kwargs["num_heads"])
    ours = converted.build().to(dtype).eval()
    ours.load_state_dict(converted.weights)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        expected, found = model(pixels), ours(pixels)
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    last = kwargs["num_classes"] - 1
    wanted = torch.eye(kwargs["num_classes"], dtype=dtype)[last]
    scores = foreign.cdam(model, model.encoder.layers[-1].ln_1, model, pixels, wanted).scores[:, 1:]
    explanations = Explainer(ours).explain(pixels, [[Output(last)]] * 2)
    maps = torch.stack([torch.as_tensor(item.maps[0].scores).flatten() for item in explanations])
    assert (maps - scores).abs().max() <= 2 * tolerance * scores.abs().max()


def test_other_input_size_resamples_the_positions_as_torchvision_does() -> None:
    model = _theirs({**SIZES, "image_size": 48, "num_classes": 4})
    ours = torchvision.convert(model.state_dict(), None, num_heads=3, input_size=(32, 32)).build().eval()
    other = _theirs({**SIZES, "num_classes": 4})
    other.load_state_dict(
        vision_transformer.interpolate_embeddings(image_size=32, patch_size=8, model_state=dict(model.state_dict()))
    )
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = other(pixels), ours(pixels)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def _named(name: str, size: int) -> dict[str, Tensor]:
    """A state dict of one layer and torchvision's width, of zeros."""
    model = torchvision.MODELS[name]
    with torch.device("meta"):
        module = vision_transformer.VisionTransformer(
            size, model.patch_size, 1, model.num_heads, model.hidden_dim, mlp_dim=8, num_classes=2
        )
    return {key: torch.zeros(tensor.shape) for key, tensor in module.state_dict().items()}


PRESETS = [
    (weights, name)
    for name, weights in (
        ("vit_b_16", vision_transformer.ViT_B_16_Weights),
        ("vit_b_32", vision_transformer.ViT_B_32_Weights),
        ("vit_l_16", vision_transformer.ViT_L_16_Weights),
        ("vit_l_32", vision_transformer.ViT_L_32_Weights),
        ("vit_h_14", vision_transformer.ViT_H_14_Weights),
    )
]


@pytest.mark.parametrize(("weights", "name"), [(one, name) for weights, name in PRESETS for one in weights], ids=str)
def test_heads_and_preprocessing_of_every_model_equal_torchvision(weights: Any, name: str) -> None:
    size = weights.meta["min_size"][0]
    converted = torchvision.convert(_named(name, size), f"{name}.{weights.name}")
    with torch.device("meta"):
        model = getattr(vision_transformer, name)()
    assert converted.model_kwargs["num_heads"] == model.encoder.layers[0].self_attention.num_heads
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (301, 420, 3), np.uint8))
    expected = weights.transforms()(picture)
    pixels = torch.from_numpy(prepare(picture, converted.data_config).pixels)[None]
    torch.testing.assert_close(normalise(pixels, converted.data_config)[0], expected, rtol=0, atol=1e-6)
    assert converted.notes == ()


def test_preprocessing_without_a_name_of_weights_is_the_models_own_and_said() -> None:
    converted = torchvision.convert(_named("vit_b_16", 224), "vit_b_16")
    assert converted.notes == ("images are prepared as for torchvision's vit_b_16.IMAGENET1K_V1",)
    assert converted.data_config.interpolation == "bilinear"
    assert torchvision.convert(_named("vit_b_16", 64), "vit_b_16").data_config is None


def test_refusals() -> None:
    tensors = _theirs({**SIZES, "num_classes": 2}).state_dict()
    with pytest.raises(ConversionError, match="how many heads it has is not in the file: say num_heads"):
        torchvision.convert(tensors, None)
    with pytest.raises(ConversionError, match=r"name the model vit_b_16$"):
        torchvision.convert(_named("vit_b_16", 224), None)
    with pytest.raises(ConversionError, match=r"vit_b_32 has width 768 and patches of 32 pixels, but .* 48 and 8"):
        torchvision.convert(tensors, "vit_b_32")
    with pytest.raises(ConversionError, match="num_heads is 5, which does not divide the width 48"):
        torchvision.convert(tensors, None, num_heads=5)
    with pytest.raises(ConversionError, match=r"torchvision has no weights V2 of vit_b_16, but IMAGENET1K_V1, "):
        torchvision.convert(_named("vit_b_16", 224), "vit_b_16.V2")
    with pytest.raises(ConversionError, match="takes 384 pixels, but the checkpoint 224"):
        torchvision.convert(_named("vit_b_16", 224), "vit_b_16.IMAGENET1K_SWAG_E2E_V1")
    with pytest.raises(ConversionError, match=r"holds more than the model: encoder\.extra"):
        torchvision.convert({**tensors, "encoder.extra": torch.zeros(1)}, None, num_heads=3)
    stem = {name.replace("conv_proj.", "conv_proj.conv_last."): tensor for name, tensor in tensors.items()}
    with pytest.raises(ConversionError, match="models with a convolutional stem are not known"):
        torchvision.convert(stem, None, num_heads=3)
