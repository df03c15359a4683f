"""The log within one process: what it refuses, how lanes change hands, what it asks of the database."""

import asyncio
import logging
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event, text

from cqrs_decor.broker import Delivery, Partition, TopicPlan
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import (
    BadUrlError,
    BrokerUnavailableError,
    MalformedEnvelopeError,
    RecordRejectedError,
    RecordTooLargeError,
    SchemaMissingError,
    SettingError,
)
from cqrs_decor_sqlalchemy.database import Work
from cqrs_decor_sqlalchemy.log_broker import LogTableBroker
from cqrs_decor_sqlalchemy.log_database import LogDatabase
from cqrs_decor_sqlalchemy.log_settings import LogSettings, log_options
from cqrs_decor_sqlalchemy.log_subscription import LogSubscription
from cqrs_decor_sqlalchemy.store import SqlAlchemyStore

NO_WAIT = timedelta(0)
POLL = timedelta(seconds=0.2)
PATIENCE_S = 30.0
QUICK = LogSettings(beat=timedelta(seconds=0.1), lease=timedelta(seconds=5), revoke_limit=timedelta(seconds=0.2))


# --- publishing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faulty", "reason"),
    [
        ({"id": "x" * 256}, "its id has 256 characters, the limit is 255"),
        ({"source": "x" * 256}, "its source has 256 characters, the limit is 255"),
        ({"type": "x" * 256}, "its type has 256 characters, the limit is 255"),
        ({"content_type": "x" * 256}, "its content type has 256 characters, the limit is 255"),
        ({"key": "x" * 1025}, "its key has 1,025 characters, the limit is 1,024"),
        ({"type": "a\0b"}, "its type holds a character that a database cannot store"),
        ({"type": "\ud800"}, "its type holds a character that a database cannot store"),
        ({"topic": "orders "}, "its topic ends in a blank, which MySQL and MariaDB do not see"),
        ({"version": -1}, "its version -1 is no number from 0 to 2147483647"),
    ],
)
async def test_a_record_that_no_column_can_hold_is_refused_with_its_reason(
    sqlite_url: str, faulty: dict[str, Any], reason: str
) -> None:
    """The database would refuse the whole batch, or cut the text off: both are worse than one parked record."""
    async with _broker(sqlite_url) as broker:
        refused, behind, other = await broker.publish(
            [replace(_envelope("a"), **faulty), replace(_envelope("a"), **faulty), _envelope("b")]
        )

    assert isinstance(refused, RecordRejectedError)
    assert reason in str(refused)
    assert isinstance(behind, RecordRejectedError)
    assert other is None


async def test_a_record_that_is_too_large_names_both_sizes(sqlite_url: str) -> None:
    """Who reads the parked record has to see by how much it must shrink."""
    async with _broker(sqlite_url, settings=LogSettings(max_bytes=10)) as broker:
        [error] = await broker.publish([replace(_envelope("a"), data=b"x" * 11)])

    assert isinstance(error, RecordTooLargeError)
    assert (error.size, error.limit) == (11, 10)


async def test_only_the_refused_key_is_held_back(sqlite_url: str) -> None:
    """The later records of a refused one would overtake it when it is retried; no others are concerned."""
    async with _broker(sqlite_url) as broker, broker.subscribe("group", ["orders"]) as subscription:
        bad = replace(_envelope("a"), type="x" * 256)
        batch = [_envelope("a"), bad, _envelope("a"), _envelope("b"), _envelope(None), replace(bad, key=None)]
        outcomes = await broker.publish([*batch, _envelope(None)])
        deliveries = await _receive(subscription, 4)

    assert [outcome is None for outcome in outcomes] == [True, False, False, True, True, False, True]
    assert sorted(str(delivery.key) for delivery in deliveries) == ["None", "None", "a", "b"]


async def test_many_first_publishers_of_a_topic_do_not_get_in_each_others_way(database_url: str) -> None:
    """All services start at once after a deployment, and none may fail because another made the topic."""
    async with _broker(database_url) as broker:
        outcomes = await asyncio.gather(*(broker.publish([_envelope(f"key-{n}")]) for n in range(16)))
        async with broker.subscribe("group", ["orders"]) as subscription:
            deliveries = await _receive(subscription, 16)

    assert outcomes == [[None]] * 16
    assert len({delivery.key for delivery in deliveries}) == 16


async def test_several_services_can_open_an_empty_database_at_once(database_url: str) -> None:
    """Nobody prepares a broker database: the first ones to come make the tables, at the same time."""
    brokers = [LogTableBroker.from_url(database_url) for _ in range(4)]
    await asyncio.gather(*(broker.open() for broker in brokers))
    findings = await brokers[0].check([])
    await asyncio.gather(*(broker.close() for broker in brokers))

    assert [finding.severity for finding in findings] == ["ok"]


async def test_names_are_told_apart_by_every_letter(database_url: str) -> None:
    """MySQL and MariaDB take `Orders` for `orders` unless they are told not to: two topics would be one."""
    async with _broker(database_url) as broker:
        await broker.publish([_envelope("a", topic="orders"), _envelope("b", topic="Orders")])
        async with broker.subscribe("Group", ["Orders"]) as upper, broker.subscribe("group", ["Orders"]) as lower:
            [one] = await _receive(upper, 1)
            [other] = await _receive(lower, 1)

    assert (one.key, other.key) == ("b", "b")
    assert one.partition.topic == "Orders"


# --- reading --------------------------------------------------------------------------------------------------------


async def test_an_idle_reader_asks_one_query_and_one_that_lags_behind_asks_one_for_each_batch(sqlite_url: str) -> None:
    """What a reader costs the database while nothing happens is paid for day and night."""
    async with _broker(sqlite_url) as broker, broker.subscribe("group", ["orders"]) as subscription:
        with _statements(broker) as asked:
            await subscription.receive(10, NO_WAIT)
        idle = asked()
        await broker.publish([_envelope("a") for _ in range(30)])
        await _receive(subscription, 10)
        with _statements(broker) as asked:
            await _receive(subscription, 10)
        lagging = asked()

    assert len(idle) == 1
    assert "log_lane" in idle[0]
    assert len(lagging) == 1
    assert "cqrs_log\n" in lagging[0]


async def test_no_lane_starves_another(sqlite_url: str) -> None:
    """One busy aggregate must not keep all others from being handled."""
    async with _broker(sqlite_url) as broker, broker.subscribe("group", ["orders"]) as subscription:
        await broker.publish([_envelope("busy") for _ in range(500)])
        await broker.publish([_envelope(f"key-{n}") for n in range(160)])
        deliveries = await subscription.receive(320, NO_WAIT)

    assert len({delivery.partition for delivery in deliveries}) == 16
    assert len([delivery for delivery in deliveries if delivery.key != "busy"]) > 100
    assert len(deliveries) == 320


async def test_a_row_that_cannot_be_read_is_delivered_with_the_reason(sqlite_url: str) -> None:
    """Rows may come from other writers: one that nobody can read has to be parked, not to stop its lane for ever."""
    async with _broker(sqlite_url) as broker, broker.subscribe("group", ["orders"]) as subscription:
        await broker.publish([replace(_envelope("a"), data=b"raw"), _envelope("a")])
        await _execute(broker, "UPDATE cqrs_log SET attributes = '[]' WHERE position = 1")
        spoilt, healthy = await _receive(subscription, 2)

    assert isinstance(spoilt.content, MalformedEnvelopeError)
    assert "attributes are not an object of texts" in str(spoilt.content)
    assert (spoilt.raw, spoilt.key) == (b"raw", "a")
    assert isinstance(healthy.content, Envelope)


async def test_records_that_were_deleted_are_missed_aloud(sqlite_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """A reader that waits for rows which are gone would wait for ever; one that says nothing would hide a loss."""
    async with _broker(sqlite_url) as broker, broker.subscribe("group", ["orders"]) as subscription:
        await broker.publish([_envelope("a") for _ in range(5)])
        await _execute(broker, "DELETE FROM cqrs_log WHERE position <= 3")
        deliveries = await subscription.receive(10, NO_WAIT)

    assert [delivery.position for delivery in deliveries] == [4, 5]
    assert "log_records_missing" in {record.__dict__.get("action") for record in caplog.records}


async def test_a_new_group_begins_with_the_oldest_record_that_is_kept(sqlite_url: str) -> None:
    """Retention takes records from the front: a group that came later must not wait for those."""
    async with _broker(sqlite_url) as broker:
        await broker.publish([_envelope("a") for _ in range(5)])
        await _execute(broker, "DELETE FROM cqrs_log WHERE position <= 3")
        await _execute(broker, "UPDATE cqrs_log_lane SET first_position = 4 WHERE next_position = 6")
        async with broker.subscribe("group", ["orders"]) as subscription:
            deliveries = await _receive(subscription, 2)

    assert [delivery.position for delivery in deliveries] == [4, 5]


async def test_a_database_that_went_back_in_time_makes_nobody_skip(sqlite_url: str) -> None:
    """After a fail-over to a replica that lagged, positions are given again: a reader that is ahead would pass them."""
    async with _broker(sqlite_url, settings=QUICK) as broker, broker.subscribe("group", ["orders"]) as subscription:
        await broker.publish([_envelope("a") for _ in range(5)])
        await subscription.ack((await _receive(subscription, 5))[:2])
        await _execute(broker, "DELETE FROM cqrs_log WHERE position > 3")
        await _execute(broker, "UPDATE cqrs_log_lane SET next_position = 4 WHERE next_position = 6")
        assert await subscription.receive(10, NO_WAIT) == []
        await broker.publish([again := _envelope("a")])
        deliveries = await _receive(subscription, 2)

    assert [delivery.position for delivery in deliveries] == [3, 4]
    assert deliveries[1].content == again


# --- lanes that change hands ----------------------------------------------------------------------------------------


async def test_a_lane_that_was_taken_away_is_told_of_and_read_again_from_what_was_acknowledged(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A reader may have been frozen without knowing: it must stop, drop what it has, and not trust its own place."""
    lost: list[Partition] = []

    async def drop(partitions: Collection[Partition]) -> None:
        lost.extend(partitions)

    async with (
        _broker(database_url, settings=QUICK) as broker,
        broker.subscribe("group", ["orders"], on_revoked=drop) as subscription,
    ):
        await broker.publish([_envelope("a") for _ in range(4)])
        before = await _receive(subscription, 4)
        await subscription.ack(before[:1])
        await _execute(broker, "UPDATE cqrs_log_position SET owner = 'thief', fence = fence + 1 WHERE position = 1")
        await subscription.ack(before[1:])
        await _execute(broker, "UPDATE cqrs_log_position SET owner = NULL WHERE owner = 'thief'")
        after = await _receive(subscription, 3)

    assert lost == [before[0].partition]
    assert "log_lanes_lost" in {record.__dict__.get("action") for record in caplog.records}
    assert [delivery.position for delivery in after] == [2, 3, 4]
    assert after[0].partition.epoch > before[0].partition.epoch


async def test_without_the_fence_a_late_acknowledgement_would_count(sqlite_url: str) -> None:
    """The control for the test above: it is the fence, and nothing else, that keeps it out."""
    async with _broker(sqlite_url) as broker, broker.subscribe("group", ["orders"]) as subscription:
        await broker.publish([_envelope("a")])
        deliveries = await _receive(subscription, 1)
        await _execute(broker, "UPDATE cqrs_log_position SET owner = 'thief', fence = fence + 1")
        await subscription.ack(deliveries)
        guarded = await _sum_of_positions(broker)
        unguarded = str(broker._queries.acknowledge).replace("AND owner = :reader AND fence = :fence", "")
        broker._queries.acknowledge = text(unguarded)
        await subscription.ack(deliveries)

        assert guarded == 0
        assert await _sum_of_positions(broker) == 1


async def test_a_reader_that_does_not_let_go_keeps_nobody_waiting_for_ever(sqlite_url: str) -> None:
    """A handler that hangs must not stop the other process from taking its share."""

    async def hang(partitions: Collection[Partition]) -> None:
        await asyncio.Event().wait()

    async with (
        _broker(sqlite_url, settings=QUICK) as broker,
        broker.subscribe("group", ["orders"], on_revoked=hang),
        broker.subscribe("group", ["orders"]),
    ):
        await _until(lambda: _shares(broker), [8, 8])


async def test_a_reader_that_fails_to_let_go_gives_its_lanes_away_all_the_same(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A fault in the worker must be seen, and must not take the subscription down."""

    async def fail(partitions: Collection[Partition]) -> None:
        raise RuntimeError("cannot let go")

    async with (
        _broker(sqlite_url, settings=QUICK) as broker,
        broker.subscribe("group", ["orders"], on_revoked=fail) as first,
        broker.subscribe("group", ["orders"]),
    ):
        await _until(lambda: _shares(broker), [8, 8])
        await first.receive(1, NO_WAIT)

    assert "log_revoke_failed" in {record.__dict__.get("action") for record in caplog.records}


async def test_a_slow_reader_keeps_its_lease_while_it_finishes(sqlite_url: str) -> None:
    """Finishing may take longer than a lease: somebody else who started in between would run things twice at a time."""
    settings = replace(QUICK, lease=timedelta(seconds=2), revoke_limit=timedelta(seconds=20))
    letting_go, finished = asyncio.Event(), asyncio.Event()

    async def finish(partitions: Collection[Partition]) -> None:
        letting_go.set()
        await finished.wait()

    async with (
        _broker(sqlite_url, settings=settings) as broker,
        broker.subscribe("group", ["orders"], on_revoked=finish),
        broker.subscribe("group", ["orders"]) as newcomer,
    ):
        await letting_go.wait()
        for _ in range(12):
            assert await newcomer.receive(1, POLL) == []
        assert await _shares(broker) == [16]
        finished.set()
        await _until(lambda: _shares(broker), [8, 8])


async def test_a_reader_that_lost_lanes_and_may_have_fewer_now_gives_the_others_back(sqlite_url: str) -> None:
    """Its lease ran out while the database was away, and somebody has joined meanwhile. What it renewed and did not
    read would be read by nobody.
    """
    told, finished = asyncio.Event(), asyncio.Event()

    async def finish(partitions: Collection[Partition]) -> None:
        told.set()
        await finished.wait()

    async with (
        _broker(sqlite_url, settings=replace(QUICK, revoke_limit=timedelta(seconds=20))) as broker,
        broker.subscribe("group", ["orders"], on_revoked=finish) as first,
    ):
        await _until(lambda: _shares(broker), [16])
        for held in list(first._member.held.values()):
            first._member.lose(held)
        await told.wait()
        async with broker.subscribe("group", ["orders"]):
            finished.set()
            await _until(lambda: _shares(broker), [8, 8])
            assert len(first._member.held) == 8


async def test_readers_share_each_topic_with_those_who_read_it(sqlite_url: str) -> None:
    """While a new version that reads one more topic is rolled out, the old one must not be waited for on that topic."""
    async with (
        _broker(sqlite_url, settings=QUICK) as broker,
        broker.subscribe("group", ["orders"]),
        broker.subscribe("group", ["orders", "stock"]),
    ):
        await _until(lambda: _shares(broker), [8, 24])


async def test_a_reader_of_no_topics_waits_in_peace(database_url: str) -> None:
    """A service that handles no events yet runs a worker all the same."""
    async with _broker(database_url) as broker, broker.subscribe("group", []) as subscription:
        assert await subscription.receive(10, timedelta(seconds=0.01)) == []
        assert await subscription.backlog() == 0


async def test_a_reader_whose_database_is_away_asks_for_it_when_told_to_receive(sqlite_url: str) -> None:
    """Relay and worker of the process wait for the same database and take turns: a reader that asked each second beside
    them would double what it has to refuse.
    """
    async with _broker(sqlite_url, settings=QUICK) as broker, broker.subscribe("group", ["orders"]) as subscription:
        database = _Away(subscription._member._database)
        subscription._member._database = database  # type: ignore[assignment]
        await _until(lambda: _later(database.tries > 0), True)

        before = database.tries
        for _ in range(20):
            with pytest.raises(BrokerUnavailableError):
                await subscription.receive(1, NO_WAIT)
        asked = database.tries - before
        await asyncio.sleep(2.5)
        by_itself = database.tries - before - asked
        database.back = True
        assert await subscription.receive(1, NO_WAIT) == []

    assert asked == 20
    assert by_itself <= 1, "it is patient by itself, so soon after it was asked"


async def test_a_reader_that_nobody_asks_comes_back_by_itself(sqlite_url: str) -> None:
    """A worker with its hands full receives nothing for a while, and wants to keep its lanes."""
    async with _broker(sqlite_url, settings=QUICK) as broker, broker.subscribe("group", ["orders"]) as subscription:
        database = _Away(subscription._member._database)
        subscription._member._database = database  # type: ignore[assignment]
        await _until(lambda: _later(database.tries > 0), True)

        database.back = True
        renewed = {held.lease_ends for held in subscription._member.readable()}
        await _until(lambda: _later({held.lease_ends for held in subscription._member.readable()} != renewed), True)


async def test_a_reader_in_trouble_leaves_at_once(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the time of its next try, or to be asked: a stop is neither, and is not to be held up."""
    monkeypatch.setattr("cqrs_decor_sqlalchemy.log_member._AFTER_FAILURE_S", 60.0)
    async with _broker(sqlite_url, settings=QUICK) as broker:
        async with broker.subscribe("group", ["orders"]) as subscription:
            member = subscription._member
            member._database = database = _Away(member._database)  # type: ignore[assignment]
            await _until(lambda: _later(database.tries > 0), True)
            database.back = True
            began = time.monotonic()
        took = time.monotonic() - began

        assert await _shares(broker) == []
    assert took < 2, "half of the limit for leaving would be up after 2.5 s"


async def test_leaving_gives_everything_back_at_once(sqlite_url: str) -> None:
    """A deployment must not cost a lease's length of silence for every process that is replaced."""
    async with _broker(sqlite_url) as broker:
        async with broker.subscribe("group", ["orders"]):
            assert await _shares(broker) == [16]

        assert await _shares(broker) == []
        assert await _execute(broker, "SELECT COUNT(*) FROM cqrs_log_reader") == [(0,)]


async def test_what_the_block_raises_comes_out_as_it_is(sqlite_url: str) -> None:
    """A task group around the caller's block would wrap it, and break every `except` of theirs."""
    async with _broker(sqlite_url) as broker:
        with pytest.raises(ZeroDivisionError):
            async with broker.subscribe("group", ["orders"]):
                _ = 1 / 0

        assert await _shares(broker) == []


async def test_a_cancelled_block_leaves_the_group(sqlite_url: str) -> None:
    """Shutting down cancels tasks: lanes that stay with a ghost are silent for the length of a lease."""
    async with _broker(sqlite_url) as broker:
        entered = asyncio.Event()

        async def read_for_ever() -> None:
            async with broker.subscribe("group", ["orders"]) as subscription:
                entered.set()
                while True:
                    await subscription.receive(10, POLL)

        reading = asyncio.create_task(read_for_ever())
        await entered.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

        assert await _shares(broker) == []


# --- opening and checking -------------------------------------------------------------------------------------------


async def test_a_broker_in_the_database_of_a_store_uses_the_stores_tables(sqlite_url: str) -> None:
    """With a database and no broker, one file or server is all there is to look after."""
    store = SqlAlchemyStore.from_url(sqlite_url)
    await store.open()
    broker = store.log_broker()
    await broker.open()
    async with broker.subscribe("group", ["orders"]) as subscription:
        await broker.publish([published := _envelope("a")])
        [delivery] = await _receive(subscription, 1)
    await broker.close()
    still_open = await store.check()
    await store.close()

    assert delivery.content == published
    assert {finding.severity for finding in still_open} == {"ok"}


async def test_a_store_without_the_tables_of_the_log_is_named_at_start_up(postgres_url: str) -> None:
    """A migration that forgot them has to be found when the app starts, not at its first event."""
    store = SqlAlchemyStore.from_url(postgres_url)
    with pytest.raises(SchemaMissingError, match="cqrs_log, cqrs_log_lane, cqrs_log_position, cqrs_log_reader"):
        await store.log_broker().open()
    await store.close()


async def test_a_database_in_memory_promises_less() -> None:
    """The card is what docs and `doctor` print: it must not call durable what ends with the process."""
    async with _broker("sqlite+aiosqlite://") as broker, broker.subscribe("group", ["orders"]) as subscription:
        await broker.publish([_envelope("a")])
        deliveries = await _receive(subscription, 1)

    assert len(deliveries) == 1
    assert (broker.capabilities.durable, broker.capabilities.shared) == (False, False)
    assert LogTableBroker.capabilities.durable


async def test_a_server_that_is_not_there_is_an_outage_for_everything(unused_port: int) -> None:
    """The loops wait through an outage; any other error would end them."""
    broker = LogTableBroker.from_url(f"postgresql+asyncpg://postgres:secret@127.0.0.1:{unused_port}/log")
    for use in (broker.open(), broker.publish([_envelope("a")]), broker.subscribe("group", ["orders"]).__aenter__()):
        with pytest.raises(BrokerUnavailableError, match=f"127.0.0.1:{unused_port}/log") as raised:
            await use
        assert "secret" not in str(raised.value)
    [finding] = await broker.check([TopicPlan(name="orders")])
    await broker.close()
    await broker.close()

    assert (finding.code, finding.severity) == ("CD501", "error")


def test_a_url_that_is_none_is_refused_where_it_is_given() -> None:
    """A typing error in a setting should not wait for the first connection."""
    with pytest.raises(BadUrlError):
        LogTableBroker.from_url("oracle://host/log")


def test_settings_name_all_their_faults_at_once() -> None:
    """Whoever mends one fault after the other starts the app as often as there are faults."""
    with pytest.raises(
        SettingError, match="idle_poll must not be shorter than poll; lease must be at least three times"
    ):
        LogSettings(idle_poll=timedelta(0), lease=timedelta(seconds=1), beat=timedelta(seconds=1))


async def test_a_check_says_which_group_has_acknowledged_everything(database_url: str) -> None:
    """Whoever moves to another broker has to know when nothing is left in this one."""
    async with _broker(database_url) as broker:
        await broker.publish([_envelope("a"), _envelope("b"), _envelope("c", topic="stock")])
        async with broker.subscribe("quick", ["orders"]) as quick, broker.subscribe("slow", ["orders"]) as slow:
            await quick.ack(await _receive(quick, 2))
            await _receive(slow, 1)
            findings = [finding.problem for finding in await broker.check([TopicPlan(name="orders")])]

    assert findings[1:] == [
        "topic orders: group quick has acknowledged everything",
        "topic orders: group slow has 2 messages to acknowledge",
    ]


def test_settings_come_from_the_url_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same image runs on a laptop and on a slow network: nobody builds another one for a longer lease."""
    monkeypatch.setenv("CQRS_DECOR_LOG_LEASE_S", "40")
    monkeypatch.setenv("CQRS_DECOR_LOG_MAX_BYTES", "100")
    monkeypatch.setenv("CQRS_DECOR_LOG_RETENTION_DAYS", "7")  # the app's own, not one of these
    url, options = log_options("postgresql://u:p%40ss@host/db?log_lease_s=20.5&ssl=require&log_beat_s=3")

    settings = LogSettings.read(options)

    assert url == "postgresql://u:p%40ss@host/db?ssl=require"
    assert (settings.lease, settings.beat) == (timedelta(seconds=20.5), timedelta(seconds=3))
    assert (settings.max_bytes, settings.poll) == (100, LogSettings().poll)
    assert log_options("sqlite:///x.db?log_poll_s=1") == ("sqlite:///x.db", {"poll_s": "1"})


async def test_a_broker_takes_its_settings_out_of_the_url(sqlite_url: str) -> None:
    """What the driver does not know it must not be given."""
    broker = LogTableBroker.from_url(f"{sqlite_url}?log_max_bytes=5")
    await broker.open()
    [refused] = await broker.publish([replace(_envelope("a"), data=b"123456")])
    await broker.close()

    assert isinstance(refused, RecordTooLargeError)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"leese_s": "3"}, "there is no option log_leese_s, did you mean log_lease_s?"),
        ({"lease_s": "long", "poll_s": "nan"}, "lease_s must be a number, not 'long'; poll_s must be a number"),
        ({"max_bytes": "1.5"}, "max_bytes must be a number, not '1.5'"),
        ({"lease_s": "1"}, "lease must be at least three times beat"),
    ],
)
def test_settings_that_cannot_be_read_are_told(options: dict[str, str], text: str) -> None:
    """A typing error that is passed over is found out in production."""
    with pytest.raises(SettingError) as caught:
        LogSettings.read(options)

    assert text in str(caught.value)


# --- the words of the tests above -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def all_log_records(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def _broker(url: str, *, settings: LogSettings | None = None) -> AsyncGenerator[LogTableBroker]:
    broker = LogTableBroker.from_url(url, settings=settings)
    await broker.open()
    try:
        yield broker
    finally:
        await broker.close()


_numbers = iter(range(1_000_000))


def _envelope(key: str | None, topic: str = "orders") -> Envelope:
    return Envelope(
        id=f"id-{next(_numbers)}",
        source="shop",
        type="test.written",
        topic=topic,
        key=key,
        data=b"{}",
        time=datetime.now(UTC),
    )


async def _receive(subscription: LogSubscription, count: int) -> list[Delivery]:
    deliveries: list[Delivery] = []
    async with asyncio.timeout(PATIENCE_S):
        while len(deliveries) < count:
            deliveries.extend(await subscription.receive(count - len(deliveries), POLL))
    return deliveries


async def _execute(broker: LogTableBroker, statement: str) -> Sequence[Any]:
    async with broker._engine.begin() as connection:
        result = await connection.execute(text(statement))
        return [tuple(row) for row in result] if result.returns_rows else []


async def _shares(broker: LogTableBroker) -> list[int]:
    """How many lanes each reader holds."""
    owned = "SELECT COUNT(*) FROM cqrs_log_position WHERE owner IS NOT NULL GROUP BY owner"
    return sorted(count for (count,) in await _execute(broker, owned))


async def _sum_of_positions(broker: LogTableBroker) -> int:
    [(total,)] = await _execute(broker, "SELECT SUM(position) FROM cqrs_log_position")
    return int(total)


async def _until(look: Callable[[], Awaitable[object]], expected: object) -> None:
    ends = time.monotonic() + PATIENCE_S
    while (found := await look()) != expected:
        assert time.monotonic() < ends, f"not within {PATIENCE_S:g} s: {expected}; last it was {found}"
        await asyncio.sleep(0.02)


async def _later(value: bool) -> bool:
    return value


class _Away:
    """A database of a log that cannot be reached until it is `back`."""

    def __init__(self, database: LogDatabase) -> None:
        self.back = False
        self.tries = 0
        self._database = database

    async def read(self, work: Work[Any]) -> Any:
        self._try()
        return await self._database.read(work)

    async def write(self, work: Work[Any]) -> Any:
        self._try()
        return await self._database.write(work)

    def _try(self) -> None:
        self.tries += 1
        if not self.back:
            raise BrokerUnavailableError("log", "away")


class _statements:
    """Collects what is sent to the database, without what begins and ends transactions."""

    def __init__(self, broker: LogTableBroker) -> None:
        self._engine = broker._engine.sync_engine
        self._sent: list[str] = []

    def __enter__(self) -> Callable[[], list[str]]:
        event.listen(self._engine, "before_cursor_execute", self._note)
        return lambda: [statement for statement in self._sent if not statement.startswith(("BEGIN", "PRAGMA"))]

    def __exit__(self, *exc: object) -> None:
        event.remove(self._engine, "before_cursor_execute", self._note)

    def _note(self, connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        self._sent.append(statement)
