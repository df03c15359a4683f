"""From a commit to the broker's acknowledgement at low load, and what an idle relay asks of the database."""

import asyncio
import statistics
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine

from cqrs_decor import Envelope, bootstrap
from cqrs_decor.broker import Broker
from cqrs_decor.parts import open_broker, open_store
from tests.benchmarks.figures import Figure, at_most, compared
from tests.benchmarks.orders import TOPIC, PlaceOrder, commanding, commands, database
from tests.services import KafkaServer, PostgresServer, running

COMMANDS = 300
PAUSE_S = 0.03
CLEANED_UP_S = 25
"""By then the first clean-up is over, which has the next one come in five minutes."""
IDLE_S = 60
REPORTED_AFTER_S = 12
"""PostgreSQL's sessions report what they did at the latest after ten idle seconds."""


async def measure(rounds: int) -> Sequence[Figure]:
    with running(PostgresServer) as postgres, running(KafkaServer) as kafka:
        await kafka.create_topic(TOPIC, partitions=12)
        try:
            async with database(postgres) as engine:
                beside = await _latencies(engine, kafka, relay_beside=True)
                apart = await _latencies(engine, kafka, relay_beside=False)
        finally:
            await kafka.delete_topic(TOPIC)  # these servers may go on to serve another run
        # On a server of its own without autovacuum, whose transactions count as well.
        with PostgresServer(options={"autovacuum": "off"}) as own:
            async with database(own) as engine:
                idle = await _idle_transactions(engine, kafka, own)
    figures: list[Figure] = []
    for where, times in (("in the sender's process", beside), ("woken by NOTIFY", apart)):
        cuts = statistics.quantiles(times, n=100)
        figures.append(_figure(f"commit to acknowledgement, relay {where}, p50", cuts[49], 15, "ms"))
        figures.append(_figure(f"commit to acknowledgement, relay {where}, p99", cuts[98], 60, "ms"))
    return [*figures, _figure("transactions of an idle relay in 5 s", idle, 1, "")]


def _figure(what: str, measured: float, budget: float, unit: str) -> Figure:
    return compared(what, [(measured, budget)], other_is="the budget", unit=unit, budget=at_most(1))


class _Noting:
    """The real broker; notes when it had acknowledged which key."""

    def __init__(self, real: Broker) -> None:
        self.acknowledged: dict[str | None, float] = {}
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    async def publish(self, envelopes: Sequence[Envelope]) -> Any:
        outcomes = await self._real.publish(envelopes)
        now = perf_counter()
        self.acknowledged.update((envelope.key, now) for envelope in envelopes)
        return outcomes


async def _latencies(engine: AsyncEngine, kafka: KafkaServer, *, relay_beside: bool) -> list[float]:
    """Milliseconds of each command."""
    noting = _Noting(open_broker(f"kafka://{kafka.bootstrap}", open_store(None)))
    relaying = bootstrap(
        registry=commands, discover=False, database=engine, broker=noting, service="benchmark", run="relay"
    )
    committed: dict[str | None, float] = {}
    async with relaying, commanding(engine) as apart:
        sender = relaying if relay_beside else apart
        await asyncio.sleep(2)
        for _ in range(COMMANDS):
            key = str(await sender.send(PlaceOrder(sku="tea")))
            committed[key] = perf_counter()
            await asyncio.sleep(PAUSE_S)
        await asyncio.sleep(1)
    warm = list(committed.items())[20:]
    return [max(noting.acknowledged[key] - at, 0.0) * 1e3 for key, at in warm]


async def _idle_transactions(engine: AsyncEngine, kafka: KafkaServer, postgres: PostgresServer) -> float:
    """By the server's own count, seen from another database."""
    relaying = bootstrap(
        registry=commands,
        discover=False,
        database=engine,
        broker=f"kafka://{kafka.bootstrap}",
        service="benchmark",
        run="relay",
    )
    looking = await asyncpg.connect(postgres.url(driver=None))
    try:
        async with relaying:
            await asyncio.sleep(CLEANED_UP_S + REPORTED_AFTER_S)
            before = await _transactions(looking, engine)
            await asyncio.sleep(IDLE_S)
            return (await _transactions(looking, engine) - before) * 5 / IDLE_S
    finally:
        await looking.close()


async def _transactions(connection: Any, engine: AsyncEngine) -> int:
    count: int = await connection.fetchval(
        "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = $1", engine.url.database
    )
    return count
