"""Models of other libraries as people have tried them: explained exactly, or refused with what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from open_clip.model import CLIP
from PIL import Image
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from cdam_engine import AttentionRollout, Concept, Explainer, Output, TopK
from foreign_models import SIZES, TEXT, difference, load, refusal
from reference import foreign

transformers.utils.logging.disable_progress_bar()

VISION = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 128}
PREPROCESSING = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


@pytest.fixture
def openai(tmp_path: Path) -> tuple[nn.Module, Path]:
    """A CLIP model that was trained with QuickGELU, and its state dict."""
    model = foreign.randomise(CLIP(24, vision_cfg=VISION, text_cfg=TEXT, quick_gelu=True))
    torch.save(model.state_dict(), tmp_path / "tmp.pt")
    return model, tmp_path / "tmp.pt"


# --- which GELU


def test_saved_weights_of_an_openai_model(openai: tuple[nn.Module, Path]) -> None:
    """open_clip#915: weights that were loaded as `openai`, saved and loaded again gave other probabilities."""
    model, file = openai
    assert difference(load("open_clip:ViT-B-8-quickgelu", checkpoint=file), model.encode_image) < 1e-5


def test_evaluated_with_the_other_gelu_than_trained(openai: tuple[nn.Module, Path]) -> None:
    """open_clip#771: a fine-tuned OpenAI model was evaluated with GELU, in silence, in published work. The file can't tell, so
    the two are different names, with different fingerprints: no concept of the one is used with the other."""
    model, file = openai
    right, wrong = (load(f"open_clip:ViT-B-8{suffix}", checkpoint=file) for suffix in ("-quickgelu", ""))
    assert difference(wrong, model.encode_image) > 1e-3
    assert right.fingerprint != wrong.fingerprint


def test_clip_weights_under_an_architecture_of_timms(openai: tuple[nn.Module, Path]) -> None:
    """pytorch-image-models#2031 and #1754: the features of OpenAI's weights in timm's ViT were off by as much as 1.3."""
    message = refusal("vit_base_patch16_clip_224", checkpoint=openai[1])
    assert "open_clip:ViT-B-32, or open_clip:ViT-B-32-quickgelu for OpenAI's weights" in message


# --- other constants


def test_the_norms_eps_of_transformers(tmp_path: Path) -> None:
    """transformers#18137: 1e-12 there, 1e-6 in timm. It shows where tokens hardly vary."""
    config = transformers.ViTConfig(**SIZES, intermediate_size=60, layer_norm_eps=1e-12)
    model = foreign.randomise(transformers.ViTForImageClassification(config))
    with torch.no_grad():
        for parameter in model.vit.embeddings.parameters():
            parameter.mul_(1e-4)
    model.save_pretrained(tmp_path)
    loaded = load(f"local-dir:{tmp_path}", preprocessing=PREPROCESSING)
    assert loaded.module.blocks[0].norm1.eps == 1e-12
    assert difference(loaded, lambda pixels: model(pixels).logits) < 1e-5
    for module in loaded.module.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    assert difference(loaded, lambda pixels: model(pixels).logits) > 1e-3


def test_the_norms_eps_of_open_clip(openai: tuple[nn.Module, Path]) -> None:
    """mindone#225: a port had 1e-7 in place of 1e-5, and embeddings off by a multiple."""
    loaded = load("open_clip:ViT-B-8-quickgelu", checkpoint=openai[1])
    assert {module.eps for module in loaded.module.modules() if isinstance(module, nn.LayerNorm)} == {1e-5}


# --- positions


def _dinov2(folder: Path, **config: Any) -> nn.Module:
    model = foreign.randomise(
        transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**{**SIZES, "num_labels": 4, **config}))
    )
    model.save_pretrained(folder)
    return model


def test_dinov2_positions_are_for_another_size_than_it_is_used_at(tmp_path: Path) -> None:
    """dinov2#120: 1370 positions, for 518 x 518 pixels, where images of 224 x 224 have 257."""
    model = _dinov2(tmp_path, image_size=518, patch_size=14)
    transformers.BitImageProcessorPil(size={"shortest_edge": 256}).save_pretrained(tmp_path)
    loaded = load(f"local-dir:{tmp_path}")
    assert loaded.resampled == "positions from those for 518 x 518 pixels to those for 224 x 224"
    assert loaded.module.pos_embed.shape[1] == 256
    assert difference(loaded, lambda pixels: model(pixels).logits, (224, 224)) < 1e-5


@pytest.mark.parametrize("size", [(24, 64), (64, 24), (16, 36)])
def test_dinov2_on_oblong_images(size: tuple[int, int], tmp_path: Path) -> None:
    """dinov2#333 and dino#8: resampling positions failed for images that are no squares. 16 x 36 pixels are of as many patches
    as the file has positions for, in another grid."""
    model = _dinov2(tmp_path, patch_size=8 if size != (16, 36) else 4, image_size=32 if size != (16, 36) else 24)
    loaded = load(f"local-dir:{tmp_path}", input_size=size, preprocessing=PREPROCESSING)
    assert difference(loaded, lambda pixels: model(pixels).logits, size) < 1e-5


def test_dinov2_with_registers_resamples_otherwise_than_without(tmp_path: Path) -> None:
    """transformers#35411: with registers positions are antialiased."""
    config = transformers.Dinov2WithRegistersConfig(**{**SIZES, "image_size": 56})
    model = foreign.randomise(transformers.Dinov2WithRegistersModel(config))
    model.save_pretrained(tmp_path)
    loaded = load(f"local-dir:{tmp_path}", input_size=(24, 40), preprocessing=PREPROCESSING)
    assert difference(loaded, lambda pixels: model(pixels).pooler_output, (24, 40)) < 1e-5


def test_siglip_2_with_a_grid_of_each_image(tmp_path: Path) -> None:
    """pytorch-image-models#2542 and #2543: timm's NaFlex and that of transformers resample positions in two ways."""
    config = {key: value for key, value in SIZES.items() if key != "image_size"}
    transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(**config, intermediate_size=60, num_patches=16)
    ).save_pretrained(tmp_path)
    message = refusal(f"local-dir:{tmp_path}")
    assert "model_type is siglip2_vision_model: SigLIP 2 NaFlex has no fixed patch grid" in message


# --- what can be explained of them


def test_a_vit_fine_tuned_with_transformers(tmp_path: Path) -> None:
    """pytorch-grad-cam#273: how to explain a ViT that was fine-tuned with transformers?"""
    config = transformers.ViTConfig(**SIZES, intermediate_size=60, id2label={0: "benign", 1: "malignant"})
    model = foreign.randomise(transformers.ViTForImageClassification(config))
    model.save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    loaded = load(f"local-dir:{tmp_path}")
    assert loaded.output_names == ("benign", "malignant")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 51, 3), np.uint8))
    (found,) = Explainer(loaded.module, data_config=loaded.data_config)(picture, 1).maps
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    pixels = torch.as_tensor(np.asarray(processor(picture, return_tensors="pt").pixel_values)).float()
    norm1 = model.vit.layers[-1].layernorm_before
    truth = foreign.cdam(model, norm1, lambda x: model(x).logits, pixels, torch.tensor([0.0, 1.0])).scores[0, 1:]
    np.testing.assert_allclose(found.scores.flatten(), truth, rtol=0, atol=2e-5 * float(truth.abs().max()))


def test_a_swin_of_transformers(tmp_path: Path) -> None:
    """pytorch-grad-cam#355: maps of a Swin of transformers, by a layer with the name that the ViT has."""
    config = transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2])
    transformers.SwinForImageClassification(config).save_pretrained(tmp_path)
    assert "model_type is swin: Swin merges patches on the way" in refusal(f"local-dir:{tmp_path}")


def test_an_embedding_is_no_class(openai: tuple[nn.Module, Path]) -> None:
    """pybioclip#52: the largest of an embedding's numbers was explained as the predicted class. pytorch-grad-cam#460 and #568,
    clip_playground#1: how to explain CLIP? As similarity to a vector in the projected space."""
    model, file = openai
    loaded = load("open_clip:ViT-B-8-quickgelu", checkpoint=file)
    assert loaded.output_count == 0
    explainer = Explainer(loaded.module)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for target in (TopK(1), Output(0)):
        with pytest.raises(IndexError):
            explainer.explain(pixels, [[target]])
    text = torch.randn(24, generator=torch.Generator().manual_seed(2))
    (explanation,) = explainer.explain(pixels, [[Concept(text, "cosine")]])
    norm1 = model.visual.transformer.resblocks[-1].ln_1

    def similarity(x: Tensor) -> Tensor:
        return torch.cosine_similarity(model.encode_image(x), text[None])[:, None]

    truth = foreign.cdam(model, norm1, similarity, pixels, torch.ones(1)).scores[0, 1:]
    found = explanation.maps[0].scores.flatten()
    np.testing.assert_allclose(found, truth, rtol=0, atol=2e-5 * float(truth.abs().max()))


@pytest.mark.parametrize("replace", ["heads", "heads.0", "heads.head"])
def test_a_torchvision_model_with_a_classifier_of_ones_own(replace: str, tmp_path: Path) -> None:
    """vit-explain#23: torchvision's attention keeps its weights to itself, so rollout failed; and `model.heads` was a linear
    layer, so the classifier has another name than torchvision's."""
    model = VisionTransformer(32, 8, 2, 3, 48, 60, num_classes=7)
    linear = nn.Linear(48, 2)
    model.heads = linear if replace == "heads" else nn.Sequential(linear)
    if replace == "heads.head":
        model.heads = nn.Sequential()
        model.heads.add_module("head", linear)
    model = foreign.randomise(model)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    settings = {"model_kwargs": {"num_heads": 3}, "preprocessing": PREPROCESSING}
    loaded = load("torchvision:VisionTransformer", checkpoint=tmp_path / "w.pth", **settings)
    assert loaded.output_count == 2
    assert difference(loaded, model) < 1e-5
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    (explanation,) = Explainer(loaded.module).explain(pixels, [[]], [[AttentionRollout()]])
    weights = []
    with torch.no_grad():
        x = torch.cat((model.class_token.expand(1, -1, -1), model._process_input(pixels)), dim=1)
        x = x + model.encoder.pos_embedding
        for block in model.encoder.layers:
            normalised = block.ln_1(x)
            weights.append(block.self_attention(normalised, normalised, normalised, average_attn_weights=True)[1][0])
            x = block(x)
    rolled = torch.eye(17)
    for average in weights:
        mixed = average + torch.eye(17)
        rolled = mixed / mixed.sum(-1, keepdim=True) @ rolled
    np.testing.assert_allclose(explanation.maps[0].scores.flatten(), rolled[0, 1:], rtol=0, atol=1e-6)


def test_weights_of_google_in_transformers_names(tmp_path: Path) -> None:
    """open_clip#510: how to load google/vit-large-patch32-224-in21k into a VisionTransformer? As a backbone for concepts; its
    pooler is no part of it, and that is said."""
    config = transformers.ViTConfig(**SIZES, intermediate_size=60)
    model = foreign.randomise(transformers.ViTModel(config))
    model.save_pretrained(tmp_path)
    loaded = load(f"local-dir:{tmp_path}", preprocessing=PREPROCESSING)
    assert loaded.output_count == 0
    assert difference(loaded, lambda pixels: model(pixels).last_hidden_state[:, 0]) < 1e-5
