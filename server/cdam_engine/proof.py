"""The proof that what is explained is `model(x)`: made once for each model, on images of noise.

The split mirrors timm's code, and a model may have been changed in ways that the mirror does not show: hooks on the whole
model, a patched forward pass, layers whose operators have no gradient. So the model itself is asked, and what it says is
compared with what its parts say: outputs, latent, and the gradient at the tokens of the last attention; and that gradient
with differences of the outputs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from cdam_engine.errors import UnsupportedArchitectureError
from cdam_engine.families import Readout, TrunkOutput
from cdam_engine.tail import make_tail
from cdam_engine.targets import Concept, Output, Scalar
from cdam_engine.vit import SplitViT

# How far rounding may take outputs, and maps, from each other, relative to the largest of them.
_TOLERANCES: Final = {
    torch.float64: (1e-9, 1e-7),
    torch.float32: (2e-4, 2e-3),
    torch.float16: (3e-2, 1e-1),
    torch.bfloat16: (1e-1, 3e-1),
}
_TF32_TOLERANCES: Final = (1e-2, 5e-2)
# Steps of the difference quotient, relative to |T|, and how close one of them must come. Small steps drown in rounding,
# large ones bend; a gradient that misses a path is off at every one.
_STEPS: Final = (1e-2, 3e-3, 3e-2, 1e-3, 1e-1, 1e-4)
_CLOSE: Final = 0.05
_SEED: Final = 20240615


@dataclass(eq=False)
class _Heard:
    """What the whole model said of one image.

    Attributes:
        tokens: T, shape (1, N, D) or (1, h, w, D): where gradients start.
        outputs: `model(x)`, shape (1, C), on a graph from `tokens`.
        latent: What the head was given; None if it was not called.
        without_gradient: Modules after T that let no gradient through, by name.
    """

    tokens: Tensor | None = None
    outputs: Tensor | None = None
    latent: Tensor | None = None
    without_gradient: list[str] = field(default_factory=list)


def prove(vit: SplitViT) -> None:
    """Compare a model with its split.

    Args:
        vit: The split model. Neither it nor torch's modes are changed.

    Raises:
        UnsupportedArchitectureError: What is explained would not be `model(x)`; with what differs.
    """
    weight = next(vit.model.parameters())
    draw = torch.Generator().manual_seed(_SEED)
    pixels = torch.randn(2, vit.channels, *vit.input_size, generator=draw).to(weight.device, weight.dtype)
    with torch.inference_mode(mode=False), torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        heard = _listen(vit, pixels[:1])
        trunk = vit.trunk(pixels)
        _check_outputs(vit, heard, trunk, pixels)
        _check_gradients(vit, heard, trunk)


def _listen(vit: SplitViT, pixels: Tensor) -> _Heard:
    """Run the whole model on one image, with the tokens of its last attention as a leaf."""
    heard = _run(vit, pixels, from_input=False)
    if heard.outputs is not None and not heard.outputs.requires_grad:
        # Re-entrant checkpointing breaks a graph that does not come all the way from the input.
        heard = _run(vit, pixels, from_input=True)
    if heard.tokens is None:
        raise UnsupportedArchitectureError("OUTPUTS_DIFFER", "the model does not run the norm of its last attention")
    if heard.outputs is None or not heard.outputs.requires_grad:
        raise _no_gradient(heard)
    return heard


def _run(vit: SplitViT, pixels: Tensor, *, from_input: bool) -> _Heard:
    heard = _Heard()
    me = threading.get_ident()

    def at_tokens(_module: nn.Module, _given: Any, out: Tensor) -> Tensor:
        if threading.get_ident() != me:
            return out
        torch.set_grad_enabled(True)  # until the run is over
        heard.tokens = out.view_as(out) if out.requires_grad else out.detach().requires_grad_()
        return heard.tokens

    def at_head(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == me:
            heard.latent = given[0].detach()

    def at_part(name: str) -> Callable[..., None]:
        def listen(_module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
            if threading.get_ident() != me or heard.tokens is None or not isinstance(out, Tensor):
                return
            asked = any(isinstance(its, Tensor) and its.requires_grad for its in given)
            if asked and out.is_floating_point() and not out.requires_grad:
                heard.without_gradient.append(name)

        return listen

    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(from_input))
        stack.callback(vit.blocks[-1].norm1.register_forward_hook(at_tokens).remove)
        stack.callback(vit.family.head.register_forward_pre_hook(at_head).remove)
        for name, module in vit.model.named_modules():
            if not module._modules:  # noqa: SLF001
                stack.callback(module.register_forward_hook(at_part(name)).remove)
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
    if not bool(alone.isfinite().all()):
        raise UnsupportedArchitectureError("NOT_FINITE", "the model's outputs for an image of noise are not finite")
    if not _close(found, alone, tolerance):
        raise UnsupportedArchitectureError("OUTPUTS_DIFFER", _why_outputs_differ(vit, found, alone, pixels, tolerance))
    reads_one = vit.readout is not Readout.CLS_AND_DISTILLATION_TOKENS  # whose latent is the mean of two
    if reads_one and heard.latent is not None and not _close(tail.latent[:1], heard.latent, tolerance):
        raise UnsupportedArchitectureError(
            "OUTPUTS_DIFFER", f"the model's head is given another latent than the pooling's{_hooks_on(vit)}"
        )


def _why_outputs_differ(vit: SplitViT, found: Tensor, alone: Tensor, pixels: Tensor, tolerance: float) -> str:
    if found.shape != alone.shape:
        how = f"the model has {alone.shape[1]} outputs, its parts give {found.shape[1]}"
    else:
        how = f"the model's own outputs differ from those of its parts by {_off(found, alone):.2g} of their maximum"
    if hooks := _hooks_on(vit):
        return how + hooks
    if not _close(vit.model(pixels[:1]), alone, tolerance):
        return f"{how}: they are random, another for each call"
    if not _close(vit.model(pixels)[:1], alone, tolerance):
        return f"{how}: those of an image depend on the other images of its batch"
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
    if tokens.dtype in {torch.float16, torch.bfloat16}:  # too coarse for differences
        if heard.without_gradient:
            raise _no_gradient(heard)
        return
    if not _is_the_slope(vit, trunk.part(0), targets[0], gradients[0]):
        raise _no_gradient(heard)


def _is_the_slope(vit: SplitViT, trunk: TrunkOutput, target: Scalar, gradient: Tensor) -> bool:
    """Whether the target changes along its gradient as that says, at one step size at least."""
    length = float(torch.linalg.vector_norm(gradient.double()))
    size = float(torch.linalg.vector_norm(trunk.tokens.double()))
    value = abs(_value(vit, trunk, target, trunk.tokens))
    if length * size <= 1e3 * torch.finfo(gradient.dtype).eps * value:
        return True  # nothing to be seen above rounding: a head of zeros, say
    for step in _STEPS:
        change = gradient * (step * size / length)
        up, down = (_value(vit, trunk, target, trunk.tokens + sign * change) for sign in (1, -1))
        if abs((up - down) / (2 * step * size * length) - 1) < _CLOSE:
            return True
    return False


def _value(vit: SplitViT, trunk: TrunkOutput, target: Scalar, tokens: Tensor) -> float:
    output = vit.tail(trunk, tokens)
    return float(target(output.latent[0].double(), output.logits[0].double()))


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
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]  # noqa: SLF001
        found += [f"{getattr(hook, '__name__', type(hook).__name__)} on {name}" for hook in hooks]
        found += ["a forward pass of its own on " + name] if "forward" in vars(module) else []
    return f"; there is a hook that the parts don't run: {', '.join(found)}" if found else ""


def _tolerances(values: Tensor) -> tuple[float, float]:
    if values.is_cuda and values.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return _TF32_TOLERANCES
    return _TOLERANCES[values.dtype]


def _close(found: Tensor, truth: Tensor, tolerance: float, scale: float = 0.0) -> bool:
    """Whether two tensors are equal but for rounding: relative to the second one's largest, or to what it was made from."""
    if found.shape != truth.shape or not bool(found.isfinite().all()):
        return False
    largest = float(truth.abs().max()) if truth.numel() else 0.0
    room = tolerance * largest + 10 * torch.finfo(truth.dtype).eps * scale
    return bool((found - truth).abs().max() <= room) if truth.numel() else True


def _off(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).abs().max() / truth.abs().max().clamp(min=torch.finfo(truth.dtype).tiny))
