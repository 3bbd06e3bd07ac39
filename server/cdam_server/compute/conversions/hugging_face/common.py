"""What the conversions of transformers' models share: configuration, blocks, positions, heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cdam_engine.preprocess import DataConfig, Size
from cdam_server.compute.conversions.layers import NOT_LINEAR, resampled, with_bias
from cdam_server.compute.conversions.tensors import ConversionError, StateDict, Tensors

ACTIVATIONS: Final = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""What timm calls transformers' activations. Those whose formula is another one, by ever so little, are not here."""

_TASKS: Final = {
    "regression": "regression",
    "single_label_classification": "multi_class",
    "multi_label_classification": "multi_label",
}


@dataclass(frozen=True)
class Config:
    """A config.json, with the defaults that transformers' class has for what is not in the file."""

    values: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        """The value of a key.

        Raises:
            ConversionError: There is none, nor a default.
        """
        if key not in self.values:
            raise ConversionError(f"config.json has no {key}")
        return self.values[key]

    def count(self, key: str) -> int:
        """A positive whole number.

        Raises:
            ConversionError: It is something else.
        """
        value = self[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConversionError(f"{key} is {value!r} in place of a positive number")
        return value

    def pair(self, key: str) -> Size:
        """(height, width): two numbers, or one that stands for both.

        Raises:
            ConversionError: It is something else.
        """
        value = self[key]
        pair = (value, value) if isinstance(value, int) else value
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
            raise ConversionError(f"{key} is {value!r} in place of one or two positive numbers")
        return pair[0], pair[1]

    def activation(self) -> str:
        """Timm's name of the activation.

        Raises:
            ConversionError: Timm has no equal one.
        """
        name = self["hidden_act"]
        if name not in ACTIVATIONS:
            known = ", ".join(sorted(ACTIVATIONS))
            raise ConversionError(f"hidden_act is {name!r}; timm has equals of {known}")
        return ACTIVATIONS[name]

    def check_plain(self) -> None:
        """Refuses what no conversion expects.

        Raises:
            ConversionError: Quantised, pruned, with heads of other widths, not of RGB images, or with code of its own.
        """
        for key in ("quantization_config", "pruned_heads", "auto_map"):
            if self.values.get(key):
                raise ConversionError(f"config.json has {key}, which can't be converted")
        if (channels := self.values.get("num_channels", 3)) != 3:
            raise ConversionError(f"num_channels is {channels}; only RGB is served")
        width, heads = self.count("hidden_size"), self.count("num_attention_heads")
        if width % heads:
            raise ConversionError(f"hidden_size {width} is no multiple of num_attention_heads {heads}")
        if (head_dim := self.values.get("head_dim")) not in {None, width // heads}:
            raise ConversionError(f"head_dim is {head_dim}, but timm's heads have {width // heads}")


@dataclass(frozen=True)
class Request:
    """What is to be converted.

    Attributes:
        model_class: transformers' class, or "" if config.json does not name it.
        config: Of the model, or of its image tower.
        top: Of the whole, where an image tower is part of it; else the same.
        tensors: All of the checkpoint's.
        processor: How images are prepared; None: the files don't say.
        input_size: (height, width) that was asked for; None: the processor's, or the model's own.
        classifies: Whether the checkpoint has a classifier, which decides what the latent is.
        keeps_classifier: Whether it is wanted.
    """

    model_class: str
    config: Config
    top: Config
    tensors: Tensors
    processor: DataConfig | None
    input_size: Size | None
    classifies: bool
    keeps_classifier: bool

    @property
    def size(self) -> Size:
        """(height, width) of the input."""
        if self.input_size is not None:
            return self.input_size
        if self.processor is not None:
            return self.processor.input_size
        grid, patch = self.own_grid, self.config.pair("patch_size")
        return grid[0] * patch[0], grid[1] * patch[1]

    @property
    def data_config(self) -> DataConfig | None:
        """The processor's, at the input size."""
        if self.processor is None:
            return None
        if self.input_size in {None, self.processor.input_size}:
            return self.processor
        config = self.processor
        return DataConfig(self.size, config.mean, config.std, config.interpolation, config.crop_pct, config.crop_mode)

    @property
    def grid(self) -> tuple[int, int]:
        """The patch grid of the input.

        Raises:
            ConversionError: The input size is no multiple of the patch size.
        """
        size, patch = self.size, self.config.pair("patch_size")
        if size[0] % patch[0] or size[1] % patch[1]:
            raise ConversionError(
                f"input_size: {size[0]} x {size[1]} pixels is no multiple of the patch size {patch[0]} x {patch[1]}"
            )
        return size[0] // patch[0], size[1] // patch[1]

    @property
    def own_grid(self) -> tuple[int, int]:
        """The patch grid that the positions are for."""
        size, patch = self.config.pair("image_size"), self.config.pair("patch_size")
        return size[0] // patch[0], size[1] // patch[1]

    @property
    def resampled(self) -> str:
        """What happened to the positions, in words; "" if nothing."""
        patch, grid, own = self.config.pair("patch_size"), self.grid, self.own_grid
        return resampled((own[0] * patch[0], own[1] * patch[1]), (grid[0] * patch[0], grid[1] * patch[1]))

    def check_size(self) -> None:
        """Refuses a processor whose images transformers would not take either.

        Raises:
            ConversionError: The sizes differ, and nobody asked for another one.
        """
        if self.input_size is None and self.grid != self.own_grid:
            size, own = self.size, self.config.pair("image_size")
            raise ConversionError(
                f"the processor makes images of {size[0]} x {size[1]}, but image_size is {own[0]} x {own[1]}; "
                "transformers refuses that too: say input_size if positions are to be resampled"
            )

    def vit_kwargs(self, depth_pattern: str) -> dict[str, Any]:
        """Keyword arguments that all of timm's families share.

        Raises:
            ConversionError: The configuration is not what timm can have.
        """
        self.config.check_plain()
        depth = self.config.count("num_hidden_layers")
        if (found := self.tensors.count(depth_pattern)) != depth:
            raise ConversionError(f"num_hidden_layers is {depth}, but the checkpoint has {found}")
        return {
            "img_size": list(self.size),
            "patch_size": list(self.config.pair("patch_size")),
            "embed_dim": self.config.count("hidden_size"),
            "depth": depth,
            "num_heads": self.config.count("num_attention_heads"),
        }

    def classifier(self, name: str = "classifier") -> StateDict:
        """Weight and bias of the classifier; empty where the model has none, or none is wanted.

        Raises:
            ConversionError: The configuration promises one, or it is not linear.
        """
        if not self.keeps_classifier:
            self.tensors.leave_out(rf"{name}\.", "the classifier, for which another or none is asked")
            return {}
        if f"{name}.weight" in self.tensors:
            return with_bias(self.tensors.take_layer(name))
        self.tensors.refuse(rf"{name}\.", NOT_LINEAR)
        if "ForImageClassification" in self.model_class and self.top.values.get("id2label") != {}:
            raise ConversionError(f"{self.model_class} has a classifier, but {name}.weight is missing")
        return {}

    def output_names(self, count: int) -> tuple[str, ...]:
        """From id2label; empty if there is none.

        Raises:
            ConversionError: They are not as many as the outputs, or not numbered from 0.
        """
        labels = self.top.values.get("id2label")
        if not labels or not count:
            return ()
        try:
            by_index = {int(index): str(name) for index, name in labels.items()}
        except (AttributeError, ValueError) as error:
            raise ConversionError("id2label is no mapping from numbers to names") from error
        if sorted(by_index) != list(range(count)):
            raise ConversionError(f"id2label names {len(by_index)} outputs, but the classifier has {count}")
        return tuple(by_index[index] for index in range(count))

    @property
    def task(self) -> str | None:
        """What the outputs mean, if config.json says it.

        Raises:
            ConversionError: It says something unknown.
        """
        problem = self.top.values.get("problem_type")
        if problem is None:
            return None
        if problem not in _TASKS:
            raise ConversionError(f"problem_type is {problem!r}; known are {', '.join(_TASKS)}")
        return _TASKS[problem]
