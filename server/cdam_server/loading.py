"""From a few settings to a model that is ready to be explained.

A model is an architecture of timm's with weights from the hub or from a file, maybe with a linear head of one's own on
top, or ``demo``, which ships with the package. The settings are in `specs`, what is made of files in `weights`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import structlog
import timm
import timm.data
import timm.models
import torch
from torch import nn

from cdam_engine import SplitViT, UnsupportedArchitectureError
from cdam_engine.fingerprint import fingerprint
from cdam_engine.preprocess import DataConfig
from cdam_server import foreign
from cdam_server.conversions import torchvision
from cdam_server.conversions.converted import Converted, TextSide
from cdam_server.load_error import LoadError, few, reason
from cdam_server.output_names import imagenet_names, read_names
from cdam_server.specs import DEMO, HUB, TORCHVISION, ModelSpec, Task, load_models_file, naming
from cdam_server.validation import unknown
from cdam_server.weights import NO_REPORT, Report, Wish, attach_head, load_weights, read_checkpoint
from cdam_server.weights.trained import Trained, apply_tuned, check_backbone, read_trained

__all__ = [
    "Backbone",
    "LoadError",
    "LoadedModel",
    "ModelSpec",
    "Task",
    "load_backbone",
    "load_model",
    "load_models_file",
    "share_weights",
]

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
# Of timm.create_model, but settings of our own.
_SETTINGS: Final = {
    "checkpoint_path": "checkpoint",
    "pretrained": "pretrained",
    "pretrained_cfg": "preprocessing",
}
_log = structlog.get_logger("cdam.server")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in eval mode whose weights take no gradient.

    Attributes:
        name: To ask for it by.
        architecture: timm's name without tag; what a converted model was, such as ``transformers:ViTModel``; or ``demo``.
        module: The model itself.
        data_config: How it wants its images.
        task: What its outputs mean.
        output_names: In order; empty if there are none. Several outputs may share one.
        output_count: 0 for a backbone without head, which serves concepts only.
        fingerprint: Of architecture, preprocessing and weights, see `cdam_engine.fingerprint`.
        trunk_fingerprint: Likewise, without the weights that come after the last attention's tokens: models of equal
            ones share their trunk. Empty for a model that can't be explained.
        weights: Where its weights are from, and what was done to them.
        model_kwargs: What the architecture was built with beyond its name, as timm takes it.
        text: What compares its latent with a text's embedding, if it was trained with texts and the files say it.
    """

    name: str
    architecture: str
    module: nn.Module
    data_config: DataConfig
    task: Task
    output_names: tuple[str, ...]
    output_count: int
    fingerprint: str
    trunk_fingerprint: str = ""
    weights: Report = NO_REPORT
    text: TextSide | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def resampled(self) -> str:
        """What was resampled to another geometry, in words; "" if nothing."""
        return self.weights.resampled


def load_model(spec: ModelSpec, device: torch.device | str = "cpu") -> LoadedModel:
    """Build the model, load its weights, and name its outputs.

    Raises:
        LoadError: It can't be done as the settings say; the message names the setting.
    """
    with naming(spec.name):
        names = read_names(spec.outputs)
        built = _build(spec, names) if spec.head is None else _with_head(spec)
        module, converted = built.module, built.converted
        split = _split(spec, module)
        count = _count_outputs(module, split)
        if not names:
            names = _default_names(spec, built, count)
        task = _task(spec, built)
        _check_outputs(spec, names, count, task)
        architecture, data_config, settings = _identity(spec, built)
        digest = fingerprint(module, architecture, settings)
        trunk = "" if split is None else fingerprint(module, architecture, settings, counts=split.is_of_trunk)
    _tell(spec.name, built.report)
    text = None if converted is None else converted.text
    return LoadedModel(
        spec.name,
        architecture,
        module.to(device),
        data_config,
        task,
        tuple(names),
        count,
        digest,
        trunk,
        built.report,
        text,
        dict(spec.model_kwargs) if converted is None else dict(converted.model_kwargs),
    )


@dataclass(frozen=True, eq=False)
class Backbone:
    """A model without classifier, for heads to be trained on.

    Attributes:
        module: The model, in eval mode; its weights take no gradient.
        architecture: See `LoadedModel`.
        data_config: How it wants its images.
        fingerprint: Of the backbone before anything of it was tuned; files of trained heads name it.
        settings: What else decides its output, besides architecture and weights.
        tuned: Names of the tensors that come from a file which `cdam train` wrote.
    """

    module: nn.Module
    architecture: str
    data_config: DataConfig
    fingerprint: str
    settings: Mapping[str, object]
    tuned: tuple[str, ...] = ()


def load_backbone(spec: ModelSpec) -> Backbone:
    """The model that the settings describe, without its classifier; with what a trained head of it has tuned.

    Raises:
        LoadError: It can't be done as the settings say; the message names the setting.
    """
    with naming(spec.name):
        return _backbone(spec)[0]


def _backbone(spec: ModelSpec) -> tuple[Backbone, _Built]:
    bare = spec.model_copy(update={"head": None, "head_layers": None, "outputs": None, "num_outputs": 0})
    built = _build(bare, [])
    architecture, data_config, settings = _identity(bare, built)
    digest = fingerprint(built.module, architecture, settings)
    tuned: tuple[str, ...] = ()
    found = None if spec.head is None else read_trained(spec.head, "head")
    if spec.head is not None and found is not None:
        trained, tensors = found
        check_backbone(trained, digest, architecture, spec.head, "head")
        tuned = apply_tuned(built.module, tensors, spec.head, "head")
        built = replace(built, trained=trained)
    return Backbone(built.module, architecture, data_config, digest, settings, tuned), built


def share_weights(module: nn.Module, others: Sequence[nn.Module]) -> None:
    """Let a model use the tensors of others wherever they have the same under the same name: they are kept once.

    Args:
        module: The model; what it computes stays the same.
        others: Models that live as long.
    """
    for other in others:
        theirs: dict[str, Any] = {**dict(other.named_parameters()), **dict(other.named_buffers())}
        for prefix, part in module.named_modules():
            for tensors in (part._parameters, part._buffers):  # noqa: SLF001
                for name, own in tensors.items():
                    same = theirs.get(f"{prefix}.{name}" if prefix else name)
                    if own is not None and same is not None and same is not own and _are_equal(own, same):
                        tensors[name] = same


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    kinds = ((its.shape, its.dtype, its.device, its.requires_grad) for its in (one, other))
    return len(set(kinds)) == 1 and torch.equal(one, other)


def _tell(model: str, report: Report) -> None:
    """Log what was done to the weights, which nobody should have to guess."""
    if report.left_out:
        _log.info("left out of the checkpoint", model=model, count=len(report.left_out), tensors=few(report.left_out))
    if report.resampled:
        _log.warning("resampled", model=model, what=report.resampled)


# --- the module


@dataclass(frozen=True, eq=False)
class _Built:
    """A module in eval mode, what was done to its weights, what it was in another library, and of which training its
    head is.
    """

    module: nn.Module
    report: Report
    converted: Converted | None = None
    trained: Trained | None = None


def _demo(spec: ModelSpec) -> nn.Module:
    from cdam_server.demo import model

    try:
        module: Any = model.load()
    except OSError as error:
        raise LoadError("architecture", "the demo model's weights are not installed") from error
    if spec.num_outputs == 0:
        module.reset_classifier(0)
    loaded: nn.Module = module
    return loaded


def _build(spec: ModelSpec, names: list[str]) -> _Built:
    """A model with its weights and its own head."""
    found = None
    if spec.architecture == DEMO:
        module, report = _demo(spec), Report("the package")
    elif (found := foreign.converted_of(spec)) is None:
        module, report = _of_timm(spec, names)
    else:
        module, report = foreign.build(spec, found[0]), found[1]
        foreign.tell(spec.name, found[0])
    return _Built(module.eval().requires_grad_(False), report, None if found is None else found[0])


def _with_head(spec: ModelSpec) -> _Built:
    """A model with the head in a file, and with what was tuned together with it."""
    assert spec.head is not None
    _, built = _backbone(spec)
    if built.trained is not None and spec.head_layers is not None:
        raise LoadError("head_layers", f"{spec.head} holds a linear head: leave them out")
    attach_head(built.module, spec.head, "head", spec.head_layers, tuned=built.trained is not None)
    built.module.eval().requires_grad_(False)
    return built


def _identity(spec: ModelSpec, built: _Built) -> tuple[str, DataConfig, dict[str, object]]:
    """What a fingerprint is of, besides the weights: architecture, preprocessing, other settings."""
    converted = built.converted
    architecture = _architecture(spec, built.module) if converted is None else converted.source
    data_config = _data_config(spec, built.module)
    return architecture, data_config, _settings(spec, built.module, data_config, converted)


def _of_timm(spec: ModelSpec, names: list[str]) -> tuple[nn.Module, Report]:
    """A model of timm's with its weights, and what was done to them."""
    _check_architecture(spec)
    wanted = 0 if spec.head is not None else spec.num_outputs
    source = _checkpoint(spec)
    if source is not None:
        setting, path = source
        foreign.refuse_foreign_folder(str(path), setting)
        checkpoint = read_checkpoint(path, setting)
        foreign.refuse_foreign(checkpoint, setting)
        module = _create(spec, 0, pretrained=False)
        report = load_weights(module, checkpoint, setting, _wish(spec, wanted, names))
    elif spec.pretrained:
        module = _from_timm(spec, wanted)
        report = Report("timm's weights", resampled=_resampled_by_timm(spec, module))
    else:
        module = _create(spec, len(names) or None if wanted is None else wanted, pretrained=False)
        report = Report("drawn at random")
    return module, report


def _checkpoint(spec: ModelSpec) -> tuple[str, Path] | None:
    """The setting that names the file of the weights, and the file."""
    if spec.checkpoint is not None:
        return "checkpoint", spec.checkpoint
    return ("architecture", Path(spec.architecture)) if spec.brings_weights and not spec.random_weights else None


def _wish(spec: ModelSpec, wanted: int | None, names: list[str]) -> Wish:
    if "embed_dim" in spec.model_kwargs and "num_heads" not in spec.model_kwargs:
        raise LoadError("model_kwargs", "embed_dim is given without num_heads, which no checkpoint tells: give both")
    trained = spec.model_kwargs.get("img_size")
    return Wish(
        key=spec.weights_key,
        num_outputs=wanted,
        asked=bool(names) or "task" in spec.model_fields_set,
        trained_size=None if trained is None else _pair(trained),
        input_size=spec.input_size,
        resample=spec.resample,
        head_layers=None if spec.head is not None else spec.head_layers,
    )


def _pair(size: Any) -> tuple[int, int]:
    try:
        height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)
    except (TypeError, ValueError) as error:
        raise LoadError("model_kwargs", f"img_size must be a number or [height, width], not {size!r}") from error


def _from_timm(spec: ModelSpec, wanted: int | None) -> nn.Module:
    """A model with timm's own weights."""
    if "patch_size" in spec.model_kwargs and not spec.resample:
        raise LoadError(
            "model_kwargs", "patch_size: the weights have the architecture's; resample: true resamples them"
        )
    module = _create(spec, 0 if wanted == 0 else None, pretrained=True)
    if wanted and wanted != module.num_classes:
        raise LoadError(
            "num_outputs",
            f"{wanted} are asked for, but the weights from the hub have {module.num_classes} outputs; "
            "for others give a head or a checkpoint",
        )
    return module


def _resampled_by_timm(spec: ModelSpec, module: nn.Module) -> str:
    """What timm has resampled for another input size than its weights'."""
    embedding: Any = getattr(module, "patch_embed", None)
    config = timm.models.get_pretrained_cfg(spec.architecture)
    size = tuple(getattr(embedding, "img_size", None) or ())
    if config is None or not size or not config.fixed_input_size or size == tuple(config.input_size[-2:]):
        return ""
    if getattr(module, "pos_embed", None) is None and getattr(module, "rel_pos_bias", None) is None:
        return ""
    theirs = " x ".join(map(str, config.input_size[-2:]))
    return f"positions from those for {theirs} pixels to those for {size[0]} x {size[1]}"


def _check_architecture(spec: ModelSpec) -> None:
    if spec.brings_weights:  # for timm to resolve
        return
    if torchvision.is_name(spec.architecture):
        raise LoadError(
            "architecture",
            f"{spec.architecture} is torchvision's: say {TORCHVISION}{spec.architecture}, with a checkpoint",
        )
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


def _create(spec: ModelSpec, num_classes: int | None, *, pretrained: bool) -> nn.Module:
    for name in _SETTINGS.keys() & spec.model_kwargs.keys():
        raise LoadError("model_kwargs", f"{name} is not taken here: use the setting {_SETTINGS[name]}")
    kwargs: dict[str, Any] = {**spec.model_kwargs}
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    if spec.input_size is not None:
        kwargs["img_size"] = spec.input_size
    if spec.dynamic_img_size and "dynamic_img_size" not in kwargs:
        try:
            return _create_seeded(spec, {**kwargs, "dynamic_img_size": True}, pretrained=pretrained)
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise _unknown_kwargs(spec, kwargs, error) from error
    try:
        return _create_seeded(spec, kwargs, pretrained=pretrained)
    except TypeError as error:
        raise _unknown_kwargs(spec, kwargs, error) from error


def _unknown_kwargs(spec: ModelSpec, kwargs: Mapping[str, Any], error: TypeError) -> LoadError:
    """What is wrong with an architecture's keyword arguments, with those that it takes."""
    try:
        module = _create_seeded(spec, {"num_classes": 0}, pretrained=False)
    except (LoadError, TypeError):
        return LoadError("model_kwargs", f"{spec.architecture} does not take them ({reason(error)})")
    taken = [name for cls in type(module).__mro__ for name in inspect.signature(cls).parameters]
    allowed = sorted({name for name in taken if name not in {"self", "args", "kwargs", "num_classes"}})
    wrong = sorted(kwargs.keys() - set(allowed) - {"num_classes", "pretrained_cfg_overlay", "img_size"})
    if wrong:
        return LoadError("model_kwargs", f"{spec.architecture} does not take {wrong[0]}; {unknown(wrong[0], allowed)}")
    if "img_size" in kwargs and "img_size" not in allowed:
        setting = "input_size" if spec.input_size is not None else "model_kwargs"
        return LoadError(setting, f"{spec.architecture} is not built for one input size: leave it out")
    return LoadError("model_kwargs", f"{spec.architecture} can't be built with these values: {reason(error)}")


def _create_seeded(spec: ModelSpec, kwargs: Mapping[str, Any], *, pretrained: bool) -> nn.Module:
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            module: nn.Module = timm.create_model(spec.architecture, pretrained=pretrained, **kwargs)
            return module
    except TypeError:
        raise
    except (AssertionError, ValueError, KeyError) as error:
        what = reason(error) if isinstance(error, KeyError) else str(error)
        if spec.model_kwargs and not pretrained and not spec.architecture.startswith(HUB):
            raise LoadError("model_kwargs", f"{spec.architecture} can't be built with these values: {what}") from error
        raise LoadError("architecture", f"{spec.architecture} can't be built: {what}") from error
    except Exception as error:
        if not pretrained and not spec.architecture.startswith(HUB):
            raise LoadError("architecture", f"{spec.architecture} can't be built: {reason(error)}") from error
        raise LoadError(
            "pretrained" if pretrained else "architecture",
            f"the weights of {spec.architecture} did not come from the hub ({reason(error)}); "
            "without network give a checkpoint",
        ) from error


# --- what the module is


def _architecture(spec: ModelSpec, module: nn.Module) -> str:
    config = getattr(module, "pretrained_cfg", None) or {}
    return DEMO if spec.architecture == DEMO else str(config.get("architecture") or spec.architecture)


def _split(spec: ModelSpec, module: nn.Module) -> SplitViT | None:
    """The model as the engine sees it; None if CDAM is not defined for it."""
    try:
        split = SplitViT(module)
        split.grid(split.input_size)
        assert split.num_outputs >= 0  # it asks the head, whose answer may be no row of outputs
    except UnsupportedArchitectureError:
        return None
    except ValueError as error:  # an input size that is no multiple of the patches
        raise LoadError("model_kwargs" if spec.input_size is None else "input_size", str(error)) from error
    return split


def _count_outputs(module: nn.Module, split: SplitViT | None) -> int:
    """From the head itself; of a model that can't be explained, as timm says."""
    return int(getattr(module, "num_classes", 0)) if split is None else split.num_outputs


def _data_config(spec: ModelSpec, module: nn.Module) -> DataConfig:
    given = spec.preprocessing.given()
    config: Any = getattr(module, "pretrained_cfg", None) or {}
    module.pretrained_cfg = {**config, **given}  # type: ignore[assignment]
    try:
        return DataConfig.from_timm(module)
    except ValueError as error:
        setting = "preprocessing" if given or "mean" in str(error) else "architecture"
        raise LoadError(setting, str(error)) from error


def _settings(
    spec: ModelSpec, module: nn.Module, data_config: DataConfig, converted: Converted | None
) -> dict[str, object]:
    kwargs = {name: value for name, value in spec.model_kwargs.items() if name not in _NOT_IN_FINGERPRINT}
    settings: dict[str, object] = {
        "model_kwargs": kwargs,
        **({} if converted is None else {"converted": converted.settings}),
        "global_pool": str(getattr(module, "global_pool", "")),
        "data_config": asdict(data_config),
    }
    if spec.head_layers is not None:
        settings["head_layers"] = [[layer.kind, layer.eps] for layer in spec.head_layers]
    return settings


# --- names of outputs


def _default_names(spec: ModelSpec, built: _Built, count: int) -> list[str]:
    if spec.head is not None:
        return [] if built.trained is None else list(built.trained.outputs)
    if spec.architecture == DEMO:
        from cdam_server.demo import model

        return list(model.LABELS)
    if built.converted is not None:
        return list(built.converted.output_names) if count else []
    config: Mapping[str, Any] = getattr(built.module, "pretrained_cfg", None) or {}
    labels = config.get("label_names")
    if spec.brings_weights and isinstance(labels, list | tuple) and len(labels) == count:
        return [str(label) for label in labels]
    # Of weights from elsewhere nothing is assumed: a thousand classes need not be ImageNet's.
    subset = timm.data.infer_imagenet_subset({"num_classes": count})
    return imagenet_names(subset) if spec.pretrained and subset else []


def _task(spec: ModelSpec, built: _Built) -> Task:
    """What the settings say, else the file of the head, else the converted files."""
    source = built.converted if spec.head is None else built.trained
    if source is None or source.task is None:
        return spec.task
    if "task" not in spec.model_fields_set:
        return Task(source.task)
    if spec.head is not None and spec.task != source.task:
        raise LoadError("task", f"the head was trained for {source.task}, not {spec.task}: leave the task out")
    return spec.task


def _check_outputs(spec: ModelSpec, names: list[str], count: int, task: Task) -> None:
    if names and len(names) != count:
        raise LoadError("outputs", f"there are {len(names)} names for {count} outputs")
    if spec.num_outputs is not None and spec.num_outputs != count:
        raise LoadError("num_outputs", f"{spec.num_outputs} are asked for, but the head has {count}")
    if task is Task.BINARY and count != 1:
        raise LoadError("task", f"binary is for one output; there are {count}")
    if task in {Task.MULTI_CLASS, Task.MULTI_LABEL} and count == 1:
        raise LoadError("task", f"{task} needs several outputs; say whether the one is `binary` or `regression`")
