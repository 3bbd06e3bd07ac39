"""Both clients against a scripted server: what travels, how often, and what comes back."""

import asyncio
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2 as details

import cdam
from cdam._blocking import run
from cdam._channel import is_local, service_config
from cdam.v1 import explainer_service_pb2_grpc, model_pb2
from scripted_server import Failure, Script, scores, serving

Call = Callable[..., Any]
UNAVAILABLE = Failure(grpc.StatusCode.UNAVAILABLE)
IMAGE = np.zeros((40, 60, 3), np.uint8)


@pytest.fixture(params=["blocking", "asyncio"])
def call(request: pytest.FixtureRequest) -> Call:
    """Call a method of a client, of either kind."""

    def blocking(address: str, method: str, *args: Any, settings: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        with cdam.Client(address, **(settings or {})) as client:
            return getattr(client, method)(*args, **kwargs)

    def asynchronous(
        address: str, method: str, *args: Any, settings: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        async def run() -> Any:
            async with cdam.AsyncClient(address, **(settings or {})) as client:
                return await getattr(client, method)(*args, **kwargs)

        return asyncio.run(run())

    return blocking if request.param == "blocking" else asynchronous


def test_explain_sends_everything_and_types_the_answer(script: Script, call: Call) -> None:
    explanation = call(
        script.address,
        "explain",
        IMAGE,
        ["cat", 7, cdam.TopK(2)],
        methods=["cdam", cdam.SmoothCdam(samples=9)],
        model="second",
        resize="squash",
        input_size=(32, 48),
        request_id="mine",
        priority="high",
    )
    (sent,) = script.requests
    assert [t.WhichOneof("kind") for t in sent.targets] == ["output", "output", "top_k"]
    assert (sent.model, sent.request_id, sent.priority) == ("second", "mine", 3)
    assert (sent.preprocessing.resize_mode, sent.preprocessing.input_size.width) == (2, 48)
    assert explanation.request_id == "mine"
    assert explanation.model == "second"
    assert [t.label for t in explanation.targets] == ["cat", "7", "0", "1"]
    assert [t.request_index for t in explanation.targets] == [0, 1, 2, 2]
    assert len(explanation) == 8
    np.testing.assert_array_equal(explanation["7", "smooth_cdam"].scores, scores(5))
    assert explanation["7", "smooth_cdam"].method == cdam.SmoothCdam(samples=9)


def test_models_follows_the_pages(script: Script, call: Call) -> None:
    assert [m.name for m in call(script.address, "models")] == ["first", "second"]
    model = call(script.address, "model", "second")
    assert (model.task, model.readout, model.precision) == ("multi_class", "cls_token", "fp32")
    assert (model.input_size, model.patch_grid) == ((32, 48), (2, 3))
    assert (model.methods, dict(model.unsupported)) == (("cdam",), {"smooth_cdam": "not yet"})


def test_every_call_has_a_deadline(script: Script, call: Call) -> None:
    call(script.address, "model", settings={"timeout": 7.0})
    call(script.address, "model", timeout=3.0)
    assert 6 < script.seconds_left[0] < 7.1
    assert 2 < script.seconds_left[1] < 3.1


def test_deadline_exceeded(script: Script, call: Call) -> None:
    script.delay = 0.5
    with pytest.raises(cdam.DeadlineExceeded) as error:
        call(script.address, "model", timeout=0.1)
    assert error.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_unavailable_is_tried_again(script: Script, call: Call) -> None:
    script.failures = [UNAVAILABLE] * 3
    assert call(script.address, "model").name == "first"
    assert len(script.requests) == 4


def test_large_requests_are_tried_again_too(script: Script, call: Call) -> None:
    script.failures = [UNAVAILABLE]
    call(script.address, "explain", np.zeros((1000, 1000, 3), np.uint8), 1)
    assert len(script.requests) == 2


def test_retries_end(script: Script, call: Call) -> None:
    script.failures = [UNAVAILABLE] * 9
    with pytest.raises(cdam.Unavailable):
        call(script.address, "model", settings={"retries": 2})
    assert len(script.requests) == 3


def test_retries_can_be_off(script: Script, call: Call) -> None:
    script.failures = [UNAVAILABLE]
    with pytest.raises(cdam.Unavailable):
        call(script.address, "model", settings={"retries": 0})
    assert len(script.requests) == 1


def test_what_is_not_unavailable_is_not_tried_again(script: Script, call: Call) -> None:
    script.failures = [Failure(grpc.StatusCode.RESOURCE_EXHAUSTED), Failure(grpc.StatusCode.INTERNAL)]
    for kind in (cdam.ResourceExhausted, cdam.Internal):
        with pytest.raises(kind):
            call(script.address, "model")
    assert len(script.requests) == 2


def test_the_servers_pushback_is_heeded(script: Script) -> None:
    script.failures = [Failure(grpc.StatusCode.UNAVAILABLE, trailers=(("grpc-retry-pushback-ms", "600"),))]
    started = time.monotonic()
    with cdam.Client(script.address) as client:
        client.model()
    assert time.monotonic() - started > 0.55
    assert len(script.requests) == 2


def test_a_server_that_comes_late_is_reached_by_retries(call: Call) -> None:
    with serving(Script()) as script:
        address = script.address  # a port that is free a moment later
    late = Script()

    def serve() -> None:
        time.sleep(0.3)
        with serving(late, address):
            done.wait(20)

    done = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(serve)
        try:
            assert call(address, "model").name == "first"
        finally:
            done.set()


def test_nobody_there(call: Call) -> None:
    with pytest.raises(cdam.Unavailable) as error:
        call("127.0.0.1:1", "model", settings={"retries": 0})
    assert error.value.retry_after is None


def test_no_answer_in_time_while_waiting(call: Call) -> None:
    with pytest.raises(cdam.DeadlineExceeded):
        call("127.0.0.1:1", "wait_until_ready", 0.3)


def test_a_server_without_health_is_ready_when_it_answers(script: Script, call: Call) -> None:
    call(script.address, "wait_until_ready", 5)


def test_waiting_for_health(call: Call) -> None:
    health = pytest.importorskip("grpc_health.v1.health")
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    status = health_pb2.HealthCheckResponse
    servicer = health.HealthServicer()
    servicer.set("", status.SERVING)  # it lives, but takes no requests
    servicer.set("cdam.v1.ExplainerService", status.NOT_SERVING)
    server = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(cdam.DeadlineExceeded):
            call(f"127.0.0.1:{port}", "wait_until_ready", 0.3)
        timer = threading.Timer(0.3, servicer.set, ("cdam.v1.ExplainerService", status.SERVING))
        timer.start()
        call(f"127.0.0.1:{port}", "wait_until_ready", 10)
        timer.join()
    finally:
        server.stop(None).wait()


def test_headers(script: Script, call: Call) -> None:
    settings = {"token": "s3cret", "metadata": {"X-Team": "vision"}}
    call(script.address, "model", settings=settings)
    (metadata,) = script.metadata
    assert metadata["authorization"] == "Bearer s3cret"
    assert metadata["x-team"] == "vision"
    assert metadata["user-agent"].startswith("cdam-python/")


def test_generated_stubs_speak_as_the_client_does(script: Script) -> None:
    request, others = model_pb2.GetModelRequest(name="second"), {"token": "s3cret"}

    async def asynchronous() -> model_pb2.GetModelResponse:
        connection = cdam.AsyncClient(script.address, **others).connection
        async with connection.aio_channel(("grpc.primary_user_agent", "mine/1")) as channel:
            stub = explainer_service_pb2_grpc.ExplainerServiceStub(channel)
            return await stub.GetModel(request, timeout=connection.timeout, metadata=connection.metadata)

    connection = cdam.Client(script.address, **others).connection
    with connection.channel() as channel:
        stub = explainer_service_pb2_grpc.ExplainerServiceStub(channel)
        answer = stub.GetModel(request, timeout=connection.timeout, metadata=connection.metadata)
    assert answer.model.name == asyncio.run(asynchronous()).model.name == "second"
    assert [metadata["authorization"] for metadata in script.metadata] == ["Bearer s3cret"] * 2
    agents = [metadata["user-agent"].partition(" ")[0].partition("/")[0] for metadata in script.metadata]
    assert agents == ["cdam-python", "mine"]
    assert "s3cret" not in repr(connection)


def test_unix_sockets(tmp_path: Path, call: Call) -> None:
    with serving(Script(), f"unix:{tmp_path}/api"):
        assert call(f"unix:{tmp_path}/api", "model", settings={"token": "s3cret"}).name == "first"


def test_dns_names(script: Script, call: Call) -> None:
    port = script.address.rpartition(":")[2]
    assert call(f"dns:///localhost:{port}", "model", settings={"token": "s3cret"}).name == "first"


def test_threads_share_a_client(script: Script) -> None:
    with cdam.Client(script.address) as client, ThreadPoolExecutor(8) as pool:
        explanations = list(pool.map(lambda n: client.explain(IMAGE, n, request_id=str(n)), range(16)))
    assert [e.request_id for e in explanations] == [str(n) for n in range(16)]


async def test_tasks_share_a_client(script: Script) -> None:
    async with cdam.AsyncClient(script.address) as client:
        explanations = await asyncio.gather(*(client.explain(IMAGE, n, request_id=str(n)) for n in range(16)))
    assert [e.request_id for e in explanations] == [str(n) for n in range(16)]


async def test_a_cancelled_call_is_cancelled(script: Script) -> None:
    script.delay = 0.5
    async with cdam.AsyncClient(script.address) as client:
        task = asyncio.create_task(client.model())
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def test_a_closed_client_says_so(script: Script) -> None:
    client = cdam.Client(script.address)
    client.model()
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.model()


def test_messages_have_a_limit(script: Script) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    with (
        cdam.Client(script.address, max_message_bytes=1000) as client,
        pytest.raises(
            cdam.ResourceExhausted, match=r"7\d\d\d bytes, over the client's max_message_bytes of 1000: send a"
        ) as error,
    ):
        client.explain(noise, 1)
    assert not script.requests
    assert not isinstance(error.value, cdam.Overloaded)


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("localhost:8001", True),
        ("127.0.0.1:8001", True),
        ("127.8.0.1:8001", True),
        ("[::1]:8001", True),
        ("localhost", True),
        ("unix:/run/cdam", True),
        ("unix:///run/cdam", True),
        ("unix-abstract:cdam", True),
        ("dns:///localhost:8001", True),
        ("dns:localhost:8001", True),
        ("ipv4:127.0.0.1:8001", True),
        ("ipv6:[::1]:8001", True),
        ("ipv6:%5B::1%5D:8001", True),
        ("ipv4:127.0.0.1:8001,10.0.0.1:8001", False),
        ("cdam:8001", False),
        ("10.0.0.1:8001", False),
        ("0.0.0.0:8001", False),
        ("[fe80::1]:8001", False),
        ("dns:///localhost.example.org:8001", False),
        ("dns://127.0.0.1/cdam:8001", False),
        ("xds:///localhost:8001", False),
        ("", False),
    ],
)
def test_where_a_token_may_travel_in_plaintext(address: str, local: bool) -> None:
    assert is_local(address) is local
    if local:
        cdam.Client(address, token="s3cret").close()
    else:
        with pytest.raises(ValueError, match="refusing to send a token in plaintext"):
            cdam.Client(address, token="s3cret")
        cdam.Client(address, token="s3cret", allow_plaintext_token=True).close()
        cdam.Client(address, token="s3cret", tls=True).close()


@pytest.mark.parametrize(
    "settings",
    [
        {"retries": 5},
        {"retries": -1},
        {"timeout": 0},
        {"timeout": float("inf")},
        {"timeout": float("nan")},
        {"max_message_bytes": 0},
        {"token": "two words"},
        {"token": "line\nbreak"},
        {"token": ""},
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        cdam.Client(**settings)


def test_secrets_are_not_shown() -> None:
    client = cdam.Client(token="s3cret", tls=cdam.TLS(ca=None, cert=None, key=None))
    assert "s3cret" not in f"{client!r} {vars(client)!r}"
    assert "PRIVATE" not in repr(cdam.TLS(cert=b"CERT", key=b"PRIVATE"))


def test_tls_wants_both_cert_and_key() -> None:
    with pytest.raises(ValueError, match="both"):
        cdam.TLS(cert=b"")


def test_service_config() -> None:
    assert service_config("localhost:1", 0) == {}
    assert service_config("dns:///a:1", 0) == {"loadBalancingConfig": [{"round_robin": {}}]}
    config = service_config("dns:///a:1", 4)
    (method,) = config["methodConfig"]
    assert method["retryPolicy"]["maxAttempts"] == 5
    assert {"service": "cdam.v1.ExplainerService", "method": "ExplainStream"} not in method["name"]


def _retry(seconds: float) -> details.RetryInfo:
    delay = Duration()
    delay.FromMilliseconds(int(seconds * 1000))
    return details.RetryInfo(retry_delay=delay)


@pytest.mark.parametrize(
    ("code", "detail", "kind", "said"),
    [
        (
            grpc.StatusCode.INVALID_ARGUMENT,
            details.BadRequest(
                field_violations=[details.BadRequest.FieldViolation(field="image.raw", description="too small")]
            ),
            cdam.InvalidArgument,
            {"field": "image.raw", "violations": (cdam.FieldViolation("image.raw", "too small"),)},
        ),
        (
            grpc.StatusCode.NOT_FOUND,
            details.ResourceInfo(resource_type="cdam.v1.output", resource_name="unicorn"),
            cdam.NotFound,
            {"kind": "output", "name": "unicorn"},
        ),
        (
            grpc.StatusCode.ALREADY_EXISTS,
            details.ResourceInfo(resource_type="cdam.v1.concept", resource_name="fur"),
            cdam.AlreadyExists,
            {"kind": "concept", "name": "fur"},
        ),
        (
            grpc.StatusCode.FAILED_PRECONDITION,
            details.ErrorInfo(reason="METHOD_UNSUPPORTED", metadata={"method": "cdam"}),
            cdam.FailedPrecondition,
            {"reason": "METHOD_UNSUPPORTED", "metadata": {"method": "cdam"}},
        ),
        (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            details.ErrorInfo(reason="OUT_OF_MEMORY"),
            cdam.ResourceExhausted,
            {"reason": "OUT_OF_MEMORY"},
        ),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, _retry(1.25), cdam.Overloaded, {"retry_after": 1.25}),
        (grpc.StatusCode.UNAVAILABLE, _retry(2), cdam.Unavailable, {"retry_after": 2.0}),
        (
            grpc.StatusCode.UNIMPLEMENTED,
            details.ErrorInfo(reason="NOT_YET"),
            cdam.Unimplemented,
            {"reason": "NOT_YET"},
        ),
        (grpc.StatusCode.UNAUTHENTICATED, details.ErrorInfo(), cdam.Unauthenticated, {}),
        (grpc.StatusCode.PERMISSION_DENIED, details.ErrorInfo(), cdam.PermissionDenied, {}),
        (
            grpc.StatusCode.INTERNAL,
            details.ErrorInfo(reason="INTERNAL", metadata={"error_id": "e77"}),
            cdam.Internal,
            {"error_id": "e77"},
        ),
        (grpc.StatusCode.ABORTED, details.ErrorInfo(reason="RACE"), cdam.Aborted, {"reason": "RACE"}),
        (
            grpc.StatusCode.ABORTED,
            details.ErrorInfo(reason="VERSION_MISMATCH", metadata={"current_version": "3"}),
            cdam.VersionMismatch,
            {"reason": "VERSION_MISMATCH", "current_version": 3},
        ),
        (
            grpc.StatusCode.ABORTED,
            details.ErrorInfo(reason="VERSION_MISMATCH"),
            cdam.VersionMismatch,
            {"current_version": None},
        ),
        (grpc.StatusCode.DATA_LOSS, details.ErrorInfo(), cdam.RpcError, {}),
    ],
)
def test_errors_carry_what_the_server_said(
    script: Script, call: Call, code: grpc.StatusCode, detail: Any, kind: type[cdam.RpcError], said: dict[str, Any]
) -> None:
    script.failures = [Failure(code, "so it is", [detail, details.RequestInfo(request_id="r1")])]
    with pytest.raises(cdam.RpcError) as caught:
        call(script.address, "model", settings={"retries": 0})
    error = caught.value
    assert type(error) is kind
    assert (error.code, error.message, str(error), error.request_id) == (code, "so it is", "so it is", "r1")
    assert {name: getattr(error, name) for name in said} == said
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert vars(again) == vars(error)


def test_broken_details_leave_code_and_message(script: Script, call: Call) -> None:
    script.failures = [Failure(grpc.StatusCode.NOT_FOUND, trailers=(("grpc-status-details-bin", b"\xff\xff"),))]
    with pytest.raises(cdam.NotFound, match="as told") as caught:
        call(script.address, "model")
    assert caught.value.name == ""


def test_importing_the_client_brings_in_only_its_dependencies() -> None:
    code = """
import sys, cdam
roots = {name.partition('.')[0] for name in sys.modules}
heavy = roots & {'torch', 'timm', 'torchvision', 'cdam_server', 'cdam_engine', 'pydantic', 'structlog', 'click'}
heavy |= roots & {'safetensors', 'prometheus_client', 'scipy', 'matplotlib'}  # grpc itself looks for grpc_health and its like
sys.exit(', '.join(heavy) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_commands_do_without_torch() -> None:
    code = "import sys, cdam_cli.explain, cdam_cli.models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_waits_for_an_event_loop_is_not_for_the_client_that_blocks() -> None:
    with pytest.raises(RuntimeError, match="suspended"):
        run(asyncio.sleep(0))
