"""F25: members join the consumer group and leave it, all the time."""

import pytest

from tests.fault.invariants import InvariantBrokenError
from tests.fault.processes import until
from tests.fault.setups import WIDE, wide
from tests.fault.world import World

ROUNDS = 12 if WIDE else 3


@pytest.mark.parametrize("world", ["postgres-kafka", *wide("postgres-log", "mariadb-log")], indirect=True)
async def test_a_group_that_is_never_at_rest_loses_nothing_and_acknowledges_nothing_early(world: World) -> None:
    """Autoscaling, deploys and flapping nodes: partitions go from one to the other with work in hand."""
    sender = world.start_sending(100 * ROUNDS, pause_s=0.03)
    world.start("relay")
    world.start("work", "--slow", "0.01")
    for _ in range(ROUNDS):
        guest = world.start("work", "--slow", "0.01")
        await guest.says("started")
        await world.handles_more(20)
        assert await world.in_flight() > 0
        await _nothing_is_acknowledged_early(world)
        if world.chance.random() < 0.5:
            world.kill(guest)
        else:
            await world.stop(guest)
    await sender.ends_well()
    await world.quiet()

    await world.check()


@pytest.mark.long
@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-kafka"], indirect=True)
async def test_a_member_that_acknowledges_what_it_has_in_hand_is_found_out(world: World) -> None:
    """When it leaves by surprise, the next one begins behind what it had in memory."""
    sender = world.start_sending(120)
    world.start("relay")
    await sender.ends_well()
    await until(world.all_is_published, "all was published", 30, world.logs)
    guest = world.start("work", "--slow", "0.05", unsafe="acknowledge-first")
    await world.handles(5)
    with pytest.raises(AssertionError, match="acknowledged before"):
        await _nothing_is_acknowledged_early(world)
    world.kill(guest)
    world.start("work")
    await world.quiet(limit_s=20)

    with pytest.raises(InvariantBrokenError, match="I1 lost"):
        await world.check()


async def _nothing_is_acknowledged_early(world: World) -> None:
    """Each offset below the group's stands for one effect, but for what the relay had to publish twice."""
    acknowledged = await world.positions.acknowledged() - world.called_away()
    effects = len(await world.ledger.effects())
    assert acknowledged <= effects, f"{acknowledged - effects} were acknowledged before their effects were committed"
