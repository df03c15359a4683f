"""F8: the broker is down while commands go on."""

import pytest

from tests.fault.invariants import InvariantBrokenError
from tests.fault.processes import until
from tests.fault.setups import wide
from tests.fault.world import World


@pytest.mark.parametrize("world", ["postgres-kafka", *wide("mariadb-kafka")], indirect=True)
async def test_commands_go_on_while_the_broker_is_down_and_the_outbox_drains_by_itself(world: World) -> None:
    """That is what an outbox is for: a sale must not wait for the message that tells of it."""
    running = world.start("all")
    first = world.start_sending(60)
    await world.handles(60)
    await first.ends_well()
    await world.watch(running)
    await world.kill_broker()

    second = world.start_sending(200)
    await second.ends_well()
    assert not second.said("failed"), "a command noticed that the broker was away"
    assert await world.ledger.pending() == 200
    await running.notices("ConnectionChanged", part="the broker", up=False)
    await world.start_broker()

    await until(world.all_is_published, "the outbox drained", 60, world.logs)
    await world.quiet()
    await world.check()
    world.shows(running, "ConnectionChanged", "connection_lost", part="the broker", up=False)
    world.shows(running, "ConnectionChanged", "connection_back", part="the broker", up=True)


@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-kafka"], indirect=True)
async def test_a_relay_that_gives_up_while_the_broker_is_down_is_found_out(world: World) -> None:
    """In-memory retries end at some time; what is then dropped is lost."""
    running = world.start("all", unsafe="gives-up")
    first = world.start_sending(20)
    await world.handles(20)
    await first.ends_well()
    await world.kill_broker()
    second = world.start_sending(40)
    await second.ends_well()
    await until(world.all_is_published, "the relay gave up", 60, world.logs)
    await world.start_broker()
    await world.quiet(limit_s=15)

    with pytest.raises(InvariantBrokenError, match="I1 lost"):
        await world.check()
    assert running.is_alive
