"""Streams of items, written once for both clients: what is sent, what is taken from the caller, what comes of it.

As in `cdam._flow`, the flow yields what is to be done and gets back what came of it.
"""

import random
import uuid
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import grpc

from cdam._decode import decode_explanation
from cdam._encode import Priority, Resize, encode_explain, enum_value
from cdam._errors import (
    CdamError,
    MalformedResponse,
    Overloaded,
    ResourceExhausted,
    RpcError,
    Unavailable,
    error_from_status,
)
from cdam._explanation import Explanation
from cdam._flow import SERVICE, Pause
from cdam._images import ImageLike
from cdam._methods import Method, MethodLike, as_methods
from cdam._targets import Target, TargetLike, as_targets
from cdam.v1 import common_pb2, explain_pb2

PATH = f"/{SERVICE}/ExplainStream"

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0
_WRAPPING = 16  # bytes that a request weighs more in a stream than alone, at most
_CODES = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True, eq=False)
class Item:
    """An image of a stream, with what is asked of it alone.

    Attributes:
        image: As for `Client.explain`.
        targets: As for `Client.explain`; None: those of the stream.
        methods: As for `Client.explain`; None: those of the stream.
        key: The caller's name for it, of any type, found again in its result; None: its position, from 0.
    """

    image: ImageLike
    targets: TargetLike | Sequence[TargetLike] | None = None
    methods: MethodLike | Sequence[MethodLike] | None = None
    key: Any = None


@dataclass(frozen=True, eq=False)
class ItemResult:
    """What came of one item of a stream: an explanation or an error.

    Attributes:
        key: The item's key, or its position, from 0, if it has none.
        explanation: None if it failed.
        error: Why it failed: what `Client.explain` would have raised for it. None if it did not.
    """

    key: Any
    explanation: Explanation | None = None
    error: Exception | None = None

    def result(self) -> Explanation:
        """The explanation.

        Raises:
            Exception: the item's error, if it failed.
        """
        if self.explanation is None:
            raise self.error or MalformedResponse("neither an explanation nor an error")
        return self.explanation


@dataclass(frozen=True, kw_only=True)
class Common:
    """What is asked of every item, and how the stream is run.

    Attributes:
        window: Most items that are taken and not yet answered.
        retries: How often in a row, without an answer in between, a broken stream is taken up again.
        max_message_bytes: Largest request.
    """

    targets: tuple[Target, ...]
    methods: tuple[Method, ...]
    model: str
    resize: Resize | None
    input_size: tuple[int, int] | None
    priority: Priority | None
    window: int
    retries: int
    max_message_bytes: int

    def __post_init__(self) -> None:
        # An item that can't be encoded fails alone; what is wrong for all of them is told before the first.
        enum_value(explain_pb2.Priority, "PRIORITY", self.priority)
        enum_value(common_pb2.ResizeMode, "RESIZE_MODE", self.resize)
        if self.window < 1 or self.retries < 0:
            raise ValueError(f"window is at least 1 and retries 0, got {self.window} and {self.retries}")


# --- what a client is asked to do


@dataclass(frozen=True)
class Open:
    """Open a stream; the one before, if any, has ended."""


@dataclass(frozen=True)
class Send:
    """Send a request on the stream, some time soon."""

    request: explain_pb2.ExplainRequest


@dataclass(frozen=True)
class Finish:
    """Nothing more will be sent on the stream."""


@dataclass(frozen=True)
class Wait:
    """Wait until there is an answer or the stream's end, or, if told to take one, the caller's next item is there, whichever comes first.

    An exception of the caller's own iterable is no business of the flow's.
    """

    take: bool


@dataclass(frozen=True)
class Work:
    """Call a function that may take its time."""

    call: Callable[[], Any]


@dataclass(frozen=True)
class Emit:
    """Hand a result to the caller."""

    result: ItemResult


# --- what came of a wait


@dataclass(frozen=True)
class Heard:
    """An answer."""

    answer: explain_pb2.ExplainStreamResponse


@dataclass(frozen=True)
class Ended:
    """The stream has ended; of an error, or well."""

    error: RpcError | None = None


@dataclass(frozen=True)
class Taken:
    """The caller's next item; without one, there are no more."""

    items: tuple[Item | ImageLike, ...]


Step: TypeAlias = Open | Send | Finish | Wait | Work | Emit | Pause
StreamFlow: TypeAlias = Generator[Step, Any, None]


@dataclass(frozen=True, eq=False)
class _Sent:
    key: Any
    request: explain_pb2.ExplainRequest
    targets: tuple[Target, ...]
    methods: tuple[Method, ...]


def explain_stream(common: Common) -> StreamFlow:
    """Explain images, one after the other, on as many streams as it takes.

    Each item has one result: what is unanswered when a stream breaks, travels again on the next.
    """
    flow = _Flow(common)
    while not flow.done():
        try:
            yield from flow.talk()
        except RpcError as error:
            if flow.done() and passes(error):
                return
            flow.failures += 1
            if not passes(error) or flow.failures > common.retries:
                raise
            yield Pause(pause(error, flow.failures))


class _Flow:
    """What is known of a stream of items, from connection to connection."""

    def __init__(self, common: Common) -> None:
        self.failures = 0
        self._common = common
        self._name = uuid.uuid4().hex[:12]
        self._taken = 0
        self._exhausted = False
        self._unanswered: dict[str, _Sent] = {}

    def done(self) -> bool:
        """Whether all items have been taken and have their results."""
        return self._exhausted and not self._unanswered

    def talk(self) -> StreamFlow:
        """One connection's stream, from its opening to its end.

        Raises:
            RpcError: if it broke, or the server could not take all items.
            MalformedResponse: if its answers are not what was asked for.
        """
        yield Open()
        for sent in self._unanswered.values():
            yield Send(sent.request)
        sending = True
        refusal: RpcError | None = None
        while True:
            if sending and (self._exhausted or refusal):
                sending = False
                yield Finish()
            match (yield Wait(take=sending and len(self._unanswered) < self._common.window)):
                case Taken(items):
                    yield from self._take(items)
                case Heard(answer):
                    outcome = self._outcome(answer)
                    if isinstance(outcome, Emit):
                        yield outcome
                    else:  # the server goes down: it answers what it has in work, and the rest is for the next
                        refusal = outcome
                case Ended(error):
                    self._check_end(error or refusal)
                    return

    def _take(self, items: tuple[Item | ImageLike, ...]) -> StreamFlow:
        self._exhausted = not items
        for item in items:
            position, self._taken = self._taken, self._taken + 1
            whole = item if isinstance(item, Item) else Item(item)
            key = position if whole.key is None else whole.key
            request_id = f"{self._name}-{position}"
            sent = yield Work(partial(_encode, self._common, whole, key, request_id))
            if isinstance(sent, ItemResult):
                yield Emit(sent)
            else:
                self._unanswered[request_id] = sent
                yield Send(sent.request)

    def _outcome(self, answer: explain_pb2.ExplainStreamResponse) -> Emit | Unavailable:
        """What an answer is to the caller; or the server's word that it takes no more items, and didn't take this."""
        sent = self._unanswered.get(answer.request_id)
        if sent is None:
            raise MalformedResponse(f"an answer to {answer.request_id!r}, which is not asked, or answered already")
        result = _result(sent, answer)
        if isinstance(result.error, Unavailable):
            return result.error
        del self._unanswered[answer.request_id]
        self.failures = 0
        return Emit(result)

    def _check_end(self, error: RpcError | None) -> None:
        if error is not None:
            raise error
        if not self.done():
            raise MalformedResponse(f"the stream ended with {len(self._unanswered)} items unanswered")


def wrapped(request: explain_pb2.ExplainRequest) -> bytes:
    """The request as a stream's item, serialised."""
    return explain_pb2.ExplainStreamRequest(request=request).SerializeToString()


def _encode(common: Common, item: Item, key: Any, request_id: str) -> _Sent | ItemResult:
    """The item's request, or, if it can't be made, its result."""
    methods = common.methods if item.methods is None else item.methods
    targets = common.targets if item.targets is None else item.targets
    try:
        request = encode_explain(
            item.image,
            targets,
            methods=methods,
            model=common.model,
            resize=common.resize,
            input_size=common.input_size,
            request_id=request_id,
            priority=common.priority,
        )
        size = request.ByteSize() + _WRAPPING
        if size > common.max_message_bytes:
            message = f"a request of {size} bytes; max_message_bytes is {common.max_message_bytes}"
            raise ResourceExhausted(message, code=grpc.StatusCode.RESOURCE_EXHAUSTED)
        return _Sent(key, request, as_targets(targets), as_methods(methods))
    except (CdamError, OSError, TypeError, ValueError) as error:
        return ItemResult(key, error=error)


def _result(sent: _Sent, answer: explain_pb2.ExplainStreamResponse) -> ItemResult:
    if answer.WhichOneof("outcome") == "error":
        return ItemResult(sent.key, error=_item_error(answer.error))
    try:
        return ItemResult(sent.key, decode_explanation(answer.response, sent.methods, sent.request, sent.targets))
    except MalformedResponse as error:
        return ItemResult(sent.key, error=error)


def _item_error(error: common_pb2.ItemError) -> RpcError:
    return error_from_status(_CODES.get(error.code, grpc.StatusCode.UNKNOWN), error.message, error.details)


def passes(error: RpcError) -> bool:
    """Whether it may go better on another stream. A server that closes cancels what it can't wait for."""
    return isinstance(error, Unavailable | Overloaded) or error.code is grpc.StatusCode.CANCELLED


def pause(error: RpcError, failures: int) -> float:
    """Seconds to wait: what the server advises, or twice as long each time."""
    advised: float | None = getattr(error, "retry_after", None)
    if advised is None:
        advised = _FIRST_PAUSE * 2.0 ** (failures - 1)
    return min(advised, _LONGEST_PAUSE) * random.uniform(0.8, 1.2)  # noqa: S311
