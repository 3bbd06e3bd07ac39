"""The samples of Evaluate: how they travel, and what comes back."""

import math
from collections.abc import Container, Sequence
from typing import Any, ClassVar, TypeVar

import grpc

from cdam._channel import SERVICE
from cdam._decode import decode_error, decode_settings, decode_tensor
from cdam._encode import Resize, encode_method, encode_preprocessing, encode_settings, encode_target, short_name
from cdam._errors import CdamError, FailedPrecondition, MalformedResponse, RpcError
from cdam._evaluation import EvaluationProtocol, EvaluationStarted, MetricValue, Sample, SampleResult
from cdam._hits import as_hits
from cdam._images import encode_image, encode_mask, fit
from cdam._methods import METHODS
from cdam._metrics import (
    METRICS,
    Anchor,
    Evaluated,
    EvaluatedLike,
    Metric,
    MetricLike,
    as_evaluated,
    as_metrics,
)
from cdam._numbers import whole
from cdam._stream import Job, PreparedItem, is_passing
from cdam._targets import TargetLike, TopK, as_target
from cdam.statistics import PEAKED
from cdam.v1 import common_pb2, evaluation_pb2, target_pb2

T = TypeVar("T")

_IMAGES = ("image", "mask", "counterfactual", "wrong_mask")


class Evaluate(Job):
    """Measuring samples, on one server or several.

    Attributes:
        methods: What is compared.
        metrics: What is measured.
        seed: Seed of all draws.
        resamples: Bootstrap resamples.
        expected: How many samples there will be; None: not known.
        started: What the evaluation is of; None before a server has answered.
    """

    path: ClassVar[str] = f"/{SERVICE}/Evaluate"

    def __init__(
        self,
        servers: Sequence[str],
        *,
        methods: EvaluatedLike | Sequence[EvaluatedLike],
        metrics: MetricLike | Sequence[MetricLike],
        model: str,
        seed: int,
        resize: Resize | None,
        input_size: tuple[int, int] | None,
        window: int,
        retries: int,
        bootstrap_resamples: int,
        expected_samples: int | None,
        max_message_bytes: int,
    ) -> None:
        """Check what is asked of every sample.

        Raises:
            ValueError, TypeError: if something of it can't be.
        """
        self.servers = servers
        self.window = whole(window, "window")
        self.retries = whole(retries, "retries")
        self.check()
        self.methods = as_evaluated(methods)
        self.metrics = as_metrics(metrics)
        if not self.methods or not self.metrics:
            raise ValueError("an evaluation needs a method and a metric at least")
        if bootstrap_resamples < 1:
            raise ValueError(f"bootstrap_resamples is at least 1, got {bootstrap_resamples}")
        self.expected = expected_samples
        self.started: EvaluationStarted | None = None
        self._protocol = evaluation_pb2.EvaluationProtocol(
            model=model,
            methods=map(encode_evaluated, self.methods),
            metrics=map(encode_metric, self.metrics),
            seed=whole(seed, "seed"),
            bootstrap_resamples=whole(bootstrap_resamples, "bootstrap_resamples"),
        )
        encode_preprocessing(self._protocol.preprocessing, resize, input_size)
        self.seed = self._protocol.seed
        self.resamples = self._protocol.bootstrap_resamples
        self._first: tuple[int, evaluation_pb2.EvaluationStarted] | None = None
        self._answered = 0
        self._max_message_bytes = max_message_bytes

    def serialise(self, request: evaluation_pb2.EvaluateRequest) -> bytes:
        """The request."""
        return request.SerializeToString()

    def parse(self, data: bytes) -> evaluation_pb2.EvaluateResponse:
        """An answer."""
        return evaluation_pb2.EvaluateResponse.FromString(data)

    def opening(self) -> evaluation_pb2.EvaluateRequest:
        """The protocol; how many samples will follow is known only if one server has all of them."""
        request = evaluation_pb2.EvaluateRequest(protocol=self._protocol)
        if self.expected is not None and len(self.servers) == 1:
            request.protocol.expected_samples = max(0, self.expected - self._answered)
        return request

    def encode(self, item: Sample, position: int, unanswered: Container[str]) -> PreparedItem | SampleResult:
        """The sample's request, or, if it can't be made, its result."""
        try:
            sample = encode_sample(item, unanswered)
            fit(sample, [getattr(sample, name) for name in _IMAGES], self._max_message_bytes)
            return PreparedItem(item.id, position, evaluation_pb2.EvaluateRequest(sample=sample))
        except (CdamError, OSError, TypeError, ValueError) as error:
            self._answered += 1
            return SampleResult(str(getattr(item, "id", "")), error=error)

    def item_id(self, answer: evaluation_pb2.EvaluateResponse) -> str | None:
        """The sample's id, of a result."""
        return answer.result.sample_id if answer.WhichOneof("payload") == "result" else None

    def note(self, answer: evaluation_pb2.EvaluateResponse, server: int) -> bool:
        """Note what a server says of the evaluation; it has begun with `started`. Progress and table are one's own.

        Raises:
            MalformedResponse: if that is not what was asked for.
            FailedPrecondition: if servers would not measure the same.
        """
        if answer.WhichOneof("payload") != "started":
            return False
        if self._first is None:
            self.started = decode_started(answer.started, self.methods, self.metrics)
            self._first = server, answer.started
        self._check_same(server, answer.started)
        return True

    def result(self, item: PreparedItem, answer: evaluation_pb2.EvaluateResponse) -> SampleResult | RpcError:
        """The sample's result; or the server's word that it can't take it now."""
        if answer.result.WhichOneof("outcome") == "error":
            error = decode_error(answer.result.error)
            if is_passing(error):
                return error
            result = SampleResult(item.id, error=error)
        else:
            try:
                values = decode_values(answer.result.measured, len(self.methods), self.metrics)
                result = SampleResult(item.id, values)
            except MalformedResponse as malformed:
                result = SampleResult(item.id, error=malformed)
        self._answered += 1
        return result

    def _check_same(self, server: int, started: evaluation_pb2.EvaluationStarted) -> None:
        """Check that a server measures what the first one does."""
        assert self._first is not None
        first_server, first = self._first
        fingerprints = first.model_fingerprint, started.model_fingerprint
        is_same_model = fingerprints[0] == fingerprints[1]
        if is_same_model and _measured(started.protocol) == _measured(first.protocol):
            return
        name, first_name = self.servers[server], self.servers[first_server]
        both = f"{first_name} and {name}" if server != first_server else f"{name}, before and after it was away,"
        if is_same_model:
            message = f"{both} would not measure the same: they fill in different defaults"
        else:
            message = f"{both} have different models: their fingerprints are {' and '.join(fingerprints)}"
        error = FailedPrecondition(message, code=grpc.StatusCode.FAILED_PRECONDITION)
        error.reason = "SERVERS_DIFFER"
        raise error


def encode_evaluated(method: Evaluated) -> evaluation_pb2.EvaluatedMethod:
    """The message for a method or an anchor."""
    if isinstance(method, Anchor):
        anchor = evaluation_pb2.Anchor.Value(f"ANCHOR_{method.name}")
        return evaluation_pb2.EvaluatedMethod(anchor=anchor)
    return evaluation_pb2.EvaluatedMethod(method=encode_method(method))


def encode_metric(metric: Metric) -> evaluation_pb2.Metric:
    """The message for a metric."""
    message = evaluation_pb2.Metric()
    encode_settings(getattr(message, metric.kind), metric, metric.kind)
    return message


def encode_sample(sample: Sample, unanswered: Container[str] = ()) -> evaluation_pb2.EvaluationSample:
    """The message for a sample, of another id than those that are not answered yet.

    Raises:
        OSError: if a path can't be read.
        ImageError: if an image is none.
        ValueError, TypeError: if something else of it can't be.
    """
    if not isinstance(sample, Sample):
        raise TypeError(f"a sample is a cdam.Sample, not {type(sample).__name__}")
    if not isinstance(sample.id, str) or not sample.id:
        raise ValueError(f"a sample's id is a text, not {sample.id!r}")
    if sample.id in unanswered:
        raise ValueError(f"another sample of the id {sample.id!r} is not answered yet")
    message = evaluation_pb2.EvaluationSample(
        sample_id=sample.id, image=encode_image(sample.image), target=_encode_target(sample.target)
    )
    if sample.wrong_target is not None:
        message.wrong_target.CopyFrom(_encode_target(sample.wrong_target))
    if sample.counterfactual is not None:
        message.counterfactual.CopyFrom(encode_image(sample.counterfactual))
    if sample.mask is not None:
        message.mask.CopyFrom(encode_mask(sample.mask))
    if sample.wrong_mask is not None:
        message.wrong_mask.CopyFrom(encode_mask(sample.wrong_mask))
    return message


def decode_started(
    started: evaluation_pb2.EvaluationStarted, methods: tuple[Evaluated, ...], metrics: tuple[Metric, ...]
) -> EvaluationStarted:
    """What an evaluation is of.

    Raises:
        MalformedResponse: if it is not of these methods and metrics.
    """
    protocol = started.protocol
    try:
        answered = tuple(map(_decode_evaluated, protocol.methods)), tuple(map(_decode_metric, protocol.metrics))
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedResponse(f"an evaluation of something unknown: {error}") from error
    for asked, found in zip((methods, metrics), answered, strict=True):
        if [one.kind for one in asked] != [one.kind for one in found]:
            raise MalformedResponse(f"an evaluation of {found}, where {asked} was asked for")
    prepared = protocol.preprocessing
    size = (prepared.input_size.height, prepared.input_size.width) if prepared.HasField("input_size") else None
    resize = short_name(common_pb2.ResizeMode, "RESIZE_MODE", prepared.resize_mode) if prepared.resize_mode else None
    return EvaluationStarted(
        model=started.model,
        fingerprint=started.model_fingerprint,
        protocol=EvaluationProtocol(
            methods=answered[0],
            metrics=answered[1],
            seed=protocol.seed,
            resize=resize,
            input_size=size,
            bootstrap_resamples=protocol.bootstrap_resamples,
        ),
    )


def decode_values(
    measured: evaluation_pb2.MetricValues, methods: int, metrics: tuple[Metric, ...]
) -> tuple[MetricValue, ...]:
    """A sample's values, each of them once; what a newer server adds to them is passed over.

    Raises:
        MalformedResponse: if one is missing, twice there, or not finite.
    """
    found = {(value.method_index, value.metric_index, value.quantity): value for value in measured.values}
    if len(found) < len(measured.values):
        raise MalformedResponse("a value is there twice")
    values = []
    for method in range(methods):
        for index, metric in enumerate(metrics):
            for quantity in metric.quantities:
                if (value := found.get((method, index, quantity))) is None:
                    raise MalformedResponse(f"no {quantity} of metric {index} for method {method}")
                values.append(_value(value))
    return tuple(values)


def _value(value: evaluation_pb2.MetricValue) -> MetricValue:
    if not math.isfinite(value.value):
        raise MalformedResponse(f"{value.quantity} is {value.value}")
    curve = decode_tensor(value.curve) if value.HasField("curve") else None
    if curve is not None and (curve.ndim != 2 or len(curve) != 2):
        raise MalformedResponse(f"a curve of shape {curve.shape}")
    if value.quantity == PEAKED:
        try:
            as_hits(curve)
        except ValueError as error:
            raise MalformedResponse(f"{value.quantity}: {error}") from error
    return MetricValue(value.method_index, value.metric_index, value.quantity, value.value, curve)


def _decode_evaluated(evaluated: evaluation_pb2.EvaluatedMethod) -> Evaluated:
    if evaluated.WhichOneof("kind") == "anchor":
        return Anchor(short_name(evaluation_pb2.Anchor, "ANCHOR", evaluated.anchor))
    return _of_kind(evaluated.method, METHODS)


def _decode_metric(metric: evaluation_pb2.Metric) -> Metric:
    return _of_kind(metric, METRICS)


def _of_kind(message: Any, kinds: dict[str, type[T]]) -> T:
    kind = message.WhichOneof("kind")
    return decode_settings(getattr(message, kind), kinds[kind])


def _encode_target(target: TargetLike) -> target_pb2.Target:
    meant = as_target(target)
    if isinstance(meant, TopK):
        raise ValueError("a sample's target is of one value: top k are several")  # noqa: TRY004 - the type is a target's; its number is wrong
    return encode_target(meant)


def _measured(protocol: evaluation_pb2.EvaluationProtocol) -> evaluation_pb2.EvaluationProtocol:
    """The part of a protocol that measured values depend on."""
    part = evaluation_pb2.EvaluationProtocol()
    part.CopyFrom(protocol)
    for name in ("model", "expected_samples"):
        part.ClearField(name)
    return part
