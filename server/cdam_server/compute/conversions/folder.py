"""Folders as transformers and open_clip write them: a configuration, preprocessing, and weights in one file or several."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from cdam_engine.preprocess import Size
from cdam_server.compute.conversions import hugging_face, open_clip
from cdam_server.compute.conversions.converted import Converted
from cdam_server.compute.conversions.tensors import ConversionError, StateDict
from cdam_server.compute.weights.files import read_checkpoint
from cdam_server.settings.load_error import LoadError, few

CONFIG: Final = "config.json"
OPEN_CLIP_CONFIG: Final = "open_clip_config.json"
# In the order in which transformers and open_clip look for them.
_WEIGHTS: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_OPEN_CLIP_WEIGHTS: Final = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
_PROCESSOR: Final = "preprocessor_config.json"
_PROCESSORS: Final = "processor_config.json"  # transformers 5 puts the image processor of a model with texts in here


class Kind(StrEnum):
    """Whose folder it is."""

    TRANSFORMERS = "transformers"
    OPEN_CLIP = "open_clip"
    OTHER = "other"


PATTERNS: Final[Mapping[Kind, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    Kind.TRANSFORMERS: (("model*.safetensors",), ("pytorch_model*.bin",)),
    Kind.OPEN_CLIP: (("open_clip*.safetensors",), ("open_clip*.bin",)),
}
"""The files of weights in a repository: safetensors, and pickles for want of them."""


@dataclass(frozen=True, eq=False)
class Folder:
    """What is in a folder of transformers'.

    Attributes:
        config: Of config.json.
        processor: Of preprocessor_config.json, or None.
        tensors: Of all files of weights, by name.
    """

    config: Mapping[str, Any]
    processor: Mapping[str, Any] | None
    tensors: StateDict


def kind_of(path: Path) -> Kind:
    """Whose folder it is. timm's config.json has an `architecture`, that of transformers a `model_type`.

    Raises:
        ConversionError: config.json can't be read.
    """
    config = _json(path / CONFIG) if (path / CONFIG).is_file() else {}
    if "architecture" in config:
        return Kind.OTHER
    if "model_type" in config:
        return Kind.TRANSFORMERS
    return Kind.OPEN_CLIP if (path / OPEN_CLIP_CONFIG).is_file() else Kind.OTHER


def check_type(path: Path, kind: Kind) -> None:
    """Refuses a folder by its configuration, before weights that nobody can convert are fetched or read.

    Raises:
        ConversionError: With the reason.
    """
    if kind is Kind.TRANSFORMERS:
        hugging_face.check_type(_json(path / CONFIG))


def has_weights(path: Path, kind: Kind) -> bool:
    """Whether there is a file of weights, or a list of several."""
    names = _OPEN_CLIP_WEIGHTS if kind is Kind.OPEN_CLIP else _WEIGHTS
    return any((path / name).is_file() for name in names)


def convert(path: Path, kind: Kind, input_size: Size | None = None, *, keeps_classifier: bool = True) -> Converted:
    """The model in a folder as timm has it.

    Args:
        path: The folder.
        kind: Whose it is, not `Kind.OTHER`.
        input_size: (height, width) in pixels, if not the files' own.
        keeps_classifier: Whether the classifier is wanted.

    Raises:
        ConversionError: A file is missing or damaged, or timm has no equal model.
    """
    if kind is Kind.OPEN_CLIP:
        description = open_clip.Description.from_config(_json(path / OPEN_CLIP_CONFIG))
        return open_clip.convert(_tensors(path, _OPEN_CLIP_WEIGHTS), description, input_size)
    files = read(path)
    return hugging_face.convert(
        files.config, files.tensors, files.processor, input_size, keeps_classifier=keeps_classifier
    )


def read(path: Path) -> Folder:
    """Reads a folder of transformers'.

    Raises:
        ConversionError: A file is missing or damaged; the message names it.
    """
    if not (path / CONFIG).is_file():
        raise ConversionError(f"there is no {CONFIG} in {path}, but {few(_listed(path))}")
    check_type(path, Kind.TRANSFORMERS)
    return Folder(_json(path / CONFIG), _processor(path), _tensors(path, _WEIGHTS))


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


def _tensors(path: Path, names: tuple[str, ...]) -> StateDict:
    name = next((name for name in names if (path / name).is_file()), None)
    if name is None:
        raise ConversionError(f"there are no weights in {path}: none of {', '.join(names)}, but {few(_listed(path))}")
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
        return read_checkpoint(path, "").tensors
    except LoadError as error:
        raise ConversionError(error.message) from error
