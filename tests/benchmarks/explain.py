"""What a CDAM costs, as a ratio to the model's plain forward pass, beside its peers.

    python tests/benchmarks/explain.py [--models vit_small_patch16_224 ...] [--batches 1 8] [--rounds 9]

All contestants take turns in every round, so that a noisy machine is noisy for all of them; the ratio is the median
over rounds of (contestant / forward). Prints a table and writes results/explain.json.

- forward: ``model(x)`` under inference mode.
- cdam-serve: `Explainer.explain`, one target an image.
- captum: `LayerGradientXActivation` at the last block's first norm, the same map.
- full backward: hook, forward and backward through the whole model, the whole batch at once.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import captum
import timm
import torch
from captum.attr import LayerGradientXActivation
from torch import Tensor, nn

from cdam_engine import Explainer, Output

CONTESTANTS = ("forward", "cdam-serve", "captum", "full backward")


def contestants(model: nn.Module, pixels: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The same maps, computed in every way; each returns scores of all tokens, shape (B, N), but for the forward."""
    explainer = Explainer(model)
    classes = list(range(len(pixels)))
    layer = model.blocks[-1].norm1
    peer = LayerGradientXActivation(model, layer)

    def forward() -> Tensor:
        with torch.inference_mode():
            return model(pixels)

    def ours() -> Tensor:
        explanations = explainer.explain(pixels, [[Output(index)] for index in classes])
        return torch.stack([torch.from_numpy(item.maps[0].scores).flatten() for item in explanations])

    def captums() -> Tensor:
        return peer.attribute(pixels, target=classes).sum(-1)[:, 1:].detach()

    def full_backward() -> Tensor:
        kept: list[Tensor] = []
        handle = layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
        try:
            logits = model(pixels)
        finally:
            handle.remove()
        (tokens,) = kept
        tokens.retain_grad()
        logits[torch.arange(len(pixels)), classes].sum().backward()
        scores = (tokens * tokens.grad).sum(-1)[:, 1:].detach()
        model.zero_grad(set_to_none=True)
        return scores

    return dict(zip(CONTESTANTS, (forward, ours, captums, full_backward), strict=True))


def measure(name: str, batch: int, rounds: int, device: torch.device) -> dict[str, object]:
    """Times of one model at one batch size, after a check that all maps agree."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval().to(device)
    pixels = torch.randn(batch, 3, *model.patch_embed.img_size, device=device)
    ways = contestants(model, pixels)
    maps = {way: ways[way]() for way in CONTESTANTS[1:]}
    scale = float(maps["captum"].abs().max())
    for scores in maps.values():
        torch.testing.assert_close(scores.cpu(), maps["captum"].cpu(), rtol=0, atol=1e-4 * scale)
    seconds: dict[str, list[float]] = {way: [] for way in CONTESTANTS}
    for _ in range(rounds):
        for way in CONTESTANTS:
            seconds[way].append(_time(ways[way], device))
    ratios = {
        way: statistics.median(a / b for a, b in zip(seconds[way], seconds["forward"], strict=True))
        for way in CONTESTANTS
    }
    return {
        "model": name,
        "batch": batch,
        "forward_ms": 1000 * statistics.median(seconds["forward"]),
        "ratio": {way: round(ratio, 3) for way, ratio in ratios.items()},
    }


def _time(function: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - started


def _machine(device: torch.device) -> dict[str, object]:
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "captum": captum.__version__,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224", "vit_base_patch16_224"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("results/explain.json"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    machine = _machine(device)
    print(", ".join(f"{key} {value}" for key, value in machine.items()), "\n")
    print("| model | batch | forward, ms | " + " | ".join(f"{way} / forward" for way in CONTESTANTS[1:]) + " |")
    print("|---|---|---|" + "---|" * len(CONTESTANTS[1:]))
    rows = []
    for name in arguments.models:
        for batch in arguments.batches:
            row = measure(name, batch, arguments.rounds, device)
            rows.append(row)
            cells = " | ".join(f"{row['ratio'][way]:.2f}" for way in CONTESTANTS[1:])
            print(f"| {name} | {batch} | {row['forward_ms']:.0f} | {cells} |")
            sys.stdout.flush()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    print(f"\nwrote {arguments.out}")


if __name__ == "__main__":
    main()
