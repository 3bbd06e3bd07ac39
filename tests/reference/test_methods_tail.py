"""The fast tail of models that read out prefix tokens: equal to the tail under autograd, used where it is exact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cdam_engine import (
    Attention,
    AttentionRollout,
    Cdam,
    Concept,
    Contrast,
    Explainer,
    InputXGradient,
    IntegratedCdam,
    Method,
    Noise,
    Output,
    PatchMaskPrediction,
    RelevancePropagation,
    SmoothCdam,
    TokenAblation,
    UnsupportedMethodError,
)
from cdam_engine.tail import AutogradTail, ClsTail, make_tail
from cdam_engine.vit import SplitViT
from reference.cdam_reference import relative_error
from reference.method_expectations import concept, expected
from reference.models import BY_ID, CASES, Case, build, images, require

# Reads out [CLS] (and DeiT's second token), no rotary positions, no norm of queries and keys.
FAST = {
    "cait",
    "cait_one_class_block",
    "one_channel",
    "relative_positions_token",
    "vit_tiny",
    "vit_small",
    "vit_base",
    "patch_8",
    "patch_14",
    "patch_32",
    "patch_4_one_row",
    "patch_oblong",
    "one_logit",
    "eight_outputs",
    "single_block",
    "single_head",
    "dynamic_size",
    "deit",
    "deit_distilled",
    "deit3",
    "dino",
    "dinov2",
    "dinov2_registers",
    "dinov2_swiglu",
    "dinov2_swiglu_registers",
    "no_qkv_bias",
    "rms_norm",
    "dropout_rates",
    "inner_norms_token",
    "token_fc_norm",
    "no_final_norm",
    "clip",
    "clip_quickgelu",
    "beit_token",
}

every_case = pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
PATHS: dict[str, tuple[list[float], list[float]]] = {
    "at_T": ([1.0], [1.0]),
    "half_way": ([0.5], [1.0]),
    "path": ([0.25, 0.5, 0.75, 1.0], [0.25] * 4),
    "uneven": ([0.1, 0.9, 1.0], [0.2, -0.5, 3.0]),
}


def tails(case: Case, dtype: torch.dtype = torch.float64) -> tuple[SplitViT, Any]:
    require(case)
    vit = SplitViT(build(case, dtype))
    with torch.no_grad():
        return vit, vit.trunk(images(case, 2, dtype))


def wanted(case: Case, *, similarities: bool = True) -> list[list[Output | Concept | Contrast]]:
    model = build(case)
    vectors = [concept(model, seed) for seed in range(2)]
    last = Output(case.outputs - 1)
    if not similarities:
        return [[last, Contrast(Output(0), last)], [Concept(vectors[0], "dot"), Output(0)]]
    return [
        [last, Concept(vectors[0], "cosine"), Contrast(Output(0), Concept(vectors[1], "l2"))],
        [Concept(vectors[1], "dot"), Contrast(Concept(vectors[0], "l2"), Concept(vectors[1], "cosine")), last],
    ]


@every_case
def test_used_where_it_is_exact(case: Case) -> None:
    vit, trunk = tails(case)
    assert type(make_tail(vit, trunk)) is (ClsTail if case.id in FAST else AutogradTail)


@pytest.mark.parametrize("similarities", [True, False])
@pytest.mark.parametrize("name", sorted(FAST))
def test_equals_autograd(name: str, similarities: bool) -> None:
    case = BY_ID[name]
    vit, trunk = tails(case)
    targets = wanted(case, similarities=similarities)
    with torch.no_grad():
        fast, slow = ClsTail(vit, trunk), AutogradTail(vit, trunk)
        assert relative_error(fast.latent, slow.latent) < 1e-10
        assert relative_error(fast.logits, slow.logits) < 1e-10
        for points, weights in PATHS.values():
            found = fast.scores(targets, points, weights, parts=True)
            truth = slow.scores(targets, points, weights, parts=True)
            assert found.value is not None
            assert truth.value is not None
            assert found.scores.shape == truth.scores.shape
            for row in range(truth.scores.shape[0]):
                for k in range(truth.scores.shape[1]):
                    for one, other in ((found.scores, truth.scores), (found.value, truth.value)):
                        most = 1e-10 * float(other[row, k].abs().max())  # of one output less itself: nothing
                        assert float((one[row, k] - other[row, k]).abs().max()) <= most
            assert fast.scores(targets, points, weights).value is None
        for point in (0.0, 0.3, 1.0):
            assert relative_error(fast.values(targets, point), slow.values(targets, point)) < 1e-10


@pytest.mark.parametrize("name", ["eight_outputs", "deit_distilled"])
def test_weight_of_a_single_point_counts(name: str) -> None:
    """As the last piece of a path has it when the others were done before."""
    case = BY_ID[name]
    vit, trunk = tails(case)
    with torch.no_grad():
        found = ClsTail(vit, trunk).scores(wanted(case), [1.0], [0.25], parts=True)
        truth = AutogradTail(vit, trunk).scores(wanted(case), [1.0], [0.25], parts=True)
    assert relative_error(found.scores, truth.scores) < 1e-10
    assert relative_error(found.value, truth.value) < 1e-10


@pytest.mark.parametrize("count", [0, 1, 40])
@pytest.mark.parametrize("steps", [1, 70])
def test_equals_autograd_however_the_work_is_cut(count: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from cdam_engine import tail

    case = BY_ID["deit_distilled"]
    vit, trunk = tails(case)
    targets = [[Output((row + k) % case.outputs) for k in range(count)] for row in range(2)]
    points, weights = [(k + 1) / steps for k in range(steps)], [1 / steps] * steps
    with torch.no_grad():
        truth = AutogradTail(vit, trunk).scores(targets, points, weights).scores
        whole = ClsTail(vit, trunk).scores(targets, points, weights).scores
        monkeypatch.setattr(tail, "_MAX_ELEMENTS", 5000)
        cut = ClsTail(vit, trunk).scores(targets, points, weights).scores
    assert truth.shape == whole.shape == cut.shape
    if count:
        assert relative_error(whole, truth) < 1e-10
        assert relative_error(cut, truth) < 1e-10


class Adapted(nn.Linear):
    """As fine-tuning libraries put it in the place of a linear layer: more than a product with its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.3 * x[..., :1].tanh()


def adapt(model: nn.Module, name: str) -> None:
    plain = model.get_submodule(name)
    assert isinstance(plain, nn.Linear)
    other = Adapted(plain.in_features, plain.out_features, bias=plain.bias is not None, dtype=plain.weight.dtype)
    other.load_state_dict(plain.state_dict())
    model.set_submodule(name, other.eval())


def hook(model: nn.Module, name: str) -> None:
    model.get_submodule(name).register_forward_hook(lambda _module, _args, out: 1.5 * out)


def hook_before(model: nn.Module, name: str) -> None:
    model.get_submodule(name).register_forward_pre_hook(lambda _module, args: (args[0] + 0.5 * args[0].sin(),))


def own_forward(model: nn.Module, name: str) -> None:
    module = model.get_submodule(name)
    plain = module.forward
    module.forward = lambda *args, **more: 1.5 * plain(*args, **more)


def replace_by_nonlinear(model: nn.Module, name: str) -> None:
    model.set_submodule(name, nn.Sequential(model.get_submodule(name), nn.Tanh()).eval())


class MixesTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=1, keepdim=True)


def mix_tokens(model: nn.Module, name: str) -> None:
    model.set_submodule(name, nn.Sequential(model.get_submodule(name), MixesTokens()).eval())


def squash(model: nn.Module, name: str) -> None:
    model.set_submodule(name, nn.Tanh().eval())


CHANGES: dict[str, tuple[Callable[[nn.Module, str], None], str]] = {
    "qkv_adapted": (adapt, "blocks.1.attn.qkv"),
    "qkv_hooked": (hook, "blocks.1.attn.qkv"),
    "qkv_hooked_before": (hook_before, "blocks.1.attn.qkv"),
    "qkv_own_forward": (own_forward, "blocks.1.attn.qkv"),
    "attention_hooked": (hook, "blocks.1.attn"),
    "attention_own_forward": (own_forward, "blocks.1.attn"),
    "proj_adapted": (adapt, "blocks.1.attn.proj"),
    "proj_hooked": (hook, "blocks.1.attn.proj"),
    "proj_drop_hooked": (hook, "blocks.1.attn.proj_drop"),
    "proj_drop_replaced": (squash, "blocks.1.attn.proj_drop"),
    "query_norm": (squash, "blocks.1.attn.q_norm"),
    "key_norm_hooked": (hook, "blocks.1.attn.k_norm"),
    "inner_norm_hooked": (hook, "blocks.1.attn.norm"),
    "first_norm_hooked": (hook, "blocks.1.norm1"),
    "second_norm_hooked": (hook_before, "blocks.1.norm2"),
    "mlp_adapted": (adapt, "blocks.1.mlp.fc1"),
    "mlp_hooked": (hook, "blocks.1.mlp"),
    "mlp_mixes_tokens": (mix_tokens, "blocks.1.mlp"),
    "layer_scale_hooked": (hook, "blocks.1.ls1"),
    "drop_path_hooked": (hook, "blocks.1.drop_path1"),
    "drop_path_replaced": (squash, "blocks.1.drop_path2"),
    "final_norm_hooked": (hook, "norm"),
    "fc_norm_replaced": (squash, "fc_norm"),
    "head_drop_hooked": (hook, "head_drop"),
    "head_adapted": (adapt, "head"),
    "head_hooked": (hook, "head"),
    "head_own_forward": (own_forward, "head"),
    "head_replaced": (replace_by_nonlinear, "head"),
}


@pytest.mark.parametrize(("change", "name"), CHANGES.values(), ids=CHANGES)
def test_changed_module_is_never_bypassed(change: Callable[[nn.Module, str], None], name: str) -> None:
    """Whatever the user has put into the last block or the head counts, in every method that differentiates there."""
    case = BY_ID["eight_outputs"]
    model = copy.deepcopy(build(case))
    change(model, name)
    image = images(case, 1)
    targets = [Output(2), Concept(concept(model, 0), "cosine")]
    methods = [Cdam(), SmoothCdam(2, Noise(0.1), seed=1), IntegratedCdam(2)]
    (found,) = Explainer(model).explain(image, [targets], [methods])
    for relevance in found.maps:
        method, target = methods[relevance.method_index], targets[relevance.target_index]
        truth = expected(model, image[0], method, target)
        assert relative_error(torch.from_numpy(relevance.scores), truth.scores) < 1e-10, (method, target)
    with torch.no_grad():
        assert relative_error(torch.from_numpy(found.logits), model(image)[0]) < 1e-10


OTHERS = (
    Cdam(parts=True),
    Attention(),
    AttentionRollout(),
    RelevancePropagation(),
    InputXGradient(),
    TokenAblation(),
    PatchMaskPrediction(),
)


@pytest.mark.parametrize("method", OTHERS, ids=str)
@pytest.mark.parametrize(("change", "name"), CHANGES.values(), ids=CHANGES)
def test_other_methods_see_the_change_or_refuse(
    change: Callable[[nn.Module, str], None], name: str, method: Method
) -> None:
    case = BY_ID["eight_outputs"]
    model = copy.deepcopy(build(case))
    change(model, name)
    target = Concept(concept(model, 0), "cosine")
    try:
        (found,) = Explainer(model).explain(images(case, 1), [[target]], [[method]])
    except UnsupportedMethodError:
        return
    truth = expected(model, images(case, 1)[0], method, target)
    assert relative_error(torch.from_numpy(found.maps[0].scores), truth.scores) < 1e-10
    if truth.value_part is not None:
        assert relative_error(torch.from_numpy(found.maps[0].value_part), truth.value_part) < 1e-10


def test_change_after_the_explainer_was_made_counts() -> None:
    case = BY_ID["eight_outputs"]
    model = copy.deepcopy(build(case))
    explainer = Explainer(model)
    explainer.explain(images(case, 1), [[Output(2)]])
    adapt(model, "blocks.1.attn.qkv")
    hook(model, "head")
    with torch.no_grad():
        model.blocks[1].attn.proj.weight *= -2
    (found,) = explainer.explain(images(case, 1), [[Output(2)]])
    truth = expected(model, images(case, 1)[0], Cdam(), Output(2))
    assert relative_error(torch.from_numpy(found.maps[0].scores), truth.scores) < 1e-10
