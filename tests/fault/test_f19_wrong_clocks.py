"""F19: clocks five minutes apart, and one that jumps back."""

import pytest

from tests.fault.parts import CALM, CALM_LEASE_S
from tests.fault.processes import Victim
from tests.fault.setups import wide
from tests.fault.world import World

FAST = (*CALM, "--clock", "300", "-600")
"""Five minutes ahead, and after a second five minutes behind."""


@pytest.mark.parametrize("world", ["postgres-log", *wide("postgres-kafka", "mariadb-log", "sqlite-log")], indirect=True)
async def test_a_relay_with_a_wrong_clock_takes_nothing_early(world: World) -> None:
    """Lease times come from the database: what a process believes the time to be decides nothing."""
    sender = world.start_sending(200, *FAST, pause_s=0.02)
    right = world.start("relay", *CALM)
    world.start("work")
    await right.notices("LanesChanged", held=32)
    wrong = world.start("relay", *FAST)
    await world.handles(100)
    assert await world.in_flight() > 0
    await sender.ends_well()
    await world.quiet()

    await world.check(at_most_repeats=0, lease_s=CALM_LEASE_S)
    _nobody_was_robbed(right, wrong)


@pytest.mark.long
@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-log"], indirect=True)
async def test_a_relay_that_goes_by_its_own_clock_is_found_out(world: World) -> None:
    """Five minutes ahead, it takes every lease of others for ended."""
    sender = world.start_sending(300, pause_s=0.01)
    right = world.start("relay", *CALM)
    world.start("work")
    await right.notices("LanesChanged", held=32)
    world.start("relay", *FAST, unsafe="own-clock")
    await right.notices("FenceRejected")
    await sender.ends_well()
    await world.quiet()

    with pytest.raises(AssertionError, match="lost lanes before their lease had ended"):
        _nobody_was_robbed(right)


def _nobody_was_robbed(*relays: Victim) -> None:
    """A lane that is taken before its time costs a late write, which its fence refuses."""
    for relay in relays:
        assert not relay.leases_lost(), f"{relay.name} lost lanes before their lease had ended"
