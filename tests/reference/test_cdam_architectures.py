"""Architectures and inputs that have no CDAM are refused with a reason; none gets a wrong map."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from cdam_engine import Explainer, Output, TopK, UnsupportedArchitectureError
from reference.cdam_reference import cdam, relative_error
from reference.models import BY_ID, build, fresh, images

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cdam_engine import Target

SMALL = {"depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 5}

NO_NORMALISED_TOKENS: dict[str, tuple[str, dict[str, Any], str]] = {
    "residual_post_norm": ("vit_base_patch16_rpn_224", {**SMALL, "img_size": 32}, "ResPostBlock"),
    "parallel_attention_and_mlp": ("vit_base_patch16_xp_224", {**SMALL, "img_size": 32}, "ParallelScalingBlock"),
    "parallel_attentions": ("vit_small_patch16_18x2_224", {**SMALL, "img_size": 32}, "ParallelThingsBlock"),
    "differential_parallel": ("vit_dpwee_patch16_reg1_gap_256", {**SMALL, "img_size": 32}, "DiffParallelScalingBlock"),
    "relative_position_post_norm": (
        "vit_relpos_small_patch16_rpn_224",
        {**SMALL, "img_size": 32},
        "ResPostRelPosBlock",
    ),
    "eva_post_norm": (
        "eva02_tiny_patch14_224",
        {**SMALL, "img_size": 28, "use_post_norm": True},
        "EvaBlockPostNorm",
    ),
}
UNKNOWN: dict[str, tuple[str, dict[str, Any], str]] = {
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"depths": (1, 1, 1, 1), "embed_dim": 12, "num_classes": 5},
        "SwinTransformer is hierarchical",
    ),
    "resnet": ("test_resnet", {"num_classes": 5}, "ResNet is no Vision Transformer: it has no attention"),
    "convnext": ("test_convnext", {"num_classes": 5}, "ConvNeXt is no Vision Transformer: it has no attention"),
    "hiera": ("hiera_tiny_224", {"num_classes": 5}, "Hiera is hierarchical"),
}


def _params(table: dict[str, tuple[str, dict[str, Any], str]]) -> list[Any]:
    return [pytest.param(*row, id=name) for name, row in table.items()]


@pytest.mark.parametrize(("name", "options", "culprit"), _params(NO_NORMALISED_TOKENS))
def test_no_normalised_tokens(name: str, options: dict[str, Any], culprit: str) -> None:
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    try:
        model = timm.create_model(name, pretrained=False, **options).eval()
    except TypeError as broken:  # timm 1.0.20 hands its own post-norm block an argument that it does not take
        pytest.skip(f"this timm cannot build it: {broken}")
    assert type(model.blocks[-1]).__name__ == culprit
    with pytest.raises(UnsupportedArchitectureError, match=rf"normalised tokens.*{culprit}") as refused:
        Explainer(model)
    assert refused.value.reason == "NO_NORMALISED_TOKENS"


@pytest.mark.parametrize(("name", "options", "culprit"), _params(UNKNOWN))
def test_unknown_architecture(name: str, options: dict[str, Any], culprit: str) -> None:
    model = timm.create_model(name, pretrained=False, **options).eval()
    with pytest.raises(UnsupportedArchitectureError, match=culprit) as refused:
        Explainer(model)
    assert refused.value.reason == "UNKNOWN_ARCHITECTURE"


@pytest.mark.parametrize("block", [ResPostBlock, ParallelScalingBlock, ParallelThingsBlock])
def test_blocks_that_only_the_last_block_gives_away(block: type[nn.Module]) -> None:
    """The last block decides: a post-norm block at the end of an ordinary ViT is refused, one before it is not."""
    model = fresh(BY_ID["eight_outputs"]).eval()
    dim, heads = model.embed_dim, model.blocks[0].attn.num_heads
    first, last = model.blocks
    model.blocks = nn.Sequential(first, block(dim, heads)).eval()
    with pytest.raises(UnsupportedArchitectureError) as refused:
        Explainer(model)
    assert refused.value.reason == "NO_NORMALISED_TOKENS"
    model.blocks = nn.Sequential(block(dim, heads), last).eval()
    Explainer(model)


def test_no_pooling() -> None:
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, global_pool="", **SMALL).eval()
    with pytest.raises(UnsupportedArchitectureError, match="pool") as refused:
        Explainer(model)
    assert refused.value.reason == "NO_READOUT"


class _OwnFeatures(VisionTransformer):
    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward_features(x, *args, **kwargs)


class _OwnForward(VisionTransformer):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 3 * super().forward(x, *args, **kwargs)


class _OwnHead(VisionTransformer):
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = super().forward_head(x, pre_logits=pre_logits)
        return x if pre_logits else 3 * x


@pytest.mark.parametrize(
    "family",
    [
        _OwnFeatures,
        _OwnForward,
        _OwnHead,
    ],
)
def test_subclass_with_its_own_code(family: type[VisionTransformer]) -> None:
    _refused_or_right(family(img_size=32, **SMALL).double().eval())


def test_instance_with_its_own_code() -> None:
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, **SMALL).double().eval()
    plain = model.forward
    model.forward = lambda x: 3 * plain(x)
    _refused_or_right(model)


def test_head_put_on_later() -> None:
    options = {**SMALL, "num_classes": 0, "img_size": 32}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **options)
    model.head = nn.Linear(32, 4)
    _refused_or_right(model.double().eval())


def test_head_replaced() -> None:
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, **SMALL)
    model.head = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 3))
    _refused_or_right(model.double().eval())


def test_convolutional_stem() -> None:
    model = timm.create_model("vit_small_r26_s32_224", pretrained=False, img_size=(64, 96), **SMALL).double().eval()
    _refused_or_right(model, size=(64, 96))


def test_padded_images() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=32, dynamic_img_size=True, dynamic_img_pad=True, **SMALL
    )
    _refused_or_right(model.double().eval(), size=(40, 70))


def test_bfloat16() -> None:
    case = BY_ID["eight_outputs"]
    model = fresh(case).bfloat16().eval()
    pixels = images(case, 1, torch.bfloat16)
    (found,) = Explainer(model).explain(pixels, [[Output(0)]])
    truth = cdam(model.double(), pixels[0].double(), 0)
    assert relative_error(torch.from_numpy(found.maps[0].scores), truth.scores) < 0.2


def test_callers_autocast() -> None:
    case = BY_ID["eight_outputs"]
    pixels = images(case, 1, torch.float32)
    explainer = Explainer(build(case, torch.float32))
    (plain,) = explainer.explain(pixels, [[Output(0)]])
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = explainer.explain(pixels, [[Output(0)]])
    assert found.maps[0].scores == pytest.approx(plain.maps[0].scores, rel=1e-5, abs=1e-5)


def _refused_or_right(model: nn.Module, size: tuple[int, int] = (32, 32)) -> None:
    """A model that is not quite timm's either gets the reference's map or none, for a reason."""
    image = torch.randn(3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    try:
        explainer = Explainer(model)
    except UnsupportedArchitectureError:
        return
    (found,) = explainer.explain(image[None], [[Output(1)]])
    with torch.no_grad():
        logits = model(image[None])[0]
    assert relative_error(torch.from_numpy(found.logits), logits) < 1e-10
    if hasattr(model.patch_embed, "backbone"):  # the reference does not know such a stem's grid
        assert found.maps[0].scores.shape == model.patch_embed.grid_size
        return
    assert relative_error(torch.from_numpy(found.maps[0].scores), cdam(model, image, 1).scores) < 1e-10


def test_bare_module() -> None:
    with pytest.raises(UnsupportedArchitectureError, match="Linear"):
        Explainer(nn.Linear(3, 3).eval())


@pytest.mark.parametrize("name", ["dropout_rates", "deit_distilled", "eva02", "beit"])
def test_training_mode(name: str) -> None:
    """In training mode outputs are random (and DeiT's are two)."""
    with pytest.raises(ValueError, match=r"eval\(\)"):
        Explainer(fresh(BY_ID[name]).train())


@pytest.mark.parametrize(
    "part",
    ["", "blocks"],
    ids=["whole", "blocks"],
)
def test_training_mode_set_later(part: str) -> None:
    case = BY_ID["dropout_rates"]
    model = fresh(case).eval()
    explainer = Explainer(model)
    model.get_submodule(part).train()
    with pytest.raises(ValueError, match=r"eval\(\)"):
        explainer.explain(images(case, 1, torch.float32), [[Output(0)]])


@pytest.mark.parametrize(
    ("size", "message"),
    [
        pytest.param((32, 32), "takes 48 x 32 pixels only, not 32 x 32", id="another_size"),
        pytest.param((32, 48), "takes 48 x 32 pixels only, not 32 x 48", id="rows_for_columns"),
        pytest.param((0, 32), "0 x 32", id="empty"),
    ],
)
def test_wrong_image_size(size: tuple[int, int], message: str) -> None:
    explainer = Explainer(build(BY_ID["eight_outputs"]))
    with pytest.raises(ValueError, match=re.escape(message)):
        explainer.explain(torch.zeros(1, 3, *size, dtype=torch.float64), [[Output(0)]])


def test_size_that_is_not_whole_patches() -> None:
    explainer = Explainer(build(BY_ID["dynamic_size"]))
    with pytest.raises(ValueError, match="not a multiple of the patch size 16 x 16"):
        explainer.explain(torch.zeros(1, 3, 40, 64, dtype=torch.float64), [[Output(0)]])


@pytest.mark.parametrize("target", [Output(8), Output(-1), TopK(0), TopK(9), TopK(-1)], ids=str)
def test_target_that_is_not_there(target: Target) -> None:
    case = BY_ID["eight_outputs"]
    with pytest.raises(IndexError):
        Explainer(build(case)).explain(images(case, 2), [[Output(0)], [Output(1), target]])


@pytest.mark.parametrize("targets", [[], [[Output(0)]], [[Output(0)]] * 3], ids=len)
def test_targets_for_another_number_of_images(targets: Sequence[Sequence[Target]]) -> None:
    case = BY_ID["eight_outputs"]
    with pytest.raises(ValueError, match="2 images"):
        Explainer(build(case)).explain(images(case, 2), targets)


def test_image_without_targets() -> None:
    case = BY_ID["eight_outputs"]
    explainer = Explainer(build(case))
    pixels = images(case, 2)
    neither = explainer.explain(pixels, [[], []])
    assert [len(item.maps) for item in neither] == [0, 0]
    one = explainer.explain(pixels, [[], [Output(2)]])
    assert [len(item.maps) for item in one] == [0, 1]
    assert one[1].maps[0].scores == pytest.approx(explainer.explain(pixels[1:], [[Output(2)]])[0].maps[0].scores)


def test_a_model_within_another_is_named() -> None:
    wrapped = nn.Sequential(timm.create_model("vit_tiny_patch16_224", img_size=32, **SMALL)).eval()
    with pytest.raises(
        UnsupportedArchitectureError, match="give its part '0', with what comes after it as its head"
    ) as refused:
        Explainer(wrapped)
    assert refused.value.reason == "UNKNOWN_ARCHITECTURE"
