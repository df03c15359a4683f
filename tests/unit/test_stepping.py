"""A message that kills the process is found, goes alone, and is parked; the others hardly notice."""

import asyncio
from collections.abc import Collection
from typing import Any

import anyio
import pytest

from cqrs_decor import Registry, Settings
from cqrs_decor.errors import StoreUnavailableError
from cqrs_decor.inbox import InboxFilter, Mark
from cqrs_decor.lanes import lane_of
from cqrs_decor.memory import MemoryBroker, MemoryInbox, MemoryStore
from cqrs_decor.observers import CrashSuspected
from tests.unit.apps import eventually
from tests.unit.shop import HOURS, Moments, Paid, advance_until, ledger, paid, shop_with

pytestmark = pytest.mark.feature("B4")

AT_ONCE = Settings(drain_limit_s=0)
"""Leaving an app with this while a handler runs is as near to a crash as one process can come."""


class Marking(MemoryInbox):
    """Writes down what was noted."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[Mark] = []
        self.away = False

    async def mark(self, group: str, owner: str, marks: Collection[Mark]) -> None:
        if self.away:
            raise StoreUnavailableError("memory://", "restarting")
        self.marks.extend(marks)
        await super().mark(group, owner, marks)


def store_with(inbox: MemoryInbox) -> MemoryStore:
    store = MemoryStore()
    store.inbox = inbox
    return store


class Killer:
    """A consumer that never comes back from one message."""

    def __init__(self, poison: str = "poison", **options: Any) -> None:
        self.registry, self.seen, self.killed = Registry("killer"), list[str](), 0
        self.inside = 0
        self.beside: list[int] = []

        @self.registry.event_handler(name="book", **options)
        async def book(event: Paid) -> None:
            if event.order == poison:
                self.killed += 1
                self.beside.append(self.inside)
                await asyncio.Event().wait()
            self.inside += 1
            await anyio.lowlevel.checkpoint()
            self.inside -= 1
            self.seen.append(f"{event.order}{event.amount}")


@pytest.mark.parametrize("optimistic", [False, True], ids=["single", "optimistic"])
async def test_a_message_that_kills_workers_is_parked_and_the_rest_flows(optimistic: bool) -> None:
    """Without a note before the dispatch nobody can count what leaves no trace: it would kill workers for ever."""
    killer, broker, store, moments = Killer(optimistic=optimistic), MemoryBroker(partitions=1), MemoryStore(), Moments()
    await broker.publish([paid("a"), paid("poison"), paid("poison", amount=2), paid("b"), paid("c")])
    workers = 0

    while not await store.inbox.parked_count():
        workers += 1
        assert workers < 10
        before = killer.killed
        async with shop_with(
            killer.registry, broker=broker, store=store, settings=AT_ONCE, observers=[moments]
        ) as shop:
            await eventually(lambda before=before: killer.killed > before or bool(shop.worker.parked))
    async with shop_with(killer.registry, broker=broker, store=store) as shop:
        await shop.receive(paid("d"))

    parked, held = await store.inbox.find(InboxFilter())
    assert (killer.killed, workers) == (4, 5)
    assert parked.error.startswith("MessageKillsWorkersError (CD607): 3 workers in a row")
    assert (parked.consumer, held.held) == ("shop.book", True)
    assert set(killer.seen) == {"a1", "b1", "c1", "d1"}
    assert [each.crashes for each in moments.of(CrashSuspected)] == [0, 1, 2, 3]


async def test_once_the_killer_is_parked_the_others_go_as_ever() -> None:
    """One crash has one cause. Up to the end of the mark, thousands of messages would go one by one for nothing."""
    killer, broker, inbox = Killer(), MemoryBroker(partitions=2), Marking()
    store = store_with(inbox)
    await broker.publish([paid("poison"), *(paid(str(number)) for number in range(20))])
    for number in range(1, 5):
        async with shop_with(killer.registry, broker=broker, store=store, settings=AT_ONCE):
            await eventually(lambda number=number: killer.killed == number)
    async with shop_with(killer.registry, broker=broker, store=store) as shop:
        await eventually(lambda: bool(shop.worker.parked))
        await shop.settled()
        before = len(inbox.marks)
        await shop.receive(*(paid(str(number)) for number in range(20, 220)))

    assert len(killer.seen) == 220
    assert {mark.suspect for mark in inbox.marks[before:]} == {None}


async def test_without_marks_it_would_kill_for_ever() -> None:
    """The negative control."""

    class NotesNothing(MemoryInbox):
        async def mark(self, group: str, owner: str, marks: Collection[Mark]) -> None:
            """Forgets it at once."""

    killer, broker, store = Killer(), MemoryBroker(partitions=1), store_with(NotesNothing())
    await broker.publish([paid("poison")])
    for number in range(1, 8):
        async with shop_with(killer.registry, broker=broker, store=store, settings=AT_ONCE):
            await eventually(lambda number=number: killer.killed == number)

    assert await store.inbox.parked_count() == 0


async def test_one_mark_covers_many_messages() -> None:
    """A transaction for each message would halve the throughput."""
    sales, seen = ledger()
    inbox = Marking()
    settings = Settings(worker_prefetch=100)

    async with shop_with(sales, broker=MemoryBroker(partitions=1), store=store_with(inbox), settings=settings) as shop:
        await shop.receive(*(paid(str(number)) for number in range(1_000)))

    assert len(seen) == 1_000
    assert len(inbox.marks) <= 11
    assert {each.suspect for each in inbox.marks} == {None}


async def test_nothing_is_dispatched_beyond_a_mark() -> None:
    """Else the message that kills might be one that nobody suspects."""
    inbox = Marking()
    sales = Registry("sales")
    beyond: list[int] = []

    @sales.event_handler
    async def book(event: Paid) -> None:
        if event.amount > max(mark.until for mark in inbox.marks):
            beyond.append(event.amount)

    settings = Settings(worker_prefetch=10)
    async with shop_with(sales, broker=MemoryBroker(partitions=1), store=store_with(inbox), settings=settings) as shop:
        await shop.receive(*(paid(str(number), amount=number) for number in range(200)))

    assert beyond == []


async def test_a_worker_that_stops_in_order_leaves_no_mark() -> None:
    """Every deployment would otherwise be taken for a crash."""
    sales, _ = ledger()
    broker, store, moments = MemoryBroker(), MemoryStore(), Moments()
    async with shop_with(sales, broker=broker, store=store) as shop:
        await shop.receive(paid(), paid("b"))
    async with shop_with(sales, broker=broker, store=store, observers=[moments]) as shop:
        await shop.receive(paid("c"), paid("d"))

    assert moments.of(CrashSuspected) == []


async def test_partitions_that_are_given_away_carry_no_mark() -> None:
    """A rebalance is no crash either."""
    sales, seen = ledger()
    broker, store, moments = MemoryBroker(), MemoryStore(), Moments()
    async with shop_with(sales, broker=broker, store=store) as first:
        await first.receive(*(paid(str(number)) for number in range(40)))
        async with shop_with(sales, broker=broker, store=store, observers=[moments]) as second:
            await second.receive(*(paid(str(number)) for number in range(40, 80)))
            await first.settled()

    assert len(seen) == 80
    assert moments.of(CrashSuspected) == []


async def test_nothing_is_dispatched_while_marks_cannot_be_noted() -> None:
    """The database is away: what is run unmarked now might be what ended it."""
    sales, seen = ledger()
    inbox = Marking()
    inbox.away = True

    async with shop_with(sales, store=store_with(inbox)) as shop:
        await shop.broker.publish([paid()])
        await eventually(lambda: shop.worker.in_flight == 1 and bool(shop.clock.waits))
        shop.clock.advance_to_last()
        await anyio.wait_all_tasks_blocked()
        while_away = list(seen)
        inbox.away = False
        await advance_until(shop, lambda: bool(seen))

    assert (while_away, seen) == ([], ["a1"])


async def test_after_a_crash_one_message_of_the_partition_is_in_hand_at_a_time() -> None:
    """The next crash then names the one that did it."""
    running, most = 0, 0
    inbox = Marking()
    sales = Registry("sales")

    @sales.event_handler
    async def book(event: Paid) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await anyio.lowlevel.checkpoint()
        running -= 1

    await MemoryInbox.mark(inbox, "shop", "gone", [Mark(topic="payments", partition=0, until=9)])
    settings = Settings(worker_prefetch=100)
    async with shop_with(sales, broker=MemoryBroker(partitions=1), store=store_with(inbox), settings=settings) as shop:
        await shop.receive(*(paid(str(number)) for number in range(10)))
        stepped, most = most, 0
        await shop.receive(*(paid(str(number)) for number in range(10, 40)))

    assert (stepped, most > 1) == (1, True)
    assert [each.suspect for each in inbox.marks if each.suspect is not None] == list(range(10))
    assert inbox.marks[-1].suspect is None


async def test_a_suspect_runs_alone() -> None:
    """If the worker vanishes now it was this message, and no other one is counted for it."""
    sales = Registry("sales")
    log: list[str] = []
    go_on = asyncio.Event()

    @sales.event_handler
    async def book(event: Paid) -> None:
        log.append(f"in {event.order}")
        if event.order == suspect:
            await go_on.wait()
        await anyio.lowlevel.checkpoint()
        log.append(f"out {event.order}")

    orders = [str(number) for number in range(20)]
    suspect = next(order for order in orders if lane_of("payments", order, "", 2) == 0)
    store = MemoryStore()
    await store.inbox.mark("shop", "gone", [Mark(topic="payments", partition=0, until=5, suspect=0)])
    async with shop_with(sales, broker=MemoryBroker(partitions=2), store=store) as shop:
        await shop.broker.publish([paid(suspect), *(paid(order) for order in orders if order != suspect)])
        await eventually(lambda: f"in {suspect}" in log)
        await anyio.wait_all_tasks_blocked()
        at = log.index(f"in {suspect}")
        entered = log[:at]
        assert log[at:] == [f"in {suspect}"]
        go_on.set()
        await shop.settled()

    assert len([line for line in entered if line.startswith("in ")]) == len(
        [line for line in entered if line.startswith("out ")]
    )
    assert log[at + 1] == f"out {suspect}"
    assert len(log) == 40


@pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
async def test_what_a_suspect_outlived_is_on_record_before_the_next_one_goes(fails: bool) -> None:
    """Else the one that kills takes the innocent along, death by death, until both are parked."""
    sales, inbox = Registry("sales"), Marking()
    suspected: list[int] = []

    @sales.event_handler(retry=HOURS)
    async def book(event: Paid) -> None:
        marks = {mark.partition: mark.suspect for mark in inbox.marks}
        suspected.append(sum(suspect is not None for suspect in marks.values()))
        if fails:
            raise LookupError

    vanished = [Mark(topic="payments", partition=number, until=5, suspect=0) for number in range(4)]
    await MemoryInbox.mark(inbox, "shop", "gone", vanished)
    orders = {lane_of("payments", str(number), "", 4): str(number) for number in range(50)}
    async with shop_with(sales, broker=MemoryBroker(partitions=4), store=store_with(inbox)) as shop:
        await shop.broker.publish([paid(order) for order in orders.values()])
        await eventually(lambda: len(suspected) == 4)

    assert suspected == [1, 1, 1, 1]


async def test_what_is_met_on_the_way_does_not_acquit_the_accused() -> None:
    """Else another kill or a rebalance before it is reached begins its count anew, and it kills for ever."""
    sales, seen = ledger()
    inbox = Marking()
    await MemoryInbox.mark(inbox, "shop", "gone", [Mark(topic="payments", partition=0, until=4, suspect=3)])
    async with shop_with(sales, broker=MemoryBroker(partitions=1), store=store_with(inbox)) as shop:
        await shop.receive(*(paid(str(number)) for number in range(5)))

    on_the_way = [each.crashes for each in inbox.marks if each.suspect in (0, 1, 2)]
    assert on_the_way == [{3: 1}] * 3
    assert inbox.marks[-1].crashes == {}
    assert len(seen) == 5


async def test_one_that_fails_and_waits_does_not_hold_up_the_steps() -> None:
    """It has been tried, and the process is still there."""
    sales = Registry("sales")
    seen: list[str] = []

    @sales.event_handler(retry=HOURS)
    async def book(event: Paid) -> None:
        if event.order == "sick":
            raise LookupError
        seen.append(event.order)

    store = MemoryStore()
    await store.inbox.mark("shop", "gone", [Mark(topic="payments", partition=0, until=9, suspect=0)])
    async with shop_with(sales, broker=MemoryBroker(partitions=1), store=store) as shop:
        await shop.broker.publish([paid("sick"), paid("sick", amount=2), paid("a"), paid("b")])
        await eventually(lambda: seen == ["a", "b"])


async def test_each_consumer_that_has_not_had_the_killer_has_it_parked() -> None:
    """One of two consumers was through with it before the other one killed the worker."""
    sales, seen = ledger()

    @sales.event_handler(name="mail")
    async def mail(event: Paid) -> None:
        seen.append("mail")

    store = MemoryStore()
    transaction = await store.begin()
    await store.inbox.record(transaction, "shop.mail", paid())
    await transaction.commit()
    await store.inbox.mark("shop", "gone", [Mark(topic="payments", partition=0, until=9, suspect=0, crashes={0: 2})])
    async with shop_with(sales, broker=MemoryBroker(partitions=1), store=store) as shop:
        await shop.receive(paid())

        assert [each.consumer for each in await shop.parked()] == ["shop.book"]
    assert seen == []
