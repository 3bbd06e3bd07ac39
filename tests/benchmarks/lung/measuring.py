"""From models and nodules to journals."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from benchmarks.lung.dataset import grey
from benchmarks.lung.regions import GRID, bright, disc, regions
from benchmarks.lung.training import TUNED, UNTUNED
from benchmarks.sheets import Journal, decode, encode
from cdam_engine import (
    Attention,
    Cdam,
    Explainer,
    InputXGradient,
    IntegratedCdam,
    Method,
    Output,
    RelevancePropagation,
    SmoothCdam,
)
from cdam_engine.evaluation.blur import blurred
from cdam_engine.evaluation.geometry import Geometry
from cdam_engine.families import Grid
from cdam_engine.fingerprint import fingerprint
from cdam_engine.preprocess import normalise, prepare
from cdam_images import upright_rgb
from cdam_server.compute.loading import LoadedModel, load_model
from cdam_server.settings.specs import ModelSpec
from real.backbone import ARCHITECTURE, INPUT
from real.lidc import BIOMARKERS, Nodules

OUTPUTS: Final = (*BIOMARKERS, "malignancy")
"""Of both heads: values of the biomarkers, and the logit of malignancy."""
MALIGNANCY: Final = OUTPUTS.index("malignancy")
METHODS: Final[tuple[Method, ...]] = (
    Cdam(),
    SmoothCdam(samples=50),
    IntegratedCdam(steps=50),
    RelevancePropagation(),
    InputXGradient(),
    Attention(),
)
BEFORE: Final = "cdam, untuned"
"""Name of CDAM of the linear heads on the untuned backbone."""
BLUR_SIGMA: Final = 14.0
"""Pixels of the input: a patch, and 2 pixels of the crop; the papers' value."""
GEOMETRY: Final = Geometry(INPUT, (INPUT[0] // GRID, INPUT[1] // GRID), Grid(GRID, GRID))

_BATCH: Final = 16


def load(backbone: Path, models: Path, seed: int, names: Sequence[str]) -> Explainer:
    """The heads of two files as one model's nine outputs, the backbone and tuned blocks as the service loads them.

    Args:
        backbone: The checkpoint.
        models: The folder that was trained into.
        seed: Which of them.
        names: The files of the biomarkers and of malignancy.

    Raises:
        LoadError: A file is not one of these.
        ValueError: The two are not of one backbone.
    """
    first, second = (_loaded(backbone, models / f"seed{seed}" / f"{name}.safetensors") for name in names)
    if first.output_names != BIOMARKERS or second.output_names != ("malignant",):
        raise ValueError(f"{models}: heads of {', '.join((*first.output_names, *second.output_names))}")
    module, its, other = first.module, first.module.state_dict(), second.module.state_dict()
    differing = [name for name in its if not name.startswith("head.") and not torch.equal(its[name], other[name])]
    if differing:
        raise ValueError(f"{models / f'seed{seed}'}: two backbones, they differ in {differing[0]}")
    head = nn.Linear(its["head.weight"].shape[1], len(OUTPUTS))
    with torch.no_grad():
        head.weight.copy_(torch.cat([its["head.weight"], other["head.weight"]]))
        head.bias.copy_(torch.cat([its["head.bias"], other["head.bias"]]))
    module.head, module.num_classes = head.eval(), len(OUTPUTS)
    return Explainer(module, data_config=first.data_config)


def _loaded(backbone: Path, head: Path) -> LoadedModel:
    return load_model(
        ModelSpec(name=head.stem, architecture=ARCHITECTURE, input_size=INPUT, checkpoint=backbone, head=head)
    )


def digest(explainer: Explainer) -> str:
    """The model's fingerprint."""
    return fingerprint(explainer.vit.model, ARCHITECTURE, {"img_size": list(INPUT)})


def header(explainer: Explainer, untuned: Explainer, models: Path, seed: int) -> dict[str, object]:
    """What the lines of a seed's journal have in common."""
    cards = {
        name: json.loads((models / f"seed{seed}" / f"{name}.json").read_text(encoding="utf-8"))
        for name in (*TUNED, *UNTUNED)
    }
    epochs = cards["biomarkers"]["curve"]
    return {
        "model": digest(explainer),
        "untuned": digest(untuned),
        "protocol": f"{METHODS!r}, blur_sigma {BLUR_SIGMA:g}",
        "seed": seed,
        "trained": cards["biomarkers"]["model"]["trained"],
        "recipe": cards["biomarkers"]["recipe"],
        "epochs": len(epochs),
        "sides": {side: part["rows"] for side, part in cards["biomarkers"]["data"]["sides"].items()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
    }


class Measuring:
    """Measures nodules one after another.

    Args:
        explainer: Of nine outputs.
        its: The nodules.
        untuned: Likewise, of the heads on the untuned backbone; None: `removed` is all that is wanted.
        device: Where to compute.
    """

    def __init__(
        self, explainer: Explainer, its: Nodules, untuned: Explainer | None = None, device: str = "cpu"
    ) -> None:
        self._explainer, self._untuned, self._nodules = explainer, untuned, its
        self._device = torch.device(device)
        for one in (explainer, untuned):
            if one is not None:
                one.vit.model.to(self._device)

    def measure(self, rows: Sequence[int], journal: Journal) -> Iterator[int]:
        """Append what is found of each nodule that is not there yet; gives the rows done."""
        wanted = [row for row in rows if str(row) not in journal.known]
        for start in range(0, len(wanted), _BATCH):
            some = wanted[start : start + _BATCH]
            for line in self._lines(some):
                journal.add(line)
            yield from some

    def _lines(self, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
        assert self._untuned is not None
        pixels = torch.stack([self._pixels(row) for row in rows]).to(self._device)
        images = normalise(pixels, self._explainer.data_config)
        outputs, untuned = (
            one.outputs(images).logits.double().cpu().numpy() for one in (self._explainer, self._untuned)
        )
        maps = self._maps(images)
        for place, row in enumerate(rows):
            its = {name: found[place] for name, found in maps.items()}
            yield {
                "id": str(row),
                **self._facts(row),
                "outputs": outputs[place].tolist(),
                "untuned": untuned[place].tolist(),
                "maps": {name: encode(scores) for name, scores in its.items()},
                "blurred": self._blurred(row, images[place], its),
            }

    def removed(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """Of a nodule of a journal, by its maps there: the logit of malignancy without what each calls evidence, and counter-evidence.

        What is removed inside the disc gets the mean of the surroundings, by blurring it would only be spread.
        """
        row = int(line["id"])
        its = regions(disc(self._nodules.radius[row]))
        image = normalise(self._pixels(row)[None].to(self._device), self._explainer.data_config)[0]
        around = GEOMETRY.spread(torch.from_numpy(its.outside)).to(image)
        fill = ((image * around).sum((1, 2)) / around.sum())[:, None, None].expand_as(image)
        maps = {name: decode(text).reshape(-1, GRID, GRID) for name, text in line["maps"].items() if name != BEFORE}
        scores = {name: found[MALIGNANCY] for name, found in maps.items()}
        scores |= {"random": _noise(row), "disc": its.inside}
        return {"id": line["id"], "logits": self._without(its.inside >= 0.5, image, fill, scores)}

    def _without(
        self, inside: NDArray[np.bool_], image: Tensor, fill: Tensor, scores: Mapping[str, NDArray[Any]]
    ) -> dict[str, list[float]]:
        """The logit of malignancy with the positive patches inside filled, and with the negative ones, by name."""
        signs = [inside & (its > 0 if positive else its < 0) for its in scores.values() for positive in (True, False)]
        varied = [
            torch.where(GEOMETRY.spread(torch.from_numpy(where)).to(image.device), fill, image) for where in signs
        ]
        logits = self._explainer.outputs(torch.stack(varied)).logits[:, MALIGNANCY].double().cpu().tolist()
        return {name: logits[2 * place : 2 * place + 2] for place, name in enumerate(scores)}

    def _pixels(self, row: int) -> Tensor:
        """As the service prepares the picture's file, (H, W, 3)."""
        picture = upright_rgb(Image.fromarray(grey(self._nodules.crops[row])))
        return torch.from_numpy(prepare(picture, self._explainer.data_config).pixels)

    def _facts(self, row: int) -> dict[str, Any]:
        its = self._nodules
        mask = bright(its.crops[row], its.radius[row])
        return {
            "scan": int(its.scan[row]),
            "radius": float(its.radius[row]),
            "truth": [*its.biomarkers[row].tolist(), int(its.malignant[row])],
            "mean_malignancy": float(its.mean_malignancy[row]),
            "bright": None if mask is None else np.packbits(mask).tobytes().hex(),
        }

    def _maps(self, images: Tensor) -> Mapping[str, NDArray[np.float32]]:
        """Of each method, (B, outputs, h, w); attention is asked about each output by itself."""
        count = len(images)
        targets = [Output(index) for index in range(len(OUTPUTS))]
        found = self._explainer.explain(images, [targets] * count, [METHODS[:-1]] * count)
        maps = {
            method.kind: np.stack([[m.scores for m in its.maps if m.method_index == index] for its in found])
            for index, method in enumerate(METHODS[:-1])
        }
        alone = [self._explainer.explain(images, [[target]] * count, [METHODS[-1:]] * count) for target in targets]
        maps[METHODS[-1].kind] = np.stack([[its.maps[0].scores for its in each] for each in alone], axis=1)
        assert self._untuned is not None
        (plain,) = METHODS[:1]
        before = self._untuned.explain(images, [targets] * count, [[plain]] * count)
        return {**maps, BEFORE: np.stack([[m.scores for m in its.maps] for its in before])}

    def _blurred(self, row: int, image: Tensor, maps: Mapping[str, NDArray[np.float32]]) -> dict[str, list[float]]:
        """The logit of malignancy without what a map calls evidence inside the disc, and without the counter-evidence."""
        inside = regions(disc(self._nodules.radius[row])).inside >= 0.5
        scores = {name: its[MALIGNANCY] for name, its in maps.items() if name != BEFORE} | {"random": _noise(row)}
        return self._without(inside, image, blurred(image, BLUR_SIGMA), scores)


def _noise(row: int) -> NDArray[np.float64]:
    return np.random.default_rng(row).standard_normal((GRID, GRID))
