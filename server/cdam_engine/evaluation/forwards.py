"""The forward passes of an evaluation: variations of several samples' images, composed and run in full batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from cdam_engine.evaluation.perturbation import Boxed, Perturbation, Ranked, Whole
from cdam_engine.evaluation.subject import Subject
from cdam_engine.explainer import Explainer
from cdam_engine.pauses import pause
from cdam_engine.transfer import fetch, send

_Asked = tuple[Subject, Perturbation]


class Forwards:
    """Asks the model about variations of images, in the order in which they come.

    Args:
        explainer: Of the model.
        batch_size: Images in a forward pass; after running out of memory half as many, down to one.
    """

    def __init__(self, explainer: Explainer, batch_size: int) -> None:
        self._explainer = explainer
        self._at_once = batch_size
        self._asked: deque[_Asked] = deque()
        self._buffer: Tensor | None = None

    def add(self, subject: Subject, images: Iterable[Perturbation]) -> None:
        """Ask about variations of a sample's image, unless the answer is known."""
        for image in images:
            if not subject.knows(image):
                self._asked.append((subject, image))
                subject.waiting += 1

    def run(self, *, all_of_them: bool = False) -> None:
        """Run the full batches that there are.

        Args:
            all_of_them: Run the rest, too.
        """
        while len(self._asked) >= self._at_once or (all_of_them and self._asked):
            batch = [self._asked.popleft() for _ in range(min(self._at_once, len(self._asked)))]
            said = self._ask(batch)
            if said is None:
                self._asked.extendleft(reversed(batch))
                self._at_once = (len(batch) + 1) // 2
            else:
                _hand_back(batch, *said)

    def _ask(self, batch: Sequence[_Asked]) -> tuple[Tensor, Tensor] | None:
        """Latents (n, D) and logits (n, C) in float64 on the CPU; None if memory is too short for several images."""
        pause(batch[0][0].pixels.device)
        try:
            latent, logits = self._explainer.outputs(self._composed(batch))
            both = torch.from_numpy(fetch([torch.cat((latent, logits), dim=1)])[0]).double()
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not _is_out_of_memory(error):
                raise
            self._buffer = None
            return None
        return both[:, : latent.shape[1]], both[:, latent.shape[1] :]

    def _composed(self, batch: Sequence[_Asked]) -> Tensor:
        """The images, shape (n, C, H, W); overwritten by the next ones."""
        pixels = batch[0][0].pixels
        if self._buffer is None or len(self._buffer) < len(batch):
            self._buffer = pixels.new_empty((self._at_once, *pixels.shape))
        start = 0
        for _, group in groupby(batch, key=lambda asked: (id(asked[0]), _alike(asked[1]))):
            some = list(group)
            stop = start + len(some)
            _compose(some[0][0], [image for _, image in some], self._buffer[start:stop])
            start = stop
        return self._buffer[:start]


def _alike(image: Perturbation) -> object:
    """Equal for variations that are composed at once."""
    match image:
        case Whole():
            return image
        case Ranked(order, first, rest, _):
            return order, first, rest
        case Boxed(blur_sigma):
            return blur_sigma


def _compose(subject: Subject, images: Sequence[Perturbation], out: Tensor) -> None:
    """Variations that are alike, into `out` (n, C, H, W)."""

    def column(numbers: Sequence[int]) -> Tensor:
        return send(numbers, out.device, torch.int32)[:, None, None, None]

    match images[0]:
        case Whole(picture):
            out.copy_(subject.picture(picture))
        case Ranked(order, first, rest):
            counts = column([image.count for image in images if isinstance(image, Ranked)])
            torch.where(subject.ranks(order) < counts, subject.picture(first), subject.picture(rest), out=out)
        case Boxed(blur_sigma):
            boxes = [image for image in images if isinstance(image, Boxed)]
            top, left, side = (
                column(numbers) for numbers in zip(*((box.top, box.left, box.side) for box in boxes), strict=True)
            )
            row = torch.arange(out.shape[-2], dtype=torch.int32, device=out.device)[:, None]
            across = torch.arange(out.shape[-1], dtype=torch.int32, device=out.device)
            inside = (row >= top) & (row < top + side) & (across >= left) & (across < left + side)
            torch.where(inside, subject.picture(blur_sigma), subject.picture("clean"), out=out)


def _hand_back(batch: Sequence[_Asked], latent: Tensor, logits: Tensor) -> None:
    start = 0
    for _, group in groupby(batch, key=lambda asked: id(asked[0])):
        some = list(group)
        subject, stop = some[0][0], start + len(some)
        subject.answer([image for _, image in some], latent[start:stop], logits[start:stop])
        subject.waiting -= len(some)
        start = stop


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
