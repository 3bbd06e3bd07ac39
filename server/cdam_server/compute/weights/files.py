"""Checkpoint files: every tensor of one, by its whole path in it; or which kind of file it is instead."""

from __future__ import annotations

import argparse
import collections
import pathlib
import pickle
import types
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from cdam_server.settings.load_error import LoadError, few, reason
from cdam_server.settings.specs import FOLDER, HUB, PICKLES

StateDict = dict[str, Tensor]

# What training scripts leave beside the weights and what can do no harm: their command line, paths, numpy's numbers.
_HARMLESS: Final[list[Any]] = [
    argparse.Namespace,
    types.SimpleNamespace,
    collections.defaultdict,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
_DEEPSPEED: Final = {"ds_config", "ds_version", "zero_stage", "single_partition_of_fp32_groups", "fp32_flat_groups"}
_TO_SAFETENSORS: Final = "save its state dict with safetensors.torch.save_file"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a file holds.

    Attributes:
        source: The file, as it was named.
        tensors: By their paths: the keys of all mappings on the way, joined by dots.
        containers: Paths of the mappings in which tensors were found; "" is the file itself.
        keys: The keys of the outermost mapping, for messages.
    """

    source: str
    tensors: StateDict
    containers: frozenset[str]
    keys: tuple[str, ...]


def read_checkpoint(path: Path, setting: str) -> Checkpoint:
    """All tensors of a .safetensors file or a pickled checkpoint. Pickles are read without running code from them.

    Args:
        path: The file; or ``hf-hub:ORG/NAME``, or ``local-dir:PATH``.
        setting: Name of the setting, for errors.

    Raises:
        LoadError: No such file, damaged, no weights in it, of a kind that can't be read, or it needs code to be read.
    """
    source = str(path)
    if source.startswith(HUB):
        return checkpoint_of(_from_hub(source, setting), source, setting)
    file = _in_folder(path, setting) if source.startswith(FOLDER) or path.is_dir() else path
    if not file.is_file():
        raise LoadError(setting, f"there is no file {file}")
    if file.suffix == ".safetensors":
        return checkpoint_of(_read_safetensors(file, setting), str(file), setting)
    if file.suffix in PICKLES:
        return checkpoint_of(_read_pickle(file, setting), str(file), setting)
    raise LoadError(setting, f"{file} must end in .safetensors, or in {', '.join(PICKLES)}")


def checkpoint_of(content: object, source: str, setting: str) -> Checkpoint:
    """The tensors in what was read.

    Raises:
        LoadError: There are none, or two have one name.
    """
    keys = tuple(map(str, content)) if isinstance(content, Mapping) else ()
    if _DEEPSPEED & _keys_within(content, depth=2) and not _has_whole_weights(content):
        raise LoadError(
            setting,
            f"{source} is a part of a DeepSpeed ZeRO checkpoint: let its zero_to_fp32.py make one file of all parts",
        )
    tensors: StateDict = {}
    containers = set()
    for container, name, tensor in _tensors(content, ""):
        whole = f"{container}.{name}" if container else name
        if whole in tensors:
            raise LoadError(setting, f"{source} holds two tensors for {whole}")
        tensors[whole] = tensor
        containers.add(container)
    if not tensors:
        found = f"; its keys are {few(keys, 10)}" if keys else ""
        raise LoadError(setting, f"there are no weights in {source}{found}")
    return Checkpoint(source, tensors, frozenset(containers), keys)


def _tensors(content: object, path: str) -> Iterator[tuple[str, str, Tensor]]:
    """(path of the mapping, key, tensor) for all tensors in nested mappings, lists and tuples."""
    if isinstance(content, Mapping):
        items: Iterable[tuple[Any, Any]] = content.items()
    elif isinstance(content, list | tuple):
        items = enumerate(content)
    else:
        return
    for key, value in items:
        if isinstance(value, Tensor):
            yield path, str(key), value
        elif isinstance(value, Mapping | list | tuple):
            yield from _tensors(value, f"{path}.{key}" if path else str(key))


def _keys_within(content: object, depth: int) -> set[str]:
    if not depth or not isinstance(content, Mapping):
        return set()
    inner = [_keys_within(value, depth - 1) for value in content.values() if isinstance(value, Mapping)]
    return {str(key) for key in content}.union(*inner)


def _has_whole_weights(content: object) -> bool:
    """DeepSpeed's model states of ZeRO stages 1 and 2 hold all weights; those of stage 3 hold empty tensors."""
    module = content.get("module") if isinstance(content, Mapping) else None
    return isinstance(module, Mapping) and any(isinstance(value, Tensor) and value.numel() for value in module.values())


def _in_folder(path: Path, setting: str) -> Path:
    """The file of weights in a folder."""
    folder = Path(str(path).removeprefix(FOLDER))
    for name in ("model.safetensors", "pytorch_model.bin", "model.bin", "open_clip_pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if any(name.endswith((".distcp", ".metadata")) for name in names):
        raise LoadError(
            setting,
            f"{folder} is a distributed checkpoint: make a file of it with `python -m "
            "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE`",
        )
    if any(name.startswith(("zero_pp_rank", "bf16_zero_pp_rank", "global_step")) for name in names):
        raise LoadError(setting, f"{folder} is a DeepSpeed checkpoint: let its zero_to_fp32.py make one file of it")
    if any(name.endswith(".index.json") for name in names):
        raise LoadError(setting, f"{folder} holds its weights in several shards: save them as one model.safetensors")
    found = f"it holds {few(names)}" if names else "it is empty, or not there"
    raise LoadError(setting, f"there is neither model.safetensors nor pytorch_model.bin in {folder}; {found}")


def _from_hub(name: str, setting: str) -> object:
    import timm.models

    try:
        return timm.models.load_state_dict_from_hf(name.removeprefix(HUB), weights_only=True)
    except Exception as error:
        raise LoadError(
            setting, f"the weights of {name} did not come from the hub ({reason(error)}); without network give a file"
        ) from error


def _read_safetensors(path: Path, setting: str) -> StateDict:
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(setting, f"{path} is damaged, or no safetensors file ({reason(error)})") from error


def _read_pickle(path: Path, setting: str) -> object:
    if _is_torchscript(path):
        raise LoadError(
            setting,
            f"{path} is a TorchScript archive, which is a program and no checkpoint: load it where it was made with "
            f"torch.jit.load, and {_TO_SAFETENSORS}",
        )
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, UnicodeDecodeError) as error:
        needed = _code_in(path)
        what = f"needs code to be read ({few(needed)})" if needed else "needs code to be read, or is damaged"
        raise LoadError(
            setting,
            f"{path} {what}; code from a file is not run, because it can do anything: load it where it was made, and "
            f"{_TO_SAFETENSORS}",
        ) from error
    except Exception as error:
        raise LoadError(setting, f"{path} is damaged, or no checkpoint ({reason(error)})") from error


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.split("/")[1:2] == ["code"] for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _code_in(path: Path) -> list[str]:
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
    except Exception:  # noqa: BLE001 - it is a file that could not be read in the first place
        return []
