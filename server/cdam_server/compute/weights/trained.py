"""What `cdam train` writes: a linear head, the tensors that were tuned with it, and what both are of.

A .safetensors file with `head.weight` (C, D) and `head.bias` (C); where blocks were tuned, every tensor of the model's
state dict from the first of them on, under its own name; and in the metadata the names and the task of the outputs and
the fingerprint of the backbone, without which the numbers mean nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cdam_server.compute.weights.files import StateDict
from cdam_server.settings.load_error import LoadError, few, reason

FORMAT: Final = "cdam-trained-1"
_HEAD: Final = ("head.weight", "head.bias")
_KEY: Final = "cdam"


@dataclass(frozen=True)
class Trained:
    """What a file of trained weights is of.

    Attributes:
        task: What the outputs mean.
        outputs: Their names.
        architecture: Of the backbone, for people.
        backbone: The backbone's fingerprint, before anything of it was tuned.
    """

    task: str
    outputs: tuple[str, ...]
    architecture: str
    backbone: str


def write_trained(path: Path, trained: Trained, weight: Tensor, bias: Tensor, tuned: StateDict) -> None:
    """Write the file at once, so that nobody ever sees half of it.

    Args:
        path: Where to.
        trained: What it is of.
        weight: Of the head, shape (C, D).
        bias: Of the head, shape (C).
        tuned: Other tensors of the model's state dict, by their names.

    Raises:
        LoadError: The disk is full, or nothing may be written there.
    """
    tensors = {**tuned, **dict(zip(_HEAD, (weight, bias), strict=True))}
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {"format": FORMAT, **vars(trained)}
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(save(content, metadata={_KEY: json.dumps(about, ensure_ascii=False)}))
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise LoadError("output", f"{path.parent}: nothing can be written there: {error.strerror}") from error
    partial.replace(path)


def read_trained(path: Path, setting: str) -> tuple[Trained, StateDict] | None:
    """What a file holds that `write_trained` wrote; None for any other file.

    Raises:
        LoadError: It was written by a later version, or is damaged.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        about = json.loads(text)
        if about.pop("format") != FORMAT:
            raise LoadError(setting, f"{path} was written by a later version of cdam-serve: use that, or train anew")
        return Trained(**{**about, "outputs": tuple(about["outputs"])}), tensors
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, LoadError):
            raise
        raise LoadError(setting, f"{path} is damaged ({reason(error)})") from error


def apply_tuned(module: nn.Module, tensors: StateDict, path: Path, setting: str) -> tuple[str, ...]:
    """Put the tensors that were tuned in the place of the backbone's.

    Args:
        module: The backbone.
        tensors: All of the file's; the head is left aside.
        path: The file, for errors.
        setting: Name of the setting, for errors.

    Returns:
        The names of the tensors.

    Raises:
        LoadError: The model has no such tensors.
    """
    tuned = {name: tensor for name, tensor in tensors.items() if name not in _HEAD}
    own = module.state_dict()
    strange = [name for name, tensor in tuned.items() if name not in own or own[name].shape != tensor.shape]
    if strange:
        raise LoadError(setting, f"{path} has tensors that the model has not, or in another shape: {few(strange)}")
    with torch.no_grad():
        for name, tensor in tuned.items():
            own[name].copy_(tensor)
    return tuple(tuned)


def check_backbone(trained: Trained, fingerprint: str, architecture: str, path: Path, setting: str) -> None:
    """Refuse a head for another backbone.

    Raises:
        LoadError: With both backbones.
    """
    if trained.backbone != fingerprint:
        raise LoadError(
            setting,
            f"{path} was trained on another backbone ({trained.architecture}, fingerprint {trained.backbone[:12]}) than "
            f"this one ({architecture}, {fingerprint[:12]}): give the same weights, input size and preprocessing",
        )
