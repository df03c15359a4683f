"""What the outbox does beyond its kit: frozen holders, skewed lanes, operators, settings that are put back."""

from contextlib import suppress
from datetime import timedelta
from typing import Any
from unittest.mock import AsyncMock

import anyio
import pytest
from sqlalchemy import event, insert, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from cqrs_decor.errors import StoreUnavailableError
from cqrs_decor.lanes import LANES, HeldLane
from cqrs_decor.outbox import FailedRecord, OutboxFilter, Settlement
from cqrs_decor.testing.conformance.kit import sample
from cqrs_decor_sqlalchemy import SqlAlchemyStore, StoreSettings

LEASE = timedelta(minutes=5)


async def acquired(store: SqlAlchemyStore, owner: str, limit: int = LANES) -> list[HeldLane]:
    return [taken.lane for taken in await store.outbox.acquire(owner, LEASE, limit, in_hand=1_000)]


async def test_a_frozen_process_does_not_keep_its_lanes_locked(server_url):
    """Stopped between lock and commit, its connection stays open: nobody could take its lanes over for ever."""
    frozen = SqlAlchemyStore.from_url(server_url, settings=StoreSettings(idle_limit=timedelta(seconds=1)))
    await frozen.schema.upgrade()
    heir = SqlAlchemyStore.from_url(server_url)
    locked, taken = anyio.Event(), anyio.Event()

    async def freeze(connection: AsyncConnection) -> None:
        await connection.execute(text("SELECT * FROM cqrs_outbox_lane ORDER BY lane FOR UPDATE"))
        locked.set()
        await taken.wait()
        await connection.execute(text("UPDATE cqrs_outbox_lane SET owner = 'late'"))

    async def wake_up_late() -> None:
        with pytest.raises(StoreUnavailableError):
            await frozen.database.write(freeze)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wake_up_late)
        await locked.wait()
        at_once = await acquired(heir, "heir", LANES)
        lanes: list[HeldLane] = []
        with anyio.fail_after(20):
            while len(lanes) < LANES:
                lanes += await acquired(heir, "heir", LANES)
                await anyio.sleep(0.05)
        taken.set()
    await heir.close()
    await frozen.close()

    assert list(at_once) == [], "the negative control: it was locked"


@pytest.mark.parametrize("ends_them", [True, False], ids=["ended", "not ended"])
async def test_a_process_frozen_in_the_middle_of_a_statement_does_not_keep_its_lanes_locked(
    postgres_url, ends_them, monkeypatch, caplog
):
    """asyncpg asks the server what a statement looks like before it executes it. Whoever stands still between the two
    is not idle in its transaction: no idle limit ends that.
    """
    frozen = SqlAlchemyStore.from_url(postgres_url, settings=StoreSettings(idle_limit=timedelta(seconds=1)))
    await frozen.schema.upgrade()
    heir = SqlAlchemyStore.from_url(postgres_url, settings=StoreSettings(idle_limit=timedelta(seconds=1)))
    if not ends_them:
        monkeypatch.setattr(heir.database, "end_frozen_sessions", AsyncMock())
    lanes: list[HeldLane] = []

    async def freeze(connection: AsyncConnection) -> None:
        await connection.execute(text("SELECT * FROM cqrs_outbox_lane ORDER BY lane FOR UPDATE"))
        driver: Any = (await connection.get_raw_connection()).driver_connection
        await driver.prepare("SELECT 1")
        for _ in range(30):
            await anyio.sleep(0.1)
            lanes.extend(await acquired(heir, "heir"))
        await connection.execute(text("SELECT 2"))

    with suppress(StoreUnavailableError):
        await frozen.database.write(freeze)
    await heir.close()
    await frozen.close()

    assert len(lanes) == (LANES if ends_them else 0)
    assert ends_them == ("frozen_sessions_ended" in [getattr(line, "action", None) for line in caplog.records])


async def test_one_who_waits_in_vain_ends_who_stands_still(postgres_url):
    """A lane of the log, a row of the inbox: what waits for its lock finds out only when it has waited for too long."""
    settings = StoreSettings(timeout=timedelta(seconds=2), idle_limit=timedelta(seconds=1))
    frozen = SqlAlchemyStore.from_url(postgres_url, settings=StoreSettings(idle_limit=timedelta(seconds=1)))
    await frozen.schema.upgrade()
    other = SqlAlchemyStore.from_url(postgres_url, settings=settings)

    async def lock(connection: AsyncConnection) -> None:
        await connection.execute(text("SELECT * FROM cqrs_outbox_lane ORDER BY lane FOR UPDATE"))

    async def freeze(connection: AsyncConnection) -> None:
        await lock(connection)
        driver: Any = (await connection.get_raw_connection()).driver_connection
        await driver.prepare("SELECT 1")
        with pytest.raises(StoreUnavailableError):
            await other.database.write(lock)
        await other.database.write(lock)
        await connection.execute(text("SELECT 2"))

    with pytest.raises(StoreUnavailableError):
        await frozen.database.write(freeze)
    await other.close()
    await frozen.close()


async def test_what_takes_part_is_not_taken_for_frozen(postgres_url):
    """A session of the user's own, one that works, and one that has just begun to stand still are left alone."""
    store = SqlAlchemyStore.from_url(postgres_url, settings=StoreSettings(idle_limit=timedelta(seconds=1)))
    await store.schema.upgrade()
    late = SqlAlchemyStore.from_url(postgres_url, settings=StoreSettings(idle_limit=timedelta(seconds=9)))

    async def stand_still(connection: AsyncConnection) -> None:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        await driver.prepare("SELECT 1")
        await anyio.sleep(1.5)
        await store.database.read(store.database.end_frozen_sessions)
        await late.database.read(late.database.end_frozen_sessions)
        await connection.execute(text("SELECT 2"))

    async with store.database.engine.connect() as users_own:
        await stand_still(users_own)
    await store.database.write(lambda connection: connection.execute(text("SELECT pg_sleep(1.5)")))
    with pytest.raises(StoreUnavailableError):
        await store.database.write(stand_still)
    await late.close()
    await store.close()


async def test_settling_waits_for_no_transaction_that_emits(server_store: SqlAlchemyStore) -> None:
    """One that stays open for a minute would hold up all others: MariaDB reads past the rows it is told to delete."""
    store, table = server_store, server_store.database.tables.outbox
    transaction = await store.begin()
    transaction.add([sample("orders", f"{number}") for number in range(4)])
    await transaction.commit()
    lanes = await acquired(store, "relay")
    claimed = await store.outbox.claim(lanes, 10)

    async with store.database.engine.connect() as late:
        row = (await late.execute(select(table).limit(1))).mappings().one()
        await late.execute(insert(table).values({**row, "id": row["id"] + 100, "message_id": "late"}))
        with anyio.fail_after(5):
            await store.outbox.settle(Settlement(lanes=lanes, delivered=claimed))
        await late.commit()

    assert len(claimed) == 4
    assert (await store.outbox.backlog()).pending == 1


async def test_a_handlers_transaction_may_idle(server_url):
    """The limit is for the store's own transactions: a handler may call a slow API with its transaction open."""
    store = SqlAlchemyStore.from_url(
        server_url, settings=StoreSettings(idle_limit=timedelta(seconds=1), pool_size=1, pool_overflow=0)
    )
    await store.schema.upgrade()
    await acquired(store, "relay", LANES)
    transaction = await store.begin()
    transaction.add([sample("orders")])
    await transaction.session.execute(text("UPDATE cqrs_outbox_lane SET crashes = 0"))
    await anyio.sleep(2)
    await transaction.commit()

    assert (await store.outbox.backlog()).pending == 1
    await store.close()


async def test_settings_of_the_session_are_put_back(mariadb_url):
    """The connection goes back to the user's pool: their isolation level must not change under them."""
    store = SqlAlchemyStore.from_url(mariadb_url, settings=StoreSettings(pool_size=1, pool_overflow=0))
    await store.schema.upgrade()
    lanes = await acquired(store, "relay", LANES)
    with pytest.raises(Exception, match="CD405"):
        await store.outbox.settle(Settlement(lanes=[HeldLane(lanes[0].number, 99)]))

    async with store.database.engine.connect() as connection:
        row = (await connection.exec_driver_sql("SELECT @@tx_isolation, @@idle_transaction_timeout")).one()
    await store.close()

    assert tuple(row) == ("REPEATABLE-READ", 0)


async def test_lanes_that_others_hold_do_not_hide_what_is_ours(store):
    """Another relay is slow: its backlog lies before our records and must not count against the limit."""
    transaction = await store.begin()
    transaction.add([sample("orders", f"{number}") for number in range(600)])
    await transaction.commit()
    lanes = await acquired(store, "one", 1)

    claimed = await store.outbox.claim(lanes, 5)

    assert len(claimed) == 5
    assert {record.lane for record in claimed} == {lanes[0].number}


async def test_each_action_of_an_operator_is_on_record_once(store):
    """Who discarded this order's event? is asked weeks later."""
    transaction = await store.begin()
    transaction.add([sample("orders", key) for key in "abc"])
    await transaction.commit()
    lanes = await acquired(store, "relay", LANES)
    records = await store.outbox.claim(lanes, 10)
    failed = [FailedRecord(record=record, error="no", delay=None) for record in records]
    await store.outbox.settle(Settlement(lanes=lanes, failed=failed))
    a, b, c = (record.id for record in records)

    done = [
        await store.outbox.retry([a, 999], who="ada"),
        await store.outbox.retry([a], who="ada"),
        await store.outbox.discard([b], who="bob"),
        await store.outbox.discard([b], who="bob"),
    ]

    assert done == [1, 0, 1, 0]
    async with store.database.engine.connect() as connection:
        rows = await connection.execute(text("SELECT who, action, kind, record_id FROM cqrs_operator_log ORDER BY id"))
        log = [tuple(part.decode() if isinstance(part, bytes) else part for part in row) for row in rows]
    assert log == [("ada", "retry", "outbox", a), ("bob", "discard", "outbox", b)]
    assert [record.id for record in await store.outbox.find(OutboxFilter(state="parked"))] == [c]


async def test_a_record_that_was_discarded_in_flight_does_not_come_back(store):
    """The operator was faster than the broker's refusal: a hold without its record would block the key for ever."""
    transaction = await store.begin()
    transaction.add([first := sample("orders", "a"), second := sample("orders", "a")])
    await transaction.commit()
    lanes = await acquired(store, "relay", LANES)
    [record, _] = await store.outbox.claim(lanes, 10)
    await store.outbox.settle(
        Settlement(lanes=lanes, failed=[FailedRecord(record=record, error="no", delay=timedelta(0))])
    )
    [again, _] = await store.outbox.claim(lanes, 10)
    assert await store.outbox.discard([again.id], who="ada") == 1

    for delay in (timedelta(hours=1), None):
        await store.outbox.settle(Settlement(lanes=lanes, failed=[FailedRecord(record=again, error="no", delay=delay)]))

    assert [each.envelope.id for each in await store.outbox.claim(lanes, 10)] == [second.id]
    assert first.id != second.id


async def test_a_constraint_of_the_users_does_not_become_ours(store, stored):
    """Errors of business rows pass as they are: the worker's policy decides about them."""
    transaction = await store.begin()
    transaction.add([sample("orders")])
    await transaction.session.execute(text("INSERT INTO shop_order (id, sku) VALUES (1, 'tea')"))
    with pytest.raises(IntegrityError) as raised:
        await transaction.session.execute(text("INSERT INTO shop_order (id, sku) VALUES (1, 'tea')"))
    await transaction.rollback()

    assert (store.is_transient(raised.value), store.is_unavailable(raised.value)) == (False, False)
    assert await stored(store) == []


async def test_errors_show_no_body(store):
    """They go to logs that many can read."""
    transaction = await store.begin()
    transaction.add([sample("orders", data=b"s3cret")])
    await transaction.session.execute(text("DROP TABLE cqrs_outbox"))
    with pytest.raises(Exception) as raised:  # noqa: PT011 - each driver has its own
        await transaction.commit()

    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_renewal_limits_its_own_idling(postgres_url, driver):
    """It is one statement; a process that freezes between it and its commit must not keep the lanes locked."""
    store = SqlAlchemyStore.from_url(
        postgres_url.replace("+asyncpg", f"+{driver}"), settings=StoreSettings(idle_limit=timedelta(seconds=3))
    )
    await store.schema.upgrade()
    lanes = await acquired(store, "relay")
    limits: list[str] = []

    @event.listens_for(store.database.engine.sync_engine, "commit")
    def look(connection):
        limits.append(connection.exec_driver_sql("SHOW idle_in_transaction_session_timeout").scalar())

    await store.outbox.renew("relay", lanes, LEASE)
    await store.close()

    assert limits == ["3s"]
