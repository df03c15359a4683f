"""`send`, `ask` and `publish`: where a dispatch begins, or joins the one around it."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from threading import get_ident
from typing import Any, TypeVar

from cqrs_decor._text import qualified_name
from cqrs_decor.context import ENDED, MessageContext, Origin, current_context
from cqrs_decor.dispatch import Next
from cqrs_decor.errors import (
    AppNotStartedError,
    AppStoppedError,
    CqrsDecorError,
    NoHandlerError,
    SendInQueryError,
    WrongLoopError,
    WrongMessageKindError,
)
from cqrs_decor.events import LocalEvents
from cqrs_decor.messages import Kind, Returns, message_spec
from cqrs_decor.pipeline import Plan
from cqrs_decor.store import Store
from cqrs_decor.unit_of_work import UnitOfWork, nothing_to_begin

R = TypeVar("R")

_context_here = current_context.get
_enter_context = current_context.set
_leave_context = current_context.reset

Plans = Mapping[type[Any], Plan]

_INSTEAD: dict[Kind, str] = {
    "command": "send it with app.send()",
    "query": "ask it with app.ask()",
    "stream query": "read it with app.stream()",
    "domain event": "emit it in a handler with emit()",
    "integration event": "emit it in a handler with emit(), or app.publish() it",
    "message": "declare a handler for it",
}


class Bus:
    """Dispatches by exact type: one dictionary look-up, then the compiled chain of that handler.

    Used on the event loop that started it, by any number of tasks at once.
    """

    def __init__(self) -> None:
        self._commands: Plans = {}
        self._queries: Plans = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._home: Any = None
        self._stopped = False
        self._store: Store | None = None
        self._events: LocalEvents | None = None
        self._block: Origin | None = None

    # --- the life of the bus: called by the app ---------------------------------------------------------------------

    def _open_bus(self, commands: Plans, queries: Plans, store: Store, events: LocalEvents, block: Origin) -> None:
        self._commands, self._queries = commands, queries
        self._store, self._events, self._block = store, events, block
        self._loop = asyncio.get_running_loop()
        self._home = self._loop if hasattr(self._loop, "_thread_id") else _Home(self._loop)

    def _close_bus(self, *, stopped: bool) -> None:
        self._commands, self._queries = {}, {}
        self._loop = None
        self._stopped = stopped

    # --- for users --------------------------------------------------------------------------------------------------

    async def send(self, command: Returns[R], session: object | None = None, idempotency_key: str | None = None) -> R:
        """Send a command to its handler and return the result, after its transaction has been committed.

        Inside a handler the command joins the handler's transaction and has no retries of its own; if it fails, that
        transaction can no longer be committed (unless a savepoint around the call undid what it left).

        Args:
            command: The command.
            session: A session of yours whose transaction it joins; you commit it, and its events go along.
            idempotency_key: Names this very wish. The result is kept in the handler's transaction: a send with the same
                key and content gets it, and the handler does not run again; one at the same time waits for it. A commit
                whose outcome is unknown is repeated by itself. Keys are the service's, and kept for
                `Settings.idempotency_days`.

        Raises:
            NoHandlerError: Nobody handles this command.
            AppNotStartedError, AppStoppedError, WrongLoopError: The app does not run here.
            SendInQueryError: A query changes nothing.
            CommitOutcomeUnknownError: The connection broke during the commit.
            IdempotencyKeyReusedError: The key was given to another command, or to other content, before.
            IdempotentResultError: The result cannot be kept; nothing was committed.
            Exception: Whatever the handler raised; the transaction was rolled back.
        """
        try:
            plan = self._commands[type(command)]
        except KeyError:
            raise self._refusal(command, "command", "send") from None
        if self._home._thread_id != get_ident():
            raise WrongLoopError("send()")
        if session is not None or idempotency_key is not None or _context_here() is not None:
            return await self._send_within(plan, command, session, idempotency_key)  # type: ignore[no-any-return]
        # The commonest dispatch, written out: each call less counts here. See tests/benchmarks. A parameter by keyword
        # only would add a tenth to it: CPython has no fast way into such a function.
        context = MessageContext()
        context.message = command
        context.origin = plan.origin
        context.state = None
        token = _enter_context(context)
        try:
            bare = plan.bare
            if bare is None:
                return await plan.own(command, context)  # type: ignore[no-any-return]
            result = await bare(command)
            if context.state is not None:
                await plan.conclude(context)
            return result  # type: ignore[no-any-return]
        except BaseException:
            if context.state is not None:
                await plan.abandon(context)
            raise
        finally:
            if context.state is None:
                context.state = ENDED
            else:
                context.state.closed = True
            _leave_context(token)

    async def ask(self, query: Returns[R]) -> R:
        """Ask a query and return the answer; its transaction is read-only and rolled back.

        Inside a handler it reads in the handler's transaction, so it sees what the handler has written.

        Raises:
            NoHandlerError: Nobody answers this query.
            AppNotStartedError, AppStoppedError, WrongLoopError: The app does not run here.
        """
        plan = self._queries.get(query.__class__)
        if plan is None or self._home._thread_id != get_ident():
            raise self._refusal(query, "query", "ask")
        return await _run(plan, query, self._open_dispatch(plan.origin))  # type: ignore[no-any-return]

    async def publish(self, event: Any) -> None:
        """Publish an integration event through the outbox: stored when this returns, on its way soon after.

        Inside a handler it is the same as `emit(event)`.
        """
        async with self._entered("publish()") as context:
            context.origin.take_event(context, event)

    @asynccontextmanager
    async def unit_of_work(self) -> AsyncGenerator[UnitOfWork, None]:
        """A transaction outside a handler: `emit` works in the block, `uow.resource(AsyncSession)` is its session.

        It is committed at the end of the block, or rolled back by an exception. Inside a handler it is the handler's.
        """
        async with self._entered("unit_of_work()") as context:
            await context.unit_of_work.open()
            yield context.unit_of_work

    @asynccontextmanager
    async def _entered(self, action: str) -> AsyncGenerator[MessageContext, None]:
        """A context in which events can be emitted: the one around us, or a new one that commits at the end."""
        block, events = self._block, self._events
        if self._loop is None or block is None or events is None:
            raise self._not_running(action)
        if asyncio.get_running_loop() is not self._loop:
            raise WrongLoopError(action)
        parent = self._open_dispatch(block)
        if parent is not None:
            yield parent
            return
        context = MessageContext.of(None, block)
        token = current_context.set(context)
        try:
            yield context
            await events.drain(context)
            await context.unit_of_work.commit()
        except BaseException:
            await context.unit_of_work.rollback()
            raise
        finally:
            context.close()
            current_context.reset(token)

    # --- the rarer ways of send -------------------------------------------------------------------------------------

    async def _send_within(self, plan: Plan, command: Any, session: object | None, key: str | None) -> Any:
        if key == "":
            raise ValueError("idempotency_key is empty: leave it out, or give one that names this very wish")
        parent = self._open_dispatch(plan.origin)
        if parent is not None and parent.origin.kind == "query":
            raise SendInQueryError(type(command).__name__, type(parent.message).__name__)
        context = MessageContext.of(command, plan.origin, parent=parent if session is None else None)
        own, joined = plan.own, plan.joined
        if key is not None:
            context.kept.idempotency_key = key
            own, joined = plan.keyed, plan.keyed_joined
        if session is not None:
            return await self._send_in_session(joined, context, session)
        return await _run_in(own if parent is None else joined, context)

    async def _send_in_session(self, joined: Next, context: MessageContext, session: object) -> Any:
        if self._store is None:
            raise self._not_running("send()")
        context.kept.unit_of_work = UnitOfWork(nothing_to_begin, self._store.join(session), joined=True)
        result = await _run_in(joined, context)
        await (
            context.unit_of_work.commit()
        )  # the caller commits: this only refuses what a swallowed error left half-done
        return result

    def _open_dispatch(self, origin: Origin) -> MessageContext | None:
        """The dispatch of this app that we are inside, if it has not ended."""
        parent = current_context.get()
        inside = parent is not None and not parent.closed and parent.origin.app is origin.app
        return parent if inside else None

    def _refusal(self, message: Any, wanted: Kind, called: str) -> CqrsDecorError:
        if self._loop is None:
            return self._not_running(f"{called}()")
        if asyncio.get_running_loop() is not self._loop:
            return WrongLoopError(f"{called}()")
        spec = message_spec(message.__class__)
        name = qualified_name(spec.type)
        if spec.kind not in (wanted, "message"):
            return WrongMessageKindError(name, spec.kind, called, _INSTEAD[spec.kind])
        known = self._commands if wanted == "command" else self._queries
        names = {message_spec(message_type).name for message_type in known}
        return NoHandlerError(wanted, spec.name, name, names, f"{wanted}_handler")

    def _not_running(self, action: str) -> CqrsDecorError:
        return AppStoppedError(action) if self._stopped else AppNotStartedError(action)


async def _run(plan: Plan, message: Any, parent: MessageContext | None) -> Any:
    context = MessageContext.of(message, plan.origin, parent=parent)
    return await _run_in(plan.own if parent is None else plan.joined, context)


async def _run_in(chain: Next, context: MessageContext) -> Any:
    token = current_context.set(context)
    try:
        return await chain(context.message, context)
    finally:
        context.close()
        current_context.reset(token)


class _Home:
    """Where a loop runs, for loops that do not say it themselves.

    asyncio's own loops hold the number of the thread in which they run now as `_thread_id`. Looking at it tells another
    loop and another thread apart in a third of the time of `get_running_loop`, which asks the system for the process id
    before Python 3.12.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    @property
    def _thread_id(self) -> int | None:
        return get_ident() if asyncio.get_running_loop() is self._loop else None
