"""F1: the relay is killed in the middle of a batch, before it knows that the broker has it."""

import pytest

from tests.fault.invariants import InvariantBrokenError
from tests.fault.world import World


async def test_a_relay_killed_in_the_middle_of_a_batch_costs_nothing(world: World) -> None:
    """Part of the batch may have arrived and part not. Its records must all come, in order, whoever relays next."""
    sender = world.start_sending(120)
    where = world.chance.randint(1, 3), world.chance.choice([0, 1, 3, 10, 30, 100, 300, 1000])
    victim = world.start("all", freeze_while_publishing=where)
    await victim.freezes()
    assert victim.said("publishing")[-1] > 0
    assert await world.ledger.pending() > 0
    world.kill(victim)

    successor = world.start("all")
    await sender.ends_well()
    await world.quiet()

    await world.check()
    world.shows(successor, "CrashSuspected", "crash_suspected", part="relay")
    assert len(await world.ledger.committed()) == 120


@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-log"], indirect=True)
async def test_a_relay_that_settles_before_it_publishes_is_found_out(world: World) -> None:
    """Without the order publish, then settle, the same kill loses the batch: the check for loss must see it."""
    sender = world.start_sending(60)
    await sender.ends_well()
    relay = world.start("relay", unsafe="settle-first", freeze_at=("relay.claimed", 2))
    await relay.freezes()
    world.kill(relay)

    world.start("all")
    await world.quiet()

    with pytest.raises(InvariantBrokenError, match="I1 lost: committed, never delivered"):
        await world.check()


@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-log"], indirect=True)
async def test_a_relay_that_shuffles_its_batches_is_found_out(world: World) -> None:
    """Order is checked on each run, so the check itself needs a relay that breaks it."""
    sender = world.start_sending(60)
    await sender.ends_well()

    world.start("all", unsafe="no-order")
    await world.quiet()

    with pytest.raises(InvariantBrokenError, match="I4 out of order"):
        await world.check()
