"""F21: the broker refuses some of a batch: a record that is too large, or half of it for a while."""

import json

import pytest

from tests.fault.invariants import InvariantBrokenError
from tests.fault.parts import CALM, CALM_LEASE_S
from tests.fault.processes import until
from tests.fault.setups import wide
from tests.fault.world import World

SOME_ELSEWHERE = ("--elsewhere", "[0, 1]")
"""What becomes of these aggregates is told on a topic of its own."""

TOO_LARGE = json.dumps({"send0-59": 2_000_000})


@pytest.mark.parametrize(
    "world", ["postgres-kafka", *wide("postgres-log", "mariadb-kafka", "sqlite-log")], indirect=True
)
async def test_a_record_that_is_too_large_is_parked_and_costs_the_others_nothing(world: World) -> None:
    """Kafka fails a whole batch for one such record, and the producer with it: only that one may stay behind."""
    sender = world.start_sending(60, "--big", TOO_LARGE, tasks=1)
    relay = world.start("all", *CALM)
    await sender.ends_well()

    async def is_parked() -> bool:
        return await world.ledger.parked_records() == 1

    await until(is_parked, "it was parked", 30, world.logs)
    await world.quiet()

    await world.check(parked=1, unhandled=1)
    world.shows(relay, "BatchPublished", "record_parked", parked=1)


@pytest.mark.parametrize("world", ["postgres-kafka", *wide("postgres-log", "mariadb-log", "sqlite-log")], indirect=True)
async def test_only_what_was_refused_is_tried_again_and_holds_back_its_key(world: World) -> None:
    """Half of the keys of the first batches are refused; what is behind them in their keys must not overtake."""
    sender = world.start_sending(200)
    relay = world.start("all", *CALM, "--refuse", "6")
    await sender.ends_well()
    await world.quiet()

    await world.check(at_most_repeats=0, lease_s=CALM_LEASE_S)
    assert sum(batch["rescheduled"] for batch in relay.moments("BatchPublished")) > 0, "nothing was refused"
    world.shows(relay, "BatchPublished", "record_rescheduled")


@pytest.mark.parametrize("world", ["postgres-kafka"], indirect=True)
async def test_a_topic_that_is_gone_holds_up_no_other(world: World) -> None:
    """Somebody deletes a topic by mistake. What goes there waits until it is there again; all else goes on."""
    await world.open_second_topic()
    running = world.start("all")
    first = world.start_sending(40, *SOME_ELSEWHERE)
    await first.ends_well()
    await world.handles(40)
    await world.delete_second_topic()
    second = world.start_sending(60, *SOME_ELSEWHERE)
    await second.ends_well()
    entries = [each for each in await world.ledger.committed() if each.entry.startswith(second.name)]
    stuck = [each for each in entries if each.aggregate < 2]
    assert stuck
    await world.handles(40 + len(entries) - len(stuck))
    assert await world.ledger.pending() == len(stuck)

    await world.open_second_topic()
    await world.handles(100)
    await world.quiet()

    await world.check()
    world.shows(running, "BatchPublished", "record_rescheduled")
    assert sum(batch["rescheduled"] for batch in running.moments("BatchPublished")) > 0


@pytest.mark.long
@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-log"], indirect=True)
async def test_a_refused_record_that_holds_back_nothing_is_found_to_be_overtaken(world: World) -> None:
    """Later records of its key arrive while it waits for its next try."""
    sender = world.start_sending(200)
    await sender.ends_well()
    world.start("all", "--refuse", "8", unsafe="no-holds")
    await world.quiet()

    with pytest.raises(InvariantBrokenError, match="I4 out of order"):
        await world.check()


@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-log"], indirect=True)
async def test_a_relay_that_drops_what_is_refused_is_found_out(world: World) -> None:
    """ "Delivered or refused" is not "delivered"."""
    sender = world.start_sending(60, "--big", TOO_LARGE, tasks=1)
    world.start("all", unsafe="drops-refused")
    await sender.ends_well()
    await world.quiet()

    with pytest.raises(InvariantBrokenError, match="I1 lost: committed, never delivered: send0-59"):
        await world.check()
