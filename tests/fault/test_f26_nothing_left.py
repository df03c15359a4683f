"""F26: the database has no disk left, or no connection."""

from pathlib import Path

import anyio
import pytest

from tests.fault.invariants import InvariantBrokenError
from tests.fault.setups import LASTS_S, wide
from tests.fault.world import World


@pytest.mark.parametrize("world", ["sqlitedisk-log", *wide("postgresdisk-log")], indirect=True)
async def test_on_a_full_disk_business_and_outbox_rows_fail_together(world: World) -> None:
    """No half of a transaction may be left; and when there is room again, nobody has to restart anything."""
    disk = world.setup.disk
    assert disk is not None
    running = world.start("all")
    sender = world.start_sending(400, pause_s=0.005)
    await world.handles(30)
    await world.watch(running)
    await world.has_work_in_hand()
    world.deal("disk full", cuts_off=2)
    filler = disk / "filler"
    _fill(filler)
    await sender.says("failed", times=5)
    filler.unlink()
    world.fault_is_over()

    await world.handles_more(20)
    await sender.ends_well()
    await world.quiet()

    await world.check()


@pytest.mark.parametrize("world", ["postgres-kafka", *wide("postgres-log")], indirect=True)
async def test_without_a_free_connection_everything_waits_and_goes_on_by_itself(world: World) -> None:
    """Another service of the same database has taken them all."""
    await world.use_a_role_of_their_own()
    running = world.start("all")
    sender = world.start_sending(300, pause_s=0.005)
    await world.handles(30)
    await world.has_work_in_hand()
    world.deal("no connections left", cuts_off=2)
    await world.limit_connections(0)
    await sender.says("failed", times=3)
    await running.notices("ConnectionChanged", up=False)
    await anyio.sleep(LASTS_S / 2)
    await world.limit_connections(-1)
    world.fault_is_over()

    await world.handles_more(20)
    await sender.ends_well()
    await world.quiet()

    await world.check()
    world.shows(running, "ConnectionChanged", "connection_lost", up=False)
    world.shows(running, "ConnectionChanged", "connection_back", up=True)


@pytest.mark.long
@pytest.mark.negative_control
@pytest.mark.parametrize("world", ["postgres-log"], indirect=True)
async def test_an_event_that_is_stored_after_the_commit_is_found_to_be_missing(world: World) -> None:
    """Two transactions instead of one: the connections end between them."""
    await world.use_a_role_of_their_own()
    world.start("all")
    sender = world.start_sending(300, "--in-two-transactions", pause_s=0.002)
    await world.handles(20)
    for _ in range(4):
        await world.limit_connections(0)
        await sender.says("failed", times=len(sender.said("failed")) + 2)
        await world.limit_connections(-1)
        await world.handles_more(3)
    await sender.ends_well()
    await world.quiet()

    with pytest.raises(InvariantBrokenError, match="I1 lost: committed, never delivered"):
        await world.check()


def _fill(file: Path) -> None:
    """Write until there is no room."""
    with file.open("wb", buffering=0) as filler:
        try:
            while filler.write(b"\0" * 65536):
                pass
        except OSError:
            return
