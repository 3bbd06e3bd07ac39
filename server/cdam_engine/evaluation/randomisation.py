"""The sanity check by random weights: models whose weights are drawn anew, part by part from the head down."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from threading import Lock
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from cdam_engine.evaluation.draws import generator
from cdam_engine.explainer import Explainer
from cdam_engine.transfer import fetch, send

# By model: the seed asked for last, and its models.
_kept: Final[WeakKeyDictionary[nn.Module, tuple[int, Sequence[nn.Module]]]] = WeakKeyDictionary()
_drawing: Final = Lock()


class RandomisedModels:
    """A model with ever more random weights.

    The weights that are drawn last are kept, as much memory as the model's own once more, for all evaluations of the
    model; every randomised model is a shell around them and the true ones, which are never written to.

    Args:
        explainer: Of the true model.
        seed: The evaluation's.
    """

    def __init__(self, explainer: Explainer, seed: int) -> None:
        self._true = explainer
        self._seed = seed

    @property
    def parts(self) -> int:
        """The head, every block, and all before the first block."""
        return len(self._true.vit.blocks) + 2

    def explainers(self) -> Iterator[Explainer]:
        """An explainer of each, that with a new head first."""
        return map(self._true.like, self._models())

    def _models(self) -> Sequence[nn.Module]:
        model = self._true.vit.model
        with _drawing:
            if model not in _kept or _kept[model][0] != self._seed:
                _kept.pop(model, None)  # so that there are never two
                _kept[model] = self._seed, self._drawn()
            return _kept[model][1]

    def _drawn(self) -> Sequence[nn.Module]:
        model, last = self._true.vit.model, len(self._true.vit.blocks)
        true = dict(model.named_parameters())
        # When each is drawn anew: 0 with the head, 1 with the last block, ..., last what comes before the first block.
        parts = {name: last - self._true.vit.place_of(name) for name in true}
        drawn = {name: self._draw(name, parameter) for name, parameter in true.items()}
        return [
            copy.deepcopy(
                model,
                # What deepcopy is told to have copied already it takes as it is.
                {id(its): drawn[name] if parts[name] <= part else its for name, its in true.items()},
            )
            for part in range(self.parts)
        ]

    def _draw(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        (true,) = fetch([parameter.double()])
        normal = generator(self._seed, "", "weights", name).standard_normal(true.shape)
        drawn = torch.as_tensor(np.asarray(true.mean() + true.std() * normal))
        return nn.Parameter(send(drawn, parameter.device, parameter.dtype), requires_grad=parameter.requires_grad)
