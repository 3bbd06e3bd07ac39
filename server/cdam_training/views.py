"""Images as the trunk takes them: as they are served, or as training varies them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms

from cdam_engine.preprocess import DataConfig, prepare
from cdam_images import upright_rgb


@dataclass(frozen=True)
class Augmentation:
    """How an image is varied: a random crop, resized to the input, maybe mirrored. The defaults are torchvision's.

    Attributes:
        scale: Least and largest share of the image's area in a crop.
        ratio: Least and largest width over height of a crop.
        flip: Probability that it is mirrored.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5


PLAIN = 0
"""The view that a model is served: no variation at all."""


@dataclass(frozen=True)
class View:
    """A variation of an image.

    Attributes:
        image: The file.
        number: `PLAIN`, or which of the variations.
        seed: What decides the variation, together with its number.
    """

    image: Path
    number: int
    seed: tuple[int, ...]


class _Views(Dataset[Tensor]):
    def __init__(self, views: Sequence[View], config: DataConfig, augmentation: Augmentation) -> None:
        self._views = views
        self._config = config
        self._vary = transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    config.input_size,
                    augmentation.scale,
                    augmentation.ratio,
                    InterpolationMode(config.interpolation),
                ),
                transforms.RandomHorizontalFlip(augmentation.flip),
            ]
        )

    def __len__(self) -> int:
        return len(self._views)

    def __getitem__(self, index: int) -> Tensor:
        view = self._views[index]
        with Image.open(view.image) as opened:
            image = upright_rgb(opened)
        if view.number == PLAIN:
            return torch.from_numpy(prepare(image, self._config).pixels)
        words = np.random.SeedSequence((*view.seed, view.number)).generate_state(2, np.uint32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(words[0]) << 32 | int(words[1]))
            varied = self._vary(image)
        grey = varied if self._config.channels == 3 else varied.convert("L")
        return torch.from_numpy(np.array(grey).reshape(*self._config.input_size, self._config.channels))


def load_batches(
    batches: Iterable[Sequence[View]], config: DataConfig, augmentation: Augmentation, *, workers: int = 0
) -> Iterator[Tensor]:
    """Batches of images, uint8, shape (B, H, W, channels), in order.

    Args:
        batches: What is in each.
        config: The model's.
        augmentation: How views other than `PLAIN` are varied.
        workers: Processes that read ahead; 0: none.
    """
    listed = list(batches)
    views = [view for batch in listed for view in batch]
    ends = np.cumsum([len(batch) for batch in listed]).tolist()
    rows = [list(range(end - len(batch), end)) for batch, end in zip(listed, ends, strict=True)]
    yield from DataLoader(_Views(views, config, augmentation), batch_sampler=rows, num_workers=workers)
