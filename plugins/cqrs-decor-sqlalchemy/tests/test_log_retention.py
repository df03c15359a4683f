"""What every group has acknowledged leaves the log; who stays away for too long is given up, and told when back."""

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import anyio
import pytest
from sqlalchemy import text

from cqrs_decor.broker import Delivery
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import BrokerUnavailableError
from cqrs_decor.observers import Moment, Observers, OffsetReset
from cqrs_decor.store import Retention
from cqrs_decor.testing.conformance.kit import ids_of, sample
from cqrs_decor_sqlalchemy import SqlAlchemyStore
from cqrs_decor_sqlalchemy.log_broker import LogTableBroker
from cqrs_decor_sqlalchemy.log_subscription import LogSubscription

pytestmark = pytest.mark.feature("B14")

DAY = timedelta(days=1)
AT_ONCE = Retention(log=timedelta(0))
FOUR_DAYS_MS = 4 * 86_400_000


async def test_what_every_group_has_acknowledged_goes(database_url: str) -> None:
    """A database is no archive; but nobody's unread messages may go with what others have read."""
    async with log(database_url) as broker:
        first, second, third = await published(broker, 3)
        await read(broker, "quick", 3)
        await read(broker, "slow", 1)

        assert await broker.clean_up(AT_ONCE, 100) == 1
        assert await read(broker, "slow", 2) == ids_of([second, third])
        assert await broker.clean_up(AT_ONCE, 100) == 2
        assert await left(broker) == []
        assert first


async def test_what_is_young_stays(database_url: str) -> None:
    """For some days a new service can still be given what was said lately."""
    async with log(database_url) as broker:
        old = await published(broker, 2)
        await age(broker, FOUR_DAYS_MS)
        young = await published(broker, 2)
        await read(broker, "only", 4)

        assert await broker.clean_up(Retention(log=2 * DAY), 100) == 2
        assert await read(broker, "newcomer", 2) == ids_of(young)
        assert old


async def test_it_goes_in_chunks_from_the_front_of_each_lane(database_url: str) -> None:
    """Positions stay dense: readers take a gap for a loss."""
    async with log(database_url) as broker:
        await published(broker, 10, keys=4)
        await read(broker, "only", 7)
        gone = [await broker.clean_up(AT_ONCE, 2) for _ in range(5)]
        rest = await read(broker, "only", 3)

        assert sum(gone) == 7
        assert max(gone) == 2
        assert len(rest) == 3


async def test_without_a_group_only_age_counts(database_url: str) -> None:
    """A service publishes from the first day, and nobody listens yet: its log must not grow for ever."""
    async with log(database_url) as broker:
        await published(broker, 3)
        await age(broker, FOUR_DAYS_MS)

        assert await broker.clean_up(Retention(log=5 * DAY), 100) == 0
        assert await broker.clean_up(Retention(log=3 * DAY), 100) == 3


async def test_nothing_goes_unless_retention_says_so(database_url: str) -> None:
    """None is for ever."""
    async with log(database_url) as broker:
        await published(broker, 1)
        await read(broker, "only", 1)

        assert await broker.clean_up(Retention(inbox=DAY), 100) == 0


async def test_an_abandoned_group_holds_up_nothing_and_is_told_when_it_comes_back(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A service is gone for years, its group is still there. Should it live after all, it must not skip silently."""
    async with log(database_url) as broker:
        await published(broker, 1)
        await read(broker, "abandoned", 1)
        lost = await published(broker, 2)
        await age(broker, FOUR_DAYS_MS)
        await read(broker, "living", 3)
        noticed: list[Moment] = []
        broker.observers = Observers([Notes(noticed)])

        patient = await broker.clean_up(Retention(log=timedelta(0), groups=5 * DAY), 100)
        impatient = await broker.clean_up(Retention(log=timedelta(0), groups=3 * DAY), 100)
        [fresh] = await published(broker, 1)
        arrived = [await read(broker, "abandoned", 1), noticed.copy()]
        await read(broker, "abandoned", 0)

    assert (patient, impatient) == (1, 2)
    assert arrived[0] == [fresh.id]
    [reset] = noticed
    assert isinstance(reset, OffsetReset)
    assert (reset.group, reset.topic, reset.restarted_at) == ("abandoned", "orders", "4")
    actions = [getattr(record, "action", "") for record in caplog.records]
    assert [actions.count("log_group_given_up"), actions.count("offset_reset")] == [1, 1]
    assert lost


async def test_a_group_with_a_reader_is_never_given_up(database_url: str) -> None:
    """However slow it is: what it has not acknowledged is waiting for it."""
    async with log(database_url) as broker, broker.subscribe("slow", ["orders"]) as subscription:
        published_ids = ids_of(await published(broker, 3))
        await age(broker, FOUR_DAYS_MS, leases=False)

        assert await broker.clean_up(Retention(log=timedelta(0), groups=timedelta(0)), 100) == 0
        assert [
            d.content.id for d in await received(subscription, 3) if isinstance(d.content, Envelope)
        ] == published_ids


async def test_readers_and_writers_go_on_while_it_cleans(database_url: str) -> None:
    """Each reader gets each message once and in order, with the cleaner right behind it."""
    async with log(database_url) as broker:
        written: list[Envelope] = []
        arrived: list[str] = []

        async def write() -> None:
            for _ in range(30):
                written.extend(await published(broker, 4))

        async def clean(done: anyio.Event) -> None:
            while not done.is_set():
                await broker.clean_up(AT_ONCE, 3)

        async with broker.subscribe("only", ["orders"]) as subscription, anyio.create_task_group() as tasks:
            done = anyio.Event()
            tasks.start_soon(write)
            tasks.start_soon(clean, done)
            with anyio.fail_after(60):
                while len(arrived) < 120:
                    fresh = await subscription.receive(10, timedelta(seconds=0.2))
                    arrived += ids_in(fresh)
                    await subscription.ack(fresh)
            done.set()

    assert arrived == ids_of(written)


async def test_the_store_cleans_the_log_in_its_own_database(database_url: str) -> None:
    """Without a broker of its own a service has one database, and one cleaner for it."""
    store = SqlAlchemyStore.from_url(database_url)
    await store.schema.upgrade()
    broker = store.log_broker()
    await broker.open()
    await published(broker, 3)
    await read(broker, "only", 3)

    assert await broker.clean_up(AT_ONCE, 100) == 0, "the store does it"
    assert await store.clean_up(AT_ONCE, 100) == 3
    await store.close()


async def test_an_outage_is_told_in_the_words_of_a_broker() -> None:
    """Housekeeping waits it out, as it does for a store."""
    broker = LogTableBroker.from_url("postgresql+asyncpg://nobody@127.0.0.1:1/none")

    with pytest.raises(BrokerUnavailableError):
        await broker.clean_up(AT_ONCE, 1)


@pytest.fixture(autouse=True)
def all_log_records(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@asynccontextmanager
async def log(url: str) -> AsyncGenerator[LogTableBroker]:
    broker = LogTableBroker.from_url(url)
    await broker.open()
    try:
        yield broker
    finally:
        await broker.close()


async def published(broker: LogTableBroker, count: int, *, keys: int = 1) -> Sequence[Envelope]:
    envelopes = [sample("orders", f"key-{n % keys}") for n in range(count)]
    assert list(await broker.publish(envelopes)) == [None] * count
    return envelopes


async def read(broker: LogTableBroker, group: str, count: int) -> list[str]:
    """Join, acknowledge so many messages, leave."""
    async with broker.subscribe(group, ["orders"]) as subscription:
        deliveries = await received(subscription, count)
        await subscription.ack(deliveries)
    return ids_in(deliveries)


def ids_in(deliveries: Sequence[Delivery]) -> list[str]:
    return ids_of([each.content for each in deliveries if isinstance(each.content, Envelope)])


async def received(subscription: LogSubscription, count: int) -> list[Delivery]:
    deliveries: list[Delivery] = []
    with anyio.fail_after(30):
        while len(deliveries) < count:
            deliveries.extend(await subscription.receive(count - len(deliveries), timedelta(seconds=0.2)))
    return deliveries


async def left(broker: LogTableBroker) -> Sequence[Any]:
    async with broker._engine.connect() as connection:
        return (await connection.execute(text("SELECT position FROM cqrs_log"))).all()


async def age(broker: LogTableBroker, milliseconds: int, *, leases: bool = True) -> None:
    """Let time pass in the database."""
    changes = ["UPDATE cqrs_log SET written_at_ms = written_at_ms - :ms"]
    if leases:
        changes.append("UPDATE cqrs_log_position SET lease_until_ms = lease_until_ms - :ms")
    async with broker._engine.begin() as connection:
        for change in changes:
            await connection.execute(text(change), {"ms": milliseconds})


class Notes:
    """An observer that keeps what it is told."""

    def __init__(self, moments: list[Moment]) -> None:
        self._moments = moments

    def notice(self, moment: Moment) -> None:
        self._moments.append(moment)
