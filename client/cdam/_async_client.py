"""The client for asyncio: it differs from the one that blocks in how it waits, and in nothing else."""

import os
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from cdam import _calls
from cdam._asyncio import AsyncTransport, iterate
from cdam._base import BaseClient
from cdam._concepts import RegisteredConcept
from cdam._encode import Priority, Resize
from cdam._evaluation import EvaluationProgress, Sample
from cdam._explanation import Explanation
from cdam._images import ImageLike
from cdam._items import Item, ItemResult
from cdam._methods import MethodLike
from cdam._metrics import EvaluatedLike, MetricLike
from cdam._models import Model
from cdam._numbers import whole
from cdam._outcome import AsyncEvaluation
from cdam._register import Images
from cdam._targets import Concept, TargetLike
from cdam.v1 import concept_pb2


class AsyncClient(BaseClient):
    """A client for asyncio: the methods of `Client`, to be awaited.

    It may be used from one event loop after another, or from several at once: each has a connection of its own.

    async with cdam.AsyncClient("localhost:8001") as client:
        explanation = await client.explain("scene.png", "7")
    """

    _transport_kind = AsyncTransport

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
        return await self._explain(
            image,
            targets,
            methods,
            timeout,
            model=model,
            resize=resize,
            input_size=input_size,
            request_id=request_id,
            priority=priority,
        )

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
        results = self._explain_stream(
            items,
            targets,
            methods,
            timeout,
            model=model,
            resize=resize,
            input_size=input_size,
            priority=priority,
            window=window,
            retries=retries,
        )
        return iterate(results)

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
        job, results = self._evaluate(
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
        return AsyncEvaluation(iterate(results), job, progress)

    async def models(self, *, timeout: float | None = None) -> tuple[Model, ...]:
        """As `Client.models`."""
        return await _calls.models(self._calls(timeout))

    async def model(self, name: str = "", *, timeout: float | None = None) -> Model:
        """As `Client.model`."""
        return await _calls.model(self._calls(timeout), name)

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
        return await self._register(
            name,
            examples,
            negatives,
            timeout,
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

    async def concept(
        self,
        name: str | None = None,
        *,
        id: str | None = None,  # noqa: A002 - the API's name for it
        model: str = "",
        timeout: float | None = None,
    ) -> RegisteredConcept:
        """As `Client.concept`."""
        return await _calls.concept(self._calls(timeout), name, id, model)

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
            page, request.page_token = await _calls.concept_page(self._calls(timeout), request)
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
        return await _calls.delete_concept(self._calls(timeout), name, model, expected_version)

    async def export_concept(
        self,
        concept: str | Concept | RegisteredConcept,
        path: str | os.PathLike[str],
        *,
        model: str = "",
        timeout: float | None = None,
    ) -> Path:
        """As `Client.export_concept`."""
        return await _calls.export_concept(self._calls(timeout), concept, model, path)

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
        return await _calls.import_concept(
            self._calls(timeout),
            source,
            name=name,
            model=model,
            description=description,
            labels=labels,
            replace=replace,
            expected_version=expected_version,
        )

    async def wait_until_ready(self, timeout: float | None = None) -> None:
        """As `Client.wait_until_ready`."""
        await _calls.wait_until_ready(self._calls(timeout))

    async def close(self) -> None:
        """Close the connections, for good; calls under way fail."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
