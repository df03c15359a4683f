"""F5: the database is killed and started again under load."""

from pathlib import Path

import pytest

from tests.fault.world import world_of
from tests.services import PostgresServer
from tests.services.fixtures import fresh_name


@pytest.mark.timeout(120)
async def test_a_database_that_is_killed_and_started_again_needs_no_restart_of_ours(tmp_path: Path, seed: int) -> None:
    """Databases are patched and fail over at night: who wakes people up for that is not used for long."""
    with PostgresServer() as server:
        server.create_database("fault")
        async with world_of(server.url(database="fault"), "log", fresh_name(), tmp_path) as world:
            sender = world.start_sending(500, seed=seed)
            running = world.start("all")
            await world.handles(30)
            assert await world.ledger.pending() + await world.unacknowledged() > 0
            server.kill()
            world.cut_off += 1
            await sender.says("failed", times=10)
            server.start()

            handled = len(await world.ledger.effects())
            await world.handles(handled + 50)
            await sender.ends_well()
            await world.quiet()

            await world.check()
            running.terminate()
            await running.ends_well()
