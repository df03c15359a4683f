"""A shop whose worker runs in memory, on a broker to which the test publishes."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import anyio

from cqrs_decor import App, Envelope, IntegrationEvent, Registry, Retry
from cqrs_decor.inbox import InboxFilter, ParkedMessage
from cqrs_decor.memory import MemoryBroker, MemoryStore
from cqrs_decor.observers import Moment
from cqrs_decor.testing import FakeClock
from cqrs_decor.worker import Worker
from tests.unit.apps import app_of, eventually

T = TypeVar("T")

HOURS = Retry(max_attempts=3, first_delay=timedelta(hours=1), max_delay=timedelta(hours=1), jitter=0)


class Paid(IntegrationEvent, topic="payments", key="order", name="worker.paid"):
    order: str
    amount: int = 1


class Refunded(IntegrationEvent, topic="payments", key="order", name="worker.refunded"):
    """Declared here, handled by nobody."""

    order: str


def paid(order: str = "a", *, amount: int = 1, **attributes: Any) -> Envelope:
    envelope = Envelope(
        id=f"paid-{order}-{amount}",
        source="till",
        type="worker.paid",
        topic="payments",
        key=order,
        data=Paid(order=order, amount=amount).model_dump_json().encode(),
        time=datetime(2024, 1, 1, tzinfo=UTC),
    )
    return replace(envelope, **attributes)


class Shop:
    """An app whose worker runs, on a broker to which the test publishes."""

    def __init__(self, app: App, broker: MemoryBroker, store: MemoryStore, clock: FakeClock) -> None:
        self.app, self.broker, self.store, self.clock = app, broker, store, clock

    async def receive(self, *envelopes: Envelope) -> None:
        """Publish, and wait until the worker is through with it all."""
        await self.broker.publish(envelopes)
        await self.settled()

    async def settled(self) -> None:
        worker = self.worker
        with anyio.fail_after(10):
            while not (worker.subscribed and await worker.backlog() == 0 and worker.idle):  # noqa: ASYNC110 - the worker sets no event for it
                await anyio.sleep(0.001)

    @property
    def worker(self) -> Worker:
        assert self.app.worker is not None
        return self.app.worker

    async def parked(self) -> Sequence[ParkedMessage]:
        return await self.store.inbox.find(InboxFilter())

    async def ask_for_all(self) -> None:
        """As an operator does who has mended something."""
        await self.store.inbox.retry([parked.id for parked in await self.parked()], who="test")

    async def until_waiting(self, delay: timedelta, times: int = 1) -> None:
        """Until so many consumers wait for their next attempt."""
        await eventually(lambda: self.clock.waits.count(delay) == times)


@asynccontextmanager
async def shop_with(
    registry: Registry, *, broker: MemoryBroker | None = None, store: MemoryStore | None = None, **options: Any
) -> AsyncGenerator[Shop, None]:
    clock = FakeClock()
    broker, store = broker or MemoryBroker(), store or MemoryStore(clock=clock)
    app = app_of(registry, clock=clock, broker=broker, database=store, **{"run": "worker", **options})
    async with app:
        yield Shop(app, broker, store, clock)


def ledger(**options: Any) -> tuple[Registry, list[str]]:
    """A registry with one consumer that writes down what it got."""
    sales, seen = Registry("sales"), list[str]()

    @sales.event_handler(name="book", **options)
    async def book(event: Paid) -> None:
        seen.append(f"{event.order}{event.amount}")

    return sales, seen


async def advance_until(shop: Shop, holds: Any) -> None:
    """Let the two seconds pass, again and again, after which a worker looks for what operators want retried."""
    with anyio.fail_after(10):
        while not holds():
            shop.clock.advance(timedelta(seconds=2))
            await anyio.sleep(0.001)


async def advance_until_none_parked(shop: Shop) -> None:
    with anyio.fail_after(10):
        while await shop.parked():
            shop.clock.advance(timedelta(seconds=2))
            await anyio.sleep(0.001)


class Moments:
    """Writes down what the app says of itself."""

    def __init__(self) -> None:
        self.all: list[Moment] = []

    def notice(self, moment: Moment) -> None:
        self.all.append(moment)

    def of(self, kind: type[T]) -> list[T]:
        return [moment for moment in self.all if isinstance(moment, kind)]
