"""Closes what was made for one message: once, also after an error, a time-out or a cancellation."""

import sys
from contextlib import AsyncExitStack
from typing import Any

import anyio

from cqrs_decor.context import MessageContext
from cqrs_decor.dispatch import Next
from cqrs_decor.pipeline import Handling


class ScopeStage:
    """Stands outside the transaction: what a provider does after its `yield` happens after commit or rollback."""

    name = "scope"

    def wrap(self, handling: Handling, call_next: Next) -> Next:
        if not handling.cleans_up:
            return call_next

        async def run(message: Any, context: MessageContext) -> Any:
            stack = context.kept.stack = AsyncExitStack()
            try:
                result = await call_next(message, context)
            except BaseException:
                # Shielded, so that a cancelled message still gives back what it took.
                with anyio.CancelScope(shield=True):
                    await stack.__aexit__(*sys.exc_info())
                raise
            with anyio.CancelScope(shield=True):
                await stack.aclose()
            return result

        return run
