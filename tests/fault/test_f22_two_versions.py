"""F22: an old and a new release of the application run side by side."""

from functools import partial

import pytest

from cqrs_decor.inbox import InboxFilter
from tests.fault.invariants import InvariantBrokenError
from tests.fault.processes import until
from tests.fault.setups import wide
from tests.fault.world import World

SETUPS = ["postgres-kafka", *wide("postgres-log", "mariadb-log", "sqlite-log")]


@pytest.mark.parametrize("world", SETUPS, indirect=True)
async def test_a_message_newer_than_its_reader_is_parked_until_the_reader_is_new(world: World) -> None:
    """Deploys are never everywhere at once. What the old release cannot read it must keep for the new one."""
    old = world.start("all")
    first = world.start_sending(40)
    await first.ends_well()
    await world.handles(40)
    new_sender = world.start_sending(10, version=2)
    await new_sender.ends_well()
    await until(partial(_parked, world, 10), "the newer ones were parked", 30, world.logs)
    await world.quiet()
    await world.check(parked=10, unhandled=10)
    world.shows(old, "MessageConsumed", "message_parked", outcome="parked")
    world.kill(old)

    world.start("all", version=2)
    async with world.open_store() as store:
        while parked := await store.inbox.find(InboxFilter()):
            await store.inbox.retry([each.id for each in parked], who="operator")
            await until(partial(_fewer_parked_than, world, len(parked)), "some were retried", 30, world.logs)
    await world.handles(50)
    await world.quiet()

    await world.check()


@pytest.mark.parametrize("world", SETUPS, indirect=True)
async def test_relays_of_two_releases_share_the_work(world: World) -> None:
    """The old one is killed in the middle of a batch of both their events; the new one takes over its lanes."""
    old_sender = world.start_sending(60)
    await old_sender.ends_well()
    old = world.start("relay", freeze_at=("relay.published", 2))
    await old.freezes()
    assert await world.ledger.pending() > 0
    world.kill(old)
    new = world.start("relay", version=2)
    world.start("work")
    await world.quiet()

    await world.check()
    world.shows(new, "CrashSuspected", "crash_suspected", part="relay")


@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-log"], indirect=True)
async def test_an_old_reader_that_drops_what_it_does_not_know_is_found_out(world: World) -> None:
    """What it cannot read today, it can after its next deploy: if it is still there."""
    sender = world.start_sending(20, version=2)
    await sender.ends_well()
    world.start("all", unsafe="parks-nothing")
    await until(world.all_is_published, "all was published", 30, world.logs)
    await world.quiet()

    with pytest.raises(InvariantBrokenError, match="I1 lost"):
        await world.check()


async def _parked(world: World, count: int) -> bool:
    return await world.ledger.parked_messages() >= count


async def _fewer_parked_than(world: World, count: int) -> bool:
    return await world.ledger.parked_messages() < count
