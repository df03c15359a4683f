"""Loops that fail by a fault of their own are started again, and somebody is told; they end when they must."""

import asyncio
from contextlib import suppress

import anyio
import anyio.lowlevel
import pytest

from cqrs_decor.counters import Counters
from cqrs_decor.observers import LoopRestarted, Observers
from cqrs_decor.supervision import Supervised
from cqrs_decor.testing.clock import FakeClock


class FailsFirst:
    """A loop that raises so often, and then ends."""

    def __init__(self, failures: int) -> None:
        self.left = failures
        self.ended = anyio.Event()

    async def run(self) -> None:
        if self.left:
            self.left -= 1
            raise OSError("a fault of a plugin's")
        self.ended.set()


class QuickClock(FakeClock):
    """Nobody waits."""

    async def sleep(self, seconds: float) -> None:
        await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("failures", [0, 1, 3])
async def test_every_restart_is_told(failures: int, caplog: pytest.LogCaptureFixture) -> None:
    """A loop that dies every second works hardly at all, and looks alive from outside."""
    loop, counters = FailsFirst(failures), Counters()

    supervised = await Supervised.start("relay", loop.run, QuickClock(), Observers([counters]))
    with anyio.fail_after(10):
        await loop.ended.wait()
    await supervised.finish(1)

    assert counters.count(LoopRestarted, loop="relay", error="OSError") == failures
    assert [record.__dict__["action"] for record in caplog.records] == ["loop_failed"] * failures


async def test_a_loop_runs_without_anybody_who_watches() -> None:
    """Observers are optional."""
    loop = FailsFirst(1)

    supervised = await Supervised.start("relay", loop.run, QuickClock())
    with anyio.fail_after(10):
        await loop.ended.wait()

    await supervised.finish(1)


async def test_a_loop_that_swallows_a_cancellation_is_ended_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """`asyncio.wait_for` of Python 3.11 may lose one, and drivers use it: a process told to stop would stay."""
    monkeypatch.setattr("cqrs_decor._loop._CANCEL_AGAIN_S", 0.01)

    async def run() -> None:
        for _ in range(3):
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(60)

    supervised = await Supervised.start("relay", run, QuickClock())
    with anyio.fail_after(10):
        await supervised.finish(0.01)
