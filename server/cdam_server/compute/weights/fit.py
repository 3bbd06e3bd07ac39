"""Whether tensors are a model's: which differ, and what keyword arguments the difference speaks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import torch
from torch import Tensor

from cdam_server.settings.load_error import LoadError, few


def refuse_unfit(weights: Mapping[str, Tensor], source: str, setting: str) -> None:
    """Raises LoadError where values are not finite, or not there."""
    if empty := [name for name, tensor in weights.items() if not tensor.numel()]:
        raise LoadError(
            setting, f"{few(empty)} in {source} are empty, as in shards of DeepSpeed's ZeRO stage 3: gather them first"
        )
    strange = [
        f"{name} ({str(tensor.dtype).removeprefix('torch.')}, {str(tensor.layout).removeprefix('torch.')}, {tensor.device})"
        for name, tensor in weights.items()
        if tensor.is_complex() or tensor.layout != torch.strided or tensor.is_meta
    ]
    if strange:
        raise LoadError(setting, f"{few(strange)} in {source} can't be weights: save plain floating-point tensors")
    floats = ((name, tensor) for name, tensor in weights.items() if tensor.is_floating_point())
    if broken := [name for name, tensor in floats if not tensor.float().isfinite().all()]:
        raise LoadError(setting, f"{source} holds values that are not finite, in {few(broken)}")


def differences(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Iterable[str]:
    if missing := sorted(own.keys() - given.keys()):
        yield f"missing {few(missing)}"
    if unexpected := sorted(given.keys() - own.keys()):
        yield f"unexpected {few(unexpected)}"
    shapes = [
        f"{name} {tuple(given[name].shape)} in place of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if shapes:
        yield f"other shapes: {few(shapes)}"
    kinds = [
        f"{name} of {str(given[name].dtype).removeprefix('torch.')}"
        for name, tensor in own.items()
        if name in given and tensor.is_floating_point() != given[name].is_floating_point()
    ]
    if kinds:
        yield f"other numbers: {few(kinds)}"


# What in the names tells of a keyword argument: (in the file alone, in the model alone) -> the argument.
_TRAITS: Final = (
    (True, "fc_norm.weight", "global_pool: avg"),
    (False, "fc_norm.weight", "global_pool: token"),
    (True, "reg_token", "reg_tokens: {count}"),
    (True, "norm_pre.weight", "pre_norm: true"),
    (True, "blocks.0.ls1.gamma", "init_values: 0.00001"),
    (False, "blocks.0.ls1.gamma", "init_values: null"),
    (False, "blocks.0.attn.qkv.bias", "qkv_bias: false"),
    (True, "blocks.0.attn.qkv.bias", "qkv_bias: true"),
    (True, "blocks.0.attn.q_norm.weight", "qk_norm: true"),
    (False, "cls_token", "class_token: false"),
    (True, "cls_token", "class_token: true"),
    (True, "head_dist.weight", "an architecture with a distillation token, deit_*_distilled_*"),
)


def keyword_hint(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Keyword arguments of the architecture that the names speak for, if most of the names are the architecture's."""
    if 2 * len(own.keys() & given.keys()) < len(own):
        return ""
    words = [
        text.format(count=given[name].shape[1] if name in given and given[name].ndim > 1 else 0)
        for in_file, name, text in _TRAITS
        if (name in given) == in_file and (name in own) != in_file
    ]
    first = "blocks.0.mlp.fc1.weight"
    if first in own and first in given and (a := own[first].shape) != (b := given[first].shape) and a[1] == b[1]:
        words.append(f"mlp_ratio: {b[0] / b[1]:g}")
    if not words:
        return ""
    if any(word.startswith("an ") for word in words):
        return f"it may be of {next(word for word in words if word.startswith('an '))}"
    return f"it may need model_kwargs: {{{', '.join(words)}}}"
