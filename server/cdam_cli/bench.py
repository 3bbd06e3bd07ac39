"""`cdam bench`."""

import asyncio
import dataclasses
import json
import math
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence, Sized
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, Final, TypeVar, get_args

import click
import grpc.aio
import numpy as np
from numpy.typing import NDArray

import cdam
from cdam.v1 import explain_pb2
from cdam_cli.connections import Server, connection_options, server_from
from cdam_cli.failures import Failure, describe, describe_os
from cdam_cli.images import find_images
from cdam_cli.load import OK, ClosedLoop, Load, OpenLoop, generate, summary
from cdam_cli.report import columns
from cdam_cli.spelling import method_option, model_option, target_option, targets_or_default
from cdam_cli.traffic import Kind, Requests, pictures

Command = TypeVar("Command", bound=Callable[..., Any])

_STAGES: Final = ("decode", "queue", "trunk", "tail", "total")
_TOLD: Final = (*_STAGES, "batch_size", "token_cache_hit", "maps")
_HEAD: Final = ("milliseconds", "count", "mean", "p50", "p90", "p99", "p99.9", "max")
_CHANNEL: Final = (("grpc.primary_user_agent", f"cdam-bench/{cdam.__version__}"),)

_HELP = """Put a server under load, and measure what it does.

IMAGE is a JPEG, PNG or WebP file, a folder, which stands for all such files below it, or a pattern in quotes; they are
sent in turn. Without any, pictures are made up, JPEGs
of the model's input size.

With --callers each caller waits for its answer before it asks again: what can the server do? With --rate requests come
at random moments, answered or not, as from many users: how long do they wait, and how many are refused? Latencies
then count from the moment at which a request was due. Nothing is retried.

The server knows the tokens of recent images, and answers faster about them; --fresh sends none twice. For this, images
travel as raw pixels of their full size, shifted by one pixel more each time.

-t and -m are spelled as for `cdam explain`. For a mixture of requests give several --request, each with -t, -m,
--model, --priority, and a --weight: how often it comes, relative to the others.

\b
Examples
  cdam bench
  cdam bench photos/ --callers 32 --duration 60 --fresh -o closed.json
  cdam bench --rate 50 -t top:3 -m cdam -m smooth_cdam:samples=20
  cdam bench --rate 50 --request '-t top:1 --priority high' --request '-m token_ablation --priority low --weight 0.1'
  cdam bench --server dns:///cdam.example.org:8001 --tls --token-file token --connections 4

Exits with 1 if no request was answered. Ctrl-C ends it early, with what was measured so far.
"""


def _finite(_context: click.Context, _parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no finite number")
    return value


def request_options(command: Command) -> Command:
    """The options that say what is asked for; together they make a `Kind`."""
    options = [
        target_option,
        method_option,
        model_option,
        click.option("--priority", type=click.Choice(get_args(cdam.Priority)), help="How urgent it is.  [normal]"),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _kind(**given: Any) -> Kind:
    """The kind of request that the options mean."""
    return Kind(**{**given, "targets": targets_or_default(given["targets"], given["methods"])})


@click.command("--request", add_help_option=False)
@request_options
@click.option("--weight", type=click.FloatRange(0, min_open=True), callback=_finite, default=1.0)
def _request(**given: Any) -> Kind:
    return _kind(**given)


def _parse_request(text: str) -> Kind:
    """The kind of request that the text of a --request means."""
    try:
        found: Kind = _request.main(shlex.split(text), prog_name="--request", standalone_mode=False)
    except click.ClickException as error:
        raise click.BadParameter(f"{text!r}: {error.format_message()}") from error
    except ValueError as error:  # an open quotation
        raise click.BadParameter(f"{text!r}: {error}") from error
    return found


@click.command(help=_HELP)
@click.argument("paths", nargs=-1, metavar="[IMAGE|DIR]...")
@click.option("--callers", type=click.IntRange(min=1), help="Closed loop: callers that each wait for an answer.  [8]")
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    callback=_finite,
    help="Open loop: mean requests a second, at random moments.",
)
@click.option(
    "--duration",
    type=click.FloatRange(0, min_open=True),
    callback=_finite,
    default=10.0,
    show_default=True,
    help="Seconds that are measured; answers due after them are waited for.",
)
@click.option(
    "--warm-up",
    type=click.FloatRange(0),
    callback=_finite,
    default=2.0,
    show_default=True,
    help="Seconds of load before that.",
)
@request_options
@click.option(
    "--request",
    "kinds",
    multiple=True,
    callback=lambda _ctx, _param, texts: tuple(map(_parse_request, texts)),
    metavar="OPTIONS",
    help="A kind of request of a mixture, in quotes: -t, -m, --model, --priority and --weight; repeatable.",
)
@click.option("--images", type=click.IntRange(min=1), default=16, show_default=True, help="How many to make up.")
@click.option("--fresh", is_flag=True, help="Send no image twice, so that the token cache knows none.")
@click.option(
    "--connections", type=click.IntRange(min=1), default=1, show_default=True, help="Connections to the server."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all that is random here.")
@click.option(
    "-o",
    "--output",
    metavar="FILE.json",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write all of it as JSON.",
)
@connection_options
def bench(
    *,
    paths: tuple[str, ...],
    callers: int | None,
    rate: float | None,
    kinds: tuple[Kind, ...],
    output: Path | None,
    **options: Any,
) -> None:
    """Measure, print, and write."""
    if callers is not None and rate is not None:
        raise click.UsageError("--callers is a closed loop, --rate an open one: give one of them")
    if output is not None and not output.absolute().parent.is_dir():
        raise click.UsageError(f"--output: {output.absolute().parent} is no folder")
    alone = {name: options.pop(name) for name in ("targets", "methods", "model", "priority")}
    if kinds and any(alone.values()):
        raise click.UsageError("with --request, -t, -m, --model and --priority stand inside its quotes")
    plan = Plan(
        loop=ClosedLoop(callers or 8) if rate is None else OpenLoop(rate, seed=options["seed"]),
        kinds=kinds or (_kind(**alone),),
        **{name: options.pop(name) for name in ("duration", "warm_up", "fresh", "connections", "seed")},
    )
    made_up = options.pop("images")
    files = find_images(paths).images
    server = server_from(**options)
    server = Server(server.address, {**server.arguments, "retries": 0})  # a retry would hide the refusal
    try:
        with server.client() as client:
            model = client.model(plan.kinds[0].model)
            images: Sequence[cdam.ImageLike] = files or pictures(made_up, model.input_size, plan.seed)
            requests = Requests(plan.kinds, images, fresh=plan.fresh, seed=plan.seed)
            for kind in plan.kinds:
                _probe(client, kind, images[0])
    except cdam.RpcError as error:
        raise Failure(f"{server.address}: {describe(error)}") from error
    except cdam.ImageError as error:
        raise Failure(str(error)) from error
    except OSError as error:
        raise Failure(describe_os(error)) from error
    result = asyncio.run(_measure(server, plan, requests))
    click.echo(result.text(server.address, model))
    if output is not None:
        _write(output, result.to_json(server, model))
    sys.exit(0 if result.load.latencies.size else 1)


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Attributes:
        loop: When requests are made.
        kinds: What they ask for.
        duration: Seconds that are measured.
        warm_up: Seconds before.
        fresh: Send no image twice.
        connections: Connections to the server.
        seed: Of the pictures, the moments and the order.
    """

    loop: ClosedLoop | OpenLoop
    kinds: tuple[Kind, ...]
    duration: float
    warm_up: float
    fresh: bool
    connections: int
    seed: int


def _probe(client: cdam.Client, kind: Kind, image: cdam.ImageLike) -> None:
    """Ask once, so that what every request would be refused for is said at once."""
    try:
        client.explain(image, **kind.request)
    except (cdam.Overloaded, cdam.DeadlineExceeded):
        pass  # the server may be under load already: that is to be measured
    except (cdam.Unavailable, cdam.Unauthenticated, cdam.PermissionDenied):
        raise
    except cdam.RpcError as error:
        raise Failure(f"{kind}: {describe(error, kind.request)}") from error


async def _measure(server: Server, plan: Plan, requests: Requests) -> "Result":
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
    answers: dict[int, tuple[float, ...]] = {}
    connection = server.client().connection
    async with AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(connection.aio_channel(*_CHANNEL)) for _ in range(plan.connections)]
        calls: list[grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]] = [
            channel.unary_unary(requests.path) for channel in channels
        ]

        async def call(number: int) -> str:
            try:
                answer = await calls[number % len(calls)](
                    requests[number], timeout=connection.timeout, metadata=connection.metadata
                )
            except grpc.aio.AioRpcError as error:
                return error.code().name
            answers[number] = _told(requests.decode(answer))
            return OK

        async with _progress(plan, answers):
            load = await generate(call, plan.loop, seconds=plan.duration, warm_up_seconds=plan.warm_up, stop=stop)
    return Result(plan, requests, load, answers, interrupted=stop.is_set())


def _told(answer: explain_pb2.ExplainResponse) -> tuple[float, ...]:
    """What an answer says of itself, in the order of `_TOLD`."""
    spans = (getattr(answer.timing, stage) for stage in _STAGES)
    seconds = (span.seconds + span.nanos / 1e9 for span in spans)
    return (*seconds, answer.timing.batch_size, answer.token_cache_hit, len(answer.maps))


@asynccontextmanager
async def _progress(plan: Plan, answers: Sized) -> AsyncIterator[None]:
    """On a terminal, a line that counts."""
    if not sys.stderr.isatty():
        yield
        return

    async def tell() -> None:
        for second in count(1):
            await asyncio.sleep(1)
            text = f"\r{second} of {plan.warm_up + plan.duration:g} s, {len(answers)} answered"
            click.echo(text, nl=False, err=True)

    telling = asyncio.create_task(tell())
    try:
        yield
    finally:
        telling.cancel()
        click.echo("\r\033[K", nl=False, err=True)


@dataclass(frozen=True, eq=False)
class Result:
    """What was measured.

    Attributes:
        plan: What was to be measured.
        requests: What was sent.
        load: What came of each request.
        answers: What each answer says of itself, by the request's number, in the order of `_TOLD`.
        interrupted: Whether it was ended early.
    """

    plan: Plan
    requests: Requests
    load: Load
    answers: Mapping[int, tuple[float, ...]] = field(repr=False)
    interrupted: bool

    @cached_property
    def told(self) -> dict[str, NDArray[np.float64]]:
        """What the answers that count say of themselves."""
        numbers = self.load.numbers[self.load.in_window & (self.load.codes == OK)]
        table = np.array([self.answers[number] for number in numbers.tolist()], np.float64).reshape(-1, len(_TOLD))
        return dict(zip(_TOLD, table.T, strict=True))

    @property
    def maps_per_second(self) -> float:
        """Maps in the answers that came in the window, a second."""
        maps = self.told["maps"]
        return self.load.throughput * float(maps.mean()) if maps.size else 0.0

    @property
    def batch_size(self) -> float | None:
        """Mean size of the server's batches: each answer is one of so many that share a batch."""
        sizes = self.told["batch_size"]
        return float(sizes.size / (1 / sizes).sum()) if sizes.size and sizes.all() else None

    @property
    def token_cache_hit_share(self) -> float | None:
        """Share of the answers whose image the server knew."""
        hits = self.told["token_cache_hit"]
        return float(hits.mean()) if hits.size else None

    @property
    def by_kind(self) -> list[Load]:
        """The load of each kind of request."""
        kinds = self.requests.kinds(self.load.numbers)
        return [self.load.part(kinds == index) for index in range(len(self.plan.kinds))]

    def to_json(self, server: Server, model: cdam.Model) -> dict[str, Any]:
        """All of it, in JSON's types; times in seconds."""
        plan, loop = self.plan, self.plan.loop
        return {
            "version": cdam.__version__,
            "server": server.address,
            "model": {name: getattr(model, name) for name in ("name", "architecture", "fingerprint", "precision")},
            "parameters": {
                **dataclasses.asdict(loop),
                "loop": "closed" if isinstance(loop, ClosedLoop) else "open",
                **{name: getattr(plan, name) for name in ("duration", "warm_up", "fresh", "connections", "seed")},
                "timeout": server.arguments["timeout"],
                "images": len(self.requests.images),
                "requests": [kind.to_json() for kind in plan.kinds],
            },
            "interrupted": self.interrupted,
            **self.load.to_json(),
            "maps_per_second": self.maps_per_second,
            "on_server": {stage: summary(self.told[stage]) for stage in _STAGES},
            "batch_size": self.batch_size,
            "token_cache_hit_share": self.token_cache_hit_share,
            "by_request": [part.to_json() for part in self.by_kind],
        }

    def text(self, address: str, model: cdam.Model) -> str:
        """All of it for people; times in milliseconds."""
        load, counts = self.load, self.load.counts
        tally = ", ".join(f"{number} {code}" for code, number in counts.items())
        lines = [
            f"{address}  {model.name}, {self._conditions()}",
            f"  {load.requests} requests" + (f": {tally}" if tally else ""),
            f"  {load.throughput:.2f} answers/s, {self.maps_per_second:.2f} maps/s",
        ]
        if self.batch_size is not None:
            lines.append(
                f"  {self.batch_size:.1f} images a batch, {self.token_cache_hit_share:.1%} from the token cache"
            )
        return "\n".join([*lines, "", *columns([_HEAD, *self._rows()], right=range(1, len(_HEAD)))])

    def _conditions(self) -> str:
        plan, loop = self.plan, self.plan.loop
        how = f"{loop.callers} callers" if isinstance(loop, ClosedLoop) else f"{loop.rate:g} requests/s"
        end = ", interrupted" if self.interrupted else ""
        return f"{how}: {self.load.seconds:.1f} s after {plan.warm_up:g} s of warm-up{end}"

    def _rows(self) -> Iterator[tuple[str, ...]]:
        yield _row(OK, self.load.latencies)
        if len(self.plan.kinds) > 1:
            for kind, part in zip(self.plan.kinds, self.by_kind, strict=True):
                yield _row(f"  {kind}", part.latencies)
        for code, latencies in self.load.failures.items():
            yield _row(code, latencies)
        if isinstance(self.plan.loop, OpenLoop):
            yield _row("sent late by", self.load.late)
        for stage in _STAGES:
            yield _row(f"on the server: {stage}", self.told[stage])


def _row(name: str, seconds: NDArray[np.float64]) -> tuple[str, ...]:
    found = summary(seconds)
    cells = ("-" if found[key] is None else f"{1000 * found[key]:.1f}" for key in _HEAD[2:])
    return name, str(found["count"]), *cells


def _write(output: Path, result: dict[str, Any]) -> None:
    try:
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise Failure(f"{output}: {error.strerror}") from error
