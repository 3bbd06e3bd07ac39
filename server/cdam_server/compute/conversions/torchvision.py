"""Checkpoints of torchvision's Vision Transformers.

Their tensors don't say how many heads there are; the name of the model does. Nor do they say how images were prepared:
the name of the weights does (``vit_b_16.IMAGENET1K_SWAG_LINEAR_V1``), and without one it is torchvision's own preset
for the model and its input size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import Tensor

from cdam_engine.preprocess import DataConfig, Size
from cdam_server.compute.conversions.converted import Converted
from cdam_server.compute.conversions.layers import (
    NOT_LINEAR,
    crop_fraction,
    mlp_ratio,
    put,
    resample_positions,
    resampled,
    with_bias,
)
from cdam_server.compute.conversions.readouts import HiddenLayer, Readout
from cdam_server.compute.conversions.tensors import ConversionError, StateDict, Tensors

SIGNATURE: Final = ("class_token", "conv_proj.weight", "encoder.pos_embedding")
"""Tensors that only torchvision's have."""

_LAYERS: Final = r"encoder\.layers\.encoder_layer_(\d+)\."
# In older versions of torchvision the two layers of an MLP had names.
_RENAMINGS: Final = ((r"\.mlp\.linear_1\.", ".mlp.0."), (r"\.mlp\.linear_2\.", ".mlp.3."))
_EPS: Final = 1e-6
_MEAN: Final = (0.485, 0.456, 0.406)
_STD: Final = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Model:
    """One of torchvision's models.

    Attributes:
        patch_size: In pixels.
        hidden_dim: Width.
        num_heads: In every block.
        weights: The presets of its weights: input size, resized size, filter. The first of an input size is its
            default.
    """

    patch_size: int
    hidden_dim: int
    num_heads: int
    weights: Mapping[str, tuple[int, int, str]]


_V1: Final = (224, 256, "bilinear")
_LINEAR: Final = (224, 224, "bicubic")
MODELS: Final[Mapping[str, Model]] = {
    "vit_b_16": Model(
        16,
        768,
        12,
        {
            "IMAGENET1K_V1": _V1,
            "IMAGENET1K_SWAG_E2E_V1": (384, 384, "bicubic"),
            "IMAGENET1K_SWAG_LINEAR_V1": _LINEAR,
        },
    ),
    "vit_b_32": Model(32, 768, 12, {"IMAGENET1K_V1": _V1}),
    "vit_l_16": Model(
        16,
        1024,
        16,
        {
            "IMAGENET1K_V1": (224, 242, "bilinear"),
            "IMAGENET1K_SWAG_E2E_V1": (512, 512, "bicubic"),
            "IMAGENET1K_SWAG_LINEAR_V1": _LINEAR,
        },
    ),
    "vit_l_32": Model(32, 1024, 16, {"IMAGENET1K_V1": _V1}),
    "vit_h_14": Model(
        14,
        1280,
        16,
        {"IMAGENET1K_SWAG_E2E_V1": (518, 518, "bicubic"), "IMAGENET1K_SWAG_LINEAR_V1": _LINEAR},
    ),
}


def is_name(name: str) -> bool:
    """Whether this is a model of torchvision's, with or without the name of its weights."""
    return name.partition(".")[0] in MODELS


def recognise(names: Iterable[str]) -> bool:
    """Whether tensors of these names are those of torchvision's Vision Transformers."""
    return set(SIGNATURE) <= set(names)


def convert(
    tensors: Mapping[str, Tensor],
    name: str | None,
    *,
    num_heads: int | None = None,
    input_size: Size | None = None,
    keeps_classifier: bool = True,
) -> Converted:
    """A state dict of torchvision's VisionTransformer as timm has it.

    Args:
        tensors: As torchvision names them.
        name: Of the model, maybe with that of its weights; None for a VisionTransformer of other sizes.
        num_heads: In every block; needed without a name.
        input_size: (height, width) in pixels, if not that of the positions, which are then resampled.
        keeps_classifier: Whether the classifier is wanted.

    Raises:
        ConversionError: Not what torchvision saves, not the model of this name, or the number of heads is not known.
    """
    source = Tensors(tensors, _RENAMINGS)
    if "conv_proj.weight" not in source:
        raise ConversionError("conv_proj.weight is missing: models with a convolutional stem are not known here")
    width, patch = source.size("conv_proj.weight", 0), source.size("conv_proj.weight", 2)
    heads = _heads(name, width, patch, num_heads)
    positions = source.take("encoder.pos_embedding")
    side = math.isqrt(positions.shape[1] - 1)
    own = (side * patch, side * patch)
    size = input_size or own
    if size[0] % patch or size[1] % patch:
        raise ConversionError(f"input_size: {size[0]} x {size[1]} pixels is no multiple of the patch size {patch}")
    grid = (size[0] // patch, size[1] // patch)
    weights: StateDict = {
        "cls_token": source.take("class_token"),
        "pos_embed": resample_positions(positions, 1, (side, side), grid, align_corners=True),
    }
    put(weights, "patch_embed.proj", source.take_layer("conv_proj"))
    depth = source.count(_LAYERS)
    for index in range(depth):
        _block(weights, source, f"encoder.layers.encoder_layer_{index}", f"blocks.{index}")
    put(weights, "norm", source.take_layer("encoder.ln"))
    readout: Readout | None = None
    if "heads.pre_logits.weight" in source:
        put(weights, "fc_norm.0", source.take_layer("heads.pre_logits"))
        readout = HiddenLayer(len(weights["fc_norm.0.weight"]))
    put(weights, "head", _classifier(source, keeps=keeps_classifier))
    source.check_all_used()
    data_config, note = _preset(name, own)
    return Converted(
        source=f"torchvision:{name or 'VisionTransformer'}",
        architecture="vit_base_patch16_224",
        model_kwargs={
            "img_size": list(size),
            "patch_size": patch,
            "embed_dim": width,
            "depth": depth,
            "num_heads": heads,
            "mlp_ratio": mlp_ratio(len(weights["blocks.0.mlp.fc1.weight"]), width),
            "num_classes": len(weights.get("head.weight", ())),
        },
        norm_eps=_EPS,
        weights=weights,
        readout=readout,
        data_config=None if data_config is None else replace(data_config, input_size=size),
        notes=note,
        resampled=resampled(own, size),
    )


def _classifier(source: Tensors, *, keeps: bool) -> StateDict:
    """The last layer's weight and bias; fine-tuning code puts its own in the place of the head, or of all heads.

    Raises:
        ConversionError: It is not one linear layer.
    """
    if not keeps:
        source.leave_out(r"heads\.", "the classifier, for which another or none is asked")
    layer: StateDict = {}
    name = next((name for name in ("heads.head", "heads", "heads.0") if f"{name}.weight" in source), None)
    if name is not None:
        layer = with_bias(source.take_layer(name))
    source.refuse(r"heads\.", NOT_LINEAR)
    return layer


def _heads(name: str | None, width: int, patch: int, num_heads: int | None) -> int:
    """How many heads there are."""
    if name is None:
        if num_heads is None:
            raise ConversionError(_ask_for_heads(width, patch))
        if width % num_heads:
            raise ConversionError(f"num_heads is {num_heads}, which does not divide the width {width}")
        return num_heads
    model = MODELS[name.partition(".")[0]]
    if (width, patch) != (model.hidden_dim, model.patch_size):
        raise ConversionError(
            f"{name} has width {model.hidden_dim} and patches of {model.patch_size} pixels, but the checkpoint has "
            f"{width} and {patch}"
        )
    if num_heads not in {None, model.num_heads}:
        raise ConversionError(f"num_heads is {num_heads}, but {name} has {model.num_heads}")
    return model.num_heads


def _ask_for_heads(width: int, patch: int) -> str:
    """Who must say what."""
    fitting = [name for name, model in MODELS.items() if (model.hidden_dim, model.patch_size) == (width, patch)]
    what = f"these are weights of torchvision's VisionTransformer, of width {width} and patches of {patch} pixels"
    if fitting:
        return f"{what}: name the model {fitting[0]}"
    return f"{what}; how many heads it has is not in the file: say num_heads in model_kwargs"


def _preset(name: str | None, own: Size) -> tuple[DataConfig | None, tuple[str, ...]]:
    """Torchvision's preprocessing for a model's weights, and how it was found."""
    if name is None:
        return None, ()
    model, _, tag = name.partition(".")
    presets = MODELS[model].weights
    if tag and tag not in presets:
        raise ConversionError(f"torchvision has no weights {tag} of {model}, but {', '.join(presets)}")
    fitting = [preset for preset, (size, *_) in presets.items() if (size, size) == own]
    if tag and tag not in fitting:
        raise ConversionError(f"{name} takes {presets[tag][0]} pixels, but the checkpoint {own[0]}")
    if not fitting:
        return None, ()
    chosen = tag or fitting[0]
    _, resized, interpolation = presets[chosen]
    note = () if tag else (f"images are prepared as for torchvision's {model}.{chosen}",)
    return DataConfig(own, _MEAN, _STD, interpolation, crop_fraction(own, (resized, resized)), "center"), note


def _block(weights: StateDict, tensors: Tensors, source: str, target: str) -> None:
    put(weights, f"{target}.norm1", tensors.take_layer(f"{source}.ln_1"))
    attention: dict[str, Any] = {part: tensors.take(f"{source}.self_attention.in_proj_{part}") for part in _PARTS}
    put(weights, f"{target}.attn.qkv", attention)
    put(weights, f"{target}.attn.proj", tensors.take_layer(f"{source}.self_attention.out_proj"))
    put(weights, f"{target}.norm2", tensors.take_layer(f"{source}.ln_2"))
    for theirs, ours in (("0", "fc1"), ("3", "fc2")):
        put(weights, f"{target}.mlp.{ours}", tensors.take_layer(f"{source}.mlp.{theirs}"))


_PARTS: Final = ("weight", "bias")
