"""The message in hand: its ids and headers, and the dispatch that handles it."""

from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from cqrs_decor._ids import new_id
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import CqrsDecorError
from cqrs_decor.unit_of_work import Begin, UnitOfWork

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})

current_context: ContextVar["MessageContext | None"] = ContextVar("cqrs_decor_message", default=None)


class NoMessageError(CqrsDecorError):
    """There is no message in hand here."""

    code = "CD209"

    def __init__(self) -> None:
        super().__init__(
            "MessageContext.current() was called outside a handler.",
            fix="call it in a handler, a middleware, or a task that they await",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What is the same for every message of a handler.

    Attributes:
        app: Which app dispatches; a dispatch joins another one of the same app only.
        kind: `command`, `query` or `event`; `block` for `app.unit_of_work()`.
        handler: Its stable name.
        consumer: Service and handler name, for consumers.
        take_event: Receives what the handler emits.
        begin: Opens a transaction.
    """

    app: object
    kind: str
    handler: str
    take_event: "Callable[[MessageContext, Any], None]"
    begin: Begin
    consumer: str | None = None


class DispatchState:
    """What a dispatch keeps beside its message; made only when something needs it."""

    __slots__ = (
        "attempt",
        "closed",
        "detached",
        "emitted",
        "envelope",
        "id",
        "idempotency_key",
        "parent",
        "parked_id",
        "stack",
        "unit_of_work",
    )

    def __init__(self, parent: "MessageContext | None" = None, envelope: Envelope | None = None) -> None:
        self.parent = parent
        self.envelope = envelope
        self.attempt = 1
        self.id: str | None = None
        self.idempotency_key: str | None = None
        self.unit_of_work: UnitOfWork | None = None
        self.emitted: list[tuple[Any, object]] | None = None
        self.stack: AsyncExitStack | None = None
        self.closed = False
        self.detached = False
        self.parked_id: int | None = None


class MessageContext:
    """Ids, headers and attempt of the message in hand. Ask for it by annotation, or call `MessageContext.current()`.

    Attributes:
        message: The message.
        origin: Its handler.
        state: The rest; None until something needs it. A context is made for every message, and most need no more.
    """

    __slots__ = ("message", "origin", "state")

    message: Any
    origin: Origin
    state: DispatchState | None

    @classmethod
    def of(
        cls,
        message: Any,
        origin: Origin,
        *,
        parent: "MessageContext | None" = None,
        envelope: Envelope | None = None,
        detached: bool = False,
    ) -> "MessageContext":
        """A new context.

        Args:
            message: The message.
            origin: Its handler.
            parent: The dispatch around it.
            envelope: What it came in.
            detached: It has a parent for its ids, but a transaction of its own.
        """
        context = cls()
        context.message = message
        context.origin = origin
        context.state = None
        if parent is not None or envelope is not None:
            context.state = DispatchState(parent, envelope)
            context.state.detached = detached
        return context

    @classmethod
    def current(cls) -> "MessageContext":
        """The context of the message in hand.

        Raises:
            NoMessageError: There is none.
        """
        context = current_context.get()
        if context is None:
            raise NoMessageError
        return context

    @classmethod
    def peek(cls) -> "MessageContext | None":
        """The context of the message in hand, if there is one that has not ended."""
        context = current_context.get()
        return None if context is None or context.closed else context

    # --- for handlers and middlewares -------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """The message's id; the same over all attempts."""
        state = self.kept
        if state.envelope is not None:
            return state.envelope.id
        if state.id is None:
            state.id = new_id()
        return state.id

    @property
    def correlation_id(self) -> str:
        """Shared by everything that follows from one first message."""
        state = self.kept
        if state.envelope is not None:
            return state.envelope.correlation_id or state.envelope.id
        return self.id if state.parent is None else state.parent.correlation_id

    @property
    def causation_id(self) -> str | None:
        """The id of the message whose handling led to this one."""
        state = self.kept
        if state.envelope is not None:
            return state.envelope.causation_id
        return None if state.parent is None else state.parent.id

    @property
    def headers(self) -> Mapping[str, str]:
        """What travelled with the message."""
        envelope = self.envelope
        return _NO_HEADERS if envelope is None else envelope.headers

    @property
    def envelope(self) -> Envelope | None:
        """What the message came in, in a consumer: topic, key, wire name, source, time, sequence."""
        return None if self.state is None else self.state.envelope

    @property
    def attempt(self) -> int:
        """1 for the first."""
        return 1 if self.state is None else self.state.attempt

    @property
    def consumer(self) -> str | None:
        """Service and handler name, in a consumer."""
        return self.origin.consumer

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt at this message by this handler: give it to APIs that drop repeats by key.

        Of a command with an idempotency key it is made from that, so that every send with the key has the same.
        """
        if self.state is not None and self.state.idempotency_key is not None:
            return f"{self.origin.handler}::{self.state.idempotency_key}"
        source = "" if self.envelope is None else self.envelope.source
        return f"{self.origin.consumer or self.origin.handler}:{source}:{self.id}"

    # --- for the pipeline -------------------------------------------------------------------------------------------

    @property
    def kept(self) -> DispatchState:
        """The state, made if need be."""
        if self.state is None or self.state is ENDED:
            ended = self.state is ENDED
            self.state = DispatchState()
            self.state.closed = ended
        return self.state

    @property
    def parent(self) -> "MessageContext | None":
        return None if self.state is None else self.state.parent

    @property
    def closed(self) -> bool:
        """The dispatch has ended."""
        return self.state is not None and self.state.closed

    @property
    def stack(self) -> AsyncExitStack:
        """Closes what is made for this message; set by the scope stage around every handler that needs one."""
        stack = self.kept.stack
        if stack is None:
            raise AssertionError("a dependency that needs closing, outside a scope")
        return stack

    @property
    def unit_of_work(self) -> UnitOfWork:
        """The unit of work that this dispatch shares with what joined it; made when it is first asked for."""
        state = self.kept
        if state.unit_of_work is None:
            parent = None if state.detached else state.parent
            state.unit_of_work = UnitOfWork(self.origin.begin) if parent is None else parent.unit_of_work
        return state.unit_of_work

    @property
    def opened_unit_of_work(self) -> UnitOfWork | None:
        """The unit of work, if anything asked for it yet."""
        return None if self.state is None else self.state.unit_of_work

    def begin_attempt(self, number: int) -> None:
        """Forget what the attempt before left."""
        state = self.kept
        state.attempt = number
        state.emitted = None
        state.unit_of_work = None

    def close(self) -> None:
        """The dispatch has ended: what still holds this context can emit no more."""
        if self.state is None:
            self.state = ENDED
        else:
            self.state.closed = True


ENDED = DispatchState()
"""The state of every dispatch that ended without needing one."""
ENDED.closed = True
