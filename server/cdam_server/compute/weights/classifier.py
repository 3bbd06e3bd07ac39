"""The classifier of a checkpoint, whatever its name: used with its own numbers, or refused by name; never lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import torch

from cdam_server.compute.weights.files import StateDict
from cdam_server.compute.weights.names import CLASSIFIERS, PRETEXT_HEADS, is_pretext
from cdam_server.settings.load_error import LoadError, few

_WHAT_TO_DO: Final = "give a linear one with the setting head, or leave it out with num_outputs: 0"
_LAYERS: Final = (
    "spell its layers, such as head_layers: [dropout, linear, gelu, linear], or leave it out with num_outputs: 0"
)


def classifier_weights(
    classifiers: Mapping[str, StateDict], names: Sequence[str], latent: int, *, asked: bool, setting: str
) -> tuple[StateDict, list[str]]:
    """The tensors of the classifier, under the architecture's names, and those that were left out.

    Args:
        classifiers: See `names.Selection`.
        names: The architecture's classifiers: one, or two of a distilled model.
        latent: D, what the architecture's classifier takes.
        asked: Whether the settings speak of outputs: heads of self-supervised training are refused then.
        setting: Name of the setting, for errors.

    Raises:
        LoadError: There are several, it is not linear, or it is for latents of another size.
    """
    pretext = [name for name in classifiers if is_pretext(name, classifiers[name])]
    if pretext and asked and len(pretext) == len(classifiers):
        raise LoadError(
            setting,
            f"{few(pretext)} is a head of self-supervised training, no classifier: give one with the setting head, or "
            "leave outputs, num_outputs and task out",
        )
    left_out = [f"{name}.{rest}" for name in pretext for rest in classifiers[name]]
    rest = {name: tensors for name, tensors in classifiers.items() if name not in pretext}
    if not rest:
        return {}, left_out
    if unclear := [name for name in rest if name.rpartition(".")[2] in PRETEXT_HEADS - CLASSIFIERS]:
        raise LoadError(setting, f"{few(unclear)} may be a projection, or the classifier: {_WHAT_TO_DO}")
    outer = {name.rpartition(".")[0] for name in rest}
    its_own = {name.rpartition(".")[2] for name in rest} <= set(names) and len(outer) == 1
    if len(rest) > 1 and not its_own:
        raise LoadError(setting, f"there are {len(rest)} classifiers: {' and '.join(sorted(rest))}; {_WHAT_TO_DO}")
    found: StateDict = {}
    for name, tensors in rest.items():
        target = name.rpartition(".")[2] if its_own else names[0]
        found |= _linear(name, tensors, target, latent, setting)
    return found, left_out


def _linear(name: str, tensors: StateDict, target: str, latent: int, setting: str) -> StateDict:
    """Weight and bias of the one linear layer that there is."""
    stems = {tensor.rpartition(".")[0] for tensor in tensors}
    parts = {tensor.rpartition(".")[2] for tensor in tensors}
    (stem,) = stems if len(stems) == 1 else ("?",)
    plain = parts <= {"weight", "bias"} and "weight" in parts and _is_first(stem.split(".") if stem else [])
    if not plain or tensors[_in(stem, "weight")].ndim != 2:
        found = few([f"{name}.{tensor}" for tensor in sorted(tensors)])
        raise LoadError(setting, f"the classifier {name} is not one linear layer ({found}): {_LAYERS}")
    weight = tensors[_in(stem, "weight")]
    bias = tensors.get(_in(stem, "bias"), torch.zeros(len(weight)))
    if weight.shape[1] != latent:
        raise LoadError(
            setting,
            f"the classifier {_in(name, _in(stem, 'weight'))} is for latents of {weight.shape[1]}, the architecture's "
            f"have {latent}: {_WHAT_TO_DO}",
        )
    return {f"{target}.weight": weight, f"{target}.bias": bias}


def _is_first(parts: Iterable[str]) -> bool:
    """Whether nothing can come before a layer of this name; before the second of a sequence something does."""
    return all(part in CLASSIFIERS or part == "0" for part in parts)


def _in(outer: str, inner: str) -> str:
    return f"{outer}.{inner}" if outer else inner
