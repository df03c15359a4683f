"""What the doctor says of relays, lanes, clocks and wake-ups."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import anyio
import pytest

from cqrs_decor import Finding, Settings
from cqrs_decor.cli import relays
from cqrs_decor.cli.relays import relay_findings
from cqrs_decor.errors import StoreUnavailableError
from cqrs_decor.outbox import Backlog, Heard, Holders
from cqrs_decor.testing.clock import FakeClock


class Pooled:
    """Wake-ups of a database; `sounds` is what a listener hears after somebody has sent."""

    def __init__(self, *sounds: Heard, refuses: bool = False) -> None:
        self._sounds = list(sounds)
        self._refuses = refuses
        self._sent = anyio.Event()

    async def send(self) -> None:
        self._sent.set()

    @asynccontextmanager
    async def listen(self, owner: str) -> AsyncGenerator["Pooled", None]:
        if self._refuses:
            raise StoreUnavailableError("postgresql://", "LISTEN is refused")
        yield self

    async def hear(self) -> Heard:
        await self._sent.wait()
        if not self._sounds:
            await anyio.sleep_forever()
        return self._sounds.pop(0)


class Outbox:
    """One that answers as it was told."""

    def __init__(self, clock: FakeClock) -> None:
        self.wake_ups: Pooled | None = None
        self.backlog_ = Backlog(pending=0, parked=0, oldest=None)
        self.holders_ = Holders(relays=["one", "two"], held=32, free=0, ended=0, longest_ended=None, now=clock.now())

    async def backlog(self) -> Backlog:
        return self.backlog_

    async def holders(self) -> Holders:
        return self.holders_


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def outbox(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> Outbox:
    monkeypatch.setattr(relays, "_HEARD_WITHIN_S", 0.05)
    return Outbox(clock)


async def found(outbox: Any, clock: FakeClock) -> Sequence[Finding]:
    return [each for each in await relay_findings(outbox, Settings(), clock) if each.severity != "ok"]


async def test_relays_at_work_are_in_order(outbox: Outbox, clock: FakeClock) -> None:
    """A doctor that always finds something is not asked again."""
    outbox.backlog_ = Backlog(pending=3, parked=0, oldest=timedelta(seconds=2))

    assert await found(outbox, clock) == []


@pytest.mark.parametrize(
    ("oldest", "severity"), [(None, "warning"), (timedelta(seconds=30), "warning"), (timedelta(hours=3), "error")]
)
async def test_no_relay_is_an_error_once_something_waits_for_it(
    outbox: Outbox, clock: FakeClock, oldest: timedelta | None, severity: str
) -> None:
    """Before the first deployment there is none; later events would never leave."""
    outbox.holders_ = Holders(relays=[], held=0, free=32, ended=0, longest_ended=None, now=clock.now())
    outbox.backlog_ = Backlog(pending=0 if oldest is None else 9, parked=0, oldest=oldest)

    [finding] = await found(outbox, clock)

    assert (finding.code, finding.severity) == ("CD716", severity)


async def test_relays_that_are_behind_are_found(outbox: Outbox, clock: FakeClock) -> None:
    """All is running, and nothing arrives."""
    outbox.backlog_ = Backlog(pending=4_000, parked=0, oldest=timedelta(minutes=7))

    [finding] = await found(outbox, clock)

    assert finding.code == "CD717"
    assert "4,000 records waiting, the oldest for 7 min; 2 relays at it" in finding.problem


@pytest.mark.parametrize(
    ("free", "ended", "longest_ended", "codes"),
    [
        (2, 0, None, ["CD718"]),
        (0, 3, timedelta(minutes=5), ["CD718"]),
        (0, 3, timedelta(seconds=4), []),
        (0, 0, None, []),
    ],
)
async def test_lanes_that_nobody_takes_over_are_found(
    outbox: Outbox, clock: FakeClock, free: int, ended: int, longest_ended: timedelta | None, codes: list[str]
) -> None:
    """Their keys stand still while all others flow. Just after a crash that is as it should be."""
    outbox.holders_ = Holders(
        relays=["one"], held=32 - free - ended, free=free, ended=ended, longest_ended=longest_ended, now=clock.now()
    )

    assert [finding.code for finding in await found(outbox, clock)] == codes


@pytest.mark.parametrize(
    ("skew", "said"),
    [(300, "5 min ahead of this machine's"), (-7200, "2 h behind this machine's"), (2, None), (-5, None)],
)
async def test_clocks_that_differ_are_found(outbox: Outbox, clock: FakeClock, skew: float, said: str | None) -> None:
    """Nothing is released early by it, and every log is a riddle."""
    outbox.holders_ = Holders(
        relays=["one"], held=32, free=0, ended=0, longest_ended=None, now=clock.now() + timedelta(seconds=skew)
    )

    findings = await found(outbox, clock)

    assert [finding.code for finding in findings] == ["CD719"] * (said is not None)
    assert all(said is not None and said in finding.problem for finding in findings)


@pytest.mark.parametrize(
    ("wake_ups", "codes"),
    [
        (Pooled("work"), []),
        (Pooled("echo", "work"), []),
        (Pooled("echo"), ["CD720"]),
        (Pooled(), ["CD720"]),
        (Pooled(refuses=True), ["CD720"]),
    ],
    ids=["heard", "heard after an echo", "only its own echo", "nothing", "refused"],
)
async def test_wake_ups_count_as_working_when_they_are_heard(
    outbox: Outbox, clock: FakeClock, wake_ups: Pooled, codes: list[str]
) -> None:
    """Behind a pooler LISTEN succeeds, and hears itself alone."""
    outbox.wake_ups = wake_ups

    assert [finding.code for finding in await found(outbox, clock)] == codes


async def test_parked_records_are_mentioned(outbox: Outbox, clock: FakeClock) -> None:
    """Nobody else decides about them."""
    outbox.backlog_ = Backlog(pending=0, parked=3, oldest=None)

    assert [finding.code for finding in await found(outbox, clock)] == ["CD721"]
