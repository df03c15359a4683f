"""F15: every message comes ten times, to two workers at once."""

from dataclasses import replace

import pytest

from tests.fault.invariants import InvariantBrokenError
from tests.fault.setups import wide
from tests.fault.world import World

SETUPS = ["postgres-log", *wide("postgres-kafka", "mariadb-kafka", "sqlite-log")]


@pytest.mark.parametrize("world", SETUPS, indirect=True)
async def test_copies_wait_or_are_dropped_and_never_run_beside(world: World) -> None:
    """Each copy goes to another partition, so that two workers have it at once: only the inbox is between them."""
    await _write_ten_copies_each(world, entries=20)
    first = world.start("work", "--slow", "0.02")
    second = world.start("work", "--slow", "0.02")
    await world.quiet()

    await _check_but_for_order(world)
    assert len(world.deliveries()) >= 200
    assert len({delivery.process for delivery in world.deliveries()}) == 2, "only one worker was at it"
    for worker in (first, second):
        assert worker.moments("MessageConsumed", outcome="duplicate")


@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-log"], indirect=True)
async def test_without_the_inbox_each_copy_is_found_to_take_effect(world: World) -> None:
    """An inbox that remembers nothing lets all ten through."""
    await _write_ten_copies_each(world, entries=20)
    world.start("work", unsafe="no-inbox")
    world.start("work", unsafe="no-inbox")
    await world.quiet()

    with pytest.raises(InvariantBrokenError, match="I3"):
        await _check_but_for_order(world)


async def _write_ten_copies_each(world: World, entries: int) -> None:
    """The entries of one sender, taken from its outbox and published ten times under ten keys."""
    sender = world.start_sending(entries)
    await sender.ends_well()
    async with world.open_broker() as broker:
        envelopes = await world.take_outbox()
        for copy in range(10):
            outcomes = await broker.publish([replace(each, key=f"copy-{copy}") for each in envelopes])
            assert outcomes == [None] * len(envelopes)


async def _check_but_for_order(world: World) -> None:
    """The copies of an aggregate's events lie in several partitions: there is no order to keep, nor few repeats."""
    await world.check(ordered=False, at_most_repeats=10**6)
