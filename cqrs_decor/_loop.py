"""What every long-running loop needs: to be woken, to be told to stop, and to wait out an outage without noise."""

import logging
from collections.abc import Callable

import anyio

from cqrs_decor.clock import Clock
from cqrs_decor.observers import ConnectionChanged, Observers

_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 1.0


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


class Outage:
    """A part that is away: says so once, waits longer each time up to a second, and says once that it is back."""

    def __init__(self, part: str, logger: logging.Logger, clock: Clock, observers: Observers) -> None:
        self._part = part
        self._logger = logger
        self._clock = clock
        self._observers = observers
        self._wait_s = 0.0
        self._ended = 0
        self._turns = anyio.Lock()

    @property
    def lasts(self) -> bool:
        return self._wait_s > 0

    async def wait(self, error: BaseException) -> None:
        """Note a failure and wait before the next try."""
        self.begin(error)
        await self._rest()

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
        self._wait_s = _FIRST_WAIT_S / 2

    async def in_turn(self, given_up: Callable[[], bool]) -> None:
        """While it lasts, wait before one's try until that of each other who waits here: a thousand that ask every
        second are the next outage. Returns at once when it is over, or given up.
        """
        if not self.lasts:
            return
        ended = self._ended
        async with self._turns:
            if self._ended == ended and not given_up():
                await self._rest()

    async def _rest(self) -> None:
        self._wait_s = min(self._wait_s * 2, _LONGEST_WAIT_S)
        await self._clock.sleep(self._wait_s)

    def over(self) -> None:
        """Note a success."""
        if self.lasts:
            self._ended += 1
            self._logger.warning("%s is back", self._part, extra={"action": "connection_back", "part": self._part})
            self._observers.notice(ConnectionChanged(part=self._part, up=True))
        self._wait_s = 0.0
