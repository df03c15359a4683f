"""Idempotency keys on real databases: connections that break during COMMIT, and two sends at the same time."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from cqrs_decor import App, Command, IntegrationEvent, Registry, bootstrap, emit
from cqrs_decor.errors import CommitOutcomeUnknownError
from cqrs_decor_sqlalchemy import SqlAlchemyStore
from tests.services.proxy import Proxy

pytestmark = pytest.mark.feature("M16")


class Order(Command[int]):
    sku: str = "tea"


class Ordered(IntegrationEvent, topic="orders", key="sku"):
    sku: str


class Shop:
    """Takes orders into the table of the tests; knows how often its handler ran."""

    def __init__(self) -> None:
        self.registry = Registry("shop")
        self.runs = 0
        self.registry.command_handler(self.order)

    async def order(self, command: Order, session: AsyncSession) -> int:
        self.runs += 1
        sku = f"{command.sku} {self.runs}"  # the column is unique, and two runs must be seen as two rows
        await session.execute(text("INSERT INTO shop_order (sku) VALUES (:sku)"), {"sku": sku})
        emit(Ordered(sku=command.sku))
        return self.runs

    def app(self, store: SqlAlchemyStore) -> App:
        return bootstrap(registry=self.registry, discover=False, run="none", service="shop", database=store)


@asynccontextmanager
async def through_proxy(store: SqlAlchemyStore, url: str) -> AsyncIterator[tuple[Proxy, SqlAlchemyStore]]:
    """A second store that reaches the database of the first through a proxy."""
    proxy = Proxy(url)
    cuttable = SqlAlchemyStore.from_url(await proxy.start())
    try:
        yield proxy, cuttable
    finally:
        await cuttable.close()
        await proxy.stop()


@pytest.mark.parametrize(("delivered", "runs"), [(True, 1), (False, 2)])
async def test_a_commit_whose_answer_is_lost_is_repeated_and_counts_once(
    server_store, server_url, orders, stored, delivered, runs
):
    """The key tells whether it was committed: then the result is there, else the handler runs again."""
    shop = Shop()

    async with through_proxy(server_store, server_url) as (proxy, store), shop.app(store) as app:
        proxy.cut_at, proxy.deliver_first = b"COMMIT", delivered
        result = await app.send(Order(), idempotency_key="order-1")
        again = await app.send(Order(), idempotency_key="order-1")

    assert (result, again, shop.runs) == (runs, runs, runs)
    assert await orders(server_store) == [f"tea {runs}"]
    assert await stored(server_store) == ["tea"]


class NoKeys:
    """The protection switched off: no key was ever used before."""

    async def begin(self, transaction: object, key: str, fingerprint: str) -> None:
        return None

    async def keep(self, transaction: object, key: str, result: bytes | None) -> None: ...


async def test_without_kept_keys_such_a_repeat_counts_twice(server_store, server_url, orders):
    """The negative control: it is the key in the transaction, and nothing else, that keeps the effect single."""
    shop = Shop()

    async with through_proxy(server_store, server_url) as (proxy, store):
        store.idempotency = NoKeys()  # type: ignore[assignment]
        async with shop.app(store) as app:
            proxy.cut_at, proxy.deliver_first = b"COMMIT", True
            await app.send(Order(), idempotency_key="order-1")

    with anyio.fail_after(20):  # nobody knows when the lost commit is done
        while len(await orders(server_store)) < 2:  # noqa: ASYNC110 - the server sets no event
            await anyio.sleep(0.02)
    assert shop.runs == 2


async def test_without_a_key_an_unknown_commit_is_told_and_not_repeated(server_store, server_url):
    """Nobody but the caller can tell whether to look or to try again."""
    shop = Shop()

    async with through_proxy(server_store, server_url) as (proxy, store), shop.app(store) as app:
        proxy.cut_at, proxy.deliver_first = b"COMMIT", True
        with pytest.raises(CommitOutcomeUnknownError):
            await app.send(Order())

    assert shop.runs == 1


@pytest.mark.parametrize("isolation", [None, "REPEATABLE READ", "SERIALIZABLE"])
async def test_of_many_sends_at_once_one_runs(server_url, server_store, orders, isolation):
    """Two processes have the same request; on every isolation level the others get the result of the first."""
    engine = create_async_engine(server_url, **({"isolation_level": isolation} if isolation else {}))
    store, shop, results = SqlAlchemyStore(engine), Shop(), list[int]()

    async with shop.app(store) as app:

        async def send() -> None:
            results.append(await app.send(Order(), idempotency_key="order-1"))

        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(send)
    await engine.dispose()

    assert len(set(results)) == 1
    assert await orders(server_store) == [f"tea {results[0]}"]


async def test_a_handler_without_a_session_has_its_result_kept_as_well(store):
    """It gets a transaction for the key alone."""
    registry, runs = Registry("shop"), list[str]()

    @registry.command_handler
    async def order(command: Order) -> int:
        runs.append(command.sku)
        return 7

    async with bootstrap(registry=registry, discover=False, run="none", service="shop", database=store) as app:
        assert [await app.send(Order(), idempotency_key="order-1") for _ in range(2)] == [7, 7]

    assert runs == ["tea"]


async def test_a_key_in_a_session_of_the_callers_ends_with_it(store, orders):
    """A rollback of theirs gives the key back, a commit keeps the result."""
    shop = Shop()

    async with shop.app(store) as app:
        async with AsyncSession(store.database.engine) as session:
            await app.send(Order(), session=session, idempotency_key="order-1")
            await session.rollback()
        async with AsyncSession(store.database.engine) as session:
            await app.send(Order(), session=session, idempotency_key="order-1")
            await session.commit()
        result = await app.send(Order(), idempotency_key="order-1")

    assert (result, shop.runs) == (2, 2)
    assert await orders(store) == ["tea 2"]


async def test_a_snapshot_from_before_does_not_hide_a_kept_result(server_store, orders):
    """MariaDB reads from the time of a transaction's first look, when the key was free still."""
    shop = Shop()

    async with shop.app(server_store) as app, AsyncSession(server_store.database.engine) as session:
        await session.execute(text("SELECT COUNT(*) FROM shop_order"))
        first = await app.send(Order(), idempotency_key="order-1")
        again = await app.send(Order(), session=session, idempotency_key="order-1")
        await session.commit()

    assert (first, again, shop.runs) == (1, 1, 1)
    assert await orders(server_store) == ["tea 1"]
