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

KILLER = "send0-30"

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
    world.shows(running, "MessageConsumed", "message_parked", outcome="parked")


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
    world.shows(running, "MessageConsumed", "message_parked", outcome="parked")


@pytest.mark.parametrize("world", SETUPS, indirect=True)
async def test_what_comes_behind_a_parked_message_of_its_key_waits_and_follows_in_order(world: World) -> None:
    """Of one account, the deposit that failed must not be overtaken by the withdrawal; other accounts go on."""
    sender = world.start_sending(60, tasks=1)
    victim = world.start("all", "--poison", '{"send0-5": "raise"}')
    await sender.ends_well()
    await until(lambda: _parked(world, 1), "it was parked", 30, world.logs)
    await world.quiet()
    behind = await _from_on(world, "send0-5")
    await world.check(parked=len(behind), unhandled=len(behind))
    world.shows(victim, "MessagesHeld", "message_parked")

    await world.stop(victim)
    world.start("all")
    await _retry_parked(world)
    await world.handles(60)
    await world.quiet()

    await world.check()
    assert [entry for entry in world.runs() if entry in behind] == behind


@pytest.mark.parametrize("world", SETUPS, indirect=True)
async def test_a_message_that_kills_the_interpreter_is_parked_after_three_deaths_of_its_own(world: World) -> None:
    """A segmentation fault in a native library raises nothing: only a note made beforehand can count it.

    The first death tells no more than that one of those in hand did it. From then on they go in single steps, and the
    one that three workers died of is set aside. What is behind it in its key follows in order, once it was retried.
    """
    sender = world.start_sending(60, tasks=1)
    await sender.ends_well()
    workers = 0
    relay = world.start("relay")
    worker = relay
    while not await _parked(world, 1):
        workers += 1
        assert workers <= 5, "it kills one worker after the other"
        worker = world.start("work", "--poison", json.dumps({KILLER: "exit"}))
        await until(partial(_dead_or_parked, world, worker), "it died or parked it", 60, world.logs)
        world.deal(f"{worker.name} died of its message")
    assert workers > 1, "it killed nobody"
    await world.quiet()
    behind = await _from_on(world, KILLER)
    await world.check(parked=len(behind), unhandled=len(behind))
    world.shows(worker, "CrashSuspected", "crash_suspected", part="worker")
    world.shows(worker, "MessageConsumed", "message_parked", outcome="parked")

    await world.stop(worker)
    world.start("work")
    await _retry_parked(world)
    await world.handles(60)
    await world.quiet()

    await world.check()
    assert [entry for entry in world.runs() if entry in behind] == behind
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


async def _from_on(world: World, entry: str) -> list[str]:
    """The entry and those that come after it in its key, in order."""
    committed = {each.entry: each for each in await world.ledger.committed()}
    first = committed[entry]
    after = [each for each in committed.values() if each.aggregate == first.aggregate and each.number >= first.number]
    return [each.entry for each in sorted(after, key=lambda each: each.number)]


async def _retry_parked(world: World) -> None:
    """Those behind it follow by themselves."""
    async with world.open_store() as store:
        parked = await store.inbox.find(InboxFilter(held=False))
        assert await store.inbox.retry([each.id for each in parked], who="operator") == 1


async def _parked(world: World, count: int) -> bool:
    return await world.ledger.parked_messages() >= count


async def _dead_or_parked(world: World, worker: Victim) -> bool:
    return not worker.is_alive or await _parked(world, 1)
