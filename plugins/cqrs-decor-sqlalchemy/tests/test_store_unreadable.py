"""A row that is no message stops nobody but its own key: somebody wrote or changed it by hand."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta

import anyio
import pytest
from sqlalchemy import text

from cqrs_decor import Envelope
from cqrs_decor.clock import SystemClock
from cqrs_decor.lanes import LANES
from cqrs_decor.memory import MemoryBroker
from cqrs_decor.observers import Observers
from cqrs_decor.outbox import OutboxFilter, StoredRecord
from cqrs_decor.relay import Relay
from cqrs_decor.testing.conformance.kit import sample
from cqrs_decor_sqlalchemy import SqlAlchemyStore

pytestmark = pytest.mark.feature("O11")

BROKEN = {
    "{}": "its headers have no time",
    "time: today": "its headers are no JSON",
    "[1]": "its headers are no JSON object",
    '{"time": "soon"}': "its headers have a value of a wrong type",
    '{"time": "2024-02-29T12:00:00Z", "correlationid": 5}': "its headers have a value of a wrong type",
    '{"time": "2024-02-29T12:00:00Z", "headers": {"tenant": 5}}': "its headers have a value of a wrong type",
    '{"time": "2024-02-29T12:00:00Z", "headers": {"tenant": null}}': "its headers have a value of a wrong type",
}


class Sink(MemoryBroker):
    """Notes the ids of what reaches it."""

    def __init__(self) -> None:
        super().__init__()
        self.reached: list[str] = []

    async def publish(self, envelopes):
        self.reached += [envelope.id for envelope in envelopes]
        return await super().publish(envelopes)


@asynccontextmanager
async def relaying(store: SqlAlchemyStore, broker: MemoryBroker) -> AsyncGenerator[Relay]:
    relay = Relay(
        store.outbox,
        broker,
        lease=timedelta(seconds=15),
        batch=10,
        poll_interval_s=0.01,
        clock=SystemClock(),
        observers=Observers(),
    )
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(relay.run)
        yield relay
        tasks.cancel_scope.cancel()


async def write(store: SqlAlchemyStore, *envelopes: Envelope) -> None:
    transaction = await store.begin()
    transaction.add(envelopes)
    await transaction.commit()


async def change(store: SqlAlchemyStore, envelope: Envelope, column: str, value: str) -> None:
    """As somebody does by hand."""
    async with store.database.engine.begin() as connection:
        await connection.execute(
            text(f"UPDATE cqrs_outbox SET {column} = :value WHERE message_id = :id"),
            {"value": value, "id": envelope.id},
        )


async def stored(store: SqlAlchemyStore) -> dict[str, StoredRecord]:
    return {record.envelope.id: record for record in await store.outbox.find(OutboxFilter())}


async def until_only(store: SqlAlchemyStore, count: int) -> dict[str, StoredRecord]:
    """Wait until so many records are left, none of them pending."""
    with anyio.fail_after(20):
        while True:
            left = await stored(store)
            if len(left) == count and all(record.state in ("parked", "held") for record in left.values()):
                return left
            await anyio.sleep(0.01)


async def test_a_row_that_is_no_message_is_parked_and_the_others_go_on(store):
    """One KeyError at the claim would stop the whole outbox, again and again, whatever else waits in it."""
    bad, other = sample("orders", "a"), sample("orders", "b")
    before, behind = sample("orders", "a"), sample("orders", "a")
    await write(store, before, bad, behind, other)
    await change(store, bad, "headers", "{}")

    broker = Sink()
    async with relaying(store, broker):
        left = await until_only(store, 2)

    assert sorted(broker.reached) == sorted([before.id, other.id])
    assert {left[bad.id].state, left[behind.id].state} == {"parked", "held"}
    assert left[bad.id].error == (
        f"UnreadableRecordError: Outbox record {left[bad.id].id} cannot be read: its headers have no time."
    )
    assert left[bad.id].envelope.key == "a"


async def test_every_way_to_be_no_message_is_told_in_its_words(store):
    """Whoever repairs the row wants to know what is wrong with it."""
    envelopes = [sample("orders", f"{n}") for n in range(len(BROKEN))]
    await write(store, *envelopes)
    for envelope, headers in zip(envelopes, BROKEN, strict=True):
        await change(store, envelope, "headers", headers)
    lanes = [taken.lane for taken in await store.outbox.acquire("relay", timedelta(minutes=5), LANES, in_hand=100)]

    claimed = await store.outbox.claim(lanes, 100)

    assert [record.unreadable for record in claimed] == list(BROKEN.values())
    assert [record.envelope.id for record in claimed] == [envelope.id for envelope in envelopes]


async def test_a_row_that_was_repaired_goes_on_by_a_retry(store):
    """It keeps its place before those that waited behind it."""
    bad, behind = sample("orders", "a"), sample("orders", "a")
    await write(store, bad, behind)
    await change(store, bad, "headers", "?")
    async with relaying(store, Sink()):
        left = await until_only(store, 2)
    async with store.database.engine.begin() as connection:
        await connection.execute(
            text("UPDATE cqrs_outbox_parked SET headers = :headers"), {"headers": '{"time": "2024-02-29T12:00:00Z"}'}
        )
    await store.outbox.retry([left[bad.id].id], who="ada")

    broker = Sink()
    async with relaying(store, broker):
        await until_only(store, 0)

    assert broker.reached == [bad.id, behind.id]


async def test_it_is_parked_in_a_single_step_as_well(store):
    """After a relay vanished, the lane goes record by record."""
    bad = sample("orders", "a")
    await write(store, bad)
    await change(store, bad, "headers", "{}")
    number = (await stored(store))[bad.id].lane
    [lane] = [
        taken.lane
        for taken in await store.outbox.acquire("relay", timedelta(minutes=5), LANES, in_hand=100)
        if taken.lane.number == number
    ]

    [record] = await store.outbox.step([lane], until=100)

    assert record.unreadable == "its headers have no time"


async def test_text_where_bytes_should_be_is_no_message(sqlite_url):
    """SQLite keeps whatever is written into a column."""
    store = SqlAlchemyStore.from_url(sqlite_url)
    await store.schema.upgrade()
    await store.open()
    await write(store, bad := sample("orders", "a"))
    await change(store, bad, "body", "{}")

    async with relaying(store, Sink()):
        left = await until_only(store, 1)
    await store.close()

    assert (left[bad.id].error or "").endswith("its body is text where bytes are expected.")
