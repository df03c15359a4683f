"""The clock that tests move by hand, and the real one."""

from datetime import UTC, timedelta

import anyio

from cqrs_decor.clock import Clock, SystemClock
from cqrs_decor.testing.clock import FakeClock


async def test_sleepers_wake_up_when_their_time_has_come() -> None:
    """A test moves the clock instead of waiting."""
    clock = FakeClock()
    through_the_door: Clock = clock
    woken: list[float] = []

    async def sleep(seconds: float) -> None:
        await through_the_door.sleep(seconds)
        woken.append(seconds)

    async with anyio.create_task_group() as tasks:
        for seconds in (0, 1, 2, 60):
            tasks.start_soon(sleep, seconds)
        await anyio.wait_all_tasks_blocked()
        first, waits = list(woken), clock.waits
        clock.advance(timedelta(seconds=2))
        await anyio.wait_all_tasks_blocked()
        second = list(woken)
        clock.advance(timedelta(seconds=58))
        await anyio.wait_all_tasks_blocked()

    assert waits == [timedelta(seconds=1), timedelta(seconds=2), timedelta(seconds=60)]
    assert (first, second, woken) == ([0], [0, 1, 2], [0, 1, 2, 60])
    assert clock.waits == []


def test_time_passes_on_both_clocks_or_jumps_on_one() -> None:
    """Only time that passes ends a lease; a wall clock that is set does not."""
    clock = FakeClock()
    start = clock.now()

    clock.advance(timedelta(seconds=3))
    clock.step(-timedelta(hours=1))

    assert clock.elapsed() == 3.0
    assert clock.now() - start == timedelta(seconds=3) - timedelta(hours=1)


def test_the_clock_of_the_machine_runs() -> None:
    """UTC for people, seconds that never step back for leases."""
    clock = SystemClock()
    before = clock.elapsed()

    assert clock.now().tzinfo is UTC
    assert clock.elapsed() >= before


async def test_the_clock_of_the_machine_sleeps_and_is_cancelled() -> None:
    """A stop does not wait for a sleeper."""
    with anyio.move_on_after(0.01) as scope:
        await SystemClock().sleep(3600)

    assert scope.cancelled_caught
