"""The harness for an app that names a database: sessions on a temporary SQLite file, with the user's own tables."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import MetaData, select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from cqrs_decor import Command, IntegrationEvent, Query, Registry, bootstrap, emit
from cqrs_decor.testing import AppUnderTest, OpenApp
from cqrs_decor_sqlalchemy import SqlAlchemyStore, Tables

pytestmark = pytest.mark.feature("U3")


class Base(DeclarativeBase):
    metadata = MetaData()


class Order(Base):
    __tablename__ = "harness_orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    sku: Mapped[str]


class PlaceOrder(Command[int]):
    sku: str


class ListOrders(Query[list[str]]):
    pass


class OrderPlaced(IntegrationEvent, topic="orders", key="sku", name="harness-database.order-placed"):
    sku: str


class ShopSession(AsyncSession):
    """A session class of the user's own."""


def shop() -> Registry:
    sales = Registry("sales")

    @sales.command_handler
    async def place_order(command: PlaceOrder, session: AsyncSession) -> int:
        order = Order(sku=command.sku)
        session.add(order)
        await session.flush()
        emit(OrderPlaced(sku=order.sku))
        if command.sku == "gone":
            raise LookupError
        return order.id

    @sales.query_handler
    async def list_orders(query: ListOrders, session: AsyncSession) -> list[str]:
        return list(await session.scalars(select(Order.sku).order_by(Order.id)))

    @sales.event_handler(name="double")
    async def double(event: OrderPlaced, session: AsyncSession) -> None:
        session.add(Order(sku=event.sku * 2))

    return sales


async def works(app: AppUnderTest) -> None:
    assert await app.send(PlaceOrder(sku="tea")) == 1
    app.published.one(OrderPlaced)
    await app.drain()
    assert await app.ask(ListOrders()) == ["tea", "teatea"]


async def test_an_app_that_names_a_server_runs_on_a_temporary_file(cqrs_app: OpenApp) -> None:
    """No server is needed for the tests of an application, and none of its data is touched."""
    database = "postgresql+asyncpg://nobody@nowhere.invalid/shop"
    cqrs = bootstrap(
        registry=shop(), discover=False, service="shop", broker="kafka://nowhere.invalid", database=database
    )

    async with cqrs_app(cqrs, metadata=Base) as app:
        await works(app)

        assert app.store.name.startswith("sqlite")


async def test_each_opening_has_an_empty_database(cqrs_app: OpenApp) -> None:
    """Tests do not see each other's rows."""
    cqrs = bootstrap(registry=shop(), discover=False, database="postgresql://nowhere.invalid/shop")

    for _ in range(2):
        async with cqrs_app(cqrs, metadata=Base.metadata) as app:
            await works(app)


async def test_the_metadata_of_declarative_bases_is_found(cqrs_app: OpenApp) -> None:
    """A URL says nothing of tables: without metadata= those of all bases are made."""
    cqrs = bootstrap(registry=shop(), discover=False, database="postgresql://nowhere.invalid/shop")

    async with cqrs_app(cqrs) as app:
        await works(app)


async def test_the_metadata_of_a_given_store_is_used(cqrs_app: OpenApp) -> None:
    """Its tables stand beside the user's own."""
    store = SqlAlchemyStore.from_url("postgresql://nowhere.invalid/shop", tables=Tables(metadata=Base.metadata))
    cqrs = bootstrap(registry=shop(), discover=False, database=store)

    async with cqrs_app(cqrs) as app:
        await works(app)

        assert app.store is not store


async def test_a_database_is_there_for_an_app_without_one_if_tables_are_given(cqrs_app: OpenApp) -> None:
    """metadata= says that there is to be one."""
    async with cqrs_app(bootstrap(registry=shop(), discover=False), metadata=Base) as app:
        await works(app)


async def test_session_class_and_options_of_a_sessionmaker_are_kept(cqrs_app: OpenApp) -> None:
    """expire_on_commit and the class are the user's decisions: their handlers are written for them."""
    sales = Registry("sales")
    kinds: list[tuple[type[Any], bool]] = []

    @sales.command_handler
    async def place_order(command: PlaceOrder, session: ShopSession) -> int:
        kinds.append((type(session), session.sync_session.expire_on_commit))
        return 1

    engine = create_async_engine("postgresql+asyncpg://nowhere.invalid/shop")
    sessions = async_sessionmaker(engine, class_=ShopSession, expire_on_commit=True)
    async with cqrs_app(bootstrap(registry=sales, discover=False, database=sessions), metadata=Base) as app:
        await app.send(PlaceOrder(sku="tea"))

    assert kinds == [(ShopSession, True)]


async def test_a_rolled_back_command_leaves_neither_rows_nor_events(cqrs_app: OpenApp) -> None:
    """On a real database: one transaction for both."""
    cqrs = bootstrap(registry=shop(), discover=False, database="postgresql://nowhere.invalid/shop")

    async with cqrs_app(cqrs, metadata=Base) as app:
        with pytest.raises(LookupError):
            await app.send(PlaceOrder(sku="gone"))

        app.published.none(OrderPlaced)
        assert await app.ask(ListOrders()) == []


async def test_rows_are_put_into_the_database_by_a_unit_of_work(cqrs_app: OpenApp) -> None:
    """Arrange without a command of its own for it."""
    cqrs = bootstrap(registry=shop(), discover=False, database="postgresql://nowhere.invalid/shop")

    async with cqrs_app(cqrs, metadata=Base) as app:
        async with app.unit_of_work() as work:
            work.resource(AsyncSession).add(Order(sku="milk"))

        assert await app.ask(ListOrders()) == ["milk"]


async def test_what_a_rolled_back_savepoint_emitted_is_not_published(cqrs_app: OpenApp) -> None:
    """emit was called and the command was committed: only the outbox tells the truth."""
    sales = Registry("sales")

    @sales.command_handler
    async def place_order(command: PlaceOrder, session: AsyncSession) -> int:
        savepoint = await session.begin_nested()
        emit(OrderPlaced(sku="inside"))
        await savepoint.rollback()
        emit(OrderPlaced(sku="outside"))
        return 1

    cqrs = bootstrap(registry=sales, discover=False, database="postgresql://nowhere.invalid/shop")
    async with cqrs_app(cqrs, metadata=Base) as app:
        await app.send(PlaceOrder(sku="tea"))

        assert app.published.one(OrderPlaced).sku == "outside"


async def test_a_delivery_is_handled_once_with_its_rows(cqrs_app: OpenApp) -> None:
    """Inbox row and business rows are one transaction."""
    cqrs = bootstrap(registry=shop(), discover=False, database="postgresql://nowhere.invalid/shop")

    async with cqrs_app(cqrs, metadata=Base) as app:
        handled = [await app.deliver(OrderPlaced(sku="ab"), message_id="m-1") for _ in range(2)]

        assert await app.ask(ListOrders()) == ["abab"]
    assert handled == [1, 0]


async def test_a_database_of_the_tests_own_is_taken(cqrs_app: OpenApp, tmp_path: Path) -> None:
    """A test that needs a server brings its URL."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'mine.db'}"
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(text("INSERT INTO harness_orders (sku) VALUES ('old')"))
    await engine.dispose()

    async with cqrs_app(bootstrap(registry=shop(), discover=False), database=url) as app:
        assert await app.ask(ListOrders()) == ["old"]
