"""F23: the event gets another part while rows of the old kind wait in the outbox."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import pytest

from cqrs_decor.inbox import InboxFilter
from tests.fault.invariants import Entry, InvariantBrokenError
from tests.fault.processes import until
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


@pytest.mark.parametrize("world", SETUPS, indirect=True)
async def test_rows_of_a_version_that_the_reader_does_not_know_are_kept_for_one_that_does(world: World) -> None:
    """A deploy that was taken back leaves rows of its version: they are parked, each key in order behind its first, and
    follow with the next deploy.
    """
    newer = world.start_sending(30, tasks=1, version=2)
    await newer.ends_well()
    assert await world.ledger.pending() == 30
    older = world.start("all")
    await until(lambda: _parked(world, 30), "they were parked", 30, world.logs)
    await world.quiet()
    await world.check(parked=30, unhandled=30)
    world.shows(older, "MessageConsumed", "message_parked", outcome="parked")

    await world.stop(older)
    world.start("all", version=2)
    async with world.open_store() as store:
        parked = await store.inbox.find(InboxFilter(held=False))
        assert await store.inbox.retry([each.id for each in parked], who="operator") == len(parked)
    await world.handles(30)
    await world.quiet()

    await world.check()
    _each_key_ran_in_order(await world.ledger.committed(), world.runs())


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


async def _parked(world: World, count: int) -> bool:
    return await world.ledger.parked_messages() >= count


def _each_key_ran_in_order(committed: Iterable[Entry], runs: Sequence[str]) -> None:
    place = {entry: number for number, entry in enumerate(runs)}
    keys: dict[int, list[Entry]] = defaultdict(list)
    for entry in committed:
        keys[entry.aggregate].append(entry)
    for entries in keys.values():
        in_order = sorted(entries, key=lambda each: each.number)
        assert in_order == sorted(entries, key=lambda each: place[each.entry])
