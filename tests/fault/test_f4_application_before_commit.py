"""F4: the application is killed when a command has written its rows, and its transaction is not committed."""

import pytest

from cqrs_decor.crash_points import CrashPoint
from tests.fault.invariants import InvariantBrokenError
from tests.fault.processes import Victim
from tests.fault.world import World

BEFORE_COMMIT: tuple[CrashPoint, ...] = ("uow.before_commit", "outbox.rows_written")
"""Before the outbox rows are written, and between them and COMMIT."""


async def test_an_application_killed_before_the_commit_publishes_nothing(world: World) -> None:
    """An event of something that never happened is worse than a late one: nobody can take it back."""
    world.start("all")
    where = world.chance.choice(BEFORE_COMMIT), world.chance.randint(1, 40)
    victim = world.start_sending(60, freeze_at=where)
    survivor = world.start_sending(60)
    await victim.freezes()
    in_flight = await _written_and_not_committed(world, victim)
    assert in_flight
    world.kill(victim)

    await survivor.ends_well()
    await world.quiet()

    await world.check()
    assert not in_flight & {entry.entry for entry in await world.ledger.committed()}
    assert not in_flight & {delivery.entry for delivery in world.deliveries()}


@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-log"], indirect=True)
async def test_publishing_from_inside_the_transaction_is_found_out(world: World) -> None:
    """The dual write that an outbox replaces: the same kill leaves an event of an entry that does not exist."""
    world.start("all")
    victim = world.start_sending(60, unsafe="publish-directly", freeze_at=("uow.before_commit", 10))
    await victim.freezes()
    assert await _written_and_not_committed(world, victim)
    world.kill(victim)

    await world.quiet()

    with pytest.raises(InvariantBrokenError, match="I2 ghosts: delivered, never committed"):
        await world.check()


async def _written_and_not_committed(world: World, sender: Victim) -> set[str]:
    return set(sender.said("wrote")) - {entry.entry for entry in await world.ledger.committed()}
