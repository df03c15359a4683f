"""Housekeeping: what is done with is deleted for good, a bit at a time, for as long as a relay or worker runs."""

import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol, runtime_checkable

from cqrs_decor._loop import Outage, Signal
from cqrs_decor.clock import Clock
from cqrs_decor.errors import BrokerUnavailableError, StoreUnavailableError
from cqrs_decor.observers import CleanedUp, Observers
from cqrs_decor.settings import Settings
from cqrs_decor.store import Retention

_logger = logging.getLogger(__name__)

_FIRST_S = 20.0
"""After a start there is more urgent work."""

_EVERY_S = 300.0
"""Of what is kept for days. More often it would be most of what an idle process asks of the database."""

_CHUNK = 1_000
_SHORTEST_PAUSE_S = 0.05


@runtime_checkable
class CleansUp(Protocol):
    """A store; and a broker that keeps its messages in a database of its own."""

    name: str

    async def clean_up(self, retention: Retention, limit: int) -> int:
        """See `Store.clean_up`."""
        ...


class Housekeeping:
    """Cleans up each part every five minutes. It may run in any number of processes: the parts see to it that only one
    is at it.

    Args:
        parts: What is cleaned up, one after the other.
        retention: For how long what is kept.
        first_s: The first time comes so long after the start.
        every_s: Each later one so long after the one before.
    """

    def __init__(
        self,
        parts: Sequence[CleansUp],
        retention: Retention,
        clock: Clock,
        observers: Observers,
        *,
        first_s: float = _FIRST_S,
        every_s: float = _EVERY_S,
    ) -> None:
        self._parts = parts
        self._retention = retention
        self._clock = clock
        self._observers = observers
        self._wait_s = first_s
        self._every_s = every_s
        self._outage = Outage("what is cleaned up", _logger, clock, observers)
        self._signal = Signal()
        self._stopping = False

    async def run(self) -> None:
        """Returns soon after `stop`: no chunk takes long."""
        while not await self._stopped_within(self._wait_s):
            self._wait_s = self._every_s
            for part in self._parts:
                await self._clean_up(part)

    def stop(self) -> None:
        self._stopping = True
        self._signal.set()

    async def _clean_up(self, part: CleansUp) -> None:
        began, total = self._clock.elapsed(), 0
        try:
            while rows := await self._chunk(part):
                total += rows
        except (StoreUnavailableError, BrokerUnavailableError) as error:
            await self._outage.wait(error)
        else:
            self._outage.over()
        if total:
            seconds = self._clock.elapsed() - began
            facts = {"action": "cleaned_up", "part": part.name, "rows": total, "seconds": round(seconds, 3)}
            _logger.info("deleted %d rows that retention says are done with", total, extra=facts)
            self._observers.notice(CleanedUp(rows=total, seconds=seconds))

    async def _chunk(self, part: CleansUp) -> int:
        """How many rows are gone: 0 where there was nothing to do, or it is time to stop. The pause after it is as long
        as it took, so that at least half of what the database can do is left to others.
        """
        began = self._clock.elapsed()
        rows = await part.clean_up(self._retention, _CHUNK)
        pause_s = max(self._clock.elapsed() - began, _SHORTEST_PAUSE_S)
        if not rows or self._stopping:
            return 0
        return 0 if await self._stopped_within(pause_s) else rows

    async def _stopped_within(self, seconds: float) -> bool:
        await self._signal.wait(seconds)
        return self._stopping


def retention_of(settings: Settings) -> Retention:
    """As the settings say. A history that is no longer kept is deleted to the end."""
    return Retention(
        inbox=timedelta(days=settings.inbox_retention_days),
        history=timedelta(days=settings.history_days),
        idempotency=timedelta(days=settings.idempotency_days),
        log=timedelta(days=settings.log_retention_days),
        groups=timedelta(days=settings.log_group_days),
    )
