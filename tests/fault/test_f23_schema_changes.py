"""F23: the event gets another part while rows of the old kind wait in the outbox."""

import pytest

from tests.fault.invariants import InvariantBrokenError
from tests.fault.setups import wide
from tests.fault.world import World

SETUPS = ["postgres-log", *wide("postgres-kafka", "mariadb-log", "sqlite-log")]


@pytest.mark.parametrize("world", SETUPS, indirect=True)
async def test_rows_that_were_written_before_the_change_are_read_after_it(world: World) -> None:
    """A deploy does not wait for the outbox to be empty. The new part has a value for those that lack it."""
    sender = world.start_sending(40)
    await sender.ends_well()
    await world.make_outbox_older()
    newer = world.start_sending(20)
    await newer.ends_well()
    assert await world.ledger.pending() == 60
    victim = world.start("all", freeze_at=("relay.published", 2))
    await victim.freezes()
    world.kill(victim)

    world.start("all")
    await world.quiet()

    await world.check()


@pytest.mark.awaits("worker: upcasters, by which an event of an earlier version is read")
@pytest.mark.parametrize("world", SETUPS, indirect=True)
async def test_rows_of_an_earlier_version_are_read_through_upcasters(world: World) -> None:
    """A change that no default can bridge gets a new version, and a function from the old one to it."""
    sender = world.start_sending(40)
    await sender.ends_well()
    world.start("all", version=2)
    await world.quiet()

    await world.check()


@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-log"], indirect=True)
async def test_a_row_that_lacks_a_part_without_a_default_is_found_not_to_be_handled(world: World) -> None:
    """It must be parked, not dropped, and the check must see that it had no effect."""
    sender = world.start_sending(5)
    await sender.ends_well()
    await world.make_outbox_older(without="number")
    world.start("all")
    await world.quiet(limit_s=10)

    with pytest.raises(InvariantBrokenError, match="I7 stranded: 0 records in the outbox, 5 parked"):
        await world.check()
