"""The references of all methods, before anything is compared with them: by differences, by sums, by captum."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference import attention_references, captum_maps, cdam_reference, pixel_references, tail_references
from reference.attention_references import attention, attention_rollout, partial_lrp, relevance_propagation
from reference.cdam_reference import relative_error
from reference.models import BY_ID, build, images, require
from reference.token_references import patch_mask_prediction, token_ablation
from reference.whole_model import Function, ReferenceMap, quadrature_rule, readout_weights, run, written_out

STEP = 1e-5


def models(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", names)


def setting(name: str) -> tuple[nn.Module, Tensor]:
    case = BY_ID[name]
    require(case)
    return build(case), images(case, 1)[0]


def logit(latent: Tensor, logits: Tensor) -> Tensor:
    return logits[-1]


def likeness(latent: Tensor, logits: Tensor) -> Tensor:
    return F.cosine_similarity(latent, torch.linspace(-1, 2, len(latent), dtype=latent.dtype), dim=0)


both_functions = pytest.mark.parametrize("f", [logit, likeness])


def value(model: nn.Module, image: Tensor, f: Function, **more: Any) -> float:
    there = run(model, image, **more)
    return float(f(there.latent, there.logits).detach())


def slope(function: Callable[[float], float]) -> float:
    """The derivative at 0, by central differences."""
    return (function(STEP) - function(-STEP)) / (2 * STEP)


# What the readout reads.


@models("eight_outputs", "dinov2_registers", "beit_token", "dinov3_token", "token_fc_norm")
def test_class_token_is_read_out(name: str) -> None:
    model, _ = setting(name)
    weights = readout_weights(model, 9)
    assert weights[0] == 1
    assert not weights[1:].any()


def test_two_tokens_are_read_out() -> None:
    model, _ = setting("deit_distilled")
    assert readout_weights(model, 6).tolist() == [0.5, 0.5, 0, 0, 0, 0]


@models("average_pool", "average_pool_class_token", "average_pool_register", "beit", "eva02", "dinov3", "siglip_pool")
def test_patches_are_read_out(name: str) -> None:
    model, _ = setting(name)
    weights = readout_weights(model, model.num_prefix_tokens + 4)
    assert not weights[: model.num_prefix_tokens].any()
    assert weights[model.num_prefix_tokens :].tolist() == pytest.approx([0.25] * 4)


def test_all_tokens_are_read_out() -> None:
    model, _ = setting("average_pool_with_prefix")
    assert readout_weights(model, 5).tolist() == pytest.approx([0.2] * 5)


@models("max_pool", "siglip", "map_pool_class_token", "perception_encoder")
def test_no_weights_describe_the_readout(name: str) -> None:
    model, _ = setting(name)
    with pytest.raises(ValueError, match="readout"):
        readout_weights(model, 9)


# The CDAM family.


@models("eight_outputs", "deit_distilled", "siglip", "beit", "rope_mixed")
def test_cdam_is_the_older_references(name: str) -> None:
    model, image = setting(name)
    older = cdam_reference.cdam(model, image, -1)
    found = tail_references.cdam(model, image, logit)
    assert relative_error(found.scores, older.scores) < 1e-12
    assert found.prefix_share == pytest.approx(older.prefix_share, rel=1e-10, abs=1e-15)


@both_functions
@models("eight_outputs", "deit_distilled", "beit", "rope_mixed", "sapiens2")
def test_parts_of_cdam_by_differences(name: str, f: Function) -> None:
    """Value part: the token is scaled where the values are made, and every attention weight stays put."""
    model, image = setting(name)
    found = tail_references.cdam(model, image, f, parts=True)
    tokens = run(model, image).tokens[0].detach()
    weights = run(model, image, attention=True).attention[-1].detach()
    prefix = model.num_prefix_tokens

    for patch in (0, found.scores.numel() - 1):

        def change(by: float, patch: int = patch) -> float:
            scaled = tokens.clone()
            scaled[prefix + patch] *= 1 + by
            with written_out(model), model.blocks[-1].attn.attn_drop.register_forward_hook(lambda *_: weights):
                return value(model, image, f, tokens=scaled)

        scale = found.scores.abs().max()
        assert abs(found.value_part.flatten()[patch] - slope(change)) < 1e-7 * scale
        total = (found.value_part + found.key_part - found.scores).flatten()[patch]
        assert abs(total) < 1e-12 * scale
    assert found.key_part.abs().max() > 0.001 * scale


@both_functions
@models("eight_outputs", "deit_distilled", "siglip", "beit", "rope")
def test_integrated_cdam_is_complete_in_the_limit(name: str, f: Function) -> None:
    model, image = setting(name)

    def residual(steps: int, quadrature: str) -> float:
        return abs(tail_references.integrated_cdam(model, image, f, steps, quadrature).completeness_residual)

    scale = tail_references.cdam(model, image, f).scores.abs().max()
    assert residual(48, "gauss_legendre") < 1e-3 * scale
    assert residual(48, "gauss_legendre") < residual(48, "riemann_right") / 10
    assert residual(48, "riemann_right") < 0.6 * residual(24, "riemann_right")


def test_tolerance_doubles_the_steps() -> None:
    model, image = setting("eight_outputs")
    once = tail_references.integrated_cdam(model, image, logit, 3, "riemann_right")
    found = tail_references.integrated_cdam(
        model, image, logit, 3, "riemann_right", abs(once.completeness_residual) / 5
    )
    assert found.steps in (12, 24, 48)
    assert abs(found.completeness_residual) <= abs(once.completeness_residual) / 5
    same = tail_references.integrated_cdam(model, image, logit, found.steps, "riemann_right")
    assert torch.equal(found.scores, same.scores)


def test_smooth_without_noise_is_plain() -> None:
    model, image = setting("eight_outputs")
    found = tail_references.smooth_cdam(model, image, logit, 3, 0.0, relative=True, seed=4)
    assert relative_error(found.scores, tail_references.cdam(model, image, logit).scores) < 1e-12
    assert not found.standard_error.round(decimals=12).any()
    one = tail_references.smooth_cdam(model, image, logit, 1, 0.1, relative=True, seed=4)
    assert one.standard_error is None


# Attention.


@models("eight_outputs", "deit3", "beit", "beitv2_shared_bias", "eva02", "dinov3", "rope_mixed", "sapiens2", "qk_norm")
def test_weights_and_values_make_what_attention_puts_out(name: str) -> None:
    model, image = setting(name)
    attn = model.blocks[-1].attn
    seen = attention_references._inputs(model, image, {"proj": attn.norm if hasattr(attn, "norm") else attn.proj})
    weights = run(model, image, attention=True).attention[-1][0].detach()
    values = attention_references._values(attn, run(model, image).tokens[0].detach())
    assert torch.allclose(weights.sum(dim=-1), torch.ones((), dtype=weights.dtype))
    assert relative_error((weights @ values).transpose(0, 1).flatten(1), seen["proj"][0]) < 1e-12


@models("eight_outputs", "deit_distilled", "average_pool_register", "beit", "rope_mixed")
def test_attention_and_rollout_share_out_one(name: str) -> None:
    model, image = setting(name)
    for found in (attention(model, image), attention(model, image, heads=(1,)), attention_rollout(model, image)):
        assert found.scores.min() > 0
        assert found.scores.sum() == pytest.approx(1 - found.prefix_share)
    mean = sum(attention(model, image, heads=(head,)).scores for head in range(3)) / 3
    assert relative_error(attention(model, image).scores, mean) < 1e-12


@both_functions
@models("eight_outputs", "deit_distilled", "beit", "rope_mixed")
def test_relevance_propagation_by_differences(name: str, f: Function) -> None:
    """df/dA without autograd, for every weight of every block, and R written as a product."""
    model, image = setting(name)
    weights = [layer.detach() for layer in run(model, image, attention=True).attention]
    product = torch.eye(weights[0].shape[-1], dtype=torch.float64)
    for layer, block in enumerate(model.blocks):
        slopes = torch.zeros_like(weights[layer])
        for place in torch.cartesian_prod(*map(torch.arange, weights[layer].shape[1:])).tolist():

            def changed(by: float, layer: int = layer, place: list[int] = place, block: nn.Module = block) -> float:
                def change(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
                    out = out.clone()
                    out[(0, *place)] += by
                    return out

                with written_out(model), block.attn.attn_drop.register_forward_hook(change):
                    return value(model, image, f)

            slopes[(0, *place)] = slope(changed)
        positive = (slopes * weights[layer])[0].clamp(min=0).mean(dim=0)
        product = (torch.eye(len(product), dtype=torch.float64) + positive) @ product
    expected = (readout_weights(model, len(product)) @ product)[model.num_prefix_tokens :]
    found = relevance_propagation(model, image, f)
    assert relative_error(found.scores.flatten(), expected) < 1e-6


def test_linear_rule_is_the_authors() -> None:
    """Chefer et al. compute it by autograd: x+ d(Z+)/dx+ and x- d(Z-)/dx-, weighted by R / (Z+ + Z-)."""
    random = torch.Generator().manual_seed(0)
    x, weight, relevance = (
        torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((7,), (5, 7), (5,))
    )
    x[2] = 0
    found = attention_references._through_linear(x, weight, relevance)
    up, down = x.clamp(min=0).requires_grad_(), x.clamp(max=0).requires_grad_()
    above, below = F.linear(up, weight.clamp(min=0)), F.linear(down, weight.clamp(max=0))
    share = relevance / (above + below).detach()
    (from_above,) = torch.autograd.grad(above, up, share)
    (from_below,) = torch.autograd.grad(below, down, share)
    assert relative_error(found, (up * from_above + down * from_below).detach()) < 1e-8
    assert found.sum() == pytest.approx(relevance.sum())
    assert not attention_references._through_linear(torch.zeros_like(x), weight, relevance).any()


@models("eight_outputs", "beit_token", "rope_mixed", "dinov2_registers")
def test_partial_lrp_is_positive_and_depends_on_the_target(name: str) -> None:
    model, image = setting(name)
    found = [partial_lrp(model, image, f) for f in (logit, likeness)]
    for one in found:
        assert one.scores.min() >= 0
        assert one.scores.max() > 0
    assert relative_error(found[0].scores, found[1].scores) > 0.01


def test_partial_lrp_without_skips() -> None:
    """With nothing through the MLP and all through the attention: logit, head, proj and A, by hand."""
    model, image = setting("single_head")
    block = model.blocks[-1]
    ways = iter(["skip", "through"])

    def shares(_a: Tensor, _b: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
        nothing = torch.zeros_like(relevance)
        return (relevance, nothing) if next(ways) == "skip" else (nothing, relevance)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_references, "_shares", shares)
        found = partial_lrp(model, image, logit)
    seen = attention_references._inputs(model, image, {"head": model.head, "proj": block.attn.proj})
    relevance = torch.zeros(len(model.head.weight), dtype=torch.float64)
    relevance[-1] = 1
    relevance = attention_references._through_linear(seen["head"][0], model.head.weight, relevance)
    relevance = attention_references._through_linear(seen["proj"][0, 0], block.attn.proj.weight, relevance)
    weights = run(model, image, attention=True).attention[-1][0, 0, 0].detach()
    values = attention_references._values(block.attn, run(model, image).tokens[0].detach())[0]
    shared = weights[:, None] * values / (weights @ values)
    expected = (shared @ relevance / 2).clamp(min=0)[model.num_prefix_tokens :]
    assert relative_error(found.scores.flatten(), expected) < 1e-6


# Pixels.


@both_functions
@models("patch_oblong", "siglip", "beit")
def test_pixel_maps_by_differences(name: str, f: Function) -> None:
    model, image = setting(name)
    down, across = model.patch_embed.patch_size
    product = pixel_references.input_x_gradient(model, image, f).scores
    plain = pixel_references.smooth_grad(model, image, f, 1, 0.0, relative=True, seed=0).scores
    rows, columns = product.shape
    for row, column in ((0, 0), (rows - 1, 0), (rows - 1, columns - 1)):
        window = torch.zeros_like(image)
        window[:, row * down : (row + 1) * down, column * across : (column + 1) * across] = 1
        scaled = slope(lambda by, window=window: value(model, image * (1 + by * window), f))
        shifted = slope(lambda by, window=window: value(model, image + by * window, f))
        assert abs(product[row, column] - scaled) < 1e-6 * product.abs().max()
        assert abs(plain[row, column] - shifted) < 1e-6 * plain.abs().max()


@both_functions
def test_integrated_gradients_are_complete_in_the_limit(f: Function) -> None:
    model, image = setting("eight_outputs")
    found = pixel_references.integrated_gradients(model, image, f, 64, "gauss_legendre")
    change = value(model, image, f) - value(model, torch.zeros_like(image), f)
    assert float(found.scores.sum()) == pytest.approx(change + found.completeness_residual, rel=1e-9)
    assert abs(found.completeness_residual) < 0.02 * found.scores.abs().max()


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_gauss_legendre_is_exact_for_polynomials(steps: int) -> None:
    points, weights = quadrature_rule("gauss_legendre", steps)
    for degree in range(2 * steps):
        integral = sum(weight * point**degree for point, weight in zip(points, weights, strict=True))
        assert math.isclose(integral, 1 / (degree + 1), rel_tol=1e-12)


# Tokens.


@both_functions
@models(
    "eight_outputs",
    "deit_distilled",
    "clip",
    "average_pool",
    "siglip",
    "beit_token",
    "beitv2_shared_bias",
    "rope",
    "rope_mixed",
    "dinov3_token",
    "perception_encoder",
)
def test_ablated_token_is_one_that_nobody_attends_to(name: str, f: Function) -> None:
    """Taken away, or present but with its attention weights shared out among the others and kept from the readout."""
    model, image = setting(name)
    found = token_ablation(model, image, f).scores.flatten()
    whole = value(model, image, f)
    for patch in (0, len(found) - 1):
        token = model.num_prefix_tokens + patch

        def ignore(_module: nn.Module, _args: Any, out: Tensor, token: int = token) -> Tensor:
            out = out.clone()
            out[..., token] = 0
            return out / out.sum(dim=-1, keepdim=True)

        def remove(_module: nn.Module, _args: Any, out: Tensor, token: int = token) -> Tensor:
            return torch.cat([out[:, :token], out[:, token + 1 :]], dim=1)

        with contextlib.ExitStack() as stack:
            stack.enter_context(written_out(model))
            for block in model.blocks:
                stack.enter_context(block.attn.attn_drop.register_forward_hook(ignore))
            stack.enter_context(model.norm.register_forward_hook(remove))
            rest = value(model, image, f)
        assert found[patch] == pytest.approx(whole - rest, rel=1e-8, abs=1e-12)
        assert abs(found[patch]) > 1e-6


@models("average_pool", "siglip_pool")
def test_predictions_of_patches_average_to_the_models(name: str) -> None:
    model, image = setting(name)
    found = patch_mask_prediction(model, image, logit, "identity")
    assert float(found.scores.mean()) == pytest.approx(value(model, image, logit))
    assert patch_mask_prediction(model, image, logit, "softmax").scores.min() > 0
    assert patch_mask_prediction(model, image, logit, "sigmoid").scores.max() < 1


# Captum.


def captum_tolerance(found: ReferenceMap) -> float:
    """Captum keeps the points and weights of a path in single precision, whatever the model's."""
    return 1e-10 if found.steps is None else 1e-6


@both_functions
@models("eight_outputs", "deit_distilled", "beit", "rope_mixed")
def test_tail_references_are_captums(name: str, f: Function) -> None:
    model, image = setting(name)
    tokens = run(model, image).tokens
    sigma = 0.1 * float((tokens.max() - tokens.min()).detach())
    pairs = [
        (captum_maps.cdam(model, image, f), tail_references.cdam(model, image, f)),
        (
            captum_maps.smooth_cdam(model, image, f, 3, sigma, 7),
            tail_references.smooth_cdam(model, image, f, 3, 0.1, relative=True, seed=7),
        ),
        *(
            (
                captum_maps.integrated_cdam(model, image, f, 6, rule),
                tail_references.integrated_cdam(model, image, f, 6, rule),
            )
            for rule in ("riemann_right", "gauss_legendre")
        ),
    ]
    for attribution, found in pairs:
        captum = attribution.detach()
        patches = captum[model.num_prefix_tokens :].reshape(found.scores.shape)
        assert relative_error(found.scores, patches) < captum_tolerance(found)
        share = captum[: model.num_prefix_tokens].abs().sum() / captum.abs().sum()
        assert found.prefix_share == pytest.approx(float(share), abs=captum_tolerance(found))


@both_functions
@models("patch_oblong", "siglip", "beit")
def test_pixel_references_are_captums(name: str, f: Function) -> None:
    model, image = setting(name)
    sigma = float(0.1 * (image.max() - image.min()))
    pairs = [
        (captum_maps.input_x_gradient(model, image, f), pixel_references.input_x_gradient(model, image, f)),
        (
            captum_maps.smooth_grad(model, image, f, 3, sigma, 7),
            pixel_references.smooth_grad(model, image, f, 3, 0.1, relative=True, seed=7),
        ),
        *(
            (
                captum_maps.integrated_gradients(model, image, f, 6, rule),
                pixel_references.integrated_gradients(model, image, f, 6, rule),
            )
            for rule in ("riemann_right", "gauss_legendre")
        ),
    ]
    for captum, found in pairs:
        assert relative_error(found.scores, captum.detach()) < captum_tolerance(found)


def test_references_leave_nothing_behind() -> None:
    model, image = setting("beit")

    def broken(latent: Tensor, logits: Tensor) -> Tensor:
        raise KeyError("f")

    attempts: list[Callable[[], object]] = [
        lambda: tail_references.cdam(model, image, broken, parts=True),
        lambda: relevance_propagation(model, image, broken),
        lambda: token_ablation(model, image, broken),
        lambda: pixel_references.input_x_gradient(model, image, broken),
    ]
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    for attempt in attempts:
        with pytest.raises(KeyError):
            attempt()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(module.fused_attn for module in model.modules() if hasattr(module, "fused_attn"))
    assert all(weight.grad is None for weight in model.parameters())
