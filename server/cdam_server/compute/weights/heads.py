"""Heads of one's own: a linear one from a file, or several layers, which the settings spell out.

No file tells activations, nor how small a norm's eps is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from cdam_server.compute.weights.files import StateDict, read_checkpoint
from cdam_server.compute.weights.fit import refuse_unfit
from cdam_server.settings.load_error import LoadError, few, reason
from cdam_server.settings.specs import Layer

_HEAD_NAMES: Final = ("", "head.", "fc.", "linear.", "classifier.")
# Dropout does nothing in eval mode, but has a number in the sequence.
_PLAIN: Final[Mapping[str, type[nn.Module]]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "dropout": nn.Identity,
}


def attach_head(
    model: nn.Module, path: Path, setting: str, layers: Sequence[Layer] | None = None, *, tuned: bool = False
) -> None:
    """Put a classifier of one's own on a backbone without one.

    Args:
        model: A timm model.
        path: A file with `weight`, shape (C, D), and maybe `bias`, shape (C), which may be named as parts of `head`,
            `fc`, `linear` or `classifier`, and wrapped as training code does it.
        setting: Name of the setting, for errors.
        layers: Of a classifier of several layers, whose tensors have the names of an `nn.Sequential`; None: linear.
        tuned: Whether other tensors in the file are the model's own, and have their place already.

    Raises:
        LoadError: The file holds no such head, or one for another latent size.
    """
    tensors = read_checkpoint(path, setting).tensors
    if tuned:
        tensors = {name: tensor for name, tensor in tensors.items() if name in {"head.weight", "head.bias"}}
    tensors = _unwrapped_head(tensors)
    refuse_unfit(tensors, str(path), setting)
    if layers is not None:
        plain = {
            name.partition(".")[2] if f"{name.partition('.')[0]}." in _HEAD_NAMES else name: t
            for name, t in tensors.items()
        }
        put_head(model, build_head(layers, plain, latent_size(model), setting))
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
    classifier = linear_head(model, weight.shape[0], setting)
    if classifier.in_features != weight.shape[1]:
        raise LoadError(
            setting, f"the weight is for latents of {weight.shape[1]}, the architecture's have {classifier.in_features}"
        )
    with torch.no_grad():
        classifier.weight.copy_(weight)
        classifier.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)


def linear_head(model: nn.Module, outputs: int, setting: str) -> nn.Linear:
    """Give a model a linear classifier, whose weights mean nothing yet, in the place of the one that it has.

    Raises:
        LoadError: The architecture takes none.
    """
    model.reset_classifier(outputs)  # type: ignore[operator]
    classifier = model.get_classifier()  # type: ignore[operator]
    if not isinstance(classifier, nn.Linear):
        raise LoadError(setting, "this architecture does not take a single linear head")
    latent = int(getattr(model, "head_hidden_size", 0) or classifier.in_features)
    if latent != classifier.in_features:  # another library's readout, whose latent is not as wide as the tokens
        model.head = classifier = nn.Linear(latent, outputs)
    return classifier


def _unwrapped_head(tensors: Mapping[str, Tensor]) -> StateDict:
    """A head's names without what stands before all of them, down to the head's own name."""
    plain = dict(tensors)
    while plain and all("." in name for name in plain):
        first = {name.partition(".")[0] for name in plain}
        if len(first) != 1 or f"{next(iter(first))}." in _HEAD_NAMES:
            break
        plain = {name.partition(".")[2]: tensor for name, tensor in plain.items()}
    return plain


def latent_size(model: nn.Module) -> int:
    """D, what a timm model's classifier takes."""
    return int(getattr(model, "head_hidden_size", 0) or getattr(model, "num_features", 0))


def build_head(layers: Sequence[Layer], tensors: StateDict, latent: int, setting: str) -> nn.Sequential:
    """The layers in their order, with the file's numbers.

    Args:
        layers: As the settings spell them.
        tensors: Their weights by the names that `nn.Sequential` gives them: ``0.weight``.
        latent: D, what the first layer takes.
        setting: Name of the setting that names the file, for errors.

    Raises:
        LoadError: The tensors are of other layers.
    """
    head = nn.Sequential(*(_layer(layer, number, tensors) for number, layer in enumerate(layers)))
    spelled = ", ".join(layer.kind for layer in layers)
    try:
        head.load_state_dict(tensors)
        head.eval()
        with torch.no_grad():
            outputs: Tensor = head(torch.zeros(1, latent))
    except RuntimeError as error:
        shapes = [f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()]
        raise LoadError(
            "head_layers",
            f"[{spelled}] are not the layers of the head in {setting}, which has {few(shapes, 8)} ({reason(error)})",
        ) from error
    assert outputs.ndim == 2
    return head


def put_head(model: nn.Module, head: nn.Sequential) -> None:
    """Put a head on a timm model, which says the number of its outputs then."""
    model.head = head
    model.num_classes = next(layer.out_features for layer in reversed(head) if isinstance(layer, nn.Linear))  # type: ignore[assignment]


def _layer(layer: Layer, number: int, tensors: StateDict) -> nn.Module:
    weight, bias = tensors.get(f"{number}.weight"), tensors.get(f"{number}.bias")
    if layer.kind in _PLAIN:
        return _PLAIN[layer.kind]()
    if layer.kind == "linear":
        shape = (1, 1) if weight is None or weight.ndim != 2 else tuple(weight.shape)
        return nn.Linear(shape[1], shape[0], bias=bias is not None)
    if layer.kind == "layer_norm":
        width = 1 if weight is None else len(weight)
        return nn.LayerNorm(width, eps=layer.eps, bias=bias is not None)
    mean = tensors.get(f"{number}.running_mean")
    return nn.BatchNorm1d(1 if mean is None else len(mean), eps=layer.eps, affine=weight is not None)
