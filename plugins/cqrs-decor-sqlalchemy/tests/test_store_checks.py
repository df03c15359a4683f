"""What `doctor` says about a server, what stands before it, and the pool of connections to it."""

from collections.abc import Iterator

import pytest
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, StaticPool

from cqrs_decor.findings import Finding
from cqrs_decor_sqlalchemy import SqlAlchemyStore
from cqrs_decor_sqlalchemy.checks import connections_of
from tests.services import PgBouncerServer, PostgresServer

SET_UP = {
    "psycopg": {"prepare_threshold": None},
    "asyncpg": {"statement_cache_size": 0, "prepared_statement_cache_size": 0},
}


@pytest.fixture
def pooled_url(postgres_server: PostgresServer, postgres_url: str) -> Iterator[str]:
    """The same database as `postgres_url`, through PgBouncer in transaction mode."""
    with PgBouncerServer(postgres_server) as pooler:
        yield pooler.url(driver="asyncpg", database=make_url(postgres_url).database or "")


async def errors_of(store: SqlAlchemyStore) -> list[Finding]:
    return [finding for finding in await store.check() if finding.severity == "error"]


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_level_under_which_relays_see_too_little_is_an_error(postgres_url, driver, level):
    """A relay waits for a lane; what was committed meanwhile, an operator's retry say, must be seen then."""
    url = postgres_url.replace("+asyncpg", f"+{driver}")
    engine = create_async_engine(url, isolation_level=level)
    store = SqlAlchemyStore(engine)
    await store.schema.upgrade()

    [error] = await errors_of(store)
    await engine.dispose()

    assert error.code == "CD406"
    assert f"under {level} a relay that waited" in error.problem


async def test_the_level_that_each_database_comes_with_is_right(store):
    """Nobody has to set anything."""
    found = await store.check()

    assert [finding for finding in found if finding.severity != "ok"] == []
    assert any(finding.problem.startswith("isolation level ") for finding in found)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_pooler_is_found_and_so_is_a_driver_that_is_not_set_up_for_it(pooled_url, driver):
    """Its prepared statements are on other server connections than it thinks: half of the transactions fail."""
    url = pooled_url.replace("+asyncpg", f"+{driver}")
    as_it_comes, set_up = create_async_engine(url), create_async_engine(url, connect_args=SET_UP[driver])
    await SqlAlchemyStore(set_up).schema.upgrade()

    ready = await SqlAlchemyStore(set_up).check()
    errors = await errors_of(SqlAlchemyStore(as_it_comes))
    for engine in (as_it_comes, set_up):
        await engine.dispose()

    assert [finding.problem for finding in ready if "pooler" in finding.problem] == [
        "a pooler in transaction mode stands in between, and the driver is set up for it"
    ]
    assert [finding for finding in ready if finding.severity != "ok"] == []
    assert any("a pooler in transaction mode stands in between" in error.problem for error in errors)


async def test_without_a_pooler_none_is_found(server_store):
    """The negative control."""
    assert [finding for finding in await server_store.check() if "pooler" in finding.problem] == []


@pytest.mark.parametrize(
    ("options", "connections"),
    [
        ({}, 15),
        ({"pool_size": 3, "max_overflow": 4}, 7),
        ({"max_overflow": -1}, None),
        ({"pool_size": 0}, None),
        ({"poolclass": NullPool}, None),
        ({"poolclass": StaticPool}, 1),
        ({"poolclass": AsyncAdaptedQueuePool, "pool_size": 1, "max_overflow": 0}, 1),
    ],
)
def test_how_many_connections_there_may_be_is_read_from_the_pool(options, connections):
    """A start-up that would need more is refused: the relay would wait for one, and lose its lanes."""
    pytest.importorskip("asyncpg")
    engine = create_async_engine("postgresql+asyncpg://localhost/none", **options)

    assert connections_of(engine) == connections
    assert SqlAlchemyStore(engine).connections == connections
