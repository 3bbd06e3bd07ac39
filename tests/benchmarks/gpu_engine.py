"""Parts of `gpu` that need no service: times, memory, and how true maps are in each precision."""

from __future__ import annotations

import copy
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from time import perf_counter
from typing import Any, Final

import torch
from gpu_rows import Rows
from measure import Contestant, scores, take_turns
from subject import Subject, load

from cdam_engine import (
    Cdam,
    IntegratedCdam,
    Method,
    Output,
    RelevancePropagation,
    SmoothCdam,
    TokenAblation,
    TokenCache,
)

MODELS: Final = {
    "S/16": "vit_small_patch16_224",
    "B/16": "vit_base_patch16_224",
    "S/14": "vit_small_patch14_dinov2.lvd142m",
}
BATCHES: Final = (64, 8, 1, 256)  # in this order, should time be short
_QUICK: Final = "vit_tiny_patch16_224"
_MANY: Final = 100
_MOST: Final = {"relevance propagation": 64, "ablation": 8}  # images in a batch: of more it would take minutes
_ROUNDS: Final = 3
_SECONDS: Final = 2.0  # of a contestant


def _load(name: str, batch: int, device: torch.device, precision: str) -> Subject:
    """At 224 x 224 throughout, though DINOv2's own inputs are larger; the one of --quick at less."""
    return load(name, batch, device, precision, img_size=64 if name == _QUICK else 224)


def _forward(subject: Subject, *, compiled: bool = False) -> Callable[[], Any]:
    """The plain model in the precision that is measured."""
    half = subject.precision == "bf16"
    model: Any = copy.deepcopy(subject.model).bfloat16() if half else subject.model
    x = subject.x.bfloat16() if half else subject.x
    if compiled:
        model = torch.compile(model, dynamic=False)

    def run() -> Any:
        with torch.inference_mode():
            return model(x)

    return run


def _contestants(subject: Subject, *, quick: bool) -> dict[str, Callable[[], Any]]:
    explainer, cached = subject.explainer(), subject.explainer(cache=TokenCache(8 << 30))
    many = [[Output(index) for index in range(min(_MANY, subject.model.num_classes))]] * subject.batch
    others = [[Output((index + 1) % subject.model.num_classes)] for index in subject.classes]

    def ours(method: Method, targets: Any = subject.targets, on: Any = explainer) -> Callable[[], Any]:
        return partial(on.explain, subject.pixels, targets, [[method]] * subject.batch)

    short: dict[str, Any] = {"steps": 4} if quick else {}
    draws: dict[str, Any] = {"samples": 4} if quick else {}
    return {
        "CDAM": ours(Cdam()),
        "outputs": partial(explainer.outputs, subject.x),
        "cached": ours(Cdam(), others, cached),
        f"{_MANY} targets": ours(Cdam(), many),
        "integrated": ours(IntegratedCdam(**short)),
        "smooth": ours(SmoothCdam(**draws)),
        "relevance propagation": ours(RelevancePropagation()),
        "ablation": ours(TokenAblation()),
    }


def _those_that_run(contestants: Mapping[str, Callable[[], Any]], batch: int) -> tuple[dict[str, Contestant], str]:
    """Without those that are too dear, or run out of memory, which is told."""
    ready, why = {}, []
    for name, run in contestants.items():
        if batch > _MOST.get(name, batch):
            continue
        try:
            run()
        except torch.OutOfMemoryError:
            why.append(f"{name}: out of memory")
            torch.cuda.empty_cache()
        else:
            ready[name] = Contestant(run, same_map=False)
    return ready, "; ".join(why)


def _peak(run: Callable[[], Any], device: torch.device) -> float | None:
    """MiB above what was there before; of a CPU see `memory`."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _configurations(rows: Rows) -> Iterator[tuple[str, str, str, int]]:
    """Model, its name, precision and batch; the most telling first."""
    if rows.arguments.quick:
        yield from (("Ti/16", _QUICK, precision, 2) for precision in ("fp32", "bf16"))
        return
    for batch, (model, name), precision in itertools.product(BATCHES, MODELS.items(), ("bf16", "fp32")):
        yield model, name, precision, batch


def _turns(rows: Rows, forward: Callable[[], Any], ready: Mapping[str, Contestant], device: torch.device) -> Any:
    quick = rows.arguments.quick
    return take_turns(forward, ready, device, rounds=1 if quick else _ROUNDS, seconds=_SECONDS, check=False)


def engine(rows: Rows, device: torch.device) -> None:
    """Everything eager."""
    longest = 0.0
    for model, name, precision, batch in _configurations(rows):
        started = perf_counter()
        if rows.left() < 1.2 * longest:
            rows.add(model=model, precision=precision, batch=batch, note="no time was left")
            continue
        subject = _load(name, batch, device, precision)
        forward = _forward(subject)
        ready, why = _those_that_run(_contestants(subject, quick=rows.arguments.quick), batch)
        measured = _turns(rows, forward, ready, device)
        seconds = measured.forward
        cdam = measured.ratios.get("CDAM")
        rows.add(
            model=model,
            precision=precision,
            batch=batch,
            **{"forward ms": 1000 * seconds, "maps/s": batch / seconds / cdam if cdam else None},
            **measured.ratios,
            **{
                f"peak MiB {label}": _peak(run, device)
                for label, run in (
                    ("forward", forward),
                    *((name, ready[name].run) for name in ("CDAM", "smooth") if name in ready),
                )
            },
            note=why,
        )
        longest = max(longest, perf_counter() - started)
        del subject, forward, ready
        if device.type == "cuda":
            torch.cuda.empty_cache()


def compiled(rows: Rows, device: torch.device) -> None:
    """The compiled trunk beside the compiled model."""
    if not any(map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++", "gcc", "cc"))):
        raise SystemExit("not available: there is no C++ compiler")
    longest = 0.0
    for model, name, precision, batch in _configurations(rows):
        started = perf_counter()
        if rows.left() < 1.2 * longest:
            rows.add(model=model, precision=precision, batch=batch, note="no time was left")
            continue
        torch.compiler.reset()
        subject = _load(name, batch, device, precision)
        forward, eager = _forward(subject, compiled=True), _forward(subject)
        forward()
        explainer = subject.explainer(compile=True, compile_batch_sizes=(batch,))
        methods = [[Cdam()]] * batch
        run = partial(explainer.explain, subject.pixels, subject.targets, methods)
        ready, why = _those_that_run(
            {"CDAM": run, "outputs": partial(explainer.outputs, subject.x), "eager forward": eager}, batch
        )
        compiling = perf_counter() - started
        measured = _turns(rows, forward, ready, device)
        rows.add(
            model=model,
            precision=precision,
            batch=batch,
            **{"compiled forward ms": 1000 * measured.forward, "compiling s": compiling},
            **measured.ratios,
            **{"maps/s": batch / measured.forward / measured.ratios["CDAM"] if "CDAM" in ready else None},
            note=why,
        )
        longest = max(longest, perf_counter() - started)


def truth(rows: Rows, device: torch.device) -> None:
    """Maps in each arithmetic beside those in float64."""
    quick = rows.arguments.quick
    models = {"Ti/16": _QUICK} if quick else MODELS
    short: tuple[Method, ...] = (Cdam(), IntegratedCdam(steps=8), SmoothCdam(samples=8), RelevancePropagation())
    for model, name in models.items():
        subject = _load(name, 2 if quick else 8, device, "fp32")
        found: dict[str, torch.Tensor] = {}
        for arithmetic in ("float64", "float32", "TF32", "bf16"):
            if arithmetic == "TF32" and device.type != "cuda":
                continue
            torch.set_float32_matmul_precision("high" if arithmetic == "TF32" else "highest")
            its = copy.deepcopy(subject.model).double() if arithmetic == "float64" else subject.model
            explainer = Subject(**{**vars(subject), "model": its}).explainer(
                precision="bf16" if arithmetic == "bf16" else "fp32"
            )
            for method in short:
                maps = scores(explainer.explain(subject.pixels, subject.targets, [[method]] * subject.batch)).double()
                found[f"{arithmetic} {method.kind}"] = maps
        torch.set_float32_matmul_precision("highest")
        for label, maps in found.items():
            arithmetic, kind = label.split()
            true = found[f"float64 {kind}"]
            if arithmetic != "float64":
                off = (maps - true).abs().amax(1) / true.abs().amax(1)
                lowest = min(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(maps, true, strict=True))
                rows.add(
                    model=model,
                    method=kind,
                    arithmetic=arithmetic,
                    **{"largest difference / largest score": float(off.max()), "lowest correlation": lowest},
                )


PARTS: Final = {part.__name__: part for part in (engine, compiled, truth)}


def main() -> None:
    """Measure a part."""
    rows = Rows(__doc__, part={"positional": True, "choices": PARTS})
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32
    PARTS[rows.arguments.part](rows, torch.device(rows.arguments.device))


if __name__ == "__main__":
    main()
