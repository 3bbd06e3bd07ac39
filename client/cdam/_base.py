"""What both clients know."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from cdam._channel import TLS, MetadataLike, checked_timeout, connection
from cdam._concepts import RegisteredConcept
from cdam._encode import encode_import, encode_spec
from cdam._errors import DeadlineExceeded
from cdam._flow import Call
from cdam._methods import MethodLike, as_methods
from cdam._register import Images, Registration
from cdam._stream import PATH, Common, wrapped
from cdam._targets import TargetLike, as_targets
from cdam._version import __version__
from cdam.v1 import concept_pb2, explain_pb2


class BaseClient:
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
        """When a call that begins now must have been answered."""
        return time.monotonic() + (self._connection.timeout if timeout is None else checked_timeout(timeout))

    def _arguments(self, call: Call, deadline: float) -> dict[str, Any]:
        """What grpc is told about a call that must be answered by the deadline."""
        return {
            "timeout": _remaining(deadline),
            "metadata": self._connection.metadata,
            "wait_for_ready": call.patient or None,
        }

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
        call = channel.stream_stream(PATH, wrapped, explain_pb2.ExplainStreamResponse.FromString)
        return call(requests, timeout=_remaining(deadline), metadata=self._connection.metadata)

    def _upload_arguments(self, deadline: float | None) -> dict[str, Any]:
        """What grpc is told about an upload."""
        return {"timeout": _remaining(deadline), "metadata": self._connection.metadata}

    def _registration(
        self,
        name: str,
        examples: Images,
        negatives: Images,
        retries: int,
        progress: Callable[[int], object] | None,
        **settings: Any,
    ) -> Registration:
        """What is to be registered, checked before any image is taken."""
        return Registration(
            spec=encode_spec(name, **settings),
            examples=examples,
            negatives=negatives,
            retries=retries,
            max_message_bytes=self._max_message_bytes,
            progress=progress,
        )


def concept_request(name: str | None, concept_id: str | None, model: str) -> concept_pb2.GetConceptRequest:
    """The request for a concept by name or id."""
    if name is not None and concept_id is None:
        return concept_pb2.GetConceptRequest(name=name, model=model)
    if name is None and concept_id is not None:
        if model:
            raise ValueError("an id goes without a model: it is that of one model already")
        return concept_pb2.GetConceptRequest(id=concept_id)
    raise ValueError("a concept goes by exactly one of name and id")


def import_spec(source: RegisteredConcept, name: str | None, model: str, **changes: Any) -> concept_pb2.ConceptSpec:
    """What to register of an export; what is not changed stays as it is."""
    said = {key: value for key, value in changes.items() if value is not None}
    return encode_import(source, model=model, **said, **({} if name is None else {"name": name}))


def _remaining(deadline: float | None) -> float | None:
    remaining = None if deadline is None else deadline - time.monotonic()
    if remaining is not None and remaining <= 0:
        raise DeadlineExceeded("the timeout passed", code=grpc.StatusCode.DEADLINE_EXCEEDED)
    return remaining
