"""One run of an app: plans compiled, parts connected, loops kept running, all of it closed again."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import anyio

from cqrs_decor._loop import Turns
from cqrs_decor.assembly import Configuration, Hook, Parts, Run, signed
from cqrs_decor.checks import fitting_concurrency
from cqrs_decor.codec import Codec, JsonCodec
from cqrs_decor.context import MessageContext, Origin
from cqrs_decor.dependencies import AppValues
from cqrs_decor.dispatch import compile_call
from cqrs_decor.errors import (
    StartupError,
    TopicMissingError,
)
from cqrs_decor.events import Emitter, LocalEvents, LocalHandlers
from cqrs_decor.handlers import HandlerSpec, read_signature, source_place
from cqrs_decor.housekeeping import CleansUp, Housekeeping, retention_of
from cqrs_decor.inbox import InboxStage
from cqrs_decor.outbox import Drained, OutboxWriter
from cqrs_decor.pipeline import Handling, Plan, Stage, UserMiddlewares, compose
from cqrs_decor.relay import Relay
from cqrs_decor.stages.concurrency import ConcurrencyStage
from cqrs_decor.stages.idempotency import IdempotencyStage, UnknownCommitStage
from cqrs_decor.stages.logging import LoggingStage
from cqrs_decor.stages.retries import RetriesStage
from cqrs_decor.stages.scope import ScopeStage
from cqrs_decor.stages.timeout import TimeoutStage
from cqrs_decor.stages.transaction import TransactionStage
from cqrs_decor.supervision import Supervised
from cqrs_decor.unit_of_work import Transaction
from cqrs_decor.wakeups import WakeUpSender
from cqrs_decor.worker import Worker, WorkerLimits

_LAST_MOMENT_S = 2.0
"""So long an app in memory is given to finish what would be lost with it."""

_LOOPS = ("housekeeping", "worker", "relay")
"""In the order in which they are stopped: what the worker still emits, the relay may still publish."""

_QUIET_AFTER = 2
"""`drain` believes that all is quiet when it has looked so often and found nothing."""


class Running:
    """One run of an app, from start to stop."""

    def __init__(self, parts: Parts, configuration: Configuration) -> None:
        self.parts = parts
        self.commands: dict[type[Any], Plan] = {}
        self.queries: dict[type[Any], Plan] = {}
        self.plans: list[Plan] = []
        self.relay: Relay | None = None
        self.worker: Worker | None = None
        self._housekeeping: Housekeeping | None = None
        self._configuration = configuration
        self._settings = configuration.settings
        self._service = configuration.service or "app"
        self._consumers: dict[type[Any], list[Plan]] = {}
        self._stack = AsyncExitStack()
        self._values = AppValues(self._stack)
        self._broker_open = False
        self._codec: Codec = JsonCodec()
        self._loops: dict[str, Supervised] = {}
        self._waker: WakeUpSender | None = None
        self.writer = OutboxWriter(
            parts.examined.routes, self._codec, configuration.clock, self._service, self._wake_relay
        )
        self.events = LocalEvents(self._settings.max_event_depth)
        self._transaction = TransactionStage(self.events.drain)
        self._emitter = Emitter(self.writer)
        self._app_token = object()
        self._limiter = anyio.CapacityLimiter(40)
        self._store_turns = Turns()
        same_place = parts.broker.name == parts.store.name  # as the log of a store, which is away when the store is
        self._broker_turns = self._store_turns if same_place else Turns()
        self.block = self._origin("block", "app.unit_of_work", None)

    # --- start ---------------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        await self.parts.store.open()
        self._stack.push_async_callback(self.parts.store.close)
        wake_ups = self.parts.store.outbox.wake_ups
        if wake_ups is not None:
            self._waker = WakeUpSender(wake_ups, self._configuration.clock, self.parts.observers, self._store_turns)
            self._stack.push_async_callback(self._waker.close)
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
        if wanted != "none":
            await self._start_housekeeping()

    def _default_run(self) -> Run:
        in_memory = self._configuration.database is None and self._configuration.broker is None
        return "all" if in_memory else "none"

    async def _open_broker(self) -> None:
        if self._broker_open:
            return
        self._stack.push_async_callback(self.parts.broker.close)
        self.parts.broker.observers = self.parts.observers
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
                publish_timeout=self._settings.publish_timeout,
                keep_history=self._settings.history_days > 0,
                store_turns=self._store_turns,
                broker_turns=self._broker_turns,
            )
            self._loops["relay"] = await Supervised.start(
                "relay", self.relay.run, self._configuration.clock, self.parts.observers
            )

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
                    concurrency=fitting_concurrency(
                        self._settings, self.parts.store, beside_a_relay=self.relay is not None
                    ),
                    prefetch=self._settings.worker_prefetch,
                    batch=self._settings.worker_batch,
                    max_body_bytes=self._settings.max_body_bytes,
                    park_unknown=self._settings.unknown_events == "park",
                ),
                start=self._settings.start,
                clock=self._configuration.clock,
                observers=self.parts.observers,
                store_turns=self._store_turns,
                broker_turns=self._broker_turns,
            )
            self._loops["worker"] = await Supervised.start(
                "worker", self.worker.run, self._configuration.clock, self.parts.observers
            )

    async def _start_housekeeping(self) -> None:
        if self._housekeeping is None:
            store, broker, clock = self.parts.store, self.parts.broker, self._configuration.clock
            parts: list[CleansUp] = [store, broker] if isinstance(broker, CleansUp) else [store]
            self._housekeeping = Housekeeping(parts, retention_of(self._settings), clock, self.parts.observers)
            self._loops["housekeeping"] = await Supervised.start("housekeeping", self._housekeeping.run, clock)

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

        Retries lie outside the transaction: each attempt has its own. The inbox row or the idempotency key comes first
        in it; domain events are handled last in it, by the transaction stage itself.
        """
        store = self.parts.store
        return (
            LoggingStage(self.parts.observers, self._configuration.clock),
            UserMiddlewares(middlewares),
            ConcurrencyStage(),
            UnknownCommitStage(store.is_unavailable),
            RetriesStage(store.is_transient),
            TimeoutStage(),
            ScopeStage(),
            self._transaction,
            InboxStage(store.inbox),
            IdempotencyStage(store.idempotency, self._service, self._codec),
        )

    def _middlewares(self) -> tuple[Any, ...]:
        return (*self._configuration.middlewares, *self.parts.snapshot.middlewares)

    async def _middleware(self, middleware: Any, values: AppValues) -> Any:
        """A middleware class is made once; it may ask for app-scoped dependencies."""
        if not isinstance(middleware, type):
            return middleware
        where = source_place(middleware)
        parameters, _ = read_signature(signed(middleware), where, skip_self=True)
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
        batched, _ = compose(stages, replace(handling, joined=True, consumed=False, batched=True), compiled.call)
        with_key = replace(handling, keyed=spec.kind == "command")
        keyed, _ = compose(stages, with_key, compiled.call)
        keyed_joined, _ = compose(stages, replace(with_key, joined=True, consumed=False), compiled.call)
        consumer = f"{self._service}.{spec.name}" if handling.consumed else None
        return Plan(
            spec=spec,
            origin=self._origin(spec.kind, spec.name, consumer),
            own=own,
            joined=joined,
            batched=batched if spec.options.optimistic else None,
            keyed=keyed,
            keyed_joined=keyed_joined,
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
        """The relay of this process at once; those of others as well, unless this one holds every lane."""
        outbox = self.parts.store.outbox
        if self.relay is not None:
            self.relay.wake()
        if self._waker is not None and (self.relay is None or self.relay.lanes_held < outbox.lane_count):
            self._waker.wake()

    # --- drain and stop ------------------------------------------------------------------------------------------

    async def drain(self, timeout: float) -> Drained:
        async with self._loops_for_a_while():
            relay, worker = self.relay, self.worker
            if relay is None or worker is None:
                raise AssertionError("drain without loops")
            before = Drained(published=relay.published, handled=worker.handled)
            relay.parked.clear()
            worker.parked.clear()
            with anyio.fail_after(timeout):
                await self._until_quiet(relay, worker)
            return Drained(
                published=relay.published - before.published,
                handled=worker.handled - before.handled,
                parked=[*relay.parked, *worker.parked],
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
        extra = [name for name in _LOOPS if name not in self._loops]
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
        """The limit is for all together, but the relay gets a moment to settle what flies."""
        clock = self._configuration.clock
        ends_at = clock.elapsed() + self._settings.drain_limit_s
        for name in _LOOPS:
            await self._stop_loop(name, max(ends_at - clock.elapsed(), min(1.0, self._settings.drain_limit_s)))

    async def _stop_loop(self, name: str, limit_s: float) -> None:
        loop = self._loops.pop(name, None)
        if loop is None:
            return
        parts = {"worker": self.worker, "relay": self.relay, "housekeeping": self._housekeeping}
        part = parts[name]
        if part is not None:
            part.stop()
        await loop.finish(limit_s)
        if name == "worker":
            self.worker = None
        elif name == "relay":
            self.relay = None
        else:
            self._housekeeping = None

    async def close(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._stack.aclose()


async def _nothing(message: Any, context: MessageContext) -> None:
    """Stands where the handler would be called."""
