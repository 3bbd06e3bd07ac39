"""The image towers of transformers' CLIP and SigLIP; SigLIP 2 with a fixed input size is saved as SigLIP."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor

from cdam_server.compute.conversions.converted import Converted, TextSide
from cdam_server.compute.conversions.hugging_face.common import Request
from cdam_server.compute.conversions.hugging_face.vit import block
from cdam_server.compute.conversions.layers import mlp_ratio, put, resample_positions, with_bias
from cdam_server.compute.conversions.readouts import Projection, Readout
from cdam_server.compute.conversions.tensors import ConversionError, StateDict, Tensors

RENAMINGS: Final = ((r"^vision_model\.", ""),)
_LAYERS: Final = r"encoder\.layers\.(\d+)\."
_TEXT: Final = "the text tower"
_NORMS: Final = ("layer_norm1", "layer_norm2")


def convert_clip(request: Request) -> Converted:
    """CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection and CLIPForImageClassification.

    With a projection the latent is the image embedding, not normalised (`get_image_features`); else it is
    `pooler_output`.

    Raises:
        ConversionError: Not what these classes save, or not what timm can have.
    """
    tensors = request.tensors
    text = _text_side(tensors)
    kwargs, weights = _tower(request, prefix=1)
    weights["cls_token"] = tensors.take("embeddings.class_embedding")[None, None]
    put(weights, "norm_pre", tensors.take_layer("pre_layrnorm"))
    head = request.classifier()
    readout: Readout | None = None
    if request.classifies:
        tensors.leave_out(r"post_layernorm\.", "the norm after the last block, which the classifier does not read")
        kwargs |= {"global_pool": "avg", "final_norm": False}
        put(weights, "head", head)
    else:
        put(weights, "norm", tensors.take_layer("post_layernorm"))
        if "visual_projection.weight" in tensors:
            weights["fc_norm.weight"] = tensors.take("visual_projection.weight")
            readout = Projection(len(weights["fc_norm.weight"]))
        elif request.model_class in {"CLIPModel", "CLIPVisionModelWithProjection"}:
            raise ConversionError("visual_projection.weight is missing")
    return _converted(request, {**kwargs, "pre_norm": True}, weights, head, readout, text)


def convert_siglip(request: Request) -> Converted:
    """SiglipModel, SiglipVisionModel and SiglipForImageClassification.

    Without a classifier the latent is the image embedding, not normalised (`pooler_output`).

    Raises:
        ConversionError: Not what these classes save, or not what timm can have.
    """
    tensors = request.tensors
    text = _text_side(tensors)
    kwargs, weights = _tower(request, prefix=0)
    put(weights, "patch_embed.proj", {"bias": tensors.take("embeddings.patch_embedding.bias")})
    put(weights, "norm", tensors.take_layer("post_layernorm"))
    head = request.classifier()
    if request.classifies:
        tensors.leave_out(r"head\.", "the attention pooling, which the classifier does not read")
        kwargs |= {"global_pool": "avg", "fc_norm": False}
        put(weights, "head", head)
    else:
        if not request.config["vision_use_head"]:
            raise ConversionError("vision_use_head is false: without its pooling the image tower has no embedding")
        kwargs |= {"global_pool": "map"}
        _attention_pool(weights, tensors)
    return _converted(request, {**kwargs, "class_token": False}, weights, head, None, text)


def _tower(request: Request, prefix: int) -> tuple[dict[str, Any], StateDict]:
    """What both have in common: patches, positions, blocks."""
    tensors, config = request.tensors, request.config
    kwargs = request.vit_kwargs(_LAYERS)
    request.check_size()
    tensors.leave_out(r"embeddings\.position_ids$", "the numbers of the positions")
    positions = tensors.take("embeddings.position_embedding.weight")[None]
    weights: StateDict = {
        "pos_embed": resample_positions(positions, prefix, request.own_grid, request.grid, antialias=False),
        "patch_embed.proj.weight": tensors.take("embeddings.patch_embedding.weight"),
    }
    for index in range(kwargs["depth"]):
        block(
            weights,
            tensors,
            f"encoder.layers.{index}",
            f"blocks.{index}",
            attention="self_attn",
            out="out_proj",
            norms=_NORMS,
        )
    kwargs["mlp_ratio"] = mlp_ratio(config.count("intermediate_size"), kwargs["embed_dim"])
    kwargs["act_layer"] = config.activation()
    return kwargs, weights


def _converted(
    request: Request,
    kwargs: dict[str, Any],
    weights: StateDict,
    head: StateDict,
    readout: Readout | None,
    text: TextSide | None,
) -> Converted:
    count = len(head.get("weight", ()))
    return Converted(
        source=f"transformers:{request.model_class}",
        architecture="vit_base_patch16_224",
        model_kwargs={**kwargs, "num_classes": count},
        norm_eps=float(request.config["layer_norm_eps"]),
        weights=weights,
        readout=readout,
        data_config=request.data_config,
        output_names=request.output_names(count),
        task=request.task,
        resampled=request.resampled,
        text=text,
    )


def _text_side(tensors: Tensors) -> TextSide | None:
    """Leaves out the text tower, and keeps what compares an image with a text."""
    if "logit_scale" not in tensors:
        return None
    scale = _number(tensors.take("logit_scale"), "logit_scale")
    bias = _number(tensors.take("logit_bias"), "logit_bias") if "logit_bias" in tensors else None
    tensors.leave_out(r"text_model\.|text_projection\.", _TEXT)
    return TextSide(scale, bias)


def _number(tensor: Tensor, name: str) -> float:
    if tensor.numel() != 1:
        raise ConversionError(f"{name} is {tuple(tensor.shape)} in place of one number")
    return float(tensor)


def _attention_pool(weights: StateDict, tensors: Tensors) -> None:
    """SigLIP's pooling, whose queries, keys and values torch keeps in one layer."""
    weights["attn_pool.latent"] = tensors.take("head.probe")
    for part in ("weight", "bias"):
        fused = tensors.take(f"head.attention.in_proj_{part}")
        width = len(fused) // 3
        weights[f"attn_pool.q.{part}"], weights[f"attn_pool.kv.{part}"] = fused[:width].clone(), fused[width:].clone()
    put(weights, "attn_pool.proj", tensors.take_layer("head.attention.out_proj"))
    put(weights, "attn_pool.norm", tensors.take_layer("head.layernorm"))
    for layer in ("fc1", "fc2"):
        put(weights, f"attn_pool.mlp.{layer}", with_bias(tensors.take_layer(f"head.mlp.{layer}")))
