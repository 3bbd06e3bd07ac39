"""What a conversion leaves: a timm model's arguments and weights, and what the files say about its use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import timm
import torch
from timm.layers import LayerNorm
from torch import nn

from cdam_engine.preprocess import DataConfig
from cdam_server.compute.conversions.readouts import Readout
from cdam_server.compute.conversions.tensors import ConversionError, StateDict, few

# Arguments that leave the output alone, or show in the tensors' shapes.
_SHOWN: Final = {"dynamic_img_size", "num_classes"}


@dataclass(frozen=True)
class TextSide:
    """What compares the image embedding with that of a text: ``scale * cosine + bias``.

    Attributes:
        logit_scale: Its natural logarithm, as checkpoints keep it; None: not in the file.
        logit_bias: Of SigLIP; None elsewhere.
    """

    logit_scale: float | None = None
    logit_bias: float | None = None


@dataclass(frozen=True, eq=False)
class Converted:
    """A model of another library as timm has it.

    Attributes:
        source: Its library, and what it is there: ``transformers:ViTModel``, ``torchvision:vit_b_16``.
        architecture: The factory of timm's that makes its code; sizes are in `model_kwargs`.
        model_kwargs: Of `timm.create_model`, all representable in JSON.
        norm_eps: Of every LayerNorm; None: the architecture's own.
        weights: Exactly the timm model's names and shapes.
        readout: What stands in the place of timm's own, or None.
        data_config: How the model wants its images; None: the files don't say.
        output_names: In order; empty if the files don't say, or there are no outputs.
        task: multi_class, multi_label or regression; None: the files don't say.
        text: Of models that were trained with texts, or None.
        notes: What was left out or decided, one line each.
        resampled: What was resampled to another geometry, in words; "" if nothing.
    """

    source: str
    architecture: str
    model_kwargs: Mapping[str, Any]
    norm_eps: float | None
    weights: StateDict
    readout: Readout | None = None
    data_config: DataConfig | None = None
    output_names: tuple[str, ...] = ()
    task: str | None = None
    text: TextSide | None = None
    notes: tuple[str, ...] = ()
    resampled: str = ""

    def build(self, overlay: Mapping[str, Any] | None = None, *, dynamic_img_size: bool = True) -> nn.Module:
        """The model in float32, in training mode, with its weights.

        Args:
            overlay: What to change in the preprocessing, in timm's terms (`pretrained_cfg_overlay`).
            dynamic_img_size: Whether other input sizes may be asked for, where they are as exact as the model's own.

        Raises:
            ConversionError: The weights are not of the sizes that the configuration says.
        """
        norm = {} if self.norm_eps is None else {"norm_layer": partial(LayerNorm, eps=self.norm_eps)}
        kwargs = dict(self.model_kwargs)
        if "dynamic_img_size" in kwargs:
            kwargs["dynamic_img_size"] = dynamic_img_size
        with torch.random.fork_rng(devices=[]):
            model: nn.Module = timm.create_model(
                self.architecture,
                pretrained=False,
                **norm,
                pretrained_cfg_overlay={**self._overlay(), **(overlay or {})},
                **kwargs,
            )
        if self.readout is not None:
            self.readout.install(model)
        self._check(model)
        model.load_state_dict(self.weights)
        return model

    @property
    def settings(self) -> dict[str, object]:
        """What decides the model's output and does not show in its tensors; representable in JSON."""
        readout = None if self.readout is None else {type(self.readout).__name__: asdict(self.readout)}  # type: ignore[call-overload]
        kwargs = {name: value for name, value in self.model_kwargs.items() if name not in _SHOWN}
        return {
            "architecture": self.architecture,
            "model_kwargs": kwargs,
            "norm_eps": self.norm_eps,
            "readout": readout,
        }

    def _overlay(self) -> dict[str, Any]:
        """The preprocessing in timm's terms."""
        if self.data_config is None:
            return {}
        config = asdict(self.data_config)
        return {**config, "input_size": (3, *config["input_size"])}

    def _check(self, model: nn.Module) -> None:
        own = model.state_dict()
        problems = [
            f"{name} is {tuple(self.weights[name].shape)} in place of {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in self.weights and self.weights[name].shape != tensor.shape
        ]
        problems += [f"{name} is missing" for name in own if name not in self.weights]
        problems += [f"{name} is not the model's" for name in self.weights if name not in own]
        if problems:
            raise ConversionError(f"the weights are not of the sizes that the configuration says: {few(problems)}")
