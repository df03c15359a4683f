"""F2: the relay is killed when the broker has acknowledged a batch, and the outbox still has it."""

import pytest

from tests.fault.invariants import InvariantBrokenError
from tests.fault.world import World


async def test_a_relay_killed_before_it_settles_repeats_and_the_inbox_drops_the_repeats(world: World) -> None:
    """This is the crash that makes delivery "at least once". What is repeated must have no second effect."""
    sender = world.start_sending(120)
    victim = world.start("all", freeze_at=("relay.published", world.chance.randint(1, 3)))
    await victim.freezes()
    assert await world.ledger.pending() > 0
    assert await world.positions.published() > 0
    world.kill(victim)

    successor = world.start("all")
    await sender.ends_well()
    await world.quiet()

    await world.check()
    world.shows(successor, "CrashSuspected", "crash_suspected", part="relay")
    assert await world.positions.published() > len(await world.ledger.committed()), "the kill caused no repeat"


@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-log"], indirect=True)
async def test_without_the_inbox_the_repeats_of_a_relay_are_found_to_take_effect_twice(world: World) -> None:
    """The repeats are real: an inbox that remembers nothing lets them through."""
    sender = world.start_sending(60)
    await sender.ends_well()
    relay = world.start("relay", freeze_at=("relay.published", 2))
    await relay.freezes()
    world.kill(relay)

    world.start("all", unsafe="no-inbox")
    await world.quiet()

    with pytest.raises(InvariantBrokenError, match="I3 doubled"):
        await world.check()
