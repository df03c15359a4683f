"""Publishing: whole batches at once, one outcome per envelope, order per key also through a refusal."""

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import anyio

from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import (
    BrokerAccessError,
    BrokerError,
    BrokerUnavailableError,
    RecordRejectedError,
    RecordTooLargeError,
    TopicMissingError,
)
from cqrs_decor_kafka.binding import headers_of, reserved_header
from cqrs_decor_kafka.driver import (
    Batch,
    Driver,
    ProducerClient,
    discard_producer,
    key_hash,
    known_partitions,
    new_batch,
    record_size,
    silence_producer,
    start_client,
)
from cqrs_decor_kafka.errors import TOO_LARGE, TOPIC_REFUSED, KafkaError, is_outage, reason_of, unavailable
from cqrs_decor_kafka.settings import KafkaSettings
from cqrs_decor_kafka.topics import TopicFacts, Topics

_logger = logging.getLogger(__name__)

_hash_of = lru_cache(maxsize=16_384)(key_hash)


class Publisher:
    """Sends batches through an idempotent producer, which is replaced when a refusal or an outage has spoilt it.

    Used by one task at a time.
    """

    def __init__(self, driver: Driver, topics: Topics) -> None:
        self._driver = driver
        self._settings = driver.settings
        self._topics = topics
        self._producer: ProducerClient | None = None
        self._silenced: list[ProducerClient] = []

    async def publish(self, envelopes: Sequence[Envelope]) -> Sequence[BrokerError | None]:
        """See `Broker.publish`."""
        if not envelopes:
            return []
        try:
            async with asyncio.timeout(self._settings.publish_timeout_s):
                return await self._publish(envelopes)
        except TimeoutError as error:
            self._silence()
            raise BrokerUnavailableError(
                self._settings.address, f"not all was acknowledged within {self._settings.publish_timeout_s:g} s"
            ) from error
        except KafkaError as error:
            self._silence()
            raise unavailable(self._settings.address, error) from error
        except BaseException:
            # Also when we are cancelled: from now on nothing of it is sent; what was sent arrives before its repeat.
            self._silence()
            raise
        finally:
            if self._silenced:
                with anyio.CancelScope(shield=True):
                    await self._discard_silenced()

    async def close(self) -> None:
        self._silence()
        await self._discard_silenced()

    async def _publish(self, envelopes: Sequence[Envelope]) -> Sequence[BrokerError | None]:
        producer = await self._ready_producer()
        routes = await self._routes(producer, {envelope.topic for envelope in envelopes})
        call = _Call(self._settings, envelopes, routes)
        refused = await self._send_in_rounds(producer, call.chunks())
        if refused:
            await self._send_one_by_one(refused, call)
        return call.outcomes

    async def _send_in_rounds(
        self, producer: ProducerClient, queues: list[list["_Chunk"]]
    ) -> list[tuple[list[int], BaseException]]:
        """Send the first chunk of every partition, then the second, and so on: each waits for the one before it.

        A partition has one request in flight at a time in any case, so this costs nothing; and behind a refused chunk
        nothing of its partition has been sent. Returns the places that this leaves undecided, with the refusal.
        """
        refused: list[tuple[list[int], BaseException]] = []
        while queues:
            flights = [await producer.send_batch(q[0].batch, q[0].topic, partition=q[0].partition) for q in queues]
            await asyncio.wait(flights)
            going_on: list[list[_Chunk]] = []
            outage: BaseException | None = None
            for queue, flight in zip(queues, flights, strict=True):
                error = flight.exception()
                if error is None:
                    if len(queue) > 1:
                        going_on.append(queue[1:])
                elif is_outage(error):
                    outage = error
                else:
                    refused.append(([place for chunk in queue for place in chunk.places], error))
            if outage is not None:
                raise unavailable(self._settings.address, outage) from outage
            queues = going_on
        return refused

    async def _send_one_by_one(self, refused: list[tuple[list[int], BaseException]], call: "_Call") -> None:
        """Find out which records of a refused chunk the broker will not take; send the others, in their order."""
        for places, error in refused:
            topic = call.envelopes[places[0]].topic
            _logger.warning(
                "Kafka refused a batch of %d records for topic %s (%s); its records are sent one by one",
                len(places),
                topic,
                reason_of(error),
                extra={"action": "batch_refused", "topic": topic, "records": len(places)},
            )
            if isinstance(error, TOPIC_REFUSED):
                for place in places:
                    call.refuse(place, BrokerAccessError(self._settings.address, f"topic {topic}: {reason_of(error)}"))
                continue
            if isinstance(error, TOO_LARGE):
                await self._refresh(topic, call)
            call.spoilt = True
            for place in places:
                await self._send_alone(place, call)
        if call.spoilt:
            self._silence()

    async def _send_alone(self, place: int, call: "_Call") -> None:
        chunk = call.chunk_of(place)
        if chunk is None:
            return
        if call.spoilt:
            self._silence()
            call.spoilt = False
        producer = await self._ready_producer()
        await producer.partitions_for(chunk.topic)
        flight = await producer.send_batch(chunk.batch, chunk.topic, partition=chunk.partition)
        await asyncio.wait([flight])
        error = flight.exception()
        if error is None:
            return
        if is_outage(error):
            raise unavailable(self._settings.address, error) from error
        call.spoilt = True
        if isinstance(error, TOO_LARGE):
            call.refuse(place, call.too_large(place))
        else:
            call.refuse(place, RecordRejectedError(self._settings.address, chunk.topic, reason_of(error)))

    async def _ready_producer(self) -> ProducerClient:
        if self._producer is None:
            producer = self._driver.producer()
            try:
                await start_client(producer.start(), within_s=self._settings.publish_timeout_s)
            except BaseException as error:
                silence_producer(producer)
                self._silenced.append(producer)
                if isinstance(error, KafkaError | OSError):
                    raise unavailable(self._settings.address, error) from error
                raise
            self._producer = producer
        return self._producer

    async def _routes(self, producer: ProducerClient, topics: set[str]) -> dict[str, "_Route"]:
        """A missing topic has none. The producer is asked about a topic only when the cluster is known to have it."""
        facts = await self._topics.facts(topics)
        routes: dict[str, _Route] = {}
        for topic, fact in facts.items():
            count = known_partitions(producer, topic) or await self._ask_partitions(producer, topic)
            if count:
                routes[topic] = self._route(topic, fact, count)
        return routes

    async def _ask_partitions(self, producer: ProducerClient, topic: str) -> int:
        """The topic may have been removed since we looked it up; then aiokafka would wait for it for 40 s."""
        self._topics.forget(topic)
        if not await self._topics.facts([topic]):
            return 0
        try:
            return len(await producer.partitions_for(topic))
        except KafkaError as error:
            if isinstance(error, TOPIC_REFUSED):
                return 0
            raise unavailable(self._settings.address, error) from error

    def _route(self, topic: str, facts: TopicFacts, partitions: int) -> "_Route":
        limit = min(facts.max_message_bytes, self._settings.max_record_bytes or facts.max_message_bytes)
        return _Route(topic, facts, partitions, limit, random.randrange(partitions))

    async def _refresh(self, topic: str, call: "_Call") -> None:
        """The topic's limit is not what we took it for."""
        self._topics.forget(topic)
        facts = await self._topics.facts([topic])
        if topic in facts:
            call.routes[topic] = self._route(topic, facts[topic], call.routes[topic].partitions)

    def _silence(self) -> None:
        if self._producer is not None:
            silence_producer(self._producer)
            self._silenced.append(self._producer)
            self._producer = None

    async def _discard_silenced(self) -> None:
        while self._silenced:
            await discard_producer(self._silenced[-1], within_s=1)
            self._silenced.pop()


@dataclass(frozen=True, slots=True)
class _Route:
    """Where the records of one topic go during one call."""

    topic: str
    facts: TopicFacts
    partitions: int
    limit: int
    keyless_partition: int


@dataclass(slots=True)
class _Chunk:
    """Records that go out in one request to one partition, by their places in the call."""

    topic: str
    partition: int
    batch: Batch
    places: list[int] = field(default_factory=list[int])

    def takes(self, envelope: Envelope, key: bytes | None, headers: list[tuple[str, bytes]]) -> bool:
        """Add a record, if there is room. The first one is taken whatever its size."""
        return self.batch.append(timestamp=None, key=key, value=envelope.data, headers=headers) is not None


_Record = tuple[int, bytes | None, list[tuple[str, bytes]]]
"""Partition, key and headers."""


class _Call:
    """One call of `publish`: what becomes of each envelope, by its place.

    Attributes:
        outcomes: What was found out so far.
        spoilt: The producer's numbering of a partition broke.
    """

    def __init__(self, settings: KafkaSettings, envelopes: Sequence[Envelope], routes: dict[str, _Route]) -> None:
        self.envelopes = envelopes
        self.routes = routes
        self.outcomes: list[BrokerError | None] = [None] * len(envelopes)
        self.spoilt = False
        self._settings = settings
        self._held_keys: set[tuple[str, str]] = set()

    def chunks(self) -> list[list[_Chunk]]:
        """A queue of chunks for each partition, in the order of the envelopes; what cannot be sent has its outcome."""
        queues: dict[tuple[str, int], list[_Chunk]] = {}
        for place, envelope in enumerate(self.envelopes):
            record = self._record(place)
            if record is None:
                continue
            partition, key, headers = record
            queue = queues.setdefault((envelope.topic, partition), [])
            if (
                not queue
                or queue[-1].batch.append(timestamp=None, key=key, value=envelope.data, headers=headers) is None
            ):
                queue.append(self._new_chunk(envelope, partition, key, headers))
            queue[-1].places.append(place)
        return list(queues.values())

    def chunk_of(self, place: int) -> _Chunk | None:
        """One record alone; None when it cannot be sent, and has its outcome."""
        record = self._record(place)
        if record is None:
            return None
        chunk = self._new_chunk(self.envelopes[place], *record)
        chunk.places.append(place)
        return chunk

    def refuse(self, place: int, error: BrokerError) -> None:
        """Give it its outcome, and hold back what comes after it with the same key."""
        envelope = self.envelopes[place]
        self.outcomes[place] = error
        if envelope.key is not None:
            self._held_keys.add((envelope.topic, envelope.key))

    def too_large(self, place: int, size: int | None = None) -> RecordTooLargeError:
        envelope = self.envelopes[place]
        if size is None:
            size = record_size(_key_of(envelope), envelope.data, headers_of(envelope))
        return RecordTooLargeError(self._settings.address, envelope.topic, size, self.routes[envelope.topic].limit)

    def _record(self, place: int) -> _Record | None:
        envelope = self.envelopes[place]
        route = self.routes.get(envelope.topic)
        if route is None:
            self.outcomes[place] = TopicMissingError(self._settings.address, [envelope.topic])
            return None
        key = _key_of(envelope)
        headers = headers_of(envelope)
        size = record_size(key, envelope.data, headers)
        if size > route.limit or self._held_keys or envelope.headers or route.facts.compacted:
            error = self._fault(place, route, size)
            if error is not None:
                self.refuse(place, error)
                return None
        return (route.keyless_partition if key is None else _hash_of(key) % route.partitions), key, headers

    def _fault(self, place: int, route: _Route, size: int) -> BrokerError | None:
        envelope = self.envelopes[place]
        if envelope.key is not None and (envelope.topic, envelope.key) in self._held_keys:
            return self._rejected(envelope, "an earlier record of its key was refused")
        if size > route.limit:
            return self.too_large(place, size)
        if envelope.headers and (name := reserved_header(envelope)) is not None:
            return self._rejected(envelope, f"readers would take its header {name!r} for an attribute of CloudEvents")
        if envelope.key is None and route.facts.compacted:
            return self._rejected(envelope, "the topic is compacted, and it has no key")
        return None

    def _rejected(self, envelope: Envelope, reason: str) -> RecordRejectedError:
        return RecordRejectedError(self._settings.address, envelope.topic, reason)

    def _new_chunk(
        self, envelope: Envelope, partition: int, key: bytes | None, headers: list[tuple[str, bytes]]
    ) -> _Chunk:
        limit = min(self._settings.max_batch_bytes, self.routes[envelope.topic].limit)
        chunk = _Chunk(envelope.topic, partition, new_batch(limit, self._settings.compression))
        chunk.takes(envelope, key, headers)
        return chunk


def _key_of(envelope: Envelope) -> bytes | None:
    return None if envelope.key is None else envelope.key.encode()
