"""The worker on memory: what comes in reaches each consumer once, or is parked with its reason; nothing is lost."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from cqrs_decor import (
    App,
    Command,
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
from cqrs_decor.broker import Delivery, Partition, Revoked, Start, Subscription
from cqrs_decor.errors import MalformedEnvelopeError, StoreUnavailableError
from cqrs_decor.inbox import ParkedMessage
from cqrs_decor.memory import MemoryBroker, MemoryStore
from cqrs_decor.observers import MessageConsumed, Moment
from cqrs_decor.outbox import OutboxFilter
from cqrs_decor.testing import FakeClock
from tests.unit.apps import app_of, eventually
from tests.unit.shop import (
    HOURS,
    Paid,
    Refunded,
    advance_until,
    advance_until_none_parked,
    ledger,
    paid,
    shop_with,
)


@pytest.fixture(params=[False, True], ids=["single", "optimistic"], autouse=True)
def optimistic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every test here holds for consumers of either kind: a batch may not change an outcome."""
    given: bool = request.param
    event_handler = Registry.event_handler

    def record(self: Registry, target: Any = None, /, **options: Any) -> Any:
        return event_handler(self, target, optimistic=given, **options)

    def record_any(self: Registry, target: Any = None, /, **options: Any) -> Any:
        recorded = record(self, **options)
        return recorded if target is None else recorded(target)

    monkeypatch.setattr(Registry, "event_handler", record_any)
    return given


# --- what cannot be handled -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("envelope", "error", "consumer"),
    [
        (paid(type="worker.payd"), "UnknownMessageTypeError (CD603)", "shop"),
        pytest.param(paid(version=7), "UnknownVersionError (CD604)", "shop.book", marks=pytest.mark.feature("B9")),
        (paid(data=b'{"order": "a", "amount": "many"}'), "PayloadInvalidError (CD605)", "shop.book"),
        (paid(data=b"<xml/>"), "UndecodableBodyError (CD602)", "shop.book"),
        (paid(data=b'{"order": "' + b"a" * 2_000 + b'"}'), "BodyTooLargeError (CD606)", "shop.book"),
    ],
    ids=["unknown type", "unknown version", "invalid payload", "not JSON", "too large"],
)
@pytest.mark.feature("B4")
async def test_what_cannot_be_read_is_parked_with_its_reason_and_other_keys_go_on(
    envelope: Envelope, error: str, consumer: str
) -> None:
    """A message that nobody can read must neither be lost nor stop the others."""
    sales, seen = ledger()

    async with shop_with(sales, settings=Settings(max_body_bytes=1_000)) as shop:
        await shop.receive(envelope, paid("b"))
        (parked,) = await shop.parked()

    assert parked.error.startswith(error)
    assert (parked.consumer, parked.envelope, parked.attempts) == (consumer, envelope, 0)
    assert seen == ["b1"]


class GarblingBroker(MemoryBroker):
    """Delivers what is called garbled as something that is no envelope at all."""

    @asynccontextmanager
    async def subscribe(
        self, group: str, topics: Sequence[str], *, start: Start = "earliest", on_revoked: Revoked | None = None
    ) -> AsyncIterator[Subscription]:  # type: ignore[override]
        async with super().subscribe(group, topics, start=start, on_revoked=on_revoked) as subscription:
            receive = subscription.receive

            async def garbled(limit: int, wait: timedelta, *, paused: Collection[Partition] = ()) -> Sequence[Delivery]:
                return [self._garbled(delivery) for delivery in await receive(limit, wait, paused=paused)]

            subscription.receive = garbled  # type: ignore[method-assign]
            yield subscription

    @staticmethod
    def _garbled(delivery: Delivery) -> Delivery:
        if isinstance(delivery.content, Envelope) and delivery.content.type == "garbled":
            return replace(delivery, content=MalformedEnvelopeError("attributes missing: id"))
        return delivery


@pytest.mark.feature("B4")
async def test_what_is_no_envelope_is_parked_with_its_raw_body() -> None:
    """It has no id: the place where it was read stands in for one."""
    sales, seen = ledger()

    async with shop_with(sales, broker=GarblingBroker()) as shop:
        await shop.receive(paid(type="garbled", data=b"\x00\x01"), paid("b"))
        (parked,) = await shop.parked()

    assert parked.error.startswith("MalformedEnvelopeError (CD601)")
    assert parked.envelope.data == b"\x00\x01"
    assert parked.envelope.id.startswith("payments/")
    assert seen == ["b1"]


async def test_the_reason_never_quotes_the_payload() -> None:
    """Parked messages are listed by people who may not see what is in them."""
    sales, _ = ledger()

    async with shop_with(sales) as shop:
        await shop.receive(paid(data=b'{"order": "a", "amount": "secret"}'))
        (parked,) = await shop.parked()

    assert "amount" in parked.error
    assert "secret" not in parked.error


async def test_an_unknown_type_can_be_left_out_instead() -> None:
    """Topics that carry much that is none of our business."""
    sales, seen = ledger()

    async with shop_with(sales, settings=Settings(unknown_events="ignore")) as shop:
        await shop.receive(paid(type="worker.other"), paid(amount=2))

        assert await shop.parked() == []
    assert seen == ["a2"]


async def test_an_event_that_is_declared_and_not_handled_is_passed_over() -> None:
    """The producer's own process declares every event that it sends: that is no reason to park them."""
    sales, seen = ledger()

    async with shop_with(sales) as shop:
        await shop.receive(paid(type="worker.refunded", data=b'{"order": "a"}'), paid(amount=2))

        assert await shop.parked() == []
    assert seen == ["a2"]


# --- once -------------------------------------------------------------------------------------------------------------


@pytest.mark.feature("B3")
async def test_a_message_that_comes_twice_is_handled_once() -> None:
    """Every broker repeats; effects must not."""
    sales, seen = ledger()
    outcomes: list[str] = []

    class Recorder:
        def notice(self, moment: Moment) -> None:
            if isinstance(moment, MessageConsumed):
                outcomes.append(moment.outcome)

    async with shop_with(sales, observers=[Recorder()]) as shop:
        await shop.receive(paid(), paid(), paid())
        await shop.receive(paid())

        assert shop.app.worker is not None
        assert shop.app.worker.handled == 1
    assert seen == ["a1"]
    assert outcomes == ["done", "duplicate", "duplicate", "duplicate"]


@pytest.mark.feature("B3")
async def test_the_same_id_from_another_source_is_another_message() -> None:
    """Ids are unique within their source only (CloudEvents)."""
    sales, seen = ledger()

    async with shop_with(sales) as shop:
        await shop.receive(paid(), paid(source="other till"))

    assert seen == ["a1", "a1"]


@pytest.mark.feature("B3")
async def test_each_consumer_has_the_message_once() -> None:
    """Deduplication by message id alone would leave the second consumer without it."""
    sales, seen = ledger()

    @sales.event_handler(name="thank")
    async def thank(event: Paid) -> None:
        seen.append("thanks")

    async with shop_with(sales) as shop:
        await shop.receive(paid(), paid())

    assert sorted(seen) == ["a1", "thanks"]


@pytest.mark.feature("B3")
async def test_a_consumer_that_fails_does_not_hold_up_the_other() -> None:
    """Each has its own transaction, retries and parking."""
    sales, seen = ledger(retry=Retry(max_attempts=1))

    @sales.event_handler(name="fails", retry=Retry(max_attempts=1))
    async def fails(event: Paid) -> None:
        raise LookupError

    async with shop_with(sales) as shop:
        await shop.receive(paid())
        (parked,) = await shop.parked()

    assert seen == ["a1"]
    assert parked.consumer == "shop.fails"


@pytest.mark.feature("B3")
async def test_a_failed_attempt_leaves_no_event_and_no_inbox_row() -> None:
    """One transaction: if the inbox row stayed, the retry would be dropped as a repeat."""
    sales = Registry("sales")
    attempts: list[int] = []

    @sales.event_handler(retry=HOURS)
    async def refund(event: Paid) -> None:
        attempts.append(MessageContext.current().attempt)
        emit(Refunded(order=event.order))
        if len(attempts) == 1:
            raise LookupError

    async with shop_with(sales) as shop:
        await shop.broker.publish([paid()])
        await shop.until_waiting(timedelta(hours=1))
        after_the_first = await shop.store.outbox.find(OutboxFilter())
        shop.clock.advance(timedelta(hours=1))
        await shop.settled()
        after_the_second = await shop.store.outbox.find(OutboxFilter())

    assert attempts == [1, 2]
    assert (len(after_the_first), len(after_the_second)) == (0, 1)


@pytest.mark.feature("B3")
async def test_two_copies_at_a_time_do_not_run_side_by_side() -> None:
    """Two workers get the same message after a rebalance: the second waits for the outcome of the first."""
    sales = Registry("sales")
    running, most = 0, 0
    entered, go_on = asyncio.Event(), asyncio.Event()

    @sales.event_handler
    async def book(event: Paid) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        entered.set()
        await go_on.wait()
        running -= 1

    store = MemoryStore()
    async with shop_with(sales, store=store) as one, shop_with(sales, store=store) as other:
        await one.broker.publish([paid()])
        await other.broker.publish([paid()])
        await entered.wait()
        await anyio.wait_all_tasks_blocked()
        go_on.set()
        await one.settled()
        await other.settled()

        assert one.app.worker is not None
        assert other.app.worker is not None
        assert one.app.worker.handled + other.app.worker.handled == 1
    assert most == 1


# --- retries, parking -------------------------------------------------------------------------------------------------


@pytest.mark.feature("B4")
async def test_attempts_are_counted_and_the_message_is_parked_after_the_last() -> None:
    """Not for ever: a poison message must not keep its key for good."""
    sales = Registry("sales")
    attempts: list[tuple[int, str]] = []

    @sales.event_handler(name="book", retry=HOURS)
    async def book(event: Paid) -> None:
        context = MessageContext.current()
        attempts.append((context.attempt, context.idempotency_key))
        raise LookupError("not shown")

    async with shop_with(sales) as shop:
        await shop.broker.publish([paid()])
        for _ in range(2):
            await shop.until_waiting(timedelta(hours=1))
            shop.clock.advance(timedelta(hours=1))
        await shop.settled()
        (parked,) = await shop.parked()

    key = "shop.book:till:paid-a-1"
    assert attempts == [(1, key), (2, key), (3, key)]
    assert (parked.consumer, parked.attempts, parked.error) == ("shop.book", 3, "LookupError")


@pytest.mark.feature("B4")
async def test_park_parks_at_once_with_its_reason() -> None:
    """The handler knows that another try cannot help."""
    sales = Registry("sales")

    @sales.event_handler(retry=HOURS)
    async def book(event: Paid) -> None:
        raise Park("no such account")

    async with shop_with(sales) as shop:
        await shop.receive(paid())
        (parked,) = await shop.parked()

    assert (parked.attempts, parked.error) == (1, "Park: no such account")


@pytest.mark.feature("B4")
async def test_retry_later_waits_as_long_as_it_says_and_counts() -> None:
    """A rate limit names its own time; a service that never comes back must still end in parking."""
    sales = Registry("sales")
    attempts: list[int] = []

    @sales.event_handler(retry=HOURS)
    async def book(event: Paid) -> None:
        attempts.append(MessageContext.current().attempt)
        raise RetryLater(timedelta(minutes=7))

    async with shop_with(sales) as shop:
        await shop.broker.publish([paid()])
        for _ in range(2):
            await shop.until_waiting(timedelta(minutes=7))
            shop.clock.advance(timedelta(minutes=7))
        await shop.settled()
        (parked,) = await shop.parked()

    assert attempts == [1, 2, 3]
    assert parked.error == "RetryLater: try again after 420 s"


@pytest.mark.feature("B4")
async def test_only_what_on_names_is_tried_again() -> None:
    """A bug is parked at the first sight of it."""
    sales = Registry("sales")

    @sales.event_handler(retry=Retry(on=(ConnectionError,)))
    async def book(event: Paid) -> None:
        raise LookupError

    async with shop_with(sales) as shop:
        await shop.receive(paid())
        (parked,) = await shop.parked()

    assert parked.attempts == 1


@pytest.mark.feature("B4")
@pytest.mark.feature("B6")
async def test_later_keys_go_on_while_one_waits_and_its_own_key_does_not() -> None:
    """Order per key, and nothing more than that, is held back."""
    sales = Registry("sales")
    seen: list[str] = []

    @sales.event_handler(retry=HOURS)
    async def book(event: Paid) -> None:
        if event.order == "sick" and event.amount == 1 and MessageContext.current().attempt == 1:
            raise LookupError
        seen.append(f"{event.order} {event.amount}")

    async with shop_with(sales, broker=MemoryBroker(partitions=1)) as shop:
        await shop.broker.publish([paid("sick"), paid("sick", amount=2), paid("well"), paid("well", amount=2)])
        await shop.until_waiting(timedelta(hours=1))
        await eventually(lambda: len(seen) == 2)
        while_waiting = list(seen)
        shop.clock.advance(timedelta(hours=1))
        await shop.settled()

    assert while_waiting == ["well 1", "well 2"]
    assert seen[2:] == ["sick 1", "sick 2"]


@pytest.mark.feature("B6")
async def test_waiting_for_the_next_attempt_holds_no_place() -> None:
    """With one place and one sick key, everything else would stand still."""
    sales = Registry("sales")
    seen: list[str] = []

    @sales.event_handler(retry=HOURS)
    async def book(event: Paid) -> None:
        if event.order == "sick":
            raise LookupError
        seen.append(event.order)

    async with shop_with(sales, settings=Settings(worker_concurrency=1)) as shop:
        await shop.broker.publish([paid("sick")])
        await shop.until_waiting(timedelta(hours=1))
        await shop.broker.publish([paid("well")])
        await eventually(lambda: seen == ["well"])


@pytest.mark.feature("B6")
async def test_no_more_keys_are_handled_at_a_time_than_allowed() -> None:
    """The database has so many connections."""
    sales = Registry("sales")
    running, most = 0, 0

    @sales.event_handler
    async def book(event: Paid) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await anyio.lowlevel.checkpoint()
        running -= 1

    async with shop_with(sales, settings=Settings(worker_concurrency=3)) as shop:
        await shop.receive(*(paid(str(number)) for number in range(20)))

    assert most == 3


@pytest.mark.feature("B6")
async def test_messages_without_a_key_wait_for_nobody() -> None:
    """No key, no order."""
    sales = Registry("sales")
    entered = 0
    all_in = asyncio.Event()

    @sales.event_handler
    async def book(event: Paid) -> None:
        nonlocal entered
        entered += 1
        if entered == 3:
            all_in.set()
        await all_in.wait()

    async with shop_with(sales, broker=MemoryBroker(partitions=1)) as shop:
        await shop.receive(*(paid("x", amount=number, key=None) for number in range(3)))

    assert entered == 3


@pytest.mark.feature("B4")
async def test_an_operators_retry_runs_the_consumer_again_and_it_carries_on() -> None:
    """After the cause was mended nothing needs to be sent anew."""
    sales = Registry("sales")
    broken = True
    seen: list[str] = []

    @sales.event_handler(retry=Retry(max_attempts=1))
    async def book(event: Paid) -> None:
        if broken:
            raise LookupError
        seen.append(event.order)
        emit(Refunded(order=event.order))

    async with shop_with(sales) as shop:
        await shop.receive(paid())
        (parked,) = await shop.parked()
        broken = False
        await shop.store.inbox.retry([parked.id], who="test")
        await advance_until(shop, lambda: seen == ["a"])
        await advance_until_none_parked(shop)

        assert len(await shop.store.outbox.find(OutboxFilter())) == 1


@pytest.mark.feature("B4")
async def test_an_operators_retry_that_fails_again_parks_it_again() -> None:
    """It stays on the list, with the new reason, until it works or is discarded."""
    sales = Registry("sales")
    errors: list[Exception] = [LookupError(), Park("still")]

    @sales.event_handler(retry=Retry(max_attempts=1))
    async def book(event: Paid) -> None:
        raise errors.pop(0)

    async with shop_with(sales) as shop:
        await shop.receive(paid())
        (first,) = await shop.parked()
        await shop.store.inbox.retry([first.id], who="test")
        await advance_until(shop, lambda: not errors)
        await anyio.wait_all_tasks_blocked()
        (second,) = await shop.parked()

    assert (first.error, second.error) == ("LookupError", "Park: still")
    assert (first.id, second.retry_requested) == (second.id, False)


@pytest.mark.parametrize("consumer", ["shop", "shop.book"])
@pytest.mark.feature("B4")
@pytest.mark.feature("B9")
async def test_what_could_not_be_read_reaches_its_consumers_once_it_can(consumer: str) -> None:
    """A new release knows the version, and has another handler for it: an operator asks for what was parked."""
    sales, seen = ledger()

    class PaidTwo(IntegrationEvent, topic="payments", key="order", name="worker.paid", version=2):
        order: str
        cents: int

    @sales.event_handler(name="book two")
    async def book_two(event: PaidTwo) -> None:
        seen.append(f"{event.cents} cents")

    newer = paid(version=2, data=b'{"order": "a", "cents": 100}')
    async with shop_with(sales) as shop:
        await shop.store.inbox.park(unread(newer, consumer))
        await shop.ask_for_all()
        await advance_until(shop, lambda: seen == ["100 cents"])
        await advance_until_none_parked(shop)


def unread(envelope: Envelope, consumer: str) -> ParkedMessage:
    return ParkedMessage(
        consumer=consumer, envelope=envelope, error="UnknownVersionError", attempts=0, parked_at=envelope.time
    )


@pytest.mark.feature("B4")
async def test_an_outage_of_the_database_is_no_attempt() -> None:
    """A restart of the database must not park everything that was under way."""
    sales = Registry("sales")
    attempts: list[int] = []

    @sales.event_handler(retry=Retry(max_attempts=1))
    async def book(event: Paid) -> None:
        attempts.append(MessageContext.current().attempt)
        if len(attempts) < 4:
            raise StoreUnavailableError("db", "restarting")

    async with shop_with(sales) as shop:
        await shop.broker.publish([paid()])
        await advance_until(shop, lambda: len(attempts) == 4)
        await shop.settled()

        assert await shop.parked() == []
    assert attempts == [1, 1, 1, 1]


@pytest.mark.feature("M11")
async def test_a_consumer_that_takes_too_long_counts_as_failed() -> None:
    """It must not keep its key for ever."""
    sales = Registry("sales")

    @sales.event_handler(timeout=0.01, retry=Retry(max_attempts=1))
    async def book(event: Paid) -> None:
        await asyncio.Event().wait()

    async with shop_with(sales) as shop:
        await shop.receive(paid())
        (parked,) = await shop.parked()

    assert parked.error.startswith("HandlerTimeoutError (CD206)")


# --- stop -------------------------------------------------------------------------------------------------------------


@pytest.mark.feature("B11")
async def test_a_stop_finishes_what_runs_and_leaves_the_rest_to_the_next_worker(optimistic: bool) -> None:
    """Nothing is lost, nothing is parked, nothing runs twice."""
    sales = Registry("sales")
    seen: list[str] = []
    entered, go_on = asyncio.Event(), asyncio.Event()

    @sales.event_handler
    async def book(event: Paid) -> None:
        entered.set()
        await go_on.wait()
        seen.append(f"{event.order}{event.amount}")

    broker, store = MemoryBroker(), MemoryStore()
    async with shop_with(sales, broker=broker, store=store) as shop:
        await broker.publish([paid(), paid(amount=2)])
        await entered.wait()
        assert shop.app.worker is not None
        shop.app.worker.stop()
        go_on.set()
    at_the_stop = list(seen)
    async with shop_with(sales, broker=broker, store=store) as shop:
        await shop.settled()

        assert await shop.parked() == []
    assert at_the_stop == (["a1", "a2"] if optimistic else ["a1"]), "a batch runs to its end"
    assert seen == ["a1", "a2"]


class StuckOnce(MemoryBroker):
    """Its first acknowledgement never ends."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = asyncio.Event()
        self.acknowledged: list[int] = []

    @asynccontextmanager
    async def subscribe(self, *arguments: Any, **options: Any) -> AsyncGenerator[Subscription, None]:
        async with super().subscribe(*arguments, **options) as subscription:
            acknowledge = subscription.ack

            async def ack(deliveries: Sequence[Delivery]) -> None:
                if not self.asked.is_set():
                    self.asked.set()
                    await asyncio.Event().wait()
                self.acknowledged.append(len(deliveries))
                await acknowledge(deliveries)

            subscription.ack = ack  # type: ignore[method-assign]
            yield subscription


@pytest.mark.feature("B11")
async def test_a_stop_acknowledges_what_it_cut_off_acknowledging() -> None:
    """What is done and not acknowledged runs through all handlers again after each deploy, for the inbox to drop."""
    sales, seen = ledger()
    broker = StuckOnce()

    async with shop_with(sales, broker=broker):
        await broker.publish([paid()])
        await broker.asked.wait()

    assert seen == ["a1"]
    assert broker.acknowledged == [1]


@pytest.mark.feature("B11")
async def test_a_stop_does_not_wait_for_the_next_attempt() -> None:
    """An hour of back-off must not be an hour of shutdown; the message comes again."""
    sales = Registry("sales")
    attempts: list[int] = []

    @sales.event_handler(retry=HOURS)
    async def book(event: Paid) -> None:
        attempts.append(1)
        if len(attempts) == 1:
            raise LookupError

    broker, store = MemoryBroker(), MemoryStore()
    with anyio.fail_after(10):
        async with shop_with(sales, broker=broker, store=store) as shop:
            await broker.publish([paid()])
            await shop.until_waiting(timedelta(hours=1))
        async with shop_with(sales, broker=broker, store=store) as shop:
            await eventually(lambda: len(attempts) == 2)

            assert await shop.parked() == []


@pytest.mark.feature("B11")
async def test_a_worker_that_is_cancelled_has_its_message_delivered_again() -> None:
    """The drain limit ended, or the process did."""
    sales = Registry("sales")
    attempts: list[int] = []
    entered = asyncio.Event()

    @sales.event_handler
    async def book(event: Paid) -> None:
        attempts.append(1)
        entered.set()
        if len(attempts) == 1:
            await asyncio.Event().wait()

    broker, store = MemoryBroker(), MemoryStore()
    async with shop_with(sales, broker=broker, store=store, settings=Settings(drain_limit_s=0)):
        await broker.publish([paid()])
        await entered.wait()
    async with shop_with(sales, broker=broker, store=store) as shop:
        await shop.settled()

    assert len(attempts) == 2


@pytest.mark.feature("B6")
async def test_what_is_done_behind_something_unfinished_is_not_acknowledged() -> None:
    """A position covers everything before it: acknowledging past a gap would lose the message in the gap."""
    sales = Registry("sales")
    seen: list[str] = []
    hang = True

    @sales.event_handler
    async def book(event: Paid) -> None:
        seen.append(event.order)
        if event.order == "slow" and hang:
            await asyncio.Event().wait()

    broker, store = MemoryBroker(partitions=1), MemoryStore()
    async with shop_with(sales, broker=broker, store=store, settings=Settings(drain_limit_s=0)):
        await broker.publish([paid("slow"), paid("quick")])
        await eventually(lambda: len(seen) == 2)
    hang = False
    async with shop_with(sales, broker=broker, store=store) as shop:
        await shop.settled()

        assert shop.app.worker is not None
        assert shop.app.worker.handled == 1
    assert seen == ["slow", "quick", "slow"]


async def test_a_group_that_starts_at_the_latest_leaves_out_what_was_there_before() -> None:
    """A new service that is not interested in history."""
    sales, seen = ledger()
    broker = MemoryBroker()
    await broker.publish([paid("old")])

    async with shop_with(sales, broker=broker, settings=Settings(start="latest")) as shop:
        await shop.settled()
        await shop.receive(paid("new"))

    assert seen == ["new1"]


# --- contexts ---------------------------------------------------------------------------------------------------------


async def test_ids_follow_from_command_to_event_to_consumer_to_command() -> None:
    """One correlation id over processes; each message names the one that caused it."""
    sales = Registry("sales")
    noted: dict[str, MessageContext] = {}
    ids: dict[str, tuple[str, str, str | None]] = {}

    class Pay(Command[None]):
        pass

    class Book(Command[None]):
        pass

    def note(name: str) -> None:
        context = noted[name] = MessageContext.current()
        ids[name] = (context.id, context.correlation_id, context.causation_id)

    @sales.command_handler
    async def pay(command: Pay) -> None:
        note("pay")
        emit(Paid(order="a"))

    @sales.event_handler(name="on paid")
    async def on_paid(event: Paid, app: App) -> None:
        note("paid")
        await app.send(Book())

    @sales.command_handler
    async def book(command: Book) -> None:
        note("book")
        emit(Refunded(order="a"))

    async with app_of(sales) as app:
        await app.send(Pay())
        (record,) = await app.store.outbox.find(OutboxFilter())
        await app.drain()

    pay_id, paid_id, book_id = (ids[name][0] for name in ("pay", "paid", "book"))
    assert (record.envelope.id, record.envelope.correlation_id, record.envelope.causation_id) == (
        paid_id,
        pay_id,
        pay_id,
    )
    assert ids == {
        "pay": (pay_id, pay_id, None),
        "paid": (paid_id, pay_id, pay_id),
        "book": (book_id, pay_id, paid_id),
    }
    assert noted["paid"].consumer == "shop.on paid"
    assert noted["paid"].idempotency_key == f"shop.on paid:shop:{paid_id}"


async def test_headers_and_envelope_are_in_the_context_of_a_consumer() -> None:
    """What travelled along is at hand, also without asking for it in the signature."""
    sales = Registry("sales")
    seen: list[dict[str, str]] = []

    @sales.event_handler
    async def book(event: Paid, context: MessageContext) -> None:
        seen.append(dict(context.headers))

    async with shop_with(sales) as shop:
        await shop.receive(paid(headers={"tenant": "blue"}))

    assert seen == [{"tenant": "blue"}]


async def test_a_foreign_message_without_a_correlation_starts_one() -> None:
    """Other producers need not know ours."""
    sales = Registry("sales")
    seen: list[tuple[str, str | None]] = []

    @sales.event_handler
    async def book(event: Paid, context: MessageContext) -> None:
        seen.append((context.correlation_id, context.causation_id))

    async with shop_with(sales) as shop:
        await shop.receive(paid(id="foreign"))

    assert seen == [("foreign", None)]


# --- the database makes a handler start over --------------------------------------------------------------------------


class DeadlockError(Exception):
    """What a database says to one of two transactions that wait for each other."""


class ContendedStore(MemoryStore):
    def is_transient(self, error: BaseException) -> bool:
        return isinstance(error, DeadlockError)


class OneWriterStore(MemoryStore):
    card = replace(MemoryStore.card, concurrent_writers=False)


async def test_a_lost_race_in_the_database_is_no_attempt() -> None:
    """Under contention a healthy message would otherwise be parked, although nothing is wrong with it."""
    sales, races = Registry("races"), [DeadlockError()] * 5

    @sales.event_handler(retry=Retry(max_attempts=1))
    async def book(event: Paid, context: MessageContext) -> None:
        assert context.attempt == 1
        if races:
            raise races.pop()

    clock = FakeClock()
    async with shop_with(sales, store=ContendedStore(clock=clock)) as shop:
        await shop.broker.publish([paid()])
        worker = shop.app.worker
        assert worker is not None
        with anyio.fail_after(10):
            while not worker.handled:
                shop.clock.advance_to_last()
                await anyio.lowlevel.checkpoint()

        assert (races, await shop.parked()) == ([], [])


@pytest.mark.parametrize(("given", "at_once"), [({}, 1), ({"worker_concurrency": 3}, 3)], ids=["default", "set"])
async def test_one_writer_gets_one_handler_at_a_time_unless_told_otherwise(given: dict[str, int], at_once: int) -> None:
    """On SQLite handlers side by side would only wait for the one writer, holding what they hold."""
    sales, inside, most = Registry("one writer"), list[str](), list[int]()
    going_on = asyncio.Event()

    @sales.event_handler
    async def book(event: Paid) -> None:
        inside.append(event.order)
        most.append(len(inside))
        await going_on.wait()
        inside.remove(event.order)

    async with shop_with(sales, store=OneWriterStore(), settings=Settings(**given)) as shop:  # type: ignore[arg-type]
        await shop.broker.publish([paid(order) for order in "abcdefghijklmnop"])
        await eventually(lambda: len(inside) == at_once)
        going_on.set()
        await shop.settled()

    assert max(most) == at_once
