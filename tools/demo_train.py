"""Trains the demo model: `python tools/demo_train.py --out DIR`, an hour on two CPU cores.

Supervision is image-level labels only. A scene of several digits is meant to be labelled with *one* of them, drawn
evenly, as ImageNet labels one of several objects; we take the expectation of that loss, which is cross entropy against
the uniform distribution over the digits present: the same gradient on average, with less variance. Masks are never used.

Patch tokens are what costs time, so most steps see a part of a scene, with the position embeddings of its true place:
first a *window*, a square of neighbouring patches around a digit; then whole scenes of which only some patches are kept.
The digits' boxes choose those parts, and say which digits lie in a window. The last stage sees all of every scene, and
the result is a plain ViT.

Each batch is a pure function of (seed, step), so `--resume` goes on exactly where the last checkpoint stopped.
"""

import argparse
import json
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from timm.layers import build_sincos2d_pos_embed
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from cdam_server.demo import model as demo_model
from cdam_server.demo.scenes import MAX_DIGITS, SIZE, Split, draw_scene
from demo_model import figures

_PATCH: int = demo_model.ARCHITECTURE["patch_size"]
_SIDE = SIZE // _PATCH
_CHUNK = 500
_SEEN = 0.75  # a digit counts as present in a window that holds this much of its box


@dataclass(frozen=True)
class Stage:
    """A run of steps on windows of one size.

    Attributes:
        steps: optimiser steps.
        side: side of the window, in patches; 16 is the whole scene.
        batch: windows a step.
        digits: how many digits the scenes have that windows are cut from.
        warp: how far a smooth random warp moves pixels at most (standard deviation, in px). It makes new handwriting
            out of 1197 originals; the first stage learns faster without.
        keep: how many patches of a whole scene are kept, those on and near digits first; None keeps all.
    """

    steps: int
    side: int
    batch: int
    digits: tuple[int, ...]
    warp: float = 0.0
    keep: int | None = None


STAGES = (
    Stage(steps=3500, side=8, batch=64, digits=(1,)),
    Stage(steps=1000, side=12, batch=48, digits=(1, 2, 3), warp=1.6),
    Stage(steps=1800, side=_SIDE, batch=64, digits=(1, 2, 3), warp=1.6, keep=104),
    Stage(steps=600, side=_SIDE, batch=24, digits=(1, 2, 3), warp=1.6),
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides the stages."""

    seed: int = 0
    scenes: int = 60_000
    muon_lr: float = 4e-3
    adamw_lr: float = 2e-3
    weight_decay: float = 0.05
    warmup_steps: int = 100
    decay_from: float = 0.5
    ema: float = 0.998


@dataclass(frozen=True, eq=False)
class Pool:
    """Scenes drawn once and used several times, with cheap augmentation on top.

    Attributes:
        images: (n, 64, 64, 3) uint8.
        labels: (n, 3) int64, -1 where a scene has fewer digits.
        boxes: (n, 3, 4) int64 top, left, bottom, right in pixels.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    boxes: NDArray[np.int64]


def draw_pool(split: Split, count: int) -> Pool:
    """Draws scenes of one, two and three digits in turn, in all cores."""
    starts = range(0, count, _CHUNK)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as workers:
        jobs = workers.map(_draw_chunk, [split] * len(starts), starts, [min(s + _CHUNK, count) for s in starts])
        chunks = list(tqdm(jobs, total=len(starts), desc="drawing scenes", mininterval=5))
    return Pool(*(np.concatenate(part) for part in zip(*chunks, strict=True)))


def _draw_chunk(split: Split, start: int, stop: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    count = stop - start
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    labels = np.full((count, MAX_DIGITS), -1, np.int64)
    boxes = np.zeros((count, MAX_DIGITS, 4), np.int64)
    for row, seed in enumerate(range(start, stop)):
        scene = draw_scene(split, seed, 1 + seed % MAX_DIGITS)
        images[row] = scene.image
        for k, o in enumerate(scene.objects):
            labels[row, k], boxes[row, k] = o.label, o.box
    return images, labels, boxes


def draw_batch(pool: Pool, stage: Stage, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Windows that each hold at least one digit.

    Returns:
        (B, 3, S, S) float32 inputs, (B, n) int64 places in the patch grid, (B, 10) float32 label distributions.
    """
    counts = (pool.labels >= 0).sum(1)
    rows = rng.choice(np.flatnonzero(np.isin(counts, stage.digits)), stage.batch)
    anchor = pool.boxes[rows, rng.integers(counts[rows])]
    corner = _window(anchor, stage.side, rng)
    edge = np.arange(stage.side * _PATCH)
    y, x = corner[:, :1] * _PATCH + edge, corner[:, 1:] * _PATCH + edge
    images = pool.images[rows[:, None, None], y[:, :, None], x[:, None, :]]
    step = np.arange(stage.side)
    places = (corner[:, 0, None, None] + step[:, None]) * _SIDE + corner[:, 1, None, None] + step
    targets = _present(pool, rows, corner * _PATCH, stage.side * _PATCH)
    inputs = _augment(images, rng)
    if stage.warp:
        inputs = _warp(inputs, stage.warp, rng)
    places = places.reshape(stage.batch, -1)
    if stage.keep is not None:
        places = _near_digits(pool, rows, stage.keep, rng)
    return inputs, torch.from_numpy(places), torch.from_numpy(targets)


def _window(box: NDArray[np.int64], side: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(B, 2) top-left patches of windows that hold these boxes, drawn evenly among all that do."""
    first = np.clip(-(-box[:, 2:] // _PATCH) - side, 0, _SIDE - side)
    last = np.clip(box[:, :2] // _PATCH, first, _SIDE - side)
    return rng.integers(first, last + 1)


def _present(pool: Pool, rows: NDArray[np.int64], corner: NDArray[np.int64], size: int) -> NDArray[np.float32]:
    """(B, 10) the uniform distribution over the digits that lie in the windows."""
    box, corner = pool.boxes[rows], corner[:, None]
    shown = np.clip(np.minimum(box[..., 2:], corner + size) - np.maximum(box[..., :2], corner), 0, None).prod(-1)
    whole = (box[..., 2:] - box[..., :2]).prod(-1)
    i, k = np.nonzero((pool.labels[rows] >= 0) & (shown >= _SEEN * whole))
    present = np.zeros((len(rows), len(demo_model.LABELS)), np.float32)
    present[i, pool.labels[rows][i, k]] = 1
    even: NDArray[np.float32] = present / present.sum(1, keepdims=True)
    return even


def _near_digits(pool: Pool, rows: NDArray[np.int64], keep: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(B, keep) places of a scene's patches that touch a digit's box, filled up with others, the nearer the likelier."""
    start = np.arange(_SIDE) * _PATCH
    box = pool.boxes[rows][..., None]
    gap_y, gap_x = (np.maximum(box[:, :, k] - start - _PATCH, start - box[:, :, k + 2]).clip(-1) + 1 for k in (0, 1))
    gap = np.maximum(gap_y[..., :, None], gap_x[..., None, :]).astype(np.float32)
    gap[pool.labels[rows] < 0] = np.inf
    score = gap.min(1).reshape(len(rows), -1) * rng.random((len(rows), _SIDE * _SIDE))
    return np.sort(np.argpartition(score, keep, axis=1)[:, :keep], axis=1)


def _augment(images: NDArray[np.uint8], rng: np.random.Generator) -> Tensor:
    """Model inputs with colour channels permuted, contrast, brightness and noise jittered."""
    batch = len(images)
    channels = rng.permuted(np.tile(np.arange(3), (batch, 1)), axis=1)
    inputs = figures.to_input(np.take_along_axis(images, channels[:, None, None, :], 3))
    contrast = torch.from_numpy(rng.uniform(0.8, 1.15, (batch, 1, 1, 1)).astype(np.float32))
    brightness = torch.from_numpy(rng.uniform(-0.15, 0.15, (batch, 1, 1, 1)).astype(np.float32))
    noise = torch.from_numpy(rng.standard_normal(inputs.shape, np.float32) * rng.uniform(0, 0.04))
    return inputs * contrast + brightness + noise


def _warp(inputs: Tensor, most: float, rng: np.random.Generator) -> Tensor:
    """The windows seen through a smooth random displacement, of a strength that differs from window to window."""
    batch, _, size, _ = inputs.shape
    knots = size // 8 + 1  # one every 8 px: about three across a digit
    shift = rng.standard_normal((batch, 2, knots, knots), np.float32) * rng.uniform(0, most, (batch, 1, 1, 1))
    pixels = F.interpolate(torch.from_numpy(shift).float(), (size, size), mode="bicubic", align_corners=True)
    axis = torch.linspace(-1, 1, size)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1) + pixels.permute(0, 2, 3, 1) * 2 / (size - 1)
    return F.grid_sample(inputs, grid, mode="bilinear", padding_mode="reflection", align_corners=True)


def window_logits(model: VisionTransformer, inputs: Tensor, places: Tensor) -> Tensor:
    """(B, 10) logits of windows; for whole scenes the same as `model(inputs)`.

    Args:
        model: the demo ViT.
        inputs: (B, 3, S, S) pixels.
        places: (B, n) where each of the window's n patches lies in the model's own grid; of a whole scene it may name
            fewer than there are, and the others are dropped.
    """
    position, prefix = model.pos_embed, model.num_prefix_tokens
    patches = model.patch_embed.proj(inputs).flatten(2).transpose(1, 2)
    if places.shape[1] < patches.shape[1]:
        patches = patches.gather(1, places[..., None].expand(-1, -1, patches.shape[2]))
    tokens = patches + position[0, prefix:][places]
    cls = (model.cls_token + position[:, :prefix]).expand(len(inputs), -1, -1)
    logits: Tensor = model.forward_head(model.norm(model.blocks(torch.cat([cls, tokens], 1))))
    return logits


def fresh_model(seed: int) -> VisionTransformer:
    """The demo architecture; its position embeddings start as 2D sines and cosines and are learnt from there."""
    torch.manual_seed(seed)
    model = demo_model.build()
    model.init_weights("jax")  # wider than the default, which is so narrow that a small ViT starts slowly
    with torch.no_grad():
        model.pos_embed[0, 1:] = 0.3 * build_sincos2d_pos_embed([_SIDE, _SIDE], model.embed_dim)
    return model


class Training:
    """A model in training, its optimisers, its running average, and how far it has come."""

    def __init__(self, recipe: Recipe, stages: tuple[Stage, ...], pool: Pool) -> None:
        self.recipe, self.stages, self.pool = recipe, stages, pool
        self.total = sum(s.steps for s in stages)
        self.step, self.seconds = 0, 0.0
        self.model = fresh_model(recipe.seed)
        self.average = fresh_model(recipe.seed).eval()
        hidden = [p for p in self.model.blocks.parameters() if p.ndim == 2]
        taken = {id(p) for p in hidden}
        others = [p for p in self.model.parameters() if id(p) not in taken]
        self.optimisers: tuple[tuple[torch.optim.Optimizer, float], ...] = (
            (
                torch.optim.Muon(
                    hidden, recipe.muon_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
                ),
                recipe.muon_lr,
            ),
            (
                torch.optim.AdamW(others, recipe.adamw_lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay),
                recipe.adamw_lr,
            ),
        )

    def stage(self) -> Stage:
        """The stage that the next step belongs to."""
        ends = accumulate(s.steps for s in self.stages)
        return next(s for s, end in zip(self.stages, ends, strict=True) if self.step < end)

    def steps(self) -> Iterator[float]:
        """Takes the remaining steps; yields each one's loss."""
        self.model.train()
        while self.step < self.total:
            began = time.perf_counter()
            loss = self._one_step()
            self.step += 1
            self.seconds += time.perf_counter() - began
            yield loss

    def _one_step(self) -> float:
        rng = np.random.default_rng((self.recipe.seed, self.step))
        inputs, places, targets = draw_batch(self.pool, self.stage(), rng)
        loss = F.cross_entropy(window_logits(self.model, inputs, places), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser, peak in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = peak * self._rate()
            optimiser.step()
            optimiser.zero_grad()
        keep = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - keep)
        return loss.item()

    def _rate(self) -> float:
        """Share of the peak learning rate: a short warm-up, a plateau, then linearly to zero."""
        rising = (self.step + 1) / self.recipe.warmup_steps
        falling = (1 - self.step / self.total) / (1 - self.recipe.decay_from)
        return min(1.0, rising, falling)

    def state(self) -> dict[str, Any]:
        """What `restore` needs."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [o.state_dict() for o, _ in self.optimisers],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to a saved state."""
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for (optimiser, _), saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)


def write_result(training: Training, out: Path) -> None:
    """Writes `weights.safetensors` and, measured on held-out test sources, `figures.json`."""
    (out / "weights.safetensors").write_bytes(save(training.average.state_dict()))  # save_file would make it private
    report = {
        "held_out": asdict(figures.measure(training.average, "test")),
        "training": {
            "command": f"python tools/demo_train.py --out OUT --seed {training.recipe.seed}",
            "steps": training.step,
            "minutes": round(training.seconds / 60, 1),
            "cpu_threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "recipe": asdict(training.recipe),
            "stages": [asdict(s) for s in training.stages],
            "supervision": "image-level labels; boxes choose which patches the stages before the last see; no masks",
        },
    }
    (out / "figures.json").write_text(json.dumps(report, indent=2) + "\n")


def run(out: Path, recipe: Recipe, stages: tuple[Stage, ...], resume: bool, every: int) -> None:
    """Trains to the end, with a checkpoint and figures on validation sources every so many steps.

    Raises:
        ImportError: if scikit-learn is not installed (extra `demo`).
        FileNotFoundError: if there is no checkpoint to resume from.
    """
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    training = Training(recipe, stages, draw_pool("train", recipe.scenes))
    if resume:
        training.restore(torch.load(checkpoint, weights_only=True))
    with tqdm(total=training.total, initial=training.step, desc="training", mininterval=10) as bar:
        for loss in training.steps():
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if training.step % every == 0:
                torch.save(training.state(), checkpoint)
                seen = figures.measure(training.average, "val", singles=300, pairs=200, triples=100)
                bar.write(f"step {training.step} loss {loss:.3f} {asdict(seen)}")
    write_result(training, out)


def main() -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, figures and checkpoints")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every stage's steps; 0.01 is a smoke test")
    parser.add_argument("--scenes", type=int, default=Recipe.scenes, help="size of the pool of training scenes")
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder")
    args = parser.parse_args()
    stages = tuple(replace(s, steps=max(1, round(s.steps * args.scale))) for s in STAGES)
    run(args.out, Recipe(seed=args.seed, scenes=args.scenes), stages, args.resume, args.every)


if __name__ == "__main__":
    main()
