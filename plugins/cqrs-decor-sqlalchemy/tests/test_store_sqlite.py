"""SQLite's own: one writer, a driver that begins by itself, a database that is a file."""

import subprocess
import sys
from pathlib import Path

import anyio
import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.pool import StaticPool

from cqrs_decor.errors import StoreAccessError, UnsafeDatabaseSetupError
from cqrs_decor.testing.conformance.kit import sample
from cqrs_decor_sqlalchemy import SqlAlchemyStore, StoreSettings, prepare_sqlite_engine


async def test_an_engine_that_is_not_set_up_is_refused(sqlite_url):
    """Its driver begins by itself: after a savepoint as first statement an outer rollback leaves the row."""
    engine = create_async_engine(sqlite_url)
    store = SqlAlchemyStore(engine)

    with pytest.raises(UnsafeDatabaseSetupError, match="prepare_sqlite_engine"):
        await store.open()
    assert [finding.code for finding in await store.check()] == ["CD406"]
    prepare_sqlite_engine(engine)
    await store.open()
    await engine.dispose()


async def test_an_engine_that_shares_one_connection_between_sessions_is_refused():
    """The rollback of one session would undo what another one has not committed yet."""
    engine = create_async_engine("sqlite+aiosqlite://", poolclass=StaticPool)

    with pytest.raises(UnsafeDatabaseSetupError, match="StaticPool"):
        prepare_sqlite_engine(engine)
    await engine.dispose()


async def test_a_savepoint_as_first_statement_does_not_survive_the_rollback(sqlite_url):
    """What the driver's own way of beginning gets wrong."""
    engine = prepare_sqlite_engine(create_async_engine(sqlite_url))
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE thing (id INTEGER)"))
    async with AsyncSession(engine) as session:
        async with session.begin_nested():
            await session.execute(text("INSERT INTO thing VALUES (1)"))
        await session.rollback()
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT count(*) FROM thing"))).scalar() == 0
    await engine.dispose()


async def test_a_read_that_turns_into_a_write_waits_for_its_turn(sqlite_url):
    """With a deferred begin it fails at once with "database is locked", whatever the busy timeout."""
    engine = prepare_sqlite_engine(create_async_engine(sqlite_url))
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE counter (n INTEGER)"))
        await connection.execute(text("INSERT INTO counter VALUES (0)"))

    async def count_up() -> None:
        async with engine.begin() as connection:
            value = (await connection.execute(text("SELECT n FROM counter"))).scalar_one()
            await anyio.sleep(0.01)
            await connection.execute(text(f"UPDATE counter SET n = {value + 1}"))

    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(count_up)
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT n FROM counter"))).scalar() == 4
    await engine.dispose()


async def test_the_durability_that_is_promised_is_set(sqlite_url):
    """FULL in write-ahead mode waits for the disk at each commit; NORMAL would not, and a power cut could take it."""
    for settings, level in ((StoreSettings(), 2), (StoreSettings(synchronous="NORMAL"), 1)):
        store = SqlAlchemyStore.from_url(sqlite_url, settings=settings)
        await store.open()
        async with store.database.engine.connect() as connection:
            found = [
                (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar()
                for name in ("journal_mode", "synchronous", "busy_timeout", "foreign_keys")
            ]
        await store.close()

        assert found == ["wal", level, 5000, 0]


async def test_sessions_on_a_database_in_memory_take_turns():
    """There is one connection: two sessions on it at once would share one transaction."""
    store = SqlAlchemyStore.from_url("sqlite+aiosqlite:///:memory:")
    await store.open()

    async def write(number: int) -> None:
        transaction = await store.begin()
        transaction.add([sample("orders", f"{number}")])
        await transaction.session.execute(text("SELECT 1"))
        await anyio.sleep(0.01)
        if number % 2:
            await transaction.rollback()
        else:
            await transaction.commit()

    async with anyio.create_task_group() as tasks:
        for number in range(10):
            tasks.start_soon(write, number)

    assert (await store.outbox.backlog()).pending == 5
    assert (store.card.durable, store.card.shared, type(store).card.durable) == (False, False, True)
    await store.close()


async def test_ids_are_never_given_twice(sqlite_url):
    """They are the sequence on the wire: one that falls back looks like an old message to every consumer."""
    store = SqlAlchemyStore.from_url(sqlite_url)
    await store.open()
    ids = []
    for _ in range(3):
        async with store.database.engine.begin() as connection:
            await connection.execute(text("DELETE FROM cqrs_outbox"))
        transaction = await store.begin()
        transaction.add([sample("orders")])
        await transaction.commit()
        async with store.database.engine.connect() as connection:
            ids.append((await connection.execute(text("SELECT id FROM cqrs_outbox"))).scalar())
    await store.close()

    assert ids == [1, 2, 3]


async def test_reading_does_not_wait_for_the_writer(sqlite_url):
    """Write-ahead logging: a query, a claim and `doctor` go on while a handler is at work."""
    store = SqlAlchemyStore.from_url(sqlite_url)
    await store.open()
    writing = await store.begin()
    await writing.session.execute(text("SELECT 1"))

    with anyio.fail_after(3):
        reading = await store.begin(read_only=True)
        await reading.session.execute(text("SELECT 1"))
        await reading.rollback()
        await store.outbox.backlog()
        await store.check()
    await writing.rollback()
    await store.close()


async def test_a_busy_file_is_worth_another_try(sqlite_url):
    """The writer before us took longer than the busy timeout: the same transaction may pass the next time."""
    store = SqlAlchemyStore.from_url(
        sqlite_url, settings=StoreSettings(busy_timeout=StoreSettings().busy_timeout / 100)
    )
    await store.open()
    writing = await store.begin()
    await writing.session.execute(text("SELECT 1"))
    blocked = await store.begin()
    with pytest.raises(Exception, match="locked") as raised:
        await blocked.session.execute(text("SELECT 1"))
    await blocked.rollback()
    await writing.rollback()
    await store.close()

    assert store.is_transient(raised.value)
    assert not store.is_unavailable(raised.value)


async def test_a_file_that_is_no_database_says_so(tmp_path: Path):
    """A wrong path that names some other file must not be taken for an outage, which would be waited out for ever."""
    path = tmp_path / "notes.txt"
    path.write_text("not a database, though long enough to look like a file with a header of some hundred bytes" * 20)
    store = SqlAlchemyStore.from_url(f"sqlite+aiosqlite:///{path}")

    with pytest.raises(StoreAccessError, match="not a database"):
        await store.open()
    await store.close()


async def test_two_processes_may_open_a_new_file_at_once(sqlite_url):
    """The embedded default has no migration step: whoever comes first makes the tables."""
    stores = [SqlAlchemyStore.from_url(sqlite_url) for _ in range(4)]
    async with anyio.create_task_group() as tasks:
        for store in stores:
            tasks.start_soon(store.open)
    for store in stores:
        assert [finding.severity for finding in await store.schema.check()] == ["ok"]
        await store.close()


async def test_foreign_keys_are_left_to_the_user(sqlite_url):
    """Turning them on behind their back would break applications that live without."""
    engine = create_async_engine(sqlite_url)
    event.listen(engine.sync_engine, "connect", lambda connection, _: connection.execute("PRAGMA foreign_keys = ON"))
    prepare_sqlite_engine(engine)
    async with engine.connect() as connection:
        assert (await connection.exec_driver_sql("PRAGMA foreign_keys")).scalar() == 1
    await engine.dispose()


CANCEL_STATEMENTS = """
import asyncio, sys
import anyio
from sqlalchemy import text
from cqrs_decor_sqlalchemy import SqlAlchemyStore

COUNT = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200000) SELECT count(*) FROM n"

async def count(engine):
    async with engine.connect() as connection:
        await connection.execute(text(COUNT))

async def main(url):
    store = SqlAlchemyStore.from_url(url)
    await store.open()
    for turn in range(40):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(count, store.database.engine)
            await asyncio.sleep(0.001 * (turn % 12))
            tasks.cancel_scope.cancel()
    await store.close()

asyncio.run(main(sys.argv[1]))
"""


def test_cancelled_statements_do_not_hold_up_the_end_of_the_process(sqlite_url):
    """A worker that is told to stop cancels what it polls; it must end then, and not hang until somebody kills it."""
    done = subprocess.run([sys.executable, "-c", CANCEL_STATEMENTS, sqlite_url], timeout=60, check=False)

    assert done.returncode == 0
