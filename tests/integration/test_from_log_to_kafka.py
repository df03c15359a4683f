"""The way from the log table to Kafka, as docs/howto/from-log-to-kafka.md has it, with commands flowing throughout."""

from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import pytest
from sqlalchemy import BigInteger, Column, Identity, Integer, MetaData, String, Table, insert, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from cqrs_decor import App, Command, MessageContext, NotificationEvent, Registry, Settings, bootstrap, emit
from cqrs_decor.broker import TopicPlan
from cqrs_decor_kafka import KafkaBroker
from cqrs_decor_sqlalchemy import LogTableBroker, SqlAlchemyStore
from tests.services.fixtures import fresh_name

pytestmark = [pytest.mark.feature("B14"), pytest.mark.service("postgres"), pytest.mark.service("kafka")]

CUSTOMERS = 8
PATIENCE_S = 90.0

shop = MetaData()
orders = Table(
    "shop_order",
    shop,
    Column("customer", String(20), primary_key=True),
    Column("number", Integer, primary_key=True),
)
arrivals = Table(
    "shop_arrival",
    shop,
    Column("place", BigInteger, Identity(), primary_key=True),
    Column("customer", String(20), nullable=False),
    Column("number", Integer, nullable=False),
    Column("message_id", String(60), nullable=False),
)


@dataclass(frozen=True, slots=True)
class Way:
    """One database, a topic that exists nowhere yet, and apps of one service on either broker."""

    database: str
    kafka: str
    topic: str
    registry: Registry
    place_order: type[Any]

    def app(self, run: str, *, broker: str | None = None) -> App:
        return bootstrap(
            registry=[self.registry],
            discover=False,
            run=run,  # type: ignore[arg-type]
            service=f"shop-{self.topic}",
            database=self.database,
            broker=broker,
            settings=Settings(lease_s=3, poll_interval_s=0.1),
        )


@pytest.fixture
async def way(postgres_url: str, kafka_bootstrap: str) -> Way:
    topic = fresh_name()
    registry, place_order = _handlers(topic)
    store = SqlAlchemyStore.from_url(postgres_url)
    await store.schema.upgrade()
    async with store.database.engine.begin() as connection:
        await connection.run_sync(shop.create_all)
    await store.close()
    kafka = f"kafka://{kafka_bootstrap}?topic_partitions=4&session_timeout_s=6&heartbeat_interval_s=0.5"
    return Way(database=postgres_url, kafka=kafka, topic=topic, registry=registry, place_order=place_order)


async def test_nothing_is_lost_or_reordered_on_the_way_to_kafka(way: Way) -> None:
    """A service outgrows its database as broker, and its customers must not notice."""
    async with way.app("none") as web, placing_orders(web, way) as placed:
        async with way.app("all"):
            await until(lambda: arrived_at_least(way, 100))

        at_the_stop = sum(placed.values())
        async with way.app("worker"):  # the relay is stopped: the outbox grows, the log only shrinks
            await until(lambda: everything_acknowledged(way))
        drained = await arrived(way)
        await until(lambda: more_than(placed, at_the_stop + 50))

        await create_topic(way)
        async with way.app("all", broker=way.kafka):
            await until(lambda: arrived_at_least(way, len(drained) + 100))
            placed.stop()
            await until(lambda: arrived_at_least(way, sum(placed.values())))
            after = await arrived(way)

    assert await committed(way) == {(c, n) for c, count in placed.items() for n in range(count)}
    assert numbers_by_customer(after) == {c: list(range(count)) for c, count in placed.items()}
    assert len({message_id for _, _, message_id in after}) == len(after)
    assert 0 < len(drained) < len(after), "the orders before went through the log, those after through Kafka"


async def test_switching_without_draining_first_breaks_the_order(way: Way) -> None:
    """The control: were it not for the second step, what is left in the log would come after what is in Kafka."""
    async with way.app("none") as web, way.app("relay"):
        await web.send(way.place_order(customer="early", number=0))
        await until(lambda: nothing_pending(way))
    await create_topic(way)
    async with way.app("none") as web:
        await web.send(way.place_order(customer="early", number=1))
    async with way.app("all", broker=way.kafka):
        await until(lambda: arrived_at_least(way, 1))
    async with way.app("worker"):
        await until(lambda: arrived_at_least(way, 2))

    assert numbers_by_customer(await arrived(way)) == {"early": [1, 0]}


def _handlers(topic: str) -> tuple[Registry, type[Any]]:
    """Of a topic of this test's own: the shared server keeps what other tests have published."""
    registry = Registry(f"shop on {topic}")

    class PlaceOrder(Command[None]):
        customer: str
        number: int

    class OrderPlaced(NotificationEvent, topic=topic, key="customer", name=f"{topic}.order-placed"):
        customer: str
        number: int

    @registry.command_handler
    async def place_order(command: PlaceOrder, session: AsyncSession) -> None:
        await session.execute(insert(orders).values(customer=command.customer, number=command.number))
        emit(OrderPlaced(customer=command.customer, number=command.number))

    @registry.event_handler
    async def note_arrival(event: OrderPlaced, session: AsyncSession, context: MessageContext) -> None:
        row = {"customer": event.customer, "number": event.number, "message_id": context.id}
        await session.execute(insert(arrivals).values(row))

    return registry, PlaceOrder


class Placed(defaultdict[str, int]):
    """How many orders of each customer are committed."""

    def __init__(self) -> None:
        super().__init__(int)
        self.stopped = False

    def stop(self) -> None:
        self.stopped = True


@asynccontextmanager
async def placing_orders(web: App, way: Way) -> AsyncGenerator[Placed]:
    """Customers place orders side by side, each one after the other, until told to stop."""
    placed = Placed()

    async def place(customer: str) -> None:
        while not placed.stopped:
            await web.send(way.place_order(customer=customer, number=placed[customer]))
            placed[customer] += 1
            await anyio.sleep(0.02)

    async with anyio.create_task_group() as tasks:
        for n in range(CUSTOMERS):
            tasks.start_soon(place, f"customer-{n}")
        yield placed
        placed.stop()


async def create_topic(way: Way) -> None:
    broker = KafkaBroker.from_url(way.kafka)
    await broker.open()
    await broker.create_topics([TopicPlan(name=way.topic)])
    await broker.close()


async def everything_acknowledged(way: Way) -> bool:
    """What `doctor` says about the log."""
    broker = LogTableBroker.from_url(way.database)
    [_, *groups] = await broker.check([TopicPlan(name=way.topic)])
    await broker.close()
    assert len(groups) == 1
    return "has acknowledged everything" in groups[0].problem


async def nothing_pending(way: Way) -> bool:
    store = SqlAlchemyStore.from_url(way.database)
    backlog = await store.outbox.backlog()
    await store.close()
    return backlog.pending == 0


async def more_than(placed: Placed, count: int) -> bool:
    return sum(placed.values()) > count


async def arrived_at_least(way: Way, count: int) -> bool:
    return len(await arrived(way)) >= count


async def arrived(way: Way) -> list[tuple[str, int, str]]:
    rows = await _rows(way, select(arrivals.c.customer, arrivals.c.number, arrivals.c.message_id).order_by("place"))
    return [(row.customer, row.number, row.message_id) for row in rows]


async def committed(way: Way) -> set[tuple[str, int]]:
    return {(row.customer, row.number) for row in await _rows(way, select(orders))}


async def _rows(way: Way, query: Any) -> list[Any]:
    engine = create_async_engine(way.database)
    async with engine.connect() as connection:
        rows = (await connection.execute(query)).all()
    await engine.dispose()
    return list(rows)


def numbers_by_customer(rows: list[tuple[str, int, str]]) -> dict[str, list[int]]:
    numbers: dict[str, list[int]] = defaultdict(list)
    for customer, number, _ in rows:
        numbers[customer].append(number)
    return dict(numbers)


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    with anyio.fail_after(PATIENCE_S):
        while not await holds():  # noqa: ASYNC110 - other apps bring it about
            await anyio.sleep(0.1)
