"""A limit in the time of a `Clock`: what a test lets pass at once, and a simulation in an order of its own."""

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import anyio

from cqrs_decor.clock import Clock

_ROUNDING_S = 1e-6
"""Less than this counts as nothing: a sleep that ends a rounding error too early would else be followed by another."""


@asynccontextmanager
async def time_limit(clock: Clock, seconds_left: Callable[[], float]) -> AsyncGenerator[None, None]:
    """End the block, without an error, once `seconds_left()` is nothing; it is asked again then, since limits may move.

    What stands behind the block runs also when the limit ended it: return from inside where it did not.
    """
    raised: Exception | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_cancel_in_time, clock, seconds_left, tasks.cancel_scope)
        try:
            yield
        except Exception as error:  # carried past the task group, which would wrap it in a group
            raised = error
        tasks.cancel_scope.cancel()
    if raised is not None:
        raise raised


async def _cancel_in_time(clock: Clock, seconds_left: Callable[[], float], scope: anyio.CancelScope) -> None:
    while (seconds := seconds_left()) > _ROUNDING_S:
        await clock.sleep(seconds)
    scope.cancel()
