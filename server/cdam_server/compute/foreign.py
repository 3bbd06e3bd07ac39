"""Models of other libraries, from settings: which settings mean one, and what its files convert to.

An architecture is ``torchvision:NAME`` or ``open_clip:NAME``, with a checkpoint; or ``hf-hub:ORG/NAME`` or
``local-dir:PATH`` where the files there are those of transformers or open_clip and not timm's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import structlog
from torch import nn

from cdam_server.compute.conversions import folder, open_clip, torchvision
from cdam_server.compute.conversions.converted import Converted
from cdam_server.compute.conversions.folder import CONFIG, OPEN_CLIP_CONFIG, Kind
from cdam_server.compute.conversions.tensors import ConversionError
from cdam_server.compute.weights import Checkpoint, Report, StateDict, read_checkpoint
from cdam_server.compute.weights.names import is_of_training, without_wrappers
from cdam_server.settings.load_error import LoadError, few, reason
from cdam_server.settings.specs import FOLDER, HUB, OPEN_CLIP, TORCHVISION, ModelSpec

_log = structlog.get_logger("cdam.server")

# Names that only the libraries' own networks have, at their outermost level.
_SIGNATURES: Final = {
    TORCHVISION: ("conv_proj.weight", "encoder.pos_embedding"),
    OPEN_CLIP: ("visual.conv1.weight", "visual.trunk.patch_embed.proj.weight"),
}
# What to do with such names under an architecture of timm's. (A tower of timm's in a CLIP model has timm's own names.)
_OF_TRANSFORMERS: Final = ("transformers", f"name its folder, with config.json, as the architecture: {FOLDER}PATH")
_ADVICE: Final = {
    "conv_proj.weight": ("torchvision", "name its architecture, such as torchvision:vit_b_16"),
    "visual.conv1.weight": (
        "open_clip",
        "name its architecture, such as open_clip:ViT-B-32, or open_clip:ViT-B-32-quickgelu for OpenAI's weights",
    ),
    "embeddings.patch_embeddings.projection.weight": _OF_TRANSFORMERS,
    "embeddings.patch_embedding.weight": _OF_TRANSFORMERS,
    "embeddings.patch_embeddings.weight": _OF_TRANSFORMERS,
}
_EXAMPLE: Final = (
    "preprocessing: {mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5], interpolation: bicubic, crop_pct: 1.0, "
    "crop_mode: center}"
)
# Of a converted model's arguments, what is left to the settings.
_LEFT: Final = {"pretrained_cfg_overlay", "num_heads"}


def converted_of(spec: ModelSpec) -> tuple[Converted, Report] | None:
    """What the files of another library convert to; None if the settings mean a model of timm's.

    Raises:
        LoadError: It can't be converted, or settings contradict the files; the message names the setting.
    """
    for library in _SIGNATURES:
        if spec.architecture.startswith(library):
            _check_kwargs(spec)
            return _from_checkpoint(spec, library)
    if not spec.brings_weights:
        return None
    with _as_load_error("architecture"):
        found = _folder(spec.architecture)
        if found is None:
            return None
        path, kind = found
        _check_kwargs(spec)
        _check_settings(spec, {"checkpoint", "random_weights", "weights_key"})
        converted = folder.convert(path, kind, spec.input_size, keeps_classifier=_keeps_classifier(spec))
    return converted, Report(str(path), resampled=converted.resampled, notes=converted.notes)


def refuse_foreign(checkpoint: Checkpoint, setting: str) -> None:
    """Refuses tensors of another library under an architecture of timm's: that lacks what the file does not say.

    Raises:
        LoadError: With the architecture to name.
    """
    for signature, (library, advice) in _ADVICE.items():
        if _places(checkpoint.tensors, signature):
            raise LoadError(
                setting, f"{checkpoint.source} holds a model of {library}, and not all of it is in the file: {advice}"
            )


def refuse_foreign_folder(name: str, setting: str) -> None:
    """Refuses a folder of transformers or open_clip as the weights of an architecture of timm's.

    Raises:
        LoadError: With the architecture to name.
    """
    path = Path(name.removeprefix(FOLDER))
    if name.startswith(HUB) or not path.is_dir():
        return
    with _as_load_error(setting):
        kind = folder.kind_of(path)
    if kind is not Kind.OTHER:
        raise LoadError(
            setting,
            f"{path} is a folder of {kind}: leave it out, and say {FOLDER}{path} as the architecture, which is converted",
        )


def build(spec: ModelSpec, converted: Converted) -> nn.Module:
    """The converted model.

    Raises:
        LoadError: The files contradict each other, or nothing says how images are prepared.
    """
    if converted.data_config is None and (missing := _unsaid(spec)):
        raise LoadError(
            "preprocessing",
            f"no file says how images are prepared, and {', '.join(missing)} must not be guessed: give {_EXAMPLE}",
        )
    with _as_load_error("checkpoint" if spec.checkpoint is not None else "architecture"):
        return converted.build(spec.overlay, dynamic_img_size=spec.dynamic_img_size)


def tell(model: str, converted: Converted) -> None:
    """Log what a model was, and what was left out or decided, which nobody should have to guess."""
    _log.info("converted", model=model, source=converted.source, notes=list(converted.notes))


def _from_checkpoint(spec: ModelSpec, library: str) -> tuple[Converted, Report]:
    name = spec.architecture.removeprefix(library)
    if spec.checkpoint is None:
        raise LoadError("architecture", f"{spec.architecture} needs its weights: give them as the checkpoint")
    if library == TORCHVISION and name != "VisionTransformer" and not torchvision.is_name(name):
        known = ", ".join(torchvision.MODELS)
        raise LoadError(
            "architecture", f"torchvision has no Vision Transformer {name!r}, but {known}; others: VisionTransformer"
        )
    with _as_load_error("architecture"):
        description = open_clip.Description.from_name(name) if library == OPEN_CLIP else None
    checkpoint = read_checkpoint(spec.checkpoint, "checkpoint")
    tensors, prefix, left_out = _network(checkpoint, library, spec.weights_key)
    with _as_load_error("checkpoint"):
        if library == OPEN_CLIP:
            converted = open_clip.convert(tensors, description, spec.input_size)
        else:
            heads = spec.model_kwargs.get("num_heads")
            converted = torchvision.convert(
                tensors,
                None if name == "VisionTransformer" else name,
                num_heads=heads if isinstance(heads, int) else None,
                input_size=spec.input_size,
                keeps_classifier=_keeps_classifier(spec),
            )
    return converted, Report(checkpoint.source, prefix, tuple(left_out), converted.resampled, converted.notes)


def _network(checkpoint: Checkpoint, library: str, key: str | None) -> tuple[StateDict, str, list[str]]:
    """The network's tensors without what stands before their names; that; and names of what is of training alone.

    Raises:
        LoadError: There is no network of this library, there are several, or there is more beside it.
    """
    tensors = without_wrappers(checkpoint.tensors, "checkpoint")
    places = {place for name in _SIGNATURES[library] for place in _places(tensors, name)}
    if key is not None:
        places = {place for place in places if f".{key}." in f".{place}"}
    if len(places) > 1:
        named = " or ".join(place.removesuffix(".") or "the outermost" for place in sorted(places))
        raise LoadError("checkpoint", f"{checkpoint.source} holds several networks: say weights_key: {named}")
    if not places:
        where = f" under {key!r}" if key else ""
        raise LoadError(
            "checkpoint",
            f"{checkpoint.source} holds no model of {library[:-1]}{where}: there is no {_SIGNATURES[library][0]}, but "
            f"{few(tensors)}",
        )
    (prefix,) = places
    left_out = [name for name in tensors if not name.startswith(prefix)]
    if beside := [name for name in left_out if not is_of_training(checkpoint, name, prefix) and key is None]:
        raise LoadError("checkpoint", f"{checkpoint.source} holds more than {prefix}*: {few(beside)}")
    network = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return network, prefix, left_out


def _places(tensors: Mapping[str, Any], name: str) -> set[str]:
    """What stands before a name, each with its last dot; "" if nothing."""
    return {
        tensor.removesuffix(name)
        for tensor in tensors
        if tensor.endswith(name) and (tensor == name or tensor[-len(name) - 1] == ".")
    }


def _check_settings(spec: ModelSpec, unwanted: set[str]) -> None:
    """Refuses settings that a folder with its own weights leaves nothing to say to."""
    for setting in sorted(unwanted & spec.model_fields_set):
        if getattr(spec, setting):
            raise LoadError(setting, f"{spec.architecture} has its own weights: leave {setting} out")


def _keeps_classifier(spec: ModelSpec) -> bool:
    return spec.head is None and spec.num_outputs != 0


def _check_kwargs(spec: ModelSpec) -> None:
    left = _LEFT if spec.architecture.startswith(TORCHVISION) else _LEFT - {"num_heads"}
    if extra := sorted(spec.model_kwargs.keys() - left):
        raise LoadError("model_kwargs", f"a converted model has its sizes from its files: leave {', '.join(extra)} out")
    if spec.head_layers is not None and spec.head is None:
        raise LoadError("head_layers", "of a converted model only a linear classifier is read: give the head as a file")


def _unsaid(spec: ModelSpec) -> list[str]:
    """What of the preprocessing nobody has said."""
    said = spec.preprocessing.given().keys() | spec.overlay.keys()
    return [key for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode") if key not in said]


@contextmanager
def _as_load_error(setting: str) -> Iterator[None]:
    try:
        yield
    except ConversionError as error:
        text = str(error)
        at, separator, pause = text.partition(": ")
        if at == "input_size" and separator:
            raise LoadError(at, pause) from error
        raise LoadError(setting, text) from error


# --- folders and repositories


def _folder(name: str) -> tuple[Path, Kind] | None:
    """The folder that an architecture names, and whose it is; None if it is timm's."""
    path = Path(name.removeprefix(FOLDER)).expanduser() if name.startswith(FOLDER) else _from_hub(name)
    if path is None:
        return None
    kind = folder.kind_of(path)
    return None if kind is Kind.OTHER else (path, kind)


def _from_hub(name: str) -> Path | None:
    """A local copy of a repository of transformers' or open_clip's; None if it is timm's."""
    repository, _, revision = name.removeprefix(HUB).partition("@")
    try:
        return _download(repository, revision or None)
    except ConversionError:
        raise
    except Exception as error:
        raise LoadError(
            "architecture",
            f"the files of {name} did not come from the hub ({reason(error)}); without network give {FOLDER}PATH",
        ) from error


def _download(repository: str, revision: str | None) -> Path | None:
    """Configurations first, since of a repository that can't be converted no weights are wanted."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for file in (CONFIG, OPEN_CLIP_CONFIG):
        try:
            path = Path(hf_hub_download(repository, file, revision=revision)).parent
        except LocalEntryNotFoundError:  # no network
            raise
        except EntryNotFoundError:
            continue
        kind = folder.kind_of(path)
        if kind is Kind.OTHER:
            return None
        folder.check_type(path, kind)
        for weights in folder.PATTERNS[kind]:  # pickles only for want of safetensors
            path = Path(snapshot_download(repository, revision=revision, allow_patterns=["*.json", *weights]))
            if folder.has_weights(path, kind):
                break
        return path
    return None
