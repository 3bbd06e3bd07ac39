# ruff: noqa: N802 - the generated base class sets names
"""A server of the API without a model: it does what a test tells it, and remembers what it was asked."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import status_pb2

from cdam.v1 import common_pb2, explain_pb2, explainer_service_pb2_grpc, model_pb2, target_pb2

GRID = 2, 3


@dataclass
class Failure:
    """A status to answer with, and its details."""

    code: grpc.StatusCode
    message: str = "as told"
    details: Sequence[Message] = ()
    trailers: tuple[tuple[str, str | bytes], ...] = ()


@dataclass
class Script(explainer_service_pb2_grpc.ExplainerServiceServicer):
    """What to do, call by call, and what was asked."""

    failures: list[Failure] = field(default_factory=list)  # each fails one call
    requests: list[Any] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    seconds_left: list[float] = field(default_factory=list)
    delay: float = 0.0
    address: str = ""

    def Explain(self, request: Any, context: Any) -> Any:
        self._heed(request, context)
        return answer(request)

    def ListModels(self, request: Any, context: Any) -> Any:
        self._heed(request, context)
        first = not request.page_token
        return model_pb2.ListModelsResponse(
            models=[model("first", is_default=True) if first else model("second")],
            next_page_token="more" if first else "",
        )

    def GetModel(self, request: Any, context: Any) -> Any:
        self._heed(request, context)
        return model_pb2.GetModelResponse(model=model(request.name or "first"))

    def _heed(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.seconds_left.append(context.time_remaining())
        time.sleep(self.delay)
        if self.failures:
            fail(context, self.failures.pop(0))


def fail(context: Any, failure: Failure) -> None:
    """End a call with a status and google.rpc details."""
    status = status_pb2.Status(code=failure.code.value[0], message=failure.message)
    for detail in failure.details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    details = (("grpc-status-details-bin", status.SerializeToString()),) if failure.details else ()
    context.set_trailing_metadata((*details, *failure.trailers))
    context.abort(failure.code, failure.message)


def scores(seed: int) -> np.ndarray:
    """The map that `answer` gives to the seed-th pair of method and target."""
    return np.random.default_rng(seed).standard_normal(GRID).astype(np.float32)


def tensor(array: np.ndarray) -> common_pb2.FloatTensor:
    return common_pb2.FloatTensor(shape=array.shape, data=array.astype("<f4").tobytes())


def answer(request: explain_pb2.ExplainRequest) -> explain_pb2.ExplainResponse:
    """An answer such as a server gives: made-up scores, all fields set, an image of 60 x 40 pixels."""
    response = explain_pb2.ExplainResponse(
        request_id=request.request_id or "made",
        model=request.model or "first",
        model_fingerprint="f00d",
        geometry=explain_pb2.MapGeometry(
            patch_grid=common_pb2.Size(height=GRID[0], width=GRID[1]),
            region=common_pb2.Region(left=0, top=0, right=60, bottom=40),
            image_size=common_pb2.Size(height=40, width=60),
            input_size=common_pb2.Size(height=32, width=48),
        ),
        token_cache_hit=True,
    )
    response.timing.total.FromMilliseconds(12)
    response.timing.trunk.FromMilliseconds(1500)
    response.timing.batch_size = 4
    for index, target in enumerate(request.targets):
        if target.WhichOneof("kind") != "top_k":
            _add(response, target, index)
        for rank in range(target.top_k.k):
            _add(response, target_pb2.Target(output=target_pb2.OutputTarget(index=rank)), index)
    for method in range(max(len(request.methods), 1)):
        for target in range(len(response.targets)):
            response.maps.add(method_index=method, target_index=target, scores=tensor(scores(len(response.maps))))
    return response


def _add(response: explain_pb2.ExplainResponse, target: target_pb2.Target, index: int) -> None:
    output = target.output
    label = output.name or str(output.index) if target.WhichOneof("kind") == "output" else "concept"
    explained = response.targets.add(target=target, request_index=index, label=label, value=1.5 + len(response.targets))
    if target.WhichOneof("kind") == "output":
        explained.output_index, explained.probability = output.index, 0.25


def model(name: str, *, is_default: bool = False) -> model_pb2.Model:
    return model_pb2.Model(
        name=name,
        is_default=is_default,
        architecture="vit_tiny",
        fingerprint="f00d",
        task=model_pb2.TASK_MULTI_CLASS,
        output_names=["cat", "dog"],
        output_count=2,
        input_size=common_pb2.Size(height=32, width=48),
        patch_size=common_pb2.Size(height=16, width=16),
        patch_grid=common_pb2.Size(height=2, width=3),
        prefix_tokens=1,
        latent_size=8,
        readout=model_pb2.READOUT_CLS_TOKEN,
        precision=model_pb2.PRECISION_FP32,
        methods=[
            model_pb2.MethodSupport(method="METHOD_KIND_CDAM", supported=True),
            model_pb2.MethodSupport(method="METHOD_KIND_SMOOTH_CDAM", reason="not yet"),
        ],
    )


@contextmanager
def serving(script: Script, address: str = "127.0.0.1:0", credentials: Any = None) -> Iterator[Script]:
    """A server that follows the script; its address is the script's."""
    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", -1)])
    explainer_service_pb2_grpc.add_ExplainerServiceServicer_to_server(script, server)
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    script.address = address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"
    server.start()
    try:
        yield script
    finally:
        server.stop(None).wait()
