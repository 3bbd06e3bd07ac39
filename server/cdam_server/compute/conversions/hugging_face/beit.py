"""transformers' BEiT."""

from __future__ import annotations

from typing import Final

from cdam_server.compute.conversions.converted import Converted
from cdam_server.compute.conversions.hugging_face.common import Request
from cdam_server.compute.conversions.hugging_face.vit import LAYERS
from cdam_server.compute.conversions.hugging_face.vit import RENAMINGS as VIT_RENAMINGS
from cdam_server.compute.conversions.layers import mlp_ratio, put, qkv, resample_positions, with_bias
from cdam_server.compute.conversions.tensors import ConversionError, StateDict

RENAMINGS: Final = (
    *VIT_RENAMINGS,
    (r"^encoder\.relative_position_bias\.", "shared_position_bias."),
    (r"\.attention\.attention\.relative_position_bias\.", ".relative_position_bias."),
)


def convert(request: Request) -> Converted:
    """BeitModel and BeitForImageClassification.

    Raises:
        ConversionError: Not what these classes save, or not what timm can have.
    """
    tensors, config = request.tensors, request.config
    kwargs = request.vit_kwargs(LAYERS)
    _check_grid(request)
    if config.activation() != "gelu":
        raise ConversionError(f"hidden_act is {config['hidden_act']!r}, but timm's BEiT has gelu only")
    tensors.leave_out(r".*\.relative_position_index$", "indices of relative positions, which timm makes itself")
    tensors.leave_out(r"embeddings\.mask_token", "the mask token, which is for pretraining")
    averages = bool(config["use_mean_pooling"])
    weights: StateDict = {"cls_token": tensors.take("embeddings.cls_token")}
    if config["use_absolute_position_embeddings"]:
        positions = tensors.take("embeddings.position_embeddings")
        weights["pos_embed"] = resample_positions(positions, 1, request.own_grid, request.grid)
    if config["use_shared_relative_position_bias"]:
        table = tensors.take("shared_position_bias.relative_position_bias_table")
        weights["rel_pos_bias.relative_position_bias_table"] = table
    put(weights, "patch_embed.proj", with_bias(tensors.take_layer("embeddings.patch_embeddings.projection")))
    for index in range(kwargs["depth"]):
        _block(weights, request, f"layers.{index}", f"blocks.{index}")
    if averages and "pooler.layernorm.weight" not in tensors:
        raise ConversionError("there is no pooler, so no latent: pooler.layernorm.weight is missing")
    put(weights, "fc_norm" if averages else "norm", tensors.take_layer("pooler.layernorm" if averages else "layernorm"))
    head = request.classifier()
    put(weights, "head", head)
    count = len(head.get("weight", ()))
    return Converted(
        source=f"transformers:{request.model_class}",
        architecture="beit_base_patch16_224",
        model_kwargs={
            **kwargs,
            "mlp_ratio": mlp_ratio(config.count("intermediate_size"), kwargs["embed_dim"]),
            "init_values": 1.0 if "blocks.0.gamma_1" in weights else 0.0,  # 0: no layer scale
            "use_abs_pos_emb": bool(config["use_absolute_position_embeddings"]),
            "use_rel_pos_bias": bool(config["use_relative_position_bias"]),
            "use_shared_rel_pos_bias": bool(config["use_shared_relative_position_bias"]),
            "global_pool": "avg" if averages else "token",
            "num_classes": count,
        },
        norm_eps=float(config["layer_norm_eps"]),
        weights=weights,
        data_config=request.data_config,
        output_names=request.output_names(count),
        task=request.task,
        resampled=request.resampled,
    )


def _block(weights: StateDict, request: Request, source: str, target: str) -> None:
    tensors, attention = request.tensors, f"{source}.attention"
    put(weights, f"{target}.norm1", tensors.take_layer(f"{source}.layernorm_before"))
    if f"{attention}.k_proj.bias" in tensors:
        raise ConversionError(f"{attention}.k_proj.bias: BEiT's keys have no bias in transformers, nor in timm")
    fused = qkv(tensors, (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"))
    weights[f"{target}.attn.qkv.weight"] = fused["weight"]
    if "bias" not in fused:
        raise ConversionError(f"{attention}.q_proj.bias is missing")
    queries, _, values = fused["bias"].chunk(3)
    weights[f"{target}.attn.q_bias"], weights[f"{target}.attn.v_bias"] = queries.clone(), values.clone()
    put(weights, f"{target}.attn.proj", with_bias(tensors.take_layer(f"{attention}.o_proj")))
    put(weights, f"{target}.norm2", tensors.take_layer(f"{source}.layernorm_after"))
    for layer in ("fc1", "fc2"):
        put(weights, f"{target}.mlp.{layer}", with_bias(tensors.take_layer(f"{source}.mlp.{layer}")))
    if request.config["use_relative_position_bias"]:
        table = tensors.take(f"{source}.relative_position_bias.relative_position_bias_table")
        weights[f"{target}.attn.relative_position_bias_table"] = table
    if request.config["layer_scale_init_value"] > 0:
        for branch in ("1", "2"):
            weights[f"{target}.gamma_{branch}"] = tensors.take(f"{source}.lambda_{branch}")


def _check_grid(request: Request) -> None:
    """Refuses other grids than squares, whose height transformers takes for their width, and others than the table's.

    Raises:
        ConversionError: With the sizes.
    """
    config, (height, width) = request.config, request.own_grid
    if height != width:
        raise ConversionError(f"image_size is {config['image_size']}: transformers' BEiT takes squares only")
    relative = config["use_relative_position_bias"] or config["use_shared_relative_position_bias"]
    if relative and request.grid != request.own_grid:
        raise ConversionError(f"input_size: BEiT's relative positions are for {config['image_size']} pixels only")
