"""Begins the unit of work before the handler and commits it after, or rolls it back."""

from typing import Any

from cqrs_decor.context import MessageContext
from cqrs_decor.dispatch import Next
from cqrs_decor.pipeline import Handling


class TransactionStage:
    """Four chains: a handler that asks for a session, one that at most emits, a query, and one that joined another."""

    name = "transaction"

    def wrap(self, handling: Handling, call_next: Next) -> Next:
        if handling.joined:
            return _joining(call_next, opens=handling.uses_resources)
        if handling.spec.kind == "query":
            return _reading(call_next) if handling.uses_resources else call_next
        if handling.uses_resources or handling.consumed:
            return _opening(call_next)
        return _on_demand(call_next)


def _opening(call_next: Next) -> Next:
    async def run(message: Any, context: MessageContext) -> Any:
        unit_of_work = context.unit_of_work
        try:
            await unit_of_work.open()
            result = await call_next(message, context)
            await unit_of_work.commit()
        except BaseException:
            await unit_of_work.rollback()
            raise
        return result

    return run


def _on_demand(call_next: Next) -> Next:
    """No session is asked for: there is a unit of work only if the handler emits, or something that it sends needs one."""

    async def run(message: Any, context: MessageContext) -> Any:
        try:
            result = await call_next(message, context)
            if context.opened_unit_of_work is not None:
                await context.opened_unit_of_work.commit()
        except BaseException:
            if context.opened_unit_of_work is not None:
                await context.opened_unit_of_work.rollback()
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


def _joining(call_next: Next, *, opens: bool) -> Next:
    async def run(message: Any, context: MessageContext) -> Any:
        unit_of_work = context.unit_of_work
        if opens:
            await unit_of_work.open()
        mark = unit_of_work.mark()
        try:
            return await call_next(message, context)
        except BaseException:
            unit_of_work.doom(mark, type(message).__name__)
            raise

    return run
