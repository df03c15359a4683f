"""Registries: what decorators record. Recording checks nothing and imports nothing; the build of an app does."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, overload

from cqrs_decor._text import type_name
from cqrs_decor.errors import HandlerDefinitionError
from cqrs_decor.handlers import HandlerKind, HandlerOptions, source_place
from cqrs_decor.messages import message_spec
from cqrs_decor.retry import Retry

F = TypeVar("F", bound=Callable[..., Any])
Scope = Literal["message", "app"]
MessageTypes = type[Any] | tuple[type[Any], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerRecord:
    """A handler as it was declared."""

    kind: HandlerKind
    target: Any
    options: HandlerOptions
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderRecord:
    """A function that provides a dependency, as it was declared."""

    target: Callable[..., Any]
    scope: Scope
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What a registry held at one moment; nothing that is recorded later changes it."""

    handlers: tuple[HandlerRecord, ...] = ()
    providers: tuple[ProviderRecord, ...] = ()
    middlewares: tuple[Any, ...] = ()
    on_startup: tuple[Callable[..., Any], ...] = ()
    on_shutdown: tuple[Callable[..., Any], ...] = ()

    def __add__(self, other: "Snapshot") -> "Snapshot":
        return Snapshot(
            handlers=self.handlers + other.handlers,
            providers=self.providers + other.providers,
            middlewares=self.middlewares + other.middlewares,
            on_startup=self.on_startup + other.on_startup,
            on_shutdown=self.on_shutdown + other.on_shutdown,
        )


class Registry:
    """Records handlers, providers and middlewares, by decorators or by hand (`bind`).

    The module-level decorators write to one global registry; make your own where one process holds several
    applications, as routers are made elsewhere: `sales = Registry("sales")`, then `@sales.command_handler`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._handlers: dict[tuple[str, ...], HandlerRecord] = {}
        self._providers: dict[str, ProviderRecord] = {}
        self._middlewares: list[Any] = []
        self._on_startup: list[Callable[..., Any]] = []
        self._on_shutdown: list[Callable[..., Any]] = []

    def __repr__(self) -> str:
        return f"Registry({self.name!r}, {len(self._handlers)} handlers)"

    # --- decorators -------------------------------------------------------------------------------------------------

    @overload
    def command_handler(self, target: F, /) -> F: ...
    @overload
    def command_handler(
        self,
        /,
        *,
        message: MessageTypes = (),
        name: str | None = None,
        retry: Retry | None = None,
        timeout: timedelta | float | None = None,
        concurrency: int | None = None,
    ) -> Callable[[F], F]: ...
    def command_handler(self, target: Any = None, /, **options: Any) -> Any:
        """Record the one handler of a command: `async def`, `def`, or a class with `handle`.

        Args:
            message: The command class(es), where the annotation does not say it.
            name: Stable name for logs and telemetry; the function's own by default.
            retry: Tries again in a fresh transaction; by default only for what the store calls transient.
            timeout: Of one attempt; a number is seconds.
            concurrency: At most so many at a time in this process.
        """
        return self._decorate("command", target, options)

    @overload
    def query_handler(self, target: F, /) -> F: ...
    @overload
    def query_handler(
        self,
        /,
        *,
        message: MessageTypes = (),
        name: str | None = None,
        retry: Retry | None = None,
        timeout: timedelta | float | None = None,
        concurrency: int | None = None,
    ) -> Callable[[F], F]: ...
    def query_handler(self, target: Any = None, /, **options: Any) -> Any:
        """Record the one handler of a query. Its transaction is read-only and rolled back; it must not emit."""
        return self._decorate("query", target, options)

    @overload
    def event_handler(self, target: F, /) -> F: ...
    @overload
    def event_handler(
        self,
        /,
        *,
        message: MessageTypes = (),
        name: str | None = None,
        retry: Retry | None = None,
        timeout: timedelta | float | None = None,
        concurrency: int | None = None,
        isolated: bool = False,
        optimistic: bool = False,
    ) -> Callable[[F], F]: ...
    def event_handler(self, target: Any = None, /, **options: Any) -> Any:
        """Record a handler of an event; an event has any number.

        A handler of a domain event runs in its command's transaction (or, `isolated=True`, after it). A handler of an
        integration event is a consumer of its own, run by a worker: own transaction, inbox row, retries and parking.

        Args:
            message: The event class(es), where the annotation does not say it.
            name: Stable name; give one before you rename the function, since inbox rows are kept by it.
            retry: What a consumer does about failures; by default eight attempts over about a minute, then parked.
            timeout: Of one attempt; a number is seconds.
            concurrency: At most so many at a time in this process.
            isolated: Only for domain events: run after the commit, in an own transaction; a failure is logged.
            optimistic: Only for integration events: it has no effects outside the database and may be rerun. Messages
                that wait are handled in one transaction, and one by one if that fails.
        """
        return self._decorate("event", target, options)

    @overload
    def provider(self, target: F, /) -> F: ...
    @overload
    def provider(self, /, *, scope: Scope = "message") -> Callable[[F], F]: ...
    def provider(self, target: Any = None, /, *, scope: Scope = "message") -> Any:
        """Record a function that provides the type it returns: plain, async, or a generator that cleans up at its end.

        Args:
            scope: `"message"`, made for each message and closed when its handler has ended, also on error and
                cancellation; or `"app"`, made once at start-up and closed at the end.
        """

        def record(function: Any) -> Any:
            where = source_place(function)
            self._providers[where] = ProviderRecord(target=function, scope=scope, where=where)
            return function

        return record if target is None else record(target)

    def middleware(self, target: F, /) -> F:
        """Record a middleware: `async def (message, call_next)`, or a class with such a `__call__`, made at start-up.

        Middlewares run in the order in which they were recorded, the first outermost.
        """
        self._middlewares.append(target)
        return target

    def on_startup(self, target: F, /) -> F:
        """Record what runs once connected, before the first message; it may ask for app-scoped dependencies."""
        self._on_startup.append(target)
        return target

    def on_shutdown(self, target: F, /) -> F:
        """Record what runs when the app no longer takes messages and is still connected."""
        self._on_shutdown.append(target)
        return target

    # --- by hand ----------------------------------------------------------------------------------------------------

    def bind(
        self,
        message: MessageTypes,
        handler: Callable[..., Any],
        *,
        kind: HandlerKind | None = None,
        name: str | None = None,
        retry: Retry | None = None,
        timeout: timedelta | float | None = None,
        concurrency: int | None = None,
        isolated: bool = False,
        optimistic: bool = False,
    ) -> None:
        """Bind a handler to a message without a decorator.

        Args:
            message: One message class or several.
            handler: Function or class.
            kind: Needed for plain dataclasses only; other messages say themselves what they are.
            name: As in the decorators; the same holds for what follows.

        Raises:
            HandlerDefinitionError: The message does not say its kind, and neither do you.
        """
        types = message if isinstance(message, tuple) else (message,)
        options = _options(
            message=types,
            name=name,
            retry=retry,
            timeout=timeout,
            concurrency=concurrency,
            isolated=isolated,
            optimistic=optimistic,
        )
        self._record(kind or _kind_of(types[0], source_place(handler)), handler, options)

    def snapshot(self) -> Snapshot:
        """What is recorded now."""
        return Snapshot(
            handlers=tuple(self._handlers.values()),
            providers=tuple(self._providers.values()),
            middlewares=tuple(self._middlewares),
            on_startup=tuple(self._on_startup),
            on_shutdown=tuple(self._on_shutdown),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Forget what was recorded since the snapshot was taken; for tests."""
        self._handlers = {_identity(record): record for record in snapshot.handlers}
        self._providers = {record.where: record for record in snapshot.providers}
        self._middlewares = list(snapshot.middlewares)
        self._on_startup = list(snapshot.on_startup)
        self._on_shutdown = list(snapshot.on_shutdown)

    def _decorate(self, kind: HandlerKind, target: Any, options: dict[str, Any]) -> Any:
        read = _options(**options)

        def record(handler: Any) -> Any:
            self._record(kind, handler, read)
            return handler

        return record if target is None else record(target)

    def _record(self, kind: HandlerKind, target: Any, options: HandlerOptions) -> None:
        if not callable(target):
            raise HandlerDefinitionError(
                repr(target),
                "Only functions and classes can be handlers.",
                "decorate a function or a class with `handle`",
            )
        record = HandlerRecord(kind=kind, target=target, options=options, where=source_place(target))
        self._handlers[_identity(record)] = record


def _identity(record: HandlerRecord) -> tuple[str, ...]:
    """A module that is imported again replaces its handlers; a function bound to another message is another handler."""
    return (record.kind, record.where, *(type_name(message) for message in record.options.messages))


def _options(
    *,
    message: MessageTypes = (),
    name: str | None = None,
    retry: Retry | None = None,
    timeout: timedelta | float | None = None,
    concurrency: int | None = None,
    isolated: bool = False,
    optimistic: bool = False,
) -> HandlerOptions:
    return HandlerOptions(
        name=name,
        messages=message if isinstance(message, tuple) else (message,),
        retry=retry,
        timeout=timedelta(seconds=timeout) if isinstance(timeout, int | float) else timeout,
        concurrency=concurrency,
        isolated=isolated,
        optimistic=optimistic,
    )


_BINDABLE: dict[str, HandlerKind] = {
    "command": "command",
    "query": "query",
    "domain event": "event",
    "integration event": "event",
}


def _kind_of(message: type[Any], where: str) -> HandlerKind:
    kind = _BINDABLE.get(message_spec(message).kind)
    if kind is None:
        raise HandlerDefinitionError(
            where,
            f"{type_name(message)} does not say whether it is a command, a query or an event.",
            'give bind(..., kind="command") (or "query", "event")',
        )
    return kind


default_registry = Registry("default")
"""Where the module-level decorators record."""


def merged(registries: Iterable[Registry]) -> Snapshot:
    """One snapshot of several registries."""
    total = Snapshot()
    for registry in registries:
        total += registry.snapshot()
    return total
