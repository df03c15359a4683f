"""Wake-ups between the processes of an outbox: sent sparingly, heard again after an outage, known to work or not."""

import asyncio
import logging
from collections.abc import Callable
from math import inf

from cqrs_decor._loop import Outage, Turns, cancel_and_wait
from cqrs_decor.clock import Clock
from cqrs_decor.errors import StoreUnavailableError
from cqrs_decor.observers import Observers, WakeUpChanged
from cqrs_decor.outbox import Ear, WakeUps

_logger = logging.getLogger(__name__)

ECHO_WITHIN_S = 2.0
"""An echo of a renewal, and a connection to hear it on, must be there within this time, or listening does not work."""

_APART_S = 0.005
"""Wake-ups of one process are so far apart at least."""

_LAST_SEND_S = 1.0
"""So long a process that ends waits for a wake-up that is on its way."""

_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 5.0


class WakeUpSender:
    """Sends what a process has committed to the relays of others: the first at once, the others of the same moment as
    one. Nobody waits for it, and nobody's command fails with it.
    """

    def __init__(self, wake_ups: WakeUps, clock: Clock, observers: Observers, turns: Turns | None = None) -> None:
        self._wake_ups = wake_ups
        self._clock = clock
        self._outage = Outage("wake-ups of other processes", _logger, clock, observers, turns)
        self._wanted = False
        self._task: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """Records were committed. Called on the event loop, and returns at once."""
        self._wanted = True
        if self._task is None or self._task.done():
            # A task of its own, since it outlives the command that committed (docs/decisions/0006-loops-are-tasks.md).
            self._task = asyncio.create_task(self._send_all(), name="cqrs-decor wake-ups")

    async def close(self) -> None:
        """Let what is on its way out, for a moment; relays look by themselves for what is lost."""
        if self._task is None:
            return
        if not self._outage.lasts:
            await asyncio.wait([self._task], timeout=_LAST_SEND_S)
        await cancel_and_wait(self._task)
        self._task = None

    async def _send_all(self) -> None:
        while self._wanted:
            self._wanted = False
            try:
                await self._wake_ups.send()
                self._outage.over()
            except StoreUnavailableError as error:
                self._wanted = True
                await self._outage.wait(error)
            else:
                await self._clock.sleep(_APART_S)


class Listening:
    """Hears wake-ups for one relay, and knows whether that works: each renewal must come back as an echo.

    Args:
        owner: The relay.
        wake: Called when there may be work.
        connected: Called when listening has begun, anew as well.
    """

    def __init__(
        self,
        wake_ups: WakeUps,
        owner: str,
        *,
        wake: Callable[[], None],
        connected: Callable[[], None],
        clock: Clock,
        observers: Observers,
    ) -> None:
        self.works = False
        self._wake_ups = wake_ups
        self._owner = owner
        self._wake = wake
        self._connected = connected
        self._clock = clock
        self._observers = observers
        self._said: bool | None = None
        self._listens = False
        self._due_since = inf

    async def run(self) -> None:
        """Listen until cancelled; a lost connection is made anew, more and more patiently."""
        wait_s = _FIRST_WAIT_S
        while True:
            self._listens, self._due_since = False, self._clock.elapsed()
            try:
                async with self._wake_ups.listen(self._owner) as ear:
                    self._listens, self._due_since = True, inf
                    self._connected()
                    await self._hear_all(ear)
            except StoreUnavailableError as error:
                if self._listens:
                    wait_s = _FIRST_WAIT_S
                self._doubt(f"the connection is lost: {type(error).__name__}")
                await self._clock.sleep(wait_s)
                wait_s = min(wait_s * 2, _LONGEST_WAIT_S)

    async def _hear_all(self, ear: Ear) -> None:
        while True:
            if await ear.hear() == "work":
                self._wake()
            else:
                self._due_since = inf
                self._trust()

    def expect_echo(self) -> None:
        """The relay is about to renew."""
        if self._listens and self._due_since == inf:
            self._due_since = self._clock.elapsed()

    def expect_nothing(self) -> None:
        """The renewal failed."""
        if self._listens:
            self._due_since = inf

    def judge(self) -> None:
        """Find out whether what was due has not come."""
        if self._clock.elapsed() - self._due_since >= ECHO_WITHIN_S:
            self._doubt("a renewal was not heard" if self._listens else "no connection to listen on")

    def _trust(self) -> None:
        self.works = True
        if self._said is False:
            _logger.warning("wake-ups by the database work again", extra={"action": "wake_ups_work"})
        if self._said is not True:
            self._said = True
            self._observers.notice(WakeUpChanged(works=True))

    def _doubt(self, reason: str) -> None:
        self.works = False
        if self._said is not False:
            self._said = False
            facts = {"action": "wake_ups_degraded", "reason": reason}
            _logger.warning("wake-ups by the database do not work, degraded to polling: %s", reason, extra=facts)
            self._observers.notice(WakeUpChanged(works=False, reason=reason))
        self._wake()
