"""Brokers with one fault each, of the kind that real ones have had."""

from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import anyio

from cqrs_decor import memory
from cqrs_decor.broker import Delivery, Partition, Revoked, Start
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import BrokerError, RecordRejectedError
from cqrs_decor.memory import MemoryBroker, MemorySubscription


class DropsHeaders(MemoryBroker):
    async def publish(self, envelopes: Sequence[Envelope]) -> Sequence[BrokerError | None]:
        return await super().publish([replace(each, headers={}) for each in envelopes])


class CutsTimesToMilliseconds(MemoryBroker):
    async def publish(self, envelopes: Sequence[Envelope]) -> Sequence[BrokerError | None]:
        cut = [
            replace(each, time=each.time.replace(microsecond=each.time.microsecond // 1000 * 1000))
            for each in envelopes
        ]
        return await super().publish(cut)


class TakesTheEmptyKeyForNone(MemoryBroker):
    async def publish(self, envelopes: Sequence[Envelope]) -> Sequence[BrokerError | None]:
        return await super().publish([replace(each, key=each.key or None) for each in envelopes])


class TakesAnEmptyBodyForADeletion(MemoryBroker):
    async def publish(self, envelopes: Sequence[Envelope]) -> Sequence[BrokerError | None]:
        await super().publish([each for each in envelopes if each.data])
        return [None] * len(envelopes)


class ReadsBodiesAsText(MemoryBroker):
    async def publish(self, envelopes: Sequence[Envelope]) -> Sequence[BrokerError | None]:
        return await super().publish(
            [replace(each, data=each.data.decode(errors="replace").encode()) for each in envelopes]
        )


class LosesTheOrderInABatch(MemoryBroker):
    async def publish(self, envelopes: Sequence[Envelope]) -> Sequence[BrokerError | None]:
        return await super().publish(list(reversed(envelopes)))


class SpreadsAKeyOverPartitions(MemoryBroker):
    async def publish(self, envelopes: Sequence[Envelope]) -> Sequence[BrokerError | None]:
        for n, envelope in enumerate(envelopes):
            self.partitions_of(envelope.topic)[n % 8].append(envelope)
        return [None] * len(envelopes)


class AnswersForTheLastOnly(MemoryBroker):
    async def publish(self, envelopes: Sequence[Envelope]) -> Sequence[BrokerError | None]:
        return (await super().publish(envelopes))[-1:]


class RefusesWhatItHasSeen(MemoryBroker):
    def _refusal(self, envelope: Envelope, refused: set[tuple[str, str]]) -> BrokerError | None:
        if any(envelope.id == each.id for log in self.partitions_of(envelope.topic) for each in log):
            return RecordRejectedError(self.name, envelope.topic, "duplicate")
        return super()._refusal(envelope, refused)


class RefusesTheWholeBatch(MemoryBroker):
    async def publish(self, envelopes: Sequence[Envelope]) -> Sequence[BrokerError | None]:
        refusals = [self._refusal(each, set()) for each in envelopes]
        if any(refusals):
            return [next(filter(None, refusals))] * len(envelopes)
        return await super().publish(envelopes)


class LetsOthersOvertakeARefusedOne(MemoryBroker):
    def _refusal(self, envelope: Envelope, refused: set[tuple[str, str]]) -> BrokerError | None:
        return super()._refusal(envelope, set())


class StaysBrokenAfterARefusal(MemoryBroker):
    """As a Kafka producer does whose sequence numbers have a gap."""

    broken: set[tuple[str, str | None]]

    async def publish(self, envelopes: Sequence[Envelope]) -> Sequence[BrokerError | None]:
        self.broken = getattr(self, "broken", set())
        outcomes = [
            RecordRejectedError(self.name, each.topic, "out of order")
            if (each.topic, each.key) in self.broken
            else (await super(StaysBrokenAfterARefusal, self).publish([each]))[0]
            for each in envelopes
        ]
        self.broken |= {(each.topic, each.key) for each, outcome in zip(envelopes, outcomes, strict=True) if outcome}
        return outcomes


class IgnoresStart(MemoryBroker):
    def subscribe(self, group: str, topics: Sequence[str], *, start: Start = "earliest", on_revoked: Any = None) -> Any:
        return super().subscribe(group, topics, start="earliest", on_revoked=on_revoked)


class StartsOverAtTheLatest(MemoryBroker):
    """Applies `start` whenever somebody joins."""

    def subscribe(self, group: str, topics: Sequence[str], *, start: Start = "earliest", on_revoked: Any = None) -> Any:
        if start == "latest":
            self._groups.pop(group, None)
        return super().subscribe(group, topics, start=start, on_revoked=on_revoked)


class HasOneGroupForAll(MemoryBroker):
    def subscribe(self, group: str, topics: Sequence[str], *, start: Start = "earliest", on_revoked: Any = None) -> Any:
        return super().subscribe("all", topics, start=start, on_revoked=on_revoked)


class ReadersDoNotShare(MemoryBroker):
    """Each reader gets everything, as in a broadcast."""

    @asynccontextmanager
    async def subscribe(
        self, group: str, topics: Sequence[str], *, start: Start = "earliest", on_revoked: Revoked | None = None
    ) -> AsyncGenerator[MemorySubscription]:
        own = f"{group}-{len(self._groups)}"
        async with super().subscribe(own, topics, start=start, on_revoked=on_revoked) as subscription:
            yield subscription


class _WithSubscription(MemoryBroker):
    """Gives readers of another class."""

    reader: type[MemorySubscription]

    @asynccontextmanager
    async def subscribe(
        self, group: str, topics: Sequence[str], *, start: Start = "earliest", on_revoked: Revoked | None = None
    ) -> AsyncGenerator[MemorySubscription]:
        joined = self._groups.setdefault(group, memory._Group(self))
        reader = self.reader(joined, topics, on_revoked)
        try:
            await joined.join(reader, start)
            yield reader
        finally:
            joined.leave(reader)


class AcknowledgesOnDelivery(_WithSubscription):
    """At most once: what a crash leaves unfinished is gone."""

    class reader(MemorySubscription):
        async def receive(
            self, limit: int, wait: timedelta, *, paused: Collection[Partition] = ()
        ) -> Sequence[Delivery]:
            deliveries = await super().receive(limit, wait, paused=paused)
            await self.ack(deliveries)
            return deliveries


class AcknowledgesWhatCameBeforeInAnyPartition(_WithSubscription):
    class reader(MemorySubscription):
        async def ack(self, deliveries: Sequence[Delivery]) -> None:
            if deliveries:
                self._group._acknowledged.update(self._next)


class ForgetsAcknowledgements(_WithSubscription):
    class reader(MemorySubscription):
        async def ack(self, deliveries: Sequence[Delivery]) -> None:
            pass


class CountsAcknowledgementsOfThePast(_WithSubscription):
    class reader(MemorySubscription):
        async def ack(self, deliveries: Sequence[Delivery]) -> None:
            for each in deliveries:
                place = (each.partition.topic, each.partition.number)
                self._group._acknowledged[place] = max(self._group._acknowledged[place], each.position + 1)


class DoesNotTellBeforePartitionsMove(_WithSubscription):
    class reader(MemorySubscription):
        async def give_up(self, places: Any) -> None:
            pass


class MovesPartitionsBeforeItTells(_WithSubscription):
    class reader(MemorySubscription):
        async def give_up(self, places: Any) -> None:
            gone = [self.partitions.pop(place) for place in places]
            await super().give_up([])
            if self._on_revoked is not None:
                await self._on_revoked(gone)
            self.partitions.update({(each.topic, each.number): each for each in gone})


class LosesWhatAReaderLeavesBehind(_WithSubscription):
    class reader(MemorySubscription):
        def take(self, partition: Any, position: int) -> None:
            handed_out = self._group.__dict__.setdefault("handed_out", {})
            super().take(partition, max(position, handed_out.get((partition.topic, partition.number), 0)))

        def _deliver(self, limit: int, left_out: Any) -> list[Delivery]:
            deliveries = super()._deliver(limit, left_out)
            self._group.__dict__.setdefault("handed_out", {}).update(self._next)
            return deliveries


class IgnoresTheLimit(_WithSubscription):
    class reader(MemorySubscription):
        async def receive(
            self, limit: int, wait: timedelta, *, paused: Collection[Partition] = ()
        ) -> Sequence[Delivery]:
            return await super().receive(1_000, wait, paused=paused)


class NeverReturnsEmpty(_WithSubscription):
    class reader(MemorySubscription):
        async def receive(
            self, limit: int, wait: timedelta, *, paused: Collection[Partition] = ()
        ) -> Sequence[Delivery]:
            while True:
                if deliveries := await super().receive(limit, timedelta(hours=1), paused=paused):
                    return deliveries


class WaitsToTheEnd(_WithSubscription):
    """Polls: what comes lies about until the wait is over."""

    class reader(MemorySubscription):
        async def receive(
            self, limit: int, wait: timedelta, *, paused: Collection[Partition] = ()
        ) -> Sequence[Delivery]:
            await anyio.sleep(wait.total_seconds())
            return await super().receive(limit, timedelta(0), paused=paused)


class LosesWhatACancelledReceiveHadFetched(_WithSubscription):
    class reader(MemorySubscription):
        async def receive(
            self, limit: int, wait: timedelta, *, paused: Collection[Partition] = ()
        ) -> Sequence[Delivery]:
            deliveries = await super().receive(limit, wait, paused=paused)
            await anyio.sleep(0.003)
            return deliveries


class DeliversPositionsThatRepeat(_WithSubscription):
    class reader(MemorySubscription):
        async def receive(
            self, limit: int, wait: timedelta, *, paused: Collection[Partition] = ()
        ) -> Sequence[Delivery]:
            return [
                replace(each, position=each.position % 2) for each in await super().receive(limit, wait, paused=paused)
            ]


class CountsTheBacklogOfTheGroup(_WithSubscription):
    """What is published and not acknowledged, instead of not delivered."""

    class reader(MemorySubscription):
        async def backlog(self) -> int:
            return sum(len(self._group.log(place)) - self._group._acknowledged[place] for place in self.partitions)


class DeliversWhatIsPaused(_WithSubscription):
    class reader(MemorySubscription):
        async def receive(
            self, limit: int, wait: timedelta, *, paused: Collection[Partition] = ()
        ) -> Sequence[Delivery]:
            return await super().receive(limit, wait)


class DropsWhatItHadFetchedOfAPausedPartition(_WithSubscription):
    class reader(MemorySubscription):
        async def receive(
            self, limit: int, wait: timedelta, *, paused: Collection[Partition] = ()
        ) -> Sequence[Delivery]:
            for place in [(each.topic, each.number) for each in paused]:
                self._next[place] = min(self._next[place] + 1, len(self._group.log(place)))
            return await super().receive(limit, wait, paused=paused)


class GivesPausedPartitionsAway(_WithSubscription):
    """They come back as new ones, after a rebalance."""

    class reader(MemorySubscription):
        async def receive(
            self, limit: int, wait: timedelta, *, paused: Collection[Partition] = ()
        ) -> Sequence[Delivery]:
            for each in paused:
                self._group._assign((each.topic, each.number), self)
                self._next[each.topic, each.number] = len(self._group.log((each.topic, each.number)))
            return await super().receive(limit, wait, paused=paused)
