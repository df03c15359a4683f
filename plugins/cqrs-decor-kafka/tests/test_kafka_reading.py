"""Consumer groups on the real server: rebalances, kills, restarts, lost positions."""

import asyncio
import logging
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

from cqrs_decor.broker import Delivery, Partition, Subscription, TopicPlan
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import BrokerUnavailableError, MalformedEnvelopeError
from cqrs_decor.observers import Moment, Observers, OffsetReset
from cqrs_decor.testing.conformance.kit import ids_by_key, sample
from cqrs_decor_kafka import KafkaBroker
from cqrs_decor_kafka.binding import headers_of
from tests.services.fixtures import fresh_name
from tests.services.kafka import KafkaServer

SOON = timedelta(milliseconds=200)


# --- sharing ---


async def test_partitions_are_let_go_before_another_reader_gets_them(
    broker: KafkaBroker, topic: str, group: str, read: Callable
) -> None:
    """A rebalance in the middle of handling: what is finished during `on_revoked` is recorded, and not repeated."""
    published = [sample(topic, f"key-{n}") for n in range(60)]
    await broker.publish(published)
    handled: list[Delivery] = []
    told: list[Collection[Partition]] = []

    async def finish(partitions: Collection[Partition]) -> None:
        told.append(partitions)
        await first.ack(handled)

    async with broker.subscribe(group, [topic], on_revoked=finish) as first:
        handled += await read(first, 60)
        async with broker.subscribe(group, [topic]) as second:
            fresh = [sample(topic, f"key-{n}") for n in range(40)]
            await broker.publish(fresh)
            arrived: list[Delivery] = []
            while len(arrived) < 40:
                for subscription in (first, second):
                    arrived += await subscription.receive(50, SOON)

    assert {p.number for p in told[0]} == {0, 1, 2, 3}
    assert {d.partition for d in handled} == set(told[0])
    assert {d.content.id for d in arrived} == {e.id for e in fresh}


async def test_a_reader_that_cannot_let_go_does_not_stop_the_group(
    kafka_url: str, topic: str, group: str, eventually: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    """A handler that hangs must not keep a new process from getting work; its messages are repeated there."""
    broker = KafkaBroker.from_url(f"{kafka_url}&revoke_timeout_s=1")
    await broker.open()
    published = [sample(topic, f"key-{n}") for n in range(40)]
    await broker.publish(published)

    async def hang(_: Collection[Partition]) -> None:
        await asyncio.Event().wait()

    async with broker.subscribe(group, [topic], on_revoked=hang) as first, reading(first) as stuck:
        await eventually(lambda: len(stuck) == 40, "the first reader holds everything")
        async with broker.subscribe(group, [topic]) as second, reading(second) as other:
            await eventually(lambda: len(other) > 0, "the second reader gets its share")
    await broker.close()

    assert "revoke_timed_out" in [getattr(record, "action", "") for record in caplog.records]


async def test_an_acknowledgement_of_a_past_epoch_is_left_out(
    broker: KafkaBroker, topic: str, group: str, read: Callable, eventually: Callable
) -> None:
    """A handler that ends after its partition was given away must not move the position of its new owner."""
    await broker.publish([sample(topic, f"key-{n}") for n in range(40)])
    async with broker.subscribe(group, [topic]) as first:
        held = await read(first, 40)
        async with broker.subscribe(group, [topic]) as second, reading(second) as taken, reading(first) as again:
            await eventually(lambda: len(taken) + len(again) >= 40, "everything is delivered again")
            await first.ack(held)

    assert {d.partition.epoch for d in held}.isdisjoint(d.partition.epoch for d in again)
    async with broker.subscribe(group, [topic]) as third:
        assert len(await read(third, 40)) == 40


async def test_readers_that_come_and_go_lose_nothing_and_never_run_ahead(
    broker: KafkaBroker, topic: str, group: str, kafka_bootstrap: str, eventually: Callable
) -> None:
    """The position on record may be behind what was handled, never before it; each message is handled by somebody."""
    published = [sample(topic, f"key-{n % 30}") for n in range(600)]
    handled: dict[tuple[int, int], str] = {}
    ahead: list[str] = []

    async def handle(subscription: Subscription) -> None:
        while True:
            for delivery in await subscription.receive(7, SOON):
                await anyio.lowlevel.checkpoint()
                handled[delivery.partition.number, delivery.position] = delivery.content.id
                await subscription.ack([delivery])

    async def come_and_go() -> None:
        for _ in range(5):
            async with broker.subscribe(group, [topic]) as subscription, anyio.create_task_group() as tasks:
                tasks.start_soon(handle, subscription)
                with anyio.move_on_after(1.0):
                    await eventually(lambda: len(handled) >= 600, "all are handled")
                tasks.cancel_scope.cancel()
            ahead.extend(await positions_ahead(kafka_bootstrap, group, topic, handled))

    async with broker.subscribe(group, [topic]) as stays, anyio.create_task_group() as tasks:
        tasks.start_soon(handle, stays)
        tasks.start_soon(come_and_go)
        for start in range(0, 600, 20):
            await broker.publish(published[start : start + 20])
            await anyio.sleep(0.05)
        await eventually(lambda: set(handled.values()) == {e.id for e in published}, "everything was handled")
        tasks.cancel_scope.cancel()

    assert ahead == []


def test_what_a_killed_process_held_goes_to_another_one(kafka_url: str, tmp_path: Path, kafka_bootstrap: str) -> None:
    """SIGKILL of a reader with unacknowledged work: another process gets all of it, and nothing is lost."""
    topic, group = fresh_name(), fresh_name()
    published = [sample(topic, f"key-{n}") for n in range(200)]
    asyncio.run(publish_to_new_topic(kafka_url, topic, published))

    victim = reading_process(kafka_url, group, topic, tmp_path / "victim", "hold")
    wait_until(lambda: len(ids_in(tmp_path / "victim")) >= 50, "the victim holds work")
    heir = reading_process(kafka_url, group, topic, tmp_path / "heir", "ack")
    try:
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        held = ids_in(tmp_path / "victim")
        wait_until(lambda: ids_in(tmp_path / "heir") >= {e.id for e in published}, "the heir has everything")
    finally:
        heir.kill()
        heir.wait()

    assert held
    assert held <= ids_in(tmp_path / "heir")


async def test_a_worker_that_is_full_stays_a_member(
    broker: KafkaBroker, topic: str, group: str, kafka_bootstrap: str, read: Callable, eventually: Callable
) -> None:
    """Negative control beside it: aiokafka by itself leaves the group when nobody reads for `max_poll_interval_ms`."""
    lost: list[Collection[Partition]] = []
    left_group = fresh_name()

    async def revoked(partitions: Collection[Partition]) -> None:
        lost.append(partitions)

    raw = AIOKafkaConsumer(
        topic,
        bootstrap_servers=kafka_bootstrap,
        group_id=left_group,
        max_poll_interval_ms=1_000,
        session_timeout_ms=6_000,
        heartbeat_interval_ms=300,
    )
    await raw.start()
    try:
        async with broker.subscribe(group, [topic], on_revoked=revoked) as ours:
            await broker.publish([sample(topic, f"key-{n}") for n in range(10)])
            held = await read(ours, 10)
            with anyio.fail_after(40):
                while await members_of(kafka_bootstrap, left_group):
                    await ours.backlog()
            assert len(await members_of(kafka_bootstrap, group)) == 1

            await ours.ack(held)
            await broker.publish([sample(topic, "a")])
            [delivery] = await read(ours, 1)
    finally:
        await raw.stop()

    assert lost == []
    assert delivery.partition in {d.partition for d in held}


# --- where a group begins ---


async def test_a_group_that_begins_at_the_end_keeps_what_came_before_its_first_acknowledgement(
    broker: KafkaBroker, topic: str, group: str, read: Callable
) -> None:
    """A reader that dies before it has acknowledged anything must not take the beginning along."""
    await broker.publish([sample(topic, f"key-{n}") for n in range(20)])
    async with broker.subscribe(group, [topic], start="latest") as first:
        fresh = [sample(topic, f"key-{n}") for n in range(20)]
        await broker.publish(fresh)
        await read(first, 5)

    async with broker.subscribe(group, [topic], start="latest") as second:
        arrived = await read(second, 20)

    assert {d.content.id for d in arrived} == {e.id for e in fresh}


async def test_a_topic_that_a_running_group_adds_begins_at_the_end_too(
    broker: KafkaBroker, topic: str, group: str, read: Callable, eventually: Callable
) -> None:
    """A rolling deployment that reads one topic more: a group with members takes no positions from outside."""
    added = fresh_name()
    await broker.create_topics([TopicPlan(name=added)])
    old, fresh = sample(added, "a"), sample(added, "a")
    await broker.publish([old])

    async with (
        broker.subscribe(group, [topic], start="latest") as before,
        reading(before),
        broker.subscribe(group, [topic, added], start="latest") as after,
        reading(after) as arrived,
    ):
        assert await after.backlog() == 0
        await eventually(lambda: has_begun(after, added), "its beginning is on record")
        await broker.publish([fresh])
        await eventually(lambda: len(arrived) > 0, "what is new arrives")

    assert [d.content.id for d in arrived] == [fresh.id]


async def test_a_position_that_has_expired_is_told_loudly(
    broker: KafkaBroker, topic: str, group: str, kafka_bootstrap: str, read: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    """aiokafka resets in silence: a service that was away too long would skip events, and nobody would know."""
    published = [sample(topic, "one-key") for _ in range(30)]
    await broker.publish(published)
    async with broker.subscribe(group, [topic]) as subscription:
        held = await read(subscription, 10)
        await subscription.ack(held)
    number = held[0].partition.number
    await delete_records(kafka_bootstrap, topic, number, before=20)
    noticed: list[Moment] = []
    broker.observers = Observers([Notes(noticed)])

    async with broker.subscribe(group, [topic]) as subscription:
        arrived = await read(subscription, 10)

    assert [d.content.id for d in arrived] == [e.id for e in published[20:]]
    assert noticed == [OffsetReset(group=group, topic=topic, partition=number, restarted_at="20")]
    [record] = [record for record in caplog.records if getattr(record, "action", "") == "offset_reset"]
    assert record.levelno == logging.WARNING
    assert (record.group, record.topic, record.partition) == (group, topic, number)
    assert (record.lost_position, record.restarted_at) == (10, 20)


# --- what is read ---


async def test_records_that_cannot_be_read_are_delivered_as_reasons(
    broker: KafkaBroker, topic: str, group: str, kafka_bootstrap: str, read: Callable
) -> None:
    """Foreign records in a topic are parked by the worker; the partition goes on."""
    good = sample(topic, "k")
    raw = AIOKafkaProducer(bootstrap_servers=kafka_bootstrap)
    await raw.start()
    await raw.send_and_wait(topic, b"plain text", key=b"k")
    await raw.send_and_wait(topic, b"{", key=b"k", headers=[("content-type", b"application/cloudevents+json")])
    await raw.send_and_wait(topic, b"{}", key=b"k", headers=[("ce_id", b"\xff")])
    await raw.send_and_wait(topic, None, key=b"k")
    await raw.send_and_wait(topic, good.data, key=b"k", headers=headers_of(good))
    await raw.stop()

    async with broker.subscribe(group, [topic]) as subscription:
        *bad, last = await read(subscription, 5)

    assert [type(d.content) for d in bad] == [MalformedEnvelopeError] * 4
    assert [(d.raw, d.key) for d in bad] == [(b"plain text", "k"), (b"{", "k"), (b"{}", "k"), (b"", "k")]
    assert last.content == good


async def test_records_of_aborted_transactions_are_not_read(
    broker: KafkaBroker, topic: str, group: str, kafka_bootstrap: str, read: Callable
) -> None:
    """A producer of another system that took its events back never published them."""
    good = sample(topic, "k")
    raw = AIOKafkaProducer(bootstrap_servers=kafka_bootstrap, transactional_id=fresh_name())
    await raw.start()
    await raw.begin_transaction()
    await raw.send_and_wait(topic, b"{}", key=b"k", headers=headers_of(sample(topic, "k")))
    await raw.abort_transaction()
    async with raw.transaction():
        await raw.send_and_wait(topic, good.data, key=b"k", headers=headers_of(good))
    await raw.stop()

    async with broker.subscribe(group, [topic]) as subscription:
        [delivery] = await read(subscription, 1)
        await subscription.receive(1, SOON)
        backlog = await subscription.backlog()

    assert delivery.content == good
    assert backlog == 0


async def test_the_backlog_is_known_before_anything_is_received(
    broker: KafkaBroker, topic: str, group: str, read: Callable
) -> None:
    """`drain` asks for it first; 0 from a reader that has no partitions yet would end it at once."""
    await broker.publish([sample(topic, f"key-{n}") for n in range(30)])

    async with broker.subscribe(group, [topic]) as subscription:
        before = await subscription.backlog()
        deliveries = await read(subscription, 10)
        await subscription.ack(contiguous := deliveries)
    async with broker.subscribe(group, [topic]) as subscription:
        after = await subscription.backlog()

    assert before == 30
    assert after == 30 - len(contiguous)


async def test_receive_honours_its_wait(broker: KafkaBroker, topic: str, group: str) -> None:
    """The worker's loop must get its turn, also while the group is being shared out."""
    async with broker.subscribe(group, [topic]) as subscription:
        started = time.monotonic()
        for _ in range(5):
            assert await subscription.receive(10, SOON) == []
        took = time.monotonic() - started

    assert 0.9 < took < 5


# --- outages ---


@pytest.fixture(scope="module")
def own_server() -> Iterator[KafkaServer]:
    with KafkaServer() as server:
        yield server


@pytest.fixture
async def own(own_server: KafkaServer) -> AsyncGenerator[KafkaBroker]:
    """A broker on a server that the test may kill."""
    own_server.start()
    url = f"kafka://{own_server.bootstrap}?topic_partitions=4&connect_timeout_s=5&commit_timeout_s=3&close_timeout_s=2"
    broker = KafkaBroker.from_url(url)
    await broker.open()
    yield broker
    with anyio.fail_after(20):
        await broker.close()


async def test_reading_recovers_by_itself_when_the_broker_comes_back(
    own: KafkaBroker, own_server: KafkaServer, eventually: Callable
) -> None:
    """SIGKILL of the broker in the middle of reading: it is told, and afterwards everything goes on, in order."""
    topic, group = fresh_name(), fresh_name()
    await own.create_topics([TopicPlan(name=topic)])
    published = [sample(topic, f"key-{n % 5}") for n in range(100)]
    await own.publish(published)
    handled: list[Envelope] = []
    outages: list[str] = []

    async def worker(subscription: Subscription) -> None:
        while True:
            try:
                fresh = await subscription.receive(10, SOON)
                handled.extend(d.content for d in fresh)
                await subscription.ack(fresh)
            except BrokerUnavailableError as error:
                outages.append(error.reason)
                await anyio.sleep(0.1)

    async with own.subscribe(group, [topic]) as subscription, anyio.create_task_group() as tasks:
        tasks.start_soon(worker, subscription)
        await eventually(lambda: len(handled) >= 100, "the first hundred is read")
        own_server.kill()
        await eventually(lambda: bool(outages), "the outage is told")
        own_server.start()
        more = [sample(topic, f"key-{n % 5}") for n in range(100)]
        with anyio.fail_after(30):
            while True:
                try:
                    assert await own.publish(more) == [None] * 100
                    break
                except BrokerUnavailableError:
                    await anyio.sleep(0.1)
        await eventually(lambda: {e.id for e in handled} >= {e.id for e in more}, "the second hundred is read")
        tasks.cancel_scope.cancel()

    assert ids_by_key(handled) == ids_by_key([*published, *more])


async def test_leaving_while_the_broker_is_away_ends(own: KafkaBroker, own_server: KafkaServer) -> None:
    """A service must be able to stop during an outage."""
    topic = fresh_name()
    await own.create_topics([TopicPlan(name=topic)])
    await own.publish([sample(topic, "a")])

    with anyio.fail_after(20):
        async with own.subscribe(fresh_name(), [topic]) as subscription:
            held = await subscription.receive(1, timedelta(seconds=10))
            own_server.kill()
            with pytest.raises(BrokerUnavailableError):
                await subscription.ack(held)


async def test_entering_while_the_broker_is_away_says_so(own: KafkaBroker, own_server: KafkaServer) -> None:
    """The worker tries again then, and says that it does."""
    topic = fresh_name()
    await own.create_topics([TopicPlan(name=topic)])
    own_server.kill()

    with anyio.fail_after(20), pytest.raises(BrokerUnavailableError):
        async with own.subscribe(fresh_name(), [topic]):
            pass


@asynccontextmanager
async def reading(subscription: Subscription) -> AsyncGenerator[list[Delivery]]:
    """Read in the background, acknowledging nothing."""
    arrived: list[Delivery] = []

    async def read_on() -> None:
        while True:
            arrived.extend(await subscription.receive(50, SOON))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read_on)
        yield arrived
        tasks.cancel_scope.cancel()


def has_begun(subscription: object, topic: str) -> bool:
    """All partitions of the topic that this reader holds have a position, and it holds some."""
    held = [place for place in subscription._held if place.topic == topic]
    positions = subscription._consumer._subscription.subscription.assignment
    return bool(held) and all(positions.state_value(place).has_valid_position for place in held)


async def positions_ahead(bootstrap: str, group: str, topic: str, handled: dict[tuple[int, int], str]) -> list[str]:
    """Positions on record that are past something which was not handled."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    recorded = await admin.list_consumer_group_offsets(group)
    await admin.close()
    return [
        f"{place.partition} at {found.offset}"
        for place, found in recorded.items()
        if place.topic == topic and any((place.partition, n) not in handled for n in range(found.offset))
    ]


async def members_of(bootstrap: str, group: str) -> list[object]:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    [described] = await admin.describe_consumer_groups([group])
    await admin.close()
    return list(described.groups[0][5])


async def delete_records(bootstrap: str, topic: str, partition: int, *, before: int) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    await admin.delete_records({TopicPartition(topic, partition): RecordsToDelete(before)})
    await admin.close()


async def publish_to_new_topic(url: str, topic: str, envelopes: list[Envelope]) -> None:
    broker = KafkaBroker.from_url(url)
    await broker.open()
    await broker.create_topics([TopicPlan(name=topic)])
    assert await broker.publish(envelopes) == [None] * len(envelopes)
    await broker.close()


def reading_process(url: str, group: str, topic: str, ledger: Path, then: str) -> subprocess.Popen[bytes]:
    script = Path(__file__).with_name("reading_process.py")
    return subprocess.Popen([sys.executable, str(script), url, group, topic, str(ledger), then])


def ids_in(ledger: Path) -> set[str]:
    if not ledger.exists():
        return set()
    return {line.split()[0] for line in ledger.read_text().splitlines() if line}


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, f"not within 60 s: {what}"
        time.sleep(0.05)


class Notes:
    """An observer that keeps what it is told."""

    def __init__(self, moments: list[Moment]) -> None:
        self._moments = moments

    def notice(self, moment: Moment) -> None:
        self._moments.append(moment)
