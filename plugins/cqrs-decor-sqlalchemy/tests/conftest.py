"""An empty database of each kind, and by each driver, for every test that asks for one."""

from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import Column, Integer, MetaData, String, Table, select
from sqlalchemy.ext.asyncio import AsyncSession

from cqrs_decor.outbox import OutboxFilter
from cqrs_decor_sqlalchemy import SqlAlchemyStore

DRIVERS = ("postgresql-asyncpg", "postgresql-psycopg", "mariadb-asyncmy", "sqlite-aiosqlite")


# A table of the user's; the test modules map their own classes to it.
_shop = MetaData()
_orders = Table(
    "shop_order", _shop, Column("id", Integer, primary_key=True), Column("sku", String(50), unique=True, nullable=False)
)


@pytest.fixture(params=DRIVERS)
def database_url(request: pytest.FixtureRequest) -> str:
    """A URL for SQLAlchemy; the server is started only for the tests that need it."""
    return url_of(request, request.param)


@pytest.fixture(params=DRIVERS[:3])
def server_url(request: pytest.FixtureRequest) -> str:
    """As `database_url`, for databases with more than one writer."""
    return url_of(request, request.param)


def url_of(request: pytest.FixtureRequest, driver: str) -> str:
    kind, _, name = driver.partition("-")
    fixture = {"postgresql": "postgres_url", "mariadb": "mariadb_url", "sqlite": "sqlite_url"}[kind]
    url: str = request.getfixturevalue(fixture)
    return url.replace("+asyncpg", f"+{name}") if kind == "postgresql" else url


@pytest_asyncio.fixture
async def store(database_url: str) -> AsyncIterator[SqlAlchemyStore]:
    """A store with its own tables and those of the user."""
    store = await opened(database_url)
    yield store
    await store.close()


@pytest_asyncio.fixture
async def server_store(server_url: str) -> AsyncIterator[SqlAlchemyStore]:
    store = await opened(server_url)
    yield store
    await store.close()


async def opened(url: str, **options: Any) -> SqlAlchemyStore:
    store = SqlAlchemyStore.from_url(url, **options)
    await store.schema.upgrade()
    await store.open()
    async with store.database.engine.begin() as connection:
        await connection.run_sync(_shop.create_all)
    return store


@pytest.fixture
def stored() -> Callable[[SqlAlchemyStore], Coroutine[Any, Any, list[str | None]]]:
    """The keys of the records in the outbox, in order."""

    async def keys(store: SqlAlchemyStore) -> list[str | None]:
        return [record.envelope.key for record in await store.outbox.find(OutboxFilter())]

    return keys


@pytest.fixture
def orders() -> Callable[[SqlAlchemyStore], Coroutine[Any, Any, list[str]]]:
    """What the orders that were committed are for."""

    async def skus(store: SqlAlchemyStore) -> list[str]:
        async with AsyncSession(store.database.engine) as session:
            return list(await session.scalars(select(_orders.c.sku).order_by(_orders.c.id)))

    return skus
