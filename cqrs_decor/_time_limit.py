"""Limits in the time of a `Clock`: what a test lets pass at once, and a simulation in an order of its own."""

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager

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


class TimeGuard:
    """Ends blocks that take too long, one block at a time. `run` watches from a task of its own, so that a limit costs
    next to nothing where blocks follow each other quickly: no task and no timer for each.

    The limit of a block never lies before that of the block before it, since nobody looks in between.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began = anyio.Event()
        self._scope: anyio.CancelScope | None = None
        self._seconds_left: Callable[[], float] = float

    @contextmanager
    def limit(self, seconds_left: Callable[[], float]) -> Generator[None, None, None]:
        """End the block, without an error, once `seconds_left()` is nothing; it is asked again then."""
        with anyio.CancelScope() as scope:
            self._scope, self._seconds_left = scope, seconds_left
            self._began.set()
            try:
                yield
            finally:
                self._scope = None

    async def run(self) -> None:
        """Watch, until cancelled."""
        while True:
            await self._began.wait()
            self._began = anyio.Event()
            while self._scope is not None:
                seconds = self._seconds_left()
                if seconds <= _ROUNDING_S:
                    self._scope.cancel()
                    break
                await self._clock.sleep(seconds)
