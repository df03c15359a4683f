"""Tells observers, and the log at level DEBUG, how each dispatch ended. It never logs what it raises as an error: the
caller has it.
"""

import logging
from typing import Any

from cqrs_decor._text import qualified_name
from cqrs_decor.clock import Clock
from cqrs_decor.context import MessageContext
from cqrs_decor.dispatch import Next
from cqrs_decor.observers import MessageDispatched, Observers
from cqrs_decor.pipeline import Handling

_logger = logging.getLogger("cqrs_decor.dispatch")


class LoggingStage:
    """Absent from a chain when nobody listens at start-up: a dispatch that nobody watches should cost nothing."""

    name = "logging"

    def __init__(self, observers: Observers, clock: Clock) -> None:
        self._observers = observers
        self._clock = clock

    def wrap(self, handling: Handling, call_next: Next) -> Next:
        if not self._observers and not _logger.isEnabledFor(logging.DEBUG):
            return call_next
        handler = handling.spec.name

        async def run(message: Any, context: MessageContext) -> Any:
            began = self._clock.elapsed()
            error: str | None = None
            try:
                return await call_next(message, context)
            except BaseException as caught:
                error = type(caught).__name__
                raise
            finally:
                self._tell(message, context, handler, self._clock.elapsed() - began, error)

        return run

    def _tell(self, message: Any, context: MessageContext, handler: str, seconds: float, error: str | None) -> None:
        name = qualified_name(type(message))
        self._observers.notice(MessageDispatched(message=name, handler=handler, seconds=seconds, error=error))
        _logger.debug(
            "%s by %s: %s",
            name,
            handler,
            error or "done",
            extra={"action": "dispatched", "message_id": context.id, "attempt": context.attempt, "seconds": seconds},
        )
