"""The clients: one that blocks, one for asyncio. They differ in how they wait, and in nothing else."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import grpc.aio

from cdam import _flow, _lines
from cdam._channel import TLS, MetadataLike, checked_timeout, connection
from cdam._encode import Priority, Resize, encode_explain
from cdam._errors import DeadlineExceeded, error_from_rpc
from cdam._explanation import Explanation
from cdam._flow import Call, Flow
from cdam._images import ImageLike
from cdam._methods import MethodLike, as_methods
from cdam._models import Model
from cdam._stream import PATH, Common, Item, ItemResult, explain_stream, wrapped
from cdam._targets import TargetLike, as_targets
from cdam._version import __version__
from cdam.v1 import explain_pb2

T = TypeVar("T")


class _BaseClient:
    """What both clients know; each of them runs flows."""

    def __init__(
        self,
        address: str = "localhost:8001",
        *,
        timeout: float = 30.0,
        token: str | None = None,
        tls: TLS | bool | None = None,
        metadata: MetadataLike = (),
        max_message_bytes: int = 64 * 1024 * 1024,
        retries: int = 4,
        allow_plaintext_token: bool = False,
    ) -> None:
        """Prepare to talk to a server; the connection is made by the first call.

        Args:
            address: host:port; dns:///host:port to spread calls over all addresses of a name; unix:/path; or whatever
                else grpc takes.
            timeout: Seconds that a call may take, retries included, unless the call says otherwise.
            token: Sent as ``authorization: Bearer``; never in plaintext to another machine.
            tls: True, or `TLS` with certificates of one's own; None: plaintext.
            metadata: Further headers of every call.
            max_message_bytes: Largest request and answer.
            retries: How often a call is repeated when the server is unavailable, 0 to 4.
            allow_plaintext_token: Send the token in plaintext all the same, where something else encrypts.

        Raises:
            ValueError: if something of it can't be, or a token would travel in plaintext to another machine.
            OSError: if a certificate can't be read.
        """
        self._connection = connection(
            address,
            timeout=timeout,
            token=token,
            tls=tls,
            metadata=metadata,
            max_message_bytes=max_message_bytes,
            retries=retries,
            allow_plaintext_token=allow_plaintext_token,
            user_agent=f"cdam-python/{__version__}",
        )
        self._credentials = self._connection.tls.credentials() if self._connection.tls else None
        self._max_message_bytes = max_message_bytes
        self._closed = False
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._connection.address!r})"

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this client is closed")

    def _deadline(self, timeout: float | None) -> float:
        return time.monotonic() + (self._connection.timeout if timeout is None else checked_timeout(timeout))

    def _arguments(self, call: Call, deadline: float) -> dict[str, Any]:
        """What grpc is told about a call that must be answered by the deadline."""
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise DeadlineExceeded("the timeout passed", code=grpc.StatusCode.DEADLINE_EXCEEDED)
        return {"timeout": remaining, "metadata": self._connection.metadata, "wait_for_ready": call.patient or None}

    def _common(
        self,
        items: object,
        targets: TargetLike | Sequence[TargetLike],
        methods: MethodLike | Sequence[MethodLike],
        **settings: Any,
    ) -> Common:
        """What is asked of a stream's items in common, checked before the first of them."""
        if isinstance(items, str | bytes | bytearray | memoryview):
            raise TypeError("a stream takes several images: put a single one in a list, or explain it alone")
        common = {"max_message_bytes": self._max_message_bytes, **settings}
        return Common(targets=as_targets(targets), methods=as_methods(methods), **common)

    def _start_stream(self, channel: Any, requests: Any, deadline: float | None) -> Any:
        """A call of ExplainStream on a channel of either kind."""
        remaining = None if deadline is None else deadline - time.monotonic()
        if remaining is not None and remaining <= 0:
            raise DeadlineExceeded("the timeout passed", code=grpc.StatusCode.DEADLINE_EXCEEDED)
        call = channel.stream_stream(PATH, wrapped, explain_pb2.ExplainStreamResponse.FromString)
        return call(requests, timeout=remaining, metadata=self._connection.metadata)


class Client(_BaseClient):
    """A client that blocks. Threads may share it.

    with cdam.Client("localhost:8001") as client:
        explanation = client.explain("scene.png", "7")
        explanation["7"].overlay().save("seven.png")
    """

    _channel: grpc.Channel | None = None

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
            targets: One or several of: an output's index (int) or name (str), `Output`, `TopK`, `Concept`, `Contrast`;
                may be left out if no method needs one.
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
        request = encode_explain(
            image,
            targets,
            methods=methods,
            model=model,
            resize=resize,
            input_size=input_size,
            request_id=request_id,
            priority=priority,
        )
        return self._run(_flow.explain(request, as_methods(methods)), timeout)

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
        common = self._common(
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
        deadline = None if timeout is None else self._deadline(timeout)
        line = _lines.Line(lambda requests: self._start_stream(self._open(), requests, deadline))
        return _lines.run(explain_stream(common), iter(items), line)

    def models(self, *, timeout: float | None = None) -> tuple[Model, ...]:
        """The models that the server has loaded, default first."""
        return self._run(_flow.models(), timeout)

    def model(self, name: str = "", *, timeout: float | None = None) -> Model:
        """One model; without a name, the default one."""
        return self._run(_flow.model(name), timeout)

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Return when the server answers that it serves.

        Raises:
            DeadlineExceeded: if it doesn't in time.
        """
        self._run(_flow.wait_until_ready(), timeout)

    def close(self) -> None:
        """Close the connection, for good; calls under way fail."""
        with self._lock:
            self._closed = True
            if self._channel is not None:
                self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> grpc.Channel:
        with self._lock:
            self._check_open()
            if self._channel is None:
                its = self._connection
                if self._credentials is None:
                    self._channel = grpc.insecure_channel(its.address, its.options)
                else:
                    self._channel = grpc.secure_channel(its.address, self._credentials, its.options)
            return self._channel

    def _run(self, flow: Flow[T], timeout: float | None) -> T:
        deadline = self._deadline(timeout)
        channel = self._open()
        try:
            step = next(flow)
            while True:
                if isinstance(step, Call):
                    call: grpc.UnaryUnaryMultiCallable[bytes, Any] = channel.unary_unary(step.path, None, step.decode)
                    try:
                        answer = call(step.request, **self._arguments(step, deadline))
                    except grpc.RpcError as error:
                        step = flow.throw(error_from_rpc(error))
                    else:
                        step = flow.send(answer)
                else:
                    time.sleep(step.seconds)
                    step = flow.send(None)
        except StopIteration as end:
            result: T = end.value
            return result


class AsyncClient(_BaseClient):
    """A client for asyncio: the methods of `Client`, to be awaited. It belongs to the event loop of its first call.

    async with cdam.AsyncClient("localhost:8001") as client:
        explanation = await client.explain("scene.png", "7")
    """

    _channel: grpc.aio.Channel | None = None

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
        timeout: float | None = None,  # noqa: ASYNC109 - it travels to the server as the call's deadline
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
        )
        return await self._run(_flow.explain(request, as_methods(methods)), timeout)

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
        common = self._common(
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
        deadline = None if timeout is None else self._deadline(timeout)
        line = _lines.AsyncLine(lambda requests: self._start_stream(self._open(), requests, deadline))
        return _lines.run_async(explain_stream(common), _lines.each(items), line)

    async def models(self, *, timeout: float | None = None) -> tuple[Model, ...]:  # noqa: ASYNC109 - as above
        """As `Client.models`."""
        return await self._run(_flow.models(), timeout)

    async def model(self, name: str = "", *, timeout: float | None = None) -> Model:  # noqa: ASYNC109 - as above
        """As `Client.model`."""
        return await self._run(_flow.model(name), timeout)

    async def wait_until_ready(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as above
        """As `Client.wait_until_ready`."""
        await self._run(_flow.wait_until_ready(), timeout)

    async def close(self) -> None:
        """Close the connection, for good; calls under way fail."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _open(self) -> grpc.aio.Channel:
        self._check_open()
        if self._channel is None:
            its = self._connection
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(its.address, its.options)
            else:
                self._channel = grpc.aio.secure_channel(its.address, self._credentials, its.options)
        return self._channel

    async def _run(self, flow: Flow[T], timeout: float | None) -> T:  # noqa: ASYNC109 - as above
        deadline = self._deadline(timeout)
        channel = self._open()
        try:
            step = next(flow)
            while True:
                if isinstance(step, Call):
                    call: grpc.aio.UnaryUnaryMultiCallable[bytes, Any] = channel.unary_unary(
                        step.path, None, step.decode
                    )
                    try:
                        answer = await call(step.request, **self._arguments(step, deadline))
                    except grpc.RpcError as error:
                        step = flow.throw(error_from_rpc(error))
                    else:
                        step = flow.send(answer)
                else:
                    await asyncio.sleep(step.seconds)
                    step = flow.send(None)
        except StopIteration as end:
            result: T = end.value
            return result
