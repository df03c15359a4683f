"""What users begin with: `bootstrap`, and the `App` that it makes."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from types import ModuleType, TracebackType
from typing import Any, Self, TypeVar

from cqrs_decor._text import counted
from cqrs_decor.assembly import Configuration, Hook, Parts, Run, assemble
from cqrs_decor.broker import Broker
from cqrs_decor.bus import Bus
from cqrs_decor.clock import SystemClock
from cqrs_decor.container import new_container
from cqrs_decor.context import MessageContext
from cqrs_decor.errors import AppNotStartedError, AppStoppedError, CqrsDecorError, StartupError
from cqrs_decor.handlers import HandlerSpec
from cqrs_decor.observers import Observer
from cqrs_decor.outbox import Drained, OutboxWriter
from cqrs_decor.pipeline import Plan
from cqrs_decor.registry import Registry, default_registry
from cqrs_decor.relay import Relay
from cqrs_decor.running import Running
from cqrs_decor.settings import Settings
from cqrs_decor.store import Store
from cqrs_decor.worker import Worker

T = TypeVar("T")


def bootstrap(
    *modules: str | ModuleType,
    broker: Any = None,
    database: Any = None,
    service: str | None = None,
    registry: Registry | Sequence[Registry] | None = None,
    discover: bool | Sequence[str] = True,
    run: Run | None = None,
    container: Any = None,
    middlewares: Iterable[Any] = (),
    settings: Settings | None = None,
    on_startup: Iterable[Hook] = (),
    on_shutdown: Iterable[Hook] = (),
    observers: Iterable[Observer] = (),
) -> "App":
    """Put an app together. Nothing is imported, connected or started before it is entered: `async with app:`.

    Args:
        modules: Modules with handlers, or their names; besides those found by entry points.
        broker: URL (`kafka://k1:9092,k2:9092`) or object; without one the database is the broker.
        database: URL, SQLAlchemy `AsyncEngine` or `async_sessionmaker`, or a store; without one all is in memory.
        service: Name of this service: consumer group, and source of its events.
        registry: One or several; the global one by default.
        discover: Whether to import all modules of the entry-point group `cqrs_decor.handlers`, or which.
        run: Which loops run in this process: `"relay"`, `"worker"`, `"all"`, `"none"`. Default: all in memory.
        container: A `punq.Container`, or anything with the `Container` protocol.
        middlewares: Run outside those that were recorded with `@middleware`; the first is the outermost.
        settings: What is not given in it is taken from the environment.
        on_startup: Called once connected, before the first message; may ask for app-scoped dependencies.
        on_shutdown: Called after the last message, while still connected.
        observers: Told of named moments, besides those found by entry points.
    """
    from cqrs_decor.environment import completed  # slow to import, and needed by applications only

    known = completed(settings)
    if registry is None:
        registries: tuple[Registry, ...] = (default_registry,)
    else:
        registries = (registry,) if isinstance(registry, Registry) else tuple(registry)
    return App(
        Configuration(
            modules=(*modules, *known.handlers),
            registries=registries,
            discover=discover if isinstance(discover, bool) else tuple(discover),
            broker=broker if broker is not None else known.broker,
            database=database if database is not None else known.database,
            service=service or known.service,
            run=run,
            container=container if container is not None else new_container(),
            middlewares=tuple(middlewares),
            settings=known,
            on_startup=tuple(on_startup),
            on_shutdown=tuple(on_shutdown),
            observers=tuple(observers),
            clock=SystemClock(),
        )
    )


class App(Bus):
    """An application: enter it (`async with app:`), then send commands, ask queries, publish events.

    It can be entered again after it was left; each time its registries are read anew. Methods for messages are those
    of `Bus`.
    """

    def __init__(self, configuration: Configuration) -> None:
        super().__init__()
        self._configuration = configuration
        self._running: Running | None = None

    @property
    def configuration(self) -> Configuration:
        """What it was told; URLs in it hold their secrets. `configured` and `running_as` change it."""
        return self._configuration

    @property
    def container(self) -> Any:
        """The container that was given, or an own `punq.Container` to register in before the app is entered."""
        return self._configuration.container

    @property
    def registry(self) -> Registry:
        """The first of its registries."""
        return self._configuration.registries[0]

    @property
    def settings(self) -> Settings:
        return self._configuration.settings

    @property
    def service(self) -> str:
        return self._configuration.service or "app"

    @property
    def store(self) -> Store:
        """The store of the running app."""
        return self._run_of("store").parts.store

    @property
    def broker(self) -> Broker:
        """The broker of the running app; connected only where this process relays or works."""
        return self._run_of("broker").parts.broker

    @property
    def outbox(self) -> "AppOutbox":
        """Stores events in sessions that you own: `app.outbox.add(session, event)`."""
        run = self._run_of("outbox")
        return AppOutbox(run.parts.store, run.writer)

    @property
    def plans(self) -> Sequence[Plan]:
        """The compiled handlers of the running app."""
        return self._run_of("plans").plans

    @property
    def relay(self) -> Relay | None:
        """The relay of this process, if it runs one."""
        return self._run_of("relay").relay

    @property
    def worker(self) -> Worker | None:
        """The worker of this process, if it runs one."""
        return self._run_of("worker").worker

    def configured(self, **changes: Any) -> "App":
        """A copy with another configuration; for tests and tools."""
        return App(replace(self._configuration, **changes))

    def parts(self, *, overrides: Mapping[Any, Any] | None = None) -> "Parts":
        """Import, load and examine everything, start nothing; what is wrong is in its `faults`."""
        return assemble(self._configuration, {**(overrides or {}), App: self})

    def stages(self, parts: "Parts") -> Sequence[tuple[HandlerSpec, tuple[str, ...]]]:
        """Each handler with the names of the stages around it, outermost first. Makes and connects nothing."""
        return Running(parts, self._configuration).stages()

    async def compiled(self) -> Sequence[Plan]:
        """Compile every handler and connect to nothing. App-scoped dependencies are made for it and closed again.

        Raises:
            StartupError: Everything that is wrong with what was declared and configured.
        """
        return await Running(self._sound_parts(), self._configuration).compiled()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self, overrides: Mapping[Any, Any] | None = None, *, run: Run | None = None) -> None:
        """Build and connect.

        Args:
            overrides: Ready-made dependencies by type, for tests.
            run: Which loops run in this process, whatever `bootstrap(run=...)` says.

        Raises:
            StartupError: Everything that is wrong with what was declared and configured.
            StoreError, BrokerError: The database or the broker cannot be used.
        """
        if self._running is not None:
            raise AppStartedTwiceError
        parts = self._sound_parts(overrides)
        running = Running(parts, self._configuration)
        try:
            await running.connect()
            self._running = running
            self._open_bus(running.commands, running.queries, parts.store, running.events, running.block)
            await running.call_startup_hooks()
            await running.start_loops(run)
        except BaseException:
            self._running = None
            self._close_bus(stopped=self._stopped)
            await running.stop_loops()
            await running.close()
            raise

    async def stop(self) -> None:
        """Finish what is in flight, within the drain limit; then close everything."""
        running = self._running
        if running is None:
            return
        try:
            await running.finish_what_only_memory_holds()
            await running.stop_loops()
            await running.call_shutdown_hooks()
        finally:
            self._running = None
            self._close_bus(stopped=True)
            await running.close()

    @asynccontextmanager
    async def running_as(
        self, *, overrides: Mapping[Any, Any] | None = None, **changes: Any
    ) -> AsyncGenerator[Self, None]:
        """Run this very app, which others hold by its name, with another configuration for as long as the block.

        Args:
            overrides: Ready-made dependencies by type.
            changes: Fields of its configuration, as in `configured`.
        """
        own = self._configuration
        if self._running is not None:
            raise AppStartedTwiceError
        self._configuration = replace(own, **changes)
        try:
            await self.start(overrides)
            try:
                yield self
            finally:
                await self.stop()
        finally:
            self._configuration = own

    async def drain(self, timeout: float = 30.0) -> Drained:
        """Relay and consume until nothing is left to do here; returns what was published, handled and parked.

        Loops that do not run in this process run for as long as this takes.

        Args:
            timeout: In seconds.

        Raises:
            TimeoutError: There was still something to do.
        """
        return await self._run_of("drain()").drain(timeout)

    def run(self, main: Callable[[Self], Coroutine[Any, Any, T]]) -> T:
        """Enter the app on a new event loop, run `main(app)`, leave it again; returns what `main` returned.

        For scripts and consoles, where no loop runs yet.
        """

        async def entered() -> T:
            async with self:
                return await main(self)

        return asyncio.run(entered())

    async def run_loops(self, run: Run) -> None:
        """Start loops that `run=` did not name; for the command line."""
        await self._run_of("run_loops()").start_loops(run)

    def _sound_parts(self, overrides: Mapping[Any, Any] | None = None) -> "Parts":
        parts = self.parts(overrides=overrides)
        if parts.faults:
            raise StartupError(f"The app cannot start: {counted(len(parts.faults), 'problem')}.", parts.faults)
        return parts

    def _run_of(self, action: str) -> "Running":
        if self._running is None:
            raise AppStoppedError(action) if self._stopped else AppNotStartedError(action)
        return self._running


class AppStartedTwiceError(CqrsDecorError):
    """An app that runs was entered."""

    code = "CD210"

    def __init__(self) -> None:
        super().__init__(
            "The app was entered while it runs.", fix="enter it once, and use it in as many tasks as you like"
        )


class AppOutbox:
    """Stores events in a session of yours: their rows are written when it flushes for its commit."""

    def __init__(self, store: Store, writer: OutboxWriter) -> None:
        self._store = store
        self._writer = writer

    def add(self, session: object, *events: Any) -> None:
        """Store events in the session's transaction, or in the savepoint that is open in it. You commit.

        Args:
            session: A session of the app's database, e.g. SQLAlchemy's `AsyncSession` or `Session`.
            events: Integration events.

        Raises:
            UnknownTopicError, PayloadInvalidError: An event cannot leave the process; none was stored.
            AutocommitRefusedError: The session has no transaction to store them in.
        """
        context = MessageContext.peek()
        self._store.add(session, [self._writer.envelope(event, context) for event in events])
