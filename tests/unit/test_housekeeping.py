"""Housekeeping: what is done with goes while a relay or worker runs, and never in anybody's way."""

import asyncio
from collections.abc import Callable
from datetime import timedelta

import anyio
import pytest

from cqrs_decor import Settings
from cqrs_decor.clock import SystemClock
from cqrs_decor.errors import StoreUnavailableError
from cqrs_decor.housekeeping import Housekeeping, retention_of
from cqrs_decor.observers import CleanedUp, ConnectionChanged, Moment, Observers
from cqrs_decor.store import Retention
from tests.unit.apps import app_of, eventually, in_background

pytestmark = pytest.mark.feature("O8")

MONTH = Retention(inbox=timedelta(days=30))


class Attic:
    """Holds rows that are done with."""

    name = "attic://"

    def __init__(self, rows: int, *, before_each: Callable[[], None] = lambda: None) -> None:
        self.rows = rows
        self.looks = 0
        self.asked: list[Retention] = []
        self._before_each = before_each

    async def clean_up(self, retention: Retention, limit: int) -> int:
        self.looks += 1
        self.asked.append(retention)
        self._before_each()
        gone = min(self.rows, limit)
        self.rows -= gone
        return gone


class Seen:
    def __init__(self) -> None:
        self.moments: list[Moment] = []

    def notice(self, moment: Moment) -> None:
        self.moments.append(moment)


def housekeeping_of(*attics: Attic, seen: Seen | None = None) -> Housekeeping:
    observers = Observers([seen] if seen else [])
    return Housekeeping(attics, MONTH, SystemClock(), observers, first_s=0.001, every_s=0.001)


async def test_everything_goes_chunk_by_chunk_and_is_told_once() -> None:
    """A year of rows in one transaction would block everybody for minutes."""
    attic, other, seen = Attic(2_500), Attic(1), Seen()

    async with in_background(housekeeping_of(attic, other, seen=seen).run):
        await eventually(lambda: attic.rows == other.rows == 0 and len(seen.moments) == 2)
        looks = attic.looks
        await eventually(lambda: attic.looks > looks)

    assert [moment.rows for moment in seen.moments if isinstance(moment, CleanedUp)] == [2_500, 1]
    assert set(attic.asked) == {MONTH}


async def test_it_stops_between_two_chunks() -> None:
    """A deployment does not wait until the attic is empty."""
    housekeeping: list[Housekeeping] = []
    attic = Attic(1_000_000, before_each=lambda: housekeeping[0].stop())
    housekeeping.append(housekeeping_of(attic))

    with anyio.fail_after(10):
        await housekeeping[0].run()

    assert attic.rows == 999_000


async def test_an_outage_is_waited_out() -> None:
    """The database is restarted: said once, and gone on with afterwards."""
    answers = [StoreUnavailableError("attic://", "restarting"), StoreUnavailableError("attic://", "restarting")]

    def fail_twice() -> None:
        if answers:
            raise answers.pop()

    attic, seen = Attic(1, before_each=fail_twice), Seen()
    async with in_background(housekeeping_of(attic, seen=seen).run):
        await eventually(lambda: attic.rows == 0 and len(seen.moments) == 3)

    changes = [moment.up for moment in seen.moments if isinstance(moment, ConnectionChanged)]
    assert changes == [False, True]


def test_settings_say_how_long_what_is_kept() -> None:
    """A history that is no longer wanted is not kept for ever: what is left of it goes."""
    retention = retention_of(Settings(log_retention_days=0.5))

    assert retention == Retention(
        inbox=timedelta(days=30),
        history=timedelta(0),
        idempotency=timedelta(days=7),
        log=timedelta(hours=12),
        groups=timedelta(days=30),
    )


async def test_it_runs_with_every_loop_and_stops_with_them() -> None:
    """Web processes that only send commands leave it to relays and workers."""
    tasks: dict[str, bool] = {}
    for run in ("relay", "worker", "none"):
        async with app_of(run=run):
            tasks[run] = _is_running()
        assert not _is_running()

    assert tasks == {"relay": True, "worker": True, "none": False}


def _is_running() -> bool:
    return any(task.get_name() == "cqrs-decor housekeeping" for task in asyncio.all_tasks())
