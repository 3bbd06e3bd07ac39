"""The zoo: timm's kinds of Vision Transformer, small, with random weights in which nothing is trivially zero or one."""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
from timm.layers import RmsNorm
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Case:
    """One architecture.

    Attributes:
        id: what the tests call it.
        timm_name: the name in timm's registry, without a tag.
        image_size: `(H, W)` of the images, in pixels.
        grid: `(h, w)`, the patch grid that these images give.
        prefix: how many prefix tokens there are.
        outputs: how many outputs the head has.
        options: what timm's factory is told beside that.
        channels: how many the images have.
        since: the oldest timm on which it is known to run in double precision, if that isn't our oldest.
    """

    id: str
    timm_name: str
    image_size: tuple[int, int]
    grid: tuple[int, int]
    prefix: int = 1
    outputs: int = 11
    options: dict[str, Any] = field(default_factory=dict)
    channels: int = 3
    since: str = "1.0.20"


def _small(heads: int = 3, head_width: int = 16, depth: int = 2, **more: Any) -> dict[str, Any]:
    return {"depth": depth, "embed_dim": heads * head_width, "num_heads": heads, **more}


CASES: tuple[Case, ...] = (
    # Full width.
    Case("vit_tiny", "vit_tiny_patch16_224", (224, 224), (14, 14), outputs=1000, options={"depth": 3}),
    Case("vit_small", "vit_small_patch16_224", (96, 64), (6, 4), outputs=1000, options={"depth": 2}),
    Case("vit_base", "vit_base_patch16_224", (64, 96), (4, 6), outputs=1000, options={"depth": 2}),
    # Patch sizes, grids, heads.
    Case("patch_8", "vit_small_patch8_224", (40, 64), (5, 8), options=_small()),
    Case("patch_14", "vit_large_patch14_224", (56, 42), (4, 3), options=_small(4, 8)),
    Case("patch_32", "vit_base_patch32_224", (96, 128), (3, 4), options=_small()),
    Case("patch_4_one_row", "vit_tiny_patch16_224", (4, 48), (1, 12), options=_small(patch_size=4)),
    Case("patch_oblong", "vit_tiny_patch16_224", (32, 32), (4, 2), options=_small(patch_size=(8, 16))),
    Case("one_logit", "vit_tiny_patch16_224", (32, 48), (2, 3), outputs=1, options=_small()),
    Case("eight_outputs", "vit_tiny_patch16_224", (48, 32), (3, 2), outputs=8, options=_small()),
    Case("single_block", "vit_tiny_patch16_224", (32, 48), (2, 3), options=_small(depth=1)),
    Case("single_head", "vit_tiny_patch16_224", (32, 48), (2, 3), options=_small(1, 32)),
    Case(
        "dynamic_size",
        "vit_tiny_patch16_224",
        (48, 80),
        (3, 5),
        options=_small(dynamic_img_size=True, img_size=64),
    ),
    # DeiT, DINO, DINOv2.
    Case("deit", "deit_tiny_patch16_224", (48, 48), (3, 3), options=_small()),
    Case("deit_distilled", "deit_tiny_distilled_patch16_224", (48, 32), (3, 2), prefix=2, options=_small()),
    Case("deit3", "deit3_small_patch16_224", (48, 64), (3, 4), options=_small(4)),
    Case("dino", "vit_small_patch8_224", (32, 32), (4, 4), outputs=13, options=_small(6, 16)),
    Case("dinov2", "vit_small_patch14_dinov2", (42, 56), (3, 4), options=_small(4)),
    Case("dinov2_registers", "vit_small_patch14_reg4_dinov2", (42, 56), (3, 4), prefix=5, options=_small(4)),
    Case("dinov2_swiglu", "vit_giant_patch14_dinov2", (28, 42), (2, 3), options=_small()),
    Case(
        "dinov2_swiglu_registers",
        "vit_giant_patch14_reg4_dinov2",
        (28, 42),
        (2, 3),
        prefix=5,
        options=_small(),
    ),
    # Variations of the last block.
    Case("no_qkv_bias", "vit_tiny_patch16_224", (32, 48), (2, 3), options=_small(qkv_bias=False, proj_bias=False)),
    Case("qk_norm", "vit_tiny_patch16_224", (32, 48), (2, 3), options=_small(qk_norm=True)),
    Case("qk_rms_norm", "vit_tiny_patch16_224", (32, 48), (2, 3), options=_small(qk_norm=True, norm_layer=RmsNorm)),
    Case("rms_norm", "vit_tiny_patch16_224", (32, 48), (2, 3), options=_small(norm_layer=RmsNorm)),
    Case(
        "dropout_rates",
        "vit_tiny_patch16_224",
        (32, 48),
        (2, 3),
        options=_small(drop_rate=0.2, proj_drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.2),
    ),
    Case("inner_norms_beit3", "beit3_base_patch16_224", (32, 48), (2, 3), options=_small()),
    Case("inner_norms_token", "beit3_base_patch16_224", (32, 48), (2, 3), options=_small(global_pool="token")),
    Case("differential_attention", "vit_dwee_patch16_reg1_gap_256", (32, 48), (2, 3), options=_small(4)),
    # Pooling.
    Case(
        "average_pool",
        "vit_base_patch16_gap_224",
        (32, 64),
        (2, 4),
        prefix=0,
        options=_small(),
    ),
    Case("average_pool_class_token", "vit_tiny_patch16_224", (32, 64), (2, 4), options=_small(global_pool="avg")),
    Case(
        "average_pool_with_prefix",
        "vit_tiny_patch16_224",
        (32, 64),
        (2, 4),
        options=_small(global_pool="avg", pool_include_prefix=True),
    ),
    Case("average_pool_register", "vit_wee_patch16_reg1_gap_256", (32, 64), (2, 4), options=_small()),
    Case("token_fc_norm", "vit_tiny_patch16_224", (32, 64), (2, 4), options=_small(fc_norm=True)),
    Case("no_final_norm", "vit_tiny_patch16_224", (32, 64), (2, 4), options=_small(final_norm=False)),
    Case("max_pool", "vit_tiny_patch16_224", (32, 64), (2, 4), options=_small(global_pool="max")),
    Case("siglip", "vit_base_patch16_siglip_224", (48, 32), (3, 2), prefix=0, options=_small()),
    Case("siglip_pool", "vit_base_patch16_siglip_gap_224", (48, 32), (3, 2), prefix=0, options=_small()),
    Case("map_pool_class_token", "vit_tiny_patch16_224", (48, 32), (3, 2), options=_small(global_pool="map")),
    # Norm before the blocks, other activations.
    Case("clip", "vit_base_patch16_clip_224", (48, 32), (3, 2), options=_small()),
    Case("clip_quickgelu", "vit_base_patch16_clip_quickgelu_224", (48, 32), (3, 2), options=_small()),
    # Other files of timm: relative positions, rotary positions.
    Case("beit", "beit_base_patch16_224", (48, 32), (3, 2), options=_small()),
    Case("beit_token", "beit_base_patch16_224", (48, 32), (3, 2), options=_small(global_pool="token")),
    Case(
        "beitv2_shared_bias",
        "beitv2_base_patch16_224",
        (48, 32),
        (3, 2),
        options=_small(use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
    ),
    Case("eva02", "eva02_tiny_patch14_224", (42, 28), (3, 2), options=_small()),
    Case("eva02_unfused", "eva02_base_patch14_224", (42, 28), (3, 2), options=_small(global_pool="token")),
    Case("eva02_clip", "eva02_base_patch16_clip_224", (48, 32), (3, 2), options=_small()),
    Case("dinov3", "vit_small_patch16_dinov3", (48, 64), (3, 4), prefix=5, options=_small()),
    Case(
        "dinov3_token",
        "vit_small_patch16_dinov3_qkvb",
        (48, 64),
        (3, 4),
        prefix=5,
        options=_small(global_pool="token"),
    ),
    Case("rope", "vit_small_patch16_rope_224", (48, 32), (3, 2), options=_small()),
    Case("rope_mixed", "vit_small_patch16_rope_mixed_224", (48, 32), (3, 2), options=_small(), since="1.0.31"),
    Case("rope_average_pool", "vit_medium_patch16_rope_reg1_gap_256", (48, 32), (3, 2), options=_small()),
    Case(
        "perception_encoder",
        "vit_pe_core_tiny_patch16_384",
        (48, 32),
        (3, 2),
        options=_small(4, attn_pool_num_heads=4),
    ),
    Case("relative_positions", "vit_relpos_small_patch16_224", (48, 32), (3, 2), prefix=0, options=_small()),
    Case("relative_positions_token", "vit_relpos_medium_patch16_cls_224", (48, 32), (3, 2), options=_small()),
    Case("relative_positions_shared", "vit_srelpos_small_patch16_224", (48, 32), (3, 2), prefix=0, options=_small()),
    # Class attention: [CLS] comes in after all blocks of patches.
    Case("cait", "cait_xxs24_224", (48, 32), (3, 2), options=_small()),
    Case("cait_one_class_block", "cait_xxs24_224", (48, 32), (3, 2), options=_small(depth_token_only=1)),
    # Grey images.
    Case("one_channel", "vit_tiny_patch16_224", (48, 32), (3, 2), options=_small(in_chans=1), channels=1),
    Case("sapiens2", "vit_base_patch16_sapiens2", (48, 32), (3, 2), prefix=9, options=_small(4, num_kv_heads=2)),
)

BY_ID = {case.id: case for case in CASES}


def available(case: Case) -> bool:
    """Whether the installed timm has the architecture: the newest ones are missing from our oldest timm."""
    installed, since = (tuple(map(int, text.split(".")[:3])) for text in (timm.__version__, case.since))
    return timm.is_model(case.timm_name) and installed >= since


def require(case: Case) -> None:
    """Skip the test where the installed timm lacks the architecture; the newest timm lacks none."""
    if not available(case):
        pytest.skip(f"this timm has no {case.timm_name}")


@functools.lru_cache(maxsize=4)
def build(case: Case, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The case's model in eval mode; its weights depend on the case's id alone. Shared: leave it as you found it."""
    model = fresh(case)
    return model.to(dtype).eval()


def fresh(case: Case) -> nn.Module:
    """A model of one's own, float32, in train mode as timm gives it."""
    options = {"num_classes": case.outputs, "img_size": case.image_size, **case.options}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(case.timm_name, pretrained=False, **options)
    randomise(model, seed=zlib.crc32(case.id.encode()))
    return model


def images(case: Case, count: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """`(count, C, H, W)`: normal noise, each image with a brightness and a contrast of its own."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, case.channels, *case.image_size, generator=draw)
    contrast = torch.rand(count, case.channels, 1, 1, generator=draw) + 0.5
    return (noise * contrast + torch.randn(count, case.channels, 1, 1, generator=draw)).to(dtype)


def blocks(model: nn.Module) -> list[nn.Module]:
    """All blocks in order, those of class attention last."""
    return [*model.blocks, *(getattr(model, "blocks_token_only", None) or [])]


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Random weights that keep activations near one and attention uneven, biases and gains included."""
    draw = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=draw)
        leaf = name.rsplit(".", 1)[-1]
        owner = name.rsplit(".", 2)[-2] if "." in name else ""
        if leaf == "weight" and weight.ndim >= 2:
            sharpen = 1.5 if owner in {"qkv", "q_proj", "k_proj"} else 1.0
            weight.copy_(sharpen * noise / weight[0].numel() ** 0.5)
        elif leaf.startswith("gamma"):  # LayerScale starts out near zero
            weight.copy_(0.7 + 0.2 * noise)
        elif leaf == "weight":  # a norm's gain
            weight.copy_(1 + 0.2 * noise)
        elif leaf == "freqs":  # rotary angles
            weight.add_(0.05 * noise)
        else:  # biases, position embeddings, prefix tokens, lambdas
            weight.copy_(0.3 * noise)
