"""F27: PgBouncer in transaction mode between us and PostgreSQL, drivers set up as the docs say.

The main scenarios of F1 to F3 and F5 run through it as well (`bouncer-kafka`).
"""

import pytest
from anyio import to_thread

from tests.fault.setups import wide
from tests.fault.world import World

SETUPS = ["bouncer-kafka", *wide("asyncpgbouncer-log", "bouncer-log", "asyncpgbouncer-kafka")]


@pytest.mark.parametrize("world", SETUPS, indirect=True)
async def test_kills_behind_a_pooler_cost_nothing(world: World) -> None:
    """Leases are rows, so they outlive the session that took them, whichever that was."""
    sender = world.start_sending(240)
    for part in (20, 60):
        victim = world.start("all")
        await world.handles(part)
        assert await world.in_flight() > 0
        world.kill(victim)

    successor = world.start("all")
    await sender.ends_well()
    await world.quiet()

    await world.check()
    world.shows(successor, "CrashSuspected", "crash_suspected")
    assert len(await world.ledger.committed()) == 240


@pytest.mark.parametrize("world", ["bouncer-kafka", *wide("asyncpgbouncer-log")], indirect=True)
async def test_a_pooler_that_is_killed_and_started_again_needs_no_restart_of_ours(world: World) -> None:
    """A pooler is updated more often than a database."""
    pooler = world.setup.pooler
    assert pooler is not None
    sender = world.start_sending(400)
    running = world.start("all")
    await world.handles(30)
    assert await world.in_flight() > 0
    world.deal("kill pooler", cuts_off=2)
    await to_thread.run_sync(pooler.kill)
    await running.notices("ConnectionChanged", up=False)
    await to_thread.run_sync(pooler.start)
    world.fault_is_over()

    await world.handles_more(50)
    await sender.ends_well()
    await world.quiet()

    await world.check()
    world.shows(running, "ConnectionChanged", "connection_lost", up=False)
    world.shows(running, "ConnectionChanged", "connection_back", up=True)


@pytest.mark.parametrize("world", ["bouncer-kafka"], indirect=True)
async def test_wake_ups_that_do_not_work_are_found_by_a_probe(world: World) -> None:
    """Behind a pooler LISTEN succeeds and never hears anything: silence must not be taken for "no work"."""
    running = world.start("all")
    sender = world.start_sending(60, pause_s=0.01)
    await running.notices("WakeUpChanged", works=False)
    await sender.ends_well()
    await world.quiet()

    await world.check()
    world.shows(running, "WakeUpChanged", "wake_ups_degraded", works=False)


@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["asyncpgbouncer-log"], indirect=True)
async def test_a_driver_that_is_not_set_up_for_a_pooler_is_found_out(world: World) -> None:
    """Its prepared statements are on other server connections than it thinks."""
    senders = [world.start_sending(200, "--no-pooler") for _ in range(2)]

    endings = [await sender.ends() for sender in senders]

    assert any(endings), "prepared statements survived a pooler: this run proves nothing"
