"""A parked message holds its key: what comes later is kept behind it, and follows in order once it is through."""

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any

import anyio
import pytest

from cqrs_decor import Envelope, Park, Registry, Retry, Settings
from cqrs_decor.inbox import InboxFilter
from cqrs_decor.memory import MemoryBroker, MemoryInbox, MemoryStore
from cqrs_decor.observers import MessageConsumed, MessagesHeld
from tests.unit.apps import eventually
from tests.unit.shop import (
    HOURS,
    Moments,
    Paid,
    Refunded,
    Shop,
    advance_until,
    advance_until_none_parked,
    ledger,
    paid,
    shop_with,
)

pytestmark = [pytest.mark.feature("B4"), pytest.mark.feature("B6")]


class Bank:
    """A registry with one consumer that refuses what the test says, and writes down what it booked."""

    def __init__(self, *refused: str, **options: Any) -> None:
        self.registry, self.booked, self.tried = Registry("bank"), list[str](), list[str]()
        self.refused = set(refused)

        @self.registry.event_handler(name="book", retry=Retry(max_attempts=1), **options)
        async def book(event: Paid) -> None:
            name = f"{event.order}{event.amount}"
            self.tried.append(name)
            if name in self.refused:
                raise Park("refused")
            self.booked.append(name)


async def names(shop: Shop, **wanted: Any) -> list[str]:
    """What is parked, the oldest first, and whether it only waits."""
    found = await shop.store.inbox.find(InboxFilter(**wanted))
    return [f"{each.envelope.id.removeprefix('paid-')}{' held' if each.held else ''}" for each in found]


@pytest.mark.parametrize("optimistic", [False, True], ids=["single", "optimistic"])
async def test_what_comes_after_a_parked_message_of_its_key_is_kept_behind_it(optimistic: bool) -> None:
    """An account that was credited before it was opened is wrong for good; other accounts go on."""
    bank, moments = Bank("a1", optimistic=optimistic), Moments()

    async with shop_with(bank.registry, observers=[moments], settings=Settings(worker_concurrency=1)) as shop:
        await shop.receive(*(paid(order, amount=amount) for amount in (1, 2, 3) for order in "ab"))

        assert await names(shop) == ["a-1", "a-2 held", "a-3 held"]
    assert sorted(set(bank.booked)) == ["b1", "b2", "b3"]
    assert [each.count for each in moments.of(MessagesHeld)] == [1, 1]
    assert [each.outcome for each in moments.of(MessageConsumed)].count("held") == 2


async def test_what_is_known_to_stand_behind_is_not_tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A poisoned key that goes on sending must not take twice its share of the database from the healthy ones."""
    bank, asked = Bank("a1"), list[str]()
    record = MemoryInbox.record

    async def count(inbox: MemoryInbox, transaction: Any, consumer: str, envelope: Envelope) -> Any:
        asked.append(envelope.id)
        return await record(inbox, transaction, consumer, envelope)

    monkeypatch.setattr(MemoryInbox, "record", count)
    async with shop_with(bank.registry, settings=Settings(worker_concurrency=1)) as shop:
        await shop.receive(*(paid(amount=amount) for amount in range(1, 6)))

        assert await names(shop) == ["a-1", "a-2 held", "a-3 held", "a-4 held", "a-5 held"]
    assert asked == ["paid-a-1"]


async def test_a_key_that_was_released_meanwhile_goes_its_way() -> None:
    """By an operator, or by another worker, of which this one knows nothing."""
    bank = Bank("a1")

    async with shop_with(bank.registry) as shop:
        await shop.receive(paid(), paid(amount=2))
        (first, second) = await shop.store.inbox.find(InboxFilter())
        await shop.store.inbox.discard([first.id, second.id], who="test")
        await shop.receive(paid(amount=3), paid(amount=4))

        assert await names(shop) == []
    assert bank.booked == ["a3", "a4"]


async def test_without_holding_it_would_be_overtaken() -> None:
    """The negative control: an inbox that holds no key lets the second one pass."""

    class HoldsNothing(MemoryInbox):
        async def park(self, parked: Any) -> bool:
            kept = await super().park(parked)
            self._lines.clear()
            return kept

    bank, store = Bank("a1"), MemoryStore()
    store.inbox = HoldsNothing()
    async with shop_with(bank.registry, store=store) as shop:
        await shop.receive(paid(), paid(amount=2))

    assert bank.booked == ["a2"]


async def test_messages_without_a_key_hold_back_nothing() -> None:
    """No key, no order."""
    bank = Bank("a1")

    async with shop_with(bank.registry) as shop:
        await shop.receive(paid(key=None), paid(amount=2, key=None))

    assert bank.booked == ["a2"]


async def test_each_consumer_holds_the_key_for_itself() -> None:
    """One handler's trouble is none of the other's."""
    bank, thanked = Bank("a1"), list[int]()

    @bank.registry.event_handler(name="thank")
    async def thank(event: Paid) -> None:
        thanked.append(event.amount)

    async with shop_with(bank.registry) as shop:
        await shop.receive(paid(), paid(amount=2))

    assert thanked == [1, 2]
    assert bank.booked == []


async def test_a_retry_brings_the_whole_chain_in_order_and_at_once() -> None:
    """The operator mends one; a thousand behind it must not take two seconds each."""
    bank = Bank("a1")

    async with shop_with(bank.registry) as shop:
        await shop.receive(*(paid(amount=amount) for amount in range(1, 21)))
        bank.refused.clear()
        await shop.ask_for_all()
        shop.clock.advance(timedelta(seconds=2))  # once
        await eventually(lambda: len(bank.booked) == 20)

        assert await shop.parked() == []
        await shop.receive(paid(amount=21))
    assert bank.booked == [f"a{amount}" for amount in range(1, 22)]


async def test_a_chain_stops_where_one_fails_again() -> None:
    """What stands behind that one goes on waiting."""
    bank = Bank("a1", "a3")

    async with shop_with(bank.registry) as shop:
        await shop.receive(*(paid(amount=amount) for amount in range(1, 6)))
        bank.refused.discard("a1")
        await shop.ask_for_all()
        await advance_until(shop, lambda: bank.tried[-1] == "a3")
        await anyio.wait_all_tasks_blocked()

        assert await names(shop) == ["a-3", "a-4 held", "a-5 held"]
        assert bank.booked == ["a1", "a2"]
        bank.refused.clear()
        await shop.ask_for_all()
        await advance_until_none_parked(shop)
    assert bank.booked == ["a1", "a2", "a3", "a4", "a5"]


async def test_arrivals_during_a_retry_go_behind_it() -> None:
    """While the chain is worked off, the topic goes on; whoever comes in then is last."""
    bank = Registry("bank")
    seen: list[str] = []
    broken = True
    entered, go_on = asyncio.Event(), asyncio.Event()

    @bank.event_handler(name="book", retry=Retry(max_attempts=1))
    async def book(event: Paid) -> None:
        if broken:
            raise LookupError
        entered.set()
        await go_on.wait()
        seen.append(f"{event.order}{event.amount}")

    async with shop_with(bank) as shop:
        await shop.receive(paid(), paid(amount=2))
        broken = False
        await shop.ask_for_all()
        await advance_until(shop, entered.is_set)
        await shop.broker.publish([paid(amount=3), paid(amount=4)])
        await anyio.wait_all_tasks_blocked()
        go_on.set()
        await advance_until_none_parked(shop)
        await shop.settled()

    assert seen == ["a1", "a2", "a3", "a4"]


async def test_when_the_first_is_discarded_those_behind_it_follow() -> None:
    """Giving the poison up is enough."""
    bank = Bank("a1")

    async with shop_with(bank.registry) as shop:
        await shop.receive(paid(), paid(amount=2), paid(amount=3))
        (first,) = await shop.store.inbox.find(InboxFilter(held=False))
        await shop.store.inbox.discard([first.id], who="test")
        await advance_until_none_parked(shop)
        await shop.receive(paid())

    assert bank.booked == ["a2", "a3"]
    assert bank.tried == ["a1", "a2", "a3"], "and the one that was given up is not run when it comes again"


async def test_different_keys_are_retried_side_by_side() -> None:
    """A retry that backs off for an hour must not hold up the retries of all others."""
    bank = Registry("bank")
    seen: list[str] = []
    broken = True

    @bank.event_handler(name="book", retry=HOURS)
    async def book(event: Paid) -> None:
        if broken:
            raise Park("not yet")
        if event.order == "slow":
            raise LookupError
        seen.append(event.order)

    async with shop_with(bank) as shop:
        await shop.receive(paid("slow"), paid("quick"))
        broken = False
        await shop.ask_for_all()
        await advance_until(shop, lambda: seen == ["quick"])


async def test_a_retry_that_is_stopped_is_asked_for_again() -> None:
    """A deployment in the middle of a chain: the next worker goes on with it."""
    bank = Registry("bank")
    seen: list[str] = []
    state = "broken"

    @bank.event_handler(name="book", retry=HOURS)
    async def book(event: Paid) -> None:
        if state == "broken":
            raise Park("no such account")
        if state == "shaky":
            raise LookupError
        seen.append(f"{event.order}{event.amount}")

    broker, store = MemoryBroker(), MemoryStore()
    async with shop_with(bank, broker=broker, store=store) as shop:
        await shop.receive(paid(), paid(amount=2))
        state = "shaky"
        await shop.ask_for_all()
        with anyio.fail_after(10):
            while timedelta(hours=1) not in shop.clock.waits:
                shop.clock.advance(timedelta(milliseconds=500))
                await anyio.sleep(0.001)
    (first, _) = await store.inbox.find(InboxFilter())
    state = "mended"
    async with shop_with(bank, broker=broker, store=store) as shop:
        await advance_until_none_parked(shop)

    assert (first.retry_requested, first.error) == (True, "Park: no such account")
    assert seen == ["a1", "a2"]


async def test_a_retry_that_takes_the_worker_with_it_is_not_repeated() -> None:
    """A message that kills the process would otherwise kill every worker that starts."""
    bank = Registry("bank")
    tries: list[int] = []

    @bank.event_handler(name="book", retry=Retry(max_attempts=1))
    async def book(event: Paid) -> None:
        tries.append(event.amount)
        if len(tries) == 1:
            raise LookupError
        await asyncio.Event().wait()

    broker, store = MemoryBroker(), MemoryStore()
    async with shop_with(bank, broker=broker, store=store, settings=Settings(drain_limit_s=0)) as shop:
        await shop.receive(paid())
        await shop.ask_for_all()
        await advance_until(shop, lambda: len(tries) == 2)
    (parked,) = await store.inbox.find(InboxFilter())
    async with shop_with(bank, broker=broker, store=store) as shop:
        shop.clock.advance(timedelta(seconds=10))
        await anyio.wait_all_tasks_blocked()

    assert (parked.error, parked.retry_requested) == (
        "a worker that tried it again did not come back; before that: LookupError",
        False,
    )
    assert len(tries) == 2


async def test_what_cannot_be_read_holds_the_key_for_its_consumers() -> None:
    """A newer version came before an older one: its effects come first, in each consumer of that event."""
    sales, seen = ledger()

    @sales.event_handler(name="refund")
    async def refund(event: Refunded) -> None:
        seen.append(f"refund {event.order}")

    async with shop_with(sales) as shop:
        await shop.receive(
            paid(version=9), paid(amount=2), paid("b"), paid(id="r", type="worker.refunded", data=b'{"order": "a"}')
        )

        assert await names(shop) == ["a-1", "a-2 held"]
    assert sorted(seen) == ["b1", "refund a"]


async def test_an_event_of_an_unknown_type_holds_back_no_consumer() -> None:
    """A producer begins to send something new: nobody here has asked for it, nobody waits for it."""
    sales, seen = ledger()

    async with shop_with(sales) as shop:
        await shop.receive(paid(id="new", type="worker.new"), paid(amount=2))

        assert [each.consumer for each in await shop.parked()] == ["shop"]
    assert seen == ["a2"]


async def test_of_what_cannot_be_read_a_repeat_is_parked_once() -> None:
    """A redelivery of a parked message is a duplicate."""
    sales, _ = ledger()

    async with shop_with(sales) as shop:
        await shop.receive(paid(version=9), paid(version=9), paid(amount=2), paid(amount=2))

        assert await names(shop) == ["a-1", "a-2 held"]


async def test_what_is_mended_by_a_release_is_handled_in_order() -> None:
    """Unreadable ones among readable ones of one key: after the mending they come as they were sent."""
    sales, seen = ledger()
    readable = [paid(amount=amount) for amount in (2, 4)]
    broken = [replace(paid(amount=amount), data=b"<xml/>") for amount in (1, 3)]

    async with shop_with(sales) as shop:
        await shop.receive(broken[0], readable[0], broken[1], readable[1])
        assert await names(shop) == ["a-1", "a-2 held", "a-3", "a-4 held"]
        mend(shop.store.inbox, paid(amount=1), paid(amount=3))
        await shop.ask_for_all()
        await advance_until_none_parked(shop)

    assert seen == ["a1", "a2", "a3", "a4"]


def mend(inbox: Any, *envelopes: Envelope) -> None:
    for parked in inbox._parked.values():
        for envelope in envelopes:
            if parked.envelope.id == envelope.id:
                inbox._parked[parked.id] = replace(parked, envelope=envelope)


async def test_a_lost_race_while_parking_is_run_again() -> None:
    """Operators and workers meet at the same rows: a deadlock there must not end the worker."""

    class DeadlockError(Exception):
        pass

    class Contended(MemoryInbox):
        races = 3

        async def park(self, parked: Any) -> bool:
            self.races -= 1
            if self.races >= 0:
                raise DeadlockError
            return await super().park(parked)

    class ContendedStore(MemoryStore):
        def is_transient(self, error: BaseException) -> bool:
            return isinstance(error, DeadlockError)

    bank, store = Bank("a1"), ContendedStore()
    store.inbox = Contended()
    async with shop_with(bank.registry, store=store) as shop:
        await shop.broker.publish([paid()])
        await advance_until(shop, lambda: bool(shop.worker.parked))

        assert await names(shop) == ["a-1"]
    assert bank.tried == ["a1"]
