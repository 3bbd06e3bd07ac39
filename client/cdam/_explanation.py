"""What the server answers to Explain."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cdam import _overlay
from cdam._images import ImageLike, encode_image, open_image
from cdam._methods import Method
from cdam._models import ModelInput
from cdam._overlay import Background, Interpolation, Region
from cdam._targets import Concept, Contrast, Output
from cdam.v1 import common_pb2 as pb


@dataclass(frozen=True)
class Geometry:
    """Where maps lie on the original image.

    Attributes:
        patch_grid: Shape of every map: patches down, patches across.
        region: Region of the original image that the whole patch grid covers.
        image_size: Size of the original image, (height, width) in pixels, its EXIF orientation applied.
        input_size: Size of the model's input, (height, width) in pixels.
    """

    patch_grid: tuple[int, int]
    region: Region
    image_size: tuple[int, int]
    input_size: tuple[int, int]


@dataclass(frozen=True)
class ExplainedTarget:
    """A target, and the model's answer to it.

    Attributes:
        target: The target; never top-k.
        label: For people: the output's name or index, the concept's name, "a - b" for a contrast.
        value: The logit, regression value, similarity, or difference of two of them.
        probability: For an output of a classifier: its probability.
        output_index: For an output: its index.
        request_index: Index of the target asked for that it came from.
    """

    target: Output | Concept | Contrast
    label: str
    value: float
    probability: float | None
    output_index: int | None
    request_index: int


@dataclass(frozen=True, eq=False)
class Parts:
    """A CDAM map as the sum of two, each float32 of shape `patch_grid`.

    Attributes:
        value: Relevance through the attention's values.
        key: Relevance through the attention's keys.
    """

    value: NDArray[np.float32]
    key: NDArray[np.float32]


@dataclass(frozen=True)
class Timing:
    """Where a request's time went on the server, in seconds.

    Attributes:
        decode: Decoding and resizing the image.
        queue: Waiting for a place in a batch.
        trunk: The batch's trunk: patch embedding and all blocks but the last.
        tail: The batch's tails: last attention to outputs, and gradients.
        total: From the first byte decoded to the answer encoded.
        batch_size: Number of images in the batch.
    """

    decode: float
    queue: float
    trunk: float
    tail: float
    total: float
    batch_size: int


@dataclass(frozen=True, eq=False)
class RelevanceMap:
    """Signed relevance of each patch for one target by one method.

    Attributes:
        scores: float32 of shape `patch_grid`, read-only; raw and signed: positive speaks for the target.
        target: What it explains; None for methods that need no target.
        method: How it was made.
        geometry: Where it lies on the original image.
        prefix_share: Share of |relevance| that lies on the prefix tokens, which the grid doesn't show, 0..1.
        parts: For `Cdam(parts=True)`: the two maps that this one is the sum of.
        standard_error: For smooth methods: the standard error of each score over the draws.
        completeness_residual: For integrated methods: how far the sum of scores is from the change of the target.
        steps: For integrated methods: points on the path that were used.
    """

    scores: NDArray[np.float32] = field(repr=False)
    target: ExplainedTarget | None
    method: Method
    geometry: Geometry
    prefix_share: float | None = None
    parts: Parts | None = field(default=None, repr=False)
    standard_error: NDArray[np.float32] | None = field(default=None, repr=False)
    completeness_residual: float | None = None
    steps: int | None = None
    _image: pb.Image | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        """The target's label; empty if the method needs no target."""
        return self.target.label if self.target else ""

    @property
    def limit(self) -> float:
        """The largest |score|."""
        return float(np.abs(self.scores).max())

    def overlay(
        self,
        image: ImageLike | None = None,
        *,
        scale: float | None = None,
        alpha: float = 0.9,
        interpolation: Interpolation = "bicubic",
        background: Background = "faded",
        zoom: int = 1,
        box: float | None = None,
    ) -> Image.Image:
        """The map over the original image: orange speaks for the target, blue against it, zero is transparent.

        What the model didn't see of the image is faded further.

        Args:
            image: The original image, or one of the same shape in another size; None: the image that was sent.
            scale: The |score| that gets full colour; None: the map's own maximum. Give several maps the same value
                (see `cdam.render.limit`) to compare them.
            alpha: Opacity of full colour, 0..1.
            interpolation: How the map is enlarged: "bicubic", "bilinear", or "nearest" for blocks.
            background: "faded": the image grey and light; "original": as it is.
            zoom: Enlarge the image, and with it the result, by this factor.
            box: Draw `box` at this fraction of the largest score, where there is one; None: draw none.

        Returns:
            An RGB image, `zoom` times the image's size.

        Raises:
            ValueError: if the image has another shape than the one that was explained.
        """
        canvas, region = self._canvas(image)
        picture = _overlay.overlay(
            self.scores,
            region,
            canvas,
            self.limit if scale is None else scale,
            alpha=alpha,
            interpolation=interpolation,
            background=background,
            zoom=zoom,
        )
        if box is not None:
            self._outline(picture, box)
        return picture

    def box(self, threshold: float = 0.2, *, interpolation: Interpolation = "bilinear") -> Region | None:
        """The tightest box around the largest connected part of the image that scores at least a fraction of the maximum.

        So class activation maps are made into objects' places (Zhou et al., CVPR 2016); how well it works with a method
        and a model, the metric `Localisation` measures. Parts are connected over edges and corners.

        Args:
            threshold: The fraction of the largest score, greater than 0 and at most 1.
            interpolation: How the map is enlarged: "bilinear", "bicubic", or "nearest" for blocks.

        Returns:
            Whole pixels of the original image, right and bottom exclusive; None if no score is positive.

        Raises:
            ValueError: if the threshold is out of range.
        """
        geometry = self.geometry
        return _overlay.largest_box(self.scores, geometry.region, geometry.image_size, threshold, interpolation)

    def heatmap(
        self,
        size: tuple[int, int] | None = None,
        *,
        scale: float | None = None,
        alpha: float = 1.0,
        interpolation: Interpolation = "bicubic",
    ) -> Image.Image:
        """The map alone as an RGBA image, to be laid over `geometry.region` by whoever draws.

        Args:
            size: (height, width) in pixels; None: the model's input size.
            scale: The |score| that gets full colour; None: the map's own maximum.
            alpha: Opacity of full colour, 0..1.
            interpolation: How the map is enlarged: "bicubic", "bilinear", or "nearest" for blocks.
        """
        limit = self.limit if scale is None else scale
        return _overlay.heatmap(self.scores, size or self.geometry.input_size, limit, alpha, interpolation)

    def _outline(self, picture: Image.Image, threshold: float) -> None:
        """Draw the box into a picture of the whole image, in any size."""
        box, (height, width) = self.box(threshold), self.geometry.image_size
        if box is not None:
            _overlay.outline(picture, box.scaled(picture.width / width, picture.height / height))

    def _canvas(self, image: ImageLike | None) -> tuple[Image.Image, Region]:
        """The image to draw on, RGB, and the region in its pixels."""
        height, width = self.geometry.image_size
        if image is None and self._image is None:
            return Image.new("RGB", (width, height), "white"), self.geometry.region
        canvas = open_image(encode_image(image) if image is not None else self._image or pb.Image())
        x, y = canvas.width / width, canvas.height / height
        if abs(canvas.width - width * y) > 1 and abs(canvas.height - height * x) > 1:
            raise ValueError(
                f"this map is of an image {width} px wide and {height} px high, the one to draw on is "
                f"{canvas.width} x {canvas.height}: not the same shape"
            )
        return canvas, self.geometry.region.scaled(x, y)


@dataclass(frozen=True)
class AppliedPreprocessing:
    """How an image was brought to the model's input.

    Attributes:
        resize: Which part of it the model saw: ``model`` or ``squash``.
        input_size: (height, width) in pixels.
        model_input: How pixels became the input.
    """

    resize: str
    input_size: tuple[int, int]
    model_input: ModelInput


@dataclass(frozen=True, eq=False)
class Explanation:
    """One image, explained. Iterating gives the maps; `explanation["7"]` is the map for the target of that label.

    Attributes:
        request_id: The request's id, or the one that the server made.
        model: Name of the model that was explained.
        fingerprint: Digest of its architecture and weights.
        geometry: Where the maps lie on the original image.
        targets: The targets in the order asked for, each top-k replaced by its outputs.
        maps: One for each method and target, method by method; methods that need no target give one.
        timing: Where the time went on the server.
        token_cache_hit: True if the server knew this image and ran only the model's tail.
        preprocessing: How the image was brought to the model's input; None from a server that does not say.
    """

    request_id: str
    model: str
    fingerprint: str
    geometry: Geometry
    targets: tuple[ExplainedTarget, ...]
    maps: tuple[RelevanceMap, ...]
    timing: Timing
    token_cache_hit: bool
    preprocessing: AppliedPreprocessing | None = None

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Shape of every map: patches down, patches across."""
        return self.geometry.patch_grid

    @property
    def region(self) -> Region:
        """Region of the original image that the patch grid covers."""
        return self.geometry.region

    @property
    def image_size(self) -> tuple[int, int]:
        """Size of the original image, (height, width)."""
        return self.geometry.image_size

    @property
    def input_size(self) -> tuple[int, int]:
        """Size of the model's input, (height, width)."""
        return self.geometry.input_size

    def __iter__(self) -> Iterator[RelevanceMap]:
        return iter(self.maps)

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, key: str | tuple[str, str]) -> RelevanceMap:
        """The map for a target's label; of several methods, ask for ``explanation[label, method]``.

        An output that was asked for twice, by its name and among the top three, say, has equal maps: the first is given.

        Raises:
            KeyError: if no map, or more than one, is meant.
        """
        label, kind = (key, None) if isinstance(key, str) else key
        found = [m for m in self.maps if m.label == label and kind in {None, m.method.kind}]
        if found and len({(m.method, m.target.target if m.target else None) for m in found}) == 1:
            return found[0]
        there = ", ".join(repr((m.label, m.method.kind)) for m in self.maps)
        raise KeyError(f"{key!r} means {len(found)} maps; there are {there}")
