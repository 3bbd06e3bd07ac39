"""The client that blocks."""

import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from cdam import _calls
from cdam._base import BaseClient
from cdam._blocking import BlockingTransport, iterate, run
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
from cdam._outcome import Evaluation
from cdam._targets import Concept, TargetLike
from cdam.v1 import concept_pb2


class Client(BaseClient):
    """A client that blocks. Threads may share it.

    with cdam.Client("localhost:8001") as client:
        explanation = client.explain("scene.png", "7")
        explanation["7"].overlay().save("seven.png")
    """

    _transport_kind = BlockingTransport

    def explain(
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
        """Explain one image: every method for every target.

        Args:
            image: A path, an encoded file's bytes, a PIL image, or uint8 pixels of shape (H, W), (H, W, 1), (H, W, 3).
            targets: One or several of: an output's index (int) or name (str), `Output`, `TopK`, `Concept`,
                `RegisteredConcept`, `Contrast`; may be left out if no method needs one.
            methods: One or several of this package's method classes, or their names ("smooth_cdam"); empty: CDAM.
            model: Name of the model; empty: the server's default.
            resize: "model": as the model was evaluated, mostly the centre; "squash": all of the image, stretched;
                None: the model's own way.
            input_size: (height, width) in pixels, where the model is flexible; None: its own.
            request_id: The caller's name for this request; empty: the server makes one.
            priority: "low", "normal" or "high"; None: normal.
            timeout: Seconds, retries included; None: the client's.

        Raises:
            RpcError: one of its kinds, if the server refuses or can't be reached.
            ImageError: if the image is none.
            OSError: if a path can't be read.
            ValueError, TypeError: if an argument can't be encoded.
        """
        explanation = self._explain(
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
        return run(explanation)

    def explain_stream(
        self,
        items: Iterable[Item | ImageLike],
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
    ) -> Generator[ItemResult, None, None]:
        """Explain many images, for as long as they come.

        Results come as soon as they are there, in any order, one for each item. An item that fails, be it that its
        file can't be read or that the server refuses it, fails alone. When the server goes down or the connection is
        lost, the stream goes on by itself with what is not answered yet. Leaving the loop early cancels the rest.

        Args:
            items: Images, or `Item` for those with targets, methods or a key of their own. They are taken as they are
                needed, in this thread.
            targets: As for `explain`.
            methods: As for `explain`.
            model: As for `explain`.
            resize: As for `explain`.
            input_size: As for `explain`.
            priority: As for `explain`; "low" lets other callers' requests go first.
            window: Most items that are taken and not yet answered. It bounds memory; a server that works on more
                items at once than this would wait for some.
            retries: How often in a row, without a result in between, a broken stream is taken up again; 10 times take
                about 25 seconds.
            timeout: Seconds for the whole stream; None: as long as it takes.

        Raises:
            RpcError: one of its kinds, if the stream as a whole fails; from the iteration.
            ValueError, TypeError: if an argument can't be encoded.
        """
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
        samples: Iterable[Sample],
        *,
        methods: EvaluatedLike | Sequence[EvaluatedLike],
        metrics: MetricLike | Sequence[MetricLike],
        model: str = "",
        seed: int = 0,
        resize: Resize | None = None,
        input_size: tuple[int, int] | None = None,
        servers: Sequence["str | Client"] = (),
        window: int = 32,
        retries: int = 10,
        bootstrap_resamples: int = 1000,
        expected_samples: int | None = None,
        progress: Callable[[EvaluationProgress], object] | None = None,
        timeout: float | None = None,
    ) -> Evaluation:
        """Measure how true explanations are, over many images.

        Results come as soon as they are there, in any order, one for each sample; the evaluation's `table` says what those
        so far come to. A sample that fails fails alone. When a server goes down or a connection is lost, the evaluation
        goes on by itself with what is not answered yet, and comes to the same table. Leaving the loop early and closing
        the evaluation cancels the rest.

            with client.evaluate(samples, methods=["cdam", "attention", "random"], metrics="fidelity") as evaluation:
                for result in evaluation:
                    print(result.id, result.error or len(result.values))
            print(evaluation.table)

        Args:
            samples: `Sample`s, each with an id of its own. They are taken as they are needed, in this thread.
            methods: What to compare: methods as for `explain`, and anchors ("random", "mask", "inverted_mask").
            metrics: What to measure: one or several of this package's metric classes, or their names ("fidelity").
            model: As for `explain`.
            seed: Of all randomness. With a sample's id it fixes every draw, whatever the order or the servers.
            resize: As for `explain`.
            input_size: As for `explain`.
            servers: Further servers of the same model, that share the samples: addresses, reached with this client's
                settings, or clients. Each has as many samples as it answers in time.
            window: Most samples of a server that are taken and not yet answered. It bounds memory.
            retries: How often in a row, without a result in between, broken streams are taken up again; 10 times take
                about 25 seconds. One of several servers may stay away for longer.
            bootstrap_resamples: Resamples for the table's intervals.
            expected_samples: How many there will be, for the estimate of the time left; None: their len(), if they have it.
            progress: Called after each result.
            timeout: Seconds for the whole evaluation; None: as long as it takes.

        Raises:
            RpcError: one of its kinds, if the evaluation as a whole fails, `FailedPrecondition` if servers differ in
                their models; from the iteration.
            ValueError, TypeError: if an argument can't be encoded.
        """
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
        return Evaluation(iterate(results), job, progress)

    def models(self, *, timeout: float | None = None) -> tuple[Model, ...]:
        """The models that the server has loaded, default first."""
        return run(_calls.models(self._calls(timeout)))

    def model(self, name: str = "", *, timeout: float | None = None) -> Model:
        """One model; without a name, the default one."""
        return run(_calls.model(self._calls(timeout), name))

    def register_concept(
        self,
        name: str,
        examples: Iterable[ImageLike] = (),
        *,
        negatives: Iterable[ImageLike] = (),
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
        """Register a concept: of example images the mean latent, or a vector as it is.

        The result may be given as a target, and `Concept(name)` finds its newest version. To register the same content
        again is harmless. Many images travel with flow control and a few at a time in memory. If the server goes down or
        the connection is lost, they are sent again, unless they came from an iterator, which can't begin again, of
        anything but paths.

        Args:
            name: 1 to 128 of letters, digits, '.', '_' and '-'; unique within a model.
            examples: Images that show the concept, as for `explain`; taken one at a time, in this thread. Files travel
                as they are: the digest of their bytes is part of the concept's id.
            negatives: Images that don't; if given, the vector is the difference of the means.
            vector: The vector itself, length `Model.latent_size`, in place of images.
            model: Name of the model; empty: the server's default.
            description: For people.
            labels: For finding it again.
            resize: How the images are brought to the model's input; as for `explain`.
            input_size: As for `explain`.
            replace: If the name has other content: True makes a new version, False raises `AlreadyExists`.
            expected_version: Only if the name's newest version is this one, 0 for a free name; else `VersionMismatch`.
            model_fingerprint: Only if the model has this fingerprint; else `FailedPrecondition`.
            timeout: Seconds, retries and the taking of images included; None: the client's for what fits into one
                message, and as long as it takes for more.
            retries: How often in a row a broken upload is taken up again; 10 times take about 25 seconds. What fits into one
                message has the client's.
            progress: Called with the number of images sent so far; it begins again if a broken stream does.

        Returns:
            The concept; `created` says whether it is new.

        Raises:
            RpcError: one of its kinds, if the server refuses or can't be reached.
            ImageError: if an image is none.
            OSError: if a path can't be read.
            ValueError, TypeError: if an argument can't be encoded.
        """
        registering = self._register(
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
        return run(registering)

    def concept(
        self,
        name: str | None = None,
        *,
        id: str | None = None,  # noqa: A002 - the API's name for it
        model: str = "",
        timeout: float | None = None,
    ) -> RegisteredConcept:
        """One concept with its vector: the newest version of a name, or the version of an id.

        Args:
            name: Its name.
            id: Or its id; of several names or versions with this content, the one registered last.
            model: For a name: its model; empty: the server's default.
            timeout: Seconds, retries included; None: the client's.

        Raises:
            NotFound: if there is none.
            RpcError: one of its kinds, if the server can't be reached.
            ValueError: if neither name nor id is given, or both are.
        """
        return run(_calls.concept(self._calls(timeout), name, id, model))

    def concepts(
        self,
        *,
        model: str = "",
        labels: Mapping[str, str] | None = None,
        page_size: int = 0,
        timeout: float | None = None,
    ) -> Generator[RegisteredConcept, None, None]:
        """The newest version of every concept, by model and name, without vectors; asked for a page at a time.

        Args:
            model: Only concepts of this model; empty: of all.
            labels: Only concepts that have all these labels.
            page_size: Most concepts a page; 0: the server's choice.
            timeout: Seconds for each page, retries included; None: the client's.

        Raises:
            RpcError: one of its kinds, if the server can't be reached; from the iteration.
        """
        request = concept_pb2.ListConceptsRequest(model=model, labels=labels, page_size=whole(page_size, "page_size"))
        while True:
            page, request.page_token = run(_calls.concept_page(self._calls(timeout), request))
            yield from page
            if not request.page_token:
                return

    def delete_concept(
        self, name: str, *, model: str = "", expected_version: int | None = None, timeout: float | None = None
    ) -> RegisteredConcept:
        """Free a concept's name; its versions stay readable by id.

        Args:
            name: Its name.
            model: Its model; empty: the server's default.
            expected_version: Only if the newest version is this one; else `VersionMismatch`.
            timeout: Seconds, retries included; None: the client's.

        Returns:
            The version that was the newest.

        Raises:
            NotFound: if there is none.
            RpcError: one of its kinds, if the server refuses or can't be reached.
        """
        return run(_calls.delete_concept(self._calls(timeout), name, model, expected_version))

    def export_concept(
        self,
        concept: str | Concept | RegisteredConcept,
        path: str | os.PathLike[str],
        *,
        model: str = "",
        timeout: float | None = None,
    ) -> Path:
        """Write a concept to a ``.safetensors`` file, for `import_concept` on another server.

        Args:
            concept: Its name, or a concept by name or id, or one that this client gave.
            path: The file; one that is there already is replaced.
            model: For a name: its model; empty: the server's default.
            timeout: Seconds, retries included; None: the client's.

        Returns:
            The file.

        Raises:
            NotFound: if there is none.
            RpcError: one of its kinds, if the server can't be reached.
            OSError: if the file can't be written.
        """
        return run(_calls.export_concept(self._calls(timeout), concept, model, path))

    def import_concept(
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
        """Register a concept from another server of the same model.

        It has the id that it has there if this server has seen the same images, else one of its own.

        Args:
            source: A file that `export_concept` wrote, or a concept that `load_concept` or a client gave.
            name: Its name here; None: the same.
            model: The model's name here; empty: whichever has the concept's fingerprint.
            description: None: the same.
            labels: None: the same.
            replace: As for `register_concept`.
            expected_version: As for `register_concept`.
            timeout: Seconds, retries included; None: the client's.

        Raises:
            ConceptFileError: if the file is none, or damaged.
            FailedPrecondition: if it is of another model.
            RpcError: one of its kinds, if the server refuses or can't be reached.
            OSError: if the file can't be read.
        """
        imported = _calls.import_concept(
            self._calls(timeout),
            source,
            name=name,
            model=model,
            description=description,
            labels=labels,
            replace=replace,
            expected_version=expected_version,
        )
        return run(imported)

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Return when the server answers that it serves.

        Raises:
            DeadlineExceeded: if it doesn't in time.
        """
        run(_calls.wait_until_ready(self._calls(timeout)))

    def close(self) -> None:
        """Close the connection, for good; calls under way fail."""
        run(self._transport.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
