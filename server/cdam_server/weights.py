"""Weights from files into a model: read, unwrap, rename, compare with the model, load."""

from __future__ import annotations

import argparse
import inspect
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import timm.models
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

StateDict = dict[str, Tensor]

# Under which of its keys a training checkpoint keeps the weights; averaged weights first, as in timm. `teacher` is DINO.
_WRAPPERS: Final = (
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model_state_dict",
    "model",
    "teacher",
    "module",
    "backbone",
)
# What wraps a backbone in training code puts before its names.
_PREFIXES: Final = ("model.", "backbone.")
_CLASSIFIER_PREFIXES: Final = ("head.", "head_dist.", "fc.", "classifier.", "linear.")
_HEAD_NAMES: Final = ("", "head.", "fc.", "linear.", "classifier.")
_PICKLE_SUFFIXES: Final = {".pth", ".pt", ".bin", ".ckpt", ".tar"}


class LoadError(ValueError):
    """A model can't be loaded as its settings say.

    Attributes:
        setting: The setting to look at.
    """

    def __init__(self, setting: str, message: str, *, model: str | None = None) -> None:
        super().__init__(f"model {model!r}: {setting}: {message}" if model else f"{setting}: {message}")
        self.setting = setting
        self.message = message


def read_state_dict(path: Path, setting: str) -> StateDict:
    """Tensors by name from a .safetensors file or a pickled checkpoint, out of whatever training code wrapped around.

    Pickles are read without running code from them.

    Raises:
        LoadError: No such file, damaged, no weights in it, or it needs code to be read.
    """
    if not path.is_file():
        raise LoadError(setting, f"there is no file {path}")
    if path.suffix == ".safetensors":
        tensors = _read_safetensors(path, setting)
    elif path.suffix in _PICKLE_SUFFIXES:
        tensors = _unwrap(_read_pickle(path, setting))
    else:
        raise LoadError(setting, f"{path} must end in .safetensors, or in {', '.join(sorted(_PICKLE_SUFFIXES))}")
    if not tensors:
        raise LoadError(setting, f"there are no weights in {path}")
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise LoadError(setting, f"{path} holds values that are not finite, in {_few(broken)}")
    return _strip_prefixes(tensors)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], setting: str) -> None:
    """Load a backbone's weights, after timm's own conversion of foreign formats, positions and patch sizes.

    A classifier in `weights` is left out where the model has none.

    Raises:
        LoadError: Names or shapes differ from the model's.
    """
    convert = _converter(model)
    try:
        converted: Mapping[str, Tensor] = convert(dict(weights), model)
    except Exception as error:
        raise LoadError(setting, f"these are not weights of this architecture ({_reason(error)})") from error
    own = model.state_dict()
    if not getattr(model, "num_classes", 0):
        converted = {
            name: tensor
            for name, tensor in converted.items()
            if name in own or not name.startswith(_CLASSIFIER_PREFIXES)
        }
    complaints = list(_differences(own, converted))
    if complaints:
        raise LoadError(setting, f"these are not weights of this architecture: {'; '.join(complaints)}")
    model.load_state_dict(converted)


def attach_head(model: nn.Module, path: Path, setting: str) -> None:
    """Put a linear classifier of one's own on a backbone without one.

    Args:
        model: A timm model.
        path: A file with `weight`, shape (C, D), and maybe `bias`, shape (C), which may be named as parts of `head`,
            `fc`, `linear` or `classifier`.
        setting: Name of the setting, for errors.

    Raises:
        LoadError: The file holds no linear head, or one for another latent size.
    """
    tensors = read_state_dict(path, setting)
    prefix = next((prefix for prefix in _HEAD_NAMES if f"{prefix}weight" in tensors), None)
    if prefix is None:
        raise LoadError(setting, f"{path} has no `weight` or `head.weight`, but {_few(tensors)}")
    weight = tensors.pop(f"{prefix}weight")
    bias = tensors.pop(f"{prefix}bias", None)
    if tensors:
        raise LoadError(setting, f"{path} holds more than a linear head: {_few(tensors)}")
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        shape = None if bias is None else tuple(bias.shape)
        raise LoadError(setting, f"weight must be (C, D) and bias (C), not {tuple(weight.shape)} and {shape}")
    model.reset_classifier(weight.shape[0])  # type: ignore[operator]  # nn.Module's attributes are untyped
    classifier = model.get_classifier()  # type: ignore[operator]
    if not isinstance(classifier, nn.Linear):
        raise LoadError(setting, "this architecture does not take a single linear head")
    if classifier.in_features != weight.shape[1]:
        raise LoadError(
            setting, f"the weight is for latents of {weight.shape[1]}, the architecture's have {classifier.in_features}"
        )
    with torch.no_grad():
        classifier.weight.copy_(weight)
        classifier.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)


def _read_safetensors(path: Path, setting: str) -> StateDict:
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(setting, f"{path} is damaged, or no safetensors file ({_reason(error)})") from error


def _read_pickle(path: Path, setting: str) -> object:
    try:
        # Training scripts leave their command line in the checkpoint; it can do no harm.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, UnicodeDecodeError) as error:
        needed = _code_in(path)
        what = f"needs code to be read ({_few(needed)})" if needed else "needs code to be read, or is damaged"
        raise LoadError(
            setting,
            f"{path} {what}; code from a file is not run, because it can do anything: save the state dict with "
            "safetensors.torch.save_file",
        ) from error
    except Exception as error:
        raise LoadError(setting, f"{path} is damaged, or no checkpoint ({_reason(error)})") from error


def _code_in(path: Path) -> list[str]:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # noqa: BLE001 - it is a file that could not be read in the first place
        return []
    return sorted(set(names) - {"argparse.Namespace"})


def _unwrap(checkpoint: object) -> StateDict:
    """The tensors of a checkpoint; nothing if it is something else altogether."""
    while isinstance(checkpoint, Mapping):
        inner = next((checkpoint[key] for key in _WRAPPERS if isinstance(checkpoint.get(key), Mapping)), None)
        if inner is None:
            return {str(name): value for name, value in checkpoint.items() if isinstance(value, Tensor)}
        checkpoint = inner
    return {}


def _strip_prefixes(tensors: StateDict) -> StateDict:
    tensors = timm.models.clean_state_dict(tensors)  # of data-parallel and compiled models
    for prefix in _PREFIXES:
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


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
        yield f"missing {_few(missing)}"
    if unexpected := sorted(given.keys() - own.keys()):
        yield f"unexpected {_few(unexpected)}"
    shapes = [
        f"{name} {tuple(given[name].shape)} in place of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if shapes:
        yield f"other shapes: {_few(shapes)}"


def _few(names: Iterable[str], most: int = 5) -> str:
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _reason(error: BaseException) -> str:
    """The first line of an error, cut short: torch and timm put whole manuals into theirs."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}"
