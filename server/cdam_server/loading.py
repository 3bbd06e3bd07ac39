"""From a few settings to a model that is ready to be explained.

A model is an architecture of timm's with weights from the hub or from a file, maybe with a linear head of one's own on
top, or ``demo``, which ships with the package. Several are listed in a YAML file:

    models:
      - name: lesions                           # the first is the default model
        architecture: vit_small_patch16_224     # timm's name, or demo
        checkpoint: backbone.safetensors        # relative to this file; or pretrained: true
        head: head.safetensors                  # weight (C, D), bias (C); leave out if the checkpoint has it
        outputs: names.txt                      # one a line; or JSON, a list here, or imagenet-1k
        task: multi_label                       # multi_class (if left out), multi_label, binary, regression
      - name: imagenet
        architecture: vit_base_patch16_224
        pretrained: true

Whatever timm takes beyond that goes into `model_kwargs`, for example other preprocessing than the architecture's:
``model_kwargs: {pretrained_cfg_overlay: {mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5], crop_pct: 1.0}}``.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Self

import timm
import timm.data
import timm.models
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from torch import nn

from cdam_engine.fingerprint import fingerprint
from cdam_engine.preprocess import DataConfig
from cdam_server.weights import LoadError, StateDict, attach_head, load_weights, read_state_dict

__all__ = ["LoadError", "LoadedModel", "ModelSpec", "Task", "load_model", "load_models_file"]

DEMO: Final = "demo"

# Names that stand for timm's lists of ImageNet classes.
_IMAGENETS: Final = ("imagenet-1k", "imagenet-12k", "imagenet-21k-goog", "imagenet-21k-miil", "imagenet-22k")
# Keyword arguments that leave a model's output alone, or show in its tensors or its preprocessing.
_NOT_IN_FINGERPRINT: Final = {
    "attn_drop_rate",
    "drop_path_rate",
    "drop_rate",
    "dynamic_img_size",
    "img_size",
    "num_classes",
    "patch_drop_rate",
    "pos_drop_rate",
    "pretrained_cfg_overlay",
    "proj_drop_rate",
}


class Task(StrEnum):
    """What a model's outputs mean."""

    MULTI_CLASS = "multi_class"
    MULTI_LABEL = "multi_label"
    BINARY = "binary"
    REGRESSION = "regression"


class ModelSpec(BaseModel):
    """The settings of one model. Exactly one source of weights: demo, `pretrained`, `checkpoint` or `random_weights`.

    Attributes:
        name: To ask for it by.
        architecture: timm's name, with or without a tag, or ``demo``.
        pretrained: Weights from the hub.
        checkpoint: Weights from a file: .safetensors, or a pickle that needs no code. Training wrappers and prefixes
            are taken off, and foreign formats converted where timm can.
        random_weights: Weights drawn with a fixed seed, for tests and measurements of speed.
        head: A .safetensors file with a linear head, in place of the one in the weights.
        outputs: Names of the outputs: a list, a file (text with one a line; JSON with a list, names by index, or
            indices by name), or one of timm's lists, such as ``imagenet-1k``. If left out: ImageNet's for weights from
            the hub that have its number of classes, else none.
        task: What the outputs mean.
        num_outputs: If left out, as many as the head has.
        input_size: (height, width) in pixels, if not the architecture's.
        dynamic_img_size: Whether other input sizes can be asked for, where timm supports it.
        model_kwargs: Further keyword arguments of `timm.create_model`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: str = Field(min_length=1)
    architecture: str = Field(min_length=1)
    pretrained: bool = False
    checkpoint: Path | None = None
    random_weights: bool = False
    head: Path | None = None
    outputs: Path | list[str] | None = None
    task: Task = Task.MULTI_CLASS
    num_outputs: int | None = Field(default=None, ge=0)
    input_size: tuple[int, int] | None = None
    dynamic_img_size: bool = True
    model_kwargs: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> Self:
        if self.architecture == DEMO:
            given = {field for field in self.model_fields_set if getattr(self, field)}
            if extra := given - {"name", "architecture", "task", "dynamic_img_size"}:
                raise ValueError(f"the demo model comes complete; leave out {', '.join(sorted(extra))}")
            return self
        sources = [self.pretrained, self.checkpoint is not None, self.random_weights]
        if sum(sources) != 1:
            raise ValueError(
                "give one source of weights: pretrained, checkpoint or random_weights (flags of the same names)"
            )
        return self

    @model_validator(mode="after")
    def _positive_input_size(self) -> Self:
        if self.input_size is not None and min(self.input_size) < 1:
            raise ValueError("input_size: height and width must be positive")
        return self


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in eval mode whose weights take no gradient.

    Attributes:
        name: To ask for it by.
        architecture: timm's name without tag, or ``demo``.
        module: The model itself.
        data_config: How it wants its images.
        task: What its outputs mean.
        output_names: In order; empty if there are none. Several outputs may share one.
        output_count: 0 for a backbone without head, which serves concepts only.
        fingerprint: Of architecture, preprocessing and weights, see `cdam_engine.fingerprint`.
    """

    name: str
    architecture: str
    module: nn.Module
    data_config: DataConfig
    task: Task
    output_names: tuple[str, ...]
    output_count: int
    fingerprint: str


def load_model(spec: ModelSpec, device: torch.device | str = "cpu") -> LoadedModel:
    """Build the model, load its weights, and name its outputs.

    Raises:
        LoadError: It can't be done as the settings say; the message names the setting.
    """
    with _naming(spec.name):
        names = _read_names(spec.outputs)
        module = _demo() if spec.architecture == DEMO else _build(spec, names)
        module = module.eval().requires_grad_(False)
        count = int(getattr(module, "num_classes", 0))
        if not names:
            names = _default_names(spec, count)
        _check_outputs(spec, names, count)
        architecture = _architecture(spec, module)
        data_config = _data_config(module)
        digest = fingerprint(module, architecture, _settings(spec, module, data_config))
    return LoadedModel(spec.name, architecture, module.to(device), data_config, spec.task, tuple(names), count, digest)


def load_models_file(path: Path) -> list[ModelSpec]:
    """The models that a YAML file lists, in its order; paths in it are relative to its folder.

    The format is shown at the top of this module.

    Raises:
        LoadError: The file can't be read, or an entry of it is wrong; the message names the entry and the field.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LoadError("models_file", f"{path} can't be read: {error}") from error
    entries = content.get("models") if isinstance(content, dict) and content.keys() == {"models"} else None
    if not isinstance(entries, list) or not entries:
        raise LoadError("models_file", f"{path} must have one key, `models`, with a list of models")
    specs = [_spec(entry, f"{path}: models[{index}]", path.parent) for index, entry in enumerate(entries)]
    seen: set[str] = set()
    for index, spec in enumerate(specs):
        if spec.name in seen:
            raise LoadError("models_file", f"{path}: models[{index}]: name: there is another model {spec.name!r}")
        seen.add(spec.name)
    return specs


def _spec(entry: object, where: str, folder: Path) -> ModelSpec:
    if isinstance(entry, dict) and isinstance(entry.get("name"), str):
        where = f"{where} ({entry['name']})"
    try:
        spec = ModelSpec.model_validate(entry)
    except ValidationError as error:
        problems = (
            ": ".join(filter(None, [".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, ")]))
            for item in error.errors()
        )
        raise LoadError("models_file", f"{where}: {'; '.join(problems)}") from error
    paths = {
        field: folder / value.expanduser()
        for field in ("checkpoint", "head", "outputs")
        if isinstance(value := getattr(spec, field), Path) and str(value) not in _IMAGENETS
    }
    return spec.model_copy(update=paths)


@contextmanager
def _naming(model: str) -> Iterator[None]:
    """Adds the model's name to load errors."""
    try:
        yield
    except LoadError as error:
        raise LoadError(error.setting, error.message, model=model) from error.__cause__


# --- the module


def _demo() -> nn.Module:
    from cdam_server.demo import model

    try:
        module: nn.Module = model.load()
    except OSError as error:
        raise LoadError("architecture", "the demo model's weights are not installed") from error
    return module


def _build(spec: ModelSpec, names: list[str]) -> nn.Module:
    """A timm model with its weights and head."""
    _check_architecture(spec)
    wanted = 0 if spec.head is not None else spec.num_outputs
    if spec.pretrained:
        module = _create(spec, 0 if wanted == 0 else None)
        if wanted and wanted != module.num_classes:
            raise LoadError(
                "num_outputs",
                f"{wanted} are asked for, but the weights from the hub have {module.num_classes} outputs; "
                "for others give a head or a checkpoint",
            )
    elif spec.checkpoint is not None:
        weights = read_state_dict(spec.checkpoint, "checkpoint")
        module = _create(spec, _outputs_in(weights) if wanted is None else wanted)
        load_weights(module, weights, "checkpoint")
    else:
        module = _create(spec, len(names) or None if wanted is None else wanted)
    if spec.head is not None:
        attach_head(module, spec.head, "head")
    return module


def _check_architecture(spec: ModelSpec) -> None:
    if ":" in spec.architecture:  # hf-hub:..., local-dir:..., for timm to resolve
        return
    if not timm.is_model(spec.architecture):
        similar = difflib.get_close_matches(spec.architecture.split(".")[0], timm.list_models(), n=3)
        hint = f"; is it {' or '.join(similar)}?" if similar else ""
        raise LoadError("architecture", f"timm {timm.__version__} knows no {spec.architecture!r}{hint}")
    try:
        config = timm.models.get_pretrained_cfg(spec.architecture)
    except RuntimeError as error:
        raise LoadError("architecture", str(error)) from error
    if spec.pretrained and (config is None or not config.has_weights):
        raise LoadError("pretrained", f"there are no weights for {spec.architecture} on the hub; give a checkpoint")


def _create(spec: ModelSpec, num_classes: int | None) -> nn.Module:
    kwargs: dict[str, Any] = {**spec.model_kwargs}
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    if spec.input_size is not None:
        kwargs["img_size"] = spec.input_size
    if spec.dynamic_img_size and "dynamic_img_size" not in kwargs:
        try:
            return _create_seeded(spec, {**kwargs, "dynamic_img_size": True})
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise LoadError("model_kwargs", f"{spec.architecture} does not take them ({error})") from error
    try:
        return _create_seeded(spec, kwargs)
    except TypeError as error:
        raise LoadError("model_kwargs", f"{spec.architecture} does not take them ({error})") from error


def _create_seeded(spec: ModelSpec, kwargs: Mapping[str, Any]) -> nn.Module:
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            module: nn.Module = timm.create_model(spec.architecture, pretrained=spec.pretrained, **kwargs)
            return module
    except TypeError:
        raise
    except (AssertionError, ValueError, KeyError) as error:
        raise LoadError("architecture", f"{spec.architecture} can't be built so: {error}") from error
    except Exception as error:
        if not spec.pretrained:
            raise LoadError("architecture", f"{spec.architecture} can't be built: {error}") from error
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise LoadError(
            "pretrained",
            f"the weights of {spec.architecture} did not come from the hub ({type(error).__name__}: {reason}); "
            "without network give a checkpoint",
        ) from error


def _outputs_in(weights: StateDict) -> int:
    """Number of outputs of the classifier in a whole model's weights; 0 if there is none."""
    classifier = weights.get("head.weight")
    return 0 if classifier is None or classifier.ndim != 2 else classifier.shape[0]


# --- what the module is


def _architecture(spec: ModelSpec, module: nn.Module) -> str:
    config = getattr(module, "pretrained_cfg", None) or {}
    return DEMO if spec.architecture == DEMO else str(config.get("architecture") or spec.architecture)


def _data_config(module: nn.Module) -> DataConfig:
    try:
        return DataConfig.from_timm(module)
    except ValueError as error:
        raise LoadError("architecture", str(error)) from error


def _settings(spec: ModelSpec, module: nn.Module, data_config: DataConfig) -> dict[str, object]:
    kwargs = {name: value for name, value in spec.model_kwargs.items() if name not in _NOT_IN_FINGERPRINT}
    return {
        "model_kwargs": kwargs,
        "global_pool": str(getattr(module, "global_pool", "")),
        "data_config": asdict(data_config),
    }


# --- names of outputs


def _read_names(outputs: Path | list[str] | None) -> list[str]:
    if outputs is None:
        return []
    if isinstance(outputs, list):
        names = outputs
    elif str(outputs) in _IMAGENETS:
        names = _imagenet_names(str(outputs))
    else:
        names = _names_in_file(outputs)
    if not names:
        raise LoadError("outputs", "there are no names")
    if any(not name.strip() for name in names):
        raise LoadError("outputs", f"name {next(i for i, name in enumerate(names) if not name.strip())} is empty")
    return names


def _names_in_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError("outputs", f"{path} can't be read: {error}") from error
    if path.suffix != ".json":
        return [line.strip() for line in text.rstrip().splitlines()]
    try:
        return _names_in_json(json.loads(text))
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise LoadError(
            "outputs",
            f"{path} must be JSON with a list of names, names by index from 0, or indices from 0 by name ({error})",
        ) from error


def _names_in_json(content: Any) -> list[str]:
    """A list; {"0": "cat"}; {"0": ["n0123", "cat"]} as in Keras; {"cat": 0}. Anything else raises."""
    if isinstance(content, dict):
        count = len(content)
        if all(isinstance(value, int) for value in content.values()):
            content = {index: name for name, index in content.items()}
        by_index = {int(index): name for index, name in content.items()}
        if sorted(by_index) != list(range(count)):
            raise ValueError(f"the indices are not 0 to {count - 1}, each once")
        content = [by_index[index] for index in range(count)]
    names = [entry[-1] if isinstance(entry, list) else entry for entry in content] if isinstance(content, list) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError("there is something else in it")
    return names


def _default_names(spec: ModelSpec, count: int) -> list[str]:
    if spec.architecture == DEMO:
        from cdam_server.demo import model

        return list(model.LABELS)
    # Of weights from elsewhere nothing is assumed: a thousand classes need not be ImageNet's.
    subset = timm.data.infer_imagenet_subset({"num_classes": count})
    return _imagenet_names(subset) if spec.pretrained and spec.head is None and subset else []


def _imagenet_names(subset: str) -> list[str]:
    names: list[str] = timm.data.ImageNetInfo(subset).label_descriptions()
    return names


def _check_outputs(spec: ModelSpec, names: list[str], count: int) -> None:
    if names and len(names) != count:
        raise LoadError("outputs", f"there are {len(names)} names for {count} outputs")
    if spec.num_outputs is not None and spec.num_outputs != count:
        raise LoadError("num_outputs", f"{spec.num_outputs} are asked for, but the head has {count}")
    if spec.task is Task.BINARY and count != 1:
        raise LoadError("task", f"binary is for one output; there are {count}")
    if spec.task in {Task.MULTI_CLASS, Task.MULTI_LABEL} and count == 1:
        raise LoadError("task", f"{spec.task} needs several outputs; say whether the one is `binary` or `regression`")
