"""Works off the topic once and prints how many messages it did in a second: `working_process.py KIND DATABASE_URL
BROKERS`; the kind is single, optimistic or by-hand.
"""

import asyncio
import sys
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import orjson
from aiokafka import AIOKafkaConsumer, TopicPartition
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from cqrs_decor import Registry, bootstrap
from tests.benchmarks.orders import TOPIC, Effect, consumers, optimistic, sessions
from tests.services.fixtures import fresh_name

MESSAGES = 4_000


async def main(kind: str, database: str, brokers: str) -> None:
    engine = create_async_engine(database, pool_size=20)
    try:
        match kind:
            case "single":
                print(await _ours(engine, brokers, consumers))
            case "optimistic":
                print(await _ours(engine, brokers, optimistic))
            case _:
                print(await _by_hand(engine, brokers))
    finally:
        await engine.dispose()


async def _ours(engine: AsyncEngine, brokers: str, registry: Registry) -> float:
    app = bootstrap(
        registry=registry,
        discover=False,
        database=engine,
        broker=f"kafka://{brokers}",
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


async def _by_hand(engine: AsyncEngine, brokers: str) -> float:
    """What one would write: one transaction per message, sixteen keys at a time, commit the offsets of what is done."""
    group = f"hand-{fresh_name()}"
    consumer: Any = AIOKafkaConsumer(
        TOPIC,
        bootstrap_servers=brokers,
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


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4]))
