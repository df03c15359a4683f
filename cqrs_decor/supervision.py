"""Runs a loop in the background of an app: starts it again when it fails, ends it when told, within a limit."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from cqrs_decor._loop import cancel_and_wait
from cqrs_decor.clock import Clock
from cqrs_decor.observers import LoopRestarted, Observers

_logger = logging.getLogger(__name__)

_RESTART_S = (0.1, 0.5, 1.0, 2.0, 5.0)


class Supervised:
    """One loop in a task of its own. A task rather than a task group: an app may be entered and left by different
    tasks, as test fixtures and servers do.
    """

    def __init__(
        self, name: str, run: Callable[[], Awaitable[None]], clock: Clock, observers: Observers | None = None
    ) -> None:
        self._name = name
        self._run = run
        self._clock = clock
        self._observers = observers or Observers()
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls, name: str, run: Callable[[], Awaitable[None]], clock: Clock, observers: Observers | None = None
    ) -> "Supervised":
        supervised = cls(name, run, clock, observers)
        supervised._task = asyncio.create_task(supervised._keep_running(), name=f"cqrs-decor {name}")
        return supervised

    async def finish(self, limit_s: float) -> None:
        """Wait until the loop, which was told to stop, has ended; cancel it after the limit. Work in flight that is
        cancelled so was never acknowledged or settled: it comes again.
        """
        if self._task is None:
            return
        _, late = await asyncio.wait([self._task], timeout=limit_s)
        if late:
            _logger.warning("%s did not drain in time", self._name, extra={"action": "drain_limit", "loop": self._name})
            await cancel_and_wait(self._task)
        self._task = None

    async def _keep_running(self) -> None:
        failures = 0
        while True:
            try:
                await self._run()
                return
            except Exception as error:  # a fault of ours or a plugin's must not end delivery: it is logged whole
                wait_s = _RESTART_S[min(failures, len(_RESTART_S) - 1)]
                failures += 1
                facts = {"action": "loop_failed", "loop": self._name, "again_in_s": wait_s}
                _logger.exception("%s failed and starts again", self._name, extra=facts)
                self._observers.notice(LoopRestarted(loop=self._name, error=type(error).__name__))
                await self._clock.sleep(wait_s)
