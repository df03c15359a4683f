"""Three poisoned keys among a hundred: one whose handler raises, one that cannot be decoded, one that kills the worker.
Once their messages are parked, the healthy keys go on as if they were not there.
"""

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from time import perf_counter

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from cqrs_decor import Envelope
from cqrs_decor.clock import SystemClock
from cqrs_decor.parts import open_broker, open_store
from tests.benchmarks.figures import Figure, at_least, compared
from tests.benchmarks.orders import TOPIC, database
from tests.services import KafkaServer, PostgresServer, running
from tests.services.fixtures import fresh_name

KEYS = 100
EACH = 60
POISON = {0: '{"order_id":0,"text":"raise"}', 1: "{", 2: '{"order_id":2000,"text":"kill"}'}


async def measure(rounds: int) -> Sequence[Figure]:
    pairs: list[tuple[float, float]] = []
    with running(PostgresServer) as postgres, running(KafkaServer) as kafka:
        for _ in range(max(3, rounds // 2)):
            async with database(postgres) as engine:
                poisoned = await _healthy_rate(engine, kafka, POISON)
            async with database(postgres) as engine:
                pairs.append((poisoned, await _healthy_rate(engine, kafka, {})))
    return [
        compared(
            "healthy keys beside three poisoned ones",
            pairs,
            other_is="without poison",
            unit="messages/s",
            budget=at_least(0.98),
        )
    ]


async def _healthy_rate(engine: AsyncEngine, kafka: KafkaServer, poison: dict[int, str]) -> float:
    """Messages per second of the healthy keys, once what is poisoned has been parked."""
    topic = f"{TOPIC}.{fresh_name()}"
    await kafka.create_topic(topic, partitions=12)
    first = [replace(_envelope(topic, key, 0), data=body.encode()) for key, body in poison.items()]
    later = [_envelope(topic, key, number) for number in range(1, EACH + 1) for key in range(KEYS)]
    url = engine.url.render_as_string(hide_password=False)
    async with _kept_running(url, f"kafka://{kafka.bootstrap}", topic):
        await _publish(kafka, first)
        while await _count(engine, "SELECT count(*) FROM cqrs_inbox_parked") < len(poison):
            await asyncio.sleep(0.1)
        await _publish(kafka, later)
        return await _rate(engine)


async def _rate(engine: AsyncEngine) -> float:
    healthy, effects = (KEYS - len(POISON)) * EACH, "SELECT count(*) FROM effects WHERE order_id / 1000 > 2"
    while not (done := await _count(engine, effects)):
        await asyncio.sleep(0.005)
    began, first = perf_counter(), done
    while await _count(engine, effects) < healthy:
        await asyncio.sleep(0.02)
    return (healthy - first) / (perf_counter() - began)


def _envelope(topic: str, key: int, number: int) -> Envelope:
    return Envelope(
        id=fresh_name(),
        source="benchmark",
        type="benchmark.order-placed",
        topic=topic,
        key=str(key),
        time=SystemClock().now(),
        data=f'{{"order_id":{key * 1000 + number},"text":"tea"}}'.encode(),
    )


async def _publish(kafka: KafkaServer, envelopes: Sequence[Envelope]) -> None:
    broker = open_broker(f"kafka://{kafka.bootstrap}", open_store(None))
    await broker.open()
    for start in range(0, len(envelopes), 500):
        outcomes = await broker.publish(envelopes[start : start + 500])
        assert not any(outcomes)
    await broker.close()


@asynccontextmanager
async def _kept_running(*arguments: str) -> AsyncGenerator[None, None]:
    """A worker that is started again when it dies."""
    command = [sys.executable, "-m", "tests.benchmarks.poison_process", *arguments]
    process = subprocess.Popen(command)

    async def keep() -> None:
        nonlocal process
        while True:
            await asyncio.sleep(0.2)
            if process.poll() is not None:
                process = subprocess.Popen(command)

    keeping = asyncio.create_task(keep())
    try:
        yield
    finally:
        keeping.cancel()
        process.kill()
        process.wait()


async def _count(engine: AsyncEngine, query: str) -> int:
    async with engine.connect() as connection:
        return await connection.scalar(text(query)) or 0
