"""One, two and four relay processes on the same outbox: more of them must not be slower."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from time import perf_counter

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.benchmarks.backlog import arrived, fill, require_order, until_empty
from tests.benchmarks.figures import Figure, at_least, compared
from tests.benchmarks.orders import TOPIC, database
from tests.services import KafkaServer, PostgresServer, running
from tests.services.fixtures import fresh_name

RECORDS = 150_000
PARTITIONS = 12

_HOLDERS = text("SELECT count(DISTINCT owner) FROM cqrs_outbox_lane WHERE owner IS NOT NULL")


async def measure(rounds: int) -> Sequence[Figure]:
    rates: dict[int, list[float]] = {1: [], 2: [], 4: []}
    with running(PostgresServer) as postgres, running(KafkaServer) as kafka:
        for _ in range(max(2, rounds // 3)):
            for relays, measured in rates.items():
                async with database(postgres) as engine:
                    measured.append(await _rate(engine, kafka, relays))
    return [
        compared(
            f"{relays} relays on one outbox",
            list(zip(rates[relays], rates[1], strict=True)),
            other_is="one relay",
            unit="records/s",
            budget=at_least(0.9),
        )
        for relays in (2, 4)
    ]


async def _rate(engine: AsyncEngine, kafka: KafkaServer, relays: int) -> float:
    """From the moment when all of them hold lanes."""
    topic = f"{TOPIC}.{fresh_name()}"
    await kafka.create_topic(topic, partitions=PARTITIONS)
    url = engine.url.render_as_string(hide_password=False)
    async with running_relays(relays, url, f"kafka://{kafka.bootstrap}"):
        while await _holders(engine) < relays:
            await asyncio.sleep(0.1)
        await asyncio.sleep(2)  # until their shares are even
        began = perf_counter()
        await fill(engine, topic, RECORDS)
        filled = perf_counter()
        await until_empty(engine)
        seconds = perf_counter() - filled
    assert await arrived(kafka.bootstrap, topic, PARTITIONS) >= RECORDS, f"{filled - began:.1f} s to fill"
    await require_order(kafka.bootstrap, topic, RECORDS)
    return RECORDS / seconds


@asynccontextmanager
async def running_relays(count: int, *arguments: str) -> AsyncGenerator[None, None]:
    command = [sys.executable, "-m", "tests.benchmarks.relay_process", *arguments]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


async def _holders(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        holders: int = await connection.scalar(_HOLDERS) or 0
        return holders
