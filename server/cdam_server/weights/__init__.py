"""Weights from files into a model: read, find the model's among them, compare with the model, load."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import timm.models
import torch
from torch import Tensor, nn

from cdam_server.load_error import LoadError, few, reason
from cdam_server.specs import Layer
from cdam_server.weights.classifier import classifier_weights
from cdam_server.weights.files import Checkpoint, StateDict, checkpoint_of, read_checkpoint
from cdam_server.weights.geometry import Resampling, Size, compare, geometry_of, misfit
from cdam_server.weights.head_layers import build_head, put_head
from cdam_server.weights.names import Selection, is_pretext, select

__all__ = [
    "NO_REPORT",
    "Checkpoint",
    "LoadError",
    "Report",
    "StateDict",
    "Wish",
    "attach_head",
    "checkpoint_of",
    "load_weights",
]
__all__ += ["read_checkpoint"]

_HEAD_NAMES: Final = ("", "head.", "fc.", "linear.", "classifier.")
# What timm's conversions leave out and computes itself, or what was of training alone.
_DROPPED: Final = re.compile(
    r"mask_token$|relative_position_index$|(^|\.)rope|\.periods$|\.bias_mask$|num_batches_tracked$"
)
_POSITIONS: Final = ("pos_embed", "relative_position_bias_table")


@dataclass(frozen=True)
class Wish:
    """What the settings say of a checkpoint.

    Attributes:
        key: The part that holds the weights.
        num_outputs: Of the classifier; 0: none; None: as many as the file has.
        asked: Whether the settings speak of outputs.
        trained_size: (height, width) that the file's positions are for.
        input_size: (height, width) to which positions may be resampled.
        resample: Whether patch embedding and positions may be.
        head_layers: Of a classifier of several layers.
    """

    key: str | None = None
    num_outputs: int | None = None
    asked: bool = False
    trained_size: Size | None = None
    input_size: Size | None = None
    resample: bool = False
    head_layers: Sequence[Layer] | None = None


@dataclass(frozen=True)
class Report:
    """What was done to a checkpoint.

    Attributes:
        source: The file.
        prefix: What stood before the names.
        left_out: Names of tensors that are not the model's.
        resampled: What has been resampled, in words; "" if nothing.
    """

    source: str = ""
    prefix: str = ""
    left_out: tuple[str, ...] = ()
    resampled: str = ""


NO_REPORT: Final = Report()


def load_weights(model: nn.Module, checkpoint: Checkpoint, setting: str, wish: Wish | None = None) -> Report:
    """Load a checkpoint into a model, after timm's own conversion of foreign formats.

    Args:
        model: A timm model without classifier (`num_classes=0`); it gets the checkpoint's.
        checkpoint: See `read_checkpoint`.
        setting: Name of the setting, for errors.
        wish: What the settings say.

    Raises:
        LoadError: Names, shapes or geometry differ from the model's, or the file is not plain weights of one network.
    """
    wish = wish or Wish()
    names = _classifier_names(model)
    own = [name for name in model.state_dict() if name.rpartition(".")[0] not in names]
    found = select(checkpoint, own, setting, wish.key)
    left_out, weights, layers = found.left_out, found.weights, None
    heads = {f"{name}.{rest}": tensor for name, its in found.classifiers.items() for rest, tensor in its.items()}
    _refuse_unfit(weights | heads, checkpoint.source, setting)
    file, architecture = geometry_of(weights), geometry_of(model.state_dict())
    if file.width != architecture.width and (wrong := misfit(file, architecture)):
        raise LoadError(setting, f"these are not weights of this architecture: {wrong}")
    if found.native and wish.num_outputs == 0:
        left_out += heads
    elif wish.head_layers is not None:
        name, its = _only_classifier(found, setting)
        layers = build_head(wish.head_layers, its, _latent(model), f"{setting} ({name})")
    elif found.native:
        asked = wish.asked or bool(wish.num_outputs)
        head, pretext = classifier_weights(found.classifiers, names, _latent(model), asked=asked, setting=setting)
        weights, left_out = weights | head, left_out + pretext
    count = _outputs_in(weights, names) if wish.num_outputs is None or layers is not None else wish.num_outputs
    if count:
        model.reset_classifier(count)  # type: ignore[operator]  # nn.Module's attributes are untyped
    resampling = compare(
        model,
        weights,
        trained_size=wish.trained_size,
        input_size=wish.input_size,
        allowed=wish.resample,
        setting=setting,
    )
    hint = _hint_of_outside(found, latent=_latent(model))
    _load(model, weights, resampling, None if count else names, hint, setting, native=found.native)
    if layers is not None:
        put_head(model, layers)
    report = Report(checkpoint.source, found.prefix, tuple(left_out))
    return report if resampling is None else replace(report, resampled=resampling.text)


def attach_head(model: nn.Module, path: Path, setting: str, layers: Sequence[Layer] | None = None) -> None:
    """Put a classifier of one's own on a backbone without one.

    Args:
        model: A timm model.
        path: A file with `weight`, shape (C, D), and maybe `bias`, shape (C), which may be named as parts of `head`,
            `fc`, `linear` or `classifier`, and wrapped as training code does it.
        setting: Name of the setting, for errors.
        layers: Of a classifier of several layers, whose tensors have the names of an `nn.Sequential`; None: linear.

    Raises:
        LoadError: The file holds no such head, or one for another latent size.
    """
    tensors = _unwrapped_head(read_checkpoint(path, setting).tensors)
    _refuse_unfit(tensors, str(path), setting)
    if layers is not None:
        plain = {
            name.partition(".")[2] if f"{name.partition('.')[0]}." in _HEAD_NAMES else name: t
            for name, t in tensors.items()
        }
        put_head(model, build_head(layers, plain, _latent(model), setting))
        return
    prefix = next((prefix for prefix in _HEAD_NAMES if f"{prefix}weight" in tensors), None)
    if prefix is None:
        raise LoadError(setting, f"{path} has no `weight` or `head.weight`, but {few(tensors)}")
    weight = tensors.pop(f"{prefix}weight")
    bias = tensors.pop(f"{prefix}bias", None)
    if tensors:
        raise LoadError(setting, f"{path} holds more than a linear head: {few(tensors)}")
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        shape = None if bias is None else tuple(bias.shape)
        raise LoadError(setting, f"weight must be (C, D) and bias (C), not {tuple(weight.shape)} and {shape}")
    model.reset_classifier(weight.shape[0])  # type: ignore[operator]
    classifier = model.get_classifier()  # type: ignore[operator]
    if not isinstance(classifier, nn.Linear):
        raise LoadError(setting, "this architecture does not take a single linear head")
    latent = int(getattr(model, "head_hidden_size", 0) or classifier.in_features)
    if latent != classifier.in_features:  # another library's readout, whose latent is not as wide as the tokens
        model.head = classifier = nn.Linear(latent, weight.shape[0])
    if classifier.in_features != weight.shape[1]:
        raise LoadError(
            setting, f"the weight is for latents of {weight.shape[1]}, the architecture's have {classifier.in_features}"
        )
    with torch.no_grad():
        classifier.weight.copy_(weight)
        classifier.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)


def _unwrapped_head(tensors: Mapping[str, Tensor]) -> StateDict:
    """A head's names without what stands before all of them, down to the head's own name."""
    plain = dict(tensors)
    while plain and all("." in name for name in plain):
        first = {name.partition(".")[0] for name in plain}
        if len(first) != 1 or f"{next(iter(first))}." in _HEAD_NAMES:
            break
        plain = {name.partition(".")[2]: tensor for name, tensor in plain.items()}
    return plain


def _only_classifier(found: Selection, setting: str) -> tuple[str, StateDict]:
    """The classifier whose layers the settings spell out."""
    heads = {name: its for name, its in found.classifiers.items() if not is_pretext(name, its)}
    if len(heads) != 1:
        there = f"there are {' and '.join(sorted(heads))}" if heads else "there is none"
        raise LoadError("head_layers", f"they are of one classifier in {setting}, and {there}")
    return next(iter(heads.items()))


def _latent(model: nn.Module) -> int:
    return int(getattr(model, "head_hidden_size", 0) or getattr(model, "num_features", 0))


def _hint_of_outside(found: Selection, latent: int) -> str:
    """What to do about tensors that stand beside the network and are of no known kind."""
    if not found.outside:
        return ""
    matrices = [
        name for name in found.outside if found.weights[name].ndim == 2 and found.weights[name].shape[1] == latent
    ]
    if matrices:
        return (
            f"{few(matrices, 2)} may be a classifier of another name: save it as weight and bias for the setting head"
        )
    key = found.prefix.removesuffix(".")
    return f"weights_key: {key} would leave out what stands beside it" if key else ""


def _classifier_names(model: nn.Module) -> Sequence[str]:
    """The architecture's classifiers: one, or two of a distilled model."""
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    names = config.get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def _outputs_in(weights: Mapping[str, Tensor], names: Sequence[str]) -> int:
    """Number of outputs of the classifier in a whole model's weights; 0 if there is none."""
    weight = weights.get(f"{names[0]}.weight")
    return 0 if weight is None or weight.ndim != 2 else weight.shape[0]


def _refuse_unfit(weights: Mapping[str, Tensor], source: str, setting: str) -> None:
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


def _load(
    model: nn.Module,
    weights: StateDict,
    resampling: Resampling | None,
    unwanted: Sequence[str] | None,
    hint: str,
    setting: str,
    *,
    native: bool,
) -> None:
    """Convert and load; the model has the file's geometry meanwhile, so that nothing but what is said is resampled."""
    embedding: Any = getattr(model, "patch_embed", None)
    if resampling is not None:
        size, patch = tuple(embedding.img_size), tuple(embedding.feat_ratio(as_scalar=False))
        changes = {} if resampling.patch == patch else {"patch_size": resampling.patch}
        _set_input_size(model, resampling.size, changes, setting)
    converted = _converted(model, weights, setting, native=native)
    own = model.state_dict()
    if unwanted is not None:
        converted = {
            name: tensor for name, tensor in converted.items() if name in own or name.rpartition(".")[0] not in unwanted
        }
    complaints = list(_differences(own, converted))
    if complaints:
        hint = misfit(geometry_of(converted), geometry_of(own)) or _hint(own, converted) or hint
        what = "; ".join(filter(None, (hint, *complaints)))
        raise LoadError(setting, f"these are not weights of this architecture: {what}")
    model.load_state_dict(converted)
    if resampling is not None:
        _set_input_size(model, size, {"patch_size": patch} if changes else {}, setting)


def _set_input_size(model: nn.Module, size: Size, more: Mapping[str, Any], setting: str) -> None:
    try:
        with torch.no_grad():
            model.set_input_size(img_size=size, **more)  # type: ignore[operator]
    except Exception as error:
        raise LoadError(setting, f"timm can't resample this architecture to {size} ({reason(error)})") from error


def _converted(model: nn.Module, weights: StateDict, setting: str, *, native: bool) -> StateDict:
    """After timm's conversion; positions of the model's shape are left as they are, whatever timm takes their grid for."""
    try:
        converted = dict(_converter(model)(dict(weights), model))
    except Exception as error:
        hint = _hint(model.state_dict(), weights) or f"it has {few(weights)}"
        raise LoadError(setting, f"these are not weights of this architecture ({reason(error)}): {hint}") from error
    own = model.state_dict()
    kept = {tensor.data_ptr() for tensor in converted.values()}
    lost = [
        name
        for name, tensor in weights.items()
        if name not in converted and not _DROPPED.search(name) and tensor.data_ptr() not in kept and tensor.any()
    ]
    if native and lost:
        raise LoadError(setting, f"it has {few(lost)}, which timm's code of this architecture no longer computes")
    if "mask_token" not in own:
        converted.pop("mask_token", None)  # of pretraining; timm's conversions know by it whose format it is
    for name in own:
        if name.endswith(_POSITIONS) and name in weights and weights[name].shape == own[name].shape:
            converted[name] = weights[name]
    return converted


def _converter(model: nn.Module) -> Callable[..., Mapping[str, Tensor]]:
    """Timm's conversion of foreign checkpoints to this family of models, or none."""
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    entrypoint = timm.models.model_entrypoint(str(config["architecture"]))
    convert = getattr(sys.modules[entrypoint.__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return lambda weights, _: weights
    # DeiT III's own names of its layer scale. No other ViT has names of that kind.
    extra = {"adapt_layer_scale": True} if "adapt_layer_scale" in inspect.signature(convert).parameters else {}
    return lambda weights, model: convert(weights, model, **extra)


def _differences(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Iterable[str]:
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
    (True, "head_dist.weight", "an architecture with a distillation token, deit_*_distilled_*"),
)


def _hint(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
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
