"""A timm attention, taken apart: queries, keys, values, weights, output.

What it computes is what the module computes; `tests/reference` compares the two. Modules whose code differs from what
is mirrored here are refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any, Final, NamedTuple, cast

import torch
from timm.layers import apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.cait import ClassAttn
from timm.models.eva import AttentionRope, EvaAttention
from timm.models.vision_transformer import Attention
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn

from cdam_engine.errors import UnsupportedMethodError

KNOWN: tuple[type[nn.Module], ...] = (
    Attention,
    AttentionRope,
    EvaAttention,
    BeitAttention,
    RelPosAttention,
    ClassAttn,
)


_hooks: Final = attrgetter("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Projected(NamedTuple):
    """Queries, scaled, (B, H, M, d) of the M tokens that ask, keys and values (B, H, N, d)."""

    queries: Tensor
    keys: Tensor
    values: Tensor


def is_code_of(module: nn.Module, method: str, classes: tuple[type[nn.Module], ...]) -> bool:
    """Whether a method is one of these classes' own: neither a subclass nor the instance has another."""
    code = getattr(getattr(module, method, None), "__func__", None)
    return any(code is getattr(known, method) for known in classes)


def is_plain(module: Any, *classes: type[nn.Module]) -> bool:
    """Whether a module is exactly of one of these classes and nothing hooks into it, so that it can be bypassed."""
    return type(module) in classes and not is_changed(module)


class Listener:
    """A hook of the proof's own. It acts in its own thread's run alone, so that to all others it is none.

    Args:
        hear: What is called as the hook.
    """

    def __init__(self, hear: Callable[..., Any]) -> None:
        self._hear = hear
        self._thread = threading.get_ident()

    def __call__(self, *given: Any) -> Any:
        """Called by torch."""
        return self._hear(*given) if threading.get_ident() == self._thread else None

    def __deepcopy__(self, _memo: Any) -> Listener:
        """A copy of the model has nobody who listens."""
        return Listener(lambda *_: None)


def hooks_on(module: Any) -> Iterator[Any]:
    """What hooks into a module's forward or backward pass, a proof that is under way excepted."""
    for hooks in _hooks(module):
        if hooks:
            yield from (hook for hook in tuple(hooks.values()) if not isinstance(hook, Listener))


def is_changed(module: Any) -> bool:
    """Whether something hooks into a module, or gives it another forward pass."""
    return "forward" in vars(module) or (any(_hooks(module)) and any(True for _ in hooks_on(module)))


def check_known(attention: nn.Module) -> None:
    """Refuse an attention that can't be taken apart.

    Raises:
        UnsupportedMethodError: It is none of timm's that are mirrored here.
    """
    if not is_plain(attention, *KNOWN):
        raise UnsupportedMethodError(
            "UNKNOWN_ATTENTION", f"{type(attention).__name__} is no attention that can be taken apart, or has hooks"
        )


def project(attention: nn.Module, tokens: Tensor, arguments: Mapping[str, Any]) -> Projected:
    """Queries, keys and values of tokens (B, N, D), normalised and rotated as the module does it."""
    module = cast("Any", attention)
    batch, count, _ = tokens.shape
    bias = getattr(module, "q_bias", None)
    if getattr(module, "qkv", None) is not None:
        if bias is not None:
            qkv = nn.functional.linear(
                tokens, module.qkv.weight, torch.cat((module.q_bias, module.k_bias, module.v_bias))
            )
        else:
            qkv = module.qkv(tokens)
        q, k, v = qkv.reshape(batch, count, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        its = linear_parts(module)
        asking = tokens[:, :1] if isinstance(module, ClassAttn) else tokens
        kv_heads = getattr(module, "num_kv_heads", module.num_heads)
        q, k, v = (
            part(given).reshape(batch, given.shape[1], heads, -1).transpose(1, 2)
            for part, given, heads in zip(
                its, (asking, tokens, tokens), (module.num_heads, kv_heads, kv_heads), strict=True
            )
        )
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    rope = arguments.get("rope")
    if rope is not None:
        q, k = (_rotate(module, part, rope).type_as(v) for part in (q, k))
    groups = module.num_heads // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return Projected(q * module.scale, k, v)


def linear_parts(attention: nn.Module) -> tuple[Any, ...]:
    """The module that makes queries, keys and values together, or those that make each."""
    module = cast("Any", attention)
    if isinstance(module, ClassAttn):
        return module.q, module.k, module.v
    return (module.qkv,) if module.qkv is not None else (module.q_proj, module.k_proj, module.v_proj)


def position_bias(attention: nn.Module, arguments: Mapping[str, Any]) -> Tensor | None:
    """What is added to the products of queries and keys: relative positions, (1, H, N, N), or None."""
    module = cast("Any", attention)
    if isinstance(module, RelPosAttention):  # a block has relative positions of its own, or the model's
        own = cast("Tensor | None", None if module.rel_pos is None else module.rel_pos.get_bias())
        return cast("Tensor | None", arguments.get("shared_rel_pos")) if own is None else own
    shared = cast("Tensor | None", arguments.get("shared_rel_pos_bias"))
    if shared is not None and shared.ndim == 3:  # BEiT's blocks share it without a batch axis
        shared = shared[None]
    if getattr(module, "relative_position_bias_table", None) is None:
        return shared
    table = cast("Tensor", module._get_rel_pos_bias())  # noqa: SLF001
    return table if shared is None else table + shared


def weights(projected: Projected, bias: Tensor | None, rows: int | None = None) -> Tensor:
    """A, shape (B, H, M, N); or of the first `rows` queries only, (B, H, rows, N).

    Args:
        projected: Queries and keys.
        bias: See `position_bias`.
        rows: How many tokens ask; None: all that can.
    """
    logits = projected.queries[:, :, :rows] @ projected.keys.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias[:, :, :rows]
    return logits.softmax(dim=-1)


def combine(attention: nn.Module, a: Tensor, values: Tensor, tokens: Tensor) -> Tensor:
    """The attention's output (B, M, D) of weights (B, H, M, N) and values; M tokens ask, the first ones."""
    module = cast("Any", attention)
    x = (a @ values).transpose(1, 2).flatten(2)
    x = inner_norm(attention)(x)
    if getattr(module, "gate", None) is not None:
        x = x * module.gate(tokens[:, : x.shape[1]]).sigmoid()
    return project_out(attention, x)


def project_out(attention: nn.Module, x: Tensor) -> Tensor:
    """From the heads' outputs, side by side, to the attention's."""
    module = cast("Any", attention)
    return cast("Tensor", module.proj_drop(module.proj(x)))


def inner_norm(attention: nn.Module) -> nn.Module:
    """The norm between heads and projection; most have none."""
    return getattr(attention, "norm", None) or nn.Identity()


def _rotate(module: Any, part: Tensor, rope: Tensor) -> Tensor:
    prefix = module.num_prefix_tokens
    half = {"half": True} if getattr(module, "rotate_half", False) else {}  # older ones know one layout only
    return torch.cat((part[:, :, :prefix], apply_rot_embed_cat(part[:, :, prefix:], rope, **half)), dim=2)
