"""The map is of `model(x)`, or there is none: what acts on a model without being one of its parts."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.layers import GatedMlp
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from cases.networks import SIZE, assert_right, network, noise, truth
from cdam_engine import (
    Asked,
    Cdam,
    Concept,
    Explainer,
    Output,
    SmoothCdam,
    TokenAblation,
    TopK,
    UnsupportedArchitectureError,
    explain_together,
)

Change = Callable[[Any], object]


def _refused(model: nn.Module, reason: str, words: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=words) as refusal:
        Explainer(model)
    assert refusal.value.reason == reason
    assert "\n" not in str(refusal.value)


# --- hooks on the whole model

ON_THE_WHOLE: dict[str, Change] = {
    "softmax": lambda model: model.register_forward_hook(lambda _module, _given, out: out.softmax(dim=-1)),
    "temperature": lambda model: model.register_forward_hook(lambda _module, _given, out: out / 2),
    "normalisation": lambda model: model.register_forward_pre_hook(lambda _module, given: ((given[0] - 0.5) / 0.2,)),
    "fewer outputs": lambda model: model.register_forward_hook(lambda _module, _given, out: out[:, :2]),
    "class names": lambda model: model.register_forward_hook(lambda _module, _given, out: {"logits": out}),
    "flip": lambda model: model.register_forward_pre_hook(lambda _module, given: (given[0].flip(-1),)),
    "logits of two passes": lambda model: model.register_forward_hook(
        lambda module, given, out: (out + module.forward(given[0].flip(-1))) / 2
    ),
}


@pytest.mark.parametrize("change", ON_THE_WHOLE)
def test_hooks_on_the_whole_model_are_refused_by_name(change: str) -> None:
    model = network()
    ON_THE_WHOLE[change](model)
    _refused(model, "OUTPUTS_DIFFER", "lambda.* on the model")


@pytest.mark.parametrize("change", ON_THE_WHOLE)
def test_hooks_that_come_later_are_noticed(change: str) -> None:
    model = network()
    explainer = Explainer(model)
    handle = ON_THE_WHOLE[change](model)
    with pytest.raises(UnsupportedArchitectureError, match=r"lambda.* on the model"):
        explainer.explain(noise(), [[Output(1)]] * 2)
    handle.remove()  # type: ignore[attr-defined]
    np.testing.assert_allclose(
        explainer.explain(noise(), [[Output(1)]] * 2)[0].maps[0].scores.ravel(), truth(model, noise(), 1)[0][0, 1:]
    )


WATCHING: dict[str, Change] = {
    "forward": lambda model: model.register_forward_hook(lambda *_: None),
    "forward with names": lambda model: model.register_forward_hook(lambda *_: None, with_kwargs=True),
    "before forward": lambda model: model.register_forward_pre_hook(lambda *_: None),
    "on every part": lambda model: [part.register_forward_hook(lambda *_: None) for part in model.blocks[0].modules()],
    "backward": lambda model: model.head.register_full_backward_hook(lambda *_: None),
    "on the head": lambda model: model.head.register_forward_hook(lambda *_: None),
    "on the last attention": lambda model: model.blocks[-1].attn.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", WATCHING)
def test_hooks_that_only_watch_do_not_matter(change: str) -> None:
    model = network()
    WATCHING[change](model)
    assert_right(model)


def test_hooks_on_parts_are_part_of_the_model() -> None:
    for name in (
        "norm",
        "head",
        "blocks.1",
        "blocks.2.mlp",
        "blocks.2.attn",
        "blocks.2.norm2",
        "patch_embed",
        "fc_norm",
    ):
        model = network()
        model.get_submodule(name).register_forward_hook(
            lambda _module, _given, out: 2 * out + out.mean(dim=1, keepdim=True)
        )
        assert_right(model)


# --- modules after the last attention


class _SpatialGate(nn.Module):
    """As in gMLP and MLP-Mixer: each token is scaled by a mixture of all."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tanh(x.mean(dim=1, keepdim=True))


class _OwnLinear(nn.Linear):
    """A subclass may do anything."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.cumsum(dim=1) / x.shape[1])


def _encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(48, 3, 64, dropout=0.1, batch_first=True)


MIXERS: dict[str, Change] = {
    "encoder layer as norm": lambda model: setattr(model, "norm", nn.Sequential(model.norm, _encoder())),
    "encoder as mlp": lambda model: setattr(model.blocks[-1], "mlp", _encoder()),
    "pooling over tokens": lambda model: setattr(
        model.blocks[-1], "mlp", nn.Sequential(nn.Linear(48, 48), nn.AvgPool2d((3, 1), stride=1, padding=(1, 0)))
    ),
    "convolution over tokens": lambda model: setattr(model.blocks[-1], "mlp", nn.Conv1d(7, 7, 3, padding=1)),
    "norm over all tokens": lambda model: setattr(model, "norm", nn.LayerNorm([7, 48])),
    "softmax over tokens": lambda model: setattr(model.blocks[-1], "drop_path2", nn.Softmax(dim=1)),
    "gate": lambda model: setattr(model.blocks[-1], "ls2", _SpatialGate()),
    "gated mlp": lambda model: setattr(
        model.blocks[-1], "mlp", GatedMlp(48, 96, gate_layer=lambda width: _SpatialHalf())
    ),
    "subclass of linear": lambda model: setattr(model.blocks[-1].attn, "proj", _OwnLinear(48, 48)),
    "instance norm over tokens": lambda model: setattr(model.blocks[-1], "norm2", nn.InstanceNorm1d(7)),
}


class _SpatialHalf(nn.Module):
    """A gMLP gate that leaves half of the width."""

    def forward(self, x: Tensor) -> Tensor:
        u, v = x.chunk(2, dim=-1)
        return u * v.mean(dim=1, keepdim=True)

    def init_weights(self) -> None:
        pass


@pytest.mark.parametrize("change", MIXERS)
def test_modules_that_mix_tokens_after_the_last_attention(change: str) -> None:
    model = network()
    if change == "gated mlp":
        model.blocks[-1].mlp = GatedMlp(48, 96, out_features=48)
        model.blocks[-1].mlp.gate, model.blocks[-1].mlp.fc2 = _SpatialHalf(), nn.Linear(48, 48)
    else:
        torch.manual_seed(0)
        MIXERS[change](model)
    assert_right(model.double().eval())


def test_modules_that_mix_the_images_of_a_batch_are_refused() -> None:
    model = network()
    model.norm.register_forward_hook(lambda _module, _given, out: out + out.mean(dim=0, keepdim=True))
    _refused(model, "OUTPUTS_DIFFER", "depend on the other images of its batch")


def test_random_outputs_are_refused() -> None:
    model = network()
    model.norm.register_forward_hook(lambda _module, _given, out: nn.functional.dropout(out, 0.5))
    _refused(model, "OUTPUTS_DIFFER", "random")


# --- gradients that autograd does not have


class _Detached(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.detach())


class _WithoutGradient(_Detached):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class _Rounded(_Detached):
    """Weight and activation in steps, as a kernel of integers has them."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((x * 32).round() / 32)


class _PartlyDetached(_Detached):
    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return 0.5 * out + 0.5 * out.detach()


@pytest.mark.parametrize("part", ["blocks.2.mlp", "blocks.2.attn.proj", "blocks.2.attn.qkv", "blocks.2.norm2", "head"])
@pytest.mark.parametrize("wrapper", [_Detached, _WithoutGradient, _Rounded, _PartlyDetached])
def test_parts_without_a_gradient_are_refused(part: str, wrapper: type[_Detached]) -> None:
    model = network()
    model.set_submodule(part, wrapper(model.get_submodule(part)).eval())
    _refused(model, "NO_GRADIENT", "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_part_without_a_gradient_is_named(dtype: torch.dtype) -> None:
    model = network()
    model.blocks[2].mlp.fc1 = _WithoutGradient(model.blocks[2].mlp.fc1).eval()
    _refused(model.to(dtype), "NO_GRADIENT", re.escape("blocks.2.mlp.fc1"))


@pytest.mark.parametrize(
    "part", ["", "blocks.2", "blocks.2.mlp", "head"], ids=["all", "last block", "last mlp", "head"]
)
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.quantize.*:UserWarning")
@pytest.mark.filterwarnings("ignore:quantized.*autograd kernel was not registered:UserWarning")
def test_dynamic_quantisation_is_refused(part: str) -> None:
    model = network().float()
    if part == "head":
        model.head = nn.Sequential(model.head)
    torch.ao.quantization.quantize_dynamic(model.get_submodule(part), {nn.Linear}, inplace=True)
    with pytest.raises(UnsupportedArchitectureError) as refusal:
        Explainer(model.eval())
    assert refusal.value.reason in {"NO_GRADIENT", "OUTPUTS_DIFFER"}


# --- changes that are part of the model


class _Lora(nn.Module):
    def __init__(self, inner: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.inner = inner
        self.down, self.up = (
            nn.Linear(inner.in_features, rank, bias=False),
            nn.Linear(rank, inner.out_features, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 0.5 * self.up(self.down(x))


class _Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


def _lora(model: Any) -> None:
    for block in model.blocks:
        block.attn.qkv, block.mlp.fc1 = _Lora(block.attn.qkv), _Lora(block.mlp.fc1)


def _unfused(model: Any) -> None:
    for block in model.blocks:
        block.attn.fused_attn = False


def _patched_attention(model: Any) -> None:
    attention = model.blocks[-1].attn
    plain = attention.forward
    attention.forward = lambda x, **more: 1.5 * plain(x, **more)


def _reentrant(model: Any) -> None:
    for block in model.blocks[:2]:
        plain = block.forward
        block.forward = lambda x, plain=plain, **_: checkpoint(plain, x, use_reentrant=True)


CHANGES: dict[str, Change] = {
    "lora": _lora,
    "parametrised norms": lambda model: [
        parametrize.register_parametrization(norm, "weight", _Scaled()) for norm in (model.norm, model.blocks[-1].norm2)
    ],
    "weight norm": lambda model: parametrizations.weight_norm(model.head),
    "spectral norm": lambda model: parametrizations.spectral_norm(model.blocks[-1].mlp.fc1),
    "unfused attention": _unfused,
    "patched attention": _patched_attention,
    "frozen weights": lambda model: model.requires_grad_(requires_grad=False),
    "gradient checkpointing": lambda model: model.set_grad_checkpointing(enable=True),
    "dropped block": lambda model: setattr(model, "blocks", model.blocks[:2]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_changes_that_are_part_of_the_model_are_explained(change: str, dtype: torch.dtype) -> None:
    model = network()
    torch.manual_seed(0)
    CHANGES[change](model)
    assert_right(model.to(dtype).eval(), tolerance=1e-10 if dtype == torch.float64 else 2e-4)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_reentrant_checkpointing_in_the_trunk() -> None:
    model = network()
    _reentrant(model)
    assert_right(model)


# --- what counts as an output


class _Normalised(nn.Module):
    """A cosine classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 48, generator=torch.Generator().manual_seed(3)))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(self.weight, dim=-1).T


HEADS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "linear": (lambda: nn.Linear(48, 4), 4),
    "dropout and linear": (lambda: nn.Sequential(nn.Dropout(0.3), nn.Linear(48, 2)), 2),
    "mlp": (lambda: nn.Sequential(nn.Linear(48, 16), nn.GELU(), nn.Linear(16, 3)), 3),
    "norm and linear": (lambda: nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 2)), 2),
    "with sigmoid": (lambda: nn.Sequential(nn.Linear(48, 2), nn.Sigmoid()), 2),
    "cosine": (_Normalised, 4),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("stale", [0, 10], ids=["headless", "with another head"])
def test_the_head_itself_says_how_many_outputs_there_are(head: str, stale: int) -> None:
    """Deci-AI/super-gradients#368, huggingface/pytorch-image-models#1816."""
    build, count = HEADS[head]
    model = network(num_classes=stale)
    torch.manual_seed(0)
    model.head = build().double().eval()
    assert model.num_classes == stale
    assert_right(model)
    explainer = Explainer(model)
    assert len(explainer.explain(noise(1), [[TopK(count)]])[0].maps) == count
    for target in (Output(count), TopK(count + 1)):
        with pytest.raises(IndexError, match=f"{count} outputs"):
            explainer.explain(noise(1), [[target]])


def test_a_head_that_comes_later_counts() -> None:
    model = network(num_classes=0)
    explainer = Explainer(model)
    with pytest.raises(IndexError, match="0 outputs"):
        explainer.explain(noise(1), [[TopK(1)]])
    model.head = nn.Linear(48, 3).double().eval()
    (found,) = explainer.explain(noise(1), [[TopK(3)]])
    assert found.logits == pytest.approx(model(noise(1))[0].detach().numpy())
    model.head = nn.Identity().eval()
    with pytest.raises(IndexError, match="0 outputs"):
        explainer.explain(noise(1), [[TopK(1)]])


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (nn.Sequential(nn.Linear(48, 6), nn.Unflatten(1, (3, 2))), r"\(2, 3, 2\) for 2 images"),
        (nn.Sequential(nn.Linear(48, 1), nn.Flatten(0)), r"\(2,\) for 2 images"),
    ],
    ids=["two a class", "flat"],
)
def test_outputs_that_are_no_row_an_image_are_refused(head: nn.Module, words: str) -> None:
    model = network()
    model.head = head.double().eval()
    _refused(model, "NO_OUTPUTS", words)


# --- tensors and indices


def test_weights_made_in_inference_mode_are_refused_as_such() -> None:
    """facebookresearch/dinov2#472."""
    with torch.inference_mode():
        model = network()
    with pytest.raises(ValueError, match="inference_mode"):
        Explainer(model)


def test_images_made_in_inference_mode_are_explained() -> None:
    model = network()
    with torch.inference_mode():
        pixels = noise()
    for method in (Cdam(), SmoothCdam(samples=2), TokenAblation()):
        (here, _), (there, _) = (
            Explainer(model).explain(its, [[Output(1)]] * 2, [[method]] * 2) for its in (pixels, noise())
        )
        assert here.maps[0].scores == pytest.approx(there.maps[0].scores, rel=1e-12)


def test_the_part_in_training_mode_is_named() -> None:
    model = network()
    model.blocks[1].mlp.train()
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp.*eval\(\)"):
        Explainer(model)


@pytest.mark.parametrize("index", [np.int64(3), np.uint8(3), torch.tensor(3), np.array(3)], ids=repr)
def test_integers_of_numpy_and_torch_are_indices(index: Any) -> None:
    explainer = Explainer(network())
    (expected,) = explainer.explain(noise(1), [[Output(3)]])
    (found,) = explainer.explain(noise(1), [[Output(index)]])
    assert np.array_equal(found.maps[0].scores, expected.maps[0].scores)
    assert type(found.targets[0].index) is int
    assert len(explainer.explain(noise(1), [[TopK(index)]])[0].maps) == 3


@pytest.mark.parametrize("index", [True, 1.0, "1", None, np.float64(1)], ids=repr)
def test_what_is_no_integer_is_no_index(index: Any) -> None:
    for target in (Output, TopK):
        with pytest.raises(TypeError, match="whole number"):
            target(index)


@pytest.mark.parametrize("channels", [1, 4])
def test_models_of_other_channels_explain_tensors(channels: int) -> None:
    """jacobgil/pytorch-grad-cam#141, Beckschen/TransUNet#3."""
    model = network(in_chans=channels)
    assert_right(model)
    its = f"takes {channels} channel"
    with pytest.raises(ValueError, match=its):
        Explainer(model).explain(noise(2), [[Output(1)]] * 2)


def test_concepts_of_a_model_without_outputs() -> None:
    model = network(num_classes=0)
    vector = torch.randn(48, generator=torch.Generator().manual_seed(0)).double()
    (found,) = Explainer(model).explain(noise(1), [[Concept(vector)]])
    seen: list[Tensor] = []
    model.blocks[-1].norm1.register_forward_hook(lambda _module, _given, out: seen.append(out))
    latent = model(noise(1).requires_grad_())
    (gradient,) = torch.autograd.grad((latent @ vector).sum(), seen[0])
    expected = (gradient * seen[0]).sum(dim=-1)[0, 1:].detach().numpy()
    np.testing.assert_allclose(found.maps[0].scores.ravel(), expected, rtol=0, atol=1e-10 * abs(expected).max())
    assert found.grid == (SIZE[0] // 16, SIZE[1] // 16)


def test_threads_that_prove_one_model_do_not_disturb_each_other() -> None:
    model = network()
    explainer = Explainer(model)
    methods = [[Cdam(), TokenAblation()]]
    expected = explainer.explain(noise(1), [[Output(1)]], methods)[0].maps

    def work(number: int) -> float:
        its = Explainer(model) if number % 2 else explainer
        found = its.explain(noise(1), [[Output(1)]], methods)[0].maps
        return max(float(np.abs(one.scores - other.scores).max()) for one, other in zip(found, expected, strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(work, range(24))) < 1e-10


def test_what_is_no_tensor_target_or_method_is_named() -> None:
    explainer = Explainer(network(img_size=32))
    picture = Image.fromarray(np.zeros((32, 32, 3), np.uint8))
    wrong: Any = "cat"
    with pytest.raises(TypeError, match="not 'cat': names are the service's"):
        explainer(picture, wrong)
    with pytest.raises(TypeError, match="not 'cdam'"):
        explainer(picture, 1, "cdam")  # type: ignore[arg-type]
    for given in (picture, [picture], np.zeros((1, 32, 32, 3), np.uint8)):
        images: Any = given
        with pytest.raises(TypeError, match="images are a tensor, not"):
            explainer.explain(images, [[Output(1)]])
        with pytest.raises(TypeError, match="images are a tensor, not"):
            explain_together([Asked(explainer, images, [[Output(1)]])])
    flat: Any = [Output(1)]
    with pytest.raises(TypeError, match="targets are a list for each image"):
        explainer.explain(noise(1, size=(32, 32)), flat)
