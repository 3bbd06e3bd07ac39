"""The proof that what is explained is `model(x)`: made once for each model, on images of noise.

The split mirrors timm's code, and a model may have been changed in ways that the mirror does not show: hooks on the whole
model, a patched forward pass, layers whose operators have no gradient. So the model itself is asked, and what it says is
compared with what its parts say: outputs, latent, and the gradient at the tokens of the last attention; and that gradient
with differences of the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from cdam_engine.attention import Listener, hooks_on
from cdam_engine.errors import UnsupportedArchitectureError
from cdam_engine.families import Readout, TrunkOutput
from cdam_engine.tail import make_tail
from cdam_engine.targets import Concept, Output, Scalar
from cdam_engine.vit import OWN_CODE, SplitViT

# How far rounding may take outputs, and maps, from each other, relative to the largest of them.
_TOLERANCES: Final = {
    torch.float64: (1e-9, 1e-7),
    torch.float32: (2e-4, 2e-3),
    torch.float16: (3e-2, 1e-1),
    torch.bfloat16: (1e-1, 3e-1),
}
_TF32_EPSILON: Final = 2.0**-11
_TF32_TOLERANCES: Final = (1e-2, 5e-2)
# Steps of the difference quotient, relative to |T|, and how close one of them must come, relative to the steepest slope
# there is. Small steps drown in rounding, large ones bend; a gradient that misses a path is off at every one.
_STEPS: Final = (3e-2, 1e-2, 1e-1, 3e-3, 1e-3)
# For maxima, which have kinks, where rounding leaves room; what was quantised would look smooth at such steps.
_SMALL_STEPS: Final = (3e-4, 1e-4, 1e-5)
_CLOSE: Final = 0.01
_CLOSE_IN_HALF: Final = 0.25
_HALF: Final = {torch.float16, torch.bfloat16}
_DIRECTIONS: Final = 3
_MOST_OUTPUTS: Final = 1024  # that are looked at one by one
_ROUNDINGS: Final = 8  # of an output, in units of its last digit
_SEED: Final = 20240615
_LARGEST_GRID: Final = 16  # patches a side, where the model takes inputs of any size: more would only take longer


@dataclass(eq=False)
class _Heard:
    """What the whole model says of one image, heard by hooks.

    Attributes:
        tokens: T, shape (1, N, D) or (1, h, w, D): where gradients start.
        outputs: `model(x)`, shape (1, C), on a graph from `tokens`.
        latent: What the head was given; None if it was not called.
        made: What the forward pass gave to the hooks on the model, and its version then; None if it was no tensor.
        without_gradient: Modules after T that let no gradient through, by name.
    """

    tokens: Tensor | None = None
    outputs: Tensor | None = None
    latent: Tensor | None = None
    made: tuple[Tensor, int] | None = None
    without_gradient: list[str] = field(default_factory=list)

    def listen(self, vit: SplitViT, stack: ExitStack) -> None:
        """Hook into the model until the stack is closed."""
        stack.callback(vit.blocks[-1].norm1.register_forward_hook(Listener(self._at_tokens)).remove)
        stack.callback(vit.family.head.register_forward_pre_hook(Listener(self._at_head)).remove)
        stack.callback(vit.model.register_forward_hook(Listener(self._at_whole), prepend=True).remove)
        for name, module in vit.model.named_modules():
            if module is not vit.model:
                stack.callback(module.register_forward_hook(Listener(partial(self._at_part, name))).remove)

    def _at_tokens(self, _module: nn.Module, _given: Any, out: Tensor) -> Tensor:
        torch.set_grad_enabled(True)  # until the run is over
        self.tokens = out.view_as(out) if out.requires_grad else out.detach().requires_grad_()
        return self.tokens

    def _at_head(self, _module: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.latent = given[0].detach()

    def _at_whole(self, _module: nn.Module, _given: Any, out: Any) -> None:
        self.made = (out, out._version) if isinstance(out, Tensor) else None  # noqa: SLF001

    def _at_part(self, name: str, _module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        if self.tokens is None or not isinstance(out, Tensor):
            return
        asked = any(isinstance(its, Tensor) and its.requires_grad for its in given)
        if asked and out.is_floating_point() and not out.requires_grad:
            self.without_gradient.append(name)


def prove(vit: SplitViT) -> None:
    """Compare a model with its split.

    Args:
        vit: The split model. Neither it nor torch's modes are changed.

    Raises:
        UnsupportedArchitectureError: What is explained would not be `model(x)`; with what differs.
    """
    pixels = _noise(vit, 2)
    with torch.inference_mode(mode=False), torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
        vit.refresh()  # the head may have no row of outputs for an image
        heard = _listen(vit, pixels[:1])
        trunk = vit.trunk(pixels)
        _check_outputs(vit, heard, trunk, pixels)
        if pixels.dtype in _HALF:
            _check_same_steps(vit, pixels[:1])
        _check_gradients(vit, heard, trunk)


def _listen(vit: SplitViT, pixels: Tensor) -> _Heard:
    """Run the whole model on one image, with the tokens of its last attention as a leaf."""
    heard = _run(vit, pixels)
    if heard.outputs is not None and not heard.outputs.requires_grad:
        # Re-entrant checkpointing breaks a graph that does not come all the way from the input.
        heard = _run(vit, pixels, from_input=True)
    if heard.tokens is None:
        raise UnsupportedArchitectureError("OUTPUTS_DIFFER", "the model does not run the norm of its last attention")
    if heard.outputs is None or not heard.outputs.requires_grad:
        raise _no_gradient(heard)
    return heard


def check_same_trunk(vit: SplitViT, other: SplitViT) -> None:
    """Refuse two models whose last attentions are given other tokens.

    Raises:
        ValueError: The trunks differ on images of noise.
    """
    if (vit.channels, vit.input_size) != (other.channels, other.input_size):
        raise ValueError("these models do not share a trunk: their inputs are of other sizes")
    pixels = _noise(vit, 1)
    with torch.inference_mode(mode=False), torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
        ours, theirs = vit.trunk(pixels), other.trunk(pixels)
    tolerance = _tolerances(ours.tokens)[0]
    if not _close(ours.tokens, theirs.tokens, tolerance) or not _close(ours.residual, theirs.residual, tolerance):
        raise ValueError("these models do not share a trunk: it makes other tokens of the same image")
    if not _same_arguments(ours.attention_arguments, theirs.attention_arguments, tolerance):
        raise ValueError("these models do not share a trunk: their last attentions are given other positions")


def _same_arguments(ours: Mapping[str, Any], theirs: Mapping[str, Any], tolerance: float) -> bool:
    return ours.keys() == theirs.keys() and all(
        _close(value, theirs[name], tolerance)
        if isinstance(value, Tensor) and isinstance(theirs[name], Tensor)
        else value is theirs[name]
        for name, value in ours.items()
    )


def _noise(vit: SplitViT, count: int) -> Tensor:
    """Images of noise, normalised, at a size that the model takes."""
    weight = next(vit.model.parameters())
    size = vit.input_size
    if vit.flexible_input_size and max(vit.grid(size)) > _LARGEST_GRID:
        size = (_LARGEST_GRID * vit.patch_size[0], _LARGEST_GRID * vit.patch_size[1])
    draw = torch.Generator().manual_seed(_SEED)
    return torch.randn(count, vit.channels, *size, generator=draw).to(weight.device, weight.dtype)


def _run(vit: SplitViT, pixels: Tensor, *, from_input: bool = False) -> _Heard:
    heard = _Heard()
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(from_input))
        heard.listen(vit, stack)
        outputs = vit.model(pixels.clone().requires_grad_(from_input))
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != 1:
        what = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise UnsupportedArchitectureError(
            "OUTPUTS_DIFFER", f"the model answers one image with {what}, not with a row of outputs{_hooks_on(vit)}"
        )
    heard.outputs = outputs
    return heard


def _check_outputs(vit: SplitViT, heard: _Heard, trunk: TrunkOutput, pixels: Tensor) -> None:
    """`model(x)` of one image alone against what the parts say of it in a batch of two."""
    assert heard.outputs is not None
    tolerance = _tolerances(heard.outputs)[0]
    tail = make_tail(vit, trunk)
    alone = heard.outputs.detach()
    found = (tail.logits if vit.num_outputs else tail.latent)[:1]
    # Near the largest numbers it is the order of a sum that decides whether it is finite.
    if not all(bool(them.isfinite().all()) for them in (alone, found)):
        raise UnsupportedArchitectureError("NOT_FINITE", "the model's outputs for an image of noise are not finite")
    if not _close(found, alone, tolerance):
        raise UnsupportedArchitectureError("OUTPUTS_DIFFER", _why_outputs_differ(vit, found, alone, pixels, tolerance))
    reads_one = vit.readout is not Readout.CLS_AND_DISTILLATION_TOKENS  # whose latent is the mean of two
    if reads_one and heard.latent is not None and not _close(tail.latent[:1], heard.latent, tolerance):
        raise UnsupportedArchitectureError(
            "OUTPUTS_DIFFER", f"the model's head is given another latent than the pooling's{_hooks_on(vit)}"
        )
    if heard.made is not None and (heard.made[0] is not heard.outputs or heard.made[0]._version != heard.made[1]):  # noqa: SLF001
        raise UnsupportedArchitectureError(
            "OUTPUTS_DIFFER", f"a hook gives other outputs than the model made, if not for noise{_hooks_on(vit)}"
        )


def _check_same_steps(vit: SplitViT, pixels: Tensor) -> None:
    """In half precision other ways to the same number end far apart; the same way, step by step, ends in one place."""
    trunk = vit.trunk(pixels)
    alone, output = vit.model(pixels), vit.tail(trunk, trunk.tokens)
    found = output.logits if vit.num_outputs else output.latent
    if not _close(found, alone, 2 * torch.finfo(alone.dtype).eps):
        how = f"the model's own outputs differ from those of its parts by {_off(found, alone):.2g} of their maximum"
        raise UnsupportedArchitectureError("OUTPUTS_DIFFER", how + _hooks_on(vit))


def _why_outputs_differ(vit: SplitViT, found: Tensor, alone: Tensor, pixels: Tensor, tolerance: float) -> str:
    if found.shape != alone.shape:
        how = f"the model has {alone.shape[1]} outputs, its parts give {found.shape[1]}"
    else:
        how = f"the model's own outputs differ from those of its parts by {_off(found, alone):.2g} of their maximum"
    if hooks := _hooks_on(vit):
        return how + hooks
    if not _close(vit.model(pixels[:1]), alone, tolerance):
        return f"{how}: they are random, another for each call; switch off what draws in eval mode"
    if not _close(vit.model(pixels)[:1], alone, tolerance):
        return f"{how}: those of an image depend on the other images of its batch, so that it has no map of its own"
    return f"{how}: its code is not what it is taken for"


def _check_gradients(vit: SplitViT, heard: _Heard, trunk: TrunkOutput) -> None:
    """The full backward pass to T against the map, and against differences of the output."""
    assert heard.outputs is not None
    assert heard.tokens is not None
    targets = _targets(vit, heard.outputs[0].detach())
    tokens = trunk.tokens[:1]
    with torch.enable_grad():
        values = [target(heard.outputs[0], heard.outputs[0]) for target in targets]
        gradients = []
        for value in values:
            (gradient,) = torch.autograd.grad(value, heard.tokens, retain_graph=True, allow_unused=True)
            if gradient is None:
                raise _no_gradient(heard)
            gradients.append(gradient.detach().reshape(tokens.shape))
    truth = torch.stack([(tokens * gradient).sum(dim=-1)[0] for gradient in gradients])
    found = make_tail(vit, trunk).scores([targets] * 2).scores[0]
    scale = float(heard.outputs.detach().abs().max())
    if not _close(found, truth, _tolerances(truth)[1], scale):
        raise UnsupportedArchitectureError(
            "GRADIENTS_DIFFER",
            "the gradient of the model's parts is not that of a full backward pass: maps differ by "
            f"{_off(found, truth):.2g} of their maximum{_hooks_on(vit)}",
        )
    if heard.without_gradient:
        raise _no_gradient(heard)
    _check_slopes(vit, heard, trunk.part(0), targets[0], gradients[0])


def _check_slopes(vit: SplitViT, heard: _Heard, trunk: TrunkOutput, target: Scalar, gradient: Tensor) -> None:
    """The gradients of autograd against differences of the outputs of one image."""
    assert heard.outputs is not None
    assert heard.tokens is not None
    directions = [gradient]
    if gradient.dtype not in _HALF:  # too coarse for more than the steepest slope
        # Along its own gradient a function is steepest, and the easiest to measure; along those of others a missing path
        # shows.
        directions += _other_gradients(vit, trunk)
    if not all(_is_the_slope(vit, trunk, target, gradient, direction) for direction in directions):
        raise _no_gradient(heard)
    if (
        vit.num_outputs
        and heard.latent is not None
        and gradient.dtype not in _HALF
        and not _all_have_slopes(vit, heard)
    ):
        raise _no_gradient(heard)


def _all_have_slopes(vit: SplitViT, heard: _Heard) -> bool:
    """Whether the head has a gradient for every output that changes with the latent: one may be cut off, and another not."""
    assert heard.latent is not None
    latent = heard.latent[0]
    chosen = torch.arange(vit.num_outputs)[:: -(-vit.num_outputs // _MOST_OUTPUTS)].to(latent.device)
    rows = latent.expand(len(chosen), -1).clone().requires_grad_()
    with torch.enable_grad():
        own = vit.family.head(rows).gather(1, chosen[:, None]).sum()
        (gradients,) = torch.autograd.grad(own, rows)
    draw = torch.Generator().manual_seed(_SEED)
    direction = torch.randn(latent.shape, generator=draw).to(latent) * latent.std() * 0.1
    up, down = vit.family.head(torch.stack((latent + direction, latent - direction)))[:, chosen].double()
    changes = (up - down).abs() > 100 * torch.finfo(latent.dtype).eps * torch.maximum(up.abs(), down.abs())
    return not bool((changes & (gradients == 0).all(dim=1)).any())


def _other_gradients(vit: SplitViT, trunk: TrunkOutput) -> list[Tensor]:
    """Gradients at T of random directions in the latent, each of the shape of T: where something happens."""
    draw = torch.Generator().manual_seed(_SEED)
    with torch.enable_grad():
        tokens = trunk.tokens.detach().requires_grad_()
        latent = vit.tail(trunk, tokens).latent[0]
        vectors = torch.randn(_DIRECTIONS, len(latent), generator=draw).to(latent)
        return [torch.autograd.grad(vector @ latent, tokens, retain_graph=True)[0] for vector in vectors]


def _is_the_slope(vit: SplitViT, trunk: TrunkOutput, target: Scalar, gradient: Tensor, direction: Tensor) -> bool:
    """Whether the target changes along a direction as its gradient says, at one step size at least.

    Where rounding hides the change at every step (a head of zeros, say), nothing is there to be wrong.
    """
    steepest, length, size = (
        float(torch.linalg.vector_norm(values.double())) for values in (gradient, direction, trunk.tokens)
    )
    if min(steepest, length) < torch.finfo(gradient.dtype).tiny:
        return not _changes(vit, trunk, target)
    if not size:  # tokens of zero, from which any step is as good
        size = float(trunk.tokens.numel() ** 0.5)
    slope = float((gradient.double() * direction.double()).sum()) / (length * steepest)
    close = _CLOSE_IN_HALF if gradient.dtype in _HALF else _CLOSE
    variations = trunk.take([0] * 4)
    hidden = True
    for step in (*_STEPS, *(_SMALL_STEPS if vit.readout is Readout.MAX_POOL else ())):
        # Of a step and its half, in both directions: their errors of second order cancel.
        signs = gradient.new_tensor([1.0, -1.0, 0.5, -0.5])[:, None, None] * (step * size / length)
        output = vit.tail(variations, trunk.tokens + signs * direction)
        whole, back, half, half_back = target(output.latent.double(), output.logits.double()).tolist()
        unit = 2 * step * size * steepest
        quotient = (4 * (half - half_back) / (unit / 2) - (whole - back) / unit) / 3
        scale = max(abs(whole), float(output.logits.abs().max()) if vit.num_outputs else 0.0)
        rounding = _ROUNDINGS * _rounding_of_tail(vit, gradient) * scale / unit
        if step in _SMALL_STEPS and rounding > close:
            break
        if abs(quotient - slope) < close + rounding:
            return True
        hidden = hidden and rounding > 1
    return hidden


def _changes(vit: SplitViT, trunk: TrunkOutput, target: Scalar) -> bool:
    """Whether the target changes with T at all, which where the gradient is zero it should not."""
    draw = torch.Generator().manual_seed(_SEED)
    noise = torch.randn(trunk.tokens.shape, generator=draw).to(trunk.tokens)
    size = trunk.tokens.std() * 0.1
    output = vit.tail(trunk.take([0] * 2), trunk.tokens + torch.stack((noise[0], -noise[0])) * size)
    up, down = target(output.latent.double(), output.logits.double()).tolist()
    roundings = _ROUNDINGS if trunk.tokens.dtype in _HALF else 100
    return bool(abs(up - down) > roundings * _rounding_of_tail(vit, trunk.tokens) * max(abs(up), abs(down)))


def _targets(vit: SplitViT, outputs: Tensor) -> list[Scalar]:
    """The highest and the lowest output; without outputs a direction in the latent, which `outputs` is then."""
    if vit.num_outputs:
        return [Output(int(outputs.argmax())), Output(int(outputs.argmin()))]
    return [Concept(torch.randn(len(outputs), generator=torch.Generator().manual_seed(_SEED)))]


def _no_gradient(heard: _Heard) -> UnsupportedArchitectureError:
    names = list(dict.fromkeys(heard.without_gradient))
    where = f": none passes {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}" if names else ""
    return UnsupportedArchitectureError(
        "NO_GRADIENT",
        f"autograd's gradient of the model is not its slope{where} (quantised layers, or code that is cut off from "
        "autograd?): explain the model before it was quantised",
    )


def _hooks_on(vit: SplitViT) -> str:
    """What hooks there are on what the split bypasses, for a message."""
    found = []
    for name, module in vit.bypassed():
        hooks = (getattr(hook, "__name__", type(hook).__name__) for hook in hooks_on(module))
        found += [f"the hook {hook} on {name}" for hook in hooks]
        found += [f"the {method} that was put on {name}" for method in OWN_CODE if method in vars(module)]
    advice = "move what it does into the patch embedding or the head, or remove it"
    return f"; the parts don't run {', '.join(found)}: {advice}" if found else ""


def _tolerances(values: Tensor) -> tuple[float, float]:
    # Convolutions are in TF32 unless somebody switches it off, and by other kernels for one image than for two.
    if values.is_cuda and values.dtype == torch.float32 and (_is_matmul_tf32() or torch.backends.cudnn.allow_tf32):
        return _TF32_TOLERANCES
    return _TOLERANCES[values.dtype]


def _rounding_of_tail(vit: SplitViT, values: Tensor) -> float:
    """The relative rounding error of a product in the tail."""
    if values.is_cuda and values.dtype == torch.float32:
        convolves = any(isinstance(its, nn.Conv2d) for part in vit.family.after_attention for its in part.modules())
        if _is_matmul_tf32() or (convolves and torch.backends.cudnn.allow_tf32):
            return _TF32_EPSILON
    return torch.finfo(values.dtype).eps


def _is_matmul_tf32() -> bool:
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # somebody uses torch's newer settings, which this can't tell
        return True


def _close(found: Tensor, truth: Tensor, tolerance: float, scale: float = 0.0) -> bool:
    """Whether two tensors are equal but for rounding: relative to the second one's largest, or to what it was made from."""
    if found.shape != truth.shape or not bool(found.isfinite().all()):
        return False
    largest = float(truth.abs().max()) if truth.numel() else 0.0
    room = tolerance * largest + 10 * torch.finfo(truth.dtype).eps * scale
    return bool((found - truth).abs().max() <= room) if truth.numel() else True


def _off(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).abs().max() / truth.abs().max().clamp(min=torch.finfo(truth.dtype).tiny))
