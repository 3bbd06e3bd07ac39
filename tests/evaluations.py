"""Evaluations in few words, for tests that talk to a real server with raw stubs: scenes of the demo, messages, results."""

from __future__ import annotations

import io
import queue
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from numpy.typing import NDArray
from PIL import Image

from calls import Stub, array, method, output
from cdam.statistics import Statistics
from cdam.v1 import common_pb2, evaluation_pb2
from cdam_engine import Output
from cdam_engine.evaluation import Sample
from cdam_server.demo.scenes import Scene, draw_scene

Key = tuple[int, int, str]

CDAM = evaluation_pb2.EvaluatedMethod(method=method("cdam"))
RANDOM = evaluation_pb2.EvaluatedMethod(anchor=evaluation_pb2.ANCHOR_RANDOM)


def metric(kind: str, **parameters: Any) -> evaluation_pb2.Metric:
    """The metric of this name."""
    message = evaluation_pb2.Metric()
    settings = getattr(message, kind)
    settings.SetInParent()
    settings.MergeFrom(type(settings)(**parameters))
    return message


def protocol(*metrics: evaluation_pb2.Metric, **fields: Any) -> evaluation_pb2.EvaluationProtocol:
    """What to measure; CDAM and random maps unless `methods` says otherwise."""
    return evaluation_pb2.EvaluationProtocol(**{"methods": [CDAM, RANDOM], "metrics": metrics, **fields})


@cache
def scene(seed: int) -> Scene:
    """A held-out scene of two digits."""
    return draw_scene("test", seed, 2)


def raw(pixels: NDArray[np.uint8]) -> common_pb2.Image:
    """Pixels of shape (H, W) or (H, W, 3)."""
    height, width, channels = *pixels.shape, *([] if pixels.ndim == 3 else [1])
    return common_pb2.Image(
        raw=common_pb2.RawImage(height=height, width=width, channels=channels, data=pixels.tobytes())
    )


def png(pixels: NDArray[Any] | Image.Image, kind: str = "PNG", **parameters: Any) -> common_pb2.Image:
    """The file of an image."""
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, kind, **parameters)
    return common_pb2.Image(encoded=buffer.getvalue())


def sample(seed: int, **changes: Any) -> evaluation_pb2.EvaluationSample:
    """All that is known about a scene: its first digit is the right target."""
    drawn = scene(seed)
    first, second = drawn.objects
    fields = {
        "sample_id": f"scene {seed}",
        "image": raw(drawn.image),
        "target": output(first.label),
        "wrong_target": output(second.label),
        "mask": raw(first.mask.astype(np.uint8)),
        "counterfactual": raw(drawn.without(0).image),
        "wrong_mask": raw(second.mask.astype(np.uint8)),
        **changes,
    }
    return evaluation_pb2.EvaluationSample(**fields)


def engine_sample(seed: int) -> Sample:
    """The same as the engine takes it."""
    drawn = scene(seed)
    first, second = drawn.objects
    return Sample(
        id=f"scene {seed}",
        image=drawn.image,
        target=Output(first.label),
        wrong_target=Output(second.label),
        mask=first.mask,
        counterfactual=drawn.without(0).image,
        wrong_mask=second.mask,
    )


def requests(
    plan: evaluation_pb2.EvaluationProtocol, samples: Iterable[evaluation_pb2.EvaluationSample]
) -> Iterator[evaluation_pb2.EvaluateRequest]:
    """The messages of a stream."""
    yield evaluation_pb2.EvaluateRequest(protocol=plan)
    for item in samples:
        yield evaluation_pb2.EvaluateRequest(sample=item)


class Answers:
    """What came back from an evaluation.

    Attributes:
        started: The first message.
        results: Of the samples, in the order in which they came.
        progress: The reports.
        table: The last message, or None.
    """

    def __init__(self) -> None:
        self.started: evaluation_pb2.EvaluationStarted | None = None
        self.results: list[evaluation_pb2.SampleResult] = []
        self.progress: list[evaluation_pb2.EvaluationProgress] = []
        self.table: evaluation_pb2.EvaluationTable | None = None

    def take(self, response: evaluation_pb2.EvaluateResponse) -> evaluation_pb2.SampleResult | None:
        """Put a message where it belongs; a result is also returned. It is an error if it comes out of order."""
        assert self.table is None
        assert (self.started is None) == (response.WhichOneof("payload") == "started")
        match response.WhichOneof("payload"):
            case "started":
                self.started = response.started
            case "progress":
                self.progress.append(response.progress)
            case "table":
                self.table = response.table
            case _:
                self.results.append(response.result)
                return response.result
        return None

    def values(self) -> dict[str, dict[Key, float]]:
        """The numbers of each sample that was measured."""
        return {item.sample_id: values(item) for item in self.results if item.HasField("measured")}

    def curves(self) -> dict[str, dict[Key, NDArray[Any]]]:
        """The curves of each sample that was measured."""
        return {
            item.sample_id: {
                (value.method_index, value.metric_index, value.quantity): array(value.curve)
                for value in item.measured.values
                if value.HasField("curve")
            }
            for item in self.results
        }

    def errors(self) -> dict[str, common_pb2.ItemError]:
        """What became of the others."""
        return {item.sample_id: item.error for item in self.results if item.HasField("error")}


def values(result: evaluation_pb2.SampleResult) -> dict[Key, float]:
    """The numbers of one sample."""
    return {(item.method_index, item.metric_index, item.quantity): item.value for item in result.measured.values}


def evaluate(
    stub: Stub, plan: evaluation_pb2.EvaluationProtocol, samples: Iterable[evaluation_pb2.EvaluationSample]
) -> Answers:
    """A whole evaluation."""
    answers = Answers()
    for response in stub.Evaluate(requests(plan, samples), timeout=240):
        answers.take(response)
    return answers


class Talk:
    """An evaluation that the test leads message by message.

    Attributes:
        answers: What has come back.
        call: The call.
    """

    def __init__(self, stub: Stub, plan: evaluation_pb2.EvaluationProtocol) -> None:
        self._sending: queue.Queue[evaluation_pb2.EvaluateRequest | None] = queue.Queue()
        self.answers = Answers()
        self.call: Any = stub.Evaluate(iter(self._sending.get, None), timeout=240)
        self._sending.put(evaluation_pb2.EvaluateRequest(protocol=plan))

    def send(self, *samples: evaluation_pb2.EvaluationSample) -> None:
        for item in samples:
            self._sending.put(evaluation_pb2.EvaluateRequest(sample=item))

    def send_request(self, request: evaluation_pb2.EvaluateRequest) -> None:
        self._sending.put(request)

    def end(self) -> None:
        self._sending.put(None)

    def result(self) -> evaluation_pb2.SampleResult:
        """The next sample's result."""
        while (result := self.answers.take(next(self.call))) is None:
            pass
        return result

    def drain(self) -> grpc.StatusCode:
        """Take all that still comes; how it ended."""
        try:
            for response in self.call:
                self.answers.take(response)
        except grpc.RpcError:
            self.end()
        code: grpc.StatusCode = self.call.code()
        return code


def statistics(
    found: dict[str, dict[Key, float]],
    *,
    curves: dict[str, dict[Key, NDArray[Any]]] | None = None,
    methods: int = 2,
    seed: int = 0,
    failures: int = 0,
) -> Statistics:
    """What a client makes of results that came from anywhere."""
    made = Statistics(methods, seed=seed)
    for sample_id, its in found.items():
        drawn = (curves or {}).get(sample_id, {})
        made.add(sample_id, [(*key, value, drawn.get(key)) for key, value in its.items()])
    for _ in range(failures):
        made.failed()
    return made


def violation(error: common_pb2.ItemError) -> str:
    """The field that a sample failed for."""
    assert error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0], error
    (field,) = _detail(error, error_details_pb2.BadRequest).field_violations
    return str(field.field)


def _detail(error: common_pb2.ItemError, kind: type[Message]) -> Any:
    detail = kind()
    assert any(packed.Unpack(detail) for packed in error.details)
    return detail
