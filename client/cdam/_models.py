"""Models, as a server describes them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class ModelInput:
    """What a model is given: how pixels become its input, ``(pixels / 255 - mean) / std``.

    Attributes:
        mean: Of each channel, on a scale where white is 1: three for RGB, one for a model of grey images.
        std: Likewise.
        interpolation: Filter of the resize: ``bicubic``, ``bilinear``, ...
        crop_fraction: Input size over the size that the image is resized to before it is cropped.
        crop_mode: ``center``, ``squash`` or ``border``; also ``center_floor`` and ``squash_top_left``, see `docs/models.md`.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_fraction: float
    crop_mode: str


@dataclass(frozen=True)
class Model:
    """A model that the server has loaded.

    Attributes:
        name: Name to ask for it by.
        is_default: True for the model that requests without a name get.
        architecture: timm architecture, for example ``vit_small_patch16_224``.
        fingerprint: Digest of architecture and weights: the same fingerprint gives the same maps.
        task: ``multi_class``, ``multi_label``, ``binary`` or ``regression``.
        output_names: Names of the outputs, in order; empty if they have none.
        output_count: Number of outputs.
        input_size: Default input size, (height, width) in pixels.
        flexible_input_size: Whether other input sizes can be asked for.
        patch_size: (height, width) in pixels.
        patch_grid: Patches down and across at the default input size.
        prefix_tokens: Number of [CLS], distillation and register tokens.
        latent_size: Length of the latent, and so of concept vectors.
        readout: ``cls_token``, ``cls_and_distillation_tokens``, ``average_pool``, ``attention_pool``,
            ``max_pool`` or ``cls_token_and_average_pool``.
        precision: Arithmetic of the trunk: ``fp32`` or ``bf16``.
        methods: Names of the methods that it can serve.
        unsupported: Names of those that it can't, and why.
        input: How pixels become its input; None from a server that does not say.
        model_kwargs: What its architecture was built with beyond its name: keyword arguments of timm's.
        resampled: What of its weights was resampled to another geometry than they were trained for; "" if nothing.
    """

    name: str
    is_default: bool
    architecture: str
    fingerprint: str
    task: str
    output_names: tuple[str, ...]
    output_count: int
    input_size: tuple[int, int]
    flexible_input_size: bool
    patch_size: tuple[int, int]
    patch_grid: tuple[int, int]
    prefix_tokens: int
    latent_size: int
    readout: str
    precision: str
    methods: tuple[str, ...]
    unsupported: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    input: ModelInput | None = None
    resampled: str = ""
    model_kwargs: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}), hash=False)
