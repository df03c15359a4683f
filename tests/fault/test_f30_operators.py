"""F30: an operator retries, discards and purges while processes die."""

import asyncio
import json
from datetime import timedelta

import pytest

from cqrs_decor.inbox import InboxFilter
from cqrs_decor.store import Retention
from tests.fault.invariants import InvariantBrokenError
from tests.fault.processes import Victim, until
from tests.fault.setups import wide
from tests.fault.world import World

POISON = json.dumps({f"send0-{number}": "raise" for number in (52, 55, 58)})


@pytest.mark.parametrize("world", ["postgres-kafka", *wide("postgres-log", "mariadb-log", "sqlite-log")], indirect=True)
async def test_what_an_operator_does_during_kills_happens_once_and_is_recorded(world: World) -> None:
    """Two people press the same button, and the process that carries it out dies: still one effect at most.

    What that process had in hand is the operator's again: it may be what killed it.
    """
    sender = world.start_sending(60, tasks=1)
    await sender.ends_well()
    victim = world.start("all", "--poison", POISON)
    await until(lambda: _parked(world, 3), "they were parked", 30, world.logs)
    world.kill(victim)

    async with world.open_store() as store:
        discarded, *others = [each.id for each in await store.inbox.find(InboxFilter(held=False))]
        assert await store.inbox.discard([discarded], who="one") == 1
        assert await store.inbox.discard([discarded], who="another") == 0, "a discard must be idempotent"
        asked = await store.inbox.retry(others, who="one")
        assert asked == len(others)
        assert await store.inbox.retry(others, who="another") == 0, "a retry must be idempotent"
        dies = world.start("all", freeze_at=("worker.committed", 1))
        await dies.freezes()
        world.kill(dies)
        left = await store.inbox.find(InboxFilter(error="did not come back"))
        asked += await store.inbox.retry([each.id for each in left], who="one")
        world.start("all")
        await until(lambda: _all_is_dealt_with(world), "all was dealt with", 60, world.logs)
    await world.quiet()

    await world.check(unhandled=1)
    recorded = await world.ledger.value("SELECT count(*) FROM cqrs_operator_log WHERE who = 'one'")
    assert recorded == 1 + asked
    assert await world.ledger.value("SELECT count(*) FROM cqrs_operator_log WHERE who = 'another'") == 0


@pytest.mark.parametrize("world", ["postgres-log", *wide("postgres-kafka", "mariadb-log", "sqlite-log")], indirect=True)
async def test_a_purge_during_kills_takes_what_is_done_with_and_nothing_else(world: World) -> None:
    """Two people purge at once, when relay and worker have died with work in hand and while others take over: what
    waits, what is parked, and what the inbox must know for the repeats stays.
    """
    keeps_history = ("--set", '{"history_days": 1}')
    sender = world.start_sending(200, tasks=1, pause_s=0.005)
    victim = world.start("all", *keeps_history, "--poison", '{"send0-9": "raise"}', freeze_at=("worker.committed", 60))
    await victim.freezes()
    await world.has_work_in_hand()
    world.kill(victim)
    world.start("all", *keeps_history, "--poison", '{"send0-9": "raise"}')
    purged = await _purged_twice_at_once_until(sender, world)
    await until(lambda: _parked(world, 1), "it was parked", 30, world.logs)
    await world.quiet()
    purged += await _purged(world)

    held = await world.ledger.parked_messages()
    await world.check(parked=held, unhandled=held)
    assert purged == len(await world.ledger.committed()), "each delivered record is in the history once"
    assert await _purged(world) == 0, "a purge must be idempotent"


@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-log"], indirect=True)
async def test_a_retry_that_does_not_take_the_message_out_is_found_to_run_it_again(world: World) -> None:
    """Its row must go in the same transaction as its effect comes."""
    sender = world.start_sending(60, tasks=1)
    await sender.ends_well()
    victim = world.start("all", "--poison", json.dumps({"send0-59": "raise"}))
    await until(lambda: _parked(world, 1), "it was parked", 30, world.logs)
    world.kill(victim)
    world.start("all", unsafe="keeps-retried")
    async with world.open_store() as store:
        for effects in (60, 61):
            assert await store.inbox.retry([each.id for each in await store.inbox.find(InboxFilter())], who="one") == 1
            await world.handles(effects)
    await world.quiet()

    with pytest.raises(InvariantBrokenError, match=r"I3 doubled: more than one effect: send0-59\."):
        await world.check(parked=1)


async def _purged_twice_at_once_until(sender: Victim, world: World) -> int:
    rows = 0
    while sender.is_alive:
        rows += sum(await asyncio.gather(_purged(world), _purged(world)))
    return rows


async def _purged(world: World) -> int:
    """How many rows an operator's purge has deleted: all of the history, and of the inbox what is a month old."""
    async with world.open_store() as store:
        return await store.clean_up(Retention(history=timedelta(0), inbox=timedelta(days=30)), 1_000)


async def _parked(world: World, count: int) -> bool:
    return await world.ledger.parked_messages() >= count


async def _all_is_dealt_with(world: World) -> bool:
    return await world.ledger.parked_messages() == 0
