"""Publishing to the real server: refusals, missing topics, outages."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import suppress
from typing import Any

import anyio
import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from cqrs_decor.broker import Delivery, TopicPlan
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import (
    BrokerUnavailableError,
    RecordRejectedError,
    RecordTooLargeError,
    TopicMissingError,
)
from cqrs_decor.testing.conformance.kit import ids_by_key, sample
from cqrs_decor_kafka import KafkaBroker, KafkaSettings
from cqrs_decor_kafka.driver import Driver, discard_producer
from tests.services.fixtures import fresh_name
from tests.services.kafka import KafkaServer


async def test_a_record_over_the_topics_limit_is_refused_before_it_is_sent(
    broker: KafkaBroker, kafka_bootstrap: str, read: Callable
) -> None:
    """Sent, it would fail its whole batch and break the numbering of its partition for ten seconds."""
    topic = await topic_with_limit(broker, kafka_bootstrap, 10_000)
    batch = [sample(topic, "a"), sample(topic, "a", data=b"x" * 10_000), sample(topic, "b"), sample(topic, "a")]

    first, large, other, behind = await broker.publish(batch)

    assert (first, other) == (None, None)
    assert isinstance(large, RecordTooLargeError)
    assert large.limit == 10_000
    assert isinstance(behind, RecordRejectedError)
    assert "an earlier record of its key was refused" in str(behind)
    assert {d.content.id for d in await received(broker, topic, 2, read)} == {batch[0].id, batch[2].id}


async def test_records_that_fill_the_limit_to_the_last_bytes_pass(
    broker: KafkaBroker, kafka_bootstrap: str, read: Callable
) -> None:
    """The limit is that of a batch with its header: a check that is off by a little refuses or breaks good records."""
    topic = await topic_with_limit(broker, kafka_bootstrap, 4_000)
    batch = [sample(topic, f"key-{n}", data=b"x" * (3_500 + n)) for n in range(400)]

    outcomes = await broker.publish(batch)

    passed = sum(outcome is None for outcome in outcomes)
    assert 100 < passed < 400
    assert all(isinstance(outcome, RecordTooLargeError) for outcome in outcomes[passed:])
    await received(broker, topic, passed, read)


async def test_order_per_key_survives_a_refusal_by_the_broker(
    broker: KafkaBroker, kafka_bootstrap: str, read: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    """The topic's limit was lowered behind our back: the refused record is found, all others of the batch arrive."""
    topic = await topic_with_limit(broker, kafka_bootstrap, 100_000)
    assert await broker.publish([sample(topic, "warm-up")]) == [None]
    await set_limit(kafka_bootstrap, topic, 5_000)
    small = [sample(topic, f"key-{n % 5}", data=str(n).encode()) for n in range(100)]
    large = sample(topic, "key-2", data=b"x" * 20_000)
    batch = [*small[:50], large, *small[50:]]

    with caplog.at_level(logging.WARNING, "cqrs_decor_kafka"):
        outcomes = await broker.publish(batch)

    held = [envelope for envelope in small[50:] if envelope.key == "key-2"]
    expected = [envelope for envelope in small if envelope not in held]
    assert isinstance(outcomes[50], RecordTooLargeError)
    assert {batch[place].id for place, outcome in enumerate(outcomes) if outcome} == {large.id, *(e.id for e in held)}
    assert {record.action for record in caplog.records} == {"batch_refused"}
    arrived = await received(broker, topic, len(expected) + 1, read)
    by_key = ids_by_key([d.content for d in arrived if d.key != "warm-up"])
    assert by_key == ids_by_key(expected)
    assert await broker.publish([sample(topic, f"key-{n}") for n in range(5)]) == [None] * 5


async def test_a_missing_topic_costs_neither_time_nor_the_others(broker: KafkaBroker, topic: str) -> None:
    """aiokafka alone waits 40 s for a topic that is not there, with everything behind it."""
    missing = fresh_name()
    started = time.monotonic()

    lost, found = await broker.publish([sample(missing, "a"), sample(topic, "a")])

    assert isinstance(lost, TopicMissingError)
    assert found is None
    assert time.monotonic() - started < 10
    await broker.create_topics([TopicPlan(name=missing)])
    assert await broker.publish([sample(missing, "a")]) == [None]


async def test_a_topic_that_was_removed_is_missing(broker: KafkaBroker, topic: str, kafka_bootstrap: str) -> None:
    """Removed under a running relay, it must become an error of its own records, and not stop the relay."""
    assert await broker.publish([sample(topic, "a")]) == [None]
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka_bootstrap)
    await admin.start()
    await admin.delete_topics([topic])
    await admin.close()
    other = fresh_name()
    await broker.create_topics([TopicPlan(name=other)])

    impatient = KafkaBroker(KafkaSettings(bootstrap_servers=kafka_bootstrap, publish_timeout_s=15))
    await impatient.open()
    lost, found = await impatient.publish([sample(topic, "a"), sample(other, "a")])
    await impatient.close()

    assert isinstance(lost, TopicMissingError)
    assert found is None


async def test_a_header_that_would_be_an_attribute_is_refused(broker: KafkaBroker, topic: str) -> None:
    """Renaming it would surprise the reader, keeping it would change the event's type."""
    spoofed = sample(topic, "a")
    spoofed = Envelope(**{**fields(spoofed), "headers": {"ce_type": "other"}})

    refused, behind, other = await broker.publish([spoofed, sample(topic, "a"), sample(topic, "b")])

    assert isinstance(refused, RecordRejectedError)
    assert "'ce_type'" in str(refused)
    assert isinstance(behind, RecordRejectedError)
    assert other is None


async def test_a_compacted_topic_refuses_records_without_a_key(broker: KafkaBroker) -> None:
    """The broker would refuse the whole batch; a record without a key has no state to keep."""
    topic = fresh_name()
    await broker.create_topics([TopicPlan(name=topic, compacted=True)])

    refused, kept = await broker.publish([sample(topic, None), sample(topic, "a")])

    assert isinstance(refused, RecordRejectedError)
    assert "it has no key" in str(refused)
    assert kept is None


async def test_batches_of_one_partition_that_fill_several_requests_keep_their_order(
    broker: KafkaBroker, topic: str, read: Callable
) -> None:
    """A burst of one key is larger than one request."""
    batch = [sample(topic, "one-key", data=str(n).encode() * 2_000) for n in range(300)]

    assert await broker.publish(batch) == [None] * 300

    assert [d.content.id for d in await received(broker, topic, 300, read)] == [e.id for e in batch]


@pytest.mark.parametrize("codec", ["gzip"])
async def test_compressed_batches_are_read_like_any_other(
    kafka_bootstrap: str, topic: str, codec: str, broker: KafkaBroker, read: Callable
) -> None:
    """Compression is the publisher's own business."""
    compressing = KafkaBroker.from_url(f"kafka://{kafka_bootstrap}?compression={codec}")
    await compressing.open()
    batch = [sample(topic, "a", data=b"x" * 500) for _ in range(50)]

    assert await compressing.publish(batch) == [None] * 50
    await compressing.close()

    assert [d.content.id for d in await received(broker, topic, 50, read)] == [e.id for e in batch]


async def test_a_cancelled_publish_is_repeated_without_disorder(
    broker: KafkaBroker, topic: str, read_until: Callable
) -> None:
    """A relay that is stopped cancels; whoever takes over repeats, and first deliveries stay in order."""
    batch = [sample(topic, f"key-{n % 3}") for n in range(300)]
    tasks = []
    for _ in range(20):
        task = asyncio.ensure_future(broker.publish(batch))
        await asyncio.wait([task], timeout=0.002 * len(tasks))
        task.cancel()
        tasks.append(task)
        await asyncio.wait([task])

    assert await broker.publish(batch) == [None] * 300

    last = [sample(topic, f"key-{n}") for n in range(3)]
    await broker.publish(last)
    async with broker.subscribe(fresh_name(), [topic]) as subscription:
        arrived = await read_until(subscription, {e.id for e in last})
    assert ids_by_key(arrived) == ids_by_key([*batch, *last])


# --- outages ---


@pytest.fixture(scope="module")
def own_server() -> Iterator[KafkaServer]:
    with KafkaServer() as server:
        yield server


@pytest.fixture
async def own(own_server: KafkaServer) -> AsyncGenerator[KafkaBroker]:
    """A broker on a server that the test may kill."""
    own_server.start()
    url = f"kafka://{own_server.bootstrap}?publish_timeout_s=3&connect_timeout_s=5&topic_partitions=4"
    broker = KafkaBroker.from_url(url)
    await broker.open()
    yield broker
    with anyio.fail_after(20):
        await broker.close()


async def test_publishing_recovers_by_itself_when_the_broker_comes_back(
    own: KafkaBroker, own_server: KafkaServer, read_until: Callable, eventually: Callable
) -> None:
    """SIGKILL while batches are in flight: each call ends in bounded time, repeating is enough, nothing is lost."""
    topic = fresh_name()
    await own.create_topics([TopicPlan(name=topic)])
    published: list[Envelope] = []
    outages = 0

    async def relay() -> None:
        nonlocal outages
        for number in range(40):
            batch = [sample(topic, f"key-{n % 7}", data=f"{number}/{n}".encode()) for n in range(200)]
            published.extend(batch)
            while True:
                with anyio.fail_after(15):
                    try:
                        assert await own.publish(batch) == [None] * 200
                        break
                    except BrokerUnavailableError:
                        outages += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(relay)
        await eventually(lambda: len(published) >= 2_000, "the relay is under way")
        own_server.kill()
        await eventually(lambda: outages > 0, "the outage is told")
        own_server.start()

    async with own.subscribe(fresh_name(), [topic]) as subscription:
        arrived = await read_until(subscription, {e.id for e in published})
    assert outages >= 1
    assert ids_by_key(arrived) == ids_by_key(published)


async def test_a_broker_that_is_away_is_told_in_bounded_time(own: KafkaBroker, own_server: KafkaServer) -> None:
    """The relay counts an outage as nobody's fault, if it is told of one; and `close` must not wait for its end."""
    topic = fresh_name()
    await own.create_topics([TopicPlan(name=topic)])
    assert await own.publish([sample(topic, "a")]) == [None]
    own_server.kill()

    with anyio.fail_after(15), pytest.raises(BrokerUnavailableError, match="not all was acknowledged within 3 s"):
        await own.publish([sample(topic, "a")])
    with anyio.fail_after(15), pytest.raises(BrokerUnavailableError):
        await own.publish([sample(topic, "a")])
    with anyio.fail_after(10):
        await own.close()


async def test_a_frozen_broker_does_not_hang_us(own: KafkaBroker, own_server: KafkaServer) -> None:
    """Behind a network that swallows packets nothing fails by itself: only our own clock ends the wait."""
    topic = fresh_name()
    await own.create_topics([TopicPlan(name=topic)])
    assert await own.publish([sample(topic, "a")]) == [None]
    own_server.pause()
    try:
        with anyio.fail_after(15), pytest.raises(BrokerUnavailableError):
            await own.publish([sample(topic, "a")])
        with anyio.fail_after(10):
            await own.close()
    finally:
        own_server.resume()


async def test_opening_can_be_repeated_until_the_broker_is_there(own_server: KafkaServer) -> None:
    """Services start in any order."""
    own_server.kill()
    broker = KafkaBroker.from_url(f"kafka://{own_server.bootstrap}?connect_timeout_s=5")

    with pytest.raises(BrokerUnavailableError) as caught:
        await broker.open()
    await broker.close()
    own_server.start()
    await broker.open()
    await broker.close()

    assert own_server.bootstrap in str(caught.value)


async def test_publishing_before_opening_says_so() -> None:
    """Better than an attribute error from inside."""
    with pytest.raises(BrokerUnavailableError, match="has not been opened"):
        await KafkaBroker(KafkaSettings()).publish([sample("t", "a")])


async def topic_with_limit(broker: KafkaBroker, bootstrap: str, limit: int) -> str:
    topic = fresh_name()
    await broker.create_topics([TopicPlan(name=topic)])
    await set_limit(bootstrap, topic, limit)
    return topic


async def set_limit(bootstrap: str, topic: str, limit: int) -> None:
    """Change the topic's limit, and return when the broker acts on it."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    limited = ConfigResource(ConfigResourceType.TOPIC, topic, {"max.message.bytes": str(limit)})
    await admin.alter_configs([limited])
    resource = ConfigResource(ConfigResourceType.TOPIC, topic)
    with anyio.fail_after(20):
        while True:
            [answer] = await admin.describe_configs([resource])
            if ("max.message.bytes", str(limit)) in [entry[:2] for entry in answer.resources[0][4]]:
                break
    await admin.close()


async def received(broker: KafkaBroker, topic: str, count: int, read: Callable) -> list[Delivery]:
    async with broker.subscribe(fresh_name(), [topic]) as subscription:
        return await read(subscription, count)


def fields(envelope: Envelope) -> dict[str, object]:
    return {name: getattr(envelope, name) for name in Envelope.__dataclass_fields__}


async def test_a_sender_that_connects_once_more_before_it_ends_leaves_nothing_open(kafka_url: str) -> None:
    """A request that is repeated while the producer is dropped opens a connection when all of them were closed."""
    settings = KafkaSettings.from_url(kafka_url)
    producer = Driver(settings=settings, ssl_context=None).producer()
    await producer.start()
    raw: Any = producer
    sender = raw._sender._sender_task

    async def repeat() -> None:
        for _ in range(2):  # as a sender that is cancelled while it waits for one of its requests, and for another
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        opened.append(await raw.client._get_conn(raw.client.get_random_node()))

    opened = list[Any]()
    raw._sender._sender_task = asyncio.create_task(repeat())
    await asyncio.sleep(0)

    await discard_producer(producer, within_s=1)
    sender.cancel()
    await asyncio.wait([sender])

    assert [connection.connected() for connection in opened] == [False]
