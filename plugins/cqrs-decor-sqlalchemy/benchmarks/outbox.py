"""What the outbox costs, each time against the same work by hand and in one run: read the ratios.

python plugins/cqrs-decor-sqlalchemy/benchmarks/outbox.py [postgresql+asyncpg://... of an empty database]
"""
# ruff: noqa: T201, S608 - it prints, and its SQL is its own

import asyncio
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from cqrs_decor._ids import new_id
from cqrs_decor.envelope import Envelope
from cqrs_decor.lanes import LANES, HeldLane
from cqrs_decor.outbox import Settlement
from cqrs_decor_sqlalchemy import SqlAlchemyStore
from cqrs_decor_sqlalchemy.columns import DatabaseNow
from cqrs_decor_sqlalchemy.records import record_row
from tests.services import PostgresServer, running

Way = Callable[[int], Awaitable[Any]]

_BATCH = 500
_CLAIMS = 20


class Base(DeclarativeBase):
    """The business's own tables."""


class Order(Base):
    __tablename__ = "business"

    id: Mapped[int] = mapped_column(primary_key=True)
    sku: Mapped[str]


async def main(url: str) -> None:
    store = SqlAlchemyStore.from_url(url)
    await store.schema.upgrade()
    await store.open()
    async with store.database.engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await emitting(store, url)
    await relaying(store, url)
    await claiming_at_size(store)
    await growing(store)
    await store.close()


async def emitting(store: SqlAlchemyStore, url: str) -> None:
    """One business row and the commit; the same with an event."""
    engine = create_async_engine(url, pool_size=20)
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    outbox = store.database.tables.outbox.insert().values(written_at=DatabaseNow())

    async def bare(_: int) -> None:
        async with sessions() as session:
            session.add(Order(sku="tea"))
            await session.commit()

    async def by_hand(number: int) -> None:
        async with sessions() as session:
            session.add(Order(sku="tea"))
            await session.flush()
            await session.execute(outbox, record_row(_event(number)))
            await session.commit()

    async def unit_of_work(_: int) -> None:
        transaction = await store.begin()
        transaction.session.add(Order(sku="tea"))
        await transaction.commit()

    async def emit(number: int) -> None:
        transaction = await store.begin()
        transaction.session.add(Order(sku="tea"))
        transaction.add([_event(number)])
        await transaction.commit()

    ways: dict[str, Way] = {"bare": bare, "two rows by hand": by_hand, "unit of work": unit_of_work, "emit": emit}
    for clients in (1, 8):
        medians = await _compared(ways, clients, rounds=800 // clients)
        for name, seconds in medians.items():
            ratio = seconds / medians["bare"]
            print(f"{clients} clients  {name:18} {seconds * 1e6:8,.0f} us   {ratio:.2f} x bare")
    await engine.dispose()


async def relaying(store: SqlAlchemyStore, url: str) -> None:
    """Claim and settle one after another, 500 at a time; by hand with the bare driver, decoding nothing."""
    driver = await asyncpg.connect(url.replace("+asyncpg", ""))
    lanes = await _held(store, LANES)
    numbers = [lane.number for lane in lanes]

    async def through_store(_: int) -> None:
        records = await store.outbox.claim(lanes, _BATCH)
        await store.outbox.settle(Settlement(lanes=lanes, delivered=records))

    async def through_driver(_: int) -> None:
        rows = await driver.fetch(_CLAIM, numbers, _BATCH)
        async with driver.transaction():
            await driver.fetch(_LOCK, numbers)
            await driver.execute("DELETE FROM cqrs_outbox WHERE id = ANY($1::bigint[])", [row["id"] for row in rows])

    await _fill(store, 2 * 60 * _BATCH)
    await driver.execute("ANALYZE cqrs_outbox")
    medians = await _compared({"store": through_store, "bare driver": through_driver}, 1, rounds=50)
    for name, seconds in medians.items():
        print(f"claim + settle  {name:12} {_BATCH / seconds:8,.0f} records/s")
    await store.outbox.release("benchmark", lanes)
    await driver.close()


async def claiming_at_size(store: SqlAlchemyStore) -> None:
    """With statistics as a burst leaves them, which is none; then with what is left of the burst after it was settled,
    also for one who keeps an old snapshot open all the while.
    """
    lanes = await _held(store, LANES)
    shares = {count: lanes[:count] for count in (1, LANES // 2, LANES)}
    await _claims(store, shares, "nothing waits")
    for size in (1_000, 1_000_000):
        await _burst(store, size)
        await _claims(store, shares, f"{size:9,} wait, evenly")
        await _emptied(store)
    await _burst(store, 1_000_000, "n % 16")
    await _claims(store, {LANES // 2: lanes[LANES // 2 :], 1: lanes[-1:]}, "1,000,000 wait in 16 lanes of others")
    await _emptied(store)

    async with store.database.engine.connect() as reading:
        backup = await reading.execution_options(isolation_level="REPEATABLE READ")
        await backup.execute(text("SELECT count(*) FROM cqrs_outbox"))
        await _burst(store, 1_000_000)
        await _emptied(store)
        await _burst(store, 1_000)
        await _claims(store, shares, "1,000,000 settled, snapshot open, before the bound moved")
        for _ in range(2):
            took = await _timed(lambda _: store.outbox.upkeep.run(lanes), 0)
            print(f"moving the bound: {took * 1e3:6.1f} ms")
        await _burst(store, 1_000)
        await _claims(store, shares, "1,000,000 settled, snapshot open, after the bound moved")
        await backup.rollback()
    await store.outbox.release("benchmark", lanes)


async def growing(store: SqlAlchemyStore) -> None:
    """A second burst must find room where the first one was."""
    for number in (1, 2):
        await _burst(store, 1_000_000)
        await _emptied(store)
        async with store.database.engine.connect() as connection:
            vacuuming = await connection.execution_options(isolation_level="AUTOCOMMIT")
            await vacuuming.execute(text("VACUUM cqrs_outbox"))
            size = await vacuuming.scalar(text("SELECT pg_total_relation_size('cqrs_outbox')"))
        print(f"after burst {number} of 1,000,000 and VACUUM: {(size or 0) / 1e6:,.0f} MB")


async def _held(store: SqlAlchemyStore, limit: int) -> list[HeldLane]:
    taken = await store.outbox.acquire("benchmark", timedelta(minutes=30), limit, in_hand=_BATCH)
    return [each.lane for each in taken]


async def _burst(store: SqlAlchemyStore, size: int, lane: str = "n % 32") -> None:
    async with store.database.engine.begin() as connection:
        await connection.execute(text(_MANY.replace("n % 32", lane)), {"size": size})


async def _emptied(store: SqlAlchemyStore) -> None:
    """As if all had been settled, and nothing cleaned up."""
    async with store.database.engine.begin() as connection:
        await connection.execute(text("DELETE FROM cqrs_outbox"))


async def _claims(store: SqlAlchemyStore, shares: Mapping[int, Sequence[HeldLane]], what: str) -> None:
    for count, lanes in shares.items():
        took = [
            await _timed(lambda _, lanes=lanes: store.outbox.claim(lanes, _BATCH), number) for number in range(_CLAIMS)
        ]
        print(f"claim of {_BATCH}, {count:2} of {LANES} lanes: {statistics.median(took) * 1e3:7.1f} ms   {what}")


async def _compared(ways: dict[str, Way], clients: int, *, rounds: int) -> dict[str, float]:
    """Medians per call, all ways in each round and in random order, so that what else the machine does hits all."""
    took: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 5):
        for name in random.sample(list(ways), k=len(ways)):
            way = ways[name]
            seconds = await _timed(lambda n, way=way: asyncio.gather(*(way(n) for _ in range(clients))), number)
            if number >= 5:
                took[name].append(seconds / clients)
    return {name: statistics.median(values) for name, values in took.items()}


async def _timed(way: Way, number: int) -> float:
    began = time.perf_counter()
    await way(number)
    return time.perf_counter() - began


async def _fill(store: SqlAlchemyStore, size: int) -> None:
    for start in range(0, size, 1_000):
        transaction = await store.begin()
        transaction.add([_event(number) for number in range(start, start + 1_000)])
        await transaction.commit()


def _event(number: int) -> Envelope:
    return Envelope(
        id=new_id(),
        source="shop",
        type="shop.order-placed",
        topic="orders",
        key=str(number % 1_000),
        data=b"x" * 200,
        time=datetime.now(UTC),
    )


_COLUMNS = "id, lane, message_id, source, type, version, topic, key, content_type, headers, body, attempts"
_CLAIM = f"SELECT {_COLUMNS} FROM cqrs_outbox WHERE lane = ANY($1::smallint[]) ORDER BY id LIMIT $2"
_LOCK = "SELECT lane, fence FROM cqrs_outbox_lane WHERE lane = ANY($1::smallint[]) ORDER BY lane FOR UPDATE"
_MANY = """
    INSERT INTO cqrs_outbox
        (lane, message_id, source, type, version, topic, key, content_type, headers, body, written_at)
    SELECT n % 32, n, 'shop', 'shop.order-placed', 1, 'orders', n % 1000, 'application/json',
        '{"time":"2024-01-01T00:00:00+00:00"}', convert_to(repeat('x', 200), 'UTF8'), now()
    FROM generate_series(1, :size) AS n
"""


def _run(arguments: Sequence[str]) -> None:
    if arguments:
        asyncio.run(main(arguments[0]))
        return
    with running(PostgresServer) as server:
        server.create_database("benchmark")
        asyncio.run(main(server.url(database="benchmark")))
        server.drop_database("benchmark")


if __name__ == "__main__":
    _run(sys.argv[1:])
