"""Claims begin at a bound that moves on with what was settled, and no record that is committed late is below it."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import count

import pytest
import pytest_asyncio
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from cqrs_decor.envelope import Envelope
from cqrs_decor.lanes import LANES, HeldLane
from cqrs_decor.outbox import FailedRecord, Settlement
from cqrs_decor.testing.conformance.kit import sample
from cqrs_decor_sqlalchemy import SqlAlchemyStore, lower_bound
from cqrs_decor_sqlalchemy.columns import DatabaseNow
from cqrs_decor_sqlalchemy.lower_bound import Look, LowerBound
from cqrs_decor_sqlalchemy.outbox_lanes import OutboxLanes
from cqrs_decor_sqlalchemy.records import record_row

pytestmark = pytest.mark.feature("O2")

LEASE = timedelta(minutes=5)


@pytest.fixture(params=["asyncpg", "psycopg"])
def url(request: pytest.FixtureRequest, postgres_url: str) -> str:
    return postgres_url.replace("+asyncpg", f"+{request.param}")


@pytest_asyncio.fixture
async def store(url: str) -> AsyncIterator[SqlAlchemyStore]:
    store = SqlAlchemyStore.from_url(url)
    await store.schema.upgrade()
    await store.open()
    yield store
    await store.close()


class Blind(LowerBound):
    """The negative control: it believes that nobody writes."""

    async def look(self, connection: AsyncConnection, lanes: Sequence[int]) -> Look | None:
        self._queries.writers = text(
            "SELECT NULL AS writer, false AS prepared FROM pg_class WHERE CAST(:table AS text) IS NULL"
        )
        return await super().look(connection, lanes)


async def hold(store: SqlAlchemyStore, limit: int = LANES) -> list[HeldLane]:
    return [taken.lane for taken in await store.outbox.acquire("relay", LEASE, limit, in_hand=100)]


async def write(store: SqlAlchemyStore, *envelopes: Envelope) -> None:
    transaction = await store.begin()
    transaction.add(envelopes)
    await transaction.commit()


async def deliver_all(store: SqlAlchemyStore, lanes: Sequence[HeldLane]) -> list[str]:
    delivered: list[str] = []
    while records := await store.outbox.claim(lanes, 100):
        await store.outbox.settle(Settlement(lanes=lanes, delivered=records))
        delivered += [record.envelope.id for record in records]
    return delivered


async def look(store: SqlAlchemyStore, bound: LowerBound, lanes: Sequence[HeldLane], times: int = 3) -> int:
    """Look so many times; returns the lowest bound of the lanes then."""
    for _ in range(times):
        await act_upon(store, bound, lanes, await seen(store, bound, lanes))
    return await lowest_bound(store)


async def seen(store: SqlAlchemyStore, bound: LowerBound, lanes: Sequence[HeldLane]) -> Look | None:
    """The first half of a look, which locks nothing."""
    return await store.database.read(lambda connection: bound.look(connection, [lane.number for lane in lanes]))


async def act_upon(store: SqlAlchemyStore, bound: LowerBound, lanes: Sequence[HeldLane], found: Look | None) -> None:
    """The second half."""
    locking = OutboxLanes(store.database, bound)

    async def work(connection: AsyncConnection) -> None:
        rows = await locking.lock(connection, lanes)
        if found is not None:
            await bound.move(connection, found, rows)

    await store.database.write(work)


async def lowest_bound(store: SqlAlchemyStore) -> int:
    async with store.database.engine.connect() as connection:
        lowest: int | None = await connection.scalar(text("SELECT min(low_id) FROM cqrs_outbox_lane"))
    assert lowest is not None
    return lowest


async def insert(store: SqlAlchemyStore, connection: AsyncConnection, envelope: Envelope) -> None:
    """Draw an id; the transaction stays open."""
    statement = store.database.tables.outbox.insert().values(written_at=DatabaseNow())
    await connection.execute(statement, record_row(envelope))


@pytest.mark.parametrize("kind", [LowerBound, Blind])
async def test_the_bound_does_not_pass_a_record_that_is_committed_late(store, kind):
    """Its id was drawn before those of records that are long settled: a bound that follows them would lose it."""
    bound = kind(store.database.tables, store.database.engine.dialect)
    lanes = await hold(store)
    late = sample("orders", "late")
    async with store.database.engine.connect() as slow:
        await insert(store, slow, late)
        await write(store, *(sample("orders", f"{n}") for n in range(50)))
        await deliver_all(store, lanes)
        while_open = await look(store, bound, lanes)
        await slow.commit()

    delivered = await deliver_all(store, lanes)

    if kind is Blind:
        assert (while_open > 1, delivered) == (True, []), "the negative control: it loses the record"
    else:
        assert (while_open, delivered) == (0, [late.id])
        assert await look(store, bound, lanes) == 52


async def test_a_record_that_is_rolled_back_holds_up_nothing(store):
    """Its id is a gap that will never be filled."""
    bound = LowerBound(store.database.tables, store.database.engine.dialect)
    lanes = await hold(store)
    async with store.database.engine.connect() as slow:
        await insert(store, slow, sample("orders", "a"))
        while_open = await look(store, bound, lanes)
        await slow.rollback()

    assert (while_open, await look(store, bound, lanes)) == (0, 2)


async def test_a_savepoint_that_is_released_still_counts(store):
    """The lock on the table passes to the transaction around it."""
    bound = LowerBound(store.database.tables, store.database.engine.dialect)
    lanes = await hold(store)
    async with store.database.engine.connect() as slow:
        async with slow.begin_nested():
            await insert(store, slow, late := sample("orders", "a"))
        while_open = await look(store, bound, lanes)
        await slow.commit()

    assert (while_open, await deliver_all(store, lanes)) == (0, [late.id])


async def test_the_bound_waits_for_the_first_record_that_is_still_there(store):
    """Due or not: a rescheduled one is tried again, however long that takes."""
    bound = LowerBound(store.database.tables, store.database.engine.dialect)
    lanes = await hold(store)
    await write(store, *(sample("orders", "a") for _ in range(5)))
    first, second, *_ = await store.outbox.claim(lanes, 10)
    refused = FailedRecord(record=second, error="no", delay=timedelta(hours=1))
    await store.outbox.settle(Settlement(lanes=lanes, delivered=[first], failed=[refused]))
    await look(store, bound, lanes)

    async with store.database.engine.connect() as connection:
        low = await connection.scalar(
            text("SELECT low_id FROM cqrs_outbox_lane WHERE lane = :lane"), {"lane": second.lane}
        )
    assert low == second.id


async def test_a_parked_record_that_is_retried_is_claimed_below_the_bound(store):
    """It goes back to its old place, and the bound goes back with it."""
    bound = LowerBound(store.database.tables, store.database.engine.dialect)
    lanes = await hold(store)
    await write(store, *(sample("orders", "a") for _ in range(3)))
    [first, *_] = await store.outbox.claim(lanes, 1)
    await store.outbox.settle(Settlement(lanes=lanes, failed=[FailedRecord(record=first, error="no", delay=None)]))
    passed = await look(store, bound, lanes)
    await store.outbox.retry([first.id], who="ada")

    assert passed == 4
    assert [record.id for record in await store.outbox.claim(lanes, 10)] == [1, 2, 3]


@pytest.mark.parametrize("noticed", [True, False])
async def test_a_retry_while_the_bound_is_looked_for_is_not_passed(store, noticed):
    """The look locks nothing, so an operator may put a record back where it has found none: it counts no longer."""
    bound = LowerBound(store.database.tables, store.database.engine.dialect)
    lanes = await hold(store)
    await write(store, *(sample("orders", "a") for _ in range(3)))
    [first, *_] = await store.outbox.claim(lanes, 1)
    await store.outbox.settle(Settlement(lanes=lanes, failed=[FailedRecord(record=first, error="no", delay=None)]))
    await look(store, bound, lanes, times=1)
    found = await seen(store, bound, lanes)
    await store.outbox.retry([first.id], who="ada")
    if not noticed:
        async with store.database.engine.begin() as connection:
            await connection.execute(text("UPDATE cqrs_outbox_lane SET seen_id = 3"))
    await act_upon(store, bound, lanes, found)

    claimed = [record.id for record in await store.outbox.claim(lanes, 10)]

    assert claimed == ([1, 2, 3] if noticed else []), "without the word of the operator's action it is lost"


async def test_what_was_found_on_another_server_does_not_count(store):
    """After a failover the new one may have lost the last settlements: their records are there again."""
    bound = LowerBound(store.database.tables, store.database.engine.dialect)
    lanes = await hold(store)
    await write(store, sample("orders"))
    await deliver_all(store, lanes)
    await look(store, bound, lanes, times=1)
    found = await seen(store, bound, lanes)
    assert found is not None
    await act_upon(store, bound, lanes, replace(found, server=found.server - timedelta(days=1)))
    elsewhere = await lowest_bound(store)
    await act_upon(store, bound, lanes, found)

    assert elsewhere == 0


async def test_nobody_waits_while_the_bound_is_looked_for(store):
    """Over a million dead rows the scan takes longer than a lease: it must hold no lock meanwhile."""
    lanes = await hold(store)
    await write(store, sample("orders"))
    bound = LowerBound(store.database.tables, store.database.engine.dialect)
    async with store.database.engine.connect() as connection:
        await bound.look(connection, [lane.number for lane in lanes])

        renewal = await store.outbox.renew("relay", lanes, LEASE)
        assert await deliver_all(store, lanes) != []

    assert len(renewal.held) == LANES


async def test_a_scan_goes_on_where_the_last_one_ended(store, monkeypatch):
    """It passes as much as its time allows, and comes back soon for the rest."""
    moments = count(step=0.3)  # one stretch in its time
    bound = LowerBound(store.database.tables, store.database.engine.dialect, lambda: next(moments))
    lanes = await hold(store)
    await write(store, *(sample("orders", f"{n}") for n in range(50)))
    await deliver_all(store, lanes)
    monkeypatch.setattr(lower_bound, "_FIRST_STRETCH", 20)

    moved = [await look(store, bound, lanes, times=1) for _ in range(5)]

    assert moved == [0, 20, 40, 51, 51]


async def test_an_old_snapshot_does_not_hold_the_bound(store, url):
    """A backup, or a forgotten session that only reads: it can insert nothing, so nobody waits for it."""
    bound = LowerBound(store.database.tables, store.database.engine.dialect)
    lanes = await hold(store)
    backup = create_async_engine(url, isolation_level="REPEATABLE READ")
    async with backup.connect() as reading:
        await reading.execute(text("SELECT count(*) FROM cqrs_outbox"))
        await write(store, *(sample("orders", f"{n}") for n in range(50)))
        await deliver_all(store, lanes)

        assert await look(store, bound, lanes) == 51
    await backup.dispose()


async def test_what_was_seen_must_have_outlived_a_crash(store):
    """A server that crashed may draw ids again: a look that is not on record counts for nothing."""
    bound = LowerBound(store.database.tables, store.database.engine.dialect)
    lanes = await hold(store)
    await write(store, sample("orders"))
    await deliver_all(store, lanes)
    await look(store, bound, lanes, times=1)
    async with store.database.engine.begin() as connection:
        await connection.execute(text("UPDATE cqrs_outbox_lane SET seen_id = 0"))

    assert [await look(store, bound, lanes, times=1), await look(store, bound, lanes, times=1)] == [0, 2]


async def test_ids_that_sessions_draw_in_advance_switch_the_bound_off(store):
    """One that was drawn and not used yet can turn up at any time."""
    async with store.database.engine.begin() as connection:
        await connection.execute(text("ALTER SEQUENCE cqrs_outbox_id_seq CACHE 20"))
    bound = LowerBound(store.database.tables, store.database.engine.dialect)
    lanes = await hold(store)
    await write(store, sample("orders"))
    await deliver_all(store, lanes)

    assert await look(store, bound, lanes) == 0


async def test_ids_that_begin_anew_are_claimed_by_the_next_relay(store):
    """Tests empty tables with RESTART IDENTITY: what comes then would stay below the bound for ever."""
    lanes = await hold(store)
    await write(store, *(sample("orders") for _ in range(20)))
    await deliver_all(store, lanes)
    assert await look(store, LowerBound(store.database.tables, store.database.engine.dialect), lanes) == 21
    await store.outbox.release("relay", lanes)
    async with store.database.engine.begin() as connection:
        await connection.execute(text("TRUNCATE cqrs_outbox RESTART IDENTITY"))
    await write(store, again := sample("orders"))

    assert await deliver_all(store, await hold(store)) == [again.id]


async def test_two_relays_of_one_store_move_their_own_lanes(store):
    """They look at different times: the look of one must not undo that of the other."""
    bound = LowerBound(store.database.tables, store.database.engine.dialect)
    ours, others = await hold(store, LANES // 2), await hold(store)
    await write(store, *(sample("orders") for _ in range(20)))
    await deliver_all(store, [*ours, *others])

    for _ in range(2):
        await look(store, bound, ours, times=1)
        lowest = await look(store, bound, others, times=1)

    assert lowest == 21


async def test_an_idle_renewal_is_one_statement(store):
    """An idle outbox costs one query in five seconds, and nothing looks for a bound to move."""
    lanes = await hold(store)
    await write(store, sample("orders"))
    await deliver_all(store, lanes)
    for _ in range(2):
        await store.outbox.upkeep.run(lanes)
    statements: list[str] = []

    def note(connection, cursor, statement, parameters, context, executemany):
        statements.append(statement)

    event.listen(store.database.engine.sync_engine, "before_cursor_execute", note)
    for _ in range(3):
        await store.outbox.renew("relay", lanes, LEASE)
    event.remove(store.database.engine.sync_engine, "before_cursor_execute", note)

    assert len(statements) == 3


async def test_a_second_burst_finds_room_where_the_first_one_was(store):
    """After a burst the table keeps its size; it must not add another with each burst."""
    lanes = await hold(store)
    sizes: list[int] = []
    async with store.database.engine.connect() as connection:
        vacuuming = await connection.execution_options(isolation_level="AUTOCOMMIT")
        for _ in range(2):
            for _ in range(20):
                await write(store, *(sample("orders", f"{n}") for n in range(1_000)))
            while records := await store.outbox.claim(lanes, 1_000):
                await store.outbox.settle(Settlement(lanes=lanes, delivered=records))
            await vacuuming.execute(text("VACUUM (TRUNCATE false) cqrs_outbox"))
            sizes.append(await vacuuming.scalar(text("SELECT pg_table_size('cqrs_outbox')")) or 0)

    first, second = sizes
    assert second <= first * 1.1
