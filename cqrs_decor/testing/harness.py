"""The whole chain of an app in one test: its own handlers, on parts that are made for the test."""

from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

import anyio

from cqrs_decor.app import App
from cqrs_decor.assembly import Configuration
from cqrs_decor.broker import Broker
from cqrs_decor.clock import Clock, SystemClock
from cqrs_decor.codec import JsonCodec
from cqrs_decor.context import MessageContext
from cqrs_decor.envelope import Envelope
from cqrs_decor.memory import MemoryBroker, MemoryStore
from cqrs_decor.messages import Returns, integration_event_types, message_spec
from cqrs_decor.observers import Observers
from cqrs_decor.outbox import Drained, OutboxFilter, OutboxWriter
from cqrs_decor.pipeline import CallNext, Plan
from cqrs_decor.routing import Routes
from cqrs_decor.settings import Settings
from cqrs_decor.store import Store
from cqrs_decor.testing.clock import FakeClock
from cqrs_decor.testing.failures import NoSuchConsumerError, ParkedError
from cqrs_decor.testing.published import Published
from cqrs_decor.testing.temporary import temporary_store
from cqrs_decor.unit_of_work import UnitOfWork
from cqrs_decor.worker import Worker, WorkerLimits

R = TypeVar("R")

_LOOK_S = 0.002
_MANY = 100_000
_TEST_SETTINGS = {"poll_interval_s": 0.02, "drain_limit_s": 5.0}


class OpenApp(Protocol):
    """The type of the fixture `cqrs_app`, for annotations: `async with cqrs_app(shop.cqrs) as app:`."""

    def __call__(
        self,
        app: App,
        *,
        overrides: Mapping[Any, Any] | None = None,
        broker: Broker | None = None,
        database: Any = None,
        metadata: Any = None,
        clock: Clock | None = None,
        settings: Settings | None = None,
    ) -> AbstractAsyncContextManager["AppUnderTest"]:
        """Run `app` on parts of the test's own: a broker and a store in memory, or a temporary SQLite file where the
        app names a database. It is the very same object, so what imports it (a web application) works as well.

        Args:
            app: The application.
            overrides: Ready-made dependencies by type; they are there before anything is compiled.
            broker: One that several apps share, e.g. one `MemoryBroker()`.
            database: Instead of the temporary one: a URL, an engine, a sessionmaker or a store.
            metadata: The tables to make in the temporary database: a `MetaData` or a declarative base, or several.
            clock: Time as the test wants it. Without one, waits for the next attempt take no time.
            settings: Instead of the app's.
        """
        ...


class AppUnderTest:
    """An app that runs for a test. Its loops stand still: consumers run when the test says `drain` or `deliver`.

    Attributes:
        app: The application itself.
        published: What was committed to its outbox.
        clock: Its time.
    """

    def __init__(self, app: App, clock: Clock, watch: "_Watch", *, hurries: bool) -> None:
        self.app = app
        self.published = watch.published
        self.clock = clock
        self._watch = watch
        self._hurries = hurries

    @property
    def store(self) -> Store:
        """Its outbox and inbox, e.g. `await app.store.inbox.find(InboxFilter())`."""
        return self.app.store

    @property
    def broker(self) -> Broker:
        """What its relay publishes to."""
        return self.app.broker

    async def send(self, command: Returns[R], session: object | None = None, idempotency_key: str | None = None) -> R:
        """`App.send`."""
        return await self.app.send(command, session, idempotency_key=idempotency_key)

    async def ask(self, query: Returns[R]) -> R:
        """`App.ask`."""
        return await self.app.ask(query)

    async def publish(self, event: Any) -> None:
        """`App.publish`."""
        await self.app.publish(event)
        await self._watch.look()

    @asynccontextmanager
    async def unit_of_work(self) -> AsyncGenerator[UnitOfWork, None]:
        """`App.unit_of_work`: a transaction in which `emit` works, e.g. to put rows where a test needs them."""
        async with self.app.unit_of_work() as unit_of_work:
            yield unit_of_work
        await self._watch.look()

    async def drain(self, timeout: float = 30.0) -> Drained:
        """Relay and consume until nothing is left to do.

        Args:
            timeout: In seconds of real time.

        Raises:
            ParkedError: Messages were parked, with what their handlers raised as its cause.
            TimeoutError: There was still something to do.
        """
        await self._watch.look()
        async with self._hurrying():
            drained = await self.app.drain(timeout)
        self._raise_parked(drained.parked)
        return drained

    async def deliver(
        self,
        event: Any,
        *,
        message_id: str | None = None,
        source: str = "test",
        headers: Mapping[str, str] | None = None,
        timeout: float = 30.0,
    ) -> int:
        """Hand one message to its consumers as the worker would: decoded from bytes, deduplicated, retried, parked.

        Args:
            event: An integration event, or an `Envelope` with anything in it.
            message_id: Deliver the same id twice to see that effects happen once; a new one if it is left out.
            source: The service that is said to have sent it.
            headers: What travels with it.
            timeout: In seconds of real time.

        Returns:
            How many consumers ran; those that had the message before do not count.

        Raises:
            NoSuchConsumerError: This app consumes nothing of that topic.
            ParkedError: A consumer gave up, with what it raised as its cause.
            TimeoutError: They were not through.
        """
        broker = MemoryBroker()
        worker = self._worker_on(broker)
        envelope = self._envelope(event, message_id, source, headers)
        if envelope.topic not in worker.topics:
            raise NoSuchConsumerError(envelope.topic, envelope.type, worker.topics)
        await broker.publish([envelope])
        with anyio.fail_after(timeout):
            async with self._hurrying(), anyio.create_task_group() as tasks:
                tasks.start_soon(worker.run)
                while not await _is_through(worker):  # noqa: ASYNC110 - the worker sets no event for it
                    await anyio.sleep(_LOOK_S)
                tasks.cancel_scope.cancel()
        await self._watch.look()
        self._raise_parked(worker.parked)
        return worker.handled

    def _envelope(self, event: Any, message_id: str | None, source: str, headers: Mapping[str, str] | None) -> Envelope:
        if isinstance(event, Envelope):
            return event
        writer = OutboxWriter(Routes(), JsonCodec(), self.clock, source, _nobody_to_wake)
        envelope = writer.envelope(event)
        return replace(envelope, id=message_id or envelope.id, headers=dict(headers or {}))

    def _worker_on(self, broker: Broker) -> Worker:
        consumers = _consumers(self.app.plans)
        settings = self.app.settings
        codec = JsonCodec()
        return Worker(
            self.app.service,
            broker,
            self.app.store,
            consumers,
            Routes(handled=consumers, declared=integration_event_types()),
            {codec.content_type: codec},
            limits=WorkerLimits(
                concurrency=settings.worker_concurrency,
                prefetch=settings.worker_prefetch,
                max_body_bytes=settings.max_body_bytes,
                park_unknown=settings.unknown_events == "park",
            ),
            start="earliest",
            clock=self.clock,
            observers=Observers(),
        )

    def _raise_parked(self, parked: Sequence[str]) -> None:
        failures = self._watch.take_failures()
        if parked:
            raise ParkedError(parked).caused_by(failures)

    @asynccontextmanager
    async def _hurrying(self) -> AsyncGenerator[None, None]:
        """Let whoever waits for a time wait no longer than a moment, unless the test has brought a clock of its own."""
        if not self._hurries or not isinstance(self.clock, FakeClock):
            yield
            return
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_hurry, self.clock)
            yield
            tasks.cancel_scope.cancel()


@dataclass(slots=True)
class _Watch:
    """Sees what the app commits and what its consumers raise: the outermost middleware of the app under test."""

    published: Published = field(default_factory=Published)
    app: App | None = None
    _known: set[int] = field(default_factory=set[int])
    _failures: dict[tuple[str, str], Exception] = field(default_factory=dict[tuple[str, str], Exception])

    async def begin(self, app: App) -> None:
        """What lies in the outbox already, on real parts, is not of this test."""
        self.app = app
        self._known = {record.id for record in await app.store.outbox.find(OutboxFilter(limit=_MANY))}

    async def __call__(self, message: Any, call_next: CallNext) -> Any:
        context = MessageContext.current()
        try:
            result = await call_next(message)
        except Exception as error:
            if context.consumer is not None:
                self._failures[context.consumer, context.id] = error
            raise
        if context.parent is None:
            await self.look()
        return result

    async def look(self) -> None:
        """Note what was committed to the outbox since the last look."""
        if self.app is None:
            return
        records = await self.app.store.outbox.find(OutboxFilter(limit=_MANY))
        fresh = [record for record in records if record.id not in self._known]
        self._known.update(record.id for record in fresh)
        self.published.note(record.envelope for record in fresh if record.envelope.source == self.app.service)

    def take_failures(self) -> list[Exception]:
        """What the last attempt of each message raised."""
        failures, self._failures = list(self._failures.values()), {}
        return failures


def open_app_with(make_folder: Callable[[], Path], *, real: bool) -> OpenApp:
    """What the fixture gives.

    Args:
        make_folder: Makes the folder of a temporary database; called only if there is to be one.
        real: Run on the parts that the app itself names.
    """

    @asynccontextmanager
    async def open_app(
        app: App,
        *,
        overrides: Mapping[Any, Any] | None = None,
        broker: Broker | None = None,
        database: Any = None,
        metadata: Any = None,
        clock: Clock | None = None,
        settings: Settings | None = None,
    ) -> AsyncGenerator[AppUnderTest, None]:
        watch = _Watch()
        own = app.configuration
        time = clock or (SystemClock() if real else FakeClock(datetime.now(UTC)))
        changes: dict[str, Any] = {
            "middlewares": (watch, *own.middlewares),
            "clock": time,
            "run": "none",
            "settings": (settings or own.settings).model_copy(update=_TEST_SETTINGS),
        }
        async with AsyncExitStack() as stack:
            if not real:
                changes["broker"] = MemoryBroker() if broker is None else broker
                changes["database"] = await _database(stack, own, database, metadata, make_folder, time)
            await stack.enter_async_context(app.running_as(overrides=overrides, **changes))
            await watch.begin(app)
            yield AppUnderTest(app, time, watch, hurries=clock is None)

    return open_app


async def _database(
    stack: AsyncExitStack, own: Configuration, given: Any, metadata: Any, make_folder: Callable[[], Path], clock: Clock
) -> Any:
    if given is not None:
        return given
    if metadata is None and _is_in_memory(own.database):
        return MemoryStore(clock=clock)
    return await stack.enter_async_context(temporary_store(own.database, make_folder(), metadata))


def _is_in_memory(database: Any) -> bool:
    return database is None or isinstance(database, MemoryStore) or str(database).startswith("memory:")


async def _is_through(worker: Worker) -> bool:
    return worker.subscribed and await worker.backlog() == 0 and worker.idle


async def _hurry(clock: FakeClock) -> None:
    while True:
        await anyio.sleep(_LOOK_S)
        clock.advance_to_last()


def _consumers(plans: Any) -> dict[type[Any], list[Plan]]:
    by_type: dict[type[Any], list[Plan]] = defaultdict(list)
    for plan in plans:
        for message_type in plan.spec.message_types if plan.origin.consumer else ():
            if message_spec(message_type).leaves_the_process:
                by_type[message_type].append(plan)
    return dict(by_type)


def _nobody_to_wake() -> None:
    """What is delivered needs no relay."""
