"""Bugs planted on purpose: each takes one protection away, and the simulation has to find it."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

from cqrs_decor.broker import Delivery, Partition
from cqrs_decor.inbox import Mark
from cqrs_decor.lanes import HeldLane
from cqrs_decor.memory import MemoryOutbox
from cqrs_decor.outbox import ClaimedRecord, Settlement
from tests.simulation.models import WatchedInbox, WatchedOutbox
from tests.simulation.remote import RemoteBroker, RemoteSubscription


class UncountedCrashesOutbox(WatchedOutbox):
    """Counts a crash after the fact: a relay that vanishes in a single step was never there."""

    async def step(self, lanes: Sequence[HeldLane], *, until: int) -> Sequence[ClaimedRecord]:
        records = await super().step(lanes, until=until)
        await self.unmark(lanes)
        return [replace(record, crashes=0) for record in records]


class UncountedCrashesInbox(WatchedInbox):
    """Counts a crash after the fact: of a worker that vanishes in a single step only the reach is known."""

    async def mark(self, group: str, owner: str, marks: Collection[Mark]) -> None:
        await super().mark(group, owner, [replace(mark, suspect=None, crashes={}) for mark in marks])


class UnfencedOutbox(WatchedOutbox):
    """Settles for whoever asks, also for one whose lane another relay holds by now."""

    async def write_outcome(self, settlement: Settlement) -> None:
        current = [replace(lane, fence=self._lanes[lane.number].fence) for lane in settlement.lanes]
        await MemoryOutbox.settle(self, replace(settlement, lanes=current))


class HastySubscription(RemoteSubscription):
    """Acknowledges with what is done all that was received: also what is still in flight."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._last: dict[Partition, Delivery] = {}

    async def receive(self, limit: int, wait: timedelta, **options: Any) -> Sequence[Delivery]:
        deliveries = await super().receive(limit, wait, **options)
        self._last.update((delivery.partition, delivery) for delivery in deliveries)
        return deliveries

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        await super().ack([self._last.get(delivery.partition, delivery) for delivery in deliveries])


class HastyBroker(RemoteBroker):
    """Reads in haste."""

    reader = HastySubscription
