"""An outbox filled by the database itself, a million rows in seconds, and what arrives of it at the broker."""

import asyncio
from collections.abc import Sequence
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from cqrs_decor.lanes import lane_of
from tests.benchmarks.orders import PAYLOAD

KEYS = 1_000

_FILL = text("""
    INSERT INTO cqrs_outbox
        (lane, message_id, source, type, version, topic, key, content_type, headers, body, written_at)
    SELECT keys.lane, CAST(gen_random_uuid() AS text), 'benchmark', 'benchmark.order-placed', 1, :topic, keys.key,
           'application/json', :headers, convert_to(format(:body, number), 'UTF8'), clock_timestamp()
    FROM generate_series(1, :count) AS number
    JOIN unnest(CAST(:keys AS text[]), CAST(:lanes AS int[])) AS keys (key, lane)
      ON keys.key = CAST(number % :modulus AS text)
    ORDER BY number
""")


async def fill(engine: AsyncEngine, topic: str, count: int) -> None:
    """So many pending records of 1,000 keys, in one transaction."""
    keys = [str(number) for number in range(KEYS)]
    values: dict[str, Any] = {
        "topic": topic,
        "count": count,
        "keys": keys,
        "lanes": [lane_of(topic, key, "") for key in keys],
        "modulus": KEYS,
        "headers": '{"time":"2026-01-01T00:00:00.000000+00:00"}',
        "body": f'{{"order_id":%s,"text":"{PAYLOAD}"}}',
    }
    async with engine.begin() as connection:
        await connection.execute(_FILL, values)


async def arrived(bootstrap: str, topic: str, partitions: int) -> int:
    """How many records the topic has."""
    consumer: Any = AIOKafkaConsumer(bootstrap_servers=bootstrap)
    await consumer.start()
    try:
        places = [TopicPartition(topic, number) for number in range(partitions)]
        ends: dict[TopicPartition, int] = await consumer.end_offsets(places)
        return sum(ends.values())
    finally:
        await consumer.stop()


async def require_order(bootstrap: str, topic: str, expected: int) -> None:
    """Read all that arrived: every record once or again, and per key none for the first time behind a later one."""
    consumer: Any = AIOKafkaConsumer(
        topic, bootstrap_servers=bootstrap, auto_offset_reset="earliest", enable_auto_commit=False
    )
    await consumer.start()
    try:
        highest: dict[bytes, int] = {}
        seen: set[int] = set()
        while len(seen) < expected:
            fetched: dict[TopicPartition, Sequence[Any]] = await consumer.getmany(timeout_ms=10_000)
            if not fetched:
                raise AssertionError(f"{len(seen)} of {expected} records arrived")
            for records in fetched.values():
                for record in records:
                    _note(record, highest, seen)
    finally:
        await consumer.stop()


def _note(record: Any, highest: dict[bytes, int], seen: set[int]) -> None:
    sequence = int(dict(record.headers)["ce_sequence"])
    if sequence in seen:
        return
    if sequence < highest.get(record.key, 0):
        raise AssertionError(f"key {record.key!r}: {sequence} arrived after {highest[record.key]}")
    highest[record.key] = sequence
    seen.add(sequence)


async def table_size(engine: AsyncEngine) -> int:
    """Bytes of the outbox table with its indexes."""
    async with engine.connect() as connection:
        size: int = await connection.scalar(text("SELECT pg_total_relation_size('cqrs_outbox')")) or 0
        return size


async def until_empty(engine: AsyncEngine) -> None:
    while await _pending(engine):
        await asyncio.sleep(0.2)


async def _pending(engine: AsyncEngine) -> bool:
    async with engine.connect() as connection:
        return bool(await connection.scalar(text("SELECT EXISTS (SELECT 1 FROM cqrs_outbox)")))
