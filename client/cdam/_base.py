# ruff: noqa: ASYNC109 - a timeout travels to the server as the call's deadline
"""What both clients do."""

from collections.abc import AsyncIterable, Callable, Iterable, Sequence, Sized
from functools import partial
from typing import Any, ClassVar, Self, cast

from cdam import _calls
from cdam._channel import TLS, Connection, MetadataLike, connection
from cdam._concepts import RegisteredConcept
from cdam._encode import encode_explain, encode_spec
from cdam._evaluate import Evaluate
from cdam._evaluation import Sample
from cdam._explanation import Explanation
from cdam._images import ImageLike
from cdam._items import Items
from cdam._methods import as_methods
from cdam._register import Images, Registering, Registration
from cdam._stream import Results
from cdam._targets import as_targets
from cdam._transport import Calls, Transport
from cdam._version import __version__


class BaseClient:
    """What both clients know: what they do, as coroutines over their transport."""

    _transport_kind: ClassVar[type[Transport]]

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
        settings: dict[str, Any] = {
            "timeout": timeout,
            "token": token,
            "tls": tls,
            "metadata": metadata,
            "max_message_bytes": max_message_bytes,
            "retries": retries,
            "allow_plaintext_token": allow_plaintext_token,
        }
        its_connection = connection(address, user_agent=f"cdam-python/{__version__}", **settings)
        self._transport = self._transport_kind(its_connection)
        kind: Any = type(self)
        # A function keeps the secrets out of what is shown of a client.
        self._at: Callable[[str], Any] = lambda other: kind(other, **settings)
        self._max_message_bytes = max_message_bytes

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.connection.address!r})"

    @property
    def connection(self) -> Connection:
        """How this client speaks to its server, for those who call the API's generated stubs themselves."""
        return self._transport.connection

    def _calls(self, timeout: float | None) -> Calls:
        """Calls that have to be answered in so many seconds; None: this client's."""
        return Calls(self._transport, timeout)

    async def _explain(
        self, image: ImageLike, targets: Any, methods: Any, timeout: float | None, **settings: Any
    ) -> Explanation:
        encode = partial(
            encode_explain, image, targets, methods=methods, max_message_bytes=self._max_message_bytes, **settings
        )
        request = await self._transport.work(encode)  # it may read a file
        return await _calls.explain(self._calls(timeout), request, as_methods(methods), as_targets(targets))

    def _explain_stream(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        targets: Any,
        methods: Any,
        timeout: float | None,
        **settings: Any,
    ) -> Results:
        """The results for items; what is asked of all of them is checked before the first is taken."""
        if isinstance(items, str | bytes | bytearray | memoryview):
            raise TypeError("a stream takes several images: put a single one in a list, or explain it alone")
        job = Items(targets, methods, max_message_bytes=self._max_message_bytes, **settings)
        return Results(job, self._transport, items, [job.start(self._transport, timeout)])

    def _evaluate(
        self,
        samples: Iterable[Any] | AsyncIterable[Any],
        servers: Sequence[str | Self],
        timeout: float | None,
        expected_samples: int | None,
        **settings: Any,
    ) -> tuple[Evaluate, Results]:
        """What is asked of samples in common, and the results for them."""
        if isinstance(samples, Sample | str | bytes):
            raise TypeError("an evaluation takes several samples: put a single one in a list")
        if isinstance(servers, str | BaseClient):
            raise TypeError("servers are several: put a single one in a list")
        servers = tuple(servers)
        clients = [self, *map(self._as_client, servers)]
        if expected_samples is None and isinstance(samples, Sized):
            expected_samples = len(samples)
        job = Evaluate(
            [client.connection.address for client in clients],
            expected_samples=expected_samples,
            max_message_bytes=self._max_message_bytes,
            **settings,
        )
        transports = [client._transport for client in clients]  # noqa: SLF001 - of the same class
        starts = [job.start(transport, timeout) for transport in transports]
        made = [client._transport for client in clients[1:] if client not in servers]  # noqa: SLF001 - likewise
        return job, Results(job, self._transport, samples, starts, made)

    def _as_client(self, server: object) -> Self:
        """A client for a further server, if it is an address, of this one's settings."""
        if isinstance(server, str):
            return cast(Self, self._at(server))
        if isinstance(server, BaseClient) and server._transport_kind is self._transport_kind:  # noqa: SLF001 - of the same class
            return cast(Self, server)
        raise TypeError(f"a further server is an address or a {type(self).__name__}, not {type(server).__name__}")

    async def _register(
        self,
        name: str,
        examples: Images,
        negatives: Images,
        timeout: float | None,
        retries: int,
        progress: Callable[[int], object] | None,
        **settings: Any,
    ) -> RegisteredConcept:
        registration = Registration(
            spec=encode_spec(name, **settings),
            examples=examples,
            negatives=negatives,
            retries=retries,
            max_message_bytes=self._max_message_bytes,
            progress=progress,
        )
        return await Registering(registration, self._transport, timeout).run()
