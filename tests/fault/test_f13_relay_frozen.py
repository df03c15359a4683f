"""F13: a relay stands still (SIGSTOP) for longer than its leases, and then goes on as if nothing had happened."""

import pytest

from tests.fault.invariants import InvariantBrokenError
from tests.fault.setups import wide
from tests.fault.world import World


@pytest.mark.parametrize(
    "world", ["postgres-log", *wide("postgres-kafka", "mariadb-log", "mariadb-kafka")], indirect=True
)
async def test_late_writes_of_a_relay_that_stood_still_are_refused(world: World) -> None:
    """A long garbage collection, a paused virtual machine, a laptop lid: the process never knows that it was away.

    It stands still when the broker has its first batch, before it settles: what it does next is a late write. A later
    batch could find the one before it still being settled, in a transaction that the database has ended meanwhile; it
    then learns that its lanes are lost before it writes anything.
    """
    sender = world.start_sending(200, pause_s=0.01)
    world.start("work")
    frozen = world.start("relay", freeze_at=("relay.published", 1))
    await frozen.freezes()
    assert await world.ledger.pending() > 0
    world.deal("relay frozen")
    successor = world.start("relay")
    await successor.says("published", times=2)
    frozen.resume()

    await frozen.notices("FenceRejected")
    await sender.ends_well()
    await world.quiet()

    await world.check()
    world.no_lane_was_in_two_hands()
    world.shows(frozen, "FenceRejected", "fence_rejected")


@pytest.mark.long
@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-log"], indirect=True)
async def test_without_fences_a_relay_that_stood_still_is_found_to_repeat_everything(world: World) -> None:
    """It believes that its lanes are still its own, and publishes beside their new owner from then on. That one is past
    its single steps by then, and there is enough for both.
    """
    sender = world.start_sending(2_400)
    await sender.ends_well()
    frozen = world.start("relay", unsafe="no-fences", freeze_at=("relay.published", 1))
    await frozen.freezes()
    world.deal("relay frozen")
    successor = world.start("relay", "--set", '{"relay_batch": 5}')
    await successor.says("published", times=40)
    frozen.resume()
    world.start("work")
    await world.quiet()

    with pytest.raises(InvariantBrokenError, match=r"I4|I5"):
        await world.check()
    with pytest.raises(InvariantBrokenError, match="a lane was published at the same time"):
        world.no_lane_was_in_two_hands()
