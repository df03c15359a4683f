"""F24: SIGTERM under load, as with each deploy."""

import pytest

from tests.fault.invariants import Left
from tests.fault.setups import wide
from tests.fault.world import World


@pytest.mark.parametrize("world", ["postgres-kafka", *wide("postgres-log", "mariadb-log", "sqlite-log")], indirect=True)
async def test_a_process_told_to_stop_finishes_what_it_has_in_hand_and_parks_nothing(world: World) -> None:
    """A stop is no failure of a message, so nothing is parked for it. What was done behind something of another key
    that was not begun cannot be acknowledged, since offsets are a prefix: it comes again, and the inbox drops it.
    """
    sender = world.start_sending(240)
    first = world.start("all")
    await world.handles(20)
    assert await world.ledger.pending() + await world.unacknowledged() > 0
    await world.stop(first)
    assert (await world.left()).parked == 0

    second = world.start("all")
    await sender.ends_well()
    await world.quiet()
    await world.stop(second)

    await world.check()
    assert await world.left() == Left(pending=0, parked=0, unacknowledged=0)
    assert len(await world.ledger.committed()) == 240
