"""From a batch of images to maps: trunk, tail, methods."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, cast
from uuid import uuid4

import torch
from PIL import Image
from torch import Tensor, nn

from cdam_engine.batch import Batch
from cdam_engine.cache import TokenCache
from cdam_engine.clock import Clock
from cdam_engine.errors import UnsupportedMethodError
from cdam_engine.explanation import Explanation
from cdam_engine.facts import ExplainerFacts, Refusal
from cdam_engine.families import Grid, TailOutput
from cdam_engine.methods import METHODS, Cdam
from cdam_engine.methods.base import Method
from cdam_engine.preprocess import DataConfig, prepare
from cdam_engine.proof import check_same_trunk, prove
from cdam_engine.tail import ClsTail
from cdam_engine.targets import Output, Target, TopK, check, count
from cdam_engine.trunk import Trunk, resolve_precision
from cdam_engine.trunks import Trunks
from cdam_engine.units import Unit, answer, run_units
from cdam_engine.vit import SplitViT
from cdam_images import upright_rgb

# Runs of the trunk. A gradient in closed form, among several of an image; docs/benchmarks.md, token cache: 0.0002 to 0.002
# for each of 50 steps or of 100 targets, up to 0.03 for one alone.
_CLOSED_FORM_COST: Final = 0.003
# Blocks. A gradient by autograd through the last block: its forward pass, and twice as much backwards.
_AUTOGRAD_BLOCKS: Final = 3


class Explainer:
    """Explanations of a timm ViT, of the function that `model(x)` is.

    That is proven when the explainer is made, and again when somebody has changed the whole model's hooks, its head or its
    last block since: on images of noise outputs and gradients equal the model's own, or the model is refused. Safe to
    call from several threads; leaves no hook, no grad mode and no gradient on the model.

    >>> explainer = Explainer(timm.create_model("vit_small_patch16_224", pretrained=True).eval())
    >>> explanation = explainer(Image.open("cat.jpg"), TopK(3), IntegratedCdam())
    >>> plt.imshow(explanation.maps[0].scores)

    Args:
        model: A timm ViT in eval mode; see `SplitViT` for which.
        precision: Of the trunk's matrix products: "fp32": as the model is; "bf16"; "auto": bf16 where the device has
            units for it. What is differentiated is never in bf16.
        compile: Whether to compile the trunk for the model's input size; the first batch of each size is slow then.
        compile_batch_sizes: Sizes that batches are filled up to when compiled.
        cache: Keeps trunk outputs for further questions about the same images; explainers may share it. Clear it after
            changing a model's weights.
        data_config: How the model wants its pixels; None: as timm says.
        proven: The model is a copy of one that was proven, in code and hooks, so it need not be.
        fingerprint: What tells the model's trunk from all others in a shared cache: of equal fingerprints entries are
            shared; None: with nobody.

    Attributes:
        vit: The model, split.
        precision: "fp32" or "bf16".

    Raises:
        UnsupportedArchitectureError: CDAM is not defined for the model, its code is not known here, or what its parts give
            is not `model(x)`.
        ValueError: The model is in training mode or was made in torch's inference mode, or there is no such precision.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        precision: str = "fp32",
        compile: bool = False,  # noqa: A002 - torch's name for it
        compile_batch_sizes: Sequence[int] = (1, 2, 4, 8, 16),
        cache: TokenCache | None = None,
        data_config: DataConfig | None = None,
        fingerprint: str | None = None,
        proven: bool = False,
    ) -> None:
        self.vit = SplitViT(model)
        if not proven:
            prove(self.vit)
        self._proven = self.vit.parts()
        weight = next(model.parameters())
        self.precision = resolve_precision(precision, weight.device)
        self._data_config = data_config
        if self.precision == "bf16" and weight.dtype not in {torch.float32, torch.float64}:
            raise ValueError(f"precision bf16 is for models in float32; this one is in {weight.dtype}")
        self._trunks = Trunks(
            self.vit,
            Trunk(self.vit, self.precision, compile=compile, batch_sizes=compile_batch_sizes),
            cache,
            f"{fingerprint or uuid4()}/{self.precision}/{weight.dtype}/{data_config}",
            lambda: self.data_config,
        )

    @property
    def cache(self) -> TokenCache | None:
        """The token cache, or None."""
        return self._trunks.cache

    @property
    def data_config(self) -> DataConfig:
        """How the model wants its pixels.

        Raises:
            ValueError: timm does not say.
        """
        if self._data_config is None:
            self._data_config = DataConfig.from_timm(self.vit.model)
        return self._data_config

    def check(self, method: Method) -> None:
        """Refuse a method that the model can't serve.

        Raises:
            UnsupportedMethodError: With the reason.
        """
        method.check(self.vit)

    @cached_property
    def facts(self) -> ExplainerFacts:
        """What the model takes and can serve."""
        vit = self.vit
        return ExplainerFacts(
            sizes=vit.sizes,
            prefix_tokens=vit.num_prefix_tokens,
            latent_size=vit.latent_size,
            heads=vit.num_heads,
            readout=vit.readout,
            precision=self.precision,
            gradient_cost=_CLOSED_FORM_COST if ClsTail.fits(vit) else _AUTOGRAD_BLOCKS / len(vit.blocks),
            refusals=dict(self._refusals()),
        )

    def _refusals(self) -> Iterator[tuple[tuple[str, str], Refusal]]:
        for method in itertools.chain.from_iterable(kind.variants() for kind in METHODS.values()):
            try:
                method.check(self.vit)
            except UnsupportedMethodError as error:
                yield (method.kind, method.variant), Refusal(error.reason, str(error))

    def cost(self, methods: Sequence[Method], targets: int, patches: int) -> float:
        """See `ExplainerFacts.cost`."""
        return self.facts.cost(methods, targets, patches)

    def uncached(self) -> Explainer:
        """The same explainer without a token cache: its maps don't depend on what was asked before."""
        other = copy.copy(self)
        other._trunks = replace(self._trunks, cache=None)  # noqa: SLF001
        return other

    def share_trunk(self, model: nn.Module) -> Explainer:
        """An explainer of a model that differs in its tail alone: another head on the same backbone, say.

        Precision, compiled trunk, preprocessing and token cache are this explainer's, and `explain_together` runs the
        trunk once for both.

        Args:
            model: A model whose weights are the same up to the last attention's tokens; best the very same tensors.

        Raises:
            UnsupportedArchitectureError: As for any model.
            ValueError: Its trunk makes other tokens of the same images.
        """
        other = copy.copy(self)
        other.vit = SplitViT(model)
        prove(other.vit)
        check_same_trunk(other.vit, self.vit)
        other._proven = other.vit.parts()  # noqa: SLF001
        vars(other).pop("facts", None)
        return other

    def like(self, model: nn.Module) -> Explainer:
        """An explainer of another model of the same architecture, in the same precision; not compiled, without a cache."""
        return Explainer(model, precision=self.precision, data_config=self._data_config, proven=True)

    def outputs(self, pixels: Tensor) -> TailOutput:
        """Latents (B, D) and logits (B, C) without gradients, the trunk in the explainer's precision.

        Args:
            pixels: Normalised input, shape (B, C, H, W), in the model's dtype and on its device.

        Raises:
            ValueError: The model does not take inputs of this size, or is in training mode.
        """
        self.vit.check_mode()  # which in bf16 is not the one that makes the tokens
        with _own_modes(self._device):
            trunk = self._trunks.run(pixels)
            if ClsTail.fits(self.vit, trunk):  # does without most of the last block
                tail = ClsTail(self.vit, trunk)
                return TailOutput(tail.latent, tail.logits)
            return self.vit.tail(trunk, trunk.tokens)

    def __call__(
        self,
        image: Image.Image,
        targets: int | Target | Sequence[int | Target] = TopK(1),  # noqa: B008 - frozen
        methods: Method | Sequence[Method] = Cdam(),  # noqa: B008 - frozen
    ) -> Explanation:
        """Explain one image, resized and cropped as the model was evaluated.

        Args:
            image: The image, of any mode; it is brought upright, opaque and to 8-bit RGB, see `upright_rgb`.
            targets: What to explain, one or several; an int is an output's index.
            methods: How, one or several.

        Raises:
            UnsupportedMethodError: The model can't serve a method.
            IndexError: A target names an output that the model does not have.
            ValueError: A concept's vector is not one of the model's latent space, or the image's values have no defined
                range (modes I and F).
            TypeError: The image, a target or a method is something else.
        """
        if not isinstance(image, Image.Image):
            raise TypeError(f"the image is a PIL image, not {type(image).__name__}; `explain` takes tensors")
        pixels = torch.from_numpy(prepare(upright_rgb(image), self.data_config).pixels)[None]
        its_targets = _as_targets(targets)
        its_methods = [methods] if isinstance(methods, Method | str) else list(methods)
        (explanation,) = self.explain(pixels, [its_targets], [its_methods])
        return explanation

    def explain(
        self,
        images: Tensor,
        targets: Sequence[Sequence[Target]],
        methods: Sequence[Sequence[Method]] | None = None,
    ) -> list[Explanation]:
        """Maps of a batch of images, each with its own targets and methods.

        Equal images share their trunk, and equal questions about them are answered once.

        Args:
            images: Normalised input, shape (B, C, H, W), in the model's dtype; or uint8 pixels, shape (B, H, W, C).
            targets: The targets of each image, B sequences of any lengths.
            methods: The methods of each image; None: CDAM for all.

        Returns:
            One explanation for each image; equal to what the image gets alone, up to rounding.

        Raises:
            UnsupportedMethodError: The model can't serve a method.
            ValueError: The model does not take inputs of this size, is in training mode, `targets` or `methods` is not
                of length B, or a concept's vector is not one of the model's latent space.
            IndexError: A target names an output that the model does not have.
        """
        return self._explain(Asked(self, images, targets, methods), self._trunks)

    def _explain(self, asked: Asked, trunks: Trunks, trunk_seconds: float = 0.0) -> list[Explanation]:
        images, targets, methods = asked.images, asked.targets, asked.each_methods
        self._prove_again_if_changed()
        self._check(images, targets, methods)
        if not len(images):
            return []
        clock = Clock(self._device)
        with _own_modes(self._device):
            keys = trunks.keys(images, several=bool(trunks.made))
            places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
            distinct = images if len(places) == len(keys) else images[[keys.index(key) for key in places]]
            batch = Batch(self.vit, self._grid(images), len(distinct), lambda: trunks.load(distinct))
            order = [places[key] for key in keys]
            hits = [False] * len(distinct)
            if self._reads_tokens(asked):
                hits = self._start(batch, trunks, distinct, list(places), clock)
                batch.resolve(order, targets)  # of all images at once, before the methods ask group by group
            units = [
                [Unit(places[key], method, tuple(wanted) if method.needs_target else ()) for method in its]
                for key, wanted, its in zip(keys, targets, methods, strict=True)
            ]
            with clock("tail"):
                groups = run_units(batch, [unit for its in units for unit in its], clock)
            answered = answer(batch, groups, order, targets)
        seconds = clock.seconds()
        kinds = {unit.method.kind for its in units for unit in its}
        return [
            Explanation(
                grid=batch.grid,
                latent=answered.latents[row],
                logits=answered.logits[row],
                targets=answered.targets[row],
                maps=tuple(
                    relevance
                    for index, unit in enumerate(its)
                    if unit in answered.found
                    for relevance in answered.found[unit].maps(index)
                ),
                trunk_seconds=seconds.get("trunk", 0.0) + trunk_seconds,
                tail_seconds=seconds.get("tail", 0.0),
                method_seconds={kind: seconds.get(kind, 0.0) for kind in kinds},
                token_cache_hit=hits[order[row]],
            )
            for row, its in enumerate(units)
        ]

    def _reads_tokens(self, asked: Asked) -> bool:
        """Whether anything starts from the trunk's output."""
        methods = asked.each_methods
        runs = (
            any(count(wanted) or not method.needs_target for method in its)
            for wanted, its in zip(asked.targets, methods, strict=True)
        )
        # In bf16 always: else an image's outputs would depend on what is asked about the others.
        reads = any(method.reads_tokens for its in methods for method in its)
        return reads or not all(runs) or self.precision == "bf16"

    @property
    def _device(self) -> torch.device:
        return next(self.vit.model.parameters()).device

    def _check(self, images: Tensor, targets: Sequence[Sequence[Target]], methods: Sequence[Sequence[Method]]) -> None:
        own, shape = self.vit.channels, tuple(images.shape)
        channels = 0 if images.ndim != 4 else shape[-1] if images.dtype == torch.uint8 else shape[1]
        if channels != own:
            its = f"{own} channel{'' if own == 1 else 's'}"
            raise ValueError(
                f"images of shape {shape}: the model takes {its}, so (B, {own}, H, W), or uint8 (B, H, W, {own})"
            )
        for name, given in (("targets", targets), ("methods", methods)):
            if len(given) != len(images):
                raise ValueError(f"{len(images)} images, but {name} for {len(given)}")
            if not all(isinstance(its, Sequence) and not isinstance(its, str) for its in given):
                raise TypeError(
                    f"{name} are a list for each image, such as [[{'TopK(1)' if name == 'targets' else 'Cdam()'}]]"
                )
        for wanted in targets:
            check(wanted, self.vit.num_outputs, self.vit.latent_size)
        for method in {method for its in methods for method in its}:
            if not isinstance(method, Method):
                raise TypeError(f"a method is one of cdam_engine's, such as Cdam(), not {method!r}")
            self.check(method)

    def _together(self, asked: Sequence[Asked]) -> list[list[Explanation]]:
        trunks, clock = self._trunks, Clock(self._device)
        wanted: dict[Hashable, Tensor] = {}
        for its in asked:
            its.explainer._check(its.images, its.targets, its.each_methods)  # noqa: SLF001 - of this class, too
            if its.explainer._reads_tokens(its):  # noqa: SLF001
                wanted |= zip(trunks.keys(its.images, several=True), its.images, strict=True)
        if trunks.cache is not None:
            wanted = {key: image for key, image in wanted.items() if key not in trunks.cache}
        made = {}
        if wanted:
            with _own_modes(self._device):
                trunk = trunks.fetch(torch.stack(list(wanted.values())), list(wanted), clock).trunk
            made = {key: trunk.part(place) for place, key in enumerate(wanted)}
        seconds = clock.seconds().get("trunk", 0.0)
        with_made = trunks.with_made(made)
        return [its.explainer._explain(its, with_made, seconds) for its in asked]  # noqa: SLF001

    def _prove_again_if_changed(self) -> None:
        """What was proven holds for the hooks, the head and the blocks that were there."""
        self.vit.check_mode()  # what is kept of an image runs no trunk, which would do so
        parts = self.vit.parts()
        if len(parts) != len(self._proven) or any(its is not was for its, was in zip(parts, self._proven, strict=True)):
            prove(self.vit)
            self._proven = parts

    def _grid(self, images: Tensor) -> Grid:
        height, width = images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:]
        return self.vit.grid((height, width))

    def _start(
        self, batch: Batch, trunks: Trunks, images: Tensor, keys: Sequence[Hashable], clock: Clock
    ) -> list[bool]:
        """Fetch the trunk's output, and start the tail from it; returns which images the cache knew."""
        trunk, hits, alone = trunks.fetch(images, keys, clock, lambda: batch.pixels)
        if alone is not None and isinstance(alone.tail, ClsTail) and alone.tail.vit is self.vit:
            batch.start_from(trunk, alone.tail)
            return hits
        with clock("tail"):
            tail = batch.start_from(trunk)
        if trunks.cache is not None and not all(hits):
            small = tail if len(keys) == 1 and isinstance(tail, ClsTail) else None  # the other kind is large
            for place, hit in enumerate(hits):
                if not hit:
                    trunks.cache.put(keys[place], trunk.part(place), small)
        return hits


@dataclass(frozen=True, eq=False)
class Asked:
    """What `explain_together` is asked by one explainer: the arguments of its `explain`.

    Attributes:
        explainer: Who explains.
        images: A batch, as for `Explainer.explain`: (B, C, H, W) normalised, or uint8 (B, H, W, C).
        targets: The targets of each.
        methods: The methods of each; None: CDAM for all.
    """

    explainer: Explainer
    images: Tensor
    targets: Sequence[Sequence[Target]]
    methods: Sequence[Sequence[Method]] | None = None

    def __post_init__(self) -> None:
        """Raises TypeError where the images are no tensor."""
        if not isinstance(self.images, Tensor):
            raise TypeError(
                f"images are a tensor, not {type(self.images).__name__}: of a PIL image make one by calling the explainer with it"
            )

    @property
    def each_methods(self) -> Sequence[Sequence[Method]]:
        """The methods of each image."""
        return [[Cdam()]] * len(self.images) if self.methods is None else self.methods


def explain_together(asked: Sequence[Asked]) -> list[list[Explanation]]:
    """What several explainers of one trunk make of their images; the trunk runs once, for all that it has to.

    Args:
        asked: At least one; the explainers come of each other's `share_trunk`, the images are of one size.

    Returns:
        For each what its explainer alone would answer.

    Raises:
        ValueError: The explainers do not share a trunk; and as for `Explainer.explain`.
    """
    lead = asked[0].explainer
    if any(its.explainer._trunks.run is not lead._trunks.run for its in asked):  # noqa: SLF001
        raise ValueError("these explainers do not share a trunk: make the others by `share_trunk` of the first")
    if len({(its.images.shape[1:], its.images.dtype) for its in asked}) > 1:
        raise ValueError("images that are explained together are of one size and type")
    return lead._together(asked)  # noqa: SLF001


def _as_targets(targets: object) -> list[Target]:
    """One target or several, or their indices; an array may be either."""
    if isinstance(targets, str):
        raise TypeError(
            f"a target is an index, Output, TopK, Concept or Contrast, not {targets!r}: names are the service's"
        )
    one = isinstance(targets, Target) or (hasattr(targets, "__index__") and getattr(targets, "ndim", 0) == 0)
    several: list[Any] = [targets] if one else list(cast("Sequence[Any]", targets))
    return [target if isinstance(target, Target) else Output(target) for target in several]


@contextmanager
def _own_modes(device: torch.device) -> Iterator[None]:
    """No mode of the caller's: inference mode would forbid the tail's gradients, autocast change the arithmetic."""
    with torch.inference_mode(mode=False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
