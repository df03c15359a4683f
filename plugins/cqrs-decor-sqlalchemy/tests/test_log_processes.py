"""The log under several processes, some of which are killed or frozen. Run as a script, this file is such a process:

    python test_log_processes.py write URL TOPIC SOURCE COUNT BATCH
    python test_log_processes.py read URL TOPIC GROUP
    python test_log_processes.py hold URL TOPIC GROUP

`write` prints `done` at the end, `read` a line for each record that it has acknowledged. `hold` prints a line for each
record that it has received and acknowledges nothing until a line comes in; then all of it, and prints `acknowledged`.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from cqrs_decor.broker import Delivery
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import BrokerUnavailableError
from cqrs_decor.lanes import lane_of
from cqrs_decor_sqlalchemy.log_broker import LogTableBroker, _row
from cqrs_decor_sqlalchemy.log_settings import LogSettings
from cqrs_decor_sqlalchemy.log_subscription import LogSubscription
from tests.services.mariadb import MariaDbServer
from tests.services.postgres import PostgresServer

SHORT_LEASE = LogSettings(lease=timedelta(seconds=2), beat=timedelta(seconds=0.5))
"""Long enough for a slow machine, short enough for a test; the same in all processes."""

POLL = timedelta(seconds=0.2)
PATIENCE_S = 60.0

any_database = pytest.mark.parametrize(
    "database",
    [
        "sqlite",
        pytest.param("postgres", marks=pytest.mark.service("postgres")),
        pytest.param("mariadb", marks=pytest.mark.service("mariadb")),
    ],
)
# An SQLite file has one writer: one that is frozen while it writes locks out all others.
any_server = pytest.mark.parametrize(
    "database",
    [
        pytest.param("postgres", marks=pytest.mark.service("postgres")),
        pytest.param("mariadb", marks=pytest.mark.service("mariadb")),
    ],
)


@pytest.fixture
def url(database: str, request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(f"{database}_url")


# --- nothing is skipped ---------------------------------------------------------------------------------------------


@any_database
async def test_no_reader_skips_a_record_however_many_processes_write(url: str) -> None:
    """A reader that passes a position which commits late loses that record for good, and nobody ever notices."""
    async with (
        _broker(url) as broker,
        _process("write", url, "orders", "one", "150", "1") as one,
        _process("write", url, "orders", "few", "600", "7") as few,
        _process("write", url, "orders", "many", "3000", "100") as many,
        _process("write", url, "orders", "killed", "100000", "10") as killed,
        broker.subscribe("first", ["orders"]) as first,
        broker.subscribe("second", ["orders"]) as second,
    ):
        ledgers = [_Ledger(), _Ledger()]
        writers = asyncio.gather(one.says("done"), few.says("done"), many.says("done"))
        readers = asyncio.gather(
            _read_into(ledgers[0], first, writers.done), _read_into(ledgers[1], second, writers.done)
        )
        await _until(lambda: _later(len(ledgers[0].ids_of("killed")) > 100), True)
        killed.kill()
        await asyncio.gather(writers, readers)
        await _read_to_the_end(ledgers[0], first)
        await _read_to_the_end(ledgers[1], second)

    for ledger in ledgers:
        assert ledger.skipped == []
        for source, count in {"one": 150, "few": 600, "many": 3000}.items():
            assert sorted(ledger.numbers_of(source)) == list(range(count))
        assert sorted(ledger.numbers_of("killed")) == list(range(len(ledger.ids_of("killed"))))
        assert len(ledger.ids_of("killed")) % 10 == 0, "half of a batch was published"
        assert ledger.out_of_order == []


async def test_positions_drawn_in_a_transaction_of_their_own_are_seen_to_be_skipped(sqlite_url: str) -> None:
    """The control for the test above: with the protection off, its ledger has to notice."""
    async with _broker(sqlite_url) as broker, broker.subscribe("group", ["orders"]) as subscription:
        ledger = _Ledger()
        row = await _draw(broker, _envelope("orders", "late", 0))
        await broker.publish([_envelope("orders", "late", 50)])
        await _read_to_the_end(ledger, subscription)
        await broker._database.write(lambda connection: connection.execute(broker._queries.append, row))
        await _read_to_the_end(ledger, subscription)

    assert ledger.skipped != []
    assert ledger.numbers_of("late") == [50]


@any_server
async def test_records_wait_for_the_lower_positions_of_a_writer_that_has_not_committed(url: str) -> None:
    """A slow writer holds up its lanes and nothing else; what comes after it is not seen before it."""
    async with _broker(url) as broker, broker.subscribe("group", ["orders"]) as subscription:
        slow, after = _envelope("orders", "writer", 0), _envelope("orders", "writer", 50)
        ledger = _Ledger()
        async with broker._engine.connect() as connection:
            await broker._append(connection, {"orders": {_lane(slow): [slow]}})
            waiting = asyncio.create_task(broker.publish([after]))
            other_lane = next(e for n in range(1, 50) if _lane(e := _envelope("orders", "other", n)) != _lane(slow))
            await broker.publish([other_lane])
            await _read_into(ledger, subscription, lambda: ledger.ids == [other_lane.id])
            assert not waiting.done()
            await connection.commit()
        await waiting
        await _read_to_the_end(ledger, subscription)

    assert ledger.ids == [other_lane.id, slow.id, after.id]
    assert ledger.skipped == []


# --- readers that go ------------------------------------------------------------------------------------------------


@any_database
async def test_what_a_killed_reader_had_in_hand_goes_to_another(url: str) -> None:
    """A worker that the kernel kills must not take messages along: they were not acknowledged, so they come again."""
    published = [_envelope("orders", "shop", number) for number in range(300)]
    async with _broker(url) as broker, _process("hold", url, "orders", "group") as victim:
        await broker.publish(published[:200])
        await victim.reported(200)
        victim.kill()
        await broker.publish(published[200:])
        async with broker.subscribe("group", ["orders"]) as survivor:
            ledger = _Ledger()
            await _read_into(ledger, survivor, lambda: len(ledger.ids) >= 300)

    assert sorted(ledger.ids) == sorted(envelope.id for envelope in published)
    assert ledger.out_of_order == []


@any_database
async def test_what_a_killed_reader_had_acknowledged_does_not_come_again(url: str) -> None:
    """The control for the test above, and half of "effects once": what is done stays done."""
    published = [_envelope("orders", "shop", number) for number in range(100)]
    async with _broker(url) as broker, _process("read", url, "orders", "group") as victim:
        await broker.publish(published)
        await victim.reported(100)
        victim.kill()
        await broker.publish([last := _envelope("orders", "shop", 100)])
        async with broker.subscribe("group", ["orders"]) as survivor:
            ledger = _Ledger()
            await _read_into(ledger, survivor, lambda: bool(ledger.ids))

    assert ledger.ids == [last.id]


@any_server
async def test_the_late_acknowledgement_of_a_frozen_reader_counts_nothing(url: str) -> None:
    """A process that wakes up after its lease has ended acknowledges what another has in hand: counting it is loss."""
    async with _broker(url) as broker, _process("hold", url, "orders", "group") as frozen:
        await broker.publish([_envelope("orders", "shop", number) for number in range(100)])
        await frozen.reported(100)
        frozen.send(signal.SIGSTOP)
        async with broker.subscribe("group", ["orders"]) as subscription:
            ledger = _Ledger()
            await _read_into(ledger, subscription, lambda: len(ledger.ids) >= 100)
            await frozen.tell()
            frozen.send(signal.SIGCONT)
            await frozen.says("acknowledged")
            acknowledged = await _acknowledged(broker)

    assert acknowledged == 0


@any_database
async def test_a_newcomer_gets_its_share_and_gives_it_back_when_it_goes(url: str) -> None:
    """Scaling out helps only if lanes move to the new process by themselves, and within seconds."""
    async with _broker(url) as broker, broker.subscribe("group", ["orders"]):
        async with broker.subscribe("group", ["orders"]):
            await _until(lambda: _shares(broker), [8, 8])
            async with _process("read", url, "orders", "group") as newcomer:
                await _until(lambda: _shares(broker), [5, 5, 6])
                newcomer.kill()
                await _until(lambda: _shares(broker), [8, 8])
        await _until(lambda: _shares(broker), [16])


# --- databases that go ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", [PostgresServer, MariaDbServer])
async def test_a_database_that_is_killed_and_started_again_costs_nothing(
    kind: type[PostgresServer] | type[MariaDbServer],
) -> None:
    """Databases are patched and fail over while everything runs: nothing of ours may need a restart after that."""
    with kind() as server:
        server.create_database("log")
        async with _broker(server.url(database="log")) as broker:
            published: list[str] = []
            ledger, outages = _Ledger(), _Outages()
            async with broker.subscribe("group", ["orders"]) as subscription:
                writer = asyncio.create_task(_write_through(broker, published, outages))
                reader = asyncio.create_task(_read_through(subscription, ledger, outages))
                await _until(lambda: _later(len(ledger.ids) > 200), True)
                await asyncio.to_thread(server.kill)
                await _until(lambda: _later(outages.of_reader > 2 and outages.of_writer > 2), True)
                await _until(lambda: _later(not subscription._member.readable()), True)  # its leases have ended
                await asyncio.to_thread(server.start)
                had = len(ledger.ids)
                await _until(lambda: _later(len(ledger.ids) > had + 200), True)
                writer.cancel()
                await asyncio.wait([writer])
                reader.cancel()
                await asyncio.wait([reader])
                await _read_to_the_end(ledger, subscription)

    assert set(published) <= set(ledger.ids)
    assert ledger.skipped == []
    assert ledger.out_of_order == []


# --- the words of the tests above -----------------------------------------------------------------------------------


class _Ledger:
    """What one reader received, and what is wrong with it.

    Attributes:
        ids: In the order in which they came, each once.
        skipped: Positions that were left out.
        out_of_order: Ids that came for the first time after later ones of their key.
    """

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.skipped: list[str] = []
        self.out_of_order: list[str] = []
        self._seen: set[str] = set()
        self._next: dict[int, int] = {}
        self._numbers: dict[str | None, int] = {}

    def note(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            assert isinstance(delivery.content, Envelope)
            expected = self._next.get(delivery.partition.number, 1)
            if delivery.position > expected:
                self.skipped.append(f"lane {delivery.partition.number}: {expected} to {delivery.position - 1}")
            self._next[delivery.partition.number] = delivery.position + 1
            if delivery.content.id not in self._seen:
                self._note_first(delivery.content)

    def _note_first(self, envelope: Envelope) -> None:
        number = int(envelope.id.partition("/")[2])
        if number <= self._numbers.get(envelope.key, -1):
            self.out_of_order.append(envelope.id)
        self._numbers[envelope.key] = number
        self._seen.add(envelope.id)
        self.ids.append(envelope.id)

    def ids_of(self, source: str) -> list[str]:
        return [each for each in self.ids if each.startswith(f"{source}/")]

    def numbers_of(self, source: str) -> list[int]:
        return [int(each.partition("/")[2]) for each in self.ids_of(source)]


class _Outages:
    def __init__(self) -> None:
        self.of_reader = 0
        self.of_writer = 0


class _Process:
    """One run of this file."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._lines: list[str] = []

    async def says(self, line: str) -> None:
        await self._read_until(lambda: line in self._lines)

    async def reported(self, count: int) -> None:
        await self._read_until(lambda: len(self._lines) >= count)

    async def tell(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        await self._process.stdin.drain()

    def send(self, what: signal.Signals) -> None:
        self._process.send_signal(what)

    def kill(self) -> None:
        assert self._process.returncode is None, "it has ended by itself"
        self._process.kill()

    async def end(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.communicate()

    async def _read_until(self, holds: Callable[[], bool]) -> None:
        assert self._process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            while not holds():
                line = await self._process.stdout.readline()
                assert line, f"the process ended; it had said {self._lines[-3:]}"
                self._lines.append(line.decode().strip())


@asynccontextmanager
async def _process(*arguments: str) -> AsyncGenerator[_Process]:
    root = Path(__file__).parents[3]
    process = _Process(
        await asyncio.create_subprocess_exec(
            sys.executable,
            __file__,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
    )
    try:
        yield process
    finally:
        await process.end()


@asynccontextmanager
async def _broker(url: str) -> AsyncGenerator[LogTableBroker]:
    broker = LogTableBroker.from_url(url, settings=SHORT_LEASE)
    await broker.open()
    try:
        yield broker
    finally:
        await broker.close()


def _envelope(topic: str, source: str, number: int) -> Envelope:
    """Number `number` of a writer, under one of 50 keys of its own."""
    return Envelope(
        id=f"{source}/{number}",
        source=source,
        type="test.written",
        topic=topic,
        key=f"{source}/{number % 50}",
        data=b"{}",
        time=datetime.now(UTC),
    )


async def _draw(broker: LogTableBroker, envelope: Envelope) -> dict[str, Any]:
    """Take a position and commit; returns the row that would have to be written there."""

    async def work(connection: AsyncConnection) -> dict[str, Any]:
        [locked] = await broker._lock(connection, envelope.topic, [_lane(envelope)])
        advanced = {"topic": envelope.topic, "lane": locked.lane, "next_position": locked.next_position + 1}
        await connection.execute(broker._queries.advance_lane, advanced)
        return _row(locked, locked.next_position, envelope)

    return await broker._database.write(work)


def _lane(envelope: Envelope) -> int:
    return lane_of(envelope.topic, envelope.key, envelope.id, 16)


async def _read_into(ledger: _Ledger, subscription: LogSubscription, enough: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not enough():
            ledger.note(await subscription.receive(100, POLL))


async def _read_to_the_end(ledger: _Ledger, subscription: LogSubscription) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while await subscription.backlog():
            ledger.note(await subscription.receive(100, POLL))


async def _write_through(broker: LogTableBroker, published: list[str], outages: _Outages) -> None:
    """Publish on and on, repeating a batch until it is taken, as the relay does."""
    number = 0
    while True:
        batch = [_envelope("orders", "shop", number + n) for n in range(5)]
        try:
            await broker.publish(batch)
        except BrokerUnavailableError:
            outages.of_writer += 1
            await asyncio.sleep(0.05)
            continue
        published.extend(envelope.id for envelope in batch)
        number += 5


async def _read_through(subscription: LogSubscription, ledger: _Ledger, outages: _Outages) -> None:
    while True:
        try:
            deliveries = await subscription.receive(100, POLL)
            ledger.note(deliveries)
            await subscription.ack(deliveries)
        except BrokerUnavailableError:
            outages.of_reader += 1
            await asyncio.sleep(0.05)


async def _shares(broker: LogTableBroker) -> list[int]:
    """How many lanes each reader holds."""
    table = broker._tables.positions.name
    statement = text(f"SELECT owner, COUNT(*) FROM {table} WHERE owner IS NOT NULL GROUP BY owner")
    async with broker._engine.connect() as connection:
        return sorted(count for _, count in await connection.execute(statement))


async def _acknowledged(broker: LogTableBroker) -> int:
    async with broker._engine.connect() as connection:
        return int(await connection.scalar(text(f"SELECT SUM(position) FROM {broker._tables.positions.name}")) or 0)


async def _later(value: bool) -> bool:
    return value


async def _until(look: Callable[[], Awaitable[object]], expected: object) -> None:
    ends = time.monotonic() + PATIENCE_S
    while (found := await look()) != expected:
        assert time.monotonic() < ends, f"not within {PATIENCE_S:g} s: {expected}; last it was {found}"
        await asyncio.sleep(0.05)


# --- the other processes --------------------------------------------------------------------------------------------


async def _write(broker: LogTableBroker, topic: str, source: str, count: str, batch: str) -> None:
    for first in range(0, int(count), int(batch)):
        numbers = range(first, min(first + int(batch), int(count)))
        outcomes = await broker.publish([_envelope(topic, source, number) for number in numbers])
        assert not any(outcomes)
    _say("done")


async def _read(broker: LogTableBroker, topic: str, group: str) -> None:
    async with broker.subscribe(group, [topic]) as subscription:
        while True:
            deliveries = await subscription.receive(50, POLL)
            await subscription.ack(deliveries)
            _report(deliveries)


async def _hold(broker: LogTableBroker, topic: str, group: str) -> None:
    held: list[Delivery] = []
    async with broker.subscribe(group, [topic]) as subscription:
        asked = asyncio.create_task(asyncio.to_thread(sys.stdin.readline))
        while not asked.done():
            deliveries = await subscription.receive(50, POLL)
            held.extend(deliveries)
            _report(deliveries)
        await subscription.ack(held)
        _say("acknowledged")
        await asyncio.to_thread(sys.stdin.readline)


def _report(deliveries: Sequence[Delivery]) -> None:
    for delivery in deliveries:
        assert isinstance(delivery.content, Envelope)
        _say(delivery.content.id)


def _say(line: str) -> None:
    print(line, flush=True)


async def _main(role: str, url: str, *arguments: str) -> None:
    async with _broker(url) as broker:
        await {"write": _write, "read": _read, "hold": _hold}[role](broker, *arguments)


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
