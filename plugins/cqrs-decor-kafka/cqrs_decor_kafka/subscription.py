"""Reading as a member of a consumer group."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import anyio

from cqrs_decor.broker import Delivery, Partition, Revoked, Start
from cqrs_decor.errors import BrokerUnavailableError
from cqrs_decor.observers import Observers, OffsetReset
from cqrs_decor_kafka.binding import content_of, key_text
from cqrs_decor_kafka.driver import (
    ConsumerClient,
    Driver,
    RebalanceListener,
    Record,
    TopicPartition,
    committed_positions,
    discard_consumer,
    known_position,
    ping,
    start_client,
)
from cqrs_decor_kafka.errors import KafkaError, is_refused, kafka_errors, unavailable

T = TypeVar("T")

_logger = logging.getLogger(__name__)

# The driver keeps trying in silence when a broker is gone. When no partition was answered for that long, we ask.
_SILENCE_S = 5.0


class KafkaSubscription:
    """One reader of a consumer group.

    It stays a member while its event loop runs, however long `receive` is not called: heartbeats are sent in the
    background, and at most one fetch of each partition is kept in memory. After an error that the driver does not
    recover from, the next `receive` joins the group again.
    """

    def __init__(
        self,
        driver: Driver,
        group: str,
        topics: Sequence[str],
        *,
        start: Start,
        on_revoked: Revoked | None,
        observers: Observers,
    ) -> None:
        self._driver = driver
        self._observers = observers
        self._settings = driver.settings
        self._group = group
        self._topics = tuple(topics)
        self._start: Start = start
        self._on_revoked = on_revoked
        self._consumer: ConsumerClient | None = None
        self._listener: _Listener | None = None
        self._held: dict[TopicPartition, Partition] = {}
        self._epoch = 0
        self._assigned = asyncio.Event()
        self._begins_at_end: set[str] = set()
        self._heard = _Heard(at=time.monotonic())
        self._unrecorded: dict[TopicPartition, int] = {}
        self._recording = asyncio.Lock()

    async def join(self, partitions: Mapping[str, int]) -> None:
        """Connect and ask for a share; the share itself comes later.

        Args:
            partitions: How many each topic has.

        Raises:
            BrokerUnavailableError: Joining again is safe.
        """
        if self._start == "latest":
            places = [TopicPartition(topic, number) for topic in self._topics for number in range(partitions[topic])]
            self._begins_at_end = await self._begin_group_at_end(places)
        await self._connect()

    async def leave(self) -> None:
        """Give everything back, without waiting for work in flight."""
        consumer, self._consumer, self._listener = self._consumer, None, None
        self._let_go(list(self._held))
        if consumer is not None:
            await discard_consumer(consumer, within_s=self._settings.close_timeout_s)

    async def receive(self, limit: int, wait: timedelta, *, paused: Collection[Partition] = ()) -> Sequence[Delivery]:
        """See `Subscription.receive`. Of a paused partition nothing is fetched; what was fetched already is kept."""
        consumer = self._consumer or await self._connect()
        try:
            return await self._receive(consumer, limit, wait, paused)
        except KafkaError as error:
            if not is_refused(error):
                await self._drop_out()
            raise unavailable(self._settings.address, error) from error

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        """See `Subscription.ack`. Calls that come while one is on its way are recorded together after it."""
        for delivery in deliveries:
            place = TopicPartition(delivery.partition.topic, delivery.partition.number)
            if self._held.get(place) == delivery.partition:
                self._unrecorded[place] = max(delivery.position + 1, self._unrecorded.get(place, 0))
        async with self._recording:
            await self._record()

    async def backlog(self) -> int:
        """See `Subscription.backlog`. Waits for the group to come to rest, so as not to say 0 too early."""
        consumer = self._consumer or await self._connect()
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s + self._settings.revoke_timeout_s):
                await self._assigned.wait()
        except TimeoutError as error:
            raise BrokerUnavailableError(
                self._settings.address, f"group {self._group} does not come to rest"
            ) from error
        places = list(self._held)
        ends = await self._asked(consumer.end_offsets(places))
        return sum([max(0, end - await self._next_position(consumer, place)) for place, end in ends.items()])

    # --- receiving ---

    async def _receive(
        self, consumer: ConsumerClient, limit: int, wait: timedelta, paused: Collection[Partition]
    ) -> Sequence[Delivery]:
        deadline = time.monotonic() + wait.total_seconds()
        batches: Mapping[TopicPartition, Sequence[Record]]
        while True:
            left = max(0.0, deadline - time.monotonic())
            try:
                # The driver's own limit does not hold while partitions are being shared out anew.
                async with asyncio.timeout(left):
                    batches = await self._fetched(consumer, limit, left, paused)
            except TimeoutError:
                batches = {}
            except kafka_errors.NoOffsetForPartitionError as error:
                await self._begin(consumer, error.args[0])
                continue
            except kafka_errors.OffsetOutOfRangeError as error:
                await self._begin_again(consumer, error.args[0])
                continue
            if not batches:
                await self._break_the_silence(consumer)
            return self._deliveries(batches)  # no await after this: a cancelled `receive` has delivered nothing

    async def _fetched(
        self, consumer: ConsumerClient, limit: int, wait_s: float, paused: Collection[Partition]
    ) -> Mapping[TopicPartition, Sequence[Record]]:
        """The driver drops what it has fetched of a paused partition when it is asked for everything, so that it is
        asked for the others by name. Where nothing is paused it is not: what is assigned meanwhile comes at once.
        """
        assigned, before = consumer.assignment(), consumer.paused()
        left_out = {place for place in assigned if self._held.get(place) in paused}
        if left_out != before:
            consumer.resume(*(before - left_out))
            consumer.pause(*(left_out - before))
        others = assigned - left_out if left_out else set[TopicPartition]()
        if left_out and not others:
            await anyio.sleep(wait_s)
            return {}
        return await consumer.getmany(*others, timeout_ms=round(wait_s * 1000), max_records=limit)

    def _deliveries(self, batches: Mapping[TopicPartition, Sequence[Record]]) -> list[Delivery]:
        deliveries: list[Delivery] = []
        for place, records in batches.items():
            partition = self._hold(place)
            deliveries.extend(_delivery(partition, record) for record in records)
        return deliveries

    async def _begin(self, consumer: ConsumerClient, place: TopicPartition) -> None:
        """The group has never recorded a position here."""
        position = await self._first_position(consumer, place)
        consumer.seek(place, position)
        if place.topic in self._begins_at_end:
            # On record at once: else whoever has this partition next would begin at a later end, and skip.
            self._unrecorded.setdefault(place, position)
            async with self._recording:
                await self._record()

    async def _begin_again(self, consumer: ConsumerClient, lost: Mapping[TopicPartition, int]) -> None:
        """What the group wanted to read next is not there: it has expired, or the topic was made anew. Read what is."""
        for place, position in lost.items():
            first = (await self._asked(consumer.beginning_offsets([place])))[place]
            _logger.warning(
                "Group %s wanted to go on at %d of %s-%d, which is not there; it goes on at %d. Messages may be lost",
                *(self._group, position, place.topic, place.partition, first),
                extra={
                    "action": "offset_reset",
                    "group": self._group,
                    "topic": place.topic,
                    "partition": place.partition,
                    "lost_position": position,
                    "restarted_at": first,
                },
            )
            self._observers.notice(
                OffsetReset(group=self._group, topic=place.topic, partition=place.partition, restarted_at=str(first))
            )
            consumer.seek(place, first)

    async def _first_position(self, consumer: ConsumerClient, place: TopicPartition) -> int:
        edge = consumer.end_offsets if place.topic in self._begins_at_end else consumer.beginning_offsets
        return (await self._asked(edge([place])))[place]

    async def _next_position(self, consumer: ConsumerClient, place: TopicPartition) -> int:
        """What is delivered next; found out without the driver where nothing was received yet."""
        position = known_position(consumer, place)
        if position is None:
            position = await self._asked(consumer.committed(place))
        return await self._first_position(consumer, place) if position is None else position

    async def _break_the_silence(self, consumer: ConsumerClient) -> None:
        """The driver retries for ever and tells nobody that a broker is gone. Ask when nothing is heard for a while."""
        last_poll = max((consumer.last_poll_timestamp(place) or 0 for place in consumer.assignment()), default=0)
        now = time.monotonic()
        if last_poll != self._heard.last_poll:
            self._heard = _Heard(at=now, last_poll=last_poll)
        elif now - self._heard.at > _SILENCE_S:
            await self._asked(ping(consumer))
            self._heard = _Heard(at=time.monotonic(), last_poll=last_poll)

    async def _asked(self, question: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                return await question
        except (KafkaError, OSError) as error:
            raise unavailable(self._settings.address, error) from error

    # --- being a member ---

    async def _started(self, consumer: ConsumerClient) -> None:
        try:
            await start_client(consumer.start(), within_s=self._settings.connect_timeout_s)
        except (KafkaError, OSError) as error:
            raise unavailable(self._settings.address, error) from error

    async def _connect(self) -> ConsumerClient:
        consumer = self._driver.consumer(self._group)
        try:
            await self._started(consumer)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await discard_consumer(consumer, within_s=1)
            raise
        self._assigned.clear()
        self._heard = _Heard(at=time.monotonic())
        self._listener = _Listener(self)
        self._consumer = consumer
        consumer.subscribe(self._topics, listener=self._listener)
        return consumer

    async def _drop_out(self) -> None:
        """The driver has given up; the next `receive` joins again, from what is on record."""
        consumer, self._consumer, self._listener = self._consumer, None, None
        await self._tell_revoked(list(self._held))
        self._let_go(list(self._held))
        if consumer is not None:
            with anyio.CancelScope(shield=True):
                await discard_consumer(consumer, within_s=1)

    async def _begin_group_at_end(self, places: Sequence[TopicPartition]) -> set[str]:
        """Record the present end as the position of a group that is new to a topic, before it joins.

        What is published from now on is then read whatever happens, also when the first reader is killed. Only a group
        without members can be given positions this way; returns the topics where its readers must do it themselves.
        """
        consumer = self._driver.consumer(self._group)
        try:
            await self._started(consumer)
            consumer.assign(places)
            known = {place.topic for place in await self._asked(committed_positions(consumer, places))}
            fresh = [place for place in places if place.topic not in known]
            if not fresh:
                return set()
            ends = await self._asked(consumer.end_offsets(fresh))
            try:
                async with asyncio.timeout(self._settings.commit_timeout_s):
                    await consumer.commit(ends)
            except kafka_errors.CommitFailedError:
                return {place.topic for place in fresh}
            except (KafkaError, TimeoutError) as error:
                raise unavailable(self._settings.address, error) from error
            return set()
        finally:
            with anyio.CancelScope(shield=True):
                await discard_consumer(consumer, within_s=1)

    async def on_revoked(self, listener: "_Listener", places: Collection[TopicPartition]) -> None:
        if listener is not self._listener:
            return
        self._assigned.clear()
        held = [place for place in places if place in self._held]
        await self._tell_revoked(held)
        try:
            async with self._recording:
                await self._record()
        except BrokerUnavailableError as error:
            _logger.warning(
                "Group %s gives partitions away with acknowledgements not recorded (%s); they will be repeated",
                *(self._group, error.reason),
                extra={"action": "acks_not_recorded", "group": self._group},
            )
        self._let_go(held)

    def on_assigned(self, listener: "_Listener", places: Collection[TopicPartition]) -> None:
        if listener is not self._listener:
            return
        self._let_go([place for place in self._held if place not in places])
        for place in places:
            self._hold(place)
        self._assigned.set()

    async def _tell_revoked(self, places: Sequence[TopicPartition]) -> None:
        if self._on_revoked is None or not places:
            return
        try:
            async with asyncio.timeout(self._settings.revoke_timeout_s):
                await self._on_revoked([self._held[place] for place in places])
        except TimeoutError:
            _logger.warning(
                "A reader of group %s did not let go of its partitions within %g s; they go to another one",
                *(self._group, self._settings.revoke_timeout_s),
                extra={"action": "revoke_timed_out", "group": self._group},
            )
        except Exception:  # whoever cannot let go must not keep the group from going on
            _logger.exception(
                "A reader of group %s failed to let go of its partitions",
                self._group,
                extra={"action": "revoke_failed", "group": self._group},
            )

    def _hold(self, place: TopicPartition) -> Partition:
        if place not in self._held:
            self._epoch += 1
            self._held[place] = Partition(topic=place.topic, number=place.partition, epoch=self._epoch)
        return self._held[place]

    def _let_go(self, places: Iterable[TopicPartition]) -> None:
        for place in places:
            self._held.pop(place, None)
            self._unrecorded.pop(place, None)

    async def _record(self) -> None:
        """Commit what was acknowledged. One at a time, so that no position is overtaken by an older one."""
        positions = {place: position for place, position in self._unrecorded.items() if place in self._held}
        self._unrecorded.clear()
        if not positions or self._consumer is None:
            return
        try:
            async with asyncio.timeout(self._settings.commit_timeout_s):
                await self._consumer.commit(positions)
        except (kafka_errors.CommitFailedError, kafka_errors.IllegalStateError) as error:
            _logger.info(
                "Group %s was shared out anew before acknowledgements were recorded (%s)",
                *(self._group, error),
                extra={"action": "acks_of_past_epoch", "group": self._group},
            )
        except BaseException as error:
            for place, position in positions.items():
                self._unrecorded[place] = max(position, self._unrecorded.get(place, 0))
            if isinstance(error, KafkaError | TimeoutError):
                raise unavailable(self._settings.address, error) from error
            raise


@dataclass(frozen=True, slots=True, kw_only=True)
class _Heard:
    """When the broker last answered a fetch, and the driver's own stamp of that answer."""

    at: float
    last_poll: int = 0


class _Listener(RebalanceListener):
    """Belongs to one membership: what the driver says after we have left it concerns nobody."""

    def __init__(self, subscription: KafkaSubscription) -> None:
        self._subscription = subscription

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        await self._subscription.on_revoked(self, revoked)

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        self._subscription.on_assigned(self, assigned)


def _delivery(partition: Partition, record: Record) -> Delivery:
    value = record.value or b""
    return Delivery(
        partition=partition,
        position=record.offset,
        content=content_of(record.topic, record.key, value, record.headers),
        raw=value,
        key=key_text(record.key),
    )
