"""What an explainer's model takes and can serve, as plain values: no weights, no module, nothing to compute with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cdam_engine.errors import UnsupportedMethodError
from cdam_engine.families import Readout
from cdam_engine.methods.base import Method
from cdam_engine.sizes import InputSizes


@dataclass(frozen=True)
class Refusal:
    """Why a model can't be explained, or can't serve a method.

    Attributes:
        reason: UPPER_SNAKE_CASE, stable, for programs.
        message: For people.
    """

    reason: str
    message: str


@dataclass(frozen=True)
class ExplainerFacts:
    """Of an explainer.

    Attributes:
        sizes: Which inputs it takes.
        prefix_tokens: How many tokens come before the patches'.
        latent_size: D, the length of the latent.
        heads: Attention heads of the last block.
        readout: How the latent is read out.
        precision: Of the trunk's matrix products: "fp32" or "bf16".
        gradient_cost: Of a gradient through the tail, in runs of the trunk.
        refusals: Of the methods that it can't serve, by kind and variant.
    """

    sizes: InputSizes
    prefix_tokens: int
    latent_size: int
    heads: int
    readout: Readout
    precision: str
    gradient_cost: float
    refusals: Mapping[tuple[str, str], Refusal]

    def check(self, method: Method) -> None:
        """Refuse a method that the model can't serve.

        Raises:
            UnsupportedMethodError: With the reason.
        """
        refusal = self.refusals.get((method.kind, method.variant))
        if refusal is not None:
            raise UnsupportedMethodError(refusal.reason, refusal.message)

    def cost(self, methods: Sequence[Method], targets: int, patches: int) -> float:
        """About how much work a request is, in runs of the trunk for its image.

        Args:
            methods: How it is explained.
            targets: Number of scalar functions that are explained.
            patches: Number of patches.
        """
        return 1 + sum(
            method.passes(targets, patches) + self.gradient_cost * method.gradients(targets) for method in methods
        )
