"""Methods and their messages: one table for both ways."""

import math
from collections.abc import Mapping
from typing import Any, Final

from cdam.v1 import method_pb2
from cdam_engine import (
    METHODS,
    Attention,
    AttentionRollout,
    Cdam,
    InputXGradient,
    IntegratedCdam,
    IntegratedGradients,
    Method,
    Noise,
    PartialLrp,
    PatchMaskPrediction,
    RelevancePropagation,
    SmoothCdam,
    SmoothGrad,
    TokenAblation,
)
from cdam_server.errors import InvalidArgumentError
from cdam_server.rpc.parameters import Parameter, Parameters, decoded, encoded, number, within, word

_MAX_NOISE: Final = 1e6  # beyond it numbers overflow in float32, where the squares of a thousand of them are summed


def _read_count(count: int, field: str, most: int) -> Any:
    return within(1, most).read(count, field, most)


def _read_noise(noise: method_pb2.Noise, field: str, most: int) -> Noise | None:
    level = noise.WhichOneof("level")
    if level is None:
        return None
    value = within(0, _MAX_NOISE).read(getattr(noise, level), f"{field}.{level}", most)
    return Noise(value, relative=level == "relative")


def _write_noise(noise: Noise) -> dict[str, float]:
    return {"relative" if noise.relative else "absolute": noise.level}


def _read_heads(heads: Any, field: str, _most: int) -> tuple[int, ...]:
    if len(set(heads)) < len(heads):
        raise InvalidArgumentError(field, "names a head twice")
    return tuple(heads)


_DRAWS: Final[Parameters] = {
    "samples": Parameter(_read_count),
    "seed": Parameter(),
    "noise": Parameter(_read_noise, _write_noise),
}
_PATH: Final[Parameters] = {
    "quadrature": word(
        "a quadrature",
        riemann_right=method_pb2.QUADRATURE_RIEMANN_RIGHT,
        gauss_legendre=method_pb2.QUADRATURE_GAUSS_LEGENDRE,
    ),
    "steps": Parameter(_read_count),
}
PARAMETERS: Final[Mapping[type[Method], Parameters]] = {
    Cdam: {"parts": Parameter()},
    SmoothCdam: _DRAWS,
    IntegratedCdam: {"tolerance": number("finite and more than 0", lambda value: 0 < value < math.inf), **_PATH},
    Attention: {"heads": Parameter(_read_heads)},
    AttentionRollout: {},
    RelevancePropagation: {},
    PartialLrp: {},
    InputXGradient: {},
    SmoothGrad: _DRAWS,
    IntegratedGradients: _PATH,
    TokenAblation: {},
    PatchMaskPrediction: {},  # its activation is the model's
}
"""What the API says of every method, by its class; a method without an entry can't be served."""


def decode_method(method: method_pb2.Method, field: str, max_samples: int) -> Method:
    """The method.

    Args:
        method: The message.
        field: Its path from the request's root, for errors.
        max_samples: Largest number of draws, or of points on a path.

    Raises:
        InvalidArgumentError: It is none, or a parameter is out of bounds.
    """
    kind = method.WhichOneof("kind")
    if kind is None:
        raise InvalidArgumentError(field, "is empty: set the kind of method")
    form = METHODS[kind]
    return decoded(form, PARAMETERS[form], getattr(method, kind), f"{field}.{kind}", max_samples)


def encode_method(method: Method) -> method_pb2.Method:
    """The message of a method."""
    said: dict[str, Any] = {method.kind: encoded(PARAMETERS[type(method)], method)}
    return method_pb2.Method(**said)
