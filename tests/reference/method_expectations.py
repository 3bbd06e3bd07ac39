"""What the references say to a method of the engine and a target: where the two vocabularies meet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cdam_engine import (
    Attention,
    AttentionRollout,
    Cdam,
    Concept,
    Contrast,
    InputXGradient,
    IntegratedCdam,
    IntegratedGradients,
    Method,
    Output,
    PartialLrp,
    PatchMaskPrediction,
    RelevancePropagation,
    SmoothCdam,
    SmoothGrad,
    TokenAblation,
)
from reference import attention_references, pixel_references, tail_references, token_references
from reference.models import Case
from reference.whole_model import Function, ReferenceMap

Target = Output | Concept | Contrast


def function(target: Target) -> Function:
    """The target as its definition says."""

    def f(latent: Tensor, outputs: Tensor) -> Tensor:
        match target:
            case Output(index):
                return outputs[index]
            case Contrast(positive, negative):
                return function(positive)(latent, outputs) - function(negative)(latent, outputs)
            case Concept(vector, "dot"):
                return (latent * vector.to(latent.dtype)).sum()
            case Concept(vector, "l2"):
                return -((latent - vector.to(latent.dtype)) ** 2).sum() / 2
            case Concept(vector, "cosine"):
                return torch.cosine_similarity(latent, vector.to(latent.dtype), dim=0)
        raise AssertionError(target)

    return f


def expected(model: nn.Module, image: Tensor, method: Method, target: Target | None) -> ReferenceMap:  # noqa: C901, PLR0911
    """The reference's map."""
    match method:
        case Attention(heads):
            return attention_references.attention(model, image, heads)
        case AttentionRollout():
            return attention_references.attention_rollout(model, image)
    assert target is not None
    f = function(target)
    match method:
        case Cdam(parts):
            return tail_references.cdam(model, image, f, parts=parts)
        case SmoothCdam(samples, noise, seed):
            return tail_references.smooth_cdam(
                model, image, f, samples, noise.level, relative=noise.relative, seed=seed
            )
        case IntegratedCdam(steps, quadrature, tolerance):
            return tail_references.integrated_cdam(model, image, f, steps, quadrature, tolerance)
        case RelevancePropagation():
            return attention_references.relevance_propagation(model, image, f)
        case PartialLrp():
            return attention_references.partial_lrp(model, image, f)
        case InputXGradient():
            return pixel_references.input_x_gradient(model, image, f)
        case SmoothGrad(samples, noise, seed):
            return pixel_references.smooth_grad(
                model, image, f, samples, noise.level, relative=noise.relative, seed=seed
            )
        case IntegratedGradients(steps, quadrature):
            return pixel_references.integrated_gradients(model, image, f, steps, quadrature)
        case TokenAblation():
            return token_references.token_ablation(model, image, f)
        case PatchMaskPrediction(activation):
            return token_references.patch_mask_prediction(model, image, f, activation)
    raise AssertionError(method)


def concept(model: nn.Module, seed: int) -> Tensor:
    """A concept's vector, float32."""
    return torch.randn(model.num_features, generator=torch.Generator().manual_seed(seed))


# What models can't be asked for, read off their configuration by hand.

NO_READOUT_WEIGHTS = {"max_pool", "siglip", "map_pool_class_token", "perception_encoder"}
ATTENTION_POOL = NO_READOUT_WEIGHTS - {"max_pool"}
UNKNOWN_ATTENTION = {"differential_attention"}
AVERAGE_POOL = {
    "inner_norms_beit3",
    "differential_attention",
    "average_pool",
    "average_pool_class_token",
    "average_pool_with_prefix",
    "average_pool_register",
    "siglip_pool",
    "beit",
    "beitv2_shared_bias",
    "eva02",
    "dinov3",
    "rope_average_pool",
    "relative_positions",
    "relative_positions_shared",
}
CLASS_ATTENTION = {"cait", "cait_one_class_block"}  # [CLS] alone attends, to patches that attended among themselves
NO_PLAIN_MLP = {
    "dinov2_swiglu",
    "dinov2_swiglu_registers",
    "eva02",
    "eva02_unfused",
    "eva02_clip",
    "sapiens2",
}
UNSUPPORTED: dict[type[Method], set[str]] = {
    Cdam: set(),
    SmoothCdam: set(),
    IntegratedCdam: set(),
    Attention: NO_READOUT_WEIGHTS | UNKNOWN_ATTENTION,
    AttentionRollout: NO_READOUT_WEIGHTS | UNKNOWN_ATTENTION | CLASS_ATTENTION,
    RelevancePropagation: NO_READOUT_WEIGHTS | UNKNOWN_ATTENTION | CLASS_ATTENTION,
    PartialLrp: NO_READOUT_WEIGHTS | UNKNOWN_ATTENTION | AVERAGE_POOL | NO_PLAIN_MLP | {"deit_distilled"},
    InputXGradient: set(),
    SmoothGrad: set(),
    IntegratedGradients: set(),
    TokenAblation: UNKNOWN_ATTENTION | CLASS_ATTENTION,
    PatchMaskPrediction: ATTENTION_POOL,
}


def supported(case: Case, method: Method) -> bool:
    """Whether the method is defined for the architecture."""
    if method == Cdam(parts=True):
        return case.id not in UNKNOWN_ATTENTION
    return case.id not in UNSUPPORTED[type(method)]
