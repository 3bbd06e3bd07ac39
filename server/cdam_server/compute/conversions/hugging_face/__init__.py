"""Checkpoints of transformers: which model types convert, and what their configurations mean.

A conversion is a function of config.json, of preprocessor_config.json and of the tensors; transformers itself is not
needed. Names of tensors are those of version 4, which most files have and version 5 still writes, or those of version
5's modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import Tensor

from cdam_engine.preprocess import Size
from cdam_server.compute.conversions.converted import Converted
from cdam_server.compute.conversions.hugging_face import beit, clip, dino, vit
from cdam_server.compute.conversions.hugging_face.common import Config, Request
from cdam_server.compute.conversions.hugging_face.preprocessor import data_config
from cdam_server.compute.conversions.tensors import ConversionError, Tensors

__all__ = ["MODEL_TYPES", "ModelType", "check_type", "convert"]


@dataclass(frozen=True)
class ModelType:
    """A `model_type` of config.json.

    Attributes:
        classes: Those of transformers' that convert; the first is the bare model.
        defaults: What transformers' configuration has where the file says nothing.
        renamings: See `Tensors`.
        convert: The conversion.
        tower: Whether the image tower's configuration is in `vision_config`.
    """

    classes: tuple[str, ...]
    defaults: Mapping[str, Any]
    renamings: Sequence[tuple[str, str]]
    convert: Callable[[Request], Converted]
    tower: bool = False


_BASE: Final = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224}
_VIT: Final = {
    **_BASE,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "patch_size": 16,
}
_BEIT: Final = {
    **_VIT,
    "use_absolute_position_embeddings": False,
    "use_relative_position_bias": False,
    "use_shared_relative_position_bias": False,
    "layer_scale_init_value": 0.1,
    "use_mean_pooling": True,
}
_DINOV2: Final = {**_BASE, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "patch_size": 14, "use_swiglu_ffn": False}
_DINOV3: Final = {
    **_VIT,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_attention_heads": 6,
    "layer_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "use_gated_mlp": False,
    "num_register_tokens": 0,
}
_CLIP: Final = {**_VIT, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "patch_size": 32}
_SIGLIP: Final = {**_VIT, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vision_use_head": True}

MODEL_TYPES: Final[Mapping[str, ModelType]] = {
    "vit": ModelType(("ViTModel", "ViTForImageClassification"), _VIT, vit.RENAMINGS, vit.convert),
    "deit": ModelType(
        ("DeiTModel", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"),
        _VIT,
        vit.RENAMINGS,
        vit.convert,
    ),
    "beit": ModelType(("BeitModel", "BeitForImageClassification"), _BEIT, beit.RENAMINGS, beit.convert),
    "dinov2": ModelType(("Dinov2Model", "Dinov2ForImageClassification"), _DINOV2, dino.V2_RENAMINGS, dino.convert_v2),
    "dinov2_with_registers": ModelType(
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"),
        {**_DINOV2, "patch_size": 16, "num_register_tokens": 4},
        dino.V2_RENAMINGS,
        dino.convert_v2,
    ),
    "dinov3_vit": ModelType(("DINOv3ViTModel",), _DINOV3, dino.V3_RENAMINGS, dino.convert_v3),
    "clip": ModelType(
        ("CLIPModel", "CLIPForImageClassification"), _CLIP, clip.RENAMINGS, clip.convert_clip, tower=True
    ),
    "clip_vision_model": ModelType(
        ("CLIPVisionModel", "CLIPVisionModelWithProjection"), _CLIP, clip.RENAMINGS, clip.convert_clip
    ),
    "siglip": ModelType(
        ("SiglipModel", "SiglipForImageClassification"), _SIGLIP, clip.RENAMINGS, clip.convert_siglip, tower=True
    ),
    "siglip_vision_model": ModelType(("SiglipVisionModel",), _SIGLIP, clip.RENAMINGS, clip.convert_siglip),
}

# Types that people will try, and why they are not served.
_REFUSED: Final = {
    "siglip2": "SigLIP 2 NaFlex has no fixed patch grid: it follows each image's aspect ratio",
    "siglip2_vision_model": "SigLIP 2 NaFlex has no fixed patch grid: it follows each image's aspect ratio",
    "vit_mae": "ViTMAE hides random patches, and what it answers is their pixels",
    "swin": "Swin merges patches on the way and has no last attention over all of them",
    "swinv2": "Swin merges patches on the way and has no last attention over all of them",
    "convnext": "ConvNeXt is no Vision Transformer",
    "convnextv2": "ConvNeXt is no Vision Transformer",
    "dinov3_convnext": "ConvNeXt is no Vision Transformer",
    "resnet": "ResNet is no Vision Transformer",
    "timm_wrapper": "it is timm's own, in transformers' wrapper: name it as hf-hub:... with timm's config.json",
}


def convert(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    processor: Mapping[str, Any] | None = None,
    input_size: Size | None = None,
    *,
    keeps_classifier: bool = True,
) -> Converted:
    """A checkpoint of transformers as timm has it.

    Args:
        config: Of config.json.
        tensors: As saved.
        processor: Of preprocessor_config.json, or None.
        input_size: (height, width) in pixels, if not the processor's. Positions are resampled as transformers does it.
        keeps_classifier: Whether the classifier is wanted; the latent is what it reads in either case.

    Raises:
        ConversionError: Timm has no equal model, or the files contradict each other.
    """
    kind, model_class = _kind(config)
    vision = _vision_config(config, kind) if kind.tower else config
    own = Config({**kind.defaults, **{key: value for key, value in vision.items() if value is not None}})
    prepared = None if processor is None else data_config(processor, own.pair("patch_size"))
    named = Tensors(tensors, kind.renamings)
    request = Request(
        model_class,
        own,
        Config(config) if kind.tower else own,
        named,
        prepared,
        input_size,
        classifies=named.has(r"(cls_|distillation_)?classifier\."),
        keeps_classifier=keeps_classifier,
    )
    converted = kind.convert(request)
    request.tensors.check_all_used()
    return replace(converted, notes=(*converted.notes, *request.tensors.left_out))


def check_type(config: Mapping[str, Any]) -> None:
    """Refuses a config.json of a model that no conversion knows.

    Raises:
        ConversionError: With the reason.
    """
    _kind(config)


def _kind(config: Mapping[str, Any]) -> tuple[ModelType, str]:
    """The model type, and transformers' class."""
    name = str(config.get("model_type"))
    if name in _REFUSED:
        raise ConversionError(f"model_type is {name}: {_REFUSED[name]}")
    if name not in MODEL_TYPES:
        raise ConversionError(f"model_type is {name}; those that convert are {', '.join(MODEL_TYPES)}")
    kind = MODEL_TYPES[name]
    classes = config.get("architectures") or [kind.classes[0]]
    if classes[0] not in kind.classes:
        raise ConversionError(f"architectures names {classes[0]}; of {name} there are {', '.join(kind.classes)}")
    return kind, classes[0]


def _vision_config(config: Mapping[str, Any], kind: ModelType) -> Mapping[str, Any]:
    """The image tower's; old files keep what differs from the defaults in `vision_config_dict`, which goes first."""
    vision = config.get("vision_config") or {}
    old = config.get("vision_config_dict")
    return vision if old is None else {**vision, **kind.defaults, **old}
