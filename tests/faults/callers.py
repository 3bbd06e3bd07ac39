"""Callers of a server in trouble: those who do nothing wrong, and those who leave before they are answered."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
from numpy.typing import NDArray

from calls import Stub, array, output
from cdam.v1 import common_pb2, explain_pb2, explainer_service_pb2_grpc
from processes import ServerProcess

SIZE = 64  # of the demo model's input: an image of this size reaches the engine as it is


def noise(seed: int, size: int = SIZE) -> NDArray[np.uint8]:
    """An image like no other, shape (size, size, 3)."""
    return np.random.default_rng(seed).integers(0, 200, (size, size, 3), np.uint8)


def raw_request(pixels: NDArray[np.uint8], **fields: Any) -> explain_pb2.ExplainRequest:
    """A request to explain raw pixels at the size that they have."""
    height, width = pixels.shape[:2]
    image = common_pb2.Image(raw=common_pb2.RawImage(height=height, width=width, channels=3, data=pixels.tobytes()))
    preprocessing = common_pb2.Preprocessing(input_size=common_pb2.Size(height=height, width=width))
    return explain_pb2.ExplainRequest(image=image, targets=[output(3)], preprocessing=preprocessing, **fields)


class Innocents:
    """Some callers who ask without pause, from the entry of the block to its exit, each for a map of its own image.

    Args:
        address: Of the server.
        count: Their number.
        size: Height and width of their images.

    Attributes:
        count: How many they are; each has been answered once before the block.
        codes: What came of their calls: status codes, and "WRONG" for a map that is not the one from before.
    """

    def __init__(self, address: str, count: int = 12, size: int = SIZE) -> None:
        self.count = count
        self._channel = grpc.insecure_channel(address)
        self._stub = Stub(self._channel)
        self._requests = [raw_request(noise(seed, size)) for seed in range(count)]
        self._maps = [array(self._stub.Explain(item, timeout=60).maps[0].scores) for item in self._requests]
        self._answered = threading.Condition()
        self._over = False
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(count)]
        self.codes: Counter[str] = Counter()
        self._largest_batch = 0

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self.wait_for_more()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over = True
        for thread in self._threads:
            thread.join()
        self._channel.close()

    def wait_for_more(self) -> None:
        """Wait until they have been answered twice more each, all in all."""
        with self._answered:
            enough = self.codes.total() + 2 * len(self._threads)
            assert self._answered.wait_for(lambda: self.codes.total() >= enough, timeout=60)

    def largest_batch(self) -> int:
        """The largest batch that their images are in from now on, for some calls of each."""
        self.wait_for_more()  # what was begun before is answered then
        with self._answered:
            self._largest_batch = 0
        self.wait_for_more()
        return self._largest_batch

    def wait_for_batch(self, larger_than: int) -> None:
        """Wait until so many of their images share a batch; it is an error if they never do."""
        until = time.monotonic() + 120
        while self.largest_batch() <= larger_than:
            assert time.monotonic() < until, f"no batch is larger than {larger_than}"

    def _ask(self, number: int) -> None:
        """Ask again and again; not after a failure."""
        code = "OK"
        while code == "OK" and not self._over:
            batch = 0
            try:
                answer = self._stub.Explain(self._requests[number], timeout=60)
                batch = answer.timing.batch_size
                expected = self._maps[number]
                same = np.allclose(array(answer.maps[0].scores), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
                code = "OK" if same else "WRONG"
            except grpc.RpcError as error:
                code = error.code().name
            with self._answered:
                self.codes[code] += 1
                self._largest_batch = max(self._largest_batch, batch)
                self._answered.notify_all()


async def call_and_leave(address: str, calls: int, *, at_once: int = 64, longest: float = 0.3) -> None:
    """Make calls, and give each up at a moment drawn at random; some are answered before.

    Args:
        address: Of the server.
        calls: Their number.
        at_once: How many are made at the same time.
        longest: Seconds until a caller leaves, at most.
    """
    draw, seats = random.Random(calls), asyncio.Semaphore(at_once)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = explainer_service_pb2_grpc.ExplainerServiceStub(channel)

        async def call(number: int, seconds: float) -> None:
            async with seats:
                calling = stub.Explain(raw_request(noise(number)))
                await asyncio.sleep(seconds)
                calling.cancel()
                await calling.code()

        await asyncio.gather(*(call(number, draw.uniform(0, longest)) for number in range(calls)))


def settle(server: ServerProcess, seconds: float = 30) -> dict[str, float]:
    """The server's metrics, as soon as it has come to rest; it is an error if it does not."""
    until = time.monotonic() + seconds
    idle, last = 0, server.usage().cpu_seconds
    while idle < 3:
        assert time.monotonic() < until, "the server has not come to rest"
        time.sleep(0.2)
        now = server.usage().cpu_seconds
        idle, last = idle + 1 if now - last < 0.1 else 0, now
    return server.metrics()
