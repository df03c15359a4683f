"""A small order table and the messages around it, shared by the benchmarks that use a database."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from sqlalchemy import BigInteger, Identity, String, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from cqrs_decor import App, Command, IntegrationEvent, Registry, bootstrap, emit
from tests.services import PostgresServer
from tests.services.fixtures import fresh_name

TOPIC = "benchmark.orders"
PAYLOAD = "x" * 150


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    sku: Mapped[str] = mapped_column(String(200))


class Effect(Base):
    __tablename__ = "effects"
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    order_id: Mapped[int] = mapped_column(BigInteger)


class PlaceQuietly(Command[int]):
    sku: str


class PlaceOrder(Command[int]):
    sku: str


class OrderPlaced(IntegrationEvent, topic=TOPIC, key="order_id", name="benchmark.order-placed"):
    order_id: int
    text: str


_INBOX_BY_HAND = """
    CREATE TABLE benchmark_inbox (
        consumer text, source text, message_id text, handled_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (consumer, source, message_id)
    )
"""

commands = Registry("benchmark commands")
consumers = Registry("benchmark consumers")
optimistic = Registry("benchmark consumers in batches")


@commands.command_handler
async def place_quietly(command: PlaceQuietly, session: AsyncSession) -> int:
    order = Order(sku=command.sku)
    session.add(order)
    await session.flush()
    return order.id


@commands.command_handler
async def place_order(command: PlaceOrder, session: AsyncSession) -> int:
    order = Order(sku=command.sku)
    session.add(order)
    await session.flush()
    emit(OrderPlaced(order_id=order.id, text=PAYLOAD))
    return order.id


@consumers.event_handler
async def note_effect(event: OrderPlaced, session: AsyncSession) -> None:
    session.add(Effect(order_id=event.order_id))


optimistic.event_handler(optimistic=True)(note_effect)


@asynccontextmanager
async def database(server: PostgresServer) -> AsyncGenerator[AsyncEngine, None]:
    """An engine on a fresh database that holds the tables of the benchmark and of the library."""
    name = fresh_name()
    server.create_database(name)
    engine = create_async_engine(server.url(driver="asyncpg", database=name), pool_size=20)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(text(_INBOX_BY_HAND))
    store = bootstrap(registry=commands, discover=False, database=engine, run="none").parts().store
    assert store.schema is not None
    await store.schema.upgrade()
    try:
        yield engine
    finally:
        await engine.dispose()
        server.drop_database(name)


def commanding(engine: AsyncEngine) -> App:
    return bootstrap(registry=commands, discover=False, database=engine, service="benchmark", run="none")


def sessions(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(engine, expire_on_commit=False)
