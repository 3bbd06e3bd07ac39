"""Small models of transformers, one of each class and kind that converts, saved and converted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from cdam_server.compute.conversions.converted import Converted
from cdam_server.compute.conversions.folder import read
from cdam_server.compute.conversions.hugging_face import convert
from reference import foreign

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
MLP = {**SIZES, "intermediate_size": 100}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
LABELS = {"id2label": {0: "cat", 1: "dog", 2: "cat", 3: "owl", 4: "fox"}, "label2id": {}}


@dataclass(frozen=True, eq=False)
class Case:
    """One class of transformers' with one configuration.

    Attributes:
        id: What the tests call it.
        model_class: The class.
        config_class: Of its configuration.
        config: The arguments of the latter.
        norm1: Path of the last block's first LayerNorm.
        prefix: How many prefix tokens there are.
        answer: From the module's output to logits or embedding.
        size: The input, if not the configuration's.
        tolerance: In double precision.
    """

    id: str
    model_class: str
    config_class: str
    config: dict[str, Any]
    norm1: str
    prefix: int = 1
    answer: Callable[[Any], Tensor] = lambda out: out.logits
    size: tuple[int, int] = (32, 32)
    tolerance: float = 1e-10


def _cls(out: Any) -> Tensor:
    return out.last_hidden_state[:, 0]


def _pooled(out: Any) -> Tensor:
    return out.pooler_output


VIT_NORM, DINO_NORM, CLIP_NORM = "layers.{}.layernorm_before", "encoder.layer.{}.norm1", "encoder.layers.{}.layer_norm1"
ROPE = 1e-5  # of rotary positions, which both libraries compute in float32
BEIT_RELATIVE = {"use_relative_position_bias": True}
GATED = {"use_swiglu_ffn": True}

CASES = (
    Case("vit", "ViTForImageClassification", "ViTConfig", {**MLP, **LABELS}, "vit." + VIT_NORM),
    Case("vit_bare", "ViTModel", "ViTConfig", MLP, VIT_NORM, answer=_cls),
    Case(
        "vit_deep_oblong",
        "ViTForImageClassification",
        "ViTConfig",
        {**MLP, "num_hidden_layers": 4, "hidden_size": 40, "num_attention_heads": 5, "image_size": [32, 48], **LABELS},
        "vit." + VIT_NORM,
        size=(32, 48),
    ),
    Case(
        "vit_no_bias_one_layer",
        "ViTForImageClassification",
        "ViTConfig",
        {**MLP, "num_hidden_layers": 1, "qkv_bias": False, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-2},
        "vit." + VIT_NORM,
    ),
    Case("deit", "DeiTForImageClassification", "DeiTConfig", {**MLP, **LABELS}, "deit." + VIT_NORM, prefix=2),
    Case(
        "deit_distilled",
        "DeiTForImageClassificationWithTeacher",
        "DeiTConfig",
        {**MLP, **LABELS},
        "deit." + VIT_NORM,
        prefix=2,
    ),
    Case("deit_bare", "DeiTModel", "DeiTConfig", MLP, VIT_NORM, prefix=2, answer=_cls),
    Case("beit", "BeitForImageClassification", "BeitConfig", {**MLP, **BEIT_RELATIVE, **LABELS}, "beit." + VIT_NORM),
    Case(
        "beit_shared_positions",
        "BeitForImageClassification",
        "BeitConfig",
        {**MLP, "use_shared_relative_position_bias": True, "layer_scale_init_value": 0.0, "use_mask_token": True},
        "beit." + VIT_NORM,
    ),
    Case(
        "beit_class_token",
        "BeitForImageClassification",
        "BeitConfig",
        {**MLP, "use_absolute_position_embeddings": True, "use_mean_pooling": False, **LABELS},
        "beit." + VIT_NORM,
    ),
    Case(
        "beit_resampled",
        "BeitForImageClassification",
        "BeitConfig",
        {**MLP, "image_size": 56, "use_absolute_position_embeddings": True, **LABELS},
        "beit." + VIT_NORM,
        size=(40, 24),
        tolerance=1e-6,
    ),
    Case("beit_bare", "BeitModel", "BeitConfig", {**MLP, **BEIT_RELATIVE}, VIT_NORM, answer=_pooled),
    Case("dinov2", "Dinov2ForImageClassification", "Dinov2Config", {**SIZES, **LABELS}, "dinov2." + DINO_NORM),
    Case("dinov2_bare", "Dinov2Model", "Dinov2Config", SIZES, DINO_NORM, answer=_pooled),
    Case(
        "dinov2_resampled",
        "Dinov2ForImageClassification",
        "Dinov2Config",
        {**SIZES, "image_size": 56, **LABELS},
        "dinov2." + DINO_NORM,
        size=(40, 24),
        tolerance=1e-6,  # both resample in float32
    ),
    Case("dinov2_gated", "Dinov2Model", "Dinov2Config", {**SIZES, **GATED}, DINO_NORM, answer=_pooled),
    Case(
        "dinov2_registers",
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        {**SIZES, **GATED, **LABELS},
        "dinov2_with_registers." + DINO_NORM,
        prefix=5,
    ),
    Case(
        "dinov2_registers_resampled",
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {**SIZES, "image_size": 56, "num_register_tokens": 2},
        DINO_NORM,
        prefix=3,
        answer=_pooled,
        size=(24, 40),
        tolerance=1e-6,
    ),
    Case(
        "dinov3",
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**MLP, "num_register_tokens": 4},
        "model.layer.{}.norm1",
        prefix=5,
        answer=_pooled,
        tolerance=ROPE,
    ),
    Case(
        "dinov3_gated_oblong",
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {
            **MLP,
            "use_gated_mlp": True,
            "hidden_act": "silu",
            "mlp_bias": False,
            "query_bias": False,
            "rope_theta": 50.0,
        },
        "model.layer.{}.norm1",
        answer=_pooled,
        size=(24, 40),
        tolerance=ROPE,
    ),
    Case("clip_tower", "CLIPVisionModel", "CLIPVisionConfig", MLP, CLIP_NORM, answer=_pooled),
    Case(
        "clip_projected",
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        {**MLP, "projection_dim": 20, "hidden_act": "gelu"},
        "vision_model." + CLIP_NORM,
        answer=lambda out: out.image_embeds,
    ),
    Case(
        "clip",
        "CLIPModel",
        "CLIPConfig",
        {"vision_config": MLP, "text_config": TEXT, "projection_dim": 24},
        "vision_model." + CLIP_NORM,
        answer=lambda out: out,
    ),
    Case(
        "clip_classifier",
        "CLIPForImageClassification",
        "CLIPConfig",
        {"vision_config": MLP, "text_config": TEXT, **LABELS},
        "vision_model." + CLIP_NORM,
    ),
    Case("siglip_tower", "SiglipVisionModel", "SiglipVisionConfig", MLP, CLIP_NORM, prefix=0, answer=_pooled),
    Case(
        "siglip",
        "SiglipModel",
        "SiglipConfig",
        {"vision_config": {**MLP, "num_hidden_layers": 3}, "text_config": {**TEXT, "projection_size": 48}},
        "vision_model." + CLIP_NORM,
        prefix=0,
        answer=lambda out: out,
    ),
    Case(
        "siglip_classifier",
        "SiglipForImageClassification",
        "SiglipConfig",
        {"vision_config": MLP, "text_config": {**TEXT, "projection_size": 48}, **LABELS},
        "vision_model." + CLIP_NORM,
        prefix=0,
    ),
)
BY_ID = {case.id: case for case in CASES}


def theirs(case: Case, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Their module, with random weights."""
    config = getattr(transformers, case.config_class)(**case.config)
    return foreign.randomise(getattr(transformers, case.model_class)(config).to(dtype))


def ours(folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Converted, nn.Module]:
    """What was saved, converted and built."""
    files = read(folder)
    converted = convert(files.config, files.tensors, files.processor, **more)
    model = converted.build().to(dtype)
    model.load_state_dict(converted.weights)  # in the dtype in which it was saved
    return converted, model.eval()
