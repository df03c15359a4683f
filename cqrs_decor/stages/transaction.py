"""Begins the unit of work before the handler, has its domain events handled after it, and commits; or rolls back."""

from collections.abc import Awaitable, Callable
from typing import Any

from cqrs_decor.context import MessageContext
from cqrs_decor.dispatch import Next
from cqrs_decor.pipeline import Handling

Drain = Callable[[MessageContext], Awaitable[None]]
"""Handles the domain events of a dispatch, inside its transaction."""


class TransactionStage:
    """Four chains: a handler that asks for a session, one that at most emits, a query, and one that joined another."""

    name = "transaction"

    def __init__(self, drain: Drain) -> None:
        self._drain = drain

    def wrap(self, handling: Handling, call_next: Next) -> Next:
        if handling.joined:
            return self._joining(handling, call_next)
        if handling.spec.kind == "query":
            return _reading(call_next) if handling.uses_resources else call_next
        if handling.uses_resources or handling.consumed:
            return self._opening(call_next)
        return self._on_demand(call_next)

    async def conclude(self, context: MessageContext) -> None:
        """The handler is through: handle its domain events, then commit what there is."""
        if context.kept.emitted:
            await self._drain(context)
        if context.opened_unit_of_work is not None:
            await context.opened_unit_of_work.commit()

    async def abandon(self, context: MessageContext) -> None:
        """The handler failed: roll back what there is."""
        if context.opened_unit_of_work is not None:
            await context.opened_unit_of_work.rollback()

    def _opening(self, call_next: Next) -> Next:
        async def run(message: Any, context: MessageContext) -> Any:
            try:
                await context.unit_of_work.open()
                result = await call_next(message, context)
                await self.conclude(context)
            except BaseException:
                await self.abandon(context)
                raise
            return result

        return run

    def _on_demand(self, call_next: Next) -> Next:
        """No session is asked for: there is a transaction only if the handler emits, or sends what needs one."""

        async def run(message: Any, context: MessageContext) -> Any:
            try:
                result = await call_next(message, context)
                if context.state is not None:
                    await self.conclude(context)
            except BaseException:
                await self.abandon(context)
                raise
            return result

        return run

    def _joining(self, handling: Handling, call_next: Next) -> Next:
        # What a local event handler or a query leaves in `emitted` is taken up by the dispatch that called it.
        drains = handling.spec.kind == "command" or handling.batched

        async def run(message: Any, context: MessageContext) -> Any:
            unit_of_work = context.unit_of_work
            if handling.uses_resources:
                await unit_of_work.open()
            mark = unit_of_work.mark()
            try:
                result = await call_next(message, context)
                if drains and context.kept.emitted:
                    await self._drain(context)
            except BaseException:
                unit_of_work.doom(mark, type(message).__name__)
                raise
            return result

        return run


def _reading(call_next: Next) -> Next:
    async def run(message: Any, context: MessageContext) -> Any:
        unit_of_work = context.unit_of_work
        try:
            await unit_of_work.open()
            return await call_next(message, context)
        finally:
            await unit_of_work.rollback()

    return run
