"""A folder as transformers saves it: configuration, processor, and the tensors in one file or several."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from safetensors import SafetensorError

from cdam_server.conversions.tensors import ConversionError, StateDict, few

CONFIG: Final = "config.json"
# In the order in which transformers looks for them.
_WEIGHTS: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_PROCESSOR: Final = "preprocessor_config.json"
_PROCESSORS: Final = "processor_config.json"  # transformers 5 puts the image processor of a model with texts in here
PATTERNS: Final = ("*.json", "*.safetensors", "pytorch_model*.bin")
"""The files of a repository that may be needed."""


@dataclass(frozen=True, eq=False)
class Folder:
    """What is in a folder.

    Attributes:
        config: Of config.json.
        processor: Of preprocessor_config.json, or None.
        tensors: Of all files of weights, by name.
    """

    config: Mapping[str, Any]
    processor: Mapping[str, Any] | None
    tensors: StateDict


def is_folder(path: Path) -> bool:
    """Whether a folder holds a model of transformers, and not one of timm's, whose config.json has other keys."""
    if not (path / CONFIG).is_file():
        return False
    config = _json(path / CONFIG)
    return "model_type" in config and "architecture" not in config


def read(path: Path) -> Folder:
    """Reads a folder.

    Raises:
        ConversionError: A file is missing or damaged; the message names it.
    """
    if not (path / CONFIG).is_file():
        raise ConversionError(f"there is no {CONFIG} in {path}, but {few(_listed(path))}")
    return Folder(_json(path / CONFIG), _processor(path), _tensors(path))


def _listed(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir()) if path.is_dir() else ["no such folder"]


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} can't be read: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds no JSON object")
    return content


def _processor(path: Path) -> Mapping[str, Any] | None:
    if (path / _PROCESSOR).is_file():
        return _json(path / _PROCESSOR)
    if (path / _PROCESSORS).is_file():
        inner = _json(path / _PROCESSORS).get("image_processor")
        return inner if isinstance(inner, dict) else None
    return None


def _tensors(path: Path) -> StateDict:
    name = next((name for name in _WEIGHTS if (path / name).is_file()), None)
    if name is None:
        raise ConversionError(
            f"there are no weights in {path}: none of {', '.join(_WEIGHTS)}, but {few(_listed(path))}"
        )
    if not name.endswith(".index.json"):
        return _read(path / name)
    index = _json(path / name).get("weight_map")
    if not isinstance(index, dict) or not all(_is_name(file) for file in index.values()):
        raise ConversionError(f"{path / name} has no weight_map from tensors to files in this folder")
    tensors: StateDict = {}
    for file in sorted(set(index.values())):
        for tensor, value in _read(path / file).items():
            if index.get(tensor) != file:
                raise ConversionError(f"{path / file} holds {tensor}, which {name} says to be in {index.get(tensor)}")
            tensors[tensor] = value
    if missing := index.keys() - tensors.keys():
        raise ConversionError(f"{path / name} lists {few(sorted(missing))}, which the files do not hold")
    return tensors


def _is_name(file: object) -> bool:
    return isinstance(file, str) and Path(file).name == file


def _read(path: Path) -> StateDict:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path, device="cpu")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, ValueError, RuntimeError, EOFError) as error:
        raise ConversionError(f"{path} is damaged or missing ({(str(error).splitlines() or [''])[0][:200]})") from error
    except Exception as error:  # of pickle, which raises what it likes
        raise ConversionError(
            f"{path} needs code to be read, which is not run, or is damaged; save it with safetensors"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ConversionError(f"{path} holds more than tensors by name")
    return content
