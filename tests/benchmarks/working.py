"""A worker from Kafka to PostgreSQL, inbox row and one insert per message, against the same loop written by hand: a
transaction per message, and optimistic batches. Each in a process of its own, as it would be: in one that has run
others before, the garbage collector has more to walk through.
"""

import asyncio
import sys
from collections.abc import Sequence

from sqlalchemy.ext.asyncio import AsyncEngine

from cqrs_decor.parts import open_broker, open_store
from tests.benchmarks.figures import Figure, at_least, compared
from tests.benchmarks.orders import TOPIC, database
from tests.benchmarks.relaying import envelope_of
from tests.benchmarks.working_process import MESSAGES
from tests.services import KafkaServer, PostgresServer, running

_KINDS = ("single", "optimistic", "by-hand")


async def measure(rounds: int) -> Sequence[Figure]:
    with running(PostgresServer) as postgres, running(KafkaServer) as kafka:
        await kafka.create_topic(TOPIC, partitions=12)
        try:
            await _publish(kafka)
            async with database(postgres) as engine:
                rates = [[await _rate(kind, engine, kafka) for kind in _KINDS] for _ in range(max(3, rounds // 2))]
        finally:
            await kafka.delete_topic(TOPIC)  # these servers may go on to serve another run
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


async def _publish(kafka: KafkaServer) -> None:
    broker = open_broker(f"kafka://{kafka.bootstrap}", open_store(None))
    await broker.open()
    for start in range(0, MESSAGES, 500):
        await broker.publish([envelope_of(number, TOPIC) for number in range(start, start + 500)])
    await broker.close()


async def _rate(kind: str, engine: AsyncEngine, kafka: KafkaServer) -> float:
    url = engine.url.render_as_string(hide_password=False)
    command = [sys.executable, "-m", "tests.benchmarks.working_process", kind, url, kafka.bootstrap]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    said, _ = await process.communicate()
    assert process.returncode == 0, f"{kind} ended with {process.returncode}"
    return float(said)
