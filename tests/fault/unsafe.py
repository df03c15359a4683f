"""Protections switched off, one at a time. A check that finds nothing wrong with these is no check."""

import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import uuid4

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from cqrs_decor.codec import JsonCodec
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import BrokerUnavailableError, LaneLostError
from cqrs_decor.inbox import Noted
from cqrs_decor.lanes import HeldLane, Renewal
from cqrs_decor.outbox import ClaimedRecord, Settlement

T = TypeVar("T")


def store(way: str | None, store: Any) -> Any:
    if way in _OUTBOXES:
        store.outbox = _OUTBOXES[way](store.outbox)
    if way in _INBOXES:
        store.inbox = _INBOXES[way](store.inbox)
    return store


def broker(way: str | None, broker: Any) -> Any:
    return _BROKERS[way](broker) if way in _BROKERS else broker


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

    async def record(self, *_: Any) -> Noted:
        return Noted.NEW


class ParksNothing(_Instead):
    """A worker that throws away what it cannot handle."""

    async def park(self, *_: Any) -> bool:
        return True


class KeepsWhatWasRetried(_Instead):
    """A worker that does not take a parked message out when it handles it."""

    async def unpark(self, *_: Any) -> bool:
        return True


class HasNoFences(_Instead):
    """An outbox that takes every relay at its word, and gives it every lane that it asks for."""

    async def acquire(self, *arguments: Any, **more: Any) -> Any:
        await _run(self.real, "UPDATE cqrs_outbox_lane SET owner = NULL, lease_until = NULL")
        return await self.real.acquire(*arguments, **more)

    async def renew(self, owner: str, lanes: Sequence[HeldLane], lease: Any) -> Renewal:
        renewal = await self.real.renew(owner, lanes, lease)
        return replace(renewal, held=lanes, relays=1)

    async def claim(self, lanes: Sequence[HeldLane], limit: int, **more: Any) -> Sequence[ClaimedRecord]:
        return await self._whoever_holds(lanes, lambda held: self.real.claim(held, limit, **more))

    async def settle(self, settlement: Settlement) -> None:
        await self._whoever_holds(settlement.lanes, lambda held: self.real.settle(replace(settlement, lanes=held)))

    async def _whoever_holds(self, lanes: Sequence[HeldLane], act: Callable[[list[HeldLane]], Awaitable[T]]) -> T:
        """Act in the name of whoever holds the lanes; again if that has changed meanwhile."""
        while True:
            with suppress(LaneLostError):
                return await act(await self._as_if_held(lanes))

    async def _as_if_held(self, lanes: Sequence[HeldLane]) -> list[HeldLane]:
        fences = dict(await _run(self.real, "SELECT lane, fence FROM cqrs_outbox_lane"))
        return [HeldLane(lane.number, fences[lane.number]) for lane in lanes]


class TrustsItsOwnClock(_Instead):
    """A relay whose clock is fast, and that goes by it: leases of others have ended before they have."""

    async def acquire(self, owner: str, *arguments: Any, **more: Any) -> Any:
        await _run(self.real, f"UPDATE cqrs_outbox_lane SET lease_until = NULL, owner = NULL WHERE owner <> '{owner}'")
        return await self.real.acquire(owner, *arguments, **more)


class HoldsNothingBack(_Instead):
    """A record that the broker refused does not hold back the later ones of its key."""

    async def settle(self, settlement: Settlement) -> None:
        await self.real.settle(settlement)
        if settlement.failed:
            await _run(self.real, "DELETE FROM cqrs_outbox_hold")


class PagesById(_Instead):
    """A relay that remembers how far it has come, as if rows were committed in the order of their ids."""

    def __init__(self, real: Any) -> None:
        super().__init__(real)
        self._read = 0

    async def claim(self, lanes: Sequence[HeldLane], limit: int, **more: Any) -> Sequence[ClaimedRecord]:
        claimed = [record for record in await self.real.claim(lanes, limit, **more) if record.id > self._read]
        self._read = max([self._read, *(record.id for record in claimed)])
        return claimed


async def _run(outbox: Any, statement: str) -> Sequence[Any]:
    async def work(connection: AsyncConnection) -> Sequence[Any]:
        result = await connection.execute(text(statement))
        return [tuple(row) for row in result] if result.returns_rows else []

    return await outbox._database.write(work)


class AcknowledgesFirst(_Instead):
    """A worker that acknowledges what it has received, not what it has done."""

    @asynccontextmanager
    async def subscribe(self, *arguments: Any, **more: Any) -> AsyncGenerator[Any]:
        async with self.real.subscribe(*arguments, **more) as subscription:
            yield _AcknowledgesAtOnce(subscription)


class _AcknowledgesAtOnce(_Instead):
    async def receive(self, *arguments: Any, **more: Any) -> Any:
        deliveries = await self.real.receive(*arguments, **more)
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


class GivesUp(_Instead):
    """A relay that tries once, and takes a broker that is away for one that has it all."""

    async def publish(self, envelopes: Sequence[Envelope]) -> Any:
        try:
            return await self.real.publish(envelopes)
        except BrokerUnavailableError:
            return [None] * len(envelopes)


class DropsWhatIsRefused(_Instead):
    """A relay that goes on when the broker will not have a record."""

    async def publish(self, envelopes: Sequence[Envelope]) -> Any:
        return [None for _ in await self.real.publish(envelopes)]


_OUTBOXES: Mapping[str | None, Callable[[Any], Any]] = {
    "settle-first": SettlesFirst,
    "no-fences": HasNoFences,
    "own-clock": TrustsItsOwnClock,
    "no-holds": HoldsNothingBack,
    "pages-by-id": PagesById,
}
_INBOXES: Mapping[str | None, Callable[[Any], Any]] = {
    "no-inbox": RemembersNothing,
    "parks-nothing": ParksNothing,
    "keeps-retried": KeepsWhatWasRetried,
}
_BROKERS: Mapping[str | None, Callable[[Any], Any]] = {
    "acknowledge-first": AcknowledgesFirst,
    "no-order": ShufflesBatches,
    "gives-up": GivesUp,
    "drops-refused": DropsWhatIsRefused,
}
WAYS = (*filter(None, (*_OUTBOXES, *_INBOXES, *_BROKERS)), "publish-directly")


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
