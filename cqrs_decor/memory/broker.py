"""Topics in memory."""

import logging
from collections.abc import AsyncGenerator, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import ClassVar

import anyio
import anyio.lowlevel

from cqrs_decor.broker import Capabilities, Delivery, Partition, Revoked, Start, TopicPlan
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import (
    BrokerError,
    RecordRejectedError,
    RecordTooLargeError,
)
from cqrs_decor.findings import Finding
from cqrs_decor.lanes import lane_of
from cqrs_decor.memory.urls import expect_memory_url
from cqrs_decor.observers import Observers

_logger = logging.getLogger(__name__)

_Place = tuple[str, int]
"""Topic and partition number."""


class MemoryBroker:
    """Topics of append-only partitions, consumer groups with positions. Keeps every message until the process ends.

    Args:
        partitions: How many each topic has: at most so many readers of a group get work.
        max_bytes: Refuse larger bodies, as a real broker would; None for no limit.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        durable=False,
        ordered_by_key=True,
        replayable=True,
        shared=False,
        creates_topics=True,
        crash_may_lose="everything: messages and positions live in the process",
        crash_may_repeat="what was delivered and not yet acknowledged, when a reader leaves",
        crash_may_reorder="nothing",
    )

    def __init__(self, *, partitions: int = 8, max_bytes: int | None = None) -> None:
        self.name = "memory://"
        self.observers = Observers()
        self._partitions = partitions
        self._max_bytes = max_bytes
        self._topics: dict[str, list[list[Envelope]]] = {}
        self._groups: dict[str, _Group] = {}

    @classmethod
    def from_url(cls, url: str) -> "MemoryBroker":
        """A new and empty broker, each time."""
        expect_memory_url("broker", url)
        return cls()

    async def open(self) -> None:
        """Nothing to connect to."""

    async def close(self) -> None:
        """Keeps its messages: another app may use the same object, and an app can be entered again."""

    async def publish(self, envelopes: Sequence[Envelope]) -> Sequence[BrokerError | None]:
        refused: set[tuple[str, str]] = set()
        outcomes = [self._publish(envelope, refused) for envelope in envelopes]
        for group in self._groups.values():
            group.wake()
        return outcomes

    def _publish(self, envelope: Envelope, refused: set[tuple[str, str]]) -> BrokerError | None:
        error = self._refusal(envelope, refused)
        if error is None:
            partitions = self.partitions_of(envelope.topic)
            partitions[_partition_of(envelope, len(partitions))].append(envelope)
        elif envelope.key is not None:
            refused.add((envelope.topic, envelope.key))
        return error

    def _refusal(self, envelope: Envelope, refused: set[tuple[str, str]]) -> BrokerError | None:
        if envelope.key is not None and (envelope.topic, envelope.key) in refused:
            return RecordRejectedError(self.name, envelope.topic, "an earlier record of its key was refused")
        if self._max_bytes is not None and len(envelope.data) > self._max_bytes:
            return RecordTooLargeError(self.name, envelope.topic, len(envelope.data), self._max_bytes)
        return None

    @asynccontextmanager
    async def subscribe(
        self, group: str, topics: Sequence[str], *, start: Start = "earliest", on_revoked: Revoked | None = None
    ) -> AsyncGenerator["MemorySubscription"]:
        joined = self._groups.setdefault(group, _Group(self))
        reader = MemorySubscription(joined, topics, on_revoked)
        try:
            await joined.join(reader, start)
            yield reader
        finally:
            joined.leave(reader)

    async def check(self, topics: Sequence[TopicPlan]) -> Sequence[Finding]:
        return [Finding.ok(f"{self.name} carries messages within this process")]

    async def missing_topics(self, topics: Sequence[TopicPlan]) -> Sequence[TopicPlan]:
        return []

    async def create_topics(self, topics: Sequence[TopicPlan]) -> None:
        for topic in topics:
            self.partitions_of(topic.name)

    def partitions_of(self, topic: str) -> list[list[Envelope]]:
        """What was published to a topic so far; the topic is made if it is not there."""
        return self._topics.setdefault(topic, [[] for _ in range(self._partitions)])


class _Group:
    """Who of a consumer group reads what, and how far the group has acknowledged."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._readers: list[MemorySubscription] = []
        self._acknowledged: dict[_Place, int] = {}
        self._epoch = 0
        self._joining: anyio.Lock | None = None

    async def join(self, reader: "MemorySubscription", start: Start) -> None:
        """Give a new reader its share. Those who lose partitions are told first and may still acknowledge."""
        self._joining = self._joining or anyio.Lock()
        async with self._joining:
            for topic in reader.topics:
                self._begin(topic, start)
            self._readers.append(reader)
            self._share_out_what_nobody_reads()
            for topic in reader.topics:
                await self._take_a_share(reader, topic)

    def leave(self, reader: "MemorySubscription") -> None:
        """What it had not acknowledged is delivered again, to those who are left."""
        if reader in self._readers:
            self._readers.remove(reader)
        reader.partitions.clear()
        self._share_out_what_nobody_reads()

    def acknowledge(self, reader: "MemorySubscription", delivery: Delivery) -> None:
        place = _place(delivery.partition)
        if reader.partitions.get(place) == delivery.partition:
            self._acknowledged[place] = max(self._acknowledged[place], delivery.position + 1)

    def log(self, place: _Place) -> list[Envelope]:
        topic, number = place
        return self._broker.partitions_of(topic)[number]

    def wake(self) -> None:
        for reader in self._readers:
            reader.wake()

    def _begin(self, topic: str, start: Start) -> None:
        for number, log in enumerate(self._broker.partitions_of(topic)):
            self._acknowledged.setdefault((topic, number), 0 if start == "earliest" else len(log))

    def _share_out_what_nobody_reads(self) -> None:
        read = {place for reader in self._readers for place in reader.partitions}
        for place in [place for place in self._acknowledged if place not in read]:
            takers = [reader for reader in self._readers if place[0] in reader.topics]
            if takers:
                self._assign(place, min(takers, key=lambda reader: len(reader.partitions)))

    async def _take_a_share(self, reader: "MemorySubscription", topic: str) -> None:
        others = [other for other in self._readers if other is not reader and topic in other.topics]
        fair = len(self._broker.partitions_of(topic)) // (len(others) + 1)
        for other in others:
            surplus = other.places_of(topic)[fair:]
            wanted = max(0, fair - len(reader.places_of(topic)))
            await self._move(surplus[:wanted], other, reader)

    async def _move(self, places: Sequence[_Place], giver: "MemorySubscription", taker: "MemorySubscription") -> None:
        if not places:
            return
        giver.pause(places)
        receiver = giver  # also if the taker gives up meanwhile: the giver was told to drop its work and gets it again
        try:
            await giver.give_up(places)
            receiver = taker
        finally:
            for place in places:
                if place in giver.partitions:  # it may have left meanwhile
                    del giver.partitions[place]
                    self._assign(place, receiver)

    def _assign(self, place: _Place, reader: "MemorySubscription") -> None:
        self._epoch += 1
        topic, number = place
        reader.take(Partition(topic=topic, number=number, epoch=self._epoch), self._acknowledged[place])


class MemorySubscription:
    """One reader of a group."""

    def __init__(self, group: _Group, topics: Sequence[str], on_revoked: Revoked | None) -> None:
        self.topics = tuple(topics)
        self.partitions: dict[_Place, Partition] = {}
        self._group = group
        self._on_revoked = on_revoked
        self._next: dict[_Place, int] = {}
        self._woken: anyio.Event | None = None

    async def receive(self, limit: int, wait: timedelta, *, paused: Collection[Partition] = ()) -> Sequence[Delivery]:
        left_out = {_place(partition) for partition in paused}
        await anyio.lowlevel.checkpoint()
        with anyio.move_on_after(wait.total_seconds()):
            while not self._ahead(left_out):
                self._woken = anyio.Event()
                await self._woken.wait()
        return self._deliver(limit, left_out)  # no await after this: a cancelled `receive` has delivered nothing

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self._group.acknowledge(self, delivery)

    async def backlog(self) -> int:
        return self._ahead()

    def wake(self) -> None:
        if self._woken is not None:
            self._woken.set()

    def take(self, partition: Partition, position: int) -> None:
        self.partitions[_place(partition)] = partition
        self._next[_place(partition)] = position
        self.wake()

    def pause(self, places: Iterable[_Place]) -> None:
        """Deliver no more of these; acknowledging what was delivered is still possible."""
        for place in places:
            self._next.pop(place, None)

    async def give_up(self, places: Iterable[_Place]) -> None:
        if self._on_revoked is None:
            return
        try:
            await self._on_revoked([self.partitions[place] for place in places])
        except Exception:  # a reader that cannot let go must not keep the other one from reading
            _logger.exception("a reader failed to let go of partitions", extra={"action": "revoke_failed"})

    def places_of(self, topic: str) -> list[_Place]:
        return [place for place in self.partitions if place[0] == topic]

    def _ahead(self, left_out: Collection[_Place] = ()) -> int:
        return sum(len(self._group.log(place)) - position for place, position in self._readable(left_out))

    def _deliver(self, limit: int, left_out: Collection[_Place]) -> list[Delivery]:
        deliveries: list[Delivery] = []
        for place, position in self._readable(left_out):
            fresh = self._group.log(place)[position : position + limit - len(deliveries)]
            deliveries.extend(
                _delivery(self.partitions[place], number, envelope) for number, envelope in enumerate(fresh, position)
            )
            del self._next[place]  # to the end of the line, so that no partition starves another
            self._next[place] = position + len(fresh)
        return deliveries

    def _readable(self, left_out: Collection[_Place]) -> list[tuple[_Place, int]]:
        readable = self.partitions.keys() - left_out
        return [(place, position) for place, position in self._next.items() if place in readable]


def _delivery(partition: Partition, position: int, envelope: Envelope) -> Delivery:
    return Delivery(partition=partition, position=position, content=envelope, raw=envelope.data, key=envelope.key)


def _partition_of(envelope: Envelope, partitions: int) -> int:
    return lane_of(envelope.topic, envelope.key, envelope.id, partitions)


def _place(partition: Partition) -> _Place:
    return partition.topic, partition.number
