"""Relays are woken by the commits of other processes, know whether that works, and are quiet when nothing happens."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import anyio
import pytest

from cqrs_decor import Command, IntegrationEvent, Registry, Settings, emit
from cqrs_decor.errors import StoreUnavailableError
from cqrs_decor.memory import MemoryOutbox, MemoryStore
from cqrs_decor.memory.wake_ups import MemoryWakeUps
from cqrs_decor.observers import ConnectionChanged, Observers, WakeUpChanged
from cqrs_decor.outbox import Ear, Heard
from cqrs_decor.testing import FakeClock
from cqrs_decor.wakeups import WakeUpSender
from tests.unit.apps import app_of, eventually
from tests.unit.relay_bench import Bench, MoodyBroker, Node, act, pass_time, record, running

pytestmark = pytest.mark.feature("O6")


class MoodyWakeUps(MemoryWakeUps):
    """Wake-ups that can be mute (as behind a transaction pooler), and whose connections can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.mute = False
        self.refuses = False
        self.cut = anyio.Event()
        self.connections = 0

    async def send(self) -> None:
        if not self.mute:
            await super().send()

    def echo(self, owner: str) -> None:
        if not self.mute:
            super().echo(owner)

    @asynccontextmanager
    async def listen(self, owner: str) -> AsyncGenerator[Ear, None]:
        if self.refuses:
            raise StoreUnavailableError("memory", "refused")
        self.connections += 1
        async with super().listen(owner) as ear:
            yield _CutEar(ear, self)


class _CutEar:
    def __init__(self, ear: Ear, wake_ups: MoodyWakeUps) -> None:
        self._ear, self._wake_ups = ear, wake_ups

    async def hear(self) -> Heard:
        heard: list[Heard] = []

        async def hear() -> None:
            heard.append(await self._ear.hear())
            tasks.cancel_scope.cancel()

        async def be_cut() -> None:
            await self._wake_ups.cut.wait()
            tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hear)
            tasks.start_soon(be_cut)
        if heard:
            return heard[0]
        raise StoreUnavailableError("memory", "cut")


def bench_with(wake_ups: MemoryWakeUps) -> Bench:
    bench = Bench()
    outbox = bench.store.outbox
    assert isinstance(outbox, MemoryOutbox)
    outbox.wake_ups = outbox._wake_ups = wake_ups
    return bench


async def write(bench: Bench, *ids: str) -> None:
    """A commit that no relay is told of."""
    transaction = await bench.store.begin()
    transaction.add([record(each) for each in ids])
    await transaction.commit()


def said(node: Node) -> list[bool]:
    return [each.works for each in node.recorder.of(WakeUpChanged)]


async def test_an_idle_relay_asks_at_most_once_in_five_seconds() -> None:
    """A hundred quiet services on one database must cost it nothing."""
    bench = Bench()
    node = Node(bench)

    async with running(node):
        await pass_time(bench.clock, 10)
        node.link.calls.clear()
        await pass_time(bench.clock, 60)

        assert node.link.calls.total() <= 12
        assert set(node.link.calls) == {"renew"}


async def test_a_relay_that_nothing_can_wake_looks_at_intervals() -> None:
    """Where the database has no wake-ups; and the control of the test above."""
    bench = Bench()
    bench.store.outbox.wake_ups = None
    node = Node(bench)

    async with running(node):
        await pass_time(bench.clock, 10)
        node.link.calls.clear()
        await pass_time(bench.clock, 10)
        await write(bench, "a1")
        await pass_time(bench.clock, 1)

        assert node.link.calls["claim"] >= 20
        assert bench.broker.reached == ["a1"]
        assert not node.relay.wake_ups_work
    assert said(node) == []


async def test_a_wake_up_is_enough() -> None:
    """No time passes between the wake-up and the record's way to the broker."""
    bench = Bench()
    node = Node(bench)

    async with running(node):
        await pass_time(bench.clock, 6)
        assert node.relay.wake_ups_work
        await write(bench, "a1")
        await act()
        before = list(bench.broker.reached)
        assert bench.store.outbox.wake_ups is not None
        await bench.store.outbox.wake_ups.send()
        await act()

        assert (before, bench.broker.reached) == ([], ["a1"])


async def test_a_lost_wake_up_costs_one_renewal() -> None:
    """The renewal says that something waits."""
    bench = Bench()
    node = Node(bench)

    async with running(node):
        await pass_time(bench.clock, 10)
        await write(bench, "a1")
        await pass_time(bench.clock, 5.25)

        assert bench.broker.reached == ["a1"]


async def test_a_rescheduled_record_goes_when_it_is_due_and_nobody_looks_before() -> None:
    """The relay that was refused knows when."""
    bench = Bench()
    bench.broker.refusals["a1"] = 1
    node = Node(bench)

    async with running(node):
        await pass_time(bench.clock, 6)
        await write(bench, "a1")
        node.relay.wake()
        await act()
        node.link.calls.clear()
        await pass_time(bench.clock, 3_599, step=1)
        before, looks = list(bench.broker.reached), node.link.calls["claim"]
        await pass_time(bench.clock, 2)

        assert (before, bench.broker.reached) == ([], ["a1"])
        assert looks <= node.link.calls["renew"]


async def test_wake_ups_that_are_not_heard_are_found_out_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Behind a transaction pooler LISTEN succeeds and nothing ever comes: polling takes over, and says so."""
    wake_ups = MoodyWakeUps()
    bench = bench_with(wake_ups)
    node = Node(bench)

    async with running(node):
        await pass_time(bench.clock, 6)
        wake_ups.mute = True
        await pass_time(bench.clock, 8)
        degraded = node.relay.wake_ups_work
        await write(bench, "a1")
        await pass_time(bench.clock, 1)
        reached = list(bench.broker.reached)
        await pass_time(bench.clock, 60)
        warnings = [each for each in caplog.records if each.__dict__.get("action") == "wake_ups_degraded"]
        wake_ups.mute = False
        await pass_time(bench.clock, 6)

        assert node.relay.wake_ups_work
    assert not degraded
    assert reached == ["a1"]
    assert len(warnings) == 1
    assert said(node) == [True, False, True]
    assert node.recorder.of(WakeUpChanged)[1].reason == "a renewal was not heard"


async def test_a_lost_connection_is_made_anew() -> None:
    """A database that is restarted cuts every listener."""
    wake_ups = MoodyWakeUps()
    bench = bench_with(wake_ups)
    node = Node(bench)

    async with running(node):
        await pass_time(bench.clock, 6)
        wake_ups.refuses = True
        wake_ups.cut.set()
        await pass_time(bench.clock, 30)
        cut, wake_ups.cut = node.relay.wake_ups_work, anyio.Event()
        wake_ups.refuses = False
        await pass_time(bench.clock, 6)

        assert (cut, node.relay.wake_ups_work) == (False, True)
        assert wake_ups.connections == 2
    assert said(node) == [True, False, True]


class CountedWakeUps(MemoryWakeUps):
    def __init__(self) -> None:
        super().__init__()
        self.sent = 0
        self.down = False

    async def send(self) -> None:
        self.sent += 1
        if self.down:
            raise StoreUnavailableError("memory", "down")


async def test_the_first_wake_up_goes_at_once_and_those_of_the_same_moment_as_one() -> None:
    """At a thousand commits a second, a NOTIFY for each would cost more than the rows."""
    wake_ups, clock = CountedWakeUps(), FakeClock()
    sender = WakeUpSender(wake_ups, clock, Observers())

    sender.wake()
    await act()
    first = wake_ups.sent
    for _ in range(100):
        sender.wake()
        await act()
    clock.advance(timedelta(milliseconds=5))
    await act()
    second = wake_ups.sent
    clock.advance(timedelta(milliseconds=5))
    await act()

    assert (first, second, wake_ups.sent) == (1, 2, 2)
    await sender.close()


async def test_a_wake_up_that_cannot_be_sent_fails_nobody_and_is_said_once() -> None:
    """The commit has happened; that nobody could be told of it is the relay's to find out."""
    moments: list[Any] = []

    class Keep:
        def notice(self, moment: Any) -> None:
            moments.append(moment)

    wake_ups, clock = CountedWakeUps(), FakeClock()
    sender = WakeUpSender(wake_ups, clock, Observers([Keep()]))
    wake_ups.down = True

    for _ in range(20):
        sender.wake()
        await act()
        clock.advance(timedelta(seconds=1))
    wake_ups.down = False
    await act()
    clock.advance(timedelta(seconds=1))
    await act()

    assert [each.up for each in moments if isinstance(each, ConnectionChanged)] == [False, True]
    assert wake_ups.sent <= 22
    await sender.close()


class Told(IntegrationEvent, topic="told", key="name", name="wakeups.told"):
    name: str


class Tell(Command[None]):
    name: str


@pytest.mark.feature("O1")
async def test_a_commit_wakes_the_relay_of_another_process() -> None:
    """The service commits, the relay runs elsewhere: no interval, however long, stands between them."""
    sales = Registry("sales")

    @sales.command_handler
    async def tell(command: Tell) -> None:
        emit(Told(name=command.name))

    store, broker, settings = MemoryStore(), MoodyBroker(), Settings(poll_interval_s=3600)
    async with (
        app_of(Registry("none"), database=store, broker=broker, run="relay", settings=settings) as relaying,
        app_of(sales, database=store, broker=broker, settings=settings) as service,
    ):
        await eventually(lambda: relaying.relay is not None and relaying.relay.wake_ups_work)
        for number in range(3):
            await service.send(Tell(name="a"))
            await eventually(lambda: len(broker.reached) == number + 1)  # noqa: B023 - used at once
