"""F10: the broker has a batch, and the relay never hears of it."""

import pytest

from tests.fault.invariants import InvariantBrokenError
from tests.fault.processes import until
from tests.fault.setups import wide
from tests.fault.world import World


@pytest.mark.parametrize("world", ["postgres-kafka", *wide("sqlite-kafka")], indirect=True)
async def test_a_batch_whose_acknowledgement_was_lost_is_repeated_without_a_second_effect(world: World) -> None:
    """Neither "sent" nor "not sent" is known; only to send it again is safe."""
    proxy = world.proxy_to_broker()
    sender = world.start_sending(120)
    relay = world.start("relay")
    await relay.says("published", times=1)
    await sender.ends_well()
    await until(world.all_is_published, "all was published", 30, world.logs)
    world.deal("acknowledgements lost")
    proxy.lose_replies()
    second = world.start_sending(60)
    await second.ends_well()

    async def has_arrived() -> bool:
        return await world.positions.published() > 120

    await until(has_arrived, "the broker had a batch", 20, world.logs)
    assert await world.ledger.pending() > 0, "the relay cannot know, and says it does"
    await relay.notices("ConnectionChanged", part="the broker", up=False)
    proxy.heal()
    world.start("work")
    await world.quiet()

    await world.check()
    world.shows(relay, "ConnectionChanged", "connection_lost", part="the broker", up=False)
    world.shows(relay, "ConnectionChanged", "connection_back", part="the broker", up=True)


@pytest.mark.parametrize("world", ["postgres-kafka"], indirect=True)
async def test_connections_to_the_broker_that_are_cut_under_load_cost_nothing(world: World) -> None:
    """Three times, at moments that the seed chooses, all connections of relay and worker are reset. The driver connects
    again by itself within a request's time, so that there may be nothing to be told of.
    """
    proxy = world.proxy_to_broker()
    sender = world.start_sending(300)
    running = world.start("all")
    for _ in range(3):
        await world.handles_more(world.chance.randint(10, 40))
        assert await world.in_flight() > 0
        world.deal("connections to the broker cut", cuts_off=1)
        assert proxy.cut() > 0
    world.fault_is_over()
    await sender.ends_well()
    await world.quiet()

    await world.check()
    assert running.is_alive


@pytest.mark.long
@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-kafka"], indirect=True)
async def test_without_the_inbox_the_repeats_are_found_to_take_effect_twice(world: World) -> None:
    """The repeat is real: an inbox that remembers nothing lets it through."""
    proxy = world.proxy_to_broker()
    sender = world.start_sending(60)
    relay = world.start("relay")
    await relay.says("published")
    await sender.ends_well()
    await until(world.all_is_published, "all was published", 30, world.logs)
    world.deal("acknowledgements lost")
    proxy.lose_replies()
    second = world.start_sending(60)
    await second.ends_well()

    async def has_arrived() -> bool:
        return await world.positions.published() > 60

    await until(has_arrived, "the broker had a batch", 20, world.logs)
    proxy.cut()
    proxy.heal()
    world.kill(relay)
    world.start("all", unsafe="no-inbox")
    await world.quiet()

    with pytest.raises(InvariantBrokenError, match="I3 doubled"):
        await world.check()
