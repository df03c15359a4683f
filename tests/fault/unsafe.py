"""Protections switched off, one at a time. A check that finds nothing wrong with these is no check."""

import random
from collections.abc import Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from cqrs_decor.codec import JsonCodec
from cqrs_decor.envelope import Envelope
from cqrs_decor.lanes import HeldLane
from cqrs_decor.outbox import ClaimedRecord, Settlement

WAYS = ("settle-first", "no-inbox", "acknowledge-first", "publish-directly", "no-order")


def store(way: str | None, store: Any) -> Any:
    if way == "settle-first":
        store.outbox = SettlesFirst(store.outbox)
    if way == "no-inbox":
        store.inbox = RemembersNothing(store.inbox)
    return store


def broker(way: str | None, broker: Any) -> Any:
    if way == "acknowledge-first":
        return AcknowledgesFirst(broker)
    if way == "no-order":
        return ShufflesBatches(broker)
    return broker


def publish_directly(way: str | None, broker: Any) -> "PublishDirectly":
    return PublishDirectly(broker, wanted=way == "publish-directly")


@dataclass
class _Instead:
    """Like what it stands in front of, but for what a subclass changes."""

    real: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class SettlesFirst(_Instead):
    """A relay that takes a record out of the outbox before the broker has it."""

    async def claim(self, lanes: Sequence[HeldLane], limit: int, **more: Any) -> Sequence[ClaimedRecord]:
        claimed = await self.real.claim(lanes, limit, **more)
        ours = [lane for lane in lanes if lane.number in {record.lane for record in claimed}]
        if claimed:
            await self.real.settle(Settlement(lanes=ours, delivered=claimed))
        return claimed

    async def settle(self, settlement: Settlement) -> None:
        """It has been settled."""


class RemembersNothing(_Instead):
    """An inbox that takes every message for a new one."""

    async def record(self, *_: Any) -> bool:
        return True


class AcknowledgesFirst(_Instead):
    """A worker that acknowledges what it has received, not what it has done."""

    @asynccontextmanager
    async def subscribe(self, *arguments: Any, **more: Any) -> Any:
        async with self.real.subscribe(*arguments, **more) as subscription:
            yield _AcknowledgesAtOnce(subscription)


class _AcknowledgesAtOnce(_Instead):
    async def receive(self, *arguments: Any) -> Any:
        deliveries = await self.real.receive(*arguments)
        if deliveries:
            await self.real.ack(deliveries)
        return deliveries

    async def ack(self, deliveries: Any) -> None:
        """It has been acknowledged."""


class ShufflesBatches(_Instead):
    """A relay that does not care for the order of a batch."""

    async def publish(self, envelopes: Sequence[Envelope]) -> Any:
        shuffled = list(envelopes)
        random.Random(len(shuffled)).shuffle(shuffled)
        return await self.real.publish(shuffled)


@dataclass
class PublishDirectly:
    """The dual write: to the broker from inside a transaction that has not been committed."""

    broker: Any
    wanted: bool

    async def __call__(self, event: Any, topic: str, key: str) -> None:
        envelope = Envelope(
            id=str(uuid4()),
            source="unsafe",
            type="fault.written",
            topic=topic,
            key=key,
            data=JsonCodec().encode(event),
            time=datetime.now(UTC),
        )
        await self.broker.publish([envelope])
