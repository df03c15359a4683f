"""What goes wrong between the store and its server, and how it is called."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import anyio
import pytest
from psycopg import sql
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError

from cqrs_decor.errors import (
    BadUrlError,
    CommitOutcomeUnknownError,
    SchemaMissingError,
    SettingError,
    StoreAccessError,
    StoreUnavailableError,
    UnsupportedError,
)
from cqrs_decor.inbox import InboxFilter, Noted, ParkedMessage
from cqrs_decor.lanes import HeldLane
from cqrs_decor.outbox import FailedRecord, OutboxFilter, Settlement
from cqrs_decor.testing.conformance.kit import sample
from cqrs_decor_sqlalchemy import SqlAlchemyStore, StoreSettings
from tests.services.proxy import Proxy


@asynccontextmanager
async def through_proxy(url, **settings):
    direct = SqlAlchemyStore.from_url(url)
    await direct.schema.upgrade()
    proxy = Proxy(url)
    store = SqlAlchemyStore.from_url(await proxy.start(), settings=StoreSettings(**settings))
    try:
        await store.open()
        yield proxy, store, direct
    finally:
        await store.close()
        await proxy.stop()
        await direct.close()


@pytest.mark.parametrize("deliver_first", [True, False])
async def test_a_connection_that_is_lost_during_commit_leaves_the_outcome_unknown(server_url, deliver_first):
    """Both have happened behind the same error: only somebody who looks can tell, so nothing is repeated by itself."""
    async with through_proxy(server_url) as (proxy, store, direct):
        transaction = await store.begin()
        transaction.add([sample("orders")])
        await transaction.session.execute(text("SELECT 1"))
        proxy.cut_at, proxy.deliver_first = b"COMMIT", deliver_first

        with pytest.raises(CommitOutcomeUnknownError) as raised:
            await transaction.commit()
        await transaction.rollback()

        if deliver_first:
            with anyio.fail_after(20):  # the answer is lost, so that nobody knows when it is done
                while (await direct.outbox.backlog()).pending == 0:  # noqa: ASYNC110 - the server sets no event
                    await anyio.sleep(0.02)
        assert (await direct.outbox.backlog()).pending == (1 if deliver_first else 0)
        assert not store.is_transient(raised.value), "it must not be run again"
        assert (await store.outbox.backlog()).pending in (0, 1), "the next connection works"


async def test_a_connection_that_is_lost_before_commit_has_a_known_outcome(server_url):
    """Nothing was committed then, and the error must not say that it might have been."""
    async with through_proxy(server_url) as (proxy, store, direct):
        transaction = await store.begin()
        await transaction.session.execute(text("SELECT 1"))
        transaction.add([sample("orders")])
        proxy.cut()

        with pytest.raises(Exception) as raised:  # noqa: PT011 - each driver has its own
            await transaction.commit()
        await transaction.rollback()

        assert not isinstance(raised.value, CommitOutcomeUnknownError)
        assert store.is_unavailable(raised.value)
        assert (await direct.outbox.backlog()).pending == 0


async def test_an_error_that_the_server_answers_to_commit_has_a_known_outcome(postgres_url):
    """A deferred constraint is checked by COMMIT: the answer is no, not perhaps."""
    store = SqlAlchemyStore.from_url(postgres_url)
    await store.schema.upgrade()
    async with store.database.engine.begin() as connection:
        await connection.execute(text("CREATE TABLE once (id INT UNIQUE DEFERRABLE INITIALLY DEFERRED)"))
    transaction = await store.begin()
    await transaction.session.execute(text("INSERT INTO once VALUES (1), (1)"))
    transaction.add([sample("orders")])

    with pytest.raises(IntegrityError):
        await transaction.commit()
    assert (await store.outbox.backlog()).pending == 0
    await store.close()


async def test_a_session_that_the_server_ended_is_unavailability(server_store):
    """A restart or an administrator: the message in hand is not to blame."""
    transaction = await server_store.begin()
    if server_store.database.dialect == "postgresql":
        backend = (await transaction.session.execute(text("SELECT pg_backend_pid()"))).scalar()
        end = f"SELECT pg_terminate_backend({backend})"
    else:
        backend = (await transaction.session.execute(text("SELECT CONNECTION_ID()"))).scalar()
        end = f"KILL {backend}"
    async with server_store.database.engine.connect() as connection:
        await connection.execute(text(end))
    await asyncio.sleep(0.1)

    with pytest.raises(Exception) as raised:  # noqa: PT011 - each driver has its own
        await transaction.session.execute(text("SELECT 1"))
    await transaction.rollback()

    assert server_store.is_unavailable(raised.value)
    assert not server_store.is_transient(raised.value)


async def test_a_server_that_cannot_be_reached_is_unavailable(server_url):
    """At the start, and later: opening again is safe."""
    async with through_proxy(server_url) as (proxy, store, _):
        await proxy.stop()
        for call in (store.open, store.outbox.backlog, store.inbox.parked_count, store.schema.plan):
            with pytest.raises(StoreUnavailableError):
                await call()
        assert [finding.code for finding in await store.check()] == ["CD401"]
        transaction = await store.begin()
        with pytest.raises(Exception) as raised:  # noqa: PT011 - each driver has its own
            await transaction.session.execute(text("SELECT 1"))
        await transaction.rollback()
        assert store.is_unavailable(raised.value)


async def test_a_server_that_does_not_answer_is_unavailable(server_url):
    """A half-open connection gives no error at all: the limit is the store's own."""
    async with through_proxy(server_url, timeout=timedelta(milliseconds=300)) as (_, store, direct):
        async with direct.database.engine.connect() as connection:
            await connection.execute(text("SELECT * FROM cqrs_outbox_lane WHERE lane = 0 FOR UPDATE"))
            with anyio.fail_after(20), pytest.raises(StoreUnavailableError):
                await store.outbox.step([HeldLane(0, 0)], until=1)
        assert (await store.outbox.backlog()).pending == 0


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_database_that_refuses_us_says_so_without_the_password(postgres_url, driver):
    """Waiting does not help against a wrong name; and the text goes to logs that many can read."""
    url = postgres_url.replace("+asyncpg", f"+{driver}").replace("postgres@", "postgres:s3cret@")
    store = SqlAlchemyStore.from_url(url.rsplit("/", 1)[0] + "/no_such_database")
    with pytest.raises(StoreAccessError) as raised:
        await store.open()
    findings = await store.check()
    await store.close()

    assert "s3cret" not in str(raised.value) + repr(raised.value) + store.name + str(findings)
    assert "no_such_database" in str(raised.value)
    assert [finding.code for finding in findings] == ["CD402"]


@pytest.mark.parametrize("change", [("cqrs:cqrs@", "cqrs:s3cret@"), ("/t_", "/no_such_")])
async def test_mariadb_that_refuses_us_says_so_without_the_password(mariadb_url, change):
    """As for PostgreSQL; here the password itself is wrong."""
    store = SqlAlchemyStore.from_url(mariadb_url.replace(*change))
    with pytest.raises(StoreAccessError) as raised:
        await store.open()
    await store.close()

    assert "s3cret" not in str(raised.value) + repr(raised.value) + store.name


async def test_a_wrong_password_on_postgresql_is_a_refusal(postgres_server, postgres_url):
    """Not an outage, which would be waited out for ever."""
    postgres_server.execute(sql.SQL("CREATE ROLE locked_out NOLOGIN"))
    try:
        for driver in ("asyncpg", "psycopg"):
            url = postgres_url.replace("+asyncpg", f"+{driver}").replace("postgres@", "locked_out:s3cret@")
            store = SqlAlchemyStore.from_url(url)
            with pytest.raises(StoreAccessError):
                await store.open()
            await store.close()
    finally:
        postgres_server.execute(sql.SQL("DROP ROLE locked_out"))


async def test_a_table_that_is_missing_is_named(server_store):
    """Dropped while we run, or never migrated."""
    async with server_store.database.engine.begin() as connection:
        await connection.execute(text("DROP TABLE cqrs_inbox_parked"))
        await connection.execute(text("DROP TABLE cqrs_outbox_lane"))

    with pytest.raises(SchemaMissingError):
        await server_store.inbox.find(InboxFilter())
    with pytest.raises(SchemaMissingError):
        await server_store.outbox.acquire("relay", timedelta(seconds=1), 1, in_hand=1)


async def test_a_deadlock_is_worth_another_try(server_store):
    """The database chose one of two: the same transaction passes the next time."""
    async with server_store.database.engine.begin() as connection:
        await connection.execute(text("INSERT INTO shop_order (id, sku) VALUES (1, 'a'), (2, 'b')"))
    errors = []
    both_hold = asyncio.Barrier(2)

    async def update(first: int, second: int) -> None:
        transaction = await server_store.begin()
        try:
            await transaction.session.execute(text(f"UPDATE shop_order SET sku = 'x{first}' WHERE id = {first}"))
            await both_hold.wait()
            await transaction.session.execute(text(f"UPDATE shop_order SET sku = 'y{first}' WHERE id = {second}"))
            await transaction.commit()
        except DBAPIError as error:
            errors.append(error)
            await transaction.rollback()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(update, 1, 2)
        tasks.start_soon(update, 2, 1)

    assert [server_store.is_transient(error) for error in errors] == [True]
    assert [server_store.is_unavailable(error) for error in errors] == [False]


async def test_a_serialization_failure_is_worth_another_try(postgres_url):
    """What the user's own SERIALIZABLE transactions end in under load."""
    store = SqlAlchemyStore.from_url(postgres_url)
    await store.schema.upgrade()
    async with store.database.engine.begin() as connection:
        await connection.execute(text("CREATE TABLE counter AS SELECT 0 AS n"))
    one, two = await store.begin(), await store.begin()
    for transaction in (one, two):
        await transaction.session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        await transaction.session.execute(text("SELECT n FROM counter"))
    await one.session.execute(text("UPDATE counter SET n = n + 1"))
    await one.commit()
    with pytest.raises(DBAPIError) as raised:
        await two.session.execute(text("UPDATE counter SET n = n + 1"))
    await two.rollback()
    await store.close()

    assert store.is_transient(raised.value)


async def test_a_pool_that_is_used_up_says_nothing_about_the_message(server_url):
    """A burst took all connections: the work can be done, only not now."""
    store = SqlAlchemyStore.from_url(server_url, settings=StoreSettings(pool_size=1, pool_overflow=0, timeout=_SOON))
    await store.schema.upgrade()
    holding = await store.begin()
    await holding.session.execute(text("SELECT 1"))
    with pytest.raises(StoreUnavailableError) as raised:
        await store.outbox.backlog()
    await holding.rollback()
    await store.close()

    assert store.is_unavailable(raised.value)


_SOON = timedelta(seconds=1)


async def test_names_that_do_not_fit_are_refused_when_they_are_added(store, stored):
    """Cut off silently, two keys would become one; refused at commit, the handler's line would not show."""
    transaction = await store.begin()
    for key in ("k" * 256, "nul\0"):
        with pytest.raises(UnsupportedError, match="key"):
            transaction.add([sample("orders", key)])
    with pytest.raises(UnsupportedError, match="topic"):
        transaction.add([sample("t" * 256)])
    transaction.add([sample("orders", "🍵" * 255)])
    await transaction.commit()

    assert await stored(store) == ["🍵" * 255]


async def test_a_foreign_message_with_impossible_names_can_still_be_parked(store):
    """Somebody else's producer wrote it. If parking failed, it would block its partition for ever."""
    impossible = replace(sample("orders", "k\0" * 300), id="i" * 5000, source="s\ud800" * 200)
    near = replace(impossible, id="i" * 4999)
    for envelope in (impossible, near, impossible):
        await store.inbox.park(
            ParkedMessage(consumer="c", envelope=envelope, error="no\0pe", attempts=1, parked_at=datetime.now(UTC))
        )

    found = await store.inbox.find(InboxFilter(key=impossible.key))
    assert [each.envelope for each in found] == [impossible, near]
    first = await store.begin()
    assert [await store.inbox.record(first, "d", envelope) for envelope in (impossible, near, impossible)] == [
        Noted.NEW,
        Noted.NEW,
        Noted.HAD,
    ]
    await first.rollback()


@pytest.mark.parametrize(
    ("url", "driver"),
    [
        ("postgresql://u:s3cret@h/d", "asyncpg"),
        ("postgresql+psycopg://u:s3cret@h/d", "psycopg"),
        ("mysql://u:s3cret@h/d", "asyncmy"),
        ("mariadb+asyncmy://u:s3cret@h/d?ssl_key=s3cret", "asyncmy"),
        ("sqlite:///shop.db", "aiosqlite"),
        ("sqlite://", "aiosqlite"),
    ],
)
def test_a_url_gets_a_driver_and_shows_no_secret(url, driver):
    """A plain URL is what most have in their environment."""
    store = SqlAlchemyStore.from_url(url)

    assert store.database.engine.dialect.driver == driver
    assert "s3cret" not in store.name


@pytest.mark.parametrize("url", ["oracle://u:s3cret@h/d", "postgresql:/u:s3cret@h", "u:s3cret@h", "sqlite+pysqlite://"])
def test_a_url_that_cannot_be_used_is_refused_without_its_secret(url):
    """The text of an error goes to logs."""
    with pytest.raises((BadUrlError, UnsupportedError)) as raised:
        SqlAlchemyStore.from_url(url)

    assert "s3cret" not in str(raised.value) + repr(raised.value)


def test_all_faults_of_the_settings_come_at_once():
    """Mending them one by one takes a deployment each."""
    with pytest.raises(SettingError) as raised:
        StoreSettings(timeout=timedelta(0), idle_limit=timedelta(0), pool_size=0)

    assert all(name in str(raised.value) for name in ("timeout", "idle_limit", "pool_size"))


async def test_keys_that_differ_in_case_only_are_two(store):
    """MySQL's default collation takes them for one: a failing `A` would hold back `a`."""
    taken = await store.outbox.acquire("relay", timedelta(minutes=5), 32, in_hand=1)
    lanes = [each.lane for each in taken]
    transaction = await store.begin()
    transaction.add([sample("orders", key) for key in ("A", "a", "A ", "á")])
    await transaction.commit()
    records = await store.outbox.claim(lanes, 10)
    refused = next(record for record in records if record.envelope.key == "A")
    await store.outbox.settle(Settlement(lanes=lanes, failed=[FailedRecord(record=refused, error="no", delay=None)]))

    assert [record.envelope.key for record in await store.outbox.claim(lanes, 10)] == ["a", "A ", "á"]
    assert [record.envelope.key for record in await store.outbox.find(OutboxFilter(key="A"))] == ["A"]
