"""The tables: made once, by whom the user wants, and never dropped by a migration tool."""

import anyio
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Column, Integer, MetaData, Table, inspect, text
from sqlalchemy.ext.asyncio import create_async_engine

from cqrs_decor.errors import SchemaMissingError, SchemaOutdatedError
from cqrs_decor.lanes import LANES
from cqrs_decor.testing.conformance.kit import sample
from cqrs_decor_sqlalchemy import SqlAlchemyStore, Tables, leave_out_our_tables

pytestmark = pytest.mark.feature("O9")


def fresh(url: str, **options) -> SqlAlchemyStore:
    return SqlAlchemyStore.from_url(url, **options)


async def test_an_upgrade_does_what_the_plan_says_and_nothing_the_second_time(database_url):
    """`db plan` goes into a review, `db upgrade` runs at each deployment."""
    store = fresh(database_url)
    plan = await store.schema.plan()
    done = await store.schema.upgrade()

    assert list(plan) == list(done)
    assert any("CREATE TABLE" in statement and "cqrs_outbox" in statement for statement in plan)
    assert (list(await store.schema.plan()), list(await store.schema.upgrade())) == ([], [])
    assert [finding.severity for finding in await store.schema.check()] == ["ok"]
    await store.close()


async def test_the_planned_statements_can_be_run_by_hand(server_url):
    """Where only a database administrator may create tables, they paste them."""
    store = fresh(server_url)
    plan = await store.schema.plan()
    async with store.database.engine.begin() as connection:
        for statement in plan:
            await connection.exec_driver_sql(statement.replace("%", "%%"))
    await store.open()
    await store.close()


async def test_two_processes_may_upgrade_at_once(database_url):
    """All instances of a service start at the same time after a deployment."""
    stores = [fresh(database_url) for _ in range(4)]
    done = []

    async def upgrade(store):
        done.append(await store.schema.upgrade())

    async with anyio.create_task_group() as tasks:
        for store in stores:
            tasks.start_soon(upgrade, store)

    assert sorted(len(statements) > 0 for statements in done) == [False, False, False, True]
    assert [finding.severity for finding in await stores[0].schema.check()] == ["ok"]
    for store in stores:
        await store.close()


async def test_a_server_without_tables_says_what_to_run(server_url):
    """Making tables in somebody's database unasked is not ours to do; a first start must say what is."""
    store = fresh(server_url)
    with pytest.raises(SchemaMissingError, match="db upgrade") as raised:
        await store.open()
    await store.close()

    assert "cqrs_outbox" in raised.value.tables


async def test_a_table_that_was_dropped_is_found_and_made_again(server_url):
    """Somebody's migration dropped what it did not know."""
    store = fresh(server_url)
    await store.schema.upgrade()
    async with store.database.engine.begin() as connection:
        await connection.execute(text("DROP TABLE cqrs_inbox"))

    [finding] = await store.schema.check()
    done = await store.schema.upgrade()
    await store.close()

    assert (finding.severity, "cqrs_inbox" in finding.problem) == ("error", True)
    assert "CREATE TABLE" in done[0]
    assert "cqrs_inbox" in done[0]


async def test_a_column_that_is_missing_is_found(server_url):
    """A migration that was written by hand, and forgot one."""
    store = fresh(server_url)
    await store.schema.upgrade()
    async with store.database.engine.begin() as connection:
        await connection.execute(text("ALTER TABLE cqrs_outbox_lane DROP COLUMN low_id"))

    assert [finding.problem for finding in await store.schema.check()] == [
        "table cqrs_outbox_lane lacks the column low_id"
    ]
    await store.close()


async def test_missing_lane_rows_are_found_and_filled_in(server_url):
    """Without its row a lane is held by nobody, and its records wait for ever."""
    store = fresh(server_url)
    await store.schema.upgrade()
    async with store.database.engine.begin() as connection:
        await connection.execute(text("DELETE FROM cqrs_outbox_lane WHERE lane > 3"))

    assert [finding.severity for finding in await store.schema.check()] == ["error"]
    await store.schema.upgrade()
    async with store.database.engine.connect() as connection:
        assert (await connection.execute(text("SELECT count(*) FROM cqrs_outbox_lane"))).scalar() == LANES
    await store.close()


@pytest.mark.parametrize(("version", "advice"), [(0, "db upgrade"), (99, "upgrade cqrs-decor")])
async def test_tables_of_another_version_are_refused(server_url, version, advice):
    """An old service beside a new one must stop before it writes what the other cannot read."""
    store = fresh(server_url)
    await store.schema.upgrade()
    async with store.database.engine.begin() as connection:
        await connection.execute(text(f"UPDATE cqrs_schema SET version = {version}"))

    with pytest.raises(SchemaOutdatedError, match=advice):
        await store.open()
    assert [finding.code for finding in await store.schema.check()] == ["CD404"]
    await store.close()


async def test_tables_made_by_a_migration_of_the_users_get_their_rows_when_the_app_starts(server_url):
    """Autogenerate writes CREATE TABLE and knows nothing of the lane rows."""
    metadata = MetaData()
    engine = create_async_engine(server_url)
    store = SqlAlchemyStore(engine, tables=Tables(metadata))
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    await store.open()

    assert len(await store.outbox.acquire("relay", store.settings.timeout, LANES, in_hand=1)) == LANES
    assert [finding.severity for finding in await store.schema.check()] == ["ok"]
    await engine.dispose()


@pytest.mark.parametrize("options", [{}, {"prefix": "msg_"}])
async def test_alembic_finds_no_difference_when_the_tables_are_in_the_users_metadata(database_url, options):
    """A migration that is generated the next day must not touch them."""
    metadata = MetaData()
    Table("shop", metadata, Column("id", Integer, primary_key=True))
    store = fresh(database_url, tables=Tables(metadata, **options))
    await store.schema.upgrade()

    differences = await autogenerate(store, metadata)
    await store.close()

    assert [(what, thing.name) for what, thing in differences] == [("add_table", "shop")]


async def test_alembic_leaves_the_tables_alone_when_it_is_told_to(database_url):
    """Where `db upgrade` makes them, autogenerate would drop what it does not know."""
    metadata = MetaData()
    Table("shop", metadata, Column("id", Integer, primary_key=True))
    store = fresh(database_url)
    await store.schema.upgrade()

    unguarded = await autogenerate(store, metadata)
    guarded = await autogenerate(store, metadata, include_object=leave_out_our_tables)
    await store.close()

    assert any(difference[0] == "remove_table" for difference in unguarded), "the danger is real"
    assert [(what, thing.name) for what, thing in guarded] == [("add_table", "shop")]


async def test_the_tables_can_stand_in_a_schema_of_their_own(postgres_url):
    """Teams keep `messaging` apart from their business tables."""
    tables = Tables(schema="messaging", prefix="mq_")
    store = fresh(postgres_url, tables=tables)
    await store.schema.upgrade()
    await store.open()
    transaction = await store.begin()
    transaction.add([sample("orders")])
    await transaction.commit()

    async with store.database.engine.connect() as connection:
        names = await connection.run_sync(lambda sync: inspect(sync).get_table_names("messaging"))
    assert "mq_outbox" in names
    assert (await store.outbox.backlog()).pending == 1
    assert list(await store.schema.plan()) == []
    await store.close()


async def test_hot_tables_are_vacuumed_by_count(postgres_url):
    """By share of the table, which is empty at most times, the dead rows of a burst would stay for long."""
    store = fresh(postgres_url)
    await store.schema.upgrade()
    async with store.database.engine.connect() as connection:
        options = await connection.scalar(text("SELECT reloptions FROM pg_class WHERE relname = 'cqrs_outbox'"))
    await store.close()

    assert {"autovacuum_vacuum_scale_factor=0", "autovacuum_vacuum_threshold=5000"} <= set(options)


async def autogenerate(store, metadata, **options):
    def compare(connection):
        context = MigrationContext.configure(connection, opts={"compare_type": True, **options})
        return compare_metadata(context, metadata)

    async with store.database.engine.connect() as connection:
        return await connection.run_sync(compare)
