"""Image towers of open_clip, and of OpenAI's CLIP, whose tensors have the same names.

The tensors don't say how many heads there are, nor which GELU was trained with: OpenAI's weights want QuickGELU, most
others do not, and the wrong one gives plausible, wrong answers. open_clip_config.json says it, or the name of the model
in open_clip; without either nothing is converted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import timm
import torch
from torch import Tensor

from cdam_engine.preprocess import DataConfig, Size
from cdam_server.compute.conversions.converted import Converted, TextSide
from cdam_server.compute.conversions.layers import crop_fraction, mlp_ratio, put, resample_positions, resampled
from cdam_server.compute.conversions.readouts import Projection, Readout
from cdam_server.compute.conversions.tensors import ConversionError, StateDict, Tensors

_LAYERS: Final = r"visual\.transformer\.resblocks\.(\d+)\."
_TEXT: Final = r"(text|transformer|token_embedding|ln_final|text_projection|positional_embedding|attn_mask)(\.|$)"
_OPENAI: Final = r"(input_resolution|context_length|vocab_size)$"
_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
_STD: Final = (0.26862954, 0.26130258, 0.27577711)
# What a vision_cfg may hold beside sizes, which the tensors have too, and what is for training.
_KNOWN: Final = {
    "act_kwargs",
    "final_ln_after_pool",
    "head_width",
    "image_size",
    "layers",
    "ls_init_value",
    "mlp_ratio",
    "no_ln_pre",
    "norm_kwargs",
    "output_tokens",
    "patch_dropout",
    "patch_size",
    "pool_type",
    "pos_embed_type",
    "width",
}
_HEAD_WIDTHS: Final = {"S": 64, "M": 64, "B": 64, "L": 64, "H": 80, "g": 88, "bigG": 104, "e": 112}
_VIT: Final = r"ViT-(S|M|B|L|H|g|bigG|e)-(\d+)((?:-(?:alt|plus|worldwide|\d+))*)(-CLIPA)?((?:-\d+)?)(-quickgelu)?"
_SIGLIP: Final = r"ViT-(B|L|SO400M|gopt)-(\d+)-SigLIP2?(?:-i18n)?(?:-(\d+))?"
_SIGLIP_SIZES: Final = {"B": "base", "L": "large", "SO400M": "so400m", "gopt": "giantopt"}


@dataclass(frozen=True)
class Description:
    """What the tensors don't say.

    Attributes:
        name: For people.
        model: `model_cfg` of open_clip_config.json.
        preprocessing: `preprocess_cfg` of the same, or what the name stands for.
        said: Whether `preprocessing` comes from a file, or is open_clip's own for a file of weights.
    """

    name: str
    model: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    said: bool

    @classmethod
    def from_config(cls, content: Mapping[str, Any]) -> Description:
        """From the content of open_clip_config.json.

        Raises:
            ConversionError: It is something else.
        """
        model = content.get("model_cfg")
        if not isinstance(model, Mapping) or not isinstance(model.get("vision_cfg"), Mapping):
            raise ConversionError("open_clip_config.json has no model_cfg with a vision_cfg")
        return cls("CLIP", model, content.get("preprocess_cfg") or {}, said="preprocess_cfg" in content)

    @classmethod
    def from_name(cls, name: str) -> Description:
        """From a model's name in open_clip.

        Raises:
            ConversionError: The name is not known here.
        """
        if found := re.fullmatch(_VIT, name):
            clipa = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True} if found[4] else {}
            vision = {"head_width": _HEAD_WIDTHS[found[1]], "patch_size": int(found[2]), **clipa}
            return cls(name, {"vision_cfg": vision, "quick_gelu": bool(found[6])}, {}, said=False)
        if found := re.fullmatch(_SIGLIP, name):
            tower = f"vit_{_SIGLIP_SIZES[found[1]]}_patch{found[2]}_siglip_{found[3] or 224}"
            vision = {"timm_model_name": tower, "timm_pool": "map", "timm_proj": "none"}
            half = [0.5, 0.5, 0.5]
            return cls(name, {"vision_cfg": vision}, {"mean": half, "std": half, "resize_mode": "squash"}, said=False)
        raise ConversionError(
            f"open_clip's {name} is not known here; known are ViT-B-32, ViT-B-32-quickgelu, ViT-B-16-SigLIP and the "
            "like; for others give a folder with open_clip_config.json"
        )


def recognise(names: Iterable[str]) -> bool:
    """Whether tensors of these names are those of a CLIP model, as OpenAI and open_clip name them."""
    return bool({"visual.conv1.weight", "visual.trunk.patch_embed.proj.weight"} & set(names))


def convert(
    tensors: Mapping[str, Tensor], description: Description | None, input_size: Size | None = None
) -> Converted:
    """The image tower of a CLIP model as timm has it; the latent is the image embedding, not normalised.

    Args:
        tensors: As open_clip names them.
        description: What they don't say; None: nobody said it.
        input_size: (height, width) in pixels, if not that of the positions, which are then resampled.

    Raises:
        ConversionError: Not what open_clip saves, not what is described, or timm has no equal.
    """
    if description is None:
        raise ConversionError(
            "these are weights of a CLIP model, and the file does not say whether it was trained with QuickGELU, as "
            "OpenAI's were: name the model as in open_clip, such as open_clip:ViT-B-32 or open_clip:ViT-B-32-quickgelu"
        )
    source = Tensors(tensors)
    text = _text_side(source)
    vision = description.model["vision_cfg"]
    if vision.get("timm_model_name"):
        converted = _timm_tower(source, description, input_size)
    else:
        converted = _tower(source, description, input_size)
    source.check_all_used()
    return replace(converted, text=text, notes=(*converted.notes, *source.left_out))


def _tower(source: Tensors, description: Description, input_size: Size | None) -> Converted:
    vision = description.model["vision_cfg"]
    _check(source, vision)
    width, patch = source.size("visual.conv1.weight", 0), source.size("visual.conv1.weight", 2)
    if patch != vision.get("patch_size", patch):
        raise ConversionError(
            f"{description.name} has patches of {vision['patch_size']} pixels, the checkpoint {patch}"
        )
    if width % (head_width := int(vision.get("head_width", 64))):
        raise ConversionError(f"head_width is {head_width}, which does not divide the width {width}")
    positions = source.take("visual.positional_embedding")[None]
    side = math.isqrt(positions.shape[1] - 1)
    own = (side * patch, side * patch)
    size = input_size or own
    if size[0] % patch or size[1] % patch:
        raise ConversionError(f"input_size: {size[0]} x {size[1]} pixels is no multiple of the patch size {patch}")
    grid = (size[0] // patch, size[1] // patch)
    weights: StateDict = {
        "cls_token": source.take("visual.class_embedding")[None, None],
        # open_clip resamples with antialiasing when it loads a checkpoint into another size.
        "pos_embed": resample_positions(positions, 1, (side, side), grid, antialias=True),
        "patch_embed.proj.weight": source.take("visual.conv1.weight"),
    }
    pre_norm = not vision.get("no_ln_pre")
    if pre_norm:
        put(weights, "norm_pre", source.take_layer("visual.ln_pre"))
    else:  # timm's patch embedding has a bias where no norm follows it
        weights["patch_embed.proj.bias"] = torch.zeros(width)
    depth = source.count(_LAYERS)
    for index in range(depth):
        _block(weights, source, f"visual.transformer.resblocks.{index}", f"blocks.{index}")
    averages, late = vision.get("pool_type", "tok") == "avg", bool(vision.get("final_ln_after_pool"))
    put(weights, "fc_norm.0" if late else "norm", source.take_layer("visual.ln_post"))
    weights["fc_norm.1.weight" if late else "fc_norm.weight"] = source.take("visual.proj").T.contiguous()
    act_layer, eps = _act_and_eps(description.model)
    config, notes = _preprocessing(description, size)
    return Converted(
        source=f"open_clip:{description.name}",
        architecture="vit_base_patch16_224",
        model_kwargs={
            "img_size": list(size),
            "patch_size": patch,
            "embed_dim": width,
            "depth": depth,
            "num_heads": width // head_width,
            "mlp_ratio": mlp_ratio(len(weights["blocks.0.mlp.fc1.weight"]), width),
            "act_layer": act_layer,
            "pre_norm": pre_norm,
            "global_pool": "avg" if averages else "token",
            "fc_norm": late,
            "num_classes": 0,
            **({"init_values": 1.0} if "blocks.0.ls1.gamma" in weights else {}),
        },
        norm_eps=eps,
        weights=weights,
        readout=Projection(_rows(weights, late=late)),
        data_config=config,
        notes=notes,
        resampled=resampled(own, size),
    )


def _rows(weights: StateDict, *, late: bool) -> int:
    return len(weights["fc_norm.1.weight" if late else "fc_norm.weight"])


def _check(source: Tensors, vision: Mapping[str, Any]) -> None:
    """Refuses towers that timm has no equal of."""
    if "visual.conv1.weight" not in source:
        raise ConversionError("visual.conv1.weight is missing: this is no image tower of open_clip's own")
    if isinstance(vision.get("layers"), list | tuple) or "visual.layer1.0.conv1.weight" in source:
        raise ConversionError("the image tower is a ResNet, no Vision Transformer")
    if extra := sorted(key for key, value in vision.items() if value and key not in _KNOWN):
        raise ConversionError(f"vision_cfg has {', '.join(extra)}, which timm has no equal of")
    if (pool := vision.get("pool_type", "tok")) not in {"tok", "avg"}:
        raise ConversionError(f"vision_cfg: pool_type is {pool!r}; known are tok and avg")


def _act_and_eps(model: Mapping[str, Any]) -> tuple[str, float]:
    """Timm's name of the activation, and the norms' eps."""
    vision = model["vision_cfg"]
    act, norm = dict(vision.get("act_kwargs") or {}), dict(vision.get("norm_kwargs") or {})
    approximate = act.pop("approximate", "none")
    eps = float(norm.pop("eps", 1e-5))
    if act or norm or approximate not in {"none", "tanh"} or (approximate == "tanh" and model.get("quick_gelu")):
        raise ConversionError("vision_cfg: act_kwargs or norm_kwargs hold what timm has no equal of")
    if model.get("quick_gelu"):
        return "quick_gelu", eps
    return ("gelu_tanh" if approximate == "tanh" else "gelu"), eps


def _block(weights: StateDict, tensors: Tensors, source: str, target: str) -> None:
    put(weights, f"{target}.norm1", tensors.take_layer(f"{source}.ln_1"))
    for part in ("weight", "bias"):
        weights[f"{target}.attn.qkv.{part}"] = tensors.take(f"{source}.attn.in_proj_{part}")
    put(weights, f"{target}.attn.proj", tensors.take_layer(f"{source}.attn.out_proj"))
    put(weights, f"{target}.norm2", tensors.take_layer(f"{source}.ln_2"))
    for theirs, ours in (("c_fc", "fc1"), ("c_proj", "fc2")):
        put(weights, f"{target}.mlp.{ours}", tensors.take_layer(f"{source}.mlp.{theirs}"))
    for branch in ("1", "2"):
        if f"{source}.ls_{branch}.gamma" in tensors:
            weights[f"{target}.ls{branch}.gamma"] = tensors.take(f"{source}.ls_{branch}.gamma")


def _timm_tower(source: Tensors, description: Description, input_size: Size | None) -> Converted:
    """A tower that is timm's already, under `visual.trunk`, with or without a projection behind it."""
    vision = description.model["vision_cfg"]
    name, pool, projection = str(vision["timm_model_name"]), vision.get("timm_pool", "avg"), vision.get("timm_proj")
    if not timm.is_model(name):
        raise ConversionError(f"timm_model_name is {name}, which timm {timm.__version__} does not have")
    projection = "linear" if "timm_proj" not in vision else projection
    if pool in {"abs_attn", "rot_attn"} or projection not in {None, "", "none", "linear"}:
        raise ConversionError(f"timm_pool is {pool!r} and timm_proj {projection!r}, which timm alone has no equal of")
    with torch.device("meta"):  # only to ask for its size and its norm
        model: Any = timm.create_model(name, num_classes=0, **({"global_pool": pool} if pool else {}))
    if not hasattr(model, "fc_norm") or not hasattr(model, "blocks"):
        raise ConversionError(f"{name} is no Vision Transformer that can be served")
    own, patch = tuple(model.patch_embed.img_size), model.patch_embed.patch_size
    # Patches leave out the last pixels of an input that is no multiple of them (384 / 14): so it is served without.
    size = (own[0] - own[0] % patch[0], own[1] - own[1] % patch[1])
    if input_size not in {None, size}:
        raise ConversionError(f"input_size: {name} takes {size[0]} x {size[1]} pixels only")
    head = "visual.head.proj" if projection == "linear" else "visual.trunk.head"
    late = not isinstance(model.fc_norm, torch.nn.Identity)
    readout: Readout | None = None
    weights: StateDict = {}
    if projection != "none":
        layer = source.take_layer(head)
        put(weights, "fc_norm.1" if late else "fc_norm", layer)
        readout = Projection(len(layer["weight"]), bias="bias" in layer)
    for tensor in model.state_dict():
        renamed = tensor.replace("fc_norm.", "fc_norm.0.", 1) if readout is not None else tensor
        weights[renamed if tensor.startswith("fc_norm.") else tensor] = source.take(f"visual.trunk.{tensor}")
    config, notes = _preprocessing(description, (own[0], own[1]))
    if size != own:
        if config.crop_mode != "squash":
            raise ConversionError(f"{own[0]} x {own[1]} pixels is no multiple of the patch size {patch[0]}")
        config = replace(
            config, input_size=size, crop_pct=crop_fraction(size, (own[0], own[1])), crop_mode="squash_top_left"
        )
    return Converted(
        source=f"open_clip:{description.name}",
        architecture=name,
        model_kwargs={"img_size": list(size), "num_classes": 0, **({"global_pool": pool} if pool else {})},
        norm_eps=None,
        weights=weights,
        readout=readout,
        data_config=config,
        notes=notes,
    )


def _preprocessing(description: Description, size: Size) -> tuple[DataConfig, tuple[str, ...]]:
    """How images are prepared; open_clip's own way where no file says it."""
    content = description.preprocessing
    mode = content.get("resize_mode") or "shortest"
    if mode not in {"shortest", "squash"}:
        raise ConversionError(f"preprocess_cfg: resize_mode is {mode!r}; known are shortest and squash")
    if mode == "shortest" and size[0] != size[1]:
        raise ConversionError("preprocess_cfg: resize_mode is shortest, which is known for squares only")
    interpolation = content.get("interpolation") or "bicubic"
    interpolation = "bicubic" if interpolation == "random" else interpolation
    mean, std = (_triple(content.get(key) or default, key) for key, default in (("mean", _MEAN), ("std", _STD)))
    note = () if description.said else ("images are prepared as open_clip does it for a file of this model's weights",)
    return DataConfig(size, mean, std, interpolation, 1.0, "center" if mode == "shortest" else "squash"), note


def _triple(value: Any, key: str) -> tuple[float, float, float]:
    values = [value] * 3 if isinstance(value, int | float) else list(value)
    if len(values) != 3:
        raise ConversionError(f"preprocess_cfg: {key} has {len(values)} channels; only RGB is served")
    return float(values[0]), float(values[1]), float(values[2])


def _text_side(tensors: Tensors) -> TextSide | None:
    """Leaves out the text tower, and keeps what compares an image with a text."""
    scale, bias = (float(tensors.take(name)) if name in tensors else None for name in ("logit_scale", "logit_bias"))
    tensors.leave_out(_TEXT, "the text tower")
    tensors.leave_out(_OPENAI, "sizes that OpenAI's archives repeat")
    return None if scale is None else TextSide(scale, bias)
