# ruff: noqa: N802 - the generated base class sets names
"""Evaluations by both clients against scripted servers: what travels, what comes of it, and what happens when servers break."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import inspect
import itertools
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2 as details
from PIL import Image

import cdam
from cdam._evaluate import decode_values
from cdam.v1 import common_pb2, evaluation_pb2, method_pb2, target_pb2
from scripted_server import SOON, UNAVAILABLE, Failure, StreamScript, fail, item_error, serving, tensor
from tables import assert_same

IMAGE = np.zeros((4, 6, 3), np.uint8)
WHAT: dict[str, Any] = {"methods": ["cdam", "random"], "metrics": ["compactness", "mask_agreement"]}

Requests = Iterator[evaluation_pb2.EvaluationSample]
Behaviour = Callable[[Requests, "Evaluating"], Iterator[evaluation_pb2.EvaluateResponse]]


@dataclass
class Evaluating(StreamScript):
    """Evaluations that each behave as told, the last way for all that follow; and what they were asked."""

    fingerprints: list[str] = field(default_factory=lambda: ["f00d"])  # stream by stream, the last for all that follow
    protocols: list[evaluation_pb2.EvaluationProtocol] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    context: Any = None

    def Evaluate(self, request_iterator: Any, context: Any) -> Any:
        number = self.open(context)
        self.context = context
        self.protocols.append(next(request_iterator).protocol)

        def samples() -> Requests:
            for message in request_iterator:
                assert message.WhichOneof("payload") == "sample"
                yield message.sample

        for response in self.behave(number, samples(), context, self):
            if response.result.sample_id:
                self.answered.append(response.result.sample_id)
            yield response

    def ids(self) -> list[list[str]]:
        return [[sample.sample_id for sample in stream] for stream in self.streams]


def started(script: Evaluating) -> evaluation_pb2.EvaluateResponse:
    number = len(script.streams) - 1
    fingerprint = script.fingerprints[min(number, len(script.fingerprints) - 1)]
    message = evaluation_pb2.EvaluationStarted(
        model="first", model_fingerprint=fingerprint, protocol=script.protocols[number]
    )
    message.protocol.expected_samples = 0
    return evaluation_pb2.EvaluateResponse(started=message)


def measured(sample: evaluation_pb2.EvaluationSample, script: Evaluating) -> evaluation_pb2.EvaluateResponse:
    """Made-up values, the same of every server."""
    protocol = script.protocols[0]
    answer = evaluation_pb2.EvaluateResponse(result=evaluation_pb2.SampleResult(sample_id=sample.sample_id))
    answer.result.measured.SetInParent()
    for method in range(len(protocol.methods)):
        for index, metric in enumerate(protocol.metrics):
            for quantity in cdam.METRICS[metric.WhichOneof("kind")].quantities:
                value = made_up(sample.sample_id, method, quantity)
                curve = tensor(np.array([[0, 100], [value, value]])) if quantity.startswith("a_m") else None
                answer.result.measured.values.add(
                    method_index=method, metric_index=index, quantity=quantity, value=value, curve=curve
                )
    return answer


def made_up(sample_id: str, method: int, quantity: str) -> float:
    digest = hashlib.sha256(f"{sample_id} {method} {quantity}".encode()).digest()
    return int.from_bytes(digest[:6], "little") / 2**48


def failed(sample: evaluation_pb2.EvaluationSample, code: grpc.StatusCode, *reasons: Any) -> Any:
    error = item_error(code, *reasons)
    return evaluation_pb2.EvaluateResponse(result=evaluation_pb2.SampleResult(sample_id=sample.sample_id, error=error))


def measures(samples: Requests, script: Evaluating) -> Iterator[evaluation_pb2.EvaluateResponse]:
    """What a server does."""
    yield started(script)
    for sample in samples:
        yield measured(sample, script)
        yield evaluation_pb2.EvaluateResponse(progress=evaluation_pb2.EvaluationProgress(done=1))
    yield evaluation_pb2.EvaluateResponse(table=evaluation_pb2.EvaluationTable())


def stays(samples: Requests, script: Evaluating) -> Iterator[evaluation_pb2.EvaluateResponse]:
    """Measures every sample, and ends only when it is cancelled."""
    over = threading.Event()
    script.context.add_callback(over.set)
    with suppress(grpc.RpcError):  # the end of the requests, or the cancellation, whichever is heard first
        yield from itertools.islice(measures(samples, script), 10_000_000)
    over.wait(60)


def breaks_after(count: int, failure: Failure = UNAVAILABLE, *, taking: int = 0) -> Behaviour:
    """Measures so many samples, and fails once it has taken some more."""

    def behave(samples: Requests, script: Evaluating) -> Iterator[evaluation_pb2.EvaluateResponse]:
        yield started(script)
        for sample in itertools.islice(samples, count):
            yield measured(sample, script)
        for _ in itertools.islice(samples, taking):
            pass
        fail(script.context, failure)

    return behave


def refuses(samples: Requests, script: Evaluating) -> Iterator[evaluation_pb2.EvaluateResponse]:
    """A server that can't be reached any more."""
    fail(script.context, UNAVAILABLE)
    yield from ()


def sample(number: int, **known: Any) -> cdam.Sample:
    return cdam.Sample(str(number), IMAGE, "7", **known)


def some(count: int) -> list[cdam.Sample]:
    return [sample(number) for number in range(count)]


def expected_table(ids: Iterable[str], *, failures: int = 0, **settings: Any) -> cdam.Table:
    statistics = cdam.Statistics(2, **settings)
    for name in ids:
        values = [
            (method, index, quantity, made_up(name, method, quantity))
            for method in range(2)
            for index, kind in enumerate(WHAT["metrics"])
            for quantity in cdam.METRICS[kind].quantities
        ]
        statistics.add(name, values)
    for _ in range(failures):
        statistics.failed()
    return statistics.table()


async def no_tasks_but(before: set[asyncio.Task[Any]]) -> None:
    """Nothing of ours is left but these tasks. Of a call that broke while it was written to, grpc leaves one of its own."""
    left = {task for task in asyncio.all_tasks() - before if inspect.iscoroutine(task.get_coro())}
    if left:
        await asyncio.wait(left, timeout=10)
    assert not [task for task in left if not task.done()]


@dataclass
class Collected:
    """What came of an evaluation."""

    results: dict[str, cdam.SampleResult]
    table: cdam.Table
    started: cdam.EvaluationStarted | None

    @property
    def errors(self) -> dict[str, Exception]:
        return {name: result.error for name, result in self.results.items() if result.error is not None}


Collect = Callable[..., Collected]


@pytest.fixture
def script() -> Iterator[Evaluating]:
    with serving(Evaluating(behaviours=[measures])) as script:
        yield script  # type: ignore[misc]


@pytest.fixture
def scripts() -> Iterator[list[Evaluating]]:
    """Two servers."""
    with ExitStack() as stack:
        yield [stack.enter_context(serving(Evaluating(behaviours=[measures]))) for _ in range(2)]  # type: ignore[misc]


@pytest.fixture(params=["blocking", "asyncio"])
def collect(request: pytest.FixtureRequest) -> Collect:
    """All of an evaluation, by a client of either kind."""

    def collected(results: list[cdam.SampleResult], evaluation: Any) -> Collected:
        by_id = {result.id: result for result in results}
        assert len(by_id) == len(results)
        return Collected(by_id, evaluation.table, evaluation.started)

    def blocking(address: str, samples: Any, *, settings: dict[str, Any] | None = None, **how: Any) -> Collected:
        with cdam.Client(address, **(settings or {})) as client:
            try:
                evaluation = client.evaluate(samples, **WHAT | how)
                return collected(list(evaluation), evaluation)
            finally:
                assert not [thread for thread in threading.enumerate() if thread.name == "cdam"]

    def asynchronous(address: str, samples: Any, *, settings: dict[str, Any] | None = None, **how: Any) -> Collected:
        async def run() -> Collected:
            before = asyncio.all_tasks()
            try:
                async with cdam.AsyncClient(address, **(settings or {})) as client:
                    evaluation = client.evaluate(samples, **WHAT | how)
                    return collected([result async for result in evaluation], evaluation)
            finally:
                await no_tasks_but(before)

        return asyncio.run(run())

    return blocking if request.param == "blocking" else asynchronous


# --- what travels and what comes back


def test_what_travels(script: Evaluating, collect: Collect, tmp_path: Path) -> None:
    mask = np.zeros((4, 6), bool)
    mask[1, 2] = True
    path = tmp_path / "mask.png"
    Image.fromarray(mask.astype(np.uint8)).save(path)
    concept = cdam.Concept("loops")
    known = {"wrong_target": cdam.Contrast(1, "2"), "mask": mask, "counterfactual": IMAGE + 1, "wrong_mask": path}
    found = collect(
        script.address,
        [sample(0), cdam.Sample("one", IMAGE, concept, **known)],
        methods=[cdam.SmoothCdam(samples=3, noise=0.5), cdam.Anchor.INVERTED_MASK, "attention"],
        metrics=[
            "fidelity",
            cdam.BoxSensitivity(box_sizes=(8, 16), boxes=7, blur_sigma=2.5, enlargement="nearest"),
            cdam.ClassDiscrimination(fidelity=cdam.Fidelity(unit="patch", points=5)),
            cdam.Compactness(threshold=0.25, absolute=True),
            "randomisation",
        ],
        model="vit",
        seed=5,
        resize="squash",
        input_size=(32, 48),
        bootstrap_resamples=17,
        settings={"token": "secret"},
    )
    (protocol,) = script.protocols
    smooth = method_pb2.SmoothCdamMethod(samples=3, noise=method_pb2.Noise(relative=0.5))
    assert protocol == evaluation_pb2.EvaluationProtocol(
        model="vit",
        methods=[
            evaluation_pb2.EvaluatedMethod(method=method_pb2.Method(smooth_cdam=smooth)),
            evaluation_pb2.EvaluatedMethod(anchor=evaluation_pb2.ANCHOR_INVERTED_MASK),
            evaluation_pb2.EvaluatedMethod(method=method_pb2.Method(attention=method_pb2.AttentionMethod())),
        ],
        metrics=[
            evaluation_pb2.Metric(fidelity=evaluation_pb2.FidelityMetric()),
            evaluation_pb2.Metric(
                box_sensitivity=evaluation_pb2.BoxSensitivityMetric(
                    box_sizes=[8, 16], boxes=7, blur_sigma=2.5, enlargement=evaluation_pb2.ENLARGEMENT_NEAREST
                )
            ),
            evaluation_pb2.Metric(
                class_discrimination=evaluation_pb2.ClassDiscriminationMetric(
                    fidelity=evaluation_pb2.FidelityMetric(unit=evaluation_pb2.PERTURBATION_UNIT_PATCH, points=5),
                    box_sensitivity=evaluation_pb2.BoxSensitivityMetric(),
                )
            ),
            evaluation_pb2.Metric(compactness=evaluation_pb2.CompactnessMetric(threshold=0.25, absolute=True)),
            evaluation_pb2.Metric(randomisation=evaluation_pb2.RandomisationMetric()),
        ],
        seed=5,
        preprocessing=common_pb2.Preprocessing(
            resize_mode=common_pb2.RESIZE_MODE_SQUASH, input_size=common_pb2.Size(height=32, width=48)
        ),
        expected_samples=2,
        bootstrap_resamples=17,
    )
    ((plain, whole),) = script.streams
    assert plain.sample_id == "0"
    assert plain.target == target_pb2.Target(output=target_pb2.OutputTarget(name="7"))
    assert {name.name for name, _ in plain.ListFields()} == {"sample_id", "image", "target"}
    assert whole.target.concept.name == "loops"
    assert (whole.wrong_target.contrast.positive.output.index, whole.wrong_target.contrast.negative.output.name) == (
        1,
        "2",
    )
    assert whole.image.raw.data == IMAGE.tobytes()
    assert whole.counterfactual.raw.data == (IMAGE + 1).tobytes()
    assert whole.mask.raw.channels == 1
    assert np.array_equal(np.frombuffer(whole.mask.raw.data, np.uint8).reshape(4, 6) > 0, mask)
    assert whole.wrong_mask.encoded == path.read_bytes()
    assert script.metadata[0]["authorization"] == "Bearer secret"
    assert script.seconds_left[0] is None or script.seconds_left[0] > 1e6  # no deadline
    assert script.finished == [True]
    assert found.started is not None
    assert (found.started.model, found.started.fingerprint) == ("first", "f00d")
    assert found.started.protocol == cdam.EvaluationProtocol(
        methods=(cdam.SmoothCdam(samples=3, noise=0.5), cdam.Anchor.INVERTED_MASK, cdam.Attention()),
        metrics=(
            cdam.Fidelity(),
            cdam.BoxSensitivity(box_sizes=(8, 16), boxes=7, blur_sigma=2.5, enlargement="nearest"),
            cdam.ClassDiscrimination(fidelity=cdam.Fidelity(unit="patch", points=5)),
            cdam.Compactness(threshold=0.25, absolute=True),
            cdam.Randomisation(),
        ),
        seed=5,
        resize="squash",
        input_size=(32, 48),
        bootstrap_resamples=17,
    )
    values = found.results["one"].result()
    assert [(value.method_index, value.metric_index, value.quantity) for value in values[:3]] == [
        (0, 0, "a_mif"),
        (0, 0, "a_lif"),
        (0, 0, "a_lif_mif"),
    ]
    assert [value.value for value in values] == [made_up("one", value.method_index, value.quantity) for value in values]
    assert values[0].curve is not None
    np.testing.assert_array_equal(values[0].curve, np.float32([[0, 100], [values[0].value] * 2]))
    assert values[1].curve is None
    assert len(found.table.rows) == 3 * (5 + 2 + 5 + 1 + 2)


def test_the_table_is_that_of_the_samples_handed_out(script: Evaluating, collect: Collect) -> None:
    found = collect(script.address, some(20), seed=3, bootstrap_resamples=50)
    assert_same(found.table, expected_table(map(str, range(20)), seed=3, resamples=50))


def test_the_table_grows_with_what_is_handed_out_and_progress_is_told(script: Evaluating) -> None:
    told: list[cdam.EvaluationProgress] = []
    samples = [sample(0), sample(1, mask="/no/such/file"), sample(2)]
    with cdam.Client(script.address) as client:
        evaluation = client.evaluate(iter(samples), **WHAT, expected_samples=3, progress=told.append)
        assert evaluation.started is None
        assert evaluation.table == cdam.Table()
        assert evaluation.progress == cdam.EvaluationProgress(0, 0, 3, 0.0, None)
        for count, _ in enumerate(evaluation, 1):
            assert evaluation.table.samples + evaluation.table.failures == count
            assert evaluation.started is not None
    assert [(progress.done, progress.expected) for progress in told] == [(1, 3), (2, 3), (3, 3)]
    assert told[-1].failed == 1
    assert told[-1].rate > 0
    assert told[-1].remaining == 0
    assert script.protocols[0].expected_samples == 3


def test_no_samples(script: Evaluating, collect: Collect) -> None:
    found = collect(script.address, [])
    assert (found.results, found.table) == ({}, cdam.Table())
    assert found.started is not None
    assert collect(script.address, iter(())).table == cdam.Table()


def test_answers_in_any_order(script: Evaluating, collect: Collect) -> None:
    def behave(samples: Requests, script: Evaluating) -> Iterator[Any]:
        yield started(script)
        for one in reversed(list(samples)):
            yield measured(one, script)

    script.behaviours = [behave]
    found = collect(script.address, some(9))
    assert list(found.results) == list("876543210")


def test_samples_may_come_from_anywhere(script: Evaluating) -> None:
    async def source() -> AsyncIterator[cdam.Sample]:
        for one in some(3):
            yield one

    async def run() -> list[str]:
        async with cdam.AsyncClient(script.address) as client, client.evaluate(source(), **WHAT) as evaluation:
            return [result.id async for result in evaluation]

    assert sorted(asyncio.run(run())) == ["0", "1", "2"]


# --- what fails, and what fails alone


def spoil(one: evaluation_pb2.EvaluationSample, answer: evaluation_pb2.EvaluateResponse) -> None:
    """Make an answer what the sample's id says."""
    values = answer.result.measured.values
    match one.sample_id:
        case "missing":
            del values[3]
        case "twice":
            values.append(values[0])
        case "not finite":
            values[2].value = math.nan
        case "curve":
            values[0].curve.CopyFrom(tensor(np.zeros(3)))
        case "bytes":
            values[0].curve.CopyFrom(common_pb2.FloatTensor(shape=[2, 3], data=b"123"))
        case "nothing":
            answer.result.ClearField("measured")
        case "newer":
            values.add(method_index=0, metric_index=0, quantity="a newer one", value=1.0)


def errs(samples: Requests, script: Evaluating) -> Iterator[evaluation_pb2.EvaluateResponse]:
    """Answers each sample as its id says."""
    violation = details.BadRequest.FieldViolation(field="mask", description="is empty")
    info = details.ErrorInfo(reason="INTERNAL", metadata={"error_id": "e1"})
    yield started(script)
    for one in samples:
        if one.sample_id == "wrong":
            yield failed(one, grpc.StatusCode.INVALID_ARGUMENT, details.BadRequest(field_violations=[violation]))
        elif one.sample_id == "internal":
            yield failed(one, grpc.StatusCode.INTERNAL, info)
        else:
            answer = measured(one, script)
            spoil(one, answer)
            yield answer


def test_a_sample_fails_alone(script: Evaluating, collect: Collect, tmp_path: Path) -> None:
    script.behaviours = [errs]
    (tmp_path / "broken.png").write_bytes(b"nonsense")
    good = ["0", "newer", "last"]
    bad = {
        "wrong": cdam.InvalidArgument,
        "internal": cdam.Internal,
        **dict.fromkeys(["missing", "twice", "not finite", "curve", "bytes", "nothing"], cdam.MalformedResponse),
    }
    samples: list[Any] = [
        *(cdam.Sample(name, IMAGE, 3) for name in (*good, *bad)),
        cdam.Sample("broken", tmp_path / "broken.png", 3),
        cdam.Sample("no file", IMAGE, 3, mask=tmp_path / "missing.png"),
        cdam.Sample("mask", IMAGE, 3, mask=np.zeros((4, 6))),  # type: ignore[arg-type]
        cdam.Sample("several", IMAGE, cdam.TopK(2)),
        cdam.Sample("target", IMAGE, None),  # type: ignore[arg-type]
        cdam.Sample("large", np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8), 3),
        cdam.Sample("", IMAGE, 3),
        cdam.Sample(5, IMAGE, 3),  # type: ignore[arg-type]
    ]
    found = collect(script.address, samples, settings={"max_message_bytes": 100_000})
    assert {name: type(error) for name, error in found.errors.items()} == {
        **bad,
        "broken": cdam.ImageError,
        "no file": FileNotFoundError,
        "mask": cdam.ImageError,
        "several": ValueError,
        "target": TypeError,
        "large": cdam.ResourceExhausted,
        "": ValueError,
        "5": ValueError,
    }
    assert found.errors["wrong"].field == "mask"  # type: ignore[attr-defined]
    assert found.errors["internal"].error_id == "e1"  # type: ignore[attr-defined]
    with pytest.raises(cdam.InvalidArgument):
        found.results["wrong"].result()
    assert len(found.results["newer"].values) == 10
    assert_same(found.table, expected_table(good, failures=len(found.errors)))
    assert len(script.streams) == 1


@pytest.mark.parametrize(
    "curve", [None, [[0.0, 0.5], [1.0, 0.25]], [[0.0, 0.5], [1.0, float("nan")]], [[], []]], ids=str
)
def test_a_curve_of_hits_is_needed_and_checked(curve: list[list[float]] | None) -> None:
    """The client makes its table of them, too: what would break it is the sample's error."""
    metric = cdam.Localisation()

    def message(curve: list[list[float]] | None) -> evaluation_pb2.MetricValues:
        values = evaluation_pb2.MetricValues()
        for quantity in metric.quantities:
            value = values.values.add(quantity=quantity, value=0.5)
            if quantity == "box_acc" and curve is not None:
                value.curve.CopyFrom(tensor(np.array(curve)))
        return values

    (first, *_) = decode_values(message([[0.0, 0.5], [1.0, 0.0]]), 1, (metric,))
    assert first.curve is not None
    assert first.curve.tolist() == [[0.0, 0.5], [1.0, 0.0]]
    with pytest.raises(cdam.MalformedResponse, match="box_acc"):
        decode_values(message(curve), 1, (metric,))


def test_what_is_no_sample_fails_alone(script: Evaluating, collect: Collect) -> None:
    found = collect(script.address, [sample(0), None, sample(1)])
    assert [type(error) for error in found.errors.values()] == [TypeError]
    assert found.table.samples == 2


def test_an_id_that_is_not_answered_yet_is_not_sent_again(script: Evaluating) -> None:
    def behave(samples: Requests, script: Evaluating) -> Iterator[Any]:
        yield started(script)
        for one in list(samples):
            yield measured(one, script)

    script.behaviours = [behave]
    with cdam.Client(script.address) as client:
        evaluation = client.evaluate([sample(0), sample(1), sample(0), sample(2)], **WHAT)
        results = list(evaluation)
    (error,) = (result.error for result in results if result.error)
    assert isinstance(error, ValueError)
    assert results[0].error is error  # the later one, before anything was answered
    assert script.ids() == [["0", "1", "2"]]
    assert_same(evaluation.table, expected_table(["0", "1", "2"], failures=1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"window": 0},
        {"retries": -1},
        {"bootstrap_resamples": 0},
        {"seed": -1},
        {"methods": "unknown"},
        {"methods": ()},
        {"metrics": "unknown"},
        {"metrics": ()},
        {"metrics": cdam.Fidelity(unit="inch")},  # type: ignore[arg-type]
        {"metrics": cdam.Fidelity(points=-1)},
        {"metrics": cdam.BoxSensitivity(box_sizes=8)},  # type: ignore[arg-type]
        {"methods": cdam.Attention(heads=("one",))},  # type: ignore[arg-type]
        {"resize": "unknown"},
        {"timeout": -1.0},
    ],
)
@pytest.mark.parametrize("kind", [cdam.Client, cdam.AsyncClient])
def test_what_is_wrong_for_all_is_told_before_the_first(wrong: dict[str, Any], kind: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        kind("localhost:1").evaluate(some(1), **WHAT | wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"samples": sample(0)},
        {"samples": "0"},
        {"servers": "localhost:2"},
        {"servers": [5]},
        {"metrics": [5]},
        {"methods": [5]},
    ],
)
@pytest.mark.parametrize("kind", [cdam.Client, cdam.AsyncClient])
def test_wrong_types(wrong: dict[str, Any], kind: Any) -> None:
    given = {"samples": some(1), **WHAT} | wrong
    with pytest.raises(TypeError, match=r"."):
        kind("localhost:1").evaluate(given.pop("samples"), **given)


def test_clients_of_the_other_kind_are_no_servers() -> None:
    with cdam.Client("localhost:1") as client:
        other = cdam.AsyncClient("localhost:2")
        with pytest.raises(TypeError, match="Client"):
            client.evaluate(some(1), **WHAT, servers=[other])  # type: ignore[list-item]
        with pytest.raises(TypeError, match="Client"):
            other.evaluate(some(1), **WHAT, servers=[client])  # type: ignore[list-item]


def test_a_token_travels_in_plaintext_to_no_other_machine() -> None:
    client = cdam.Client("localhost:1", token="secret")
    with pytest.raises(ValueError, match="plaintext"):
        client.evaluate(some(1), **WHAT, servers=["example.org:1"])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("unasked", "not asked"),
        ("twice", "answered already"),
        ("too few", "unanswered"),
        ("early", "not asked"),
        ("other method", "asked for"),
        ("other metric", "asked for"),
        ("unknown", "unknown"),
        ("empty", "unknown"),
    ],
)
def test_a_server_that_does_not_keep_to_the_rules_is_found_out(
    script: Evaluating, collect: Collect, kind: str, message: str
) -> None:
    def behave(samples: Requests, script: Evaluating) -> Iterator[Any]:
        begin = started(script)
        methods, metrics = begin.started.protocol.methods, begin.started.protocol.metrics
        match kind:
            case "early":
                yield measured(evaluation_pb2.EvaluationSample(sample_id="0"), script)
            case "other method":
                methods[0].anchor = evaluation_pb2.ANCHOR_MASK
            case "other metric":
                del metrics[0]
            case "unknown":
                methods[1].anchor = 4711  # type: ignore[assignment]
            case "empty":
                metrics[0].Clear()
        yield begin
        one = next(samples)
        if kind == "unasked":
            one.sample_id = "somebody's"
        yield measured(one, script)
        if kind == "twice":
            yield measured(one, script)
            yield from (measured(one, script) for one in samples)

    script.behaviours = [behave]
    with pytest.raises(cdam.MalformedResponse, match=message):
        collect(script.address, some(3))


def test_what_is_no_outage_is_raised(script: Evaluating, collect: Collect) -> None:
    script.behaviours = [breaks_after(1, Failure(grpc.StatusCode.PERMISSION_DENIED)), measures]
    with pytest.raises(cdam.PermissionDenied) as caught:
        collect(script.address, some(5))
    assert len(script.streams) == 1
    assert script.address in caught.value.__notes__[0]


def test_an_error_of_the_samples_own_is_the_callers(script: Evaluating, collect: Collect) -> None:
    def samples() -> Iterator[cdam.Sample]:
        yield sample(0)
        raise cdam.Unavailable("from another server")  # nothing that this evaluation could mend

    script.behaviours = [stays]
    with pytest.raises(cdam.Unavailable, match="another"):
        collect(script.address, samples(), window=1)
    assert len(script.streams) == 1
    assert script.cancelled.wait(30)


def test_the_timeout_is_the_whole_evaluations(script: Evaluating, collect: Collect) -> None:
    def behave(samples: Requests, script: Evaluating) -> Iterator[Any]:
        yield started(script)
        yield measured(next(samples), script)
        threading.Event().wait(5)

    script.behaviours = [behave]
    with pytest.raises(cdam.DeadlineExceeded):
        collect(script.address, some(2), timeout=0.5)
    assert 0 < script.seconds_left[0] <= 0.5


# --- streams that break


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
def test_a_broken_stream_goes_on_with_what_is_unanswered(
    script: Evaluating, collect: Collect, code: grpc.StatusCode
) -> None:
    failure = Failure(code, details=(SOON,))
    script.behaviours = [breaks_after(10, failure, taking=3), refuses, breaks_after(7, failure), measures]
    found = collect(script.address, some(40), window=8, retries=2, seed=2)
    assert set(found.results) == set(map(str, range(40)))
    assert_same(found.table, expected_table(map(str, range(40)), seed=2))
    assert len(script.streams) == 4
    sent = [[int(name) for name in stream] for stream in script.ids()]
    assert sent[0][:13] == list(range(13))
    # Answers that were on their way when a stream broke may be lost, and their samples sent again; the others are not.
    assert sent[1] == []  # nothing is sent before a server has begun
    assert sent[2][0] <= 10
    assert all(numbers == sorted(set(numbers)) for numbers in sent)  # oldest first
    assert sent[2][0] <= sent[3][0] <= sent[2][0] + 7
    assert script.protocols[0].expected_samples == 40
    assert script.protocols[2].expected_samples == 40 - sent[2][0]


@pytest.mark.parametrize(
    ("code", "reasons"), [(grpc.StatusCode.UNAVAILABLE, (SOON,)), (grpc.StatusCode.RESOURCE_EXHAUSTED, (SOON,))]
)
def test_a_sample_that_a_server_can_not_take_now_goes_elsewhere(
    script: Evaluating, collect: Collect, code: grpc.StatusCode, reasons: Sequence[Any]
) -> None:
    def goes_down(samples: Requests, script: Evaluating) -> Iterator[Any]:
        yield started(script)
        first, second, third = itertools.islice(samples, 3)
        yield measured(first, script)
        yield failed(second, code, *reasons)
        yield measured(third, script)
        for one in samples:  # this ends only when the client has understood
            yield failed(one, code, *reasons)

    script.behaviours = [goes_down, measures]
    found = collect(script.address, some(10), window=4)
    assert found.errors == {}
    assert_same(found.table, expected_table(map(str, range(10))))
    assert script.finished == [True, True]
    assert script.ids()[1][0] == "1"


def test_a_server_that_stays_away_is_given_up(script: Evaluating, collect: Collect) -> None:
    script.behaviours = [breaks_after(5), refuses]
    with pytest.raises(cdam.Unavailable):
        collect(script.address, some(20), retries=3)
    assert len(script.streams) == 4
    with pytest.raises(cdam.Unavailable):
        collect("127.0.0.1:1", some(1), retries=1)


def test_progress_sets_the_count_of_retries_back(script: Evaluating, collect: Collect) -> None:
    script.behaviours = [breaks_after(2)] * 10 + [measures]
    found = collect(script.address, some(30), retries=1)
    assert_same(found.table, expected_table(map(str, range(30))))
    assert len(script.streams) == 11


def test_a_break_after_the_last_answer_is_none(script: Evaluating, collect: Collect) -> None:
    script.behaviours = [breaks_after(3, taking=1)]
    assert len(collect(script.address, some(3)).results) == 3
    assert len(script.streams) == 1


def test_a_model_that_changed_while_the_server_was_away_is_found_out(script: Evaluating, collect: Collect) -> None:
    script.behaviours = [breaks_after(2, taking=1), measures]
    script.fingerprints = ["f00d", "beef"]
    with pytest.raises(cdam.FailedPrecondition, match=r"different models.*f00d.*beef") as caught:
        collect(script.address, some(5))
    assert caught.value.reason == "SERVERS_DIFFER"


# --- memory, and leaving early


class Source:
    """Samples without end, counted."""

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self) -> Iterator[cdam.Sample]:
        while True:
            self.taken += 1
            yield sample(self.taken)


def test_samples_are_taken_as_they_are_needed_and_closing_cancels(scripts: list[Evaluating]) -> None:
    for script in scripts:
        script.behaviours = [stays]
    source = Source()
    with cdam.Client(scripts[0].address) as client:
        with client.evaluate(source, **WHAT, window=5, servers=[scripts[1].address]) as evaluation:
            assert source.taken == 0
            for _ in range(20):
                next(evaluation)
            assert source.taken <= 20 + 2 * 5
        assert evaluation.table.samples == 20
        # One of them may not have been needed yet.
        assert any(script.cancelled.wait(30) for script in scripts if script.streams)
        assert not [thread for thread in threading.enumerate() if thread.name == "cdam"]
        assert client.models()  # the client is as good as before
        assert list(evaluation) == []


async def test_samples_are_taken_as_they_are_needed_and_closing_cancels_asyncio(scripts: list[Evaluating]) -> None:
    for script in scripts:
        script.behaviours = [stays]
    before = asyncio.all_tasks()
    source = Source()
    async with (
        cdam.AsyncClient(scripts[0].address) as client,
        cdam.AsyncClient(scripts[1].address) as other,
    ):
        async with client.evaluate(source, **WHAT, window=5, servers=[other]) as evaluation:
            for _ in range(20):
                await anext(evaluation)
            assert source.taken <= 20 + 2 * 5 + 1
        assert evaluation.table.samples == 20
        assert await other.models()  # what was given stays open
    await no_tasks_but(before)


def test_nothing_is_taken_before_a_server_has_begun(collect: Collect) -> None:
    source = Source()
    with pytest.raises(cdam.Unavailable):
        collect("127.0.0.1:1", source, retries=1)
    assert source.taken == 0


def test_a_window_bounds_what_each_server_has(scripts: list[Evaluating]) -> None:
    hold = threading.Event()

    def behave(samples: Requests, script: Evaluating) -> Iterator[Any]:
        yield started(script)
        for number, one in enumerate(samples):
            if number == 4:
                hold.wait(30)
            yield measured(one, script)

    for script in scripts:
        script.behaviours = [behave]
    source = Source()
    with (
        cdam.Client(scripts[0].address) as client,
        client.evaluate(source, **WHAT, window=5, servers=[scripts[1].address]) as evaluation,
    ):
        for _ in range(8):
            next(evaluation)
        assert source.taken <= 8 + 2 * 5
        hold.set()
        for _ in range(30):
            next(evaluation)
        assert source.taken <= 38 + 2 * 5


# --- several servers


def test_servers_share_the_samples(scripts: list[Evaluating], collect: Collect) -> None:
    begun = threading.Barrier(2)

    def behave(samples: Requests, script: Evaluating) -> Iterator[Any]:
        yield started(script)
        for number, one in enumerate(samples):
            if number == 0:
                begun.wait(30)  # both have some
            yield measured(one, script)

    for script in scripts:
        script.behaviours = [behave]
    found = collect(scripts[0].address, some(60), servers=[scripts[1].address], window=4)
    assert_same(found.table, expected_table(map(str, range(60))))
    first, second = (set(script.answered) for script in scripts)
    assert first
    assert second
    assert not first & second
    assert first | second == set(map(str, range(60)))
    assert [script.protocols[0].expected_samples for script in scripts] == [0, 0]
    assert [script.finished for script in scripts] == [[True], [True]]


def test_a_slow_server_gets_less(scripts: list[Evaluating], collect: Collect) -> None:
    slow, fast = scripts
    enough = threading.Event()

    def waits(samples: Requests, script: Evaluating) -> Iterator[Any]:
        yield started(script)
        for one in samples:
            enough.wait(30)
            yield measured(one, script)

    def hurries(samples: Requests, script: Evaluating) -> Iterator[Any]:
        assert slow.arrived.wait(30)
        yield started(script)
        for number, one in enumerate(samples, 1):
            yield measured(one, script)
            if number == 100 - 4:  # all but what the slow one's window holds
                enough.set()

    slow.behaviours, fast.behaviours = [waits], [hurries]
    found = collect(slow.address, some(100), servers=[fast.address], window=4)
    assert_same(found.table, expected_table(map(str, range(100))))
    assert 1 <= len(slow.answered) <= 4
    assert len(fast.answered) == 100 - len(slow.answered)


def test_a_server_that_dies_for_good_leaves_its_samples_to_the_other(
    scripts: list[Evaluating], collect: Collect
) -> None:
    dying, living = scripts
    dying.behaviours = [breaks_after(3, taking=2), refuses]

    def behave(samples: Requests, script: Evaluating) -> Iterator[Any]:
        assert dying.arrived.wait(30)
        while len(dying.streams) < 5:  # more often than it may fail alone
            threading.Event().wait(0.01)
        yield from measures(samples, script)

    living.behaviours = [behave]
    found = collect(dying.address, some(50), servers=[living.address], window=6, retries=1)
    assert found.errors == {}
    assert_same(found.table, expected_table(map(str, range(50))))
    assert len(dying.answered) == 3
    assert set(dying.ids()[0][3:]) <= set(living.answered)


def test_a_server_that_was_never_there_is_not_missed(script: Evaluating, collect: Collect) -> None:
    for addresses in ([script.address, "127.0.0.1:1"], ["127.0.0.1:1", script.address]):
        found = collect(addresses[0], some(30), servers=addresses[1:], retries=0, window=4)
        assert_same(found.table, expected_table(map(str, range(30))))


def test_a_server_that_comes_back_gets_samples_again(scripts: list[Evaluating], collect: Collect) -> None:
    one, other = scripts
    back = threading.Event()

    def returns(samples: Requests, script: Evaluating) -> Iterator[Any]:
        yield started(script)
        for sample in samples:
            back.set()
            yield measured(sample, script)

    def waits(samples: Requests, script: Evaluating) -> Iterator[Any]:
        yield started(script)
        for sample in samples:
            assert back.wait(30)
            yield measured(sample, script)

    one.behaviours, other.behaviours = [breaks_after(2), refuses, refuses, returns], [waits]
    found = collect(one.address, some(40), servers=[other.address], window=4)
    assert_same(found.table, expected_table(map(str, range(40))))
    assert len(one.streams) == 4


def test_an_evaluation_fails_when_no_server_answers_any_more(scripts: list[Evaluating], collect: Collect) -> None:
    for script in scripts:
        script.behaviours = [breaks_after(3), refuses]
    with pytest.raises(cdam.Unavailable):
        collect(scripts[0].address, some(50), servers=[scripts[1].address], window=4, retries=2)
    assert all(len(script.streams) >= 3 for script in scripts)


def test_what_a_server_takes_down_with_it_may_be_the_last(scripts: list[Evaluating], collect: Collect) -> None:
    dying, living = scripts
    taken = threading.Event()

    def takes_the_last(samples: Requests, script: Evaluating) -> Iterator[Any]:
        yield started(script)
        next(samples)
        taken.set()
        while len(living.answered) < 9:  # the other one has nothing more to do
            threading.Event().wait(0.01)
        fail(script.context, UNAVAILABLE)

    def leaves_one(samples: Requests, script: Evaluating) -> Iterator[Any]:
        yield started(script)
        for one in samples:
            assert taken.wait(30)
            yield measured(one, script)

    dying.behaviours, living.behaviours = [takes_the_last, refuses], [leaves_one]
    found = collect(dying.address, some(10), servers=[living.address], window=1)
    assert_same(found.table, expected_table(map(str, range(10))))
    assert len(living.streams) == 1


@pytest.mark.parametrize("difference", ["fingerprint", "defaults"])
def test_servers_that_differ_are_found_out_before_a_result_is_used(
    scripts: list[Evaluating], collect: Collect, difference: str
) -> None:
    one, odd = scripts

    def differs(samples: Requests, script: Evaluating) -> Iterator[Any]:
        assert one.arrived.wait(30)
        begin = started(script)
        if difference == "fingerprint":
            begin.started.model_fingerprint = "beef"
        else:
            begin.started.protocol.metrics[0].compactness.threshold = 0.5
        yield begin
        yield from (measured(one, script) for one in samples)

    one.behaviours, odd.behaviours = [stays], [differs]
    with pytest.raises(cdam.FailedPrecondition) as caught:
        collect(one.address, Source(), servers=[odd.address], window=4)
    assert caught.value.reason == "SERVERS_DIFFER"
    assert one.address in caught.value.message
    assert odd.address in caught.value.message
    if difference == "fingerprint":
        assert "f00d" in caught.value.message
        assert "beef" in caught.value.message
    assert odd.answered == []


# --- metrics


def test_every_metric_has_a_message_and_says_what_is_better() -> None:
    kinds = {field.name for field in evaluation_pb2.Metric.DESCRIPTOR.fields}
    assert set(cdam.METRICS) == kinds
    for kind, metric in cdam.METRICS.items():
        settings = evaluation_pb2.Metric.DESCRIPTOR.fields_by_name[kind].message_type
        assert {field.name for field in dataclasses.fields(metric)} == {field.name for field in settings.fields}
    assert {anchor.name for anchor in cdam.Anchor} == {
        name.removeprefix("ANCHOR_") for name, value in evaluation_pb2.Anchor.items() if value
    }
    assert cdam.BETTER["a_mif"] == cdam.BETTER["deletion"] == cdam.BETTER["randomisation_all"] == "lower"
    assert cdam.BETTER["a_lif"] == cdam.BETTER["gini"] == "higher"
    assert cdam.BETTER["change_correlation"] == cdam.BETTER["max_box_acc"] == "higher"
    assert cdam.BETTER["true_change"] is cdam.BETTER["map_change"] is None
    assert set(cdam.BETTER) - {"change_correlation", "max_box_acc"} == {
        quantity for metric in cdam.METRICS.values() for quantity in metric.quantities
    }


def test_metrics_are_the_engines() -> None:
    from cdam_engine.evaluation import METRICS

    assert {kind: tuple(metric.quantities) for kind, metric in cdam.METRICS.items()} == {
        kind: metric.quantities for kind, metric in METRICS.items()
    }
