"""A burst of a million rows: claim time while it waits, and after it is gone with an old snapshot open all the while;
and the size of the table after a second burst, once that snapshot has ended.
"""

import asyncio
import os
import statistics
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from time import perf_counter

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from cqrs_decor.lanes import HeldLane
from cqrs_decor.parts import open_store
from cqrs_decor.store import Store
from tests.benchmarks.backlog import fill, require_order, table_size, until_empty
from tests.benchmarks.figures import Figure, at_most, compared
from tests.benchmarks.orders import TOPIC, database
from tests.benchmarks.scaling import PARTITIONS, running_relays
from tests.services import KafkaServer, PostgresServer, running
from tests.services.fixtures import fresh_name

ROWS = int(os.environ.get("ROWS", "1000000"))
FEW = 1_000


async def measure(rounds: int) -> Sequence[Figure]:
    with running(PostgresServer) as postgres, running(KafkaServer) as kafka:
        async with database(postgres) as engine:
            few = await _claim_of(engine, FEW)
        async with database(postgres) as engine:
            many = await _claim_of(engine, ROWS)
        async with database(postgres) as engine:
            settled, sizes = await _burst_twice(engine, kafka)
    flat = at_most(2)
    return [
        _ratio(f"claim, {ROWS:,} rows pending", many, few, f"{FEW:,} rows pending", "ms", flat),
        _ratio(
            f"claim, {ROWS:,} rows just settled, an old snapshot open",
            settled,
            few,
            f"{FEW:,} rows pending",
            "ms",
            flat,
        ),
        _ratio("table after a second burst", sizes[1] / 1e6, sizes[0] / 1e6, "after the first", "MB", at_most(1.1)),
    ]


async def _claim_of(engine: AsyncEngine, rows: int) -> float:
    topic = f"{TOPIC}.{fresh_name()}"
    await fill(engine, topic, rows)
    return await _claim_ms(engine)


async def _burst_twice(engine: AsyncEngine, kafka: KafkaServer) -> tuple[float, list[int]]:
    """Twice the same burst through a real relay, and nobody helps. What died under a snapshot cannot be used again
    before that has ended: the first burst and 1,000 rows after it come under one, the second when autovacuum has been
    there.
    """
    async with _snapshot(engine):
        topic = await _burst(engine, kafka)
        sizes = [await table_size(engine)]
        await fill(engine, topic, FEW)
        settled = await _claim_ms(engine)
    await _vacuumed(engine)
    await _burst(engine, kafka)
    return settled, [*sizes, await table_size(engine)]


async def _burst(engine: AsyncEngine, kafka: KafkaServer) -> str:
    """Its topic."""
    topic = f"{TOPIC}.{fresh_name()}"
    await kafka.create_topic(topic, partitions=PARTITIONS)
    url = engine.url.render_as_string(hide_password=False)
    async with running_relays(1, url, f"kafka://{kafka.bootstrap}"):
        await fill(engine, topic, ROWS)
        await until_empty(engine)
        await asyncio.sleep(25)  # the relay's own upkeep
    await require_order(kafka.bootstrap, topic, ROWS)
    return topic


async def _vacuumed(engine: AsyncEngine) -> None:
    """Autovacuum looks once a minute by default."""
    query = text("SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'cqrs_outbox'")
    async with asyncio.timeout(300):
        while True:
            async with engine.connect() as connection:
                dead: int = await connection.scalar(query) or 0
            if dead < ROWS // 100:
                return
            await asyncio.sleep(1)


async def _claim_ms(engine: AsyncEngine) -> float:
    store: Store = open_store(engine)
    await store.open()
    try:
        lanes = await _all_lanes(store)
        times: list[float] = []
        for _ in range(21):
            began = perf_counter()
            claimed = await store.outbox.claim(lanes, 500)
            times.append((perf_counter() - began) * 1e3)
            assert len(claimed) == 500
        await store.outbox.release("benchmark", lanes)
        return statistics.median(times)
    finally:
        await store.close()


async def _all_lanes(store: Store) -> list[HeldLane]:
    """Those that a relay is about to hand over come a moment later."""
    lanes: list[HeldLane] = []
    while len(lanes) < store.outbox.lane_count:
        taken = await store.outbox.acquire("benchmark", timedelta(minutes=5), store.outbox.lane_count, in_hand=1)
        lanes += [each.lane for each in taken]
        await asyncio.sleep(0.2)
    return lanes


@asynccontextmanager
async def _snapshot(engine: AsyncEngine) -> AsyncGenerator[None, None]:
    """What a backup or a forgotten session does: vacuum can remove nothing that died since."""
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="REPEATABLE READ")
        await connection.execute(text("SELECT count(*) FROM orders"))
        yield


def _ratio(what: str, ours: float, other: float, other_is: str, unit: str, budget: object) -> Figure:
    return compared(what, [(ours, other)], other_is=other_is, unit=unit, budget=budget)  # type: ignore[arg-type]
