"""F20: a message that always fails, that cannot be read, or that takes the interpreter with it."""

import json
from dataclasses import replace
from functools import partial

import pytest

from cqrs_decor.inbox import InboxFilter
from tests.fault.invariants import InvariantBrokenError
from tests.fault.processes import Victim, until
from tests.fault.setups import wide
from tests.fault.world import World

SETUPS = ["postgres-kafka", *wide("postgres-log", "mariadb-log", "sqlite-log")]


@pytest.mark.parametrize("world", SETUPS, indirect=True)
async def test_a_message_that_always_fails_is_parked_and_the_others_go_on(world: World) -> None:
    """It is tried as often as its policy says and then set aside, with its error; nobody else waits for it."""
    sender = world.start_sending(60, tasks=1)
    running = world.start("all", "--poison", '{"send0-59": "raise"}')
    await sender.ends_well()
    await until(lambda: _parked(world, 1), "it was parked", 30, world.logs)
    await world.quiet()

    await world.check(parked=1, unhandled=1)
    assert world.runs().count("send0-59") == 1
    assert [each["attempts"] for each in running.moments("MessageConsumed", outcome="parked")] == [3]
    assert running.logged("message_parked")


@pytest.mark.parametrize("world", SETUPS, indirect=True)
async def test_a_message_that_cannot_be_read_is_parked_and_the_others_go_on(world: World) -> None:
    """Somebody else's bug on a shared topic must not stop this service."""
    sender = world.start_sending(40)
    await sender.ends_well()
    async with world.open_broker() as broker:
        envelope = (await world.outbox())[0]
        await broker.publish([replace(envelope, id="unreadable", key="elsewhere", data=b'{"entry": [')])
    running = world.start("all")
    await world.handles(40)
    await until(lambda: _parked(world, 1), "it was parked", 30, world.logs)
    await world.quiet()

    await world.check(parked=1)
    assert running.logged("message_parked")


@pytest.mark.awaits("worker: later messages of a key are held behind a parked one")
@pytest.mark.parametrize("world", SETUPS, indirect=True)
async def test_what_comes_behind_a_parked_message_of_its_key_waits_and_follows_in_order(world: World) -> None:
    """Of one account, the deposit that failed must not be overtaken by the withdrawal; other accounts go on."""
    sender = world.start_sending(60, tasks=1)
    victim = world.start("all", "--poison", '{"send0-5": "raise"}')
    await sender.ends_well()
    await until(lambda: _parked(world, 1), "it was parked", 30, world.logs)
    await world.quiet()
    key = {each.entry: each.aggregate for each in await world.ledger.committed()}
    behind = [f"send0-{number}" for number in range(5, 60) if key[f"send0-{number}"] == key["send0-5"]]
    await world.check(parked=len(behind), unhandled=len(behind))
    assert victim.moments("MessagesHeld")

    await world.stop(victim)
    world.start("all")
    async with world.open_store() as store:
        parked = await store.inbox.find(InboxFilter(held=False))
        assert await store.inbox.retry([each.id for each in parked], who="operator") == 1
    await world.handles(60)
    await world.quiet()

    await world.check()
    assert [entry for entry in world.runs() if entry in behind] == behind


@pytest.mark.awaits("worker: a message that kills the interpreter is found by its mark")
@pytest.mark.parametrize("world", SETUPS, indirect=True)
async def test_a_message_that_kills_the_interpreter_is_parked_after_some_deaths(world: World) -> None:
    """A segmentation fault in a native library raises nothing: only a note made beforehand can count it."""
    sender = world.start_sending(60, tasks=1)
    await sender.ends_well()
    workers = 0
    relay = world.start("relay")
    while not await _parked(world, 1):
        workers += 1
        assert workers <= 12, "it kills one worker after the other"
        worker = world.start("work", "--poison", '{"send0-59": "exit"}')
        await until(partial(_dead_or_parked, world, worker), "it died or parked it", 60, world.logs)
        world.deal(f"{worker.name} died of its message")
    assert workers > 1, "it killed nobody"
    await world.quiet()

    await world.check(parked=1, unhandled=1)
    assert relay.is_alive


@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-log"], indirect=True)
async def test_a_worker_that_throws_away_what_it_cannot_handle_is_found_out(world: World) -> None:
    """Then nobody could ever retry it."""
    sender = world.start_sending(40, tasks=1)
    world.start("all", "--poison", json.dumps({"send0-39": "raise"}), unsafe="parks-nothing")
    await sender.ends_well()
    await world.handles(39)
    await world.quiet()

    with pytest.raises(InvariantBrokenError, match="I1 lost: committed, without an effect: send0-39"):
        await world.check()


async def _parked(world: World, count: int) -> bool:
    return await world.ledger.parked_messages() >= count


async def _dead_or_parked(world: World, worker: Victim) -> bool:
    return not worker.is_alive or await _parked(world, 1)
