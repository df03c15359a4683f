"""F5: the database is killed and started again under load."""

import pytest

from tests.fault.invariants import InvariantBrokenError
from tests.fault.parts import CALM, CALM_LEASE_S
from tests.fault.setups import wide
from tests.fault.world import World


@pytest.mark.parametrize(
    "world", ["postgres-kafka", *wide("postgres-log", "mariadb-log", "bouncer-kafka")], indirect=True
)
async def test_a_database_that_is_killed_and_started_again_needs_no_restart_of_ours(world: World) -> None:
    """Databases are patched and fail over at night: who wakes people up for that is not used for long."""
    sender = world.start_sending(600)
    running = world.start("all")
    await world.handles(30)
    await world.watch(running)
    assert await world.in_flight() > 0
    await world.kill_database()
    await sender.says("failed", times=10)
    await running.notices("ConnectionChanged", up=False)
    await world.start_database()

    await world.handles_more(50)
    await running.notices("ConnectionChanged", up=True)
    await sender.ends_well()
    await world.quiet()

    await world.check()
    world.shows(running, "ConnectionChanged", "connection_lost", up=False)
    world.shows(running, "ConnectionChanged", "connection_back", up=True)
    await world.stop(running)


@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-log"], indirect=True)
async def test_a_relay_that_gives_up_when_the_log_is_away_is_found_out(world: World) -> None:
    """Here the log is in the same database: what was tried once, and taken for done, is gone. It has a batch in hand
    when the database dies, which it is about to publish.
    """
    sender = world.start_sending(300)
    relay = world.start("relay", *CALM, unsafe="gives-up", freeze_at=("relay.claimed", 3))
    world.start("work")
    await relay.freezes()
    await world.kill_database()
    relay.resume()
    await sender.says("failed", times=10)
    await world.start_database()
    await sender.ends_well()
    await world.quiet(limit_s=15)

    with pytest.raises(InvariantBrokenError, match="I1"):
        await world.check(lease_s=CALM_LEASE_S)
