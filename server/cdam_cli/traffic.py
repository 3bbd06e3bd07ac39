"""What `cdam bench` sends: pictures, and requests that cost next to nothing to make."""

import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

import cdam
from cdam.render import upright
from cdam.v1 import explain_pb2, explainer_service_pb2
from cdam_cli.spelling import Given, spelled

_ORDER: Final = 4096  # after so many requests, the order of a mixture begins anew


@dataclass(frozen=True)
class Kind:
    """A kind of request, and how often it comes.

    Attributes:
        targets: What to explain.
        methods: How.
        model: The model; empty: the server's default.
        priority: None: normal.
        weight: How often, relative to other kinds.
    """

    targets: tuple[Given, ...]
    methods: tuple[cdam.Method, ...]
    model: str = ""
    priority: cdam.Priority | None = None
    weight: float = 1.0

    @property
    def request(self) -> dict[str, Any]:
        """The arguments of `Client.explain`, but for the image."""
        return {name: getattr(self, name) for name in ("targets", "methods", "model", "priority")}

    def __str__(self) -> str:
        words = [word for target in self.targets for word in ("-t", spelled(target))]
        words += [word for method in self.methods for word in ("-m", spelled(method))]
        words += [
            word for name in ("model", "priority") if (given := getattr(self, name)) for word in (f"--{name}", given)
        ]
        return shlex.join(words)

    def to_json(self) -> dict[str, Any]:
        """What it is, in the command line's words."""
        targets, methods = map(spelled, self.targets), map(spelled, self.methods)
        return {**vars(self), "targets": list(targets), "methods": list(methods)}


class Requests:
    """The requests of a load, serialised; images take turns.

    Args:
        kinds: What they ask for.
        images: What they ask it about.
        fresh: Send no image twice: as raw pixels, shifted by one pixel more each time.
        seed: Of the order of the kinds.

    Attributes:
        path: The gRPC method.
        decode: Makes an answer of its bytes.
        images: Requests of nothing but an image, see `_picture`.

    Raises:
        OSError: if a file can't be read.
        ImageError: if it is no image.
    """

    path: Final = f"/{explainer_service_pb2.DESCRIPTOR.services_by_name['ExplainerService'].full_name}/Explain"
    decode = staticmethod(explain_pb2.ExplainResponse.FromString)

    def __init__(self, kinds: Sequence[Kind], images: Sequence[cdam.ImageLike], *, fresh: bool, seed: int) -> None:
        # Serialised fields of a message, joined, are the message: each question and each image is kept once.
        self._questions = [_question(kind, images[0]) for kind in kinds]
        self.images = [_picture(image, fresh=fresh) for image in images]
        weights = np.array([kind.weight for kind in kinds])
        self._order = np.random.default_rng(seed).choice(len(weights), _ORDER, p=weights / weights.sum())

    def kinds(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of the plan's kinds the requests of these numbers are."""
        return self._order[numbers % _ORDER]

    def __getitem__(self, number: int) -> bytes:
        """The request of this number."""
        turn, index = divmod(number, len(self.images))
        head, pixels = self.images[index]
        cut = 3 * turn % len(pixels) if pixels else 0
        return b"".join((head, pixels[cut:], pixels[:cut], self._questions[self._order[number % _ORDER]]))


def _encoded(kind: Kind, image: cdam.ImageLike) -> explain_pb2.ExplainRequest:
    return cdam.encode_explain(image, **kind.request)


def _question(kind: Kind, image: cdam.ImageLike) -> bytes:
    """A request without its image."""
    request = _encoded(kind, image)
    request.ClearField("image")
    return request.SerializeToString()


def _picture(image: cdam.ImageLike, *, fresh: bool) -> tuple[bytes, bytes]:
    """A request of nothing but the image, in two parts: the second is its pixels, RGB, if they are to be shifted."""
    if fresh:
        pixels = np.asarray(upright(image))
        # The server may know the image from an earlier run: the lowest bits make it this run's own.
        image = pixels ^ np.random.default_rng().integers(0, 2, pixels.shape, np.uint8)
    request = _encoded(Kind(targets=(cdam.TopK(1),), methods=()), image)
    request.ClearField("targets")
    serialised, pixels_at_end = request.SerializeToString(), request.image.raw.data
    if not fresh:
        return serialised, b""
    return serialised[: -len(pixels_at_end)], pixels_at_end


def pictures(count: int, size: tuple[int, int], seed: int) -> list[bytes]:
    """JPEG files of blurred colours with ellipses on them: about as hard to decode as photographs.

    Args:
        count: How many.
        size: (height, width) in pixels.
        seed: The same seed gives the same ones.
    """
    random = np.random.default_rng(seed)
    height, width = size
    files = []
    for _ in range(count):
        colours = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
        image = colours.resize((width, height), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(image)
        for _ in range(4):
            (left, right), (top, bottom) = np.sort(random.integers(0, [[width], [height]], (2, 2))).tolist()
            draw.ellipse((left, top, right, bottom), fill=tuple(random.integers(0, 256, 3).tolist()))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files
