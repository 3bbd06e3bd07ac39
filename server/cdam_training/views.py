"""Images as the trunk takes them: as they are served, or as training varies them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms

from cdam_engine.preprocess import DataConfig, prepare
from cdam_images import upright_rgb
from cdam_server.load_error import reason
from cdam_training.errors import UNREADABLE, DatasetError


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


class _Views(Dataset[Tensor | DatasetError]):
    def __init__(self, views: Sequence[View], config: DataConfig, augmentation: Augmentation) -> None:
        self._views = views
        self._config = config
        self._variation = _variation(config, augmentation)

    def __len__(self) -> int:
        return len(self._views)

    def __getitem__(self, index: int) -> Tensor | DatasetError:
        try:
            return self._pixels(self._views[index])
        except DatasetError as error:
            return error  # raised in another process, it would come with that one's traceback

    def _pixels(self, view: View) -> Tensor:
        image = read_image(view.image)
        if view.number == PLAIN:
            return torch.from_numpy(prepare(image, self._config).pixels)
        varied = _vary(image, view, self._variation)
        grey = varied if self._config.channels == 3 else varied.convert("L")
        return torch.from_numpy(np.array(grey).reshape(*self._config.input_size, self._config.channels))


def read_image(file: Path) -> Image.Image:
    """An image as it is served: upright, opaque, RGB.

    Raises:
        DatasetError: It can't be read.
    """
    try:
        with Image.open(file) as opened:
            return upright_rgb(opened)
    except UNREADABLE as error:
        raise DatasetError(f"{file}: can't be read as an image ({reason(error)}): mend it, or leave it out") from error


def _together(items: list[Tensor | DatasetError]) -> Tensor | DatasetError:
    """A batch; or what is wrong with the first image of it with which something is wrong."""
    wrong = next((item for item in items if isinstance(item, DatasetError)), None)
    return wrong or torch.stack([item for item in items if isinstance(item, Tensor)])


def _variation(config: DataConfig, augmentation: Augmentation) -> transforms.Compose:
    crop = transforms.RandomResizedCrop(
        config.input_size, augmentation.scale, augmentation.ratio, InterpolationMode(config.interpolation)
    )
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(augmentation.flip)])


def _vary(picture: Any, view: View, variation: transforms.Compose) -> Any:
    """The same crop and the same side for every picture of one size."""
    words = np.random.SeedSequence((*view.seed, view.number)).generate_state(2, np.uint32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(words[0]) << 32 | int(words[1]))
        return variation(picture)


def view_of_indices(
    numbers: NDArray[np.uint8], view: View, config: DataConfig, augmentation: Augmentation
) -> NDArray[np.uint8]:
    """An index image as a view shows the image that it belongs to: the nearest pixels, and 0 where the input is padded.

    Args:
        numbers: Of the image's own size, upright, shape (height, width).
        view: Of the image; its file is not read.
        config: The model's.
        augmentation: How views other than `PLAIN` are varied.

    Returns:
        Of the model's input size.
    """
    if view.number != PLAIN:
        varied: NDArray[np.uint8] = _vary(
            tv_tensors.Mask(torch.from_numpy(numbers.copy())), view, _variation(config, augmentation)
        ).numpy()
        return varied
    nearest = replace(config, interpolation="nearest", mean=(0.0,) * 3, std=(1.0,) * 3)
    return prepare(Image.fromarray(numbers).convert("RGB"), nearest).pixels[..., 0]


def load_batches(
    batches: Iterable[Sequence[View]], config: DataConfig, augmentation: Augmentation, *, workers: int = 0
) -> Iterator[Tensor]:
    """Batches of images, uint8, shape (B, H, W, channels), in order.

    Args:
        batches: What is in each.
        config: The model's.
        augmentation: How views other than `PLAIN` are varied.
        workers: Processes that read ahead; 0: none.

    Raises:
        DatasetError: An image can't be read.
    """
    listed = list(batches)
    views = [view for batch in listed for view in batch]
    ends = np.cumsum([len(batch) for batch in listed]).tolist()
    rows = [list(range(end - len(batch), end)) for batch, end in zip(listed, ends, strict=True)]
    loader = DataLoader(
        _Views(views, config, augmentation), batch_sampler=rows, num_workers=workers, collate_fn=_together
    )
    for batch in loader:
        if isinstance(batch, DatasetError):
            raise batch
        yield batch
