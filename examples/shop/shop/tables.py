"""Makes databases and the services' own tables, and fills the shelves. Safe to run again."""

from sqlalchemy import MetaData, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from shop.models import Stock

SKUS = [f"tea-{number:02}" for number in range(40)]


async def create_database(url: str) -> None:
    """Create the database that the URL names, from the server's own database `postgres`."""
    wanted = make_url(url).database
    server = create_async_engine(make_url(url).set(database="postgres"), isolation_level="AUTOCOMMIT")
    async with server.connect() as connection:
        known = await connection.scalar(text("SELECT 1 FROM pg_database WHERE datname = :name"), {"name": wanted})
        if not known:
            await connection.execute(text(f'CREATE DATABASE "{wanted}"'))
    await server.dispose()


async def create_tables(url: str, metadata: MetaData) -> None:
    """A service's own tables; those of outbox and inbox come from `cqrs-decor db upgrade`."""
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    await engine.dispose()


async def fill_stock(url: str) -> None:
    """Enough of everything, unless it is there already."""
    engine = create_async_engine(url)
    rows = [{"sku": sku, "price": 5 + number, "available": 10_000_000} for number, sku in enumerate(SKUS)]
    async with engine.begin() as connection:
        await connection.execute(insert(Stock).values(rows).on_conflict_do_nothing())
    await engine.dispose()
