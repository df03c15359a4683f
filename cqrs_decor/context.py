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


class MessageContext:
    """Ids, headers and attempt of the message in hand. Ask for it by annotation, or call `MessageContext.current()`.

    Attributes:
        message: The message.
        attempt: 1 for the first.
        headers: What travelled with it.
    """

    # Class-level defaults instead of assignments: a context is made for every message, and most of it stays as it is.
    attempt: int = 1
    headers: Mapping[str, str] = _NO_HEADERS
    envelope: Envelope | None = None
    emitted: "list[tuple[Any, object]] | None" = None
    stack: AsyncExitStack | None = None
    closed: bool = False
    detached: bool = False
    """It has a parent for its ids, but a transaction of its own."""
    parked_id: int | None = None
    """The parked message that this is another try of."""
    _id: str | None = None
    _unit_of_work: UnitOfWork | None = None

    def __init__(self, message: Any, origin: Origin, parent: "MessageContext | None" = None) -> None:
        self.message = message
        self.origin = origin
        self.parent = parent

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

    @property
    def id(self) -> str:
        """The message's id; the same over all attempts."""
        if self.envelope is not None:
            return self.envelope.id
        if self._id is None:
            self._id = new_id()
        return self._id

    @property
    def correlation_id(self) -> str:
        """Shared by everything that follows from one first message."""
        if self.envelope is not None:
            return self.envelope.correlation_id or self.envelope.id
        return self.id if self.parent is None else self.parent.correlation_id

    @property
    def causation_id(self) -> str | None:
        """The id of the message whose handling led to this one."""
        if self.envelope is not None:
            return self.envelope.causation_id
        return None if self.parent is None else self.parent.id

    @property
    def consumer(self) -> str | None:
        """Service and handler name, in a consumer."""
        return self.origin.consumer

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt at this message by this handler: give it to APIs that drop repeats by key."""
        source = self.envelope.source if self.envelope is not None else ""
        return f"{self.origin.consumer or self.origin.handler}:{source}:{self.id}"

    @property
    def unit_of_work(self) -> UnitOfWork:
        """The unit of work that this dispatch shares with what joined it; made when it is first asked for."""
        if self._unit_of_work is None:
            parent = None if self.detached else self.parent
            self._unit_of_work = UnitOfWork(self.origin.begin) if parent is None else parent.unit_of_work
        return self._unit_of_work

    @unit_of_work.setter
    def unit_of_work(self, unit_of_work: UnitOfWork) -> None:
        self._unit_of_work = unit_of_work

    @property
    def opened_unit_of_work(self) -> UnitOfWork | None:
        """The unit of work, if anything asked for it yet."""
        return self._unit_of_work

    def begin_attempt(self, number: int) -> None:
        """Forget what the attempt before left."""
        self.attempt = number
        self.emitted = None
        self._unit_of_work = None
