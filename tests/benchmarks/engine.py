"""What explanations cost, as ratios to the model's plain forward pass, beside bars and peers.

    python tests/benchmarks/engine.py [--quick] [--models vit_small_patch16_224 ...] [--batches 1 8] [--rows cdam ...]

Every figure is a time (or a peak of memory) divided by that of ``model(x)`` under inference mode on the same batch in
the same round; see `measure` and `memory` for how. The engine gets uint8 pixels, as the service hands them over, and
normalises them itself; the forward pass and the peers (`peers`) get them normalised. Weights are random, in float32.
Maps that must be equal are compared before anything is measured, to 1e-4 of the largest score (not if --precision asks
the engine for less). Prints a table and keeps results/engine.json in step; exits 0 whatever the figures are.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import memory
import peers
import torch
from measure import FORWARD, OURS, Bar, Contestant, Measured, Report, SkippedError, scores, take_turns
from subject import DEMO, Subject, load, machine
from torch import Tensor

from cdam_engine import (
    METHODS,
    Cdam,
    IntegratedCdam,
    Method,
    Noise,
    Output,
    RelevancePropagation,
    SmoothCdam,
    TokenAblation,
)
from cdam_engine.cache import TokenCache

STEPS: Final = 50
DRAWS: Final = 50
MANY: Final = 100  # targets
BATCHES: Final = {"vit_small_patch8_224": (1, 4)}  # its 785 tokens take as much as four images of the others
MODELS: Final = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_small_patch8_224", DEMO)

Contestants = dict[str, Contestant]


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: For --rows.
        what: For the table.
        bars: What must be reached.
        contestants: Makes the contestants, `OURS` among them; None: memory is measured.
        batches: Which of the model's batches it is measured on.
        on_demo: Whether it is measured on the demo model, too.
        note: More to say, from the ratios.
    """

    name: str
    what: str
    bars: tuple[Bar, ...] = ()
    contestants: Callable[[Subject], Contestants] | None = None
    batches: Literal["all", "one", "largest"] = "all"
    on_demo: bool = False
    note: Callable[[Subject, Mapping[str, float]], str] | None = None

    def suits(self, model: str, batch: int, batches: Sequence[int]) -> bool:
        """Whether it is measured on a batch of a model."""
        chosen = {"all": True, "one": batch == min(batches), "largest": batch == max(batches)}[self.batches]
        return chosen and (self.on_demo or model != DEMO)


def _ours(subject: Subject, method: Method, targets: Sequence[Sequence[Output]] | None = None, **options: Any) -> Any:
    explainer, methods = subject.explainer(**options), [[method]] * subject.batch
    return partial(explainer.explain, subject.pixels, subject.targets if targets is None else targets, methods)


def _many(subject: Subject) -> list[list[Output]]:
    return [[Output(index) for index in range(MANY)]] * subject.batch


def cdam(subject: Subject) -> Contestants:
    """One target an image; the peers' maps are the same."""
    given = (subject.model, subject.x, subject.classes)
    found = {OURS: Contestant(_ours(subject, Cdam()))}
    found["captum"] = Contestant(partial(peers.captum_cdam, *given))
    found["grad-cam HiResCAM"] = Contestant(partial(peers.hires_cam, *given))
    found["full backward"] = Contestant(partial(peers.full_backward, *given))
    if subject.batch > 1:
        found["full backward, one at a time"] = Contestant(partial(peers.one_at_a_time, peers.full_backward, *given))
    return found


def many_targets(subject: Subject) -> Contestants:
    """A hundred targets of each image; captum, one target after the other, for a single image only."""
    found = {OURS: Contestant(_ours(subject, Cdam(), _many(subject)))}
    if subject.batch == 1:
        run = partial(peers.captum_targets, subject.model, subject.x, [range(MANY)])
        found[f"captum x {MANY}"] = Contestant(run)
    return found


def integrated(subject: Subject) -> Contestants:
    """Fifty steps; captum's, for a single image only, go from other tokens and through the whole model."""
    given = (subject.model, subject.x, subject.classes, STEPS)
    found = {OURS: Contestant(_ours(subject, IntegratedCdam(steps=STEPS)))}
    found[f"{STEPS} tails by autograd"] = Contestant(partial(peers.autograd_integrated, *given))
    if subject.batch == 1:
        found["captum LayerIntegratedGradients"] = Contestant(partial(peers.captum_integrated, *given), same_map=False)
    return found


def smooth(subject: Subject) -> Contestants:
    """Fifty draws; the engine keeps those of the last seed, so a seed that it has not seen is a contestant, too."""
    method, seeds = SmoothCdam(samples=DRAWS, noise=Noise(0.05), seed=0), itertools.count(1)
    explainer = subject.explainer()
    shape = (subject.model.pos_embed.shape[1], subject.model.embed_dim)
    generator = torch.Generator().manual_seed(method.seed)
    noise = torch.stack([torch.randn(shape, generator=generator) for _ in range(DRAWS)]).to(subject.device)

    def new_seed() -> Any:
        other = SmoothCdam(samples=DRAWS, noise=method.noise, seed=next(seeds))
        return explainer.explain(subject.pixels, subject.targets, [[other]] * subject.batch)

    plain = partial(peers.autograd_smooth, subject.model, subject.x, subject.classes, noise, method.noise)
    return {
        OURS: Contestant(_ours(subject, method)),
        f"{OURS}, new seed": Contestant(new_seed, same_map=False),
        f"{DRAWS} tails by autograd": Contestant(plain),
    }


def cached(method: Method, subject: Subject, *, many: bool = False) -> Contestants:
    """Another question about images that were seen before, with the token cache and without."""
    explainer = subject.explainer(cache=TokenCache(1 << 30))
    explainer.explain(subject.pixels, [[Output(subject.model.num_classes - 1)]] * subject.batch)
    targets = _many(subject) if many else subject.targets
    return {
        OURS: Contestant(partial(explainer.explain, subject.pixels, targets, [[method]] * subject.batch)),
        f"{OURS} without cache": Contestant(_ours(subject, method, targets)),
    }


def relevance(subject: Subject) -> Contestants:
    """Relevance propagation."""
    model = peers.with_readable_attention(subject.model)
    plain = partial(peers.one_at_a_time, peers.chefer_relevance, model, subject.x, subject.classes)
    return {OURS: Contestant(_ours(subject, RelevancePropagation())), "Chefer's, one at a time": Contestant(plain)}


def ablation(subject: Subject) -> Contestants:
    """All patches, taken away one by one."""
    plain = partial(peers.one_at_a_time, peers.ablation_loop, subject.model, subject.x, subject.classes)
    return {OURS: Contestant(_ours(subject, TokenAblation())), "a loop": Contestant(plain)}


def bf16(subject: Subject) -> Contestants:
    """The trunk in bfloat16; beside it the whole model."""
    model, x = copy.deepcopy(subject.model).bfloat16(), subject.x.bfloat16()
    return {
        OURS: Contestant(_ours(subject, Cdam(), precision="bf16")),
        "bf16 forward": Contestant(partial(_forward, model, x), same_map=False),
    }


def correlation(subject: Subject, _: Mapping[str, float]) -> str:
    """Of maps with a trunk in bfloat16 with maps in float32."""
    half, full = (scores(_ours(subject, Cdam(), precision=precision)()) for precision in ("bf16", "fp32"))
    lowest = min(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(half, full, strict=True))
    return f"correlation with fp32's maps >= {lowest:.5f}"


def compiled(subject: Subject) -> Contestants:
    """The trunk compiled; beside it the compiled model."""
    if not any(map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))):
        raise SkippedError("no C++ compiler")
    model: Any = torch.compile(subject.model, dynamic=False)
    ours, forward = (
        _ours(subject, Cdam(), compile=True, compile_batch_sizes=(subject.batch,)),
        partial(_forward, model, subject.x),
    )
    ours(), forward()  # compiling is not measured
    return {OURS: Contestant(ours), "compiled forward": Contestant(forward, same_map=False)}


def others(subject: Subject) -> Contestants:
    """Every method that has no row of its own, with its defaults."""
    rest = [kind for kind in METHODS if kind not in {"cdam", "smooth_cdam", "integrated_cdam", "token_ablation"}]
    found = {kind: Contestant(_ours(subject, METHODS[kind]()), same_map=False) for kind in rest}
    return {OURS: Contestant(_ours(subject, Cdam())), **found}


def to_compiled(_: Subject, ratios: Mapping[str, float]) -> str:
    """Ours beside the compiled model."""
    return f"{OURS} / compiled forward {ratios[OURS] / ratios['compiled forward']:.3f}"


ROWS: Final = (
    Row("cdam", "CDAM, one target", (Bar(0.97),), cdam),
    Row("targets", f"CDAM, {MANY} targets of one image", (Bar(1.15),), many_targets),
    Row("integrated", f"Integrated CDAM, {STEPS} steps", (Bar(1.10),), integrated),
    Row("smooth", f"Smooth CDAM, {DRAWS} draws", (Bar(1.5),), smooth),
    Row("cache-cdam", "token cache: another target", (Bar(0.02),), partial(cached, Cdam())),
    Row(
        "cache-integrated",
        f"token cache: Integrated, {STEPS} steps",
        (Bar(0.10),),
        partial(cached, IntegratedCdam(steps=STEPS)),
    ),
    Row("cache-targets", f"token cache: {MANY} targets", (Bar(0.10),), partial(cached, Cdam(), many=True)),
    Row(
        "relevance",
        "relevance propagation",
        (Bar(3.2), Bar(2, "Chefer's, one at a time")),
        relevance,
        "largest",
    ),
    Row("ablation", "token ablation, all patches", (Bar(3, "a loop"),), ablation, "one", on_demo=True),
    Row("others", "CDAM, and the other methods", (), others, "one"),
    Row("memory", "CDAM, peak memory", (Bar(1.1),), None, "largest"),
    Row("bf16", "CDAM, trunk in bf16", (), bf16, note=correlation),
    Row("compile", "CDAM, trunk compiled", (), compiled, note=to_compiled),
)


def _forward(model: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(x)
        return logits


def measure(row: Row, subject: Subject, arguments: argparse.Namespace, report: Report) -> None:
    """One row on one batch of one model."""
    unit = "ms" if row.contestants else "MiB"
    try:
        if row.contestants is None:
            peaks = memory.peaks(subject)
            plain = peaks.pop(FORWARD)
            measured = Measured(plain, {way: peak / plain for way, peak in peaks.items()})
        else:
            measured = take_turns(
                partial(_forward, subject.model, subject.x),
                row.contestants(subject),
                subject.device,
                rounds=arguments.rounds,
                seconds=arguments.seconds,
                check=subject.precision == "fp32",
            )
    except SkippedError as error:
        report.skip(row.name, subject.name, subject.batch, row.what, str(error))
        return
    note = row.note(subject, measured.ratios) if row.note else ""
    report.add(row.name, subject.name, subject.batch, row.what, row.bars, measured, unit=unit, note=note)


def _arguments() -> argparse.Namespace:
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help=f'names in timm, or "{DEMO}"')
    parser.add_argument("--batches", nargs="+", type=int, help="default: 1 8, of patch 8 models 1 4")
    parser.add_argument("--rows", nargs="+", choices=names, default=[name for name in names if name != "compile"])
    parser.add_argument("--compile", action="store_true", help="the compiled trunk, too; compiling takes minutes")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=30, help="a contestant drops out of a row after so many")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16", "auto"], default="fp32", help="of the engine's trunk")
    parser.add_argument("--quick", action="store_true", help="the first model, a batch of 1, 3 rounds, 5 seconds")
    parser.add_argument("--out", type=Path, default=Path("results/engine.json"))
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.batches = arguments.models[:1], [1]
        arguments.rounds, arguments.seconds = min(3, arguments.rounds), min(5, arguments.seconds)
    if arguments.compile and "compile" not in arguments.rows:
        arguments.rows.append("compile")
    return arguments


def main() -> None:
    """Measure all that was asked for."""
    arguments = _arguments()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32
    report = Report({**machine(device), "precision": arguments.precision}, arguments.out)
    for name in arguments.models:
        batches = arguments.batches or BATCHES.get(name, (1, 8))
        for batch in batches:
            rows = [row for row in ROWS if row.name in arguments.rows and row.suits(name, batch, batches)]
            if rows:
                subject = load(name, batch, device, arguments.precision)
                for row in rows:
                    measure(row, subject, arguments, report)
    print(f"\nwrote {arguments.out}")


if __name__ == "__main__":
    main()
