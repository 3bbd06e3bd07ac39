"""Models that are changed after their explainer was made, or while others use it: the new `model(x)`, or a clear no."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from cases.networks import network, noise, truth
from cdam_engine import Explainer, Output, TokenCache, UnsupportedArchitectureError

Change = Callable[[Any], object]


def _explained(explainer: Explainer, pixels: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    (found,) = explainer.explain(pixels, [[Output(1)]])
    return found.maps[0].scores.ravel(), found.logits


def _assert_follows(explainer: Explainer, tolerance: float = 1e-10) -> None:
    model = explainer.vit.model
    pixels = noise(1).to(next(model.parameters()).dtype)
    scores, outputs = truth(model, pixels, 1)
    patches = scores[0, explainer.vit.num_prefix_tokens :].numpy()
    found, logits = _explained(explainer, pixels)
    np.testing.assert_allclose(found, patches, rtol=0, atol=tolerance * abs(patches).max())
    np.testing.assert_allclose(logits, outputs[0].numpy(), rtol=0, atol=tolerance * abs(outputs).max())


def _replace_class(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.__class__ = type("Other", (type(module),), {"forward": forward})


def _write(module: nn.Module) -> None:
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(std=0.3)


POOLINGS: dict[str, Change] = {
    "average": lambda model: setattr(model, "global_pool", "avg"),
    "maximum": lambda model: setattr(model, "global_pool", "max"),
}


@pytest.mark.parametrize("change", POOLINGS)
def test_another_pooling_is_explained(change: str) -> None:
    explainer = Explainer(network())
    POOLINGS[change](explainer.vit.model)
    _assert_follows(explainer)


def test_a_pooling_that_leaves_no_latent_is_refused() -> None:
    explainer = Explainer(network())
    explainer.vit.model.global_pool = ""  # type: ignore[assignment]
    with pytest.raises(UnsupportedArchitectureError, match="pooling ''"):
        _explained(explainer, noise(1))


CODE: dict[str, Change] = {
    "forward_head": lambda model: setattr(
        model, "forward_head", MethodType(lambda self, x, **_: self.head(x[:, 1:].mean(1)), model)
    ),
    "forward_features": lambda model: setattr(
        model, "forward_features", MethodType(lambda self, x, **_: type(self).forward_features(self, x.flip(-1)), model)
    ),
    "class of the model": lambda model: _replace_class(model, lambda self, x: VisionTransformer.forward(self, x) / 2),
    "class of the last block": lambda model: _replace_class(
        model.blocks[-1], lambda self, x, **_: Block.forward(self, x) * 2
    ),
}


@pytest.mark.parametrize("change", CODE)
def test_other_code_on_the_whole_is_refused(change: str) -> None:
    explainer = Explainer(network())
    CODE[change](explainer.vit.model)
    with pytest.raises(UnsupportedArchitectureError, match=r"own forward pass|its norm comes after"):
        _explained(explainer, noise(1))


@pytest.mark.parametrize("part", ["", "blocks.2", "head"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_mode_is_refused_for_images_that_are_known_too(part: str, precision: str) -> None:
    model = network(proj_drop_rate=0.5, drop_rate=0.5).float()
    explainer = Explainer(model, precision=precision, cache=TokenCache(1 << 24))
    pixels = noise(1).float()
    _explained(explainer, pixels)
    model.get_submodule(part).train()
    with pytest.raises(ValueError, match="training mode"):
        _explained(explainer, pixels)
    with pytest.raises(ValueError, match="training mode"):
        explainer.outputs(pixels)


IN_THE_TRUNK: dict[str, Change] = {
    "weights": lambda model: _write(model.blocks[0]),
    "a hook": lambda model: model.blocks[0].mlp.register_forward_hook(lambda _module, _given, out: 3 * out),
    "a block": lambda model: model.blocks.__setitem__(0, network(seed=5).float().blocks[1]),
}


@pytest.mark.parametrize("change", IN_THE_TRUNK)
def test_the_trunk_in_bfloat16_follows_the_model(change: str) -> None:
    explainer = Explainer(network().float(), precision="bf16")
    _explained(explainer, noise(1).float())
    IN_THE_TRUNK[change](explainer.vit.model)
    _assert_follows(explainer, tolerance=0.05)


def test_outputs_that_a_hook_limits_are_refused_though_noise_is_within_limits() -> None:
    model = network()
    model.register_forward_hook(lambda _module, _given, out: out.clamp(-100, 100))
    with pytest.raises(UnsupportedArchitectureError, match=r"other outputs than the model made.*lambda.* on the model"):
        Explainer(model)


class _OneIsCutOff(nn.Module):
    """A head with an output that lets no gradient through."""

    def __init__(self, inner: nn.Module, index: int) -> None:
        super().__init__()
        self.inner, self.index = inner, index

    def forward(self, latent: Tensor) -> Tensor:
        return torch.stack(
            [its.detach() if k == self.index else its for k, its in enumerate(self.inner(latent).unbind(1))], dim=1
        )


@pytest.mark.parametrize("index", range(5))
def test_one_output_without_gradient_is_refused(index: int) -> None:
    model = network()
    model.head = _OneIsCutOff(model.head, index).eval()
    with pytest.raises(UnsupportedArchitectureError) as refusal:
        Explainer(model)
    assert refusal.value.reason in {"NO_GRADIENT", "GRADIENTS_DIFFER"}


def test_explainers_are_made_while_others_explain() -> None:
    model = network()
    explainer = Explainer(model)
    pixels = noise(1)
    expected, _ = _explained(explainer, pixels)
    failures: list[str] = []

    def make() -> None:
        for _ in range(4):
            try:
                Explainer(model)
            except Exception as error:  # noqa: BLE001 - told below
                failures.append(f"made: {error}")

    def explain() -> None:
        for _ in range(12):
            try:
                np.testing.assert_allclose(_explained(explainer, pixels)[0], expected, atol=1e-12)
            except Exception as error:  # noqa: BLE001 - told below
                failures.append(f"explained: {error}")

    threads = [threading.Thread(target=work) for work in (make, make, explain)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


SHARED_POSITIONS = {
    "rotary": ("vit_base_patch16_rope_mixed_224", {"img_size": 64, "depth": 2}, "rope.freqs"),
    "relative": (
        "beit_base_patch16_224",
        {"img_size": 64, "depth": 1, "use_shared_rel_pos_bias": True, "use_rel_pos_bias": False},
        "rel_pos_bias.relative_position_bias_table",
    ),
}


@pytest.mark.parametrize("kind", SHARED_POSITIONS)
def test_positions_of_the_last_attention_alone_are_part_of_a_trunk(kind: str) -> None:
    name, options, weight = SHARED_POSITIONS[kind]
    explainer, other = Explainer(network(name, **options)), network(name, **options)
    other.load_state_dict(explainer.vit.model.state_dict())
    table = other.get_parameter(weight)
    with torch.no_grad():
        (table[:, -1] if table.ndim == 4 else table).mul_(1.5)
    with pytest.raises(ValueError, match="last attentions are given other positions"):
        explainer.share_trunk(other)


WRAPPERS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "data parallel": (nn.DataParallel, "module"),
    "average": (torch.optim.swa_utils.AveragedModel, "module"),
    "compiled": (lambda model: torch.compile(model, backend="eager"), "_orig_mod"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_named_with_what_is_in_them(wrapper: str) -> None:
    wrap, part = WRAPPERS[wrapper]
    with pytest.raises(
        UnsupportedArchitectureError, match=f"wraps a model that can be explained: give its part '{part}'"
    ):
        Explainer(wrap(network()).eval())


def test_a_compiled_last_block_is_named_as_such() -> None:
    model: Any = network()
    model.blocks[-1] = torch.compile(model.blocks[-1], backend="eager")
    with pytest.raises(UnsupportedArchitectureError, match="the last block is compiled"):
        Explainer(model)
