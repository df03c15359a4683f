"""F12: two, four and eight relays on the same rows."""

import json

import pytest

from tests.fault.invariants import InvariantBrokenError
from tests.fault.parts import CALM_LEASE_S
from tests.fault.setups import WIDE, wide
from tests.fault.world import World

# With the short leases of the other scenarios repeats appeared here without a fault: see `CALM`.
SMALL_BATCHES = ("--set", json.dumps({"relay_batch": 5, "lease_s": CALM_LEASE_S, "publish_timeout_s": 5}))

SETUPS = ["postgres-log", *wide("postgres-kafka", "mariadb-log", "sqlite-log")]


@pytest.mark.parametrize("world", SETUPS, indirect=True)
@pytest.mark.parametrize("relays", [2, 4, 8] if WIDE else [2], ids=lambda count: f"{count} relays")
async def test_relays_side_by_side_publish_no_record_at_the_same_time(world: World, relays: int) -> None:
    """Who scales out must not have to give up order, nor pay for it with repeats: nothing comes twice here.

    The one that did most is stopped well, and another takes over, until one is left.
    """
    senders = [world.start_sending(200, pause_s=0.01)]
    running = [world.start("relay", *SMALL_BATCHES) for _ in range(relays)]
    world.start("work")
    while len(running) > 1:
        senders.append(world.start_sending(200, pause_s=0.01))
        await world.handles_more(30)
        await world.has_work_in_hand()
        busiest = max(running, key=lambda relay: len(relay.said("published")))
        await world.stop(busiest)
        running.remove(busiest)
    for sender in senders:
        await sender.ends_well()
    await world.quiet()

    await world.check(at_most_repeats=0, lease_s=CALM_LEASE_S)
    world.no_lane_was_in_two_hands()


@pytest.mark.parametrize("world", SETUPS, indirect=True)
async def test_a_relay_that_comes_later_gets_its_share_of_the_lanes(world: World) -> None:
    """Without that, the second process is a spare part and not a help."""
    before = world.start_sending(200, pause_s=0.01)
    first = world.start("relay", *SMALL_BATCHES)
    world.start("work")
    await first.notices("LanesChanged", held=32)
    second = world.start("relay", *SMALL_BATCHES)
    await second.notices("LanesChanged", held=16)
    await first.notices("LanesChanged", held=16)
    after = world.start_sending(200, pause_s=0.01)
    for sender in (before, after):
        await sender.ends_well()
    await world.quiet()

    await world.check(at_most_repeats=0, lease_s=CALM_LEASE_S)
    world.no_lane_was_in_two_hands()


@pytest.mark.long
@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-log"], indirect=True)
async def test_relays_without_leases_are_found_to_publish_the_same_lane_at_once(world: World) -> None:
    """The check itself must see it."""
    for relay in [world.start("relay", unsafe="no-fences") for _ in range(2)]:
        await relay.notices("LanesChanged", held=32)
    sender = world.start_sending(300)
    world.start("work")
    await sender.ends_well()
    await world.quiet()

    with pytest.raises(InvariantBrokenError, match="a lane was published at the same time"):
        world.no_lane_was_in_two_hands()
