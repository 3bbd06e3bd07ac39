"""From samples to numbers: maps, perturbed images, metrics."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch

from cdam_engine.evaluation.forwards import Forwards
from cdam_engine.evaluation.geometry import Geometry
from cdam_engine.evaluation.metrics.base import Found, Metric
from cdam_engine.evaluation.perturbation import MapOf, Perturbation
from cdam_engine.evaluation.preparation import Preparation
from cdam_engine.evaluation.protocol import Protocol
from cdam_engine.evaluation.sample import Measured, Sample, SampleError, Value
from cdam_engine.evaluation.subject import Subject
from cdam_engine.explainer import Explainer


class Evaluator:
    """Measures how true maps are.

    What is found of a sample depends on the sample, the protocol and the model alone: maps are made one sample at a
    time, without the token cache; perturbed images of several samples share batches, which may change their outputs in
    the last bits. Safe to call from several threads.

    Args:
        explainer: Of the model; its token cache is not used.
        protocol: What is measured.
        input_size: (height, width) of the samples in pixels; None: the model's own.
        batch_size: Images in a forward pass; after running out of memory half as many, down to one.

    Attributes:
        protocol: What is measured.
        input_size: (height, width) of the samples in pixels.

    Raises:
        UnsupportedMethodError: The model can't serve a method.
        ValueError: The model does not take inputs of this size, a box does not fit into it, or `batch_size` is not positive.
        TypeError: A method or a metric is something else.
    """

    def __init__(
        self,
        explainer: Explainer,
        protocol: Protocol,
        *,
        input_size: tuple[int, int] | None = None,
        batch_size: int = 32,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size}, but at least 1 is needed")
        vit = explainer.vit
        self.protocol = protocol
        self.input_size = input_size or vit.input_size
        self._geometry = Geometry(self.input_size, vit.patch_size, vit.grid(self.input_size))
        for metric in protocol.metrics:
            if not isinstance(metric, Metric):
                raise TypeError(f"a metric is one of cdam_engine's, such as Fidelity(), not {metric!r}")
            metric.resolved(self._geometry)  # refuses what does not fit
        self._explainer = explainer.uncached()
        self._batch_size = batch_size
        self._preparation = Preparation(self._explainer, protocol, self._geometry)
        self._images_of_maps = [
            image
            for metric in dict.fromkeys(protocol.metrics)
            for evaluated in dict.fromkeys(protocol.methods)
            for image in metric.images_of_map(MapOf(evaluated), self._geometry)
        ]

    @property
    def required(self) -> frozenset[str]:
        """The optional fields of a sample that must be there; the others are not looked at."""
        return self._preparation.required

    def passes(self) -> int:
        """About how many forward passes through the whole model a sample takes, its maps included."""
        return math.ceil(self._preparation.passes()) + len(self._images("")) - self._preparation.answers_clean

    def evaluate(self, samples: Sequence[Sample]) -> list[Measured | SampleError]:
        """What is measured of each sample, in order; of one that can't be measured, why.

        Args:
            samples: Any number. What is kept of each meanwhile is a few images, and only until it is measured.

        Raises:
            MemoryError: Not even one image fits into memory (torch.OutOfMemoryError on a GPU).
        """
        results: dict[int, Measured | SampleError] = {}
        forwards = Forwards(self._explainer, self._batch_size)
        begun: deque[tuple[int, Subject]] = deque()
        with torch.inference_mode(mode=False), torch.no_grad():
            for index, sample in enumerate(samples):
                try:
                    subject = self._preparation.prepare(sample)
                except SampleError as error:
                    results[index] = error
                    continue
                begun.append((index, subject))
                forwards.add(subject, self._images(sample.id))
                forwards.run()
                while begun and not begun[0][1].waiting:
                    done, subject = begun.popleft()
                    results[done] = self._measured(subject)
            forwards.run(all_of_them=True)
            results |= {index: self._measured(subject) for index, subject in begun}
        return [results[index] for index in range(len(samples))]

    def _images(self, sample: str) -> list[Perturbation]:
        """What the model is asked about for a sample, by its id; every image once."""
        images = [
            image
            for metric in dict.fromkeys(self.protocol.metrics)
            for image in metric.images_of_sample(self.protocol.seed, sample, self._geometry)
        ]
        return list(dict.fromkeys(self._images_of_maps + images))

    def _measured(self, subject: Subject) -> Measured | SampleError:
        try:
            values = tuple(
                Value(m, k, quantity, found.value, found.curve)
                for m, evaluated in enumerate(self.protocol.methods)
                for k, metric in enumerate(self.protocol.metrics)
                for quantity, found in _found(metric, MapOf(evaluated), self.protocol.seed, subject).items()
            )
        except SampleError as error:
            return error
        if not all(math.isfinite(value.value) for value in values):
            return SampleError("image", "a metric of it is not finite")
        return Measured(values)


def _found(metric: Metric, its: MapOf, seed: int, subject: Subject) -> dict[str, Found]:
    """What a metric measures, which is what it says that it does.

    Raises:
        TypeError: It is not.
    """
    found = metric.measure(its, seed, subject)
    if not (
        isinstance(found, dict)
        and tuple(found) == metric.quantities
        and all(isinstance(value, Found) for value in found.values())
    ):
        said = ", ".join(metric.quantities)
        raise TypeError(f"metric {metric.kind} must measure a Found of each of {said}, in this order, not {found!r}")
    return found
