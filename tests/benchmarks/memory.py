"""The peak of memory: each contestant in a fresh process of its own, on its second call.

On the CPU, torch's profiler tells every allocation and release of tensor memory; the peak is the highest level above
where the call began: activations, gradients and temporaries, not the model's weights. Unlike the resident set, that is
the same in every run, and it does not depend on what the C library keeps for later; what oneDNN and MKL take for
themselves is not in it. On a GPU, the same of torch's own statistics. All start from uint8 pixels and normalise them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peers
import torch
from measure import FORWARD, OURS
from subject import Subject, load
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cdam_engine.preprocess import DataConfig, normalise


def peaks(subject: Subject) -> dict[str, int]:
    """Bytes that each contestant takes at most, the plain forward pass among them."""
    return {way: _in_fresh_process(subject, way) for way in _ways(subject)}


def _ways(subject: Subject) -> Mapping[str, Callable[[], Any]]:
    explainer = subject.explainer()
    model, classes = subject.model, subject.classes
    config = DataConfig.from_timm(model)

    def x() -> Tensor:
        return normalise(subject.pixels.to(subject.device), config)

    def forward() -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(x())
            return logits

    return {
        FORWARD: forward,
        OURS: lambda: explainer.explain(subject.pixels, subject.targets),
        "captum": lambda: peers.captum_cdam(model, x(), classes),
        "full backward": lambda: peers.full_backward(model, x(), classes),
    }


def _in_fresh_process(subject: Subject, way: str) -> int:
    command = [sys.executable, str(Path(__file__)), subject.name, str(subject.batch), way]
    command += [str(subject.device), subject.precision]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _peak(run: Callable[[], Any], device: torch.device) -> int:
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    assert profiled.profiler is not None
    changes = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = highest = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


def main() -> None:
    """Print the bytes that one contestant takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "batch", "way", "device", "precision"):
        parser.add_argument(name)
    arguments = parser.parse_args()
    subject = load(arguments.model, int(arguments.batch), torch.device(arguments.device), arguments.precision)
    print(_peak(_ways(subject)[arguments.way], subject.device))


if __name__ == "__main__":
    main()
