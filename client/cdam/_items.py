"""The items of ExplainStream: images to explain, and what comes of each."""

import uuid
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from cdam._channel import SERVICE
from cdam._decode import decode_error, decode_explanation
from cdam._encode import Priority, Resize, encode_explain, enum_value
from cdam._errors import CdamError, MalformedResponse, Unavailable
from cdam._explanation import Explanation
from cdam._images import ImageLike
from cdam._methods import Method, MethodLike, as_methods
from cdam._numbers import whole
from cdam._stream import Job, PreparedItem
from cdam._targets import Target, TargetLike, as_targets
from cdam.v1 import common_pb2, explain_pb2


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


@dataclass(frozen=True, eq=False)
class _Asked:
    key: Any
    targets: tuple[Target, ...]
    methods: tuple[Method, ...]


class Items(Job):
    """Explaining items, all with the same settings but for what they say themselves."""

    path: ClassVar[str] = f"/{SERVICE}/ExplainStream"

    def __init__(
        self,
        targets: TargetLike | Sequence[TargetLike],
        methods: MethodLike | Sequence[MethodLike],
        *,
        model: str,
        resize: Resize | None,
        input_size: tuple[int, int] | None,
        priority: Priority | None,
        window: int,
        retries: int,
        max_message_bytes: int,
    ) -> None:
        """Check what is asked of every item.

        Raises:
            ValueError, TypeError: if something of it can't be.
        """
        self.window = whole(window, "window")
        self.retries = whole(retries, "retries")
        self._targets = as_targets(targets)
        self._methods = as_methods(methods)
        self._settings: dict[str, Any] = {
            "model": model,
            "resize": resize,
            "input_size": input_size,
            "priority": priority,
            "max_message_bytes": max_message_bytes,
        }
        self._name = uuid.uuid4().hex[:12]
        # An item that can't be encoded fails alone; what is wrong for all of them is told before the first.
        enum_value(explain_pb2.Priority, "PRIORITY", priority)
        enum_value(common_pb2.ResizeMode, "RESIZE_MODE", resize)
        self.check()

    def serialise(self, request: explain_pb2.ExplainRequest) -> bytes:
        """The request as a stream's item."""
        return explain_pb2.ExplainStreamRequest(request=request).SerializeToString()

    def parse(self, data: bytes) -> explain_pb2.ExplainStreamResponse:
        """An answer."""
        return explain_pb2.ExplainStreamResponse.FromString(data)

    def encode(self, item: Item | ImageLike, position: int, unanswered: Container[str]) -> PreparedItem | ItemResult:  # noqa: ARG002 - as every job
        """The item's request, or, if it can't be made, its result."""
        whole = item if isinstance(item, Item) else Item(item)
        key = position if whole.key is None else whole.key
        methods = self._methods if whole.methods is None else whole.methods
        targets = self._targets if whole.targets is None else whole.targets
        request_id = f"{self._name}-{position}"
        try:
            request = encode_explain(whole.image, targets, methods=methods, request_id=request_id, **self._settings)
            return PreparedItem(request_id, position, request, _Asked(key, as_targets(targets), as_methods(methods)))
        except (CdamError, OSError, TypeError, ValueError) as error:
            return ItemResult(key, error=error)

    def item_id(self, answer: explain_pb2.ExplainStreamResponse) -> str:
        """The request's id."""
        return answer.request_id

    def result(self, item: PreparedItem, answer: explain_pb2.ExplainStreamResponse) -> ItemResult | Unavailable:
        """The item's result, or the server's word that it takes no more."""
        asked: _Asked = item.context
        if answer.WhichOneof("outcome") == "error":
            error = decode_error(answer.error)
            return error if isinstance(error, Unavailable) else ItemResult(asked.key, error=error)
        try:
            explanation = decode_explanation(answer.response, asked.methods, item.request, asked.targets)
        except MalformedResponse as error:
            return ItemResult(asked.key, error=error)
        return ItemResult(asked.key, explanation)
