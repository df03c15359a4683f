"""Records behind a parked one of their key leave the hot table, come back in order, and never by an accident."""

from collections.abc import Sequence
from datetime import timedelta

import anyio
import pytest
from sqlalchemy import func, select

from cqrs_decor.envelope import Envelope
from cqrs_decor.lanes import LANES, HeldLane
from cqrs_decor.outbox import ClaimedRecord, FailedRecord, Settlement
from cqrs_decor.testing.conformance.kit import sample
from cqrs_decor_sqlalchemy import SqlAlchemyStore

pytestmark = pytest.mark.feature("O2")

LEASE = timedelta(minutes=5)


async def hold(store: SqlAlchemyStore) -> list[HeldLane]:
    return [taken.lane for taken in await store.outbox.acquire("relay", LEASE, LANES, in_hand=100)]


async def write(store: SqlAlchemyStore, key: str, count: int = 1) -> list[Envelope]:
    envelopes = [sample("orders", key) for _ in range(count)]
    transaction = await store.begin()
    transaction.add(envelopes)
    await transaction.commit()
    return envelopes


async def park(store: SqlAlchemyStore, lanes: Sequence[HeldLane], *records: ClaimedRecord) -> None:
    failed = [FailedRecord(record=record, error="no", delay=None) for record in records]
    await store.outbox.settle(Settlement(lanes=lanes, failed=failed))


async def claim(store: SqlAlchemyStore, lanes: Sequence[HeldLane]) -> list[ClaimedRecord]:
    return list(await store.outbox.claim(lanes, 100))


async def hot(store: SqlAlchemyStore) -> int:
    """How many rows a claim could come across."""
    async with store.database.engine.connect() as connection:
        return await connection.scalar(select(func.count()).select_from(store.database.tables.outbox)) or 0


def ids(records: Sequence[ClaimedRecord]) -> list[str]:
    return [record.envelope.id for record in records]


async def test_what_comes_later_for_a_parked_key_leaves_the_hot_table(store):
    """A key that is parked for a week goes on collecting: no claim may have to walk over that."""
    lanes = await hold(store)
    written = await write(store, "a", 2)
    [first, _] = await claim(store, lanes)
    await park(store, lanes, first)
    behind_at_once = await hot(store)
    written += await write(store, "a", 3)
    [healthy] = await write(store, "b")
    await store.outbox.upkeep.run(lanes)

    assert (behind_at_once, await hot(store)) == (0, 1)
    assert (await store.outbox.backlog()).pending == 5
    assert ids(await claim(store, lanes)) == [healthy.id]
    await store.outbox.retry([first.id], who="ada")
    assert [each for each in ids(await claim(store, lanes)) if each != healthy.id] == [each.id for each in written]


async def test_discarding_lets_those_behind_go_on_in_order(store):
    """The operator gave one up, not its key."""
    lanes = await hold(store)
    written = await write(store, "a", 3)
    [first, *_] = await claim(store, lanes)
    await park(store, lanes, first)
    written += await write(store, "a", 2)
    await store.outbox.upkeep.run(lanes)
    await store.outbox.discard([first.id], who="ada")

    assert ids(await claim(store, lanes)) == [each.id for each in written[1:]]


async def test_a_record_behind_another_parked_one_stays_there(store):
    """Two of a key are parked: whichever is decided first, nothing may overtake the other."""
    lanes = await hold(store)
    written = await write(store, "a", 4)
    [first, second, *_] = await claim(store, lanes)
    await park(store, lanes, first, second)
    await store.outbox.retry([second.id], who="ada")
    still_held = ids(await claim(store, lanes))
    await store.outbox.upkeep.run(lanes)
    away = await hot(store)
    await store.outbox.retry([first.id], who="ada")

    assert (still_held, away) == ([], 0)
    assert ids(await claim(store, lanes)) == [each.id for each in written]


async def test_a_record_behind_a_parked_one_is_not_the_operators_to_decide(store):
    """It is healthy, and waits: giving it up by its number would lose it without a trace of why."""
    lanes = await hold(store)
    await write(store, "a", 2)
    [first, second] = await claim(store, lanes)
    await park(store, lanes, first)

    decided = await store.outbox.retry([second.id], who="ada"), await store.outbox.discard([second.id], who="ada")

    assert decided == (0, 0)
    assert ids(await claim(store, lanes)) == []


async def test_a_record_that_arrives_while_it_is_put_behind_is_done(store):
    """It was on its way when its predecessor failed, and the broker took it: it must not be published again."""
    lanes = await hold(store)
    await write(store, "a", 2)
    [first, second] = await claim(store, lanes)
    await park(store, lanes, first)
    await store.outbox.settle(Settlement(lanes=lanes, delivered=[second]))
    await store.outbox.retry([first.id], who="ada")

    assert ids(await claim(store, lanes)) == [first.envelope.id]


async def test_a_settlement_that_is_repeated_keeps_the_key_held(store):
    """The answer to the first was lost: calling again is safe, so nothing may overtake what it parked."""
    lanes = await hold(store)
    await write(store, "a", 2)
    [first, second] = await claim(store, lanes)
    await park(store, lanes, first)
    await park(store, lanes, first)
    await write(store, "a")

    assert ids(await claim(store, lanes)) == []
    assert (await store.outbox.backlog()).parked == 1
    assert second.attempts == 0


async def test_a_settlement_that_is_repeated_counts_one_attempt(store):
    """Else a record runs out of attempts by lost answers."""
    lanes = await hold(store)
    await write(store, "a")
    [record] = await claim(store, lanes)
    for _ in range(2):
        failed = FailedRecord(record=record, error="no", delay=timedelta(0))
        await store.outbox.settle(Settlement(lanes=lanes, failed=[failed]))

    [again] = await claim(store, lanes)
    assert again.attempts == 1


async def test_a_rescheduled_record_behind_a_parked_one_leaves_no_hold(store):
    """A hold whose record went its way another time would keep the key back for nothing."""
    lanes = await hold(store)
    await write(store, "a", 3)
    [first, second, third] = await claim(store, lanes)
    refused = FailedRecord(record=second, error="no", delay=timedelta(hours=1))
    await store.outbox.settle(Settlement(lanes=lanes, failed=[refused]))
    await park(store, lanes, first)
    await store.outbox.retry([first.id], who="ada")

    assert ids(await claim(store, lanes)) == ids([first, second, third])


async def test_operators_and_relays_at_once_keep_the_order_of_a_key(store):
    """An operator retries while the relay puts newer records behind: none may be left behind a hold that is gone."""
    lanes = await hold(store)
    written: list[Envelope] = []
    published: list[str] = []

    async def emit() -> None:
        for _ in range(30):
            written.extend(await write(store, "a"))

    async def relay() -> None:
        for turn in range(60):
            records = await claim(store, lanes)
            if turn % 4 == 0 and turn < 40 and records:
                await park(store, lanes, records[0])
            elif records:
                await store.outbox.settle(Settlement(lanes=lanes, delivered=records))
                published.extend(ids(records))
            await store.outbox.upkeep.run(lanes)

    async def operate() -> None:
        for _ in range(60):
            await store.outbox.retry(range(1, 31), who="ada")
            await anyio.sleep(0.005)

    async with anyio.create_task_group() as tasks:
        for work in (emit, relay, operate):
            tasks.start_soon(work)
    await store.outbox.retry(range(1, 31), who="ada")
    while records := await claim(store, lanes):
        await store.outbox.settle(Settlement(lanes=lanes, delivered=records))
        published.extend(ids(records))

    assert published == [each.id for each in written]
