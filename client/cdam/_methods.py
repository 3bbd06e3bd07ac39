"""How to explain: one frozen class for each method of the API, with the API's names and defaults."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Literal, TypeAlias, get_args

Quadrature: TypeAlias = Literal["riemann_right", "gauss_legendre"]
"""How a path integral is approximated: by a right-hand Riemann sum, as in the papers, or by Gauss-Legendre nodes."""

MethodKind: TypeAlias = Literal[
    "cdam",
    "smooth_cdam",
    "integrated_cdam",
    "attention",
    "attention_rollout",
    "relevance_propagation",
    "partial_lrp",
    "input_x_gradient",
    "smooth_grad",
    "integrated_gradients",
    "token_ablation",
    "patch_mask_prediction",
]
"""A method's name."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Standard deviation of Gaussian noise; with neither given, the method's default.

    Attributes:
        relative: As a fraction of max - min of what the noise is added to, image by image.
        absolute: In the units of what the noise is added to.
    """

    relative: float | None = None
    absolute: float | None = None

    def __post_init__(self) -> None:
        if self.relative is not None and self.absolute is not None:
            raise ValueError("noise is relative or absolute, not both")


def _as_noise(noise: Any) -> Any:
    """A plain number, of any library, is relative."""
    return Noise(relative=float(noise)) if isinstance(noise, Real) else noise


class _Method:
    """What all methods have in common.

    Attributes:
        kind: The method's name.
        needs_target: False if its map is the same for every target.
    """

    kind: ClassVar[MethodKind]
    needs_target: ClassVar[bool] = True


@dataclass(frozen=True)
class Cdam(_Method):
    """Class-discriminative attention map: S_i = sum_j T_ij df/dT_ij.

    Attributes:
        parts: Also answer the two maps that S is the sum of, through the values and through the keys.
    """

    kind: ClassVar[MethodKind] = "cdam"
    parts: bool = False


@dataclass(frozen=True)
class SmoothCdam(_Method):
    """CDAM averaged over noisy copies of the tokens.

    Attributes:
        samples: Number of draws; None: 50.
        noise: The noise, added to the tokens; None: 0.05, relative, as a plain number is.
        seed: None: 0. The same seed gives the same map, alone or in any batch.
    """

    kind: ClassVar[MethodKind] = "smooth_cdam"
    samples: int | None = None
    noise: Noise | float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise", _as_noise(self.noise))


@dataclass(frozen=True)
class IntegratedCdam(_Method):
    """CDAM integrated along the path from zero tokens.

    Attributes:
        steps: Number of points on the path; None: 50.
        quadrature: How the integral is approximated.
        tolerance: Double the steps until |completeness residual| is at most this, in units of the target, but not
            beyond 1024; None: don't.
    """

    kind: ClassVar[MethodKind] = "integrated_cdam"
    steps: int | None = None
    quadrature: Quadrature = "riemann_right"
    tolerance: float | None = None


@dataclass(frozen=True)
class Attention(_Method):
    """Attention of the readout token over the patches, last block. Needs no target.

    Attributes:
        heads: The heads to average, from 0; empty: all.
    """

    kind: ClassVar[MethodKind] = "attention"
    needs_target: ClassVar[bool] = False
    heads: tuple[int, ...] = ()


@dataclass(frozen=True)
class AttentionRollout(_Method):
    """Attention rollout (Abnar and Zuidema 2020). Needs no target."""

    kind: ClassVar[MethodKind] = "attention_rollout"
    needs_target: ClassVar[bool] = False


@dataclass(frozen=True)
class RelevancePropagation(_Method):
    """Relevance propagation for attention models (Chefer, Gur and Wolf 2021)."""

    kind: ClassVar[MethodKind] = "relevance_propagation"


@dataclass(frozen=True)
class PartialLrp(_Method):
    """Partial layer-wise relevance propagation (Voita et al. 2019), last layer."""

    kind: ClassVar[MethodKind] = "partial_lrp"


@dataclass(frozen=True)
class InputXGradient(_Method):
    """Input x gradient, summed over each patch."""

    kind: ClassVar[MethodKind] = "input_x_gradient"


@dataclass(frozen=True)
class SmoothGrad(_Method):
    """SmoothGrad (Smilkov et al. 2017), signed, summed over each patch.

    Attributes:
        samples: Number of draws; None: 50.
        noise: The noise, added to the normalised input; None: 0.15, relative, as a plain number is.
        seed: Seed of the draws; None: 0.
    """

    kind: ClassVar[MethodKind] = "smooth_grad"
    samples: int | None = None
    noise: Noise | float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise", _as_noise(self.noise))


@dataclass(frozen=True)
class IntegratedGradients(_Method):
    """Integrated gradients (Sundararajan et al. 2017) from a picture of the mean colour, summed over each patch.

    Attributes:
        steps: Number of points on the path; None: 50.
        quadrature: How the integral is approximated.
    """

    kind: ClassVar[MethodKind] = "integrated_gradients"
    steps: int | None = None
    quadrature: Quadrature = "riemann_right"


@dataclass(frozen=True)
class TokenAblation(_Method):
    """Change of the target when one patch token is removed."""

    kind: ClassVar[MethodKind] = "token_ablation"


@dataclass(frozen=True)
class PatchMaskPrediction(_Method):
    """The classifier applied to every patch token (after Kang, Heo and Choe 2024): a probability, or a regression value."""

    kind: ClassVar[MethodKind] = "patch_mask_prediction"


Method: TypeAlias = (
    Cdam
    | SmoothCdam
    | IntegratedCdam
    | Attention
    | AttentionRollout
    | RelevancePropagation
    | PartialLrp
    | InputXGradient
    | SmoothGrad
    | IntegratedGradients
    | TokenAblation
    | PatchMaskPrediction
)
MethodLike: TypeAlias = MethodKind | Method
"""A method, or the name of one with its defaults."""

METHODS: dict[str, type[Method]] = {method.kind: method for method in get_args(Method)}
"""Every method, by name."""


def as_method(method: MethodLike) -> Method:
    """The method that is meant."""
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise TypeError(f"a method is one of cdam's classes or a name, not {type(method).__name__}")
    if method not in METHODS:
        raise ValueError(f"no method {method!r}; there are {', '.join(METHODS)}")
    return METHODS[method]()


def as_methods(methods: MethodLike | Sequence[MethodLike]) -> tuple[Method, ...]:
    """The methods that are meant, of one or several."""
    if isinstance(methods, str | Method):
        return (as_method(methods),)
    return tuple(as_method(method) for method in methods)
