"""A classifier of several layers, which the settings spell out: no file tells activations, nor how small a norm's eps is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from cdam_server.load_error import LoadError, few, reason
from cdam_server.specs import Layer
from cdam_server.weights.files import StateDict

# Dropout does nothing in eval mode, but has a number in the sequence.
_PLAIN: Final[Mapping[str, type[nn.Module]]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "dropout": nn.Identity,
}


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
