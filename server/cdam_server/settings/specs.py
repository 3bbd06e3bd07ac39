"""The settings of models: what they may say, and the YAML file that lists several. Neither torch nor timm is imported.

    models:
      - name: lesions                           # the first is the default model
        architecture: vit_small_patch16_224     # timm's name, hf-hub:ORG/NAME, local-dir:PATH, or demo
        checkpoint: backbone.safetensors        # relative to this file; or pretrained: true
        head: head.safetensors                  # weight (C, D), bias (C); leave out if the checkpoint has it
        outputs: names.txt                      # one a line; or JSON, a list here, or imagenet-1k
        task: multi_label                       # multi_class (if left out), multi_label, binary, regression
        preprocessing: {mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5], crop_pct: 1.0}
      - name: imagenet
        architecture: vit_base_patch16_224
        pretrained: true
      - name: pets
        architecture: local-dir:pets            # as transformers' save_pretrained wrote it

``docs/models.md`` describes every setting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from cdam_server.settings.load_error import LoadError
from cdam_server.settings.output_names import IMAGENETS, read_names
from cdam_server.settings.plain_yaml import read_yaml
from cdam_server.settings.validation import one_line

DEMO: Final = "demo"
HUB: Final = "hf-hub:"
FOLDER: Final = "local-dir:"
TORCHVISION: Final = "torchvision:"
OPEN_CLIP: Final = "open_clip:"
PICKLES: Final = (".bin", ".ckpt", ".pt", ".pth", ".tar")
# What a person wrote in YAML is meant as it is written: `no` is a label, not False.
_TEXTS: Final = frozenset({"name", "architecture", "checkpoint", "weights_key", "head", "outputs", "task"})
_FILES: Final = ("checkpoint", "head", "outputs")
_CONFIGS: Final = ("config.json", "open_clip_config.json")


class Task(StrEnum):
    """What a model's outputs mean."""

    MULTI_CLASS = "multi_class"
    MULTI_LABEL = "multi_label"
    BINARY = "binary"
    REGRESSION = "regression"


def _for_channels(values: list[float]) -> list[float]:
    if len(values) not in {1, 3}:
        raise ValueError(f"must have a value for each channel, 3 (RGB) or 1 (grey), not {len(values)}")
    return values


class Preprocessing(BaseModel):
    """How a model wants its images, where it is not as its architecture's own weights do.

    Attributes:
        mean: Of each channel, on a scale where white is 1: three for RGB, one for grey.
        std: Likewise.
        interpolation: Filter of the resize.
        crop_pct: Input size over resized size.
        crop_mode: ``center`` (shorter side resized, centre cut out), ``squash`` (aspect ratio given up), or ``border``
            (longer side resized, the rest padded); ``center_floor`` and ``squash_top_left`` as `DataConfig` has them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: Annotated[list[float], AfterValidator(_for_channels)] | None = None
    std: Annotated[list[Annotated[float, Field(gt=0)]], AfterValidator(_for_channels)] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None = None
    crop_pct: float | None = Field(default=None, gt=0, le=1)
    crop_mode: Literal["center", "center_floor", "squash", "squash_top_left", "border"] | None = None

    def given(self) -> dict[str, Any]:
        """The settings that were made."""
        return {name: value for name, value in self if value is not None}


class Layer(BaseModel):
    """One layer of a classifier of several.

    Attributes:
        kind: Which.
        eps: Of a norm.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["linear", "gelu", "relu", "silu", "tanh", "dropout", "layer_norm", "batch_norm"]
    eps: float = Field(default=1e-5, gt=0)


def _layers(value: object) -> object:
    """Each layer as its name, or a norm with its eps: {batch_norm: 1e-6}."""
    if not isinstance(value, list) or not value:
        raise ValueError("must be a list of layers, such as [linear, gelu, linear]")
    layers = [
        {"kind": next(iter(layer)), "eps": next(iter(layer.values()))}
        if isinstance(layer, dict) and len(layer) == 1
        else {"kind": layer}
        for layer in value
    ]
    if layers[-1]["kind"] != "linear":
        raise ValueError(f"must end in linear, not in {layers[-1]['kind']}: what follows is no output")
    return layers


def _labels(value: object) -> object:
    """A list of names, or a path."""
    if value is None or isinstance(value, Path):
        return value
    if isinstance(value, str):
        return Path(value)
    if not isinstance(value, list):
        raise ValueError(f"must be a list of names, a file, or one of {', '.join(IMAGENETS)}")  # noqa: TRY004
    for index, name in enumerate(value):
        if not isinstance(name, str):
            raise ValueError(f"[{index}] is {name!r}, no text: put it in quotes")  # noqa: TRY004
    return value


class ModelSpec(BaseModel):
    """The settings of one model. Exactly one source of weights: demo, `pretrained`, `checkpoint` or `random_weights`.

    Attributes:
        name: To ask for it by.
        architecture: timm's name, with or without a tag; ``hf-hub:ORG/NAME`` or ``local-dir:PATH``, folders of timm,
            transformers or open_clip with configuration and weights, which need no other source of weights;
            ``torchvision:NAME`` or ``open_clip:NAME``, with a checkpoint; or ``demo``.
        pretrained: Weights from the hub.
        checkpoint: Weights from a file: .safetensors, or a pickle that needs no code; or from ``hf-hub:ORG/NAME`` or
            ``local-dir:PATH``. Training wrappers and prefixes are taken off, and foreign formats converted where timm
            can.
        weights_key: Which part of the checkpoint holds the weights, where there are several: ``teacher``.
        random_weights: Weights drawn with a fixed seed, for tests and measurements of speed.
        head: A .safetensors file with a linear head, in place of the one in the weights.
        head_layers: Layers of a classifier of several, in the checkpoint or in `head`, in the order of its `nn.Sequential`:
            ``[dropout, linear, gelu, linear]``; norms may have their eps: ``{batch_norm: 1e-6}``. GELU is the exact one.
        outputs: Names of the outputs: a list, a file (text with one a line; JSON with a list, names by index, or
            indices by name), or one of timm's lists, such as ``imagenet-1k``. If left out: ImageNet's for weights from
            the hub that have its number of classes, else none.
        task: What the outputs mean.
        num_outputs: If left out, as many as the head has; 0 leaves the checkpoint's classifier out.
        input_size: (height, width) in pixels, if not the architecture's. Positions for another size are resampled.
        resample: Whether the checkpoint's patch embedding and positions may be resampled to the architecture's.
        dynamic_img_size: Whether other input sizes can be asked for, where timm supports it.
        preprocessing: Where it is not the architecture's.
        model_kwargs: Further keyword arguments of `timm.create_model`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: str = Field(min_length=1)
    architecture: str = Field(min_length=1)
    pretrained: bool = False
    checkpoint: Path | None = None
    weights_key: str | None = Field(default=None, min_length=1)
    random_weights: bool = False
    head: Path | None = None
    head_layers: Annotated[list[Layer], BeforeValidator(_layers)] | None = None
    outputs: Annotated[Path | list[str] | None, BeforeValidator(_labels)] = None
    task: Task = Task.MULTI_CLASS
    num_outputs: int | None = Field(default=None, ge=0)
    input_size: tuple[int, int] | None = None
    resample: bool = False
    dynamic_img_size: bool = True
    preprocessing: Preprocessing = Preprocessing()
    model_kwargs: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> Self:
        if self.architecture == DEMO:
            given = {field for field in self.model_fields_set if getattr(self, field)}
            # A head of one's own says what the outputs are.
            own = {"head", "outputs", "num_outputs"} if self.head is not None else set()
            if extra := given - {"name", "architecture", "task", "dynamic_img_size"} - own:
                raise ValueError(f"the demo model comes complete; leave out {', '.join(sorted(extra))}")
            return self
        sources = [self.pretrained, self.checkpoint is not None, self.random_weights]
        if sum(sources) > 1 or (not any(sources) and not self.brings_weights):
            raise ValueError(
                "give one source of weights: pretrained, checkpoint or random_weights (--pretrained and so on)"
                f"{self._hint()}"
            )
        return self

    @model_validator(mode="after")
    def _settings_that_go_together(self) -> Self:
        if self.input_size is not None and min(self.input_size) < 1:
            raise ValueError("input_size: height and width must be positive")
        if self.weights_key is not None and self.checkpoint is None:
            raise ValueError("weights_key: it names a part of a checkpoint, and there is none")
        if self.head_layers is not None and self.head is None and self.checkpoint is None and not self.brings_weights:
            raise ValueError("head_layers: they are of a head or a checkpoint, and there is none")
        overlay = self.model_kwargs.get("pretrained_cfg_overlay")
        if isinstance(overlay, dict) and (twice := sorted(overlay.keys() & self.preprocessing.given().keys())):
            raise ValueError(f"preprocessing: {', '.join(twice)} is in model_kwargs.pretrained_cfg_overlay, too")
        return self

    def _hint(self) -> str:
        """What is missing where an architecture is of another library, or a folder."""
        if self.architecture.startswith((TORCHVISION, OPEN_CLIP)):
            return f"; {self.architecture} needs a checkpoint"
        return f"; for the folder say {FOLDER}{self.architecture}" if Path(self.architecture).is_dir() else ""

    @property
    def brings_weights(self) -> bool:
        """Whether the architecture is a folder or a repository that holds its weights, too."""
        return self.architecture.startswith((HUB, FOLDER))

    @property
    def overlay(self) -> Mapping[str, JsonValue]:
        """What replaces timm's configuration of the architecture."""
        overlay = self.model_kwargs.get("pretrained_cfg_overlay")
        return overlay if isinstance(overlay, dict) else {}


def check_files(specs: Sequence[ModelSpec]) -> None:
    """Look at the files that models name, before anything large is read or built.

    Raises:
        LoadError: A file is not there, is of another kind, or holds no names; the message names model and setting.
    """
    for spec in specs:
        with naming(spec.name):
            _check_weights(spec.checkpoint, "checkpoint")
            _check_weights(spec.head, "head")
            _check_folder(spec.architecture, "architecture")
            read_names(spec.outputs)


@contextmanager
def naming(model: str) -> Iterator[None]:
    """Adds the model's name to load errors."""
    try:
        yield
    except LoadError as error:
        raise LoadError(error.setting, error.message, model=model) from error.__cause__


def load_models_file(path: Path) -> list[ModelSpec]:
    """The models that a YAML file lists, in its order; paths in it are relative to its folder.

    The format is shown at the top of this module.

    Raises:
        LoadError: The file can't be read, or an entry of it is wrong; the message names the entry and the field.
    """
    try:
        content = read_yaml(path, texts=_TEXTS)
    except ValueError as error:
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
        raise LoadError("models_file", f"{where}: {one_line(error, ModelSpec)}") from error
    paths: dict[str, Any] = {
        field: _within(folder, value)
        for field in _FILES
        if isinstance(value := getattr(spec, field), Path) and str(value) not in IMAGENETS
    }
    if spec.architecture.startswith(FOLDER):
        paths["architecture"] = str(_within(folder, Path(spec.architecture)))
    return spec.model_copy(update=paths)


def _within(folder: Path, path: Path) -> Path:
    """A path of the file's, relative to the file's folder."""
    text = str(path)
    if text.startswith(HUB):
        return path
    if text.startswith(FOLDER):
        return Path(f"{FOLDER}{folder / Path(text.removeprefix(FOLDER)).expanduser()}")
    return folder / path.expanduser()


def _check_weights(path: Path | None, setting: str) -> None:
    if path is None or str(path).startswith(HUB):
        return
    if str(path).startswith(FOLDER):
        _check_folder(str(path), setting)
    elif path.is_dir():
        return  # of which kind it is, its reader says
    elif not path.is_file():
        raise LoadError(setting, f"there is no file {path}")
    elif path.suffix != ".safetensors" and path.suffix not in PICKLES:
        raise LoadError(setting, f"{path} must end in .safetensors, or in {', '.join(PICKLES)}")


def _check_folder(name: str, setting: str) -> None:
    if not name.startswith(FOLDER):
        if name.startswith(("/", "./", "../", "~")) and Path(name).expanduser().is_dir():
            raise LoadError(setting, f"{name} is a folder: say {FOLDER}{name}")
        return
    folder = Path(name.removeprefix(FOLDER))
    if not any((folder / config).is_file() for config in _CONFIGS):
        raise LoadError(
            setting,
            f"there is no {folder / _CONFIGS[0]}: {FOLDER}PATH names a folder that timm, transformers or open_clip wrote",
        )
