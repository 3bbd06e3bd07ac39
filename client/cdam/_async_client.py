"""The client for asyncio: it differs from the one that blocks in how it waits, and in nothing else."""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self, TypeVar

import grpc
import grpc.aio
from numpy.typing import NDArray

from cdam import _flow, _lines, _uploads
from cdam._base import BaseClient, concept_request, import_spec
from cdam._concept_file import load_concept, save_concept
from cdam._concepts import RegisteredConcept
from cdam._encode import Priority, Resize, encode_explain
from cdam._errors import RpcError, error_from_rpc
from cdam._evaluation import EvaluationProgress, Sample
from cdam._explanation import Explanation
from cdam._flow import Call, Flow
from cdam._images import ImageLike
from cdam._items import Item, ItemResult
from cdam._methods import MethodLike, as_methods
from cdam._metrics import EvaluatedLike, MetricLike
from cdam._models import Model
from cdam._numbers import whole
from cdam._outcome import AsyncEvaluation
from cdam._register import PATH as UPLOAD_PATH
from cdam._register import Images, register
from cdam._stream import stream
from cdam._targets import Concept, TargetLike, as_targets
from cdam.v1 import concept_pb2

T = TypeVar("T")


class AsyncClient(BaseClient):
    """A client for asyncio: the methods of `Client`, to be awaited.

    It may be used from one event loop after another, or from several at once: each has a connection of its own.

    async with cdam.AsyncClient("localhost:8001") as client:
        explanation = await client.explain("scene.png", "7")
    """

    _blocking = False
    # grpc.aio's channels belong to the loop in which they were made.
    _channels: Mapping[asyncio.AbstractEventLoop, grpc.aio.Channel] = MappingProxyType({})

    async def explain(
        self,
        image: ImageLike,
        targets: TargetLike | Sequence[TargetLike] = (),
        *,
        methods: MethodLike | Sequence[MethodLike] = (),
        model: str = "",
        resize: Resize | None = None,
        input_size: tuple[int, int] | None = None,
        request_id: str = "",
        priority: Priority | None = None,
        timeout: float | None = None,
    ) -> Explanation:
        """As `Client.explain`."""
        request = await asyncio.to_thread(  # it may read a file
            encode_explain,
            image,
            targets,
            methods=methods,
            model=model,
            resize=resize,
            input_size=input_size,
            request_id=request_id,
            priority=priority,
            max_message_bytes=self._max_message_bytes,
        )
        return await self._run(_flow.explain(request, as_methods(methods), as_targets(targets)), timeout)

    def explain_stream(
        self,
        items: Iterable[Item | ImageLike] | AsyncIterable[Item | ImageLike],
        targets: TargetLike | Sequence[TargetLike] = (),
        *,
        methods: MethodLike | Sequence[MethodLike] = (),
        model: str = "",
        resize: Resize | None = None,
        input_size: tuple[int, int] | None = None,
        priority: Priority | None = None,
        window: int = 64,
        retries: int = 10,
        timeout: float | None = None,
    ) -> AsyncGenerator[ItemResult, None]:
        """As `Client.explain_stream`; to leave the loop early, close the generator: `contextlib.aclosing` does."""
        job = self._items(
            items,
            targets,
            methods,
            model=model,
            resize=resize,
            input_size=input_size,
            priority=priority,
            window=window,
            retries=retries,
        )
        return _lines.run_async(stream(job), _lines.each(items), _lines.AsyncLines([self._line(job, timeout)]))

    def evaluate(
        self,
        samples: Iterable[Sample] | AsyncIterable[Sample],
        *,
        methods: EvaluatedLike | Sequence[EvaluatedLike],
        metrics: MetricLike | Sequence[MetricLike],
        model: str = "",
        seed: int = 0,
        resize: Resize | None = None,
        input_size: tuple[int, int] | None = None,
        servers: Sequence["str | AsyncClient"] = (),
        window: int = 32,
        retries: int = 10,
        bootstrap_resamples: int = 1000,
        expected_samples: int | None = None,
        progress: Callable[[EvaluationProgress], object] | None = None,
        timeout: float | None = None,
    ) -> AsyncEvaluation:
        """As `Client.evaluate`; to leave the loop early, close the evaluation: ``async with`` does."""
        job, starts, made = self._evaluate(
            samples,
            servers,
            timeout,
            expected_samples,
            methods=methods,
            metrics=metrics,
            model=model,
            seed=seed,
            resize=resize,
            input_size=input_size,
            window=window,
            retries=retries,
            bootstrap_resamples=bootstrap_resamples,
        )
        lines = _lines.AsyncLines(starts)
        return AsyncEvaluation(
            _closing(_lines.run_async(stream(job), _lines.each(samples), lines), made), job, progress
        )

    async def models(self, *, timeout: float | None = None) -> tuple[Model, ...]:
        """As `Client.models`."""
        return await self._run(_flow.models(), timeout)

    async def model(self, name: str = "", *, timeout: float | None = None) -> Model:
        """As `Client.model`."""
        return await self._run(_flow.model(name), timeout)

    async def register_concept(
        self,
        name: str,
        examples: Images = (),
        *,
        negatives: Images = (),
        vector: Sequence[float] | NDArray[Any] | None = None,
        model: str = "",
        description: str = "",
        labels: Mapping[str, str] | None = None,
        resize: Resize | None = None,
        input_size: tuple[int, int] | None = None,
        replace: bool = False,
        expected_version: int | None = None,
        model_fingerprint: str = "",
        timeout: float | None = None,
        retries: int = 10,
        progress: Callable[[int], object] | None = None,
    ) -> RegisteredConcept:
        """As `Client.register_concept`."""
        registration = self._registration(
            name,
            examples,
            negatives,
            retries,
            progress,
            vector=vector,
            model=model,
            description=description,
            labels=labels,
            resize=resize,
            input_size=input_size,
            replace=replace,
            expected_version=expected_version,
            model_fingerprint=model_fingerprint,
        )
        deadline = None if timeout is None else self._deadline(timeout)
        upload = _uploads.AsyncUpload(lambda: self._start_upload(deadline))
        return await _uploads.run_async(register(registration), lambda step: self._call(step, deadline), upload)

    async def concept(
        self,
        name: str | None = None,
        *,
        id: str | None = None,  # noqa: A002 - the API's name for it
        model: str = "",
        timeout: float | None = None,
    ) -> RegisteredConcept:
        """As `Client.concept`."""
        return await self._run(_flow.concept_of(concept_request(name, id, model)), timeout)

    async def concepts(
        self,
        *,
        model: str = "",
        labels: Mapping[str, str] | None = None,
        page_size: int = 0,
        timeout: float | None = None,
    ) -> AsyncGenerator[RegisteredConcept, None]:
        """As `Client.concepts`."""
        request = concept_pb2.ListConceptsRequest(model=model, labels=labels, page_size=whole(page_size, "page_size"))
        while True:
            page, request.page_token = await self._run(_flow.concept_page(request), timeout)
            for found in page:
                yield found
            if not request.page_token:
                return

    async def delete_concept(
        self,
        name: str,
        *,
        model: str = "",
        expected_version: int | None = None,
        timeout: float | None = None,
    ) -> RegisteredConcept:
        """As `Client.delete_concept`."""
        return await self._run(_flow.delete_concept(name, model, expected_version), timeout)

    async def export_concept(
        self,
        concept: str | Concept | RegisteredConcept,
        path: str | os.PathLike[str],
        *,
        model: str = "",
        timeout: float | None = None,
    ) -> Path:
        """As `Client.export_concept`."""
        found = await self._run(_flow.whole_concept(concept, model), timeout)
        return await asyncio.to_thread(save_concept, found, path)

    async def import_concept(
        self,
        source: str | os.PathLike[str] | RegisteredConcept,
        *,
        name: str | None = None,
        model: str = "",
        description: str | None = None,
        labels: Mapping[str, str] | None = None,
        replace: bool = False,
        expected_version: int | None = None,
        timeout: float | None = None,
    ) -> RegisteredConcept:
        """As `Client.import_concept`."""
        found = source if isinstance(source, RegisteredConcept) else await asyncio.to_thread(load_concept, source)
        changes = {"replace": replace, "expected_version": expected_version}
        spec = import_spec(found, name, model, description=description, labels=labels, **changes)
        return await self._run(_flow.import_concept(spec, found.model), timeout)

    async def wait_until_ready(self, timeout: float | None = None) -> None:
        """As `Client.wait_until_ready`."""
        await self._run(_flow.wait_until_ready(), timeout)

    async def close(self) -> None:
        """Close the connections, for good; calls under way fail."""
        with self._lock:
            self._closed = True
            channels, self._channels = self._channels, {}
        for loop, channel in channels.items():
            if loop is asyncio.get_running_loop():
                await channel.close()
            elif loop.is_running():  # in another thread
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(channel.close(), loop))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _open(self) -> grpc.aio.Channel:
        loop = asyncio.get_running_loop()
        with self._lock:
            self._check_open()
            if loop not in self._channels:
                its = self._connection
                if self._credentials is None:
                    channel = grpc.aio.insecure_channel(its.address, its.options)
                else:
                    channel = grpc.aio.secure_channel(its.address, self._credentials, its.options)
                others = {at: other for at, other in self._channels.items() if not at.is_closed()}
                self._channels = {**others, loop: channel}
            return self._channels[loop]

    def _start_upload(self, deadline: float | None) -> Any:
        call: grpc.aio.StreamUnaryMultiCallable[bytes, Any] = self._open().stream_unary(
            UPLOAD_PATH, None, concept_pb2.ConceptRegisterStreamResponse.FromString
        )
        return call(**self._upload_arguments(deadline))

    async def _run(self, flow: Flow[T], timeout: float | None) -> T:
        deadline = self._deadline(timeout)
        try:
            step = next(flow)
            while True:
                if isinstance(step, Call):
                    try:
                        answer = await self._call(step, deadline)
                    except RpcError as error:
                        step = flow.throw(error)
                    else:
                        step = flow.send(answer)
                else:
                    await asyncio.sleep(step.seconds)
                    step = flow.send(None)
        except StopIteration as end:
            result: T = end.value
            return result

    async def _call(self, step: Call, deadline: float | None) -> Any:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, Any] = self._open().unary_unary(step.path, None, step.decode)
        arguments = self._arguments(step, self._deadline(None) if deadline is None else deadline)
        try:
            return await call(step.request, **arguments)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error


async def _closing(results: AsyncGenerator[T, None], clients: Sequence[AsyncClient]) -> AsyncGenerator[T, None]:
    """The results; after them the clients are closed."""
    try:
        async with aclosing(results):
            async for result in results:
                yield result
    finally:
        for client in clients:
            await client.close()
