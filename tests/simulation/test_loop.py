"""The virtual loop: time jumps, owners die and stop, and chance decides only what asyncio leaves open."""

import asyncio
import gc
from contextlib import nullcontext
from contextvars import copy_context
from random import Random
from time import perf_counter
from typing import Any

import anyio
import pytest

from tests.simulation.loop import BusyLoopError, NothingLeftError, Owner, VirtualLoop, current_owner


def owned(loop: VirtualLoop, owner: Owner, work: object) -> None:
    context = copy_context()
    context.run(current_owner.set, owner)
    context.run(lambda: loop.create_task(work))  # type: ignore[arg-type]


def test_an_hour_takes_no_time() -> None:
    """Time is what has been waited for; else no simulation would see a lease end."""
    loop, began = VirtualLoop(Random(1)), perf_counter()

    loop.run_until_complete(anyio.sleep(3600))

    assert loop.time() == 3600
    assert perf_counter() - began < 60


def test_a_deadline_comes_in_its_order() -> None:
    """Deadlines of anyio follow the loop's time, as sleeps do."""

    async def wait() -> bool:
        with anyio.move_on_after(5) as scope:
            await anyio.sleep(10)
        return scope.cancelled_caught

    loop = VirtualLoop(Random(1))

    assert loop.run_until_complete(wait())
    assert loop.time() == 5


def test_another_seed_is_another_order() -> None:
    """Tasks that are ready at once take turns by chance, and by the same chance in the same order."""

    async def race() -> tuple[int, ...]:
        order: list[int] = []

        async def run(number: int) -> None:
            order.append(number)

        async with anyio.create_task_group() as tasks:
            for number in range(6):
                tasks.start_soon(run, number)
        return tuple(order)

    orders = [VirtualLoop(Random(seed)).run_until_complete(race()) for seed in (1, 2, 1)]

    assert orders[0] == orders[2] != orders[1]


def test_callbacks_keep_their_order() -> None:
    """That one asyncio promises."""

    async def call() -> list[int]:
        order: list[int] = []
        for number in range(6):
            asyncio.get_running_loop().call_soon(order.append, number)
        await anyio.sleep(1)
        return order

    assert VirtualLoop(Random(1)).run_until_complete(call()) == [0, 1, 2, 3, 4, 5]


def test_a_killed_owner_says_nothing_more() -> None:
    """No step, no callback, no `finally` block with an effect: a killed process cleans nothing up."""
    loop, owner = VirtualLoop(Random(1)), Owner("victim")
    said: list[str] = []

    async def speak() -> None:
        try:
            while True:
                await anyio.sleep(1)
                said.append("still here")
        finally:
            await anyio.sleep(1)
            said.append("last words")

    async def kill() -> None:
        owned(loop, owner, speak())
        await anyio.sleep(3.5)
        owner.dead = True
        await anyio.sleep(10)
        loop.bury(owner, copy_context())

    loop.run_until_complete(kill())

    assert said == ["still here"] * 3


def test_a_stopped_owner_goes_on_late() -> None:
    """What fell due meanwhile happens at once when it goes on, as after SIGSTOP and SIGCONT."""
    loop, owner = VirtualLoop(Random(1)), Owner("sleeper")
    said: list[float] = []

    async def speak() -> None:
        for _ in range(3):
            await anyio.sleep(1)
            said.append(loop.time())

    async def stop() -> None:
        owned(loop, owner, speak())
        await anyio.sleep(1.5)
        owner.stopped = True
        await anyio.sleep(10)
        loop.resume(owner)
        await anyio.sleep(5)

    loop.run_until_complete(stop())

    assert said == [1.0, 11.5, 12.5]


def test_waiting_for_nobody_is_an_error() -> None:
    """A simulation in which everybody waits would else wait as well."""
    loop = VirtualLoop(Random(1))

    with pytest.raises(NothingLeftError):
        loop.run_until_complete(anyio.Event().wait())


def test_a_step_that_never_waits_is_an_error() -> None:
    """It would stop a real loop for good."""

    async def spin() -> None:
        while True:
            pass

    with pytest.raises(BusyLoopError):
        VirtualLoop(Random(1), endless_s=0.1).run_until_complete(spin())


@pytest.mark.parametrize("by_hand", [True, pytest.param(False, id="negative control")])
def test_what_a_dead_process_left_is_not_collected_inside_a_living_task(
    by_hand: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is collected runs its `finally` blocks. A scope that it enters there would be the living task's."""
    loop, interrupted = VirtualLoop(Random(1)), list[asyncio.Task[Any] | None]()
    if not by_hand:
        monkeypatch.setattr("tests.simulation.loop._collected_by_hand", nullcontext)

    async def left_behind() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            interrupted.append(asyncio.current_task(loop))

    async def live() -> None:
        for _ in range(500):
            left = left_behind()
            left.send(None)
            ring: list[Any] = [left]
            ring.append(ring)
            del left, ring
            [[] for _ in range(1_000)]
            await asyncio.sleep(0)

    loop.run_until_complete(live())
    gc.collect()

    assert len(interrupted) == 500
    assert (set(interrupted) == {None}) == by_hand
