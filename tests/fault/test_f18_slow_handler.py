"""F18: a handler takes longer than a lease, a session or a look at the broker."""

import pytest

from tests.fault.invariants import InvariantBrokenError
from tests.fault.parts import LEASE_S, SESSION_S
from tests.fault.setups import wide
from tests.fault.world import World

LONG_S = max(LEASE_S, SESSION_S) * 1.4


@pytest.mark.parametrize("world", ["postgres-kafka", *wide("postgres-log", "mariadb-log", "sqlite-log")], indirect=True)
async def test_a_message_that_is_still_worked_on_goes_to_nobody_else(world: World) -> None:
    """The lease is extended meanwhile: a second worker stands by and must not run it as well. While both join their
    group, each message may change hands once.
    """
    world.start("relay")
    world.start("work", "--slow", str(LONG_S))
    world.start("work", "--slow", str(LONG_S))
    sender = world.start_sending(4)
    await sender.ends_well()
    await world.quiet()

    await world.check(at_most_repeats=4)


@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-log"], indirect=True)
async def test_without_the_inbox_a_worker_that_stands_still_is_found_to_run_it_twice(world: World) -> None:
    """Its lease ends in earnest; the next one runs the handler while the first one is still in it."""
    world.start("relay")
    first = world.start("work", "--slow", str(LONG_S), unsafe="no-inbox")
    sender = world.start_sending(3)
    await sender.ends_well()
    await world.delivers(1)
    await world.freeze(first)
    world.start("work", unsafe="no-inbox")
    await world.handles(3)
    first.resume()
    await world.quiet()
    await world.handles(4)

    with pytest.raises(InvariantBrokenError, match="I3"):
        await world.check()
