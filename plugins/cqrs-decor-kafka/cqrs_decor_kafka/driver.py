"""The one place that builds and takes apart aiokafka's objects, which ship no types.

aiokafka's own ways to stop wait for what may never come: a producer's `stop` flushes batches that never expire, a
consumer's waits for a rebalance. What is here instead ends in bounded time.
"""

# pyright: reportMissingTypeStubs=false
# The driver is taken apart here and nowhere else.
# pyright: reportPrivateUsage=false
import asyncio
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from ssl import SSLContext
from typing import Any, NamedTuple, Protocol, cast

import aiokafka
import anyio
from aiokafka import ConsumerRebalanceListener, partitioner
from aiokafka import TopicPartition as TopicPartition
from aiokafka import conn as connections
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError, for_code
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from cqrs_decor_kafka.settings import KafkaSettings

# An idle producer or consumer keeps its connections; brokers close them after ten minutes.
_MAX_IDLE_MS = 540_000
_REQUEST_TIMEOUT_MS = 40_000
_NEVER_MS = 2**31 - 1
_MOMENT_S = 2.0


class Record(Protocol):
    """A record as the consumer hands it out."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]


class Batch(Protocol):
    """Records of one partition that go out in one request."""

    def append(
        self, *, timestamp: int | None, key: bytes | None, value: bytes, headers: Sequence[tuple[str, bytes]]
    ) -> object | None:
        """None when it is full."""
        ...

    def close(self) -> None: ...


class ProducerClient(Protocol):
    async def start(self) -> None: ...
    async def send_batch(self, batch: Batch, topic: str, *, partition: int) -> "asyncio.Future[object]": ...
    async def partitions_for(self, topic: str) -> set[int]: ...


class ConsumerClient(Protocol):
    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    def subscribe(self, topics: Collection[str], *, listener: object) -> None: ...
    def assign(self, partitions: Collection[TopicPartition]) -> None: ...
    def assignment(self) -> set[TopicPartition]: ...
    async def getmany(
        self, *partitions: TopicPartition, timeout_ms: int, max_records: int
    ) -> Mapping[TopicPartition, Sequence[Record]]: ...
    def paused(self) -> set[TopicPartition]: ...
    def pause(self, *partitions: TopicPartition) -> None: ...
    def resume(self, *partitions: TopicPartition) -> None: ...
    async def commit(self, offsets: Mapping[TopicPartition, int]) -> None: ...
    async def committed(self, partition: TopicPartition) -> int | None: ...
    async def position(self, partition: TopicPartition) -> int: ...
    async def beginning_offsets(self, partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, int]: ...
    async def end_offsets(self, partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, int]: ...
    def seek(self, partition: TopicPartition, offset: int) -> None: ...
    def last_poll_timestamp(self, partition: TopicPartition) -> int | None: ...
    async def topics(self) -> set[str]: ...


class RebalanceListener(ConsumerRebalanceListener):  # type: ignore[misc]  # the driver insists on its own class
    """Told by the driver, in the order of the methods; it waits for both."""

    @abstractmethod
    async def on_partitions_revoked(  # pyright: ignore[reportIncompatibleMethodOverride]  # it awaits coroutines
        self, revoked: Collection[TopicPartition]
    ) -> None: ...

    @abstractmethod
    async def on_partitions_assigned(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, assigned: Collection[TopicPartition]
    ) -> None: ...


class TopicState(NamedTuple):
    """A topic as the cluster describes it: its error (None where it is fine) and the copies of each partition."""

    error: type[KafkaError] | None
    replicas: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """Builds clients of one cluster; made when the broker is opened, since it holds the TLS context."""

    settings: KafkaSettings
    ssl_context: SSLContext | None

    def producer(self) -> ProducerClient:
        settings = self.settings
        producer: ProducerClient = cast(Any, aiokafka).AIOKafkaProducer(
            **self._common(),
            request_timeout_ms=_REQUEST_TIMEOUT_MS,
            enable_idempotence=True,
            acks="all",
            compression_type=settings.compression,
            max_batch_size=settings.max_batch_bytes,
            linger_ms=0,
        )
        return producer

    def consumer(self, group: str) -> ConsumerClient:
        """Joins a group by itself, but decides nothing by itself: no automatic commit, no automatic reset.

        `max_poll_interval_ms` would make it leave the group when nobody reads for a while. Here a member lives as
        long as its event loop does, which the heartbeats prove; a worker that is full may take its time.
        """
        settings = self.settings
        rebalance_timeout_ms = _ms(settings.revoke_timeout_s + settings.session_timeout_s)
        consumer: ConsumerClient = cast(Any, aiokafka).AIOKafkaConsumer(
            **self._common(),
            group_id=group,
            # A join is answered only when all members have joined.
            request_timeout_ms=max(_REQUEST_TIMEOUT_MS, rebalance_timeout_ms + 10_000),
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            fetch_max_wait_ms=settings.fetch_max_wait_ms,
            max_partition_fetch_bytes=settings.fetch_partition_bytes,
            max_poll_interval_ms=_NEVER_MS,
            rebalance_timeout_ms=rebalance_timeout_ms,
            session_timeout_ms=_ms(settings.session_timeout_s),
            heartbeat_interval_ms=_ms(settings.heartbeat_interval_s),
        )
        return consumer

    def admin(self) -> "AdminClient":
        connect_timeout_ms = _ms(self.settings.connect_timeout_s)
        return AdminClient(cast(Any, AIOKafkaAdminClient)(**self._common(), request_timeout_ms=connect_timeout_ms))

    async def knock(self) -> None:
        """Open a connection to the first server that lets us, and close it.

        aiokafka's clients log why they cannot connect, and raise an error that does not say it. This says it.

        Raises:
            OSError, KafkaError, TimeoutError: What the last server said, or did not.
        """
        error: BaseException = ConnectionError("no server is named")
        for server in self.settings.servers:
            try:
                await self._knock_at(server)
            except (OSError, KafkaError, EOFError) as failure:
                error = failure
            else:
                return
        raise error

    async def _knock_at(self, server: str) -> None:
        host, _, port = server.rpartition(":") if ":" in server.rpartition("]")[2] else (server, "", "9092")
        connection = await cast(Any, connections).create_conn(
            host.strip("[]"),
            int(port),
            **{name: value for name, value in self._common().items() if name in _CONNECTION_OPTIONS},
            request_timeout_ms=_ms(self.settings.connect_timeout_s),
        )
        await connection.close()

    def _common(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "bootstrap_servers": settings.servers,
            "client_id": settings.client_id,
            "metadata_max_age_ms": _ms(settings.metadata_max_age_s),
            "connections_max_idle_ms": _MAX_IDLE_MS,
            "security_protocol": _PROTOCOLS[settings.security],
            "ssl_context": self.ssl_context,
            "sasl_mechanism": settings.mechanism,
            "sasl_plain_username": settings.username,
            "sasl_plain_password": settings.password.get_secret_value() if settings.password else None,
        }


class AdminClient:
    """What we ask of the cluster besides reading and writing. Its connection is opened again when it broke."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def start(self, *, within_s: float) -> None:
        await start_client(self._client.start(), within_s=within_s)

    async def close(self) -> None:
        await self._client.close()

    async def topics(self, names: Collection[str]) -> dict[str, TopicState]:
        """Look topics up without making a broker create them, which aiokafka's own `describe_topics` does."""
        request = MetadataRequest(sorted(names), allow_auto_topic_creation=False)
        response = await self._client._send_request(request)
        return {topic["topic"]: _topic_state(topic) for topic in response.to_object()["topics"]}

    async def nodes(self) -> Sequence[str]:
        """`host:port` of each broker of the cluster."""
        response = await self._client._send_request(MetadataRequest([], allow_auto_topic_creation=False))
        return [f"{broker['host']}:{broker['port']}" for broker in response.to_object()["brokers"]]

    async def topic_configs(self, names: Sequence[str]) -> dict[str, dict[str, str]]:
        """The settings of topics; those that we may not read are left out."""
        resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
        responses = await self._client.describe_configs(resources)
        return {
            name: {entry[0]: entry[1] for entry in entries}
            for response in responses
            for code, _, _, name, entries in response.resources
            if code == 0
        }

    async def create_topic(
        self, name: str, *, partitions: int, replication: int, configs: Mapping[str, str]
    ) -> tuple[type[KafkaError], str]:
        """The broker's answer: an error class, `NoError` when it was made, and its words."""
        # An empty assignment lets aiokafka pass on -1, the broker's default.
        assignment: dict[int, list[int]] | None = {} if replication == -1 else None
        topic = NewTopic(name, partitions, replication, assignment, dict(configs))
        response = await self._client.create_topics([topic])
        _, code, *words = response.topic_errors[0]
        return for_code(code), str(words[0]) if words and words[0] else ""

    def api_versions(self) -> Mapping[int, tuple[int, int]]:
        """Which versions of which requests (by API key) the connected broker understands."""
        for connection in self._client._client._conns.values():
            return cast(Mapping[int, tuple[int, int]], connection._versions)
        return {}


async def start_client(starting: Awaitable[None], *, within_s: float) -> None:
    """Await a client's `start`. Cancelled in the middle it would leave a connection open: it gets a moment to end.

    Raises:
        TimeoutError: It did not end in time.
        KafkaError: It could not start.
    """
    task = asyncio.ensure_future(starting)
    try:
        await asyncio.wait([task], timeout=within_s)
    except asyncio.CancelledError:
        with anyio.CancelScope(shield=True):
            await asyncio.wait([task], timeout=_MOMENT_S)
            await _end(task)
        raise
    if not task.done():
        await _end(task)
        raise TimeoutError
    task.result()


async def _end(task: "asyncio.Future[None]") -> None:
    task.cancel()
    await asyncio.wait([task], timeout=0.1)
    if task.done() and not task.cancelled():
        task.exception()


def known_partitions(producer: ProducerClient, topic: str) -> int:
    """How many partitions the producer has seen of a topic; 0 when it does not know the topic."""
    return len(cast(Any, producer).client.cluster.partitions_for_topic(topic) or ())


def known_position(consumer: ConsumerClient, place: TopicPartition) -> int | None:
    """What is read next; None while the driver has not found it out, where its own `position` would wait."""
    subscription = cast(Any, consumer)._subscription
    if not subscription.is_assigned(place):
        return None
    state = subscription.subscription.assignment.state_value(place)
    return state.position if state.has_valid_position else None


async def committed_positions(
    consumer: ConsumerClient, places: Collection[TopicPartition]
) -> dict[TopicPartition, int]:
    """Those places of which the group has a position on record, in one request."""
    found = await cast(Any, consumer)._coordinator.fetch_committed_offsets(list(places))
    return {place: committed.offset for place, committed in found.items()}


async def ping(consumer: ConsumerClient) -> None:
    """Returns when some broker of the cluster answers; raises a KafkaError when none does."""
    client = cast(Any, consumer)._client
    await client.send(client.get_random_node(), MetadataRequest([], allow_auto_topic_creation=False))


def new_batch(limit_bytes: int, compression: str | None) -> Batch:
    batch: Batch = cast(Any, BatchBuilder)(limit_bytes, _CODECS[compression])
    return batch


def record_size(key: bytes | None, value: bytes, headers: list[tuple[str, bytes]]) -> int:
    """Upper bound of the size of a batch that holds this record alone, uncompressed: what the broker compares."""
    return _estimate(key, value, headers)


def key_hash(key: bytes) -> int:
    """As all Kafka clients hash, so that a key has the same partition whoever writes it."""
    return cast(int, cast(Any, partitioner).murmur2(key)) & 0x7FFFFFFF


def silence_producer(producer: ProducerClient) -> None:
    """Send nothing more, from this moment on; to be followed by `discard_producer` when there is time to wait."""
    raw = cast(Any, producer)
    raw._closed = True
    if raw._sender._sender_task is not None:
        raw._sender._sender_task.cancel()
    _close_connections(raw.client)


async def discard_producer(producer: ProducerClient, *, within_s: float) -> None:
    """Drop it and its connections. What it has sent may still arrive; what it has not sent is forgotten."""
    raw = cast(Any, producer)
    raw._closed = True
    await _end_task(raw._sender._sender_task, within_s=within_s, first=raw.client.close)
    _close_connections(raw.client)  # the sender may have opened one more to repeat a request, before it ended


def _close_connections(client: Any) -> None:
    for connection in list(client._conns.values()):
        connection.close()


async def discard_consumer(consumer: ConsumerClient, *, within_s: float) -> None:
    """Leave the group and drop the connections, forcibly when the group or the broker keeps us waiting."""
    stopping = asyncio.ensure_future(consumer.stop())
    await asyncio.wait([stopping], timeout=within_s)
    if not stopping.done() or stopping.cancelled() or stopping.exception() is not None:
        await _tear_down(cast(Any, consumer), stopping)


async def _tear_down(consumer: Any, stopping: "asyncio.Future[None]") -> None:
    """Also when stopping has ended, but badly: a fetch that waits to be repeated cancels aiokafka's own `stop`."""
    coordinator, fetcher, client = consumer._coordinator, consumer._fetcher, consumer._client
    tasks: list[asyncio.Future[None]] = [stopping]
    if coordinator is not None:
        tasks += filter(None, [coordinator._coordination_task, coordinator._heartbeat_task])
        tasks += filter(None, [coordinator._commit_refresh_task])
    if fetcher is not None:
        tasks += [fetcher._fetch_task, *fetcher._pending_tasks]
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=1)
    if coordinator is not None:
        await _bounded(_leave_on_a_new_connection(coordinator, client), within_s=1)
    await _bounded(client.close(), within_s=1)


async def _leave_on_a_new_connection(coordinator: Any, client: Any) -> None:
    """On the old one a request to join may be waiting, and a broker takes one request of a connection at a time."""
    for (_, group), connection in list(client._conns.items()):
        if group == 1:
            connection.close()
    await coordinator._maybe_leave_group()


async def _end_task(task: Any, *, within_s: float, first: Callable[[], Awaitable[None]]) -> None:
    """A sender awaits its requests one by one when it is cancelled; each may need a cancellation of its own."""
    if task is not None:
        task.cancel()
    await _bounded(first(), within_s=within_s)
    for _ in range(100):
        if task is None or task.done():
            break
        task.cancel()
        await asyncio.wait([task], timeout=0.02)
    if task is not None and task.done() and not task.cancelled():
        task.exception()


async def _bounded(call: Awaitable[None], *, within_s: float) -> None:
    task = asyncio.ensure_future(call)
    await asyncio.wait([task], timeout=within_s)
    await _end(task)


def _topic_state(topic: Mapping[str, Any]) -> TopicState:
    error = for_code(topic["error_code"]) if topic["error_code"] else None
    return TopicState(error, [len(partition["replicas"]) for partition in topic["partitions"]])


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


_estimate: Callable[..., int] = cast(Any, DefaultRecordBatchBuilder).estimate_size_in_bytes
_PROTOCOLS = {"plain": "PLAINTEXT", "tls": "SSL", "sasl_plain": "SASL_PLAINTEXT", "sasl_tls": "SASL_SSL"}
_CODECS = {None: 0, "gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}
_CONNECTION_OPTIONS = frozenset(
    ("client_id", "security_protocol", "ssl_context", "sasl_mechanism", "sasl_plain_username", "sasl_plain_password")
)
