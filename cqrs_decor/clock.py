"""Time comes in through this door, so that no test has to wait for it."""

import time
from datetime import UTC, datetime
from typing import Protocol

import anyio

_ELAPSED_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Clock(Protocol):
    """What the library asks of time. Implementations are shared by all tasks of one event loop."""

    def now(self) -> datetime:
        """Wall-clock time, always with the UTC time zone; never used to decide who holds a lease."""
        ...

    def elapsed(self) -> float:
        """Seconds since some fixed point, never stepping back, counting on through a suspend of the machine."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait; cancellation ends the wait at once."""
        ...


class SystemClock:
    """The clocks of this machine."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def elapsed(self) -> float:
        return time.clock_gettime(_ELAPSED_CLOCK)

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)
