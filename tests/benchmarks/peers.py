"""Other ways to the same maps, as their authors or libraries go them, and the plain ways that need no idea.

Each takes a model, normalised pixels (B, 3, H, W) and one class an image, and returns the patches' scores, shape
(B, patches), unless it says otherwise. None leaves a hook or a gradient on the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from captum.attr import LayerGradientXActivation, LayerIntegratedGradients
from pytorch_grad_cam import HiResCAM  # type: ignore[import-untyped]
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget  # type: ignore[import-untyped]
from torch import Tensor

from cdam_engine import Noise, Output, SplitViT
from cdam_engine.methods.quadrature import nodes
from cdam_engine.tail import AutogradTail

Way = Callable[[Any, Tensor, Sequence[int]], Tensor]


def one_at_a_time(way: Way, model: Any, x: Tensor, classes: Sequence[int]) -> Tensor:
    """A way, image by image."""
    return torch.cat([way(model, x[b : b + 1], classes[b : b + 1]) for b in range(len(x))])


def full_backward(model: Any, x: Tensor, classes: Sequence[int]) -> Tensor:
    """CDAM as its authors' code has it: hook the tokens, run the model forward and backward, weights included."""
    kept: list[Tensor] = []
    handle = model.blocks[-1].norm1.register_forward_hook(lambda module, inputs, output: kept.append(output))
    try:
        logits = model(x)
    finally:
        handle.remove()
    (tokens,) = kept
    tokens.retain_grad()
    torch.autograd.backward(_of_classes(logits, classes).sum())
    assert tokens.grad is not None
    scores = (tokens * tokens.grad).sum(-1)[:, model.num_prefix_tokens :].detach()
    model.zero_grad(set_to_none=True)
    return scores


def hires_cam(model: Any, x: Tensor, classes: Sequence[int]) -> Tensor:
    """grad-cam's HiResCAM on the same layer: the map before it is clipped, scaled and enlarged (which is timed too)."""

    def to_grid(tokens: Tensor) -> Tensor:
        return torch.unflatten(tokens[:, model.num_prefix_tokens :].transpose(1, 2), 2, model.patch_embed.grid_size)

    kept: list[Tensor] = []
    with HiResCAM(model, [model.blocks[-1].norm1], reshape_transform=to_grid) as cam:
        raw = cam.get_cam_image

        def keep(*arguments: Any) -> Any:
            found = raw(*arguments)
            kept.append(torch.from_numpy(found))
            return found

        cam.get_cam_image = keep
        cam(input_tensor=x, targets=[ClassifierOutputTarget(index) for index in classes])
    model.zero_grad(set_to_none=True)
    return kept[0].flatten(1)


def captum_cdam(model: Any, x: Tensor, classes: Sequence[int]) -> Tensor:
    """captum's LayerGradientXActivation on the same layer."""
    found: Tensor = LayerGradientXActivation(model, model.blocks[-1].norm1).attribute(x, target=list(classes))
    return found.detach().sum(-1)[:, model.num_prefix_tokens :]


def captum_targets(model: Any, x: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
    """The same for many classes of each image, one after the other: shape (B, K, patches)."""
    return torch.stack([captum_cdam(model, x, classes) for classes in zip(*targets, strict=True)], dim=1)


def captum_integrated(model: Any, x: Tensor, classes: Sequence[int], steps: int, at_once: int = 8) -> Tensor:
    """captum's LayerIntegratedGradients: each step is a pass through the whole model.

    Another map: its path starts from the tokens of the image of zeros, not from zero tokens.
    """
    found: Tensor = LayerIntegratedGradients(model, model.blocks[-1].norm1).attribute(
        x, target=list(classes), n_steps=steps, method="riemann_right", internal_batch_size=at_once
    )
    return found.detach().sum(-1)[:, model.num_prefix_tokens :]


def autograd_integrated(model: Any, x: Tensor, classes: Sequence[int], steps: int) -> Tensor:
    """Integrated CDAM the plain way: the trunk once, a tail forward and backward for each step."""
    vit = SplitViT(model)
    with torch.no_grad():
        tail = AutogradTail(vit, vit.trunk(x))
        scores = tail.scores([[Output(index)] for index in classes], *nodes("riemann_right", steps)).scores
    return scores[:, 0, vit.num_prefix_tokens :]


def autograd_smooth(model: Any, x: Tensor, classes: Sequence[int], noise: Tensor, level: Noise) -> Tensor:
    """Smooth CDAM the plain way: the trunk once, a tail forward and backward for each draw.

    Args:
        model: The model.
        x: Normalised pixels.
        classes: One an image.
        noise: The draws, shape (draws, N, D); the time to draw them is not counted.
        level: Their standard deviation.
    """
    vit = SplitViT(model)
    targets = [[Output(index)] for index in classes]
    with torch.no_grad():
        trunk = vit.trunk(x)
        sigma = level.sigma(trunk.tokens)[:, None, None]
        total = torch.zeros(trunk.tokens.shape[:2], device=x.device)
        for draw in noise:
            noisy = replace(trunk, tokens=trunk.tokens + sigma * draw)
            total += AutogradTail(vit, noisy).scores(targets).scores[:, 0]
    return (total / len(noise))[:, vit.num_prefix_tokens :]


def with_readable_attention(model: Any) -> Any:
    """A copy of a model whose attention makes its weights, as code that reads them needs it."""
    copied = copy.deepcopy(model)
    for block in copied.blocks:
        block.attn.fused_attn = False
    return copied


def chefer_relevance(model: Any, x: Tensor, classes: Sequence[int]) -> Tensor:
    """Relevance propagation the plain way, for one image.

    Attention weights and their gradients by hooks, a backward pass through all of the model, weights included, and the
    recursion on N x N matrices: the steps of github.com/hila-chefer/Transformer-MM-Explainability.

    Args:
        model: One with readable attention.
        x: Normalised pixels of one image.
        classes: Its class.
    """
    weights: list[Tensor] = []
    handles = [
        block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: weights.append(output))
        for block in model.blocks
    ]
    try:
        logits = model(x)
    finally:
        for handle in handles:
            handle.remove()
    for a in weights:
        a.retain_grad()
    model.zero_grad(set_to_none=True)
    torch.autograd.backward(_of_classes(logits, classes).sum())
    with torch.no_grad():
        relevance = torch.eye(weights[0].shape[-1], device=x.device)
        for a in weights:
            assert a.grad is not None
            relevance = relevance + (a * a.grad)[0].clamp(min=0).mean(dim=0) @ relevance
    model.zero_grad(set_to_none=True)
    return relevance[None, 0, model.num_prefix_tokens :]


@torch.inference_mode()
def ablation_loop(model: Any, x: Tensor, classes: Sequence[int]) -> Tensor:
    """Token ablation of one image the plain way: for each patch, the model's own blocks on the tokens without it."""

    def value(tokens: Tensor) -> Tensor:
        for block in model.blocks:
            tokens = block(tokens)
        return _of_classes(model.forward_head(model.norm(tokens)), classes)

    tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    rest = [
        value(torch.cat((tokens[:, :i], tokens[:, i + 1 :]), dim=1))
        for i in range(model.num_prefix_tokens, tokens.shape[1])
    ]
    return value(tokens)[:, None] - torch.stack(rest, dim=1)


def _of_classes(logits: Tensor, classes: Sequence[int]) -> Tensor:
    return logits[torch.arange(len(logits)), list(classes)]
