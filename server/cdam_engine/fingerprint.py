"""What makes two models the same: one digest of architecture, settings and weights.

Equal fingerprints mean equal maps, up to rounding; concepts are bound to one, because a vector means nothing in the
latent space of another model. Hence the digest is made of nothing that differs between processes, machines or
versions of torch: no pickles, no addresses, no `repr`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import nn

_FORMAT: Final = "cdam-fingerprint-1"  # another name whenever the recipe below changes


def fingerprint(
    module: nn.Module,
    architecture: str,
    settings: Mapping[str, object],
    *,
    counts: Callable[[str], bool] = lambda _: True,
) -> str:
    """SHA-256 over architecture, settings and every tensor of the state dict.

    Args:
        module: The model, in the dtype in which its weights are stored; on any device.
        architecture: Name of its code, for example ``vit_small_patch16_224``.
        settings: What else decides its output and is not in the tensors: keyword arguments of the architecture,
            pooling, preprocessing. Must be representable in JSON; tuples and lists are the same.
        counts: Which tensors count, by their names.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: A setting has no JSON representation.
    """
    digest = hashlib.sha256()
    header = {"format": _FORMAT, "architecture": architecture, "settings": dict(settings)}
    digest.update(_line(header))
    for name, tensor in sorted(module.state_dict().items()):
        if not counts(name):
            continue
        digest.update(_line([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]))
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def _line(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"
