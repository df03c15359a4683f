"""What only the broker and the store in memory do; the rest is in the conformance kits."""

from collections.abc import Collection
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any

import anyio
import pytest

from cqrs_decor.broker import Partition, Subscription
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import BadUrlError, LaneLostError, UnitOfWorkClosedError, UnsupportedError
from cqrs_decor.inbox import Noted
from cqrs_decor.lanes import LANES, lane_of
from cqrs_decor.memory import MemoryBroker, MemoryStore
from cqrs_decor.outbox import FailedRecord, OutboxFilter, Settlement
from cqrs_decor.testing.clock import FakeClock
from cqrs_decor.testing.conformance.kit import ids_of, sample

AT_ONCE = timedelta(0)
SOON = timedelta(seconds=5)


async def received(subscription: Subscription) -> list[str]:
    deliveries = await subscription.receive(1_000, AT_ONCE)
    return ids_of(each.content for each in deliveries if isinstance(each.content, Envelope))


async def published(broker: MemoryBroker, count: int) -> list[str]:
    envelopes = [sample("orders", f"key-{n}") for n in range(count)]
    await broker.publish(envelopes)
    return ids_of(envelopes)


@pytest.mark.parametrize("made", [MemoryBroker, MemoryStore])
def test_each_url_gives_a_new_and_empty_one(made: Any) -> None:
    """Two apps in one test share nothing by accident."""
    assert made.from_url("memory://") is not made.from_url("memory://")
    assert made.from_url("memory:").name == "memory://"


@pytest.mark.parametrize("made", [MemoryBroker, MemoryStore])
@pytest.mark.parametrize("url", ["memory://localhost", "memory://?size=3", "kafka://"])
def test_a_url_with_more_in_it_is_refused(made: Any, url: str) -> None:
    """Whoever writes a host there believes that it is shared."""
    with pytest.raises(BadUrlError, match="write it like memory://"):
        made.from_url(url)


async def test_two_apps_share_what_they_are_both_given() -> None:
    """One closes, the other goes on: closing gives nothing back that both need."""
    broker = MemoryBroker()
    ids = await published(broker, 3)
    await broker.close()

    async with broker.subscribe("mail", ["orders"]) as subscription:
        assert sorted(await received(subscription)) == sorted(ids)


async def test_a_reader_beyond_the_partitions_gets_nothing_and_takes_over_later() -> None:
    """As in Kafka: more readers than partitions stand by."""
    broker = MemoryBroker(partitions=1)
    async with broker.subscribe("mail", ["orders"]) as stands_by:
        async with broker.subscribe("mail", ["orders"]) as other:
            ids = await published(broker, 5)
            both = [await received(stands_by), await received(other)]
        assert sorted(both, key=len) == [[], ids]
        if not both[0]:
            assert await received(stands_by) == ids


async def test_readers_of_one_group_may_read_different_topics() -> None:
    """During a deployment the new version subscribes to one more topic."""
    broker = MemoryBroker()
    async with (
        broker.subscribe("mail", ["orders"]) as old,
        broker.subscribe("mail", ["orders", "stock"]) as new,
    ):
        await broker.publish([envelope := sample("stock")])

        assert (await received(old), await received(new)) == ([], [envelope.id])


async def test_a_reader_that_gives_up_while_another_lets_go_leaves_everything_in_order() -> None:
    """A worker that is told to stop while it is still joining must not strand partitions."""
    broker = MemoryBroker(partitions=2)
    asked = anyio.Event()

    async def never_lets_go(partitions: Collection[Partition]) -> None:
        asked.set()
        await anyio.sleep_forever()

    async with broker.subscribe("mail", ["orders"], on_revoked=never_lets_go) as first:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_join_for_good, broker)
            await asked.wait()
            tasks.cancel_scope.cancel()
        ids = await published(broker, 10)

        assert sorted(await received(first)) == sorted(ids)


async def _join_for_good(broker: MemoryBroker) -> None:
    async with broker.subscribe("mail", ["orders"]):
        await anyio.sleep_forever()


async def test_a_reader_that_leaves_while_it_is_asked_to_let_go_leaves_everything_to_the_other() -> None:
    """Two deployments at once: one joins, the other one is already going."""
    broker = MemoryBroker(partitions=2)
    asked, gone = anyio.Event(), anyio.Event()
    everything: list[str] = []

    async def wait_for_its_end(partitions: Collection[Partition]) -> None:
        asked.set()
        await gone.wait()

    async def join() -> None:
        async with broker.subscribe("mail", ["orders"]) as second:
            everything.extend(await received(second))

    async with anyio.create_task_group() as tasks:
        async with broker.subscribe("mail", ["orders"], on_revoked=wait_for_its_end):
            ids = await published(broker, 10)
            tasks.start_soon(join)
            await asked.wait()
        gone.set()

    assert sorted(everything) == sorted(ids)


async def test_a_reader_that_cannot_let_go_does_not_keep_the_other_one_from_reading(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its fault is logged; its work is delivered again."""
    broker = MemoryBroker(partitions=2)

    async def fail(partitions: Collection[Partition]) -> None:
        raise OSError("no way")

    async with broker.subscribe("mail", ["orders"], on_revoked=fail):
        ids = await published(broker, 20)
        async with broker.subscribe("mail", ["orders"]) as second:
            moved = await received(second)

    assert 0 < len(moved) < len(ids)
    assert [record.__dict__["action"] for record in caplog.records] == ["revoke_failed"]


async def test_no_partition_starves_another() -> None:
    """One busy key must not keep the worker from all the others."""
    broker = MemoryBroker(partitions=2)
    busy = [sample("orders", "busy") for _ in range(50)]
    await broker.publish(busy)
    async with broker.subscribe("mail", ["orders"]) as subscription:
        [delivery] = await subscription.receive(1, AT_ONCE)
        other = next(
            f"key-{n}" for n in range(100) if lane_of("orders", f"key-{n}", "", 2) != delivery.partition.number
        )
        await broker.publish([quiet := sample("orders", other)])

        got = [await subscription.receive(10, AT_ONCE) for _ in range(2)]

    assert quiet in [each.content for batch in got for each in batch]


async def test_a_waiting_reader_is_woken_when_partitions_come_to_it() -> None:
    """What a reader left behind must not wait for the next message."""
    broker = MemoryBroker(partitions=1)
    got: list[str] = []

    async def read(subscription: Subscription) -> None:
        deliveries = await subscription.receive(10, SOON)
        got.extend(ids_of(each.content for each in deliveries if isinstance(each.content, Envelope)))

    async with AsyncExitStack() as leaving:
        await leaving.enter_async_context(broker.subscribe("mail", ["orders"]))
        async with broker.subscribe("mail", ["orders"]) as stays, anyio.create_task_group() as tasks:
            tasks.start_soon(read, stays)
            ids = await published(broker, 1)
            await anyio.wait_all_tasks_blocked()
            assert got == []
            await leaving.aclose()

    assert got == ids


def test_the_store_has_no_resources_and_says_what_to_do() -> None:
    """A handler that asks for a session needs a database."""
    store = MemoryStore()

    assert store.resources == {}
    with pytest.raises(UnsupportedError, match=r"cannot give a dict\.\nFix: name a database"):
        anyio.run(_resource, store)


async def _resource(store: MemoryStore) -> None:
    (await store.begin()).resource(dict)


async def test_a_transaction_can_be_joined_by_whoever_holds_it() -> None:
    """It stands in for the session of a database, in tests of code that brings its own."""
    store = MemoryStore()
    transaction = await store.begin()

    store.add(transaction, [envelope := sample("orders")])
    await store.join(transaction).commit()

    assert [each.envelope.id for each in await store.outbox.find(OutboxFilter())] == [envelope.id]


async def test_what_is_no_transaction_of_this_kind_is_refused() -> None:
    """A session of some database would never be committed here."""
    store = MemoryStore()

    with pytest.raises(TypeError, match="which has no sessions"):
        store.join(object())
    with pytest.raises(TypeError, match="no transaction of the store in memory"):
        await store.inbox.record(object(), "mail", sample("orders"))  # type: ignore[arg-type]


async def test_an_ended_transaction_takes_nothing_more() -> None:
    """What is added then would be lost without a word."""
    store = MemoryStore()
    for end in ("commit", "rollback"):
        transaction = await store.begin()
        await getattr(transaction, end)()

        with pytest.raises(UnitOfWorkClosedError):
            transaction.add([sample("orders")])
        with pytest.raises(UnitOfWorkClosedError):
            await store.inbox.record(transaction, "mail", sample("orders"))
        with pytest.raises(UnitOfWorkClosedError):
            await transaction.commit()
        await transaction.rollback()


async def test_a_transaction_may_end_in_another_task_than_it_worked_in() -> None:
    """A handler awaits tasks of its own; the pipeline commits."""
    store = MemoryStore()
    transaction = await store.begin()
    envelope = sample("orders")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(store.inbox.record, transaction, "mail", envelope)
    await transaction.commit()

    assert await store.inbox.record(await store.begin(), "mail", envelope) is Noted.HAD


async def test_a_wall_clock_that_jumps_moves_no_lease_and_no_delay() -> None:
    """Clocks are set by people and by daemons; leases are not theirs to end."""
    clock = FakeClock()
    store = MemoryStore(clock=clock)
    transaction = await store.begin()
    transaction.add([sample("orders")])
    await transaction.commit()
    lanes = [each.lane for each in await store.outbox.acquire("one", SOON, 32, in_hand=10)]
    [record] = await store.outbox.claim(lanes, 10)
    failed = FailedRecord(record=record, error="refused", delay=SOON)
    await store.outbox.settle(Settlement(lanes=lanes, failed=[failed]))

    clock.step(timedelta(days=1))

    assert await store.outbox.acquire("two", SOON, 32, in_hand=10) == []
    assert await store.outbox.claim(lanes, 10) == []


async def test_a_lost_lane_is_named() -> None:
    """The log of a relay says which lanes went, and the metric counts them."""
    clock = FakeClock()
    store = MemoryStore(clock=clock)
    lanes = [each.lane for each in await store.outbox.acquire("one", SOON, 2, in_hand=10)]
    clock.advance(SOON)
    await store.outbox.acquire("two", SOON, 1, in_hand=10)

    with pytest.raises(LaneLostError) as caught:
        await store.outbox.claim(lanes, 10)

    assert caught.value.lanes == (0,)


async def test_findings_are_good_news() -> None:
    """`doctor` on an app in memory has nothing to complain about."""
    findings = [*await MemoryBroker().check([]), *await MemoryStore().check()]

    assert {finding.severity for finding in findings} == {"ok"}
    assert MemoryStore().log_broker() is None


async def test_the_outbox_knows_how_often_a_record_was_retried() -> None:
    """The loop guard of `outbox retry` is tried out on memory as well."""
    store = MemoryStore()
    transaction = await store.begin()
    transaction.add([sample("orders", "a")])
    await transaction.commit()
    lanes = [taken.lane for taken in await store.outbox.acquire("relay", timedelta(minutes=5), LANES, in_hand=9)]

    for _ in range(2):
        [record] = await store.outbox.claim(lanes, 10)
        await store.outbox.settle(Settlement(lanes=lanes, failed=[FailedRecord(record=record, error="no", delay=None)]))
        await store.outbox.retry([record.id], who="ada")

    assert [record.retries for record in await store.outbox.find(OutboxFilter())] == [2]
