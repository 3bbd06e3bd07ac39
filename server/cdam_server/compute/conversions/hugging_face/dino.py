"""transformers' DINOv2, DINOv2 with registers, and DINOv3."""

from __future__ import annotations

from typing import Any, Final

import torch

from cdam_server.compute.conversions.converted import Converted
from cdam_server.compute.conversions.hugging_face.common import Request
from cdam_server.compute.conversions.layers import mlp_ratio, put, qkv, resample_positions, with_bias
from cdam_server.compute.conversions.readouts import ClassTokenAndPatchMean
from cdam_server.compute.conversions.tensors import ConversionError, StateDict, Tensors

V2_RENAMINGS: Final = (
    (r"^(dinov2|dinov2_with_registers)\.", ""),
    (r"\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.mlp\.weights_out\.", ".mlp.down_proj."),
)
V3_RENAMINGS: Final = ((r"^(model\.)?layer\.", "encoder.layer."),)
_LAYERS: Final = r"encoder\.layer\.(\d+)\."


def convert_v2(request: Request) -> Converted:
    """Dinov2Model, Dinov2ForImageClassification, and both with registers.

    transformers resamples the positions whenever the input is of another size than they are for, which is the rule:
    they are for 518 x 518 pixels, and the processor makes 224 x 224. Hence the model is made for one input size.

    Raises:
        ConversionError: Not what these classes save, or not what timm can have.
    """
    tensors, config = request.tensors, request.config
    kwargs = request.vit_kwargs(_LAYERS)
    if request.own_grid[0] != request.own_grid[1]:
        raise ConversionError(f"image_size is {config['image_size']}: transformers' DINOv2 takes squares only")
    registers = tensors.size("embeddings.register_tokens", 1) if "embeddings.register_tokens" in tensors else 0
    if registers != config.values.get("num_register_tokens", 0):
        raise ConversionError(f"the checkpoint has {registers} registers; num_register_tokens says otherwise")
    positions = resample_positions(
        tensors.take("embeddings.position_embeddings"), 1, request.own_grid, request.grid, antialias=registers > 0
    )
    # timm's positions cover the patches alone: that of [CLS] is the same for every image, so it is added beforehand.
    weights: StateDict = {
        "cls_token": tensors.take("embeddings.cls_token") + positions[:, :1],
        "pos_embed": positions[:, 1:],
    }
    if registers:
        weights["reg_token"] = tensors.take("embeddings.register_tokens")
    tensors.leave_out(r"embeddings\.mask_token", "the mask token, which is for pretraining")
    put(weights, "patch_embed.proj", with_bias(tensors.take_layer("embeddings.patch_embeddings.projection")))
    for index in range(kwargs["depth"]):
        source, target = f"encoder.layer.{index}", f"blocks.{index}"
        _attention(weights, tensors, source, target)
        put(weights, f"{target}.norm2", tensors.take_layer(f"{source}.norm2"))
        _mlp_v2(weights, tensors, f"{source}.mlp", f"{target}.mlp", gated=bool(config["use_swiglu_ffn"]))
        for branch in ("1", "2"):
            weights[f"{target}.ls{branch}.gamma"] = tensors.take(f"{source}.layer_scale{branch}.lambda1")
    put(weights, "norm", tensors.take_layer("layernorm"))
    head = request.classifier()
    put(weights, "head", head)
    count = len(head.get("weight", ()))
    hidden = len(weights["blocks.0.mlp.fc1.weight"])
    mlp: dict[str, Any] = {"mlp_ratio": mlp_ratio(hidden, kwargs["embed_dim"])}
    if not config["use_swiglu_ffn"]:
        mlp["act_layer"] = config.activation()
    return Converted(
        source=f"transformers:{request.model_class}",
        architecture="vit_giant_patch14_dinov2" if config["use_swiglu_ffn"] else "vit_base_patch14_dinov2",
        model_kwargs={
            **kwargs,
            **mlp,
            "init_values": 1.0,
            "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
            "reg_tokens": registers,
            "no_embed_class": True,
            "num_classes": count,
        },
        norm_eps=float(config["layer_norm_eps"]),
        weights=weights,
        readout=ClassTokenAndPatchMean() if request.classifies else None,
        data_config=request.data_config,
        output_names=request.output_names(count),
        task=request.task,
        resampled=request.resampled,
    )


def convert_v3(request: Request) -> Converted:
    """DINOv3ViTModel.

    Raises:
        ConversionError: Not what the class saves, or not what timm can have.
    """
    tensors, config = request.tensors, request.config
    kwargs = request.vit_kwargs(_LAYERS)
    request.grid  # noqa: B018 - checks the size
    gated = bool(config["use_gated_mlp"])
    wanted = "silu" if gated else "gelu"
    if config.activation() != wanted:
        raise ConversionError(f"hidden_act is {config['hidden_act']!r}, but timm's DINOv3 has {wanted} only")
    registers = config["num_register_tokens"]
    weights: StateDict = {"cls_token": tensors.take("embeddings.cls_token")}
    if registers:
        weights["reg_token"] = tensors.take("embeddings.register_tokens")
    tensors.leave_out(r"embeddings\.register_tokens", "no register tokens")
    tensors.leave_out(r"embeddings\.mask_token", "the mask token, which is for pretraining")
    tensors.leave_out(r"rope_embeddings\.", "frequencies of the rotary positions, which timm makes itself")
    put(weights, "patch_embed.proj", with_bias(tensors.take_layer("embeddings.patch_embeddings")))
    for index in range(kwargs["depth"]):
        _block_v3(weights, tensors, f"encoder.layer.{index}", f"blocks.{index}", gated=gated)
    put(weights, "norm", tensors.take_layer("norm"))
    return Converted(
        source=f"transformers:{request.model_class}",
        architecture="vit_small_patch16_dinov3",
        model_kwargs={
            **kwargs,
            "mlp_ratio": mlp_ratio(config.count("intermediate_size"), kwargs["embed_dim"]),
            # An alignment to 1 makes timm keep the gate in a layer of its own, of just this size.
            **({"swiglu_mlp": True, "swiglu_align_to": 1} if gated else {}),
            "qkv_bias": True,
            "num_reg_tokens": registers,
            "rope_temperature": float(config["rope_theta"]),
            "global_pool": "token",
            "dynamic_img_size": True,
            "num_classes": 0,
        },
        norm_eps=float(config["layer_norm_eps"]),
        weights=weights,
        data_config=request.data_config,
    )


def _attention(weights: StateDict, tensors: Tensors, source: str, target: str) -> None:
    """A block's first norm and its attention."""
    attention = f"{source}.attention"
    put(weights, f"{target}.norm1", tensors.take_layer(f"{source}.norm1"))
    put(
        weights,
        f"{target}.attn.qkv",
        qkv(tensors, (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")),
    )
    put(weights, f"{target}.attn.proj", with_bias(tensors.take_layer(f"{attention}.o_proj")))


def _mlp_v2(weights: StateDict, tensors: Tensors, source: str, target: str, *, gated: bool) -> None:
    """Files have the gate and what it multiplies in one layer; transformers 5 may also save them as two."""
    if not gated:
        for layer in ("fc1", "fc2"):
            put(weights, f"{target}.{layer}", with_bias(tensors.take_layer(f"{source}.{layer}")))
        return
    if f"{source}.gate_proj.weight" in tensors:
        gate, up = (with_bias(tensors.take_layer(f"{source}.{layer}")) for layer in ("gate_proj", "up_proj"))
        both = {part: torch.cat((gate[part], up[part])) for part in gate}
    else:
        both = with_bias(tensors.take_layer(f"{source}.weights_in"))
    put(weights, f"{target}.fc1", both)
    put(weights, f"{target}.fc2", with_bias(tensors.take_layer(f"{source}.down_proj")))


def _block_v3(weights: StateDict, tensors: Tensors, source: str, target: str, *, gated: bool) -> None:
    keys = f"{source}.attention.k_proj.bias"
    if keys in tensors:
        # Under rotary positions a bias of the keys does not cancel in the softmax, and timm's attention has none.
        if tensors.take(keys).any():
            raise ConversionError(f"{keys} is not zero, and timm's DINOv3 has no bias for keys")
        tensors.left_out.append(f"left out: a bias of keys that is zero ({keys})")
    _attention(weights, tensors, source, target)
    fused = weights.pop(f"{target}.attn.qkv.bias", None)
    if fused is None:
        fused = weights[f"{target}.attn.qkv.weight"].new_zeros(len(weights[f"{target}.attn.qkv.weight"]))
    queries, _, values = fused.chunk(3)
    weights[f"{target}.attn.q_bias"], weights[f"{target}.attn.v_bias"] = queries.clone(), values.clone()
    put(weights, f"{target}.norm2", tensors.take_layer(f"{source}.norm2"))
    layers = {"up_proj": "fc1", "down_proj": "fc2"}
    if gated:
        layers = {"gate_proj": "fc1_g", "up_proj": "fc1_x", "down_proj": "fc2"}
    for theirs, ours in layers.items():
        put(weights, f"{target}.mlp.{ours}", with_bias(tensors.take_layer(f"{source}.mlp.{theirs}")))
    for branch in ("1", "2"):
        weights[f"{target}.gamma_{branch}"] = tensors.take(f"{source}.layer_scale{branch}.lambda1")
