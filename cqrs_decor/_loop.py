"""What every long-running loop needs: to be woken, to be ended, and to wait out an outage without noise."""

import asyncio
import logging
from collections.abc import Callable

import anyio

from cqrs_decor._time_limit import time_limit
from cqrs_decor.clock import Clock
from cqrs_decor.observers import ConnectionChanged, Observers

_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 1.0

_CANCEL_AGAIN_S = 10.0
"""Longer than what is shielded when a loop ends: lanes that are given back."""


class Signal:
    """Wakes one waiting loop; signals that come while nobody waits are one."""

    def __init__(self) -> None:
        self._event = anyio.Event()

    def set(self) -> None:
        self._event.set()

    async def wait(self, seconds: float) -> bool:
        """Wait for a signal, at most so long; whether one came. It is used up."""
        with anyio.move_on_after(seconds):
            await self._event.wait()
        came = self._event.is_set()
        if came:
            self._event = anyio.Event()
        return came


async def cancel_and_wait(task: asyncio.Task[None]) -> None:
    """Cancel a task until it has ended. One cancellation can be lost: `asyncio.wait_for` of Python 3.11 returns instead
    if what it waits for is done at that moment (CPython issue 86296), so drivers that use it do.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=_CANCEL_AGAIN_S)


class Turns:
    """Who may ask next of all that wait for one part of the world in this process: one at a time while it is away, all
    of them when one has found it back.

    Attributes:
        back: Set when that is so; then there is another.
    """

    def __init__(self) -> None:
        self.back = anyio.Event()
        self.turn = anyio.Lock()
        self._rest_s = _FIRST_WAIT_S

    def next_rest_s(self) -> float:
        """How long to wait before the next try, whoever's it is: longer each time."""
        rest_s = self._rest_s
        self._rest_s = min(rest_s * 2, _LONGEST_WAIT_S)
        return rest_s

    def tell_all(self) -> None:
        self.back.set()
        self.back = anyio.Event()
        self._rest_s = _FIRST_WAIT_S


class Outage:
    """A part that is away: says so once, waits longer each time up to a second, and says once that it is back.

    Args:
        part: How it is called.
        logger: Where it is said.
        clock: Time.
        observers: Told as well.
        turns: Shared with other parts that are away when this one is: a database is asked once a second by a process,
            not once by each of its loops.

    Attributes:
        lasts: The last try failed.
    """

    def __init__(
        self, part: str, logger: logging.Logger, clock: Clock, observers: Observers, turns: Turns | None = None
    ) -> None:
        self._part = part
        self._logger = logger
        self._clock = clock
        self._observers = observers
        self._turns = turns or Turns()
        self.lasts = False

    async def wait(self, error: BaseException) -> None:
        """Note a failure and wait for the turn of the next try."""
        self.begin(error)
        await self.in_turn(lambda: False)

    def begin(self, error: BaseException) -> None:
        """Note a failure."""
        if self.lasts:
            return
        self._logger.warning(
            "%s is away, trying again until it is back: %s",
            self._part,
            type(error).__name__,
            extra={"action": "connection_lost", "part": self._part},
        )
        self._observers.notice(ConnectionChanged(part=self._part, up=False, error=type(error).__name__))
        self.lasts = True

    async def in_turn(self, given_up: Callable[[], bool]) -> None:
        """While it lasts, wait before one's try until that of each other who waits: a thousand that ask every second
        are the next outage. Returns at once when it is over, or given up.
        """
        if not self.lasts:
            return
        back = self._turns.back
        async with self._turns.turn:
            if not back.is_set() and not given_up():
                await self._rest(back)

    async def _rest(self, back: anyio.Event) -> None:
        ends_at = self._clock.elapsed() + self._turns.next_rest_s()
        async with time_limit(self._clock, lambda: ends_at - self._clock.elapsed()):
            await back.wait()

    def over(self) -> None:
        """Note a success."""
        if not self.lasts:
            return
        self.lasts = False
        self._logger.warning("%s is back", self._part, extra={"action": "connection_back", "part": self._part})
        self._observers.notice(ConnectionChanged(part=self._part, up=True))
        self._turns.tell_all()
