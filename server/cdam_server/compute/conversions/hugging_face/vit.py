"""transformers' ViT and DeiT."""

from __future__ import annotations

from typing import Final

from cdam_server.compute.conversions.converted import Converted
from cdam_server.compute.conversions.hugging_face.common import Request
from cdam_server.compute.conversions.layers import mlp_ratio, put, qkv, resample_positions, with_bias
from cdam_server.compute.conversions.tensors import StateDict, Tensors

# From transformers 4's names, which are those of most files, to 5's.
RENAMINGS: Final = (
    (r"^(vit|deit|beit)\.", ""),
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attention.\1."),
    (r"\.attention\.(q|k|v)(?:uery|ey|alue)\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)
LAYERS: Final = r"layers\.(\d+)\."


def convert(request: Request) -> Converted:
    """ViTModel, ViTForImageClassification, DeiTModel, DeiTForImageClassification and ..WithTeacher.

    Raises:
        ConversionError: Not what these classes save, or not what timm can have.
    """
    tensors, config = request.tensors, request.config
    distilled = "embeddings.distillation_token" in tensors
    kwargs = request.vit_kwargs(LAYERS)
    request.check_size()
    weights: StateDict = {"cls_token": tensors.take("embeddings.cls_token")}
    positions = tensors.take("embeddings.position_embeddings")
    weights["pos_embed"] = resample_positions(
        positions, 2 if distilled else 1, request.own_grid, request.grid, antialias=False
    )
    put(weights, "patch_embed.proj", with_bias(tensors.take_layer("embeddings.patch_embeddings.projection")))
    for index in range(kwargs["depth"]):
        block(weights, tensors, f"layers.{index}", f"blocks.{index}")
    put(weights, "norm", tensors.take_layer("layernorm"))
    both = "cls_classifier.weight" in tensors or request.model_class.endswith("WithTeacher")
    head = request.classifier("cls_classifier" if both else "classifier")
    put(weights, "head", head)
    if both:
        put(weights, "head_dist", request.classifier("distillation_classifier"))
    if distilled:
        weights["dist_token" if both else "reg_token"] = tensors.take("embeddings.distillation_token")
    tensors.leave_out(r"embeddings\.mask_token", "the mask token, which is for pretraining")
    tensors.leave_out(r"pooler\.", "the pooler; the latent is last_hidden_state[:, 0]")
    count = len(head.get("weight", ()))
    return Converted(
        source=f"transformers:{request.model_class}",
        architecture="deit_base_distilled_patch16_224" if both else "vit_base_patch16_224",
        model_kwargs={
            **kwargs,
            "mlp_ratio": mlp_ratio(config.count("intermediate_size"), kwargs["embed_dim"]),
            "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
            "act_layer": config.activation(),
            "num_classes": count,
            **({"reg_tokens": 1} if distilled and not both else {}),
        },
        norm_eps=float(config["layer_norm_eps"]),
        weights=weights,
        data_config=request.data_config,
        output_names=request.output_names(count),
        task=request.task,
        resampled=request.resampled,
    )


def block(
    weights: StateDict,
    tensors: Tensors,
    source: str,
    target: str,
    *,
    attention: str = "attention",
    out: str = "o_proj",
    norms: tuple[str, str] = ("layernorm_before", "layernorm_after"),
) -> None:
    """One block; the names are those of ViT and DeiT, if not said otherwise."""
    attention = f"{source}.{attention}"
    put(weights, f"{target}.norm1", tensors.take_layer(f"{source}.{norms[0]}"))
    names = (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")
    put(weights, f"{target}.attn.qkv", qkv(tensors, names))
    put(weights, f"{target}.attn.proj", with_bias(tensors.take_layer(f"{attention}.{out}")))
    put(weights, f"{target}.norm2", tensors.take_layer(f"{source}.{norms[1]}"))
    for layer in ("fc1", "fc2"):
        put(weights, f"{target}.mlp.{layer}", with_bias(tensors.take_layer(f"{source}.mlp.{layer}")))
