"""What every long-running loop needs: to be woken, to be told to stop, and to wait out an outage without noise."""

import logging

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

    @property
    def lasts(self) -> bool:
        return self._wait_s > 0

    async def wait(self, error: BaseException) -> None:
        """Note a failure and wait before the next try."""
        if not self.lasts:
            self._logger.warning(
                "%s is away, trying again until it is back: %s",
                self._part,
                type(error).__name__,
                extra={"action": "connection_lost", "part": self._part},
            )
            self._observers.notice(ConnectionChanged(part=self._part, up=False, error=type(error).__name__))
        self._wait_s = min(max(self._wait_s * 2, _FIRST_WAIT_S), _LONGEST_WAIT_S)
        await self._clock.sleep(self._wait_s)

    def over(self) -> None:
        """Note a success."""
        if self.lasts:
            self._logger.warning("%s is back", self._part, extra={"action": "connection_back", "part": self._part})
            self._observers.notice(ConnectionChanged(part=self._part, up=True))
        self._wait_s = 0.0
