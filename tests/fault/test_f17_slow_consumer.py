"""F17: the consumer has a tenth of the producer's pace."""

import pytest

from tests.fault.invariants import InvariantBrokenError
from tests.fault.parts import PREFETCH
from tests.fault.processes import until
from tests.fault.setups import wide
from tests.fault.world import World


@pytest.mark.parametrize("world", ["postgres-kafka", *wide("postgres-log", "mariadb-log")], indirect=True)
async def test_a_slow_consumer_keeps_its_place_and_its_size(world: World) -> None:
    """What waits, waits at the broker: not in memory, and not by being thrown out of the group and delivered again."""
    sender = world.start_sending(150)
    relay = world.start("relay")
    slow = world.start("work", "--slow", "0.4")
    await world.handles(10)
    await world.watch(slow)
    await sender.ends_well()
    assert await world.unacknowledged() > PREFETCH, "the consumer kept up: this run proves nothing"
    await world.quiet(limit_s=90)

    await world.check(at_most_repeats=0)
    assert slow.moments("PartitionsPaused"), "nobody was told that it is full"
    assert relay.is_alive


@pytest.mark.long
@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-kafka"], indirect=True)
async def test_a_consumer_that_is_thrown_out_of_its_group_is_found_to_be_told_again(world: World) -> None:
    """It stands still for longer than its session: its partitions go to another, and what it had comes again."""
    sender = world.start_sending(100)
    world.start("relay")
    slow = world.start("work", "--slow", "0.1")
    await world.handles(5)
    await sender.ends_well()
    await world.freeze(slow)
    second = world.start("work")
    await until(lambda: any(each.process == second.pid for each in world.deliveries()), "another took over", 60)
    slow.resume()
    await world.quiet()

    with pytest.raises(InvariantBrokenError, match="I5 repeated"):
        await world.check(at_most_repeats=0)
