"""F11: the relay loses its database, while the broker is still there."""

import pytest

from tests.fault.invariants import InvariantBrokenError
from tests.fault.setups import wide
from tests.fault.world import World


@pytest.mark.parametrize("world", ["postgres-kafka", *wide("mariadb-kafka")], indirect=True)
async def test_a_relay_that_has_lost_its_database_falls_silent_before_another_begins(world: World) -> None:
    """It could publish on and on: what it has in hand is in nobody else's way only until its leases have ended."""
    sender = world.start_sending(300, tasks=2, pause_s=0.01)
    world.start("work")
    proxy = world.proxy_to_database()
    cut_off = world.start("relay")
    world.reach_directly()
    await cut_off.says("published", times=2)
    assert await world.ledger.pending() > 0
    world.deal("the relay's database cut", cuts_off=1)
    proxy.half_open()
    await cut_off.notices("ConnectionChanged", up=False)
    published = len(cut_off.said("published"))
    successor = world.start("relay")
    await successor.says("published", times=2)

    proxy.heal()
    world.fault_is_over()
    await sender.ends_well()
    await world.quiet()

    await world.check()
    world.shows(cut_off, "ConnectionChanged", "connection_lost", up=False)
    world.shows(successor, "CrashSuspected", "crash_suspected", part="relay")
    assert len(cut_off.said("published")) <= published + 2, "it settled what was another's"


@pytest.mark.long
@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-log"], indirect=True)
async def test_two_relays_that_know_no_fences_are_found_to_repeat_each_other(world: World) -> None:
    """Each believes that the lanes are its own, and nobody tells it otherwise."""
    for relay in [world.start("relay", unsafe="no-fences") for _ in range(2)]:
        await relay.notices("LanesChanged", held=32)
    sender = world.start_sending(400)
    world.start("work")
    await sender.ends_well()
    await world.quiet()

    with pytest.raises(InvariantBrokenError, match=r"I4|I5"):
        await world.check()
