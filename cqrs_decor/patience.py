"""Asks the store until it answers: an outage is waited out, a lost race for a row is run again."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from cqrs_decor._loop import Outage
from cqrs_decor.clock import Clock
from cqrs_decor.errors import CommitOutcomeUnknownError, StoreUnavailableError
from cqrs_decor.stages.retries import TRANSIENT_RETRY
from cqrs_decor.store import Store

T = TypeVar("T")


class Patience:
    """For what a worker writes on its own behalf. All of that may be repeated: it is the same after a second time.

    Args:
        store: Tells which of its errors mean what.
        outage: Waits while it is away.
        clock: Time.
    """

    def __init__(self, store: Store, outage: Outage, clock: Clock) -> None:
        self._store = store
        self._outage = outage
        self._clock = clock

    async def until_answered(self, ask: Callable[[], Awaitable[T]], given_up: Callable[[], bool]) -> T | None:
        """What `ask` returns, as soon as it does; None if it failed and was given up meanwhile."""
        conflicts = 0
        while True:
            try:
                answer = await ask()
            except Exception as error:  # what it means is for the store to say; what it does not know is a fault
                if self._store.is_transient(error):
                    conflicts += 1
                    await self._clock.sleep(TRANSIENT_RETRY.delay(conflicts).total_seconds())
                elif self.is_outage(error):
                    await self._outage.wait(error)
                else:
                    raise
            else:
                self._outage.over()
                return answer
            if given_up():
                return None

    def is_outage(self, error: BaseException) -> bool:
        """The database is away, or broke during the commit: nothing about what was asked."""
        return isinstance(error, StoreUnavailableError | CommitOutcomeUnknownError) or self._store.is_unavailable(error)
