"""`kill -9` of everything at once: two senders, a relay and a worker, as when a container or a machine goes away."""

import pytest

from tests.fault.world import World


async def test_everything_killed_at_once_leaves_nothing_half_done(world: World) -> None:
    """Nobody is left who could tidy up: what was committed, and only that, must go on from the tables alone."""
    leader = world.start_sending(400)
    second = world.start_sending(400, group=leader.pid)
    world.start("all", group=leader.pid)
    await leader.says("committed")
    await second.says("committed")
    await world.handles(20)
    assert await world.ledger.pending() + await world.unacknowledged() > 0
    world.kill_group(leader)

    world.start("all")
    survivor = world.start_sending(40)
    await survivor.ends_well()
    await world.quiet()

    await world.check()


@pytest.mark.parametrize("world", ["postgres-kafka", "sqlite-log"], indirect=True)
async def test_a_process_killed_by_surprise_costs_nothing(world: World) -> None:
    """No crash point, no freeze: SIGKILL comes whenever it comes, three times, while others go on."""
    sender = world.start_sending(240)
    for part in (20, 60, 100):
        victim = world.start("all")
        await world.handles(part)
        assert await world.ledger.pending() + await world.unacknowledged() > 0
        world.kill(victim)

    world.start("all")
    await sender.ends_well()
    await world.quiet()

    await world.check()
    assert len(await world.ledger.committed()) == 240
