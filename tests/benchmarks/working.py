"""A worker from Kafka to PostgreSQL, inbox row and one insert per message, against the same loop written by hand: a
transaction per message, and optimistic batches.
"""

import asyncio
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import orjson
from aiokafka import AIOKafkaConsumer, TopicPartition
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from cqrs_decor import Registry, bootstrap
from cqrs_decor.parts import open_broker, open_store
from tests.benchmarks.figures import Figure, at_least, compared
from tests.benchmarks.orders import TOPIC, Effect, consumers, database, optimistic, sessions
from tests.benchmarks.relaying import envelope_of
from tests.services import KafkaServer, PostgresServer, running
from tests.services.fixtures import fresh_name

MESSAGES = 4_000


async def measure(rounds: int) -> Sequence[Figure]:
    with running(PostgresServer) as postgres, running(KafkaServer) as kafka:
        await kafka.create_topic(TOPIC, partitions=12)
        await _publish(kafka)
        async with database(postgres) as engine:
            rates = [await _round(engine, kafka) for _ in range(max(3, rounds // 2))]
    return [
        compared(
            "worker Kafka -> handler, inbox on PostgreSQL",
            [(single, by_hand) for single, _, by_hand in rates],
            other_is="the loop by hand",
            unit="messages/s",
            budget=at_least(0.85),
        ),
        compared(
            "the same in optimistic batches",
            [(batches, by_hand) for _, batches, by_hand in rates],
            other_is="the loop by hand",
            unit="messages/s",
            budget=at_least(2),
        ),
    ]


async def _round(engine: AsyncEngine, kafka: KafkaServer) -> tuple[float, float, float]:
    return await _ours(engine, kafka, consumers), await _ours(engine, kafka, optimistic), await _by_hand(engine, kafka)


async def _publish(kafka: KafkaServer) -> None:
    broker = open_broker(f"kafka://{kafka.bootstrap}", open_store(None))
    await broker.open()
    for start in range(0, MESSAGES, 500):
        await broker.publish([envelope_of(number, TOPIC) for number in range(start, start + 500)])
    await broker.close()


async def _ours(engine: AsyncEngine, kafka: KafkaServer, registry: Registry) -> float:
    app = bootstrap(
        registry=registry,
        discover=False,
        database=engine,
        broker=f"kafka://{kafka.bootstrap}",
        service=f"ours-{fresh_name()}",
        run="none",
    )
    async with app:
        await app.run_loops("worker")
        worker = app.worker
        assert worker is not None
        while not worker.handled:
            await asyncio.sleep(0.001)
        first, began = worker.handled, perf_counter()
        while worker.handled < MESSAGES:
            await asyncio.sleep(0.005)
        return (MESSAGES - first) / (perf_counter() - began)


async def _by_hand(engine: AsyncEngine, kafka: KafkaServer) -> float:
    """What one would write: one transaction per message, sixteen keys at a time, commit the offsets of what is done."""
    group = f"hand-{fresh_name()}"
    consumer: Any = AIOKafkaConsumer(
        TOPIC,
        bootstrap_servers=kafka.bootstrap,
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
    )
    await consumer.start()
    make, done, began = sessions(engine), 0, 0.0
    places = asyncio.Semaphore(16)
    try:
        while done < MESSAGES:
            fetched: dict[TopicPartition, list[Any]] = await consumer.getmany(timeout_ms=1_000, max_records=1_000)
            began = began or perf_counter()
            by_key: dict[bytes, list[Any]] = {}
            for records in fetched.values():
                for record in records:
                    by_key.setdefault(record.key, []).append(record)
            await asyncio.gather(*(_in_turn(make, group, records, places) for records in by_key.values()))
            done += sum(map(len, fetched.values()))
            await consumer.commit({where: records[-1].offset + 1 for where, records in fetched.items()})
        return MESSAGES / (perf_counter() - began)
    finally:
        await consumer.stop()


async def _in_turn(make: Any, group: str, records: Sequence[Any], places: asyncio.Semaphore) -> None:
    for record in records:
        async with places:
            await _handle(make, group, record)


_SEEN = text(
    "INSERT INTO benchmark_inbox (consumer, source, message_id) VALUES (:consumer, :source, :id) ON CONFLICT DO NOTHING"
)


async def _handle(make: Any, group: str, record: Any) -> None:
    headers = {name: value.decode() for name, value in record.headers}
    event = orjson.loads(record.value)
    async with make() as session, session.begin():
        seen = await session.execute(_SEEN, {"consumer": group, "source": headers["ce_source"], "id": headers["ce_id"]})
        if seen.rowcount:
            session.add(Effect(order_id=event["order_id"]))
