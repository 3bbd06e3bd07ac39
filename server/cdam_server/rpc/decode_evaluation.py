"""From the messages of an evaluation to the use case's words; every complaint names the field."""

import unicodedata
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from PIL import Image

from cdam.v1 import common_pb2, evaluation_pb2
from cdam_engine import TopK
from cdam_engine.evaluation import Evaluated, Protocol
from cdam_server.errors import InvalidArgumentError
from cdam_server.rpc.decode import Limits, check_name, decode_target, input_size, resize
from cdam_server.rpc.images import ImageLimits, decode_image, decode_mask
from cdam_server.rpc.methods import decode_method
from cdam_server.rpc.metrics import ANCHORS, decode_metric
from cdam_server.usecases.evaluate import EvaluateCommand, SampleCommand
from cdam_server.usecases.resolve import WantedScalar

_MAX_METHODS = 32
_MAX_METRICS = 32
_MAX_RESAMPLES = 10_000
_RESAMPLES = 1000
_MAX_SAMPLE_ID = 256
_ANCHOR = {value: anchor for anchor, value in ANCHORS.items()}


def evaluate_command(protocol: evaluation_pb2.EvaluationProtocol, limits: Limits, caller: str) -> EvaluateCommand:
    """What is to be measured.

    Args:
        protocol: What the first message says.
        limits: Limits of a request.
        caller: Who asks.

    Raises:
        InvalidArgumentError: A field is missing or wrong.
    """
    check_name(protocol.model, "protocol.model")
    for name, count, most in (
        ("methods", len(protocol.methods), _MAX_METHODS),
        ("metrics", len(protocol.metrics), _MAX_METRICS),
    ):
        if not 1 <= count <= most:
            raise InvalidArgumentError(f"protocol.{name}", f"{count} {name}; from 1 to {most} are allowed")
    methods = tuple(
        _evaluated(item, f"protocol.methods[{i}]", limits.max_samples) for i, item in enumerate(protocol.methods)
    )
    metrics = tuple(decode_metric(item, f"protocol.metrics[{i}]") for i, item in enumerate(protocol.metrics))
    resamples = protocol.bootstrap_resamples if protocol.HasField("bootstrap_resamples") else _RESAMPLES
    if resamples > _MAX_RESAMPLES:
        raise InvalidArgumentError("protocol.bootstrap_resamples", f"is {resamples}; at most {_MAX_RESAMPLES}")
    return EvaluateCommand(
        model=protocol.model,
        protocol=Protocol(methods, metrics, protocol.seed),
        resize=resize(protocol.preprocessing, "protocol.preprocessing"),
        input_size=input_size(protocol.preprocessing),
        resamples=resamples,
        caller=caller,
    )


async def samples(
    requests: AsyncIterator[evaluation_pb2.EvaluateRequest],
) -> AsyncIterator[evaluation_pb2.EvaluationSample]:
    """The samples of a stream, behind the protocol.

    Raises:
        InvalidArgumentError: Something else came.
    """
    async for request in requests:
        match request.WhichOneof("payload"):
            case "sample":
                yield request.sample
            case "protocol":
                raise InvalidArgumentError("protocol", "is for the first message alone")
            case _:
                raise InvalidArgumentError("payload", "is empty: set sample")


def sample(message: evaluation_pb2.EvaluationSample, limits: Limits) -> SampleCommand:
    """A sample; its images are decoded only when it is measured.

    Raises:
        InvalidArgumentError: A field is missing or wrong.
    """
    sample_id = message.sample_id
    # Not isprintable: file names have spaces of all kinds, and joined emoji.
    if len(sample_id) > _MAX_SAMPLE_ID or any(unicodedata.category(letter) == "Cc" for letter in sample_id):
        reason = f"must be at most {_MAX_SAMPLE_ID} characters, none of them a control character"
        raise InvalidArgumentError("sample.sample_id", reason)
    for name in ("image", "target"):
        if not message.HasField(name):
            raise InvalidArgumentError(f"sample.{name}", "is required")
    return SampleCommand(
        id=sample_id,
        open_image=partial(decode_image, message.image, limits.image),
        target=_target(message, "target"),
        wrong_target=_target(message, "wrong_target") if message.HasField("wrong_target") else None,
        open_mask=_opener(message, "mask", decode_mask, limits.image),
        open_counterfactual=_opener(message, "counterfactual", decode_image, limits.image),
        open_wrong_mask=_opener(message, "wrong_mask", decode_mask, limits.image),
    )


def _opener(
    message: Any, name: str, decode: Callable[[common_pb2.Image, ImageLimits, str], Image.Image], limits: ImageLimits
) -> Callable[[], Image.Image] | None:
    return partial(decode, getattr(message, name), limits, name) if message.HasField(name) else None


def _target(message: evaluation_pb2.EvaluationSample, name: str) -> WantedScalar:
    target = decode_target(getattr(message, name), f"sample.{name}")
    if isinstance(target, TopK):
        raise InvalidArgumentError(f"sample.{name}.top_k", "has several values; an evaluation is of one")
    return target


def _evaluated(item: evaluation_pb2.EvaluatedMethod, field: str, max_samples: int) -> Evaluated:
    match item.WhichOneof("kind"):
        case "method":
            return decode_method(item.method, f"{field}.method", max_samples)
        case "anchor" if item.anchor in _ANCHOR:
            return _ANCHOR[item.anchor]
        case "anchor":
            raise InvalidArgumentError(f"{field}.anchor", f"{item.anchor} is not an anchor")
        case _:
            raise InvalidArgumentError(field, "is empty: set method or anchor")
