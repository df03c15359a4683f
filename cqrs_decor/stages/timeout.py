"""Ends a dispatch that takes too long; its transaction is rolled back, unless the time-out comes during its COMMIT."""

from typing import Any

import anyio

from cqrs_decor.context import MessageContext
from cqrs_decor.dispatch import Next
from cqrs_decor.errors import CommitOutcomeUnknownError, HandlerTimeoutError
from cqrs_decor.pipeline import Handling


class TimeoutStage:
    """A `def` handler in a thread cannot be stopped: its time-out is raised when it returns."""

    name = "timeout"

    def wrap(self, handling: Handling, call_next: Next) -> Next:
        if handling.spec.options.timeout is None:
            return call_next
        limit_s = handling.spec.options.timeout.total_seconds()
        handler = handling.spec.name

        async def run(message: Any, context: MessageContext) -> Any:
            with anyio.move_on_after(limit_s) as scope:
                return await call_next(message, context)
            if scope.cancelled_caught and not handling.consumed and _was_committing(context):
                raise CommitOutcomeUnknownError(f"the database of {handler}", "was cut by its time-out")
            if scope.cancelled_caught:
                raise HandlerTimeoutError(handler, limit_s)
            return None

        return run


def _was_committing(context: MessageContext) -> bool:
    """Then a retry might do everything twice. For a consumer that is the inbox's care, and the time-out counts."""
    unit_of_work = context.opened_unit_of_work
    return unit_of_work is not None and unit_of_work.committing
