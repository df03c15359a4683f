"""The events that a handler emits: local ones are handled in its transaction, the others go to the sink."""

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cqrs_decor._text import qualified_name
from cqrs_decor.context import MessageContext, current_context
from cqrs_decor.errors import (
    EmitAfterDispatchError,
    EmitInQueryError,
    EmitOutsideHandlerError,
    EventDepthError,
    UnsupportedError,
    WrongMessageKindError,
)
from cqrs_decor.messages import message_spec
from cqrs_decor.pipeline import Plan

_logger = logging.getLogger(__name__)


class EventSink(Protocol):
    """Takes the events that leave the process. The outbox implements it."""

    def take(self, context: MessageContext, event: Any) -> None:
        """Take an event along in the unit of work of `context`. Called once per event, where it is emitted.

        Raises:
            UnknownTopicError: The event has no topic.
            PayloadInvalidError: The event cannot be encoded.
        """
        ...


def emit(*events: Any) -> None:
    """Emit events from a handler, or from a task that it awaits.

    Integration events become outbox rows in the handler's transaction; domain events are handled after the handler
    returns, in the same transaction. In a savepoint that is rolled back they go with it.

    Raises:
        EmitOutsideHandlerError: No handler and no `app.unit_of_work()` is running here.
        EmitAfterDispatchError: The handler has ended already.
        EmitInQueryError: A query emits nothing.
        WrongMessageKindError: It is no event.
    """
    context = current_context.get()
    for event in events:
        if context is None:
            raise EmitOutsideHandlerError(type(event).__name__)
        context.origin.take_event(context, event)


class Emitter:
    """Sorts emitted events: into the sink, or into the list of the dispatch."""

    def __init__(self, sink: EventSink) -> None:
        self._sink = sink
        self._leaves: dict[type[Any], bool] = {}

    def take(self, context: MessageContext, event: Any) -> None:
        if context.closed:
            raise EmitAfterDispatchError(type(event).__name__, type(context.message).__name__)
        if context.origin.kind == "query":
            raise EmitInQueryError(type(event).__name__, type(context.message).__name__)
        event_type: type[Any] = event.__class__
        leaves = self._leaves.get(event_type)
        if leaves is None:
            leaves = self._leaves[event_type] = _leaves_the_process(event_type)
        if leaves:
            self._sink.take(context, event)
            return
        state = context.kept
        if state.emitted is None:
            state.emitted = []
        state.emitted.append((event, None if state.unit_of_work is None else state.unit_of_work.mark()))


def _leaves_the_process(event_type: type[Any]) -> bool:
    kind = message_spec(event_type).kind
    if kind not in ("domain event", "integration event", "message"):
        raise WrongMessageKindError(
            qualified_name(event_type), kind, "emit", "send a command with app.send(), ask a query with app.ask()"
        )
    return kind == "integration event"


@dataclass(frozen=True, slots=True)
class LocalHandlers:
    """The handlers of one domain event in this process."""

    joined: tuple[Plan, ...] = ()
    isolated: tuple[Plan, ...] = ()


class LocalEvents:
    """Handles domain events breadth first, inside the transaction of the command that emitted them."""

    def __init__(self, max_depth: int) -> None:
        self._max_depth = max_depth
        self._handlers: Mapping[type[Any], LocalHandlers] = {}

    def handle_with(self, handlers: Mapping[type[Any], LocalHandlers]) -> None:
        """Give it the compiled handlers; their chains call `drain` themselves, so they come later."""
        self._handlers = handlers

    async def drain(self, context: MessageContext) -> None:
        """Handle what was emitted, and what that emits, until nothing is left."""
        waiting: deque[tuple[Any, object, tuple[str, ...]]] = deque()
        self._queue(waiting, context, ())
        while waiting:
            event, mark, chain = waiting.popleft()
            if not context.unit_of_work.holds(mark):
                continue  # the savepoint in which it was emitted has been rolled back
            if len(chain) >= self._max_depth:
                raise EventDepthError(self._max_depth, [*chain, type(event).__name__])
            for follow_up in await self._handle(event, context):
                self._queue(waiting, follow_up, (*chain, type(event).__name__))

    def _queue(
        self, waiting: deque[tuple[Any, object, tuple[str, ...]]], context: MessageContext, chain: tuple[str, ...]
    ) -> None:
        state = context.kept
        waiting.extend((event, mark, chain) for event, mark in state.emitted or ())
        state.emitted = None

    async def _handle(self, event: Any, context: MessageContext) -> Sequence[MessageContext]:
        handlers = self._handlers.get(event.__class__, LocalHandlers())
        if not handlers.joined and not handlers.isolated:
            _logger.debug(
                "no handler for a domain event", extra={"action": "event_unhandled", "event": type(event).__name__}
            )
        children = [await _run_joined(plan, event, context) for plan in handlers.joined]
        for plan in handlers.isolated:
            _run_after_commit(plan, event, context)
        return children


async def _run_joined(plan: Plan, event: Any, parent: MessageContext) -> MessageContext:
    context = MessageContext.of(event, plan.origin, parent=parent)
    token = current_context.set(context)
    try:
        await plan.joined(event, context)
    finally:
        context.close()
        current_context.reset(token)
    return context


def _run_after_commit(plan: Plan, event: Any, parent: MessageContext) -> None:
    if parent.unit_of_work.joined:
        raise UnsupportedError(
            f"Isolated handler {plan.spec.name}",
            "run after a commit that the caller of send(..., session=...) makes",
            "send the command without session=, or make the handler a plain one",
        )

    async def run() -> None:
        context = MessageContext.of(event, plan.origin, parent=parent, detached=True)
        token = current_context.set(context)
        try:
            await plan.own(event, context)
        except Exception:  # isolated means that its failure is its own: the command has been committed
            _logger.exception(
                "an isolated event handler failed",
                extra={"action": "isolated_handler_failed", "handler": plan.spec.name, "message_id": context.id},
            )
        finally:
            context.close()
            current_context.reset(token)

    parent.unit_of_work.after_commit(run)
