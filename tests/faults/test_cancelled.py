"""Callers who leave: nothing of them stays behind, and what they asked for ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import grpc
import pytest

from calls import Stub, method
from faults.callers import call_and_leave, noise, raw_request, settle
from processes import ServerProcess, serving

CALLS = 1000
SLACK = 8  # gRPC has a thread more or less at times; whatever a call leaves behind, there are a thousand
PLAIN = raw_request(noise(0))
# Half a minute and more on two cores.
LONG = raw_request(noise(0, 128), methods=[method("token_ablation")])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    flags = ("--token-cache-mib", "0", "--max-passes", "100000")
    with serving(tmp_path_factory.mktemp("cancelled") / "log", *flags) as running:
        yield running


def test_callers_who_leave_leave_nothing_behind(server: ServerProcess) -> None:
    asyncio.run(call_and_leave(server.address, CALLS // 5))
    earlier, before = settle(server), server.usage()
    asyncio.run(call_and_leave(server.address, CALLS))
    later, after = settle(server), server.usage()

    def grown(name: str) -> float:
        return later.get(name, 0) - earlier.get(name, 0)

    assert later["cdam_pending_requests"] == 0
    assert after.threads < before.threads + SLACK
    assert after.files < before.files + SLACK
    assert after.mib < before.mib + 64
    # Whoever was let in was answered, or was booked as gone; most had gone.
    codes = {
        code: grown(f'grpc_server_handled_total{{code="{code}",method="Explain"}}') for code in ("OK", "CANCELLED")
    }
    dropped = grown('cdam_dropped_total{reason="cancelled"}')
    assert CALLS / 10 < dropped <= codes["CANCELLED"]
    assert grown("cdam_admitted_total") == codes["OK"] + dropped
    with grpc.insecure_channel(server.address) as channel:
        for _ in range(10):
            assert Stub(channel).Explain(PLAIN, timeout=10).maps


@pytest.mark.parametrize("leaves", ["cancels", "deadline"])
def test_long_work_that_nobody_waits_for_ends(server: ServerProcess, leaves: str) -> None:
    with grpc.insecure_channel(server.address) as channel:
        call = Stub(channel).Explain.future(LONG, timeout=2 if leaves == "deadline" else 600)
        started = server.usage().cpu_seconds
        while not call.done() and server.usage().cpu_seconds < started + 0.5:  # it is being computed now
            time.sleep(0.05)
        if leaves == "cancels":
            call.cancel()
        gone = grpc.StatusCode.CANCELLED if leaves == "cancels" else grpc.StatusCode.DEADLINE_EXCEEDED
        assert call.code() is gone
        before = server.usage().cpu_seconds
        metrics = settle(server)
        assert server.usage().cpu_seconds < before + 5
        assert Stub(channel).Explain(PLAIN, timeout=10).maps
    assert not any('method="token_ablation"' in name for name in metrics)
