"""One simulated process: an app of its own, with its own clocks and lines, that can be killed at any step."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, Literal

import anyio

from cqrs_decor import App, Settings, bootstrap
from cqrs_decor.context import MessageContext
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import CqrsDecorError
from cqrs_decor.memory import MemoryBroker, MemoryStore
from tests.simulation.chance import Chance
from tests.simulation.line import Line, Server
from tests.simulation.loop import Owner, VirtualLoop, current_owner
from tests.simulation.models import WatchedInbox
from tests.simulation.oracle import Oracle
from tests.simulation.remote import RemoteBroker, RemoteStore, broker_away, store_away
from tests.simulation.shop import SERVICE, Write, registry

Kind = Literal["relay", "worker", "producer"]

EPOCH = datetime(2024, 2, 29, 12, 0, 0, tzinfo=UTC)


class FlakyError(Exception):
    """A handler failed; another try may pass."""


class RaisingError(Exception):
    """A handler fails, until an operator has mended the cause."""


class SkewedClock:
    """The clocks of one machine: elapsed time begins anywhere, and the wall clock is wrong by minutes."""

    def __init__(self, loop: VirtualLoop, random: Random) -> None:
        self._loop = loop
        self._began = random.random() * 1e6
        self.skew = timedelta(seconds=random.uniform(-300, 300))

    def now(self) -> datetime:
        return EPOCH + self.skew + timedelta(seconds=self._loop.time())

    def elapsed(self) -> float:
        return self._began + self._loop.time()

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)


@dataclass(slots=True, kw_only=True)
class Surroundings:
    """What all processes of a run share.

    Attributes:
        note: Keeps who did what, and how it went, for the trace.
        gone: Told of a process that has ended, however it did.
        mended: Whether operators have mended the causes of what fails always.
        remote_broker: How processes see the broker.
    """

    loop: VirtualLoop
    chance: Chance
    oracle: Oracle
    store: MemoryStore
    inbox: WatchedInbox
    broker: MemoryBroker
    database: Server
    cluster: Server
    settings: Settings
    note: Callable[[str, str, str], None]
    gone: Callable[["Process"], None]
    mended: bool = False
    remote_broker: type[RemoteBroker] = RemoteBroker


class Process(Owner):
    """Lives from `begin` until it is killed, or has stopped when it was told to.

    Args:
        kind: Which loops it runs; a producer none.
    """

    def __init__(self, kind: Kind, name: str, around: Surroundings) -> None:
        super().__init__(name)
        self.kind: Kind = kind
        self.around = around
        self.clock = SkewedClock(around.loop, around.chance.random)
        patience_s = around.settings.lease_s
        self.to_store = Line(self, around.database, error=store_away, patience_s=patience_s)
        self.to_broker = Line(self, around.cluster, error=broker_away, patience_s=patience_s)
        self.store = RemoteStore(self.to_store, around.database, around.store)
        self.broker = around.remote_broker(
            self.to_broker, around.cluster, around.broker, self, self, patience_s=patience_s
        )
        self.app: App | None = None
        self._marks_as: str | None = None
        self._told_to_stop = asyncio.Event()
        self._context = self._own_context()

    def _own_context(self) -> Context:
        context = copy_context()
        context.run(current_owner.set, self)
        return context

    # --- life and death ---------------------------------------------------------------------------------------------

    def begin(self) -> None:
        self.start(self._live)

    def start(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> asyncio.Task[Any] | None:
        """Run something in this process; None if there is none any more."""
        if self.dead:
            return None
        return self._context.run(lambda: self.around.loop.create_task(work()))

    async def _live(self) -> None:
        app = bootstrap(
            registry=registry,
            discover=False,
            service=SERVICE,
            run="none" if self.kind == "producer" else self.kind,
            database=self.store,
            broker=self.broker,
            settings=self.around.settings,
        ).configured(clock=self.clock)
        try:
            async with app:
                self.app = app
                self._marks_as = None if app.worker is None else app.worker.owner
                await self._told_to_stop.wait()
        except CqrsDecorError as error:
            self.around.note(self.name, "did not start", type(error).__name__)
        self.around.gone(self)

    def stop(self) -> None:
        """SIGTERM."""
        self.around.note(self.name, "told to stop", "")
        self._told_to_stop.set()

    def kill(self, why: str) -> None:
        """SIGKILL: no step of it runs any more, no call of it is made; what was sent is on its way."""
        if self.dead:
            return
        self.dead = True
        self.around.note(self.name, "killed", why)
        if self._marks_as is not None:
            self.around.inbox.killed.add(self._marks_as)
        self.store.abandon()
        self.broker.abandon()
        self.around.gone(self)

    def bury(self) -> None:
        self.around.loop.bury(self, self._context)

    # --- as its broker's, its handlers' and its observers' counterpart -----------------------------------------------

    def refuses(self, envelope: Envelope) -> bool:
        """Whether the broker does not take a record."""
        if b'"refused"' in envelope.data and not self.around.mended:
            return True
        return self.around.chance.happens("refused")

    def killer_among(self, envelopes: Sequence[Envelope]) -> int | None:
        """The place of the first record that whoever publishes it dies of."""
        if self.around.mended or not self.around.chance.odds.killing_relays:
            return None
        return next((n for n, each in enumerate(envelopes) if b'"kills relays"' in each.data), None)

    def die_of(self, envelope: Envelope) -> None:
        self.around.oracle.kill(envelope.id)
        self.kill(f"of {envelope.id}")

    def landed(self, envelope: Envelope) -> None:
        self.around.oracle.land(envelope)

    async def run(self, context: MessageContext, nature: str) -> None:
        """What may happen to a handler."""
        if nature != "plain" and not self.around.mended:
            if nature == "raises":
                raise RaisingError
            if nature == "kills workers" and context.envelope is not None:
                self.die_of(context.envelope)
                await self.around.loop.create_future()
        if self.around.chance.happens("flaky"):
            raise FlakyError

    def take_effect(self, consumer: str, envelope: Envelope) -> None:
        self.around.oracle.take_effect(consumer, envelope)

    async def write(self, aggregate: str, natures: tuple[str, ...]) -> bool:
        """A command; whether it certainly was committed."""
        assert self.app is not None
        try:
            await self.app.send(Write(aggregate=aggregate, natures=natures))
        except (CqrsDecorError, FlakyError):
            return False
        return True
