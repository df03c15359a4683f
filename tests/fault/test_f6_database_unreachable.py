"""F6: the database cannot be reached for a while, in each of the ways in which a network fails, and comes back."""

import anyio
import pytest

from tests.fault.invariants import InvariantBrokenError
from tests.fault.setups import LASTS_S, wide
from tests.fault.world import World

BACKED_OFF_S = 2.0
"""Waits between two tries double from a tenth of a second to a second."""

TRIES_A_SECOND = 1.5
"""One of all the loops and messages of a process that wait, and now and then one to listen for wake-ups again."""

PARTS = 4
"""That say that they are cut off: outbox, wake-ups, inbox, and what is cleaned up."""

PARTS_WITH_LOG = PARTS + 2
"""Where the log is in the same database, those who publish to it and read from it say so as well."""


@pytest.mark.parametrize("world", ["postgres-kafka", "postgres-log", *wide("mariadb-log")], indirect=True)
async def test_a_database_that_is_away_for_a_while_is_asked_once_a_second_and_then_used_again(world: World) -> None:
    """Tens of processes that all ask as fast as they can are the second outage, when the first one is over.

    Commands reach the database and go on; relay and worker do not. Health says so: this process gets no more traffic.
    """
    proxy = world.proxy_to_database()
    running = world.start("all", "--health")
    world.reach_directly()
    sender = world.start_sending(600, pause_s=0.01)
    await world.handles(30)
    await world.watch(running)
    assert (await running.asks_ready())["status"] == "ready"
    await world.has_work_in_hand()
    world.deal("database unreachable", cuts_off=2)
    proxy.turn_away()
    await running.notices("ConnectionChanged", up=False)
    await anyio.sleep(BACKED_OFF_S)
    tried = proxy.tries()
    await anyio.sleep(LASTS_S)
    tries_a_second = (proxy.tries() - tried) / LASTS_S
    degraded = await running.asks_ready()
    proxy.heal()
    world.fault_is_over()

    await world.handles_more(30)
    await sender.ends_well()
    await world.quiet()

    await world.check()
    assert 0 < tries_a_second <= TRIES_A_SECOND, f"{tries_a_second:.1f} tries a second"
    assert degraded["status"] == "degraded"
    assert "the outbox is away" in degraded["reasons"]
    parts = PARTS_WITH_LOG if world.setup.kafka is None else PARTS
    assert len(running.moments("ConnectionChanged", up=False)) <= parts, "an outage is said once by each, not each try"
    world.shows(running, "ConnectionChanged", "connection_lost", up=False)
    world.shows(running, "ConnectionChanged", "connection_back", up=True)


@pytest.mark.parametrize("world", ["postgres-log"], indirect=True)
@pytest.mark.parametrize("way", ["half_open", *wide("stall", "lose_replies", "cut")])
async def test_a_database_that_falls_silent_is_given_up_and_found_again(world: World, way: str) -> None:
    """A firewall that forgets a connection sends no error: only a limit of one's own ends the wait."""
    proxy = world.proxy_to_database()
    sender = world.start_sending(200, tasks=2)
    running = world.start("all")
    await world.handles(20)
    assert await world.in_flight() > 0
    world.deal(f"database: {way}", cuts_off=2)
    getattr(proxy, way)()
    await anyio.sleep(LASTS_S)
    proxy.heal()
    world.fault_is_over()
    later = world.start_sending(60)

    await world.handles_more(20)
    await sender.ends_well()
    await later.ends_well()
    await world.quiet()

    await world.check()
    world.shows(running, "ConnectionChanged", "connection_lost", up=False)
    world.shows(running, "ConnectionChanged", "connection_back", up=True)


@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-log"], indirect=True)
async def test_a_relay_that_takes_a_broken_connection_for_a_delivery_is_found_out(world: World) -> None:
    """Here the log is behind the same connection: what was tried once, and taken for done, is gone."""
    proxy = world.proxy_to_database()
    sender = world.start_sending(200)
    await sender.ends_well()
    relay = world.start("relay", unsafe="gives-up", freeze_at=("relay.claimed", 3))
    await relay.freezes()
    world.deal("connections cut")
    proxy.refuse()
    relay.resume()
    await anyio.sleep(1)
    proxy.heal()
    world.start("work")
    await world.quiet(limit_s=20)

    with pytest.raises(InvariantBrokenError, match="I1 lost"):
        await world.check()
