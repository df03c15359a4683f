"""F29: a burst of very many rows, then quiet, then another, with an old snapshot open all the while.

Claim times are measured by the benchmark of a million rows; here nothing is timed.
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from tests.fault.processes import Victim, until
from tests.fault.setups import WIDE, wide
from tests.fault.world import World

ROWS = 50_000 if WIDE else 8_000

KEPT, GROWN = 1.15, 1.85
"""A table that has kept its rows has twice the size; one that uses the room again keeps its size, but for an index
page here and there.
"""


@pytest.mark.parametrize("world", ["postgres-kafka", *wide("postgres-log")], indirect=True)
async def test_a_second_burst_does_not_grow_the_table(world: World) -> None:
    """A backup holds a snapshot for hours. What is emptied meanwhile is not reused: one burst's worth."""
    relay = await _relay_with_a_template(world)
    async with _old_snapshot(world):
        await _burst(world)
    first = await world.ledger.value(_SIZE)
    await _older_snapshots_are_gone(world)
    await world.ledger.vacuum("cqrs_outbox")
    await _burst(world)

    assert await world.ledger.value(_SIZE) < first * KEPT
    assert 0 <= await world.positions.published() - (1 + 2 * ROWS) <= world.called_away()
    assert relay.is_alive


@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-kafka"], indirect=True)
async def test_under_a_snapshot_that_stays_open_the_table_is_found_to_grow(world: World) -> None:
    """Nothing can be reused then: that is what the size must show."""
    await _relay_with_a_template(world)
    async with _old_snapshot(world):
        await _burst(world)
        first = await world.ledger.value(_SIZE)
        await world.ledger.vacuum("cqrs_outbox")
        await _burst(world)

    assert await world.ledger.value(_SIZE) > first * GROWN


async def _relay_with_a_template(world: World) -> Victim:
    """A relay, and a record from which bursts are made."""
    sender = world.start_sending(1)
    await sender.ends_well()
    await world.ledger.run(_TEMPLATE)
    relay = world.start("relay", "--set", '{"relay_batch": 500}')
    await until(world.all_is_published, "the first one was published", 30, world.logs)
    return relay


@asynccontextmanager
async def _old_snapshot(world: World) -> AsyncGenerator[None]:
    engine = create_async_engine(world.setup.database, isolation_level="REPEATABLE READ")
    async with engine.connect() as old:
        await old.execute(text("SELECT count(*) FROM cqrs_outbox"))
        yield
    await engine.dispose()


async def _older_snapshots_are_gone(world: World) -> None:
    """Wait until nobody sees what is dead by now. Somebody may for a moment: autovacuum, when it analyses any table."""
    now = await world.ledger.value(_NEXT_TRANSACTION)

    async def gone() -> bool:
        return await world.ledger.value(_OLDER_SNAPSHOTS.format(now=now)) == 0

    await until(gone, "older snapshots were gone", 30, world.logs)


async def _burst(world: World) -> None:
    await world.ledger.run(_ROWS.format(rows=ROWS))
    await until(world.all_is_published, "the burst was published", 120, world.logs)


_SIZE = "SELECT pg_total_relation_size('cqrs_outbox')"

_NEXT_TRANSACTION = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint % (1::bigint << 32)"

_OLDER_SNAPSHOTS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND greatest(age(backend_xmin), age(backend_xid)) > age('{now}'::xid)
"""

_TEMPLATE = "CREATE TABLE template AS SELECT * FROM cqrs_outbox LIMIT 1"

_ROWS = """
INSERT INTO cqrs_outbox (lane, message_id, source, type, version, topic, content_type, headers, body, written_at)
SELECT number % 32, gen_random_uuid()::text, source, type, version, topic, content_type, headers, body, written_at
FROM template, generate_series(1, {rows}) AS number
"""
