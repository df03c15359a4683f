"""The composition root: what is declared and configured becomes an app that runs. Only it sees everything."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType, TracebackType
from typing import Any, Literal, Self, TypeVar

import anyio

from cqrs_decor._text import counted
from cqrs_decor.broker import Broker
from cqrs_decor.bus import Bus
from cqrs_decor.checks import Examined, examine, service_fault
from cqrs_decor.clock import Clock, SystemClock
from cqrs_decor.codec import Codec, JsonCodec
from cqrs_decor.container import Container, DeclaredProviders, FixedValues, Layered, as_container, new_container
from cqrs_decor.context import MessageContext, Origin
from cqrs_decor.dependencies import AppValues, GraphBuilder
from cqrs_decor.discovery import OBSERVERS, import_handlers, load_all
from cqrs_decor.dispatch import compile_call
from cqrs_decor.errors import (
    AppNotStartedError,
    AppStoppedError,
    CqrsDecorError,
    StartupError,
    TopicMissingError,
)
from cqrs_decor.events import Emitter, LocalEvents, LocalHandlers
from cqrs_decor.handlers import HandlerSpec, read_signature, source_place
from cqrs_decor.inbox import InboxStage
from cqrs_decor.middleware.concurrency import ConcurrencyStage
from cqrs_decor.middleware.logging import LoggingStage
from cqrs_decor.middleware.retries import RetriesStage
from cqrs_decor.middleware.scope import ScopeStage
from cqrs_decor.middleware.timeout import TimeoutStage
from cqrs_decor.middleware.transaction import TransactionStage
from cqrs_decor.observers import Observer, Observers
from cqrs_decor.outbox import Drained, OutboxWriter
from cqrs_decor.parts import open_broker, open_store
from cqrs_decor.pipeline import Handling, Plan, Stage, UserMiddlewares, compose
from cqrs_decor.registry import Registry, Snapshot, default_registry, merged
from cqrs_decor.relay import Relay
from cqrs_decor.settings import Settings
from cqrs_decor.store import Store
from cqrs_decor.supervision import Supervised
from cqrs_decor.unit_of_work import Transaction
from cqrs_decor.worker import Worker, WorkerLimits

_logger = logging.getLogger(__name__)

T = TypeVar("T")

Run = Literal["relay", "worker", "all", "none"]
Hook = Callable[..., Any]

_LAST_MOMENT_S = 2.0
"""So long an app in memory is given to finish what would be lost with it."""

_QUIET_AFTER = 2
"""`drain` believes that all is quiet when it has looked so often and found nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """What `bootstrap` was told, and what the environment says where it was told nothing."""

    modules: tuple[str | ModuleType, ...]
    registries: tuple[Registry, ...]
    discover: bool | tuple[str, ...]
    broker: Any
    database: Any
    service: str | None
    run: Run | None
    container: Any
    middlewares: tuple[Any, ...]
    settings: Settings
    on_startup: tuple[Hook, ...]
    on_shutdown: tuple[Hook, ...]
    observers: tuple[Observer, ...]
    clock: Clock


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
        self._running: _Running | None = None

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
        return _assemble(self._configuration, overrides or {}, self)

    def stages(self, parts: "Parts") -> Sequence[tuple[HandlerSpec, tuple[str, ...]]]:
        """Each handler with the names of the stages around it, outermost first. Makes and connects nothing."""
        return _Running(parts, self._configuration).stages()

    async def compiled(self) -> Sequence[Plan]:
        """Compile every handler and connect to nothing. App-scoped dependencies are made for it and closed again.

        Raises:
            StartupError: Everything that is wrong with what was declared and configured.
        """
        return await _Running(self._sound_parts(), self._configuration).compiled()

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
        running = _Running(parts, self._configuration)
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

    def _run_of(self, action: str) -> "_Running":
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


# --- build: from a configuration to parts -----------------------------------------------------------------------------


@dataclass(slots=True)
class Parts:
    """What an app is made of, examined and not yet connected."""

    snapshot: Snapshot
    store: Store
    broker: Broker
    examined: Examined
    graphs: GraphBuilder
    observers: Observers
    faults: list[CqrsDecorError]


def _assemble(configuration: Configuration, overrides: Mapping[Any, Any], app: App) -> Parts:
    faults = import_handlers(configuration.modules, configuration.discover)
    snapshot = merged(configuration.registries)
    store = _part(faults, lambda: open_store(configuration.database)) or open_store(None)
    broker = _part(faults, lambda: open_broker(configuration.broker, store)) or open_broker(None, open_store(None))
    if configuration.broker is not None or store.card.durable:
        faults.extend(
            service_fault(configuration.service, broker.name, durable=_keeps_positions(configuration, broker))
        )
    found = _part(faults, lambda: _container(configuration, snapshot, overrides, app)) or FixedValues({})
    graphs = GraphBuilder(found, store.resources)
    examined = examine(snapshot.handlers, graphs, store.resources)
    for target in _made_or_called_at_startup(configuration, snapshot):
        faults.extend(_faults_of_call(target, graphs))
    observers = _part(faults, lambda: _observers(configuration)) or Observers()
    return Parts(
        snapshot=snapshot,
        store=store,
        broker=broker,
        examined=examined,
        graphs=graphs,
        observers=observers,
        faults=[*faults, *examined.faults],
    )


def _made_or_called_at_startup(configuration: Configuration, snapshot: Snapshot) -> Sequence[Any]:
    """Hooks, and the classes among the middlewares: what asks for app-scoped dependencies besides handlers."""
    middlewares = (*configuration.middlewares, *snapshot.middlewares)
    return (
        *(middleware for middleware in middlewares if isinstance(middleware, type)),
        *(*snapshot.on_startup, *configuration.on_startup, *configuration.on_shutdown, *snapshot.on_shutdown),
    )


_CONSTRUCTOR = "__init__"


def _signed(target: Any) -> Any:
    """Whose signature says what `target` needs when it is called: a class is called through its constructor."""
    return getattr(target, _CONSTRUCTOR) if isinstance(target, type) else target


def _faults_of_call(target: Any, graphs: GraphBuilder) -> list[CqrsDecorError]:
    made = isinstance(target, type)
    where = source_place(target)
    try:
        parameters, _ = read_signature(_signed(target), where, skip_self=made)
    except ExceptionGroup as group:
        return [error for error in group.exceptions if isinstance(error, CqrsDecorError)]
    return graphs.draw(parameters, where, app_scope=True).faults


def _part(faults: list[CqrsDecorError], make: Callable[[], Any]) -> Any:
    try:
        return make()
    except CqrsDecorError as error:
        faults.append(error)
    except ExceptionGroup as group:
        faults.extend(error for error in group.exceptions if isinstance(error, CqrsDecorError))
    return None


def _observers(configuration: Configuration) -> Observers:
    return Observers((*configuration.observers, *(made() for made in load_all(OBSERVERS).values())))


def _keeps_positions(configuration: Configuration, broker: Broker) -> bool:
    """A broker of its own, that outlives this process, needs the service's name; a database of one service does not."""
    return configuration.broker is not None and broker.capabilities.durable


def _container(configuration: Configuration, snapshot: Snapshot, overrides: Mapping[Any, Any], app: App) -> Container:
    return Layered(
        FixedValues(overrides, "override"),
        FixedValues({App: app}, "the app itself"),
        DeclaredProviders(snapshot.providers),
        as_container(configuration.container),
    )


# --- run: from parts to something that takes messages -----------------------------------------------------------------


class _Running:
    """One run of an app, from start to stop."""

    def __init__(self, parts: Parts, configuration: Configuration) -> None:
        self.parts = parts
        self.commands: dict[type[Any], Plan] = {}
        self.queries: dict[type[Any], Plan] = {}
        self.plans: list[Plan] = []
        self.relay: Relay | None = None
        self.worker: Worker | None = None
        self._configuration = configuration
        self._settings = configuration.settings
        self._service = configuration.service or "app"
        self._consumers: dict[type[Any], list[Plan]] = {}
        self._stack = AsyncExitStack()
        self._values = AppValues(self._stack)
        self._broker_open = False
        self._codec: Codec = JsonCodec()
        self._loops: dict[str, Supervised] = {}
        self.writer = OutboxWriter(
            parts.examined.routes, self._codec, configuration.clock, self._service, self._wake_relay
        )
        self.events = LocalEvents(self._settings.max_event_depth)
        self._transaction = TransactionStage(self.events.drain)
        self._emitter = Emitter(self.writer)
        self._app_token = object()
        self._limiter = anyio.CapacityLimiter(40)
        self.block = self._origin("block", "app.unit_of_work", None)

    # --- start ---------------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        await self.parts.store.open()
        self._stack.push_async_callback(self.parts.store.close)
        await self._compile(self._values)

    async def call_startup_hooks(self) -> None:
        await self._call_hooks((*self.parts.snapshot.on_startup, *self._configuration.on_startup))

    async def call_shutdown_hooks(self) -> None:
        await self._call_hooks((*self._configuration.on_shutdown, *self.parts.snapshot.on_shutdown))

    async def start_loops(self, run: Run | None = None) -> None:
        wanted = run or self._configuration.run or self._default_run()
        if wanted != "none":
            await self._open_broker()
        if wanted in ("relay", "all"):
            await self._start_relay()
        if wanted in ("worker", "all"):
            await self._start_worker()

    def _default_run(self) -> Run:
        in_memory = self._configuration.database is None and self._configuration.broker is None
        return "all" if in_memory else "none"

    async def _open_broker(self) -> None:
        if self._broker_open:
            return
        self._stack.push_async_callback(self.parts.broker.close)
        await self.parts.broker.open()
        topics = self.parts.examined.routes.topics(self.parts.examined.consumers)
        missing = await self.parts.broker.missing_topics(topics)
        if missing and not self.parts.broker.capabilities.creates_topics:
            raise TopicMissingError(self.parts.broker.name, [topic.name for topic in missing])
        self._broker_open = True

    async def _start_relay(self) -> None:
        if self.relay is None:
            self.relay = Relay(
                self.parts.store.outbox,
                self.parts.broker,
                lease=self._settings.lease,
                batch=self._settings.relay_batch,
                poll_interval_s=self._settings.poll_interval_s,
                clock=self._configuration.clock,
                observers=self.parts.observers,
            )
            self._loops["relay"] = await Supervised.start("relay", self.relay.run, self._configuration.clock)

    async def _start_worker(self) -> None:
        if self.worker is None:
            self.worker = Worker(
                self._service,
                self.parts.broker,
                self.parts.store,
                self._consumers,
                self.parts.examined.routes,
                {self._codec.content_type: self._codec},
                limits=WorkerLimits(
                    concurrency=self._settings.worker_concurrency,
                    prefetch=self._settings.worker_prefetch,
                    max_body_bytes=self._settings.max_body_bytes,
                    park_unknown=self._settings.unknown_events == "park",
                ),
                start=self._settings.start,
                clock=self._configuration.clock,
                observers=self.parts.observers,
            )
            self._loops["worker"] = await Supervised.start("worker", self.worker.run, self._configuration.clock)

    async def _call_hooks(self, hooks: Iterable[Hook]) -> None:
        for hook in hooks:
            parameters, _ = read_signature(hook, source_place(hook))
            graph = self.parts.graphs.draw(parameters, source_place(hook), app_scope=True)
            if graph.faults:
                raise StartupError(f"{source_place(hook)} cannot be called.", graph.faults)
            await self._values.call(hook, graph)

    # --- compile -------------------------------------------------------------------------------------------------

    def stages(self) -> Sequence[tuple[HandlerSpec, tuple[str, ...]]]:
        stages = self._stages(self._middlewares())
        specs = self.parts.examined.specs()
        return [(spec, compose(stages, self._handling(spec), _nothing)[1]) for spec in specs]

    async def compiled(self) -> Sequence[Plan]:
        async with self._stack:
            await self._compile(AppValues(self._stack))
        return self.plans

    async def _compile(self, values: AppValues) -> None:
        examined = self.parts.examined
        stages = self._stages([await self._middleware(each, values) for each in self._middlewares()])
        for spec in examined.specs():
            drawn = examined.graphs_of(spec)
            await values.prepare(drawn.constructor)
            await values.prepare(drawn.call)
        compiled = {id(spec): self._plan(spec, stages, values) for spec in examined.specs()}
        self.plans = list(compiled.values())
        self.commands = {kind: compiled[id(spec)] for kind, spec in examined.commands.items()}
        self.queries = {kind: compiled[id(spec)] for kind, spec in examined.queries.items()}
        self._consumers = {kind: [compiled[id(s)] for s in specs] for kind, specs in examined.consumers.items()}
        self.events.handle_with(
            {
                kind: LocalHandlers(
                    joined=tuple(compiled[id(spec)] for spec in specs if not spec.options.isolated),
                    isolated=tuple(compiled[id(spec)] for spec in specs if spec.options.isolated),
                )
                for kind, specs in examined.domain.items()
            }
        )

    def _stages(self, middlewares: Sequence[Any]) -> tuple[Stage, ...]:
        """The order around every handler, the outermost first. A snapshot test keeps it.

        Retries lie outside the transaction: every attempt has its own. The inbox row is written first in it; domain
        events are handled last in it, by the transaction stage itself.
        """
        store = self.parts.store
        return (
            LoggingStage(self.parts.observers, self._configuration.clock),
            UserMiddlewares(middlewares),
            ConcurrencyStage(),
            RetriesStage(store.is_transient),
            TimeoutStage(),
            ScopeStage(),
            self._transaction,
            InboxStage(store.inbox),
        )

    def _middlewares(self) -> tuple[Any, ...]:
        return (*self._configuration.middlewares, *self.parts.snapshot.middlewares)

    async def _middleware(self, middleware: Any, values: AppValues) -> Any:
        """A middleware class is made once; it may ask for app-scoped dependencies."""
        if not isinstance(middleware, type):
            return middleware
        where = source_place(middleware)
        parameters, _ = read_signature(_signed(middleware), where, skip_self=True)
        graph = self.parts.graphs.draw(parameters, where, app_scope=True)
        if graph.faults:
            raise StartupError(f"{where} cannot be made.", graph.faults)
        return await values.call(middleware, graph)

    def _plan(self, spec: HandlerSpec, stages: Sequence[Stage], values: AppValues) -> Plan:
        drawn = self.parts.examined.graphs_of(spec)
        resources = self.parts.store.resources
        compiled = compile_call(
            spec,
            drawn,
            values,
            sync_on_transaction=spec.style == "sync" and any(resources[kind] for kind in drawn.resources),
            limiter=self._limiter,
        )
        handling = self._handling(spec)
        own, order = compose(stages, handling, compiled.call)
        joined, _ = compose(stages, replace(handling, joined=True, consumed=False), compiled.call)
        consumer = f"{self._service}.{spec.name}" if handling.consumed else None
        return Plan(
            spec=spec,
            origin=self._origin(spec.kind, spec.name, consumer),
            own=own,
            joined=joined,
            order=order,
            source=compiled.source,
            bare=compiled.bare if order == (self._transaction.name,) and not handling.uses_resources else None,
            conclude=self._transaction.conclude,
            abandon=self._transaction.abandon,
        )

    def _handling(self, spec: HandlerSpec) -> Handling:
        drawn = self.parts.examined.graphs_of(spec)
        return Handling(
            spec=spec,
            consumed=spec in self._consumed_specs(),
            uses_resources=bool(drawn.resources),
            cleans_up=drawn.cleans_up,
        )

    def _consumed_specs(self) -> list[HandlerSpec]:
        return [spec for specs in self.parts.examined.consumers.values() for spec in specs]

    def _origin(self, kind: str, handler: str, consumer: str | None) -> Origin:
        begin: Callable[[], Awaitable[Transaction]] = self.parts.store.begin
        if kind == "query":
            begin = partial(self.parts.store.begin, read_only=True)
        return Origin(
            app=self._app_token,
            kind=kind,
            handler=handler,
            take_event=self._emitter.take,
            begin=begin,
            consumer=consumer,
        )

    def _wake_relay(self) -> None:
        if self.relay is not None:
            self.relay.wake()

    # --- drain and stop ------------------------------------------------------------------------------------------

    async def drain(self, timeout: float) -> Drained:
        async with self._loops_for_a_while():
            relay, worker = self.relay, self.worker
            if relay is None or worker is None:
                raise AssertionError("drain without loops")
            before = Drained(published=relay.published, handled=worker.handled)
            seen = len(worker.parked), len(relay.parked)
            with anyio.fail_after(timeout):
                await self._until_quiet(relay, worker)
            return Drained(
                published=relay.published - before.published,
                handled=worker.handled - before.handled,
                parked=[*relay.parked[seen[1] :], *worker.parked[seen[0] :]],
            )

    async def _until_quiet(self, relay: Relay, worker: Worker) -> None:
        quiet = 0
        relay.wake()
        while quiet < _QUIET_AFTER:
            await anyio.sleep(0.01)  # real time: under a clock that a test moves this must go on
            quiet = quiet + 1 if await self._is_quiet(relay, worker) else 0

    async def _is_quiet(self, relay: Relay, worker: Worker) -> bool:
        if not relay.idle or not worker.idle or not worker.subscribed:
            return False
        pending = (await self.parts.store.outbox.backlog()).pending
        return pending == 0 and await worker.backlog() == 0 and worker.idle and relay.idle

    @asynccontextmanager
    async def _loops_for_a_while(self) -> AsyncGenerator[None, None]:
        extra = [name for name in ("worker", "relay") if name not in self._loops]
        try:
            if extra:
                await self.start_loops("all")
            yield
        finally:
            for name in extra:
                await self._stop_loop(name, self._settings.drain_limit_s)

    async def finish_what_only_memory_holds(self) -> None:
        """What a durable store holds is there after a restart; what memory holds would be gone."""
        if self.relay is None or self.worker is None or self.parts.store.card.durable:
            return
        with anyio.move_on_after(min(self._settings.drain_limit_s, _LAST_MOMENT_S)):
            await self._until_quiet(self.relay, self.worker)

    async def stop_loops(self) -> None:
        """The worker first: what it still emits, the relay may still publish. The limit is for both together, but the
        relay gets a moment to settle what flies.
        """
        clock = self._configuration.clock
        ends_at = clock.elapsed() + self._settings.drain_limit_s
        for name in ("worker", "relay"):
            await self._stop_loop(name, max(ends_at - clock.elapsed(), min(1.0, self._settings.drain_limit_s)))

    async def _stop_loop(self, name: str, limit_s: float) -> None:
        loop = self._loops.pop(name, None)
        if loop is None:
            return
        part: Relay | Worker | None = self.worker if name == "worker" else self.relay
        if part is not None:
            part.stop()
        await loop.finish(limit_s)
        if name == "worker":
            self.worker = None
        else:
            self.relay = None

    async def close(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._stack.aclose()


async def _nothing(message: Any, context: MessageContext) -> None:
    """Stands where the handler would be called."""
