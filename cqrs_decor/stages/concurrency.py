"""Lets at most so many of one handler's messages run at a time in this process."""

from typing import Any

import anyio

from cqrs_decor.context import MessageContext
from cqrs_decor.dispatch import Next
from cqrs_decor.pipeline import Handling


class ConcurrencyStage:
    """Not for a joined dispatch: waiting for a place while holding the outer transaction could wait for itself."""

    name = "concurrency"

    def wrap(self, handling: Handling, call_next: Next) -> Next:
        limit = handling.spec.options.concurrency
        if limit is None or handling.joined:
            return call_next
        places = anyio.Semaphore(limit)

        async def run(message: Any, context: MessageContext) -> Any:
            async with places:
                return await call_next(message, context)

        return run
