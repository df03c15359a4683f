"""However many met an outage, it is asked about once a second, and over for all of them at once."""

import logging
from datetime import timedelta

import anyio
import pytest

from cqrs_decor._loop import Outage, Turns
from cqrs_decor.errors import StoreUnavailableError
from cqrs_decor.observers import Observers
from cqrs_decor.testing import FakeClock
from tests.unit.apps import eventually

pytestmark = pytest.mark.feature("B6")

AWAY = StoreUnavailableError("db", "restarting")


class Crowd:
    """So many that try, and wait in turn each time it fails."""

    def __init__(self, many: int) -> None:
        self.many = many
        self.clock = FakeClock()
        self.outage = Outage("the inbox", logging.getLogger(__name__), self.clock, Observers())
        self.tries = self.through = 0
        self.away, self.given_up = True, False

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            for _ in range(self.many):
                tasks.start_soon(self._try)

    async def _try(self) -> None:
        while True:
            await self.outage.in_turn(lambda: self.given_up)
            if self.given_up:
                return
            self.tries += 1
            if not self.away:
                self.outage.over()
                self.through += 1
                return
            self.outage.begin(AWAY)

    async def seconds(self, count: int) -> None:
        for _ in range(count):
            await anyio.wait_all_tasks_blocked()
            self.clock.advance(timedelta(seconds=1))
        await anyio.wait_all_tasks_blocked()


async def test_of_many_one_asks_in_a_second() -> None:
    """A thousand messages in hand that ask each second are the next outage."""
    crowd = Crowd(1_000)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(crowd.run)
        await crowd.seconds(60)
        asked = crowd.tries
        crowd.away = False
        await crowd.seconds(1)
        await eventually(lambda: crowd.through == 1_000)

    assert 50 <= asked <= 62


async def test_parts_that_are_away_together_are_asked_in_turn_and_wake_each_other() -> None:
    """Relay and worker ask the same database: once a second in all. Who finds it back tells the other."""
    clock, turns, tries, found = FakeClock(), Turns(), list[str](), list[str]()
    away = {"outbox", "inbox"}

    async def ask(part: str) -> None:
        outage = Outage(part, logging.getLogger(__name__), clock, Observers(), turns)
        while part in away:
            tries.append(part)
            await outage.wait(AWAY)
        outage.over()
        found.append(part)

    async with anyio.create_task_group() as tasks:
        for part in sorted(away):
            tasks.start_soon(ask, part)
        for _ in range(30):
            await anyio.wait_all_tasks_blocked()
            clock.advance(timedelta(seconds=1))
        assert 25 <= len(tries) <= 32
        assert abs(tries.count("outbox") - tries.count("inbox")) <= 1
        away.clear()
        clock.advance(timedelta(seconds=1))
        await eventually(lambda: len(found) == 2)


async def test_many_parts_that_are_away_together_back_off_together() -> None:
    """If each of them began with a tenth of a second, the first seconds were the crowd that backing off avoids."""
    clock, turns, tries = FakeClock(), Turns(), list[str]()

    async def ask(part: str) -> None:
        outage = Outage(part, logging.getLogger(__name__), clock, Observers(), turns)
        while True:
            tries.append(part)
            await outage.wait(AWAY)

    parts = [f"part {number}" for number in range(20)]
    async with anyio.create_task_group() as tasks:
        for part in parts:
            tasks.start_soon(ask, part)
        for _ in range(100):
            await anyio.wait_all_tasks_blocked()
            clock.advance(timedelta(seconds=0.1))
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()

    again = len(tries) - len(parts)
    assert again <= 13, "0.1, 0.3, 0.7 and 1.5 s after the start, then each second"


async def test_those_that_are_given_up_do_not_wait_for_their_turn() -> None:
    """A stop in an outage would else last as many seconds as there are messages in hand."""
    crowd = Crowd(1_000)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(crowd.run)
        await crowd.seconds(5)
        crowd.given_up = True
        with anyio.fail_after(10):
            await crowd.seconds(1)
            tried = crowd.tries

    assert crowd.tries == tried <= 7
