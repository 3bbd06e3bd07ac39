"""Token ablation and patch mask prediction the slow, plain way: one patch at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from reference.cdam_reference import patch_grid
from reference.whole_model import Function, ReferenceMap, activated, run


def token_ablation(model: nn.Module, image: Tensor, f: Function) -> ReferenceMap:
    """f of the image less f without the patch, which the blocks never see: leave-one-out, one forward pass a patch."""
    h, w = patch_grid(model, image)
    whole = run(model, image)
    scores = whole.latent.new_zeros(h * w)
    for patch in range(h * w):
        with _without(model, model.num_prefix_tokens + patch, model.num_prefix_tokens + h * w):
            rest = run(model, image)
        assert len(rest.final) == len(whole.final) - 1
        scores[patch] = (f(whole.latent, whole.logits) - f(rest.latent, rest.logits)).detach()
    return ReferenceMap(scores.reshape(h, w))


def patch_mask_prediction(model: nn.Module, image: Tensor, f: Function, activation: str) -> ReferenceMap:
    """What the classifier says of every patch's own final token, as if it were what the readout reads.

    f is given the token's latent and the activated outputs; DeiT's two heads answer as they do for the image, in the
    mean.
    """
    h, w = patch_grid(model, image)
    final = run(model, image).final.detach()
    scores = final.new_zeros(h * w)
    with torch.no_grad():
        for patch in range(h * w):
            token = final[model.num_prefix_tokens + patch]
            latent = model.fc_norm(token)
            outputs = model.head(latent)
            if hasattr(model, "head_dist"):
                outputs = (outputs + model.head_dist(latent)) / 2
            scores[patch] = f(latent, activated(outputs, activation))
    return ReferenceMap(scores.reshape(h, w))


@contextlib.contextmanager
def _without(model: nn.Module, token: int, count: int) -> Iterator[None]:
    """Take one of `count` tokens away before the first block, with its rotary or relative position."""
    keep = [i for i in range(count) if i != token]
    patches = [i - model.num_prefix_tokens for i in keep if i >= model.num_prefix_tokens]

    def drop(_module: nn.Module, _args: Any, x: Tensor) -> Tensor:
        return x[:, keep]

    def drop_positions(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        kwargs = dict(kwargs)
        if kwargs.get("rope") is not None:
            kwargs["rope"] = kwargs["rope"][..., patches, :]
        for name in ("shared_rel_pos_bias", "shared_rel_pos"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name][..., keep, :][..., keep]
        return args, kwargs

    with contextlib.ExitStack() as stack:
        # Beit has no norm before its blocks; its position dropout comes last.
        last = getattr(model, "norm_pre", None) or getattr(model, "pos_drop", None)
        if last is not None:
            stack.enter_context(last.register_forward_hook(drop))
        else:  # VisionTransformerRelPos has neither: its first block is the first to be called
            stack.enter_context(model.blocks[0].register_forward_pre_hook(lambda _module, args: (args[0][:, keep],)))
        for block in model.blocks:
            stack.enter_context(block.register_forward_pre_hook(drop_positions, with_kwargs=True))
            if getattr(block.attn, "relative_position_bias_table", None) is not None:
                bias = block.attn._get_rel_pos_bias()[..., keep, :][..., keep]
                block.attn._get_rel_pos_bias = lambda bias=bias: bias
                stack.callback(delattr, block.attn, "_get_rel_pos_bias")
            if getattr(block.attn, "rel_pos", None) is not None:
                bias = block.attn.rel_pos.get_bias()[..., keep, :][..., keep]
                block.attn.rel_pos.get_bias = lambda bias=bias: bias
                stack.callback(delattr, block.attn.rel_pos, "get_bias")
        yield
