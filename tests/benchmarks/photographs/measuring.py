"""From a model and photographs to journals."""

from __future__ import annotations

import base64
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import timm
import torch
from numpy.typing import ArrayLike, NDArray

from benchmarks.photographs.choice import Chosen, sample
from benchmarks.photographs.maps import UnnormalisedCdam, norms
from benchmarks.sheets import Journal, as_lists, encode
from cdam_engine import (
    Attention,
    AttentionRollout,
    Cdam,
    Explainer,
    InputXGradient,
    IntegratedCdam,
    IntegratedGradients,
    Method,
    Noise,
    PartialLrp,
    PatchMaskPrediction,
    RelevancePropagation,
    SmoothCdam,
    SmoothGrad,
)
from cdam_engine.evaluation import (
    Anchor,
    BoxSensitivity,
    ClassDiscrimination,
    Compactness,
    Evaluated,
    Evaluator,
    Fidelity,
    Localisation,
    MaskAgreement,
    Measured,
    Metric,
    Protocol,
    Sample,
    Sparseness,
)
from cdam_engine.evaluation.forwards import Forwards
from cdam_engine.evaluation.perturbation import CLEAN, MapOf, Perturbation, Ranked, map_of
from cdam_engine.evaluation.subject import Subject
from cdam_engine.fingerprint import fingerprint
from cdam_engine.preprocess import normalise
from cdam_server.compute.loading import load_model
from cdam_server.settings.specs import ModelSpec, Preprocessing, Task
from real.backbone import ARCHITECTURE, INPUT

FIDELITY: Final = Fidelity(points=6)
BOXES: Final = BoxSensitivity(boxes=25)
DISCRIMINATION: Final = ClassDiscrimination(FIDELITY, BOXES)
AGREEMENT: Final = MaskAgreement()
OF_MAPS: Final[tuple[Metric, ...]] = (
    Compactness(),
    Compactness(absolute=True),
    Sparseness(),
    AGREEMENT,
    Localisation(),
)
ANCHORS: Final = (Anchor.RANDOM, Anchor.MASK)
"""The inverted mask would be the mask's mirror image: MIF and LIF exchanged, r with the other sign."""
TIMES_NORMALISED: Final = "unnormalised_cdam, times normalised"

_BATCH: Final = 16


@dataclass(frozen=True)
class Sigmas:
    """The noise of the methods that draw, relative to the range of what it is added to.

    Attributes:
        smooth_cdam: Of Smooth CDAM.
        smooth_grad: Of SmoothGrad.
    """

    smooth_cdam: float
    smooth_grad: float


def methods(sigmas: Sigmas) -> tuple[Method, ...]:
    """What is compared."""
    return (
        Cdam(),
        SmoothCdam(samples=50, noise=Noise(sigmas.smooth_cdam)),
        IntegratedCdam(steps=50),
        Attention(),
        AttentionRollout(),
        RelevancePropagation(),
        PartialLrp(),
        InputXGradient(),
        SmoothGrad(samples=10, noise=Noise(sigmas.smooth_grad)),
        IntegratedGradients(steps=10),
        PatchMaskPrediction(activation="sigmoid"),
    )


def protocol(part: str, sigmas: Sigmas) -> Protocol:
    """Of `multi`, X_multi, both classes of each photograph; of `single`, X_single."""
    metrics: tuple[Metric, ...] = (FIDELITY, BOXES, *OF_MAPS)
    if part == "multi":
        evaluated: tuple[Evaluated, ...] = (*methods(sigmas), UnnormalisedCdam(), *ANCHORS)
        return Protocol(evaluated, (*metrics, DISCRIMINATION))
    return Protocol((*methods(sigmas), *ANCHORS), metrics)


def names(its: Protocol) -> list[str]:
    """Of all that a protocol compares."""
    return [evaluated.value if isinstance(evaluated, Anchor) else evaluated.kind for evaluated in its.methods]


def load(weights: Path, backbone: Path | None = None, device: str = "cpu") -> Explainer:
    """The model as the service loads it.

    Args:
        weights: Its whole state dict, or what `cdam train head` wrote.
        backbone: The checkpoint that it was trained on; None where `weights` is the whole.
        device: Where to compute; on a GPU without TF32.

    Raises:
        LoadError: The files are not those of the model.
    """
    torch.backends.cudnn.allow_tf32 = False  # products of matrices are without it unless asked for
    loaded = load_model(spec(weights, None) if backbone is None else spec(backbone, weights), device)
    return Explainer(loaded.module, data_config=loaded.data_config)


def spec(checkpoint: Path, head: Path | None) -> ModelSpec:
    """The settings of the model, by which a file of `cdam train` knows its backbone."""
    return ModelSpec(
        name="voc",
        architecture=ARCHITECTURE,
        input_size=INPUT,
        checkpoint=checkpoint,
        head=head,
        preprocessing=Preprocessing(crop_pct=1.0, crop_mode="squash"),
        task=Task.MULTI_LABEL,
    )


def device_of(explainer: Explainer) -> torch.device:
    """Where it computes."""
    return next(explainer.vit.model.parameters()).device


def digest(explainer: Explainer) -> str:
    """The model's fingerprint."""
    return fingerprint(explainer.vit.model, ARCHITECTURE, {"img_size": list(INPUT)})


def header(explainer: Explainer, its: Protocol | None, **others: object) -> dict[str, object]:
    """What the lines of a journal have in common: model, protocol if there is one, versions, the GPU if there is one."""
    device = device_of(explainer)
    return {
        "model": digest(explainer),
        **({} if its is None else {"protocol": repr(its), "methods": names(its)}),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        **({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
        **others,
    }


class Measuring:
    """Measures photographs one by one.

    Where two classes take their turn as the right one, both turns ask the model about the same images: those that the
    maps of the one class rank, those that the other's rank, and those with boxes. So the second turn takes no passes.

    Args:
        explainer: Of the model.
        its: The protocol.

    Attributes:
        explainer: As given.
        evaluator: Of both.
    """

    def __init__(self, explainer: Explainer, its: Protocol) -> None:
        self.evaluator = Evaluator(explainer, its, batch_size=_BATCH)
        self.explainer = explainer

    def measure(self, its: Sample) -> list[Measured]:
        """What is measured of a sample: by the right target and, if there is a wrong one, with the two exchanged.

        Raises:
            SampleError: It can't be measured.
        """
        with torch.inference_mode(mode=False), torch.no_grad():
            return [self._finished(turn) for turn in self.turns(its)]

    def turns(self, its: Sample) -> list[Subject]:
        """The sample, the model's answers known; once or with targets exchanged, too."""
        subject = self.prepared(its)
        heard = _listen(subject)
        forwards = Forwards(self.explainer, _BATCH)
        forwards.add(subject, self.evaluator._images(its.id))
        forwards.run(all_of_them=True)
        if its.wrong_target is None:
            return [subject]
        other = _exchanged(subject)
        for perturbations, latent, logits in heard:
            other.answer([_exchanged_image(image) for image in perturbations], latent, logits)
        forwards.add(other, [CLEAN])
        forwards.run(all_of_them=True)
        return [subject, other]

    def prepared(self, its: Sample) -> Subject:
        """The sample with its maps."""
        return self.evaluator._preparation.prepare(its)

    def _finished(self, subject: Subject) -> Measured:
        found = self.evaluator._measured(subject)
        if not isinstance(found, Measured):
            raise found
        return found

    def record(self, chosen: Chosen) -> dict[str, Any]:
        """A journal's line of a photograph: values, maps, answers to the boxes, norms of tokens, masks."""
        explainer = self.explainer
        its = sample(chosen, explainer.data_config)
        with torch.inference_mode(mode=False), torch.no_grad():
            turns = self.turns(its)
            values = [as_lists(self._finished(turn)) for turn in turns]
            x = normalise(torch.from_numpy(its.image)[None].to(device_of(explainer)), explainer.data_config)
            outputs = explainer.outputs(x).logits[0]
            length = norms(explainer, x)[0].cpu()
        (boxed,) = (metric for metric in self.evaluator.protocol.metrics if isinstance(metric, BoxSensitivity))
        boxes = boxed.images_of_sample(self.evaluator.protocol.seed, its.id, turns[0].geometry)
        return {
            "id": its.id,
            "classes": list(chosen.classes),
            "logits": outputs.tolist(),
            "values": values,
            "maps": {name: [encode(scores) for scores in found] for name, found in self._maps(turns, x).items()},
            "boxes": [encode(turn.values(boxes)) for turn in turns],
            "norms": encode(length),
            "masks": [encode_mask(turn.sample.mask) for turn in turns],
        }

    def _maps(self, turns: Sequence[Subject], x: torch.Tensor) -> Mapping[str, list[ArrayLike]]:
        """By name, of each turn's right target; and those that take no passes but a gradient through the tail."""
        its = self.evaluator.protocol
        found = {
            name: [turn.maps[map_of(evaluated, wrong=False)] for turn in turns]
            for name, evaluated in zip(names(its), its.methods, strict=True)
        }
        targets = [turn.sample.target for turn in turns]
        (other,) = self.explainer.explain(x, [targets], [[UnnormalisedCdam(times_normalised=True)]])
        return found | {TIMES_NORMALISED: [relevance.scores for relevance in other.maps]}


def encode_mask(mask: NDArray[np.bool_] | None) -> str:
    """A mask as text: bits, base64."""
    assert mask is not None
    return base64.b64encode(np.packbits(mask).tobytes()).decode()


def decode_mask(text: str, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask of a text, (height, width)."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=size[0] * size[1])
    return bits.astype(bool).reshape(size)


def measure(measuring: Measuring, chosen: Sequence[Chosen], journal: Journal) -> Iterator[str]:
    """Append what is found of each photograph that is not there yet; gives the ids of those done."""
    for one in chosen:
        if one.id not in journal.known:
            journal.add(measuring.record(one))
            yield one.id


_Heard = tuple[Sequence[Perturbation], torch.Tensor, torch.Tensor]


def _listen(subject: Subject) -> list[_Heard]:
    """Everything that the subject is told from now on."""
    heard: list[_Heard] = []
    answer = subject.answer

    def told(perturbations: Sequence[Perturbation], latent: torch.Tensor, logits: torch.Tensor) -> None:
        heard.append((perturbations, latent, logits))
        answer(perturbations, latent, logits)

    subject.answer = told  # type: ignore[method-assign]
    return heard


def _exchanged(subject: Subject) -> Subject:
    """The sample with right and wrong target exchanged, its maps known, nothing answered."""
    its = subject.sample
    assert its.wrong_target is not None
    turned = replace(its, target=its.wrong_target, wrong_target=its.target, mask=its.wrong_mask, wrong_mask=its.mask)
    other = Subject(turned, subject.geometry, subject.pixels, frozenset())
    other.maps = {_exchanged_map(its): scores for its, scores in subject.maps.items()}
    other._enlarged = {(_exchanged_map(its), how): large for (its, how), large in subject._enlarged.items()}
    return other


def _exchanged_map(its: MapOf) -> MapOf:
    return map_of(its.evaluated, wrong=not its.wrong)


def _exchanged_image(image: Perturbation) -> Perturbation:
    if not isinstance(image, Ranked):
        return image
    return replace(image, order=image.order._replace(map=_exchanged_map(image.order.map)))
