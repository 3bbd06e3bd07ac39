"""What the contestants work on: a model, a batch of pixels, one class an image."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from cdam_engine import Explainer, Output
from cdam_engine.preprocess import DataConfig, normalise
from cdam_server.demo import model as demo

DEMO = "demo"


@dataclass(frozen=True, eq=False)
class Subject:
    """A model with weights drawn at random (the demo's are trained) and a batch of noise for it.

    Attributes:
        name: timm's name of the model, or "demo".
        model: The model, in float32 and eval mode.
        pixels: What the engine gets, as the service hands it over: uint8, shape (B, H, W, 3), on the CPU.
        x: What the forward pass and the peers get: the same, normalised, on the device.
        classes: One class of each image.
        precision: The engine's.
    """

    name: str
    model: Any
    pixels: Tensor
    x: Tensor
    classes: list[int]
    precision: str

    @property
    def batch(self) -> int:
        """B."""
        return len(self.pixels)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.x.device

    @property
    def targets(self) -> list[list[Output]]:
        """The class of each image as its only target."""
        return [[Output(index)] for index in self.classes]

    def explainer(self, **options: Any) -> Explainer:
        """The engine on this model."""
        return Explainer(self.model, **{"precision": self.precision, **options})


def load(name: str, batch: int, device: torch.device, precision: str, **options: Any) -> Subject:
    """A subject; the same one in every process. Options are timm's."""
    torch.manual_seed(0)
    model: Any = (
        demo.load() if name == DEMO else timm.create_model(name, pretrained=False, num_classes=1000, **options).eval()
    ).to(device)
    pixels = torch.randint(0, 256, (batch, *model.patch_embed.img_size, 3), dtype=torch.uint8)
    x = normalise(pixels.to(device), DataConfig.from_timm(model))
    return Subject(name, model, pixels, x, [index % model.num_classes for index in range(batch)], precision)


def machine(device: torch.device) -> dict[str, object]:
    """What the figures were measured on and with."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "captum": _version("captum"),
        "grad-cam": _version("grad-cam"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
