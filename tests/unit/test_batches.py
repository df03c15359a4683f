"""Optimistic batches: many messages in one transaction, with the same outcomes as one by one."""

import asyncio
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import pytest

from cqrs_decor import (
    DomainEvent,
    Envelope,
    IntegrationEvent,
    MessageContext,
    Park,
    Registry,
    Retry,
    RetryLater,
    Settings,
    emit,
)
from cqrs_decor.errors import InvalidOptionError, StoreUnavailableError
from cqrs_decor.inbox import InboxFilter, Noted
from cqrs_decor.memory import MemoryBroker, MemoryInbox, MemoryStore, MemoryTransaction
from cqrs_decor.observers import BatchUndone, MessageConsumed
from cqrs_decor.outbox import OutboxFilter
from tests.unit.apps import eventually, faults_of
from tests.unit.shop import HOURS, Moments, Paid, Refunded, advance_until, paid, shop_with

pytestmark = pytest.mark.feature("B7")

ONE_LANE = Settings(worker_concurrency=1)
ONCE = Retry(max_attempts=1)


class Ledger:
    """A store that counts its transactions, and business rows that are written when theirs commits."""

    def __init__(self) -> None:
        self.rows: list[str] = []
        self.commits = 0
        ledger = self

        class Counting(MemoryTransaction):
            async def commit(self) -> None:
                ledger.commits += 1
                await super().commit()

        class Store(MemoryStore):
            async def begin(self, *, read_only: bool = False) -> MemoryTransaction:
                return Counting(self._outbox)

        self.store = Store()

    def write(self, row: str) -> None:
        transaction: Any = MessageContext.current().unit_of_work.transaction
        transaction.at_commit(lambda: self.rows.append(row))


def booking(ledger: Ledger, **options: Any) -> tuple[Registry, list[str]]:
    """One optimistic consumer; what it refuses can be added to the list."""
    sales, refused = Registry("sales"), list[str]()

    @sales.event_handler(name="book", **{"optimistic": True, "retry": ONCE, **options})
    async def book(event: Paid) -> None:
        name = f"{event.order}{event.amount}"
        ledger.write(name)
        if name in refused:
            raise LookupError(name)

    return sales, refused


def many(count: int, keys: int = 7) -> list[Envelope]:
    return [paid(str(number % keys), amount=number) for number in range(count)]


def in_order_per_key(rows: Sequence[str], keys: int = 7) -> bool:
    amounts: dict[str, list[int]] = {str(key): [] for key in range(keys)}
    for row in rows:
        amounts[row[0]].append(int(row[1:]))
    return all(each == sorted(each) for each in amounts.values())


async def test_a_run_of_messages_is_one_transaction() -> None:
    """That is all the speed there is to gain: a commit each is what a consumer pays for."""
    ledger, moments = Ledger(), Moments()
    sales, _ = booking(ledger)

    settings = Settings(worker_concurrency=1, worker_batch=50)
    async with shop_with(sales, store=ledger.store, settings=settings, observers=[moments]) as shop:
        await shop.receive(*many(200))

        assert shop.worker.handled == 200
    assert (len(ledger.rows), in_order_per_key(ledger.rows)) == (200, True)
    assert ledger.commits <= 10
    assert [each.outcome for each in moments.of(MessageConsumed)] == ["done"] * 200


async def test_a_consumer_that_is_not_optimistic_has_a_transaction_for_each() -> None:
    """The negative control."""
    ledger = Ledger()
    sales, _ = booking(ledger, optimistic=False)

    async with shop_with(sales, store=ledger.store, settings=ONE_LANE) as shop:
        await shop.receive(*many(50))

    assert (len(ledger.rows), ledger.commits) == (50, 50)


async def test_a_batch_that_fails_is_undone_and_run_one_by_one() -> None:
    """One of them is bad: it is parked, and every other one has its effect once."""
    ledger, moments = Ledger(), Moments()
    sales, refused = booking(ledger)
    refused.append("33")

    async with shop_with(sales, store=ledger.store, settings=ONE_LANE, observers=[moments]) as shop:
        await shop.receive(*many(20))
        found = await shop.parked()

    assert [(each.envelope.id, each.error, each.held) for each in found] == [
        ("paid-3-3", "LookupError", False),
        ("paid-3-10", "stands behind an earlier message of its key", True),
        ("paid-3-17", "stands behind an earlier message of its key", True),
    ]
    assert (len(ledger.rows), in_order_per_key(ledger.rows)) == (17, True)
    assert {(each.consumer, each.error) for each in moments.of(BatchUndone)} == {("shop.book", "LookupError")}


async def test_a_held_key_does_not_undo_the_batches_of_others() -> None:
    """Once a poison message is parked, its key's later messages come in every batch: healthy keys must not pay."""
    ledger, moments = Ledger(), Moments()
    sales, refused = booking(ledger)
    refused.append("33")

    async with shop_with(sales, store=ledger.store, settings=ONE_LANE, observers=[moments]) as shop:
        await shop.receive(*many(7))
        undone = len(moments.of(BatchUndone))
        ledger.commits = 0
        await shop.receive(*many(207)[7:])
        held = await shop.store.inbox.find(InboxFilter(held=True, limit=1_000))

        assert len(moments.of(BatchUndone)) == undone
    assert [each.envelope.id for each in held] == [f"paid-3-{number}" for number in range(10, 207, 7)]
    assert (len(ledger.rows), in_order_per_key(ledger.rows)) == (207 - 30, True)


@pytest.mark.parametrize(
    "error", [Park("no"), RetryLater(timedelta(hours=1)), LookupError()], ids=["park", "later", "error"]
)
async def test_what_a_handler_says_counts_in_the_single_mode_only(error: Exception) -> None:
    """A policy is about one message: the attempt in the batch is none."""
    ledger, attempts = Ledger(), list[int]()
    sales = Registry("sales")

    @sales.event_handler(optimistic=True, retry=HOURS)
    async def book(event: Paid) -> None:
        attempts.append(MessageContext.current().attempt)
        if event.order == "sick":
            raise error

    async with shop_with(sales, store=ledger.store, settings=ONE_LANE) as shop:
        await shop.broker.publish([paid("sick"), paid("a"), paid("b")])
        await eventually(lambda: shop.worker.handled == 2)
        await eventually(lambda: shop.worker.idle or timedelta(hours=1) in shop.clock.waits)
        await shop.broker.publish([paid("sick", amount=2), paid("c"), paid("d")])
        await eventually(lambda: shop.worker.handled == 4)

    assert set(attempts) == {1}


async def test_while_a_key_waits_for_its_next_attempt_its_later_messages_wait_and_the_others_do_not() -> None:
    """A key that is on its own keeps its order, however many batches pass it by."""
    ledger = Ledger()
    sales = Registry("sales")
    broken = True

    @sales.event_handler(optimistic=True, retry=HOURS)
    async def book(event: Paid) -> None:
        ledger.write(f"{event.order}{event.amount}")
        if event.order == "3" and broken:
            raise LookupError

    async with shop_with(sales, store=ledger.store, settings=ONE_LANE) as shop:
        await shop.broker.publish(many(20))
        await shop.until_waiting(timedelta(hours=1))
        await shop.broker.publish(many(40)[20:])
        await eventually(lambda: len(ledger.rows) == 34)
        broken = False
        shop.clock.advance(timedelta(hours=1))
        await shop.settled()

    assert (len(ledger.rows), in_order_per_key(ledger.rows)) == (40, True)


async def test_repeats_within_a_batch_and_over_batches_are_dropped() -> None:
    """Effects once, as ever."""
    ledger, moments = Ledger(), Moments()
    sales, _ = booking(ledger)

    async with shop_with(sales, store=ledger.store, settings=ONE_LANE, observers=[moments]) as shop:
        await shop.receive(*many(10), *many(10))
        await shop.receive(*many(12))

        assert shop.worker.handled == 12
    assert len(ledger.rows) == 12
    assert [each.outcome for each in moments.of(MessageConsumed)].count("duplicate") == 20


async def test_each_message_has_its_own_context_and_its_events_are_in_the_transaction() -> None:
    """Ids of cause and effect must not be mixed up by sharing a transaction."""
    sales = Registry("sales")
    seen: list[tuple[str, str, str]] = []

    @sales.event_handler(name="book", optimistic=True)
    async def book(event: Paid, context: MessageContext) -> None:
        assert MessageContext.current() is context
        seen.append((context.id, context.correlation_id, context.idempotency_key))
        emit(Refunded(order=event.order))

    envelopes = [paid(str(number), correlation_id=f"c{number}") for number in range(5)]
    async with shop_with(sales, settings=ONE_LANE) as shop:
        await shop.receive(*envelopes)
        records = await shop.store.outbox.find(OutboxFilter())

    assert sorted(seen) == [(f"paid-{n}-1", f"c{n}", f"shop.book:till:paid-{n}-1") for n in range(5)]
    assert sorted((each.envelope.causation_id, each.envelope.correlation_id) for each in records) == [
        (f"paid-{n}-1", f"c{n}") for n in range(5)
    ]


async def test_events_of_a_batch_that_was_undone_are_written_once() -> None:
    """What the batch had emitted goes with it."""
    sales = Registry("sales")

    @sales.event_handler(optimistic=True, retry=ONCE)
    async def book(event: Paid) -> None:
        emit(Refunded(order=event.order))
        if event.order == "4":
            raise LookupError

    async with shop_with(sales, settings=ONE_LANE) as shop:
        await shop.receive(*(paid(str(number)) for number in range(5)))
        records = await shop.store.outbox.find(OutboxFilter())

    assert sorted(each.envelope.causation_id or "" for each in records) == [f"paid-{n}-1" for n in range(4)]


class Booked(DomainEvent):
    order: str


async def test_domain_events_are_handled_for_each_message_within_the_transaction() -> None:
    """And isolated handlers after the commit of the batch."""
    ledger = Ledger()
    sales = Registry("sales")
    after: list[tuple[str, int]] = []

    @sales.event_handler(name="book", optimistic=True)
    async def book(event: Paid) -> None:
        ledger.write(f"paid {event.order}")
        emit(Booked(order=event.order))

    @sales.event_handler
    async def stock(event: Booked) -> None:
        ledger.write(f"stock {event.order}")

    @sales.event_handler(isolated=True)
    async def mail(event: Booked) -> None:
        after.append((event.order, len(ledger.rows)))

    async with shop_with(sales, store=ledger.store, settings=ONE_LANE) as shop:
        await shop.receive(paid("a"), paid("b"))

    assert sorted(ledger.rows) == ["paid a", "paid b", "stock a", "stock b"]
    assert sorted(after) == [("a", 4), ("b", 4)]


async def test_dependencies_of_a_message_are_made_and_closed_for_each() -> None:
    """Two messages must not find each other's leftovers."""
    sales = Registry("sales")
    log: list[str] = []

    class Basket:
        pass

    @sales.provider
    def basket() -> Iterator[Basket]:
        log.append("open")
        yield Basket()
        log.append("close")

    @sales.event_handler(optimistic=True)
    async def book(event: Paid, basket: Basket) -> None:
        log.append(event.order)

    async with shop_with(sales, settings=ONE_LANE) as shop:
        await shop.receive(paid("a"), paid("b"))

    assert [line for line in log if line in ("open", "close")] == ["open", "close"] * 2


async def test_a_middleware_that_swallows_a_failure_does_not_let_half_of_it_through() -> None:
    """The handler failed in the middle: what it wrote must not be committed with the others."""
    ledger = Ledger()
    sales = Registry("sales")

    @sales.middleware
    async def swallow(message: Any, call_next: Any) -> Any:
        try:
            return await call_next(message)
        except LookupError:
            return None

    @sales.event_handler(optimistic=True)
    async def book(event: Paid) -> None:
        ledger.write(event.order)
        if event.order == "bad":
            raise LookupError

    async with shop_with(sales, store=ledger.store, settings=ONE_LANE) as shop:
        await shop.receive(paid("a"), paid("bad"), paid("b"))

    assert sorted(ledger.rows) == ["a", "b"]


async def test_of_two_consumers_each_has_its_own_transaction() -> None:
    """One that fails does not undo the other."""
    ledger = Ledger()
    sales, refused = booking(ledger)
    refused.append("11")
    thanked: list[str] = []

    @sales.event_handler(name="thank", optimistic=True)
    async def thank(event: Paid) -> None:
        thanked.append(event.order)

    async with shop_with(sales, store=ledger.store, settings=ONE_LANE) as shop:
        await shop.receive(paid("1"), paid("2"), paid("3"))

    assert sorted(thanked) == ["1", "2", "3"]
    assert sorted(ledger.rows) == ["21", "31"]


async def test_a_topic_is_batched_only_if_all_its_consumers_agree(caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise the messages of one key would take two ways. It is said at the start."""
    ledger = Ledger()
    sales, _ = booking(ledger)

    @sales.event_handler(name="mail")
    async def mail(event: Refunded) -> None:
        """Has effects outside the database."""

    async with shop_with(sales, store=ledger.store, settings=ONE_LANE) as shop:
        await shop.receive(*many(20))

    assert ledger.commits == 20
    assert "no batches on topic payments: mail are not optimistic" in caplog.text


async def test_what_cannot_be_read_in_a_batch_is_parked_and_the_rest_is_done() -> None:
    """It never reaches a transaction."""
    ledger, moments = Ledger(), Moments()
    sales, _ = booking(ledger)

    async with shop_with(sales, store=ledger.store, settings=ONE_LANE, observers=[moments]) as shop:
        await shop.receive(paid("1"), paid("2", data=b"<xml/>"), paid("3"), paid("2", amount=2))

        assert [each.envelope.id for each in await shop.parked()] == ["paid-2-1", "paid-2-2"]
    assert sorted(ledger.rows) == ["11", "31"]
    assert moments.of(BatchUndone) == []


async def test_a_key_that_becomes_free_while_its_batch_is_noted_is_not_overtaken() -> None:
    """The first was held, then an operator gave the parked one up, and the second was new: it must not go first."""

    class FreedInBetween(MemoryInbox):
        async def record_all(self, transaction: Any, consumer: str, envelopes: Sequence[Envelope]) -> Sequence[Noted]:
            answers = list(await super().record_all(transaction, consumer, envelopes))
            return [Noted.HELD, *answers[1:]] if envelopes[0].id == "paid-a-1" else answers

    ledger, moments = Ledger(), Moments()
    ledger.store.inbox = FreedInBetween()
    sales, _ = booking(ledger)

    async with shop_with(
        sales, broker=MemoryBroker(partitions=1), store=ledger.store, settings=ONE_LANE, observers=[moments]
    ) as shop:
        await shop.receive(paid("a"), paid("a", amount=2), paid("b"))

    assert [row for row in ledger.rows if row[0] == "a"] == ["a1", "a2"]
    assert sorted(ledger.rows) == ["a1", "a2", "b1"]
    assert [each.messages for each in moments.of(BatchUndone)] == [3]


async def test_an_outage_in_the_middle_loses_nothing_and_parks_nothing() -> None:
    """The whole batch waits it out, one by one."""
    ledger = Ledger()
    sales = Registry("sales")
    failures = [StoreUnavailableError("db", "restarting") for _ in range(6)]

    @sales.event_handler(optimistic=True, retry=ONCE)
    async def book(event: Paid) -> None:
        if failures:
            raise failures.pop()
        ledger.write(event.order)

    async with shop_with(sales, store=ledger.store, settings=ONE_LANE) as shop:
        await shop.broker.publish([paid("a"), paid("b"), paid("c")])
        await advance_until(shop, lambda: len(ledger.rows) == 3)
        await shop.settled()

        assert await shop.parked() == []


@pytest.mark.feature("B11")
async def test_a_stop_in_the_middle_of_a_batch_finishes_it_and_leaves_the_rest() -> None:
    """Nothing is lost and nothing runs twice."""
    ledger = Ledger()
    sales = Registry("sales")
    entered, go_on = asyncio.Event(), asyncio.Event()

    @sales.event_handler(optimistic=True)
    async def book(event: Paid) -> None:
        ledger.write(f"{event.order}{event.amount}")
        entered.set()
        await go_on.wait()

    broker = MemoryBroker()
    settings = Settings(worker_concurrency=1, worker_batch=10)
    async with shop_with(sales, broker=broker, store=ledger.store, settings=settings) as shop:
        await broker.publish(many(25))
        await entered.wait()
        shop.worker.stop()
        go_on.set()
    at_the_stop = len(ledger.rows)
    async with shop_with(sales, broker=broker, store=ledger.store, settings=settings) as shop:
        await shop.settled()

    assert at_the_stop == 10
    assert (len(ledger.rows), in_order_per_key(ledger.rows)) == (25, True)


@pytest.mark.feature("B11")
async def test_a_batch_that_is_cancelled_is_rolled_back_and_comes_again() -> None:
    """The drain limit ended."""
    ledger = Ledger()
    sales = Registry("sales")
    entered = asyncio.Event()
    hang = True

    @sales.event_handler(optimistic=True)
    async def book(event: Paid) -> None:
        ledger.write(event.order)
        if hang and event.order == "c":
            entered.set()
            await asyncio.Event().wait()

    broker = MemoryBroker()
    settings = Settings(worker_concurrency=1, drain_limit_s=0)
    async with shop_with(sales, broker=broker, store=ledger.store, settings=settings):
        await broker.publish([paid(order) for order in "abc"])
        await entered.wait()
    at_the_cancellation = list(ledger.rows)
    hang = False
    async with shop_with(sales, broker=broker, store=ledger.store, settings=settings) as shop:
        await shop.settled()

    assert at_the_cancellation == []
    assert sorted(ledger.rows) == ["a", "b", "c"]


class Local(DomainEvent):
    pass


class Remote(IntegrationEvent, topic="remote", name="batches.remote"):
    pass


@pytest.mark.parametrize(
    ("message", "options", "option"),
    [
        (Local, {"optimistic": True}, "optimistic"),
        (Local, {"optimistic": True, "isolated": True}, "optimistic"),
        (Remote, {"optimistic": True, "isolated": True}, "isolated"),
        (Remote, {"optimistic": True, "concurrency": 2}, "concurrency"),
    ],
    ids=["domain event", "isolated domain event", "isolated", "concurrency"],
)
async def test_options_that_contradict_each_other_are_found_at_the_start(
    message: type[Any], options: dict[str, Any], option: str
) -> None:
    """An option that has no effect would be believed to have one."""
    sales = Registry("sales")
    sales.bind(message, handler_of(message), **options)

    (fault,) = await faults_of(sales)

    assert isinstance(fault, InvalidOptionError)
    assert fault.option == option


def handler_of(message: type[Any]) -> Any:
    async def handle(event: Any) -> None: ...

    handle.__annotations__["event"] = message
    return handle
