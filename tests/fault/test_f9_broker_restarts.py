"""F9: the broker is killed and started again in the middle of consuming."""

import pytest

from tests.fault.invariants import InvariantBrokenError
from tests.fault.processes import until
from tests.fault.setups import wide
from tests.fault.world import World


@pytest.mark.parametrize("world", ["postgres-kafka", *wide("mariadb-kafka", "sqlite-kafka")], indirect=True)
async def test_a_worker_subscribes_again_after_the_broker_was_restarted(world: World) -> None:
    """A consumer that is connected, and silently no member of its group any more, looks healthy and does nothing."""
    sender = world.start_sending(400)
    running = world.start("all", "--slow", "0.02")
    await world.handles(30)
    await world.watch(running)
    assert await world.unacknowledged() > 0
    await world.kill_broker()
    await world.start_broker()

    await world.handles_more(50)
    await sender.ends_well()
    await world.quiet()

    await world.check()
    world.shows(running, "ConnectionChanged", "connection_lost", part="the broker", up=False)
    world.shows(running, "ConnectionChanged", "connection_back", part="the broker", up=True)


@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-kafka"], indirect=True)
async def test_a_worker_that_acknowledges_what_it_has_only_received_is_found_out(world: World) -> None:
    """What it had in memory when it died with the broker is nowhere any more."""
    sender = world.start_sending(120)
    relay = world.start("relay")
    await sender.ends_well()
    await until(world.all_is_published, "all was published", 30, world.logs)
    victim = world.start("work", "--slow", "0.05", unsafe="acknowledge-first")
    await world.handles(5)
    await world.kill_broker()
    world.kill(victim)
    await world.start_broker()
    world.start("work")
    await world.quiet(limit_s=20)

    with pytest.raises(InvariantBrokenError, match="I1 lost"):
        await world.check()
    assert relay.is_alive
