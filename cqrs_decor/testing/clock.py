"""A clock that stands still until a test moves it."""

from datetime import UTC, datetime, timedelta

import anyio


class FakeClock:
    """Gives the same time until `advance` is called; sleepers wake up when their time has come on this clock.

    Used on one event loop. `advance` is plain code: who is woken runs at the next `await` of the test.
    """

    def __init__(self, now: datetime = datetime(2024, 2, 29, 12, 0, 0, tzinfo=UTC)) -> None:
        self._now = now
        self._elapsed = 0.0
        self._sleepers: list[tuple[float, anyio.Event]] = []

    def now(self) -> datetime:
        return self._now

    def elapsed(self) -> float:
        return self._elapsed

    async def sleep(self, seconds: float) -> None:
        woken = anyio.Event()
        sleeper = (self._elapsed + seconds, woken)
        self._sleepers.append(sleeper)
        if seconds <= 0:
            woken.set()
        try:
            await woken.wait()
        finally:
            self._sleepers.remove(sleeper)

    @property
    def waits(self) -> list[timedelta]:
        """How long each sleeper still sleeps, the shortest first: what a test looks at before it lets time pass."""
        asleep = sorted(until - self._elapsed for until, woken in self._sleepers if not woken.is_set())
        return [timedelta(seconds=seconds) for seconds in asleep]

    def advance(self, delay: timedelta) -> None:
        """Let `delay` pass at once."""
        self._now += delay
        self._elapsed += delay.total_seconds()
        for until, woken in self._sleepers:
            if until <= self._elapsed:
                woken.set()

    def advance_to_last(self) -> None:
        """Let pass what the last sleeper waits for, so that all wake up; nothing if nobody sleeps."""
        waits = self.waits
        if waits:
            # Rounded up: half a microsecond too little would leave the sleeper asleep.
            self.advance(waits[-1] + timedelta(microseconds=1))

    def step(self, delay: timedelta) -> None:
        """Set the wall clock forward, or back, without any time passing."""
        self._now += delay
