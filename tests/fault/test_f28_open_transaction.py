"""F28: a transaction with an outbox row in it stays open for long."""

import anyio
import pytest

from tests.fault.invariants import InvariantBrokenError
from tests.fault.parts import CALM, CALM_LEASE_S
from tests.fault.setups import LASTS_S, wide
from tests.fault.world import AGGREGATES, World

ALONE = ("--aggregates", "0", "1")
OTHERS = ("--aggregates", "1", str(AGGREGATES))


@pytest.mark.parametrize("world", ["postgres-log", *wide("postgres-kafka", "mariadb-log")], indirect=True)
async def test_a_row_that_is_committed_late_is_delivered_and_others_do_not_wait(world: World) -> None:
    """Its id is lower than those of rows that were delivered long before it: who pages by id never sees it."""
    running = world.start("all", *CALM)
    late = world.start_sending(10, *ALONE, tasks=1, freeze_at=("outbox.rows_written", 5))
    await late.freezes()
    sender = world.start_sending(200, *OTHERS)
    await sender.ends_well()
    await world.handles(200)
    await anyio.sleep(LASTS_S / 2)
    assert "send1-4" not in {delivery.entry for delivery in world.deliveries()}, "it was delivered before its commit"
    late.resume()

    await late.ends_well()
    await world.handles(210)
    await world.quiet()

    await world.check(at_most_repeats=0, lease_s=CALM_LEASE_S)
    assert running.is_alive


@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-log"], indirect=True)
async def test_a_relay_that_pages_by_id_is_found_to_strand_it(world: World) -> None:
    """The trap that others fell into."""
    world.start("all", unsafe="pages-by-id")
    late = world.start_sending(10, *ALONE, tasks=1, freeze_at=("outbox.rows_written", 5))
    await late.freezes()
    sender = world.start_sending(60, *OTHERS, tasks=1)
    await sender.ends_well()
    await world.handles(60)
    late.resume()
    await late.ends_well()
    await world.quiet(limit_s=8)

    with pytest.raises(InvariantBrokenError, match="I7 stranded: 1 records in the outbox"):
        await world.check()
