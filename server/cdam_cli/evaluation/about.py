"""What was evaluated, for the files and the report."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cdam
from cdam_cli.evaluation.dataset import Dataset
from cdam_cli.spelling import spelled


@dataclass(frozen=True, eq=False)
class About:
    """What was evaluated.

    Attributes:
        model: The model.
        dataset: The samples.
        methods: Methods and anchors.
        metrics: The metrics.
        seed: Of all that is random.
        resamples: Of the bootstrap.
        resize: How images were brought to the model's input; None: as the model was evaluated.
        input_size: The model's input in pixels; None: its own.
        command: How to have it again.
        resolved: As of `resolved`, with the defaults that the server filled in; None: they are not known.
    """

    model: cdam.Model
    dataset: Dataset
    methods: Sequence[cdam.Method | cdam.Anchor]
    metrics: Sequence[cdam.Metric]
    seed: int
    resamples: int
    resize: cdam.Resize | None
    input_size: tuple[int, int] | None
    command: str = ""
    resolved: Mapping[str, Any] | None = None

    @property
    def method_names(self) -> list[str]:
        """The methods as the command line spells them."""
        return [spelled(method) for method in self.methods]

    @property
    def metric_names(self) -> list[str]:
        """The metrics, likewise."""
        return [spelled(metric) for metric in self.metrics]

    def is_anchor(self, method_index: int) -> bool:
        """Whether this is no explanation."""
        return isinstance(self.methods[method_index], cdam.Anchor)

    def index(self, anchor: cdam.Anchor) -> int | None:
        """Where an anchor is among the methods."""
        return self.methods.index(anchor) if anchor in self.methods else None

    def header(self) -> dict[str, Any]:
        """What results must have in common to be put together, in JSON's types."""
        return {
            "model": self.model.name,
            "model_fingerprint": self.model.fingerprint,
            "precision": self.model.precision,
            "methods": self.method_names,
            "metrics": self.metric_names,
            "seed": self.seed,
            "resize": self.resize,
            "input_size": None if self.input_size is None else list(self.input_size),
            "dataset": self.dataset.kind,  # its samples are known one by one
            "dataset_name": self.dataset.name,
            "written_by": f"cdam-serve {cdam.__version__}",
        }

    def protocol(self) -> dict[str, Any]:
        """What was measured, parameter by parameter."""
        known = self.resolved or _parameters(self.methods, self.metrics, self.resize, self.input_size)
        return {
            "methods": [
                {"anchor": name} if self.is_anchor(index) else {"name": name, **method}
                for index, (name, method) in enumerate(zip(self.method_names, known["methods"], strict=True))
            ],
            "metrics": [
                {"name": name, **metric} for name, metric in zip(self.metric_names, known["metrics"], strict=True)
            ],
            "seed": self.seed,
            "resamples": self.resamples,
            "resize": known["resize"],
            "input_size": known["input_size"],
        }


def resolved(protocol: cdam.EvaluationProtocol) -> dict[str, Any]:
    """The part of a server's protocol in which it fills in defaults."""
    return _parameters(protocol.methods, protocol.metrics, protocol.resize, protocol.input_size)


def said(parameters: Mapping[str, Any]) -> str:
    """All parameters of a method or metric of a protocol, for people."""
    return ", ".join(f"{name} {value}" for name, value in _leaves(parameters))


def _leaves(parameters: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{before}{name}.")
        elif name not in {"name", "kind", "anchor"} and value not in (None, (), []):
            yield f"{before}{name}", "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _parameters(
    methods: Sequence[cdam.Method | cdam.Anchor],
    metrics: Sequence[cdam.Metric],
    resize: str | None,
    input_size: tuple[int, int] | None,
) -> dict[str, Any]:
    return {
        "methods": [_fields(method) for method in methods],
        "metrics": [_fields(metric) for metric in metrics],
        "resize": resize,
        "input_size": input_size,
    }


def _fields(value: Any) -> dict[str, Any]:
    return {"kind": value.kind} if isinstance(value, cdam.Anchor) else {"kind": value.kind, **dataclasses.asdict(value)}
