"""A checkpoint into a model."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import timm.models
import torch
from torch import Tensor, nn

from cdam_server.compute.weights.classifier import classifier_weights
from cdam_server.compute.weights.files import Checkpoint, StateDict
from cdam_server.compute.weights.fit import differences, keyword_hint, refuse_unfit
from cdam_server.compute.weights.geometry import Resampling, Size, compare, geometry_of, misfit
from cdam_server.compute.weights.heads import build_head, latent_size, put_head
from cdam_server.compute.weights.names import Selection, is_pretext, select
from cdam_server.settings.load_error import LoadError, few, reason
from cdam_server.settings.specs import Layer

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
        notes: What a conversion left out or decided, one line each.
    """

    source: str = ""
    prefix: str = ""
    left_out: tuple[str, ...] = ()
    resampled: str = ""
    notes: tuple[str, ...] = ()


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
    refuse_unfit(weights | heads, checkpoint.source, setting)
    file, architecture = geometry_of(weights), geometry_of(model.state_dict())
    if file.width != architecture.width and (wrong := misfit(file, architecture)):
        raise LoadError(setting, f"these are not weights of this architecture: {wrong}")
    if found.native and wish.num_outputs == 0:
        left_out += heads
    elif wish.head_layers is not None:
        name, its = _only_classifier(found, setting)
        layers = build_head(wish.head_layers, its, latent_size(model), f"{setting} ({name})")
    elif found.native:
        asked = wish.asked or bool(wish.num_outputs)
        head, pretext = classifier_weights(found.classifiers, names, latent_size(model), asked=asked, setting=setting)
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
    unwanted = () if count else names
    prefix, hint = found.prefix if found.native else None, _hint_of_outside(found, latent_size(model))
    hint = _hint_of_naming(weights) or hint
    source = _Source(weights, prefix, unwanted, found.outside, hint)
    left_out += _load(model, source, resampling, setting)
    if layers is not None:
        put_head(model, layers)
    report = Report(checkpoint.source, found.prefix, tuple(left_out))
    return report if resampling is None else replace(report, resampled=resampling.text)


def _only_classifier(found: Selection, setting: str) -> tuple[str, StateDict]:
    """The classifier whose layers the settings spell out."""
    heads = {name: its for name, its in found.classifiers.items() if not is_pretext(name, its)}
    if len(heads) != 1:
        there = f"there are {' and '.join(sorted(heads))}" if heads else "there is none"
        raise LoadError("head_layers", f"they are of one classifier in {setting}, and {there}")
    return next(iter(heads.items()))


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


def _hint_of_naming(weights: Mapping[str, Tensor]) -> str:
    """Where else the file belongs, if its names are another library's."""
    if not any("embeddings.patch_embeddings.projection." in name for name in weights):
        return ""
    return (
        "they have the names of transformers: give its folder, config.json and weights, as architecture local-dir:PATH"
    )


def _classifier_names(model: nn.Module) -> Sequence[str]:
    """The architecture's classifiers: one, or two of a distilled model."""
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    names = config.get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def _outputs_in(weights: Mapping[str, Tensor], names: Sequence[str]) -> int:
    """Number of outputs of the classifier in a whole model's weights; 0 if there is none."""
    weight = weights.get(f"{names[0]}.weight")
    return 0 if weight is None or weight.ndim != 2 else weight.shape[0]


@dataclass(frozen=True, eq=False)
class _Source:
    """Tensors to load.

    Attributes:
        weights: By the model's names, or by foreign ones.
        prefix: What stood before the model's names; None where they are foreign.
        unwanted: Classifiers that are left out after a conversion.
        outside: Names of tensors that stood outside the network.
        hint: What to do if the tensors don't fit.
    """

    weights: StateDict
    prefix: str | None
    unwanted: Sequence[str]
    outside: Sequence[str]
    hint: str


def _load(model: nn.Module, source: _Source, resampling: Resampling | None, setting: str) -> list[str]:
    """Convert and load; the model has the file's geometry meanwhile, so that nothing but what is said is resampled.

    Returns:
        What timm's conversion has left out of a file of another library.
    """
    embedding: Any = getattr(model, "patch_embed", None)
    if resampling is not None:
        size, patch = tuple(embedding.img_size), tuple(embedding.feat_ratio(as_scalar=False))
        changes = {} if resampling.patch == patch else {"patch_size": resampling.patch}
        _set_input_size(model, resampling.size, changes, setting)
    converted = _converted(model, source.weights, setting, native=source.prefix is not None)
    own = model.state_dict()
    converted = {
        name: tensor
        for name, tensor in converted.items()
        if name in own or name.rpartition(".")[0] not in source.unwanted
    }
    complaints, left_out = list(differences(own, converted)), []
    if complaints and (other := _converted_by_its_prefix(model, source)) is not None:
        converted, left_out, complaints = *other, []
    if complaints:
        hint = misfit(geometry_of(converted), geometry_of(own)) or keyword_hint(own, converted) or source.hint
        what = "; ".join(filter(None, (hint, *complaints)))
        raise LoadError(setting, f"these are not weights of this architecture: {what}")
    model.load_state_dict(converted)
    if resampling is not None:
        _set_input_size(model, size, {"patch_size": patch} if changes else {}, setting)
    return left_out


def _converted_by_its_prefix(model: nn.Module, source: _Source) -> tuple[StateDict, list[str]] | None:
    """After timm's conversion of a file that it knows by what stands before the names (SAM's image encoder), if it does.

    Returns:
        The model's tensors, and the names of those outside the network that the conversion leaves out.
    """
    parts = (source.prefix or "").split(".")[:-1]
    own = model.state_dict()
    for start in reversed(range(len(parts))):
        prefix, outer = ("".join(f"{part}." for part in some) for some in (parts[start:], parts[:start]))
        names = {
            name: name.removeprefix(outer) if name in source.outside else f"{prefix}{name}" for name in source.weights
        }
        try:
            converted = dict(_converter(model)({names[name]: t for name, t in source.weights.items()}, model))
        except Exception:  # noqa: BLE001, S112 - it is no such file then
            continue
        if not list(differences(own, converted)):
            return converted, list(source.outside)
    return None


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
        hint = keyword_hint(model.state_dict(), weights) or f"it has {few(weights)}"
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
