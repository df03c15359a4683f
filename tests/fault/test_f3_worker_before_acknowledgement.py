"""F3: a worker is killed when the transaction of a handler is committed, and the broker has not been told."""

import pytest

from tests.fault.invariants import InvariantBrokenError
from tests.fault.processes import until
from tests.fault.world import World


async def test_a_worker_killed_between_commit_and_acknowledgement_has_one_effect(world: World) -> None:
    """The message comes again, to a process that knows nothing of the first time: only the inbox row can tell."""
    sender = world.start_sending(120)
    victim = world.start("all", freeze_at=("worker.committed", world.chance.randint(1, 30)))
    await victim.freezes()
    assert await world.effects_not_acknowledged() > 0
    world.kill(victim)

    successor = world.start("all")
    await sender.ends_well()
    await world.quiet()

    await world.check()
    world.shows(successor, "CrashSuspected", "crash_suspected", part="worker")
    assert len(world.deliveries()) > len(await world.ledger.effects()), "nothing was delivered again"


@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-log"], indirect=True)
async def test_without_the_inbox_a_killed_worker_is_found_to_take_effect_twice(world: World) -> None:
    """Redelivery is real: an inbox that remembers nothing lets it through."""
    sender = world.start_sending(60)
    victim = world.start("all", unsafe="no-inbox", freeze_at=("worker.committed", 5))
    await victim.freezes()
    world.kill(victim)

    world.start("all", unsafe="no-inbox")
    await sender.ends_well()
    await world.quiet()

    with pytest.raises(InvariantBrokenError, match="I3 doubled"):
        await world.check()


@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-log"], indirect=True)
async def test_a_worker_that_acknowledges_before_it_commits_is_found_out(world: World) -> None:
    """Acknowledging what was received, as a consumer with auto-commit does, loses what was in memory at the kill."""
    sender = world.start_sending(60)
    relay = world.start("relay")
    await sender.ends_well()
    await until(world.all_is_published, "all was published", 30)
    victim = world.start("work", unsafe="acknowledge-first", freeze_at=("worker.received", 2))
    await victim.freezes()
    world.kill(victim)

    world.start("work")
    await world.quiet()
    await world.stop(relay)

    with pytest.raises(InvariantBrokenError, match=r"I1 lost: committed, (never delivered|without an effect)"):
        await world.check()
