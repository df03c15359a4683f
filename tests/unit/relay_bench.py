"""A relay between an outbox and a broker of the test's, on a clock of the test's."""

import asyncio
import inspect
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import anyio
import anyio.abc
import anyio.lowlevel

from cqrs_decor import Envelope, Moment, Retry
from cqrs_decor.errors import BrokerError, BrokerUnavailableError, RecordRejectedError, StoreUnavailableError
from cqrs_decor.memory import MemoryBroker, MemoryStore
from cqrs_decor.observers import Observers
from cqrs_decor.outbox import OutboxFilter, OutboxStore, StoredRecord
from cqrs_decor.relay import Relay
from cqrs_decor.testing import FakeClock
from tests.unit.apps import eventually

LEASE = timedelta(seconds=15)
HOURS = Retry(max_attempts=3, first_delay=timedelta(hours=1), max_delay=timedelta(hours=1), jitter=0)


class MoodyBroker(MemoryBroker):
    """Refuses what it is told to refuse, is away when it is told to be, and waits at its gate before each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.refusals: Counter[str] = Counter()
        self.down = False
        self.calls = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.reached: list[str] = []

    async def publish(self, envelopes: Sequence[Envelope]) -> Sequence[BrokerError | None]:
        self.calls += 1
        await self.gate.wait()
        if self.down:
            raise BrokerUnavailableError(self.name, "down")
        refused: set[str | None] = set()
        return [self._outcome(envelope, refused) for envelope in envelopes]

    def _outcome(self, envelope: Envelope, refused: set[str | None]) -> BrokerError | None:
        if envelope.key is not None and envelope.key in refused:
            return RecordRejectedError(self.name, envelope.topic, "an earlier record of its key was refused")
        if self.refusals[envelope.id] > 0:
            self.refusals[envelope.id] -= 1
            refused.add(envelope.key)
            return RecordRejectedError(self.name, envelope.topic, "not today")
        self.reached.append(envelope.id)
        return None


class Recorder:
    """Keeps every moment."""

    def __init__(self) -> None:
        self.moments: list[Moment] = []

    def notice(self, moment: Moment) -> None:
        self.moments.append(moment)

    def of(self, kind: type[Any]) -> list[Any]:
        return [moment for moment in self.moments if isinstance(moment, kind)]


class Bench:
    """A relay on its own, between an outbox and a broker of the test's."""

    def __init__(self, *, retry: Retry = HOURS, batch: int = 500) -> None:
        self.clock = FakeClock()
        self.store = MemoryStore(clock=self.clock)
        self.broker = MoodyBroker()
        self.recorder = Recorder()
        self.relay = Relay(
            self.store.outbox,
            self.broker,
            lease=LEASE,
            batch=batch,
            poll_interval_s=0.001,
            clock=self.clock,
            observers=Observers([self.recorder]),
            retry=retry,
        )

    async def commit(self, *ids: str) -> None:
        """One transaction with a record for each id; the letter is the key."""
        transaction = await self.store.begin()
        transaction.add([record(each) for each in ids])
        await transaction.commit()
        self.relay.wake()

    async def records(self) -> Sequence[StoredRecord]:
        return await self.store.outbox.find(OutboxFilter())

    async def states(self) -> dict[str, str]:
        return {each.envelope.id: each.state for each in await self.records()}

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.relay.run)
            try:
                yield
            finally:
                tasks.cancel_scope.cancel()

    async def idle(self) -> None:
        """Until the relay has looked and found nothing that is due."""
        self.relay.wake()
        await eventually(lambda: self.relay.idle)


def record(name: str) -> Envelope:
    return Envelope(
        id=name,
        source="shop",
        type="relay.told",
        topic="told",
        key=None if name.startswith("-") else name[0],
        data=b"{}",
        time=datetime(2024, 1, 1, tzinfo=UTC),
    )


def of_key(key: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if name.startswith(key)]


async def pass_time(clock: FakeClock, seconds: float, *, step: float = 0.25) -> None:
    """Let time pass in small steps, and everybody act after each: as real time does."""
    for _ in range(round(seconds / step)):
        await act()
        clock.advance(timedelta(seconds=step))
    await act()


async def act() -> None:
    """Let everybody go on until they wait for time or for the test."""
    for _ in range(100):
        await anyio.lowlevel.checkpoint()


class Link:
    """One relay's connection to an outbox that others use as well: its calls are counted, and it can be cut."""

    def __init__(self, outbox: OutboxStore) -> None:
        self.calls: Counter[str] = Counter()
        self.is_cut = False
        self._outbox = outbox

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._outbox, name)
        if not inspect.iscoroutinefunction(attribute):
            return attribute

        async def call(*arguments: Any, **options: Any) -> Any:
            self.calls[name] += 1
            if self.is_cut:
                raise StoreUnavailableError("memory", "the link is cut")
            return await attribute(*arguments, **options)

        return call


class Node:
    """One of several relays on an outbox. It can be killed: it then gives nothing back."""

    def __init__(self, bench: Bench, *, broker: MemoryBroker | None = None, batch: int = 500) -> None:
        self.link = Link(bench.store.outbox)
        self.recorder = Recorder()
        self.relay = Relay(
            cast("OutboxStore", self.link),
            broker or bench.broker,
            lease=LEASE,
            batch=batch,
            poll_interval_s=0.5,
            clock=bench.clock,
            observers=Observers([self.recorder]),
            retry=HOURS,
        )
        self._scope = anyio.CancelScope()
        self._ended = anyio.Event()

    @property
    def held(self) -> int:
        return self.relay.lanes_held

    async def run(self) -> None:
        with self._scope:
            await self.relay.run()
        self._ended.set()

    async def kill(self) -> None:
        """As SIGKILL: nothing of what it holds is given back."""
        self.link.is_cut = True
        self._scope.cancel()
        await self._ended.wait()

    async def stop(self) -> None:
        self.relay.stop()
        await self._ended.wait()


@asynccontextmanager
async def running(*nodes: Node) -> AsyncGenerator[anyio.abc.TaskGroup, None]:
    """Run these relays; more can be started in the task group."""
    async with anyio.create_task_group() as tasks:
        for node in nodes:
            tasks.start_soon(node.run)
        try:
            yield tasks
        finally:
            tasks.cancel_scope.cancel()
