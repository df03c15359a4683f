"""What happened, seen from the outside: plain SQL on own connections, and a sink that is no part of the system."""

import os
import sqlite3
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupCoordinatorNotAvailableError
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from tests.fault.invariants import Delivered, Effect, Entry, Span


class Sink:
    """Records every delivery, in an SQLite file of its own and outside of any transaction. Used by many processes."""

    def __init__(self, file: str | Path) -> None:
        self._connection = sqlite3.connect(file, isolation_level=None, timeout=30, check_same_thread=False)

    @staticmethod
    def create(file: Path) -> None:
        with closing(sqlite3.connect(file, isolation_level=None)) as connection:
            connection.executescript(_SINK)

    def note(self, message_id: str, entry: str, aggregate: int, number: int, attempt: int) -> None:
        row = (message_id, entry, aggregate, number, attempt, os.getpid(), time.time())
        self._connection.execute(_NOTE, row)

    @contextmanager
    def span(self, kind: str, what: str, where: int = 0) -> Generator[None]:
        """Note that this process is at something, from now until the block ends. A kill leaves it without an end."""
        row = (kind, what, where, os.getpid(), time.monotonic())
        number = self._connection.execute(_BEGIN_SPAN, row).lastrowid
        try:
            yield
        finally:
            self._connection.execute("UPDATE span SET ended = ? WHERE id = ?", (time.monotonic(), number))

    @staticmethod
    def spans(file: Path, kind: str) -> Sequence[Span]:
        with closing(sqlite3.connect(file, timeout=30)) as connection:
            connection.row_factory = sqlite3.Row
            return [Span(**dict(row)) for row in connection.execute(_SPANS, (kind,))]

    @staticmethod
    def is_free(file: Path) -> bool:
        """Whether nobody is in the middle of writing to it."""
        with closing(sqlite3.connect(file, isolation_level=None, timeout=0.05)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return False
            connection.execute("ROLLBACK")
            return True

    @staticmethod
    def delivery_count(file: Path) -> int:
        with closing(sqlite3.connect(file, timeout=30)) as connection:
            [(count,)] = connection.execute("SELECT count(*) FROM delivery").fetchall()
        return int(count)

    @staticmethod
    def deliveries(file: Path) -> Sequence[Delivered]:
        with closing(sqlite3.connect(file, timeout=30)) as connection:
            connection.row_factory = sqlite3.Row
            return [Delivered(**dict(row)) for row in connection.execute(_DELIVERIES)]


_SINK = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = OFF;
CREATE TABLE delivery (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    message_id TEXT NOT NULL,
    entry TEXT NOT NULL,
    aggregate INTEGER NOT NULL,
    number INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    process INTEGER NOT NULL,
    at REAL NOT NULL
);
CREATE TABLE span (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    what TEXT NOT NULL,
    place INTEGER NOT NULL,
    process INTEGER NOT NULL,
    began REAL NOT NULL,
    ended REAL
);
"""

_BEGIN_SPAN = "INSERT INTO span (kind, what, place, process, began) VALUES (?, ?, ?, ?, ?)"

_SPANS = "SELECT what, place, process, began, ended FROM span WHERE kind = ? ORDER BY began"

_NOTE = """
INSERT INTO delivery (message_id, entry, aggregate, number, attempt, process, at)
VALUES (?, ?, ?, ?, ?, ?, ?)
"""

_DELIVERIES = "SELECT message_id, entry, aggregate, number, attempt, process, at FROM delivery ORDER BY id"


class Ledger:
    """The business's own tables, and how much the library's tables still hold."""

    def __init__(self, url: str) -> None:
        self._engine = create_async_engine(url, poolclass=NullPool)

    async def create(self, aggregates: int) -> None:
        async with self._engine.begin() as connection:
            for statement in _BUSINESS:
                await connection.execute(text(statement))
            rows = [{"id": number} for number in range(aggregates)]
            await connection.execute(text("INSERT INTO aggregate (id, number) VALUES (:id, 0)"), rows)

    async def committed(self) -> Sequence[Entry]:
        rows = await self._rows("SELECT entry, aggregate, number FROM ledger")
        return [Entry(entry=entry, aggregate=aggregate, number=number) for entry, aggregate, number in rows]

    async def effects(self) -> Sequence[Effect]:
        rows = await self._rows("SELECT entry, message_id FROM effect")
        return [Effect(entry=entry, message_id=message_id) for entry, message_id in rows]

    async def newest_and_oldest_pending(self) -> tuple[int | None, int | None, int]:
        """The highest and the lowest id in the outbox, None when it is empty, and how many there are."""
        [(newest, oldest, count)] = await self._rows("SELECT max(id), min(id), count(*) FROM cqrs_outbox")
        return newest, oldest, int(count)

    async def pending(self) -> int:
        return await self._count("SELECT count(*) FROM cqrs_outbox")

    async def parked_records(self) -> int:
        return await self._count("SELECT count(*) FROM cqrs_outbox_parked")

    async def parked_messages(self) -> int:
        return await self._count("SELECT count(*) FROM cqrs_inbox_parked")

    async def lanes_claimed(self) -> int:
        return await self._count("SELECT count(*) FROM cqrs_outbox_lane WHERE owner IS NOT NULL")

    async def run(self, statement: str) -> None:
        """A statement of the test's own, on a connection of its own."""
        async with self._engine.begin() as connection:
            await connection.execute(text(statement))

    async def vacuum(self, table: str) -> None:
        """What autovacuum does by itself within a minute."""
        async with self._engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            await connection.execute(text(f"VACUUM {table}"))

    async def rewrite_body(self, record_id: int, body: bytes) -> None:
        async with self._engine.begin() as connection:
            values = {"id": record_id, "body": body}
            await connection.execute(text("UPDATE cqrs_outbox SET body = :body WHERE id = :id"), values)

    async def value(self, query: str) -> int:
        return await self._count(query)

    async def parked(self) -> int:
        parked = await self._count("SELECT count(*) FROM cqrs_outbox_parked")
        return parked + await self._count("SELECT count(*) FROM cqrs_inbox_parked")

    async def sessions(self) -> int:
        """Of clients, on this database; 0 where a file has none."""
        query = _SESSIONS.get(self._engine.dialect.name)
        return 0 if query is None else await self._count(query)

    async def log_published(self) -> int:
        return await self._count("SELECT coalesce(sum(next_position - 1), 0) FROM cqrs_log_lane")

    async def log_acknowledged(self) -> int:
        return await self._count("SELECT coalesce(sum(position), 0) FROM cqrs_log_position")

    async def close(self) -> None:
        await self._engine.dispose()

    async def _count(self, query: str) -> int:
        [(count,)] = await self._rows(query)
        return int(count)

    async def _rows(self, query: str) -> Sequence[Any]:
        async with self._engine.connect() as connection:
            return (await connection.execute(text(query))).all()


_SESSIONS = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()",
    "mysql": "SELECT count(*) FROM information_schema.processlist WHERE db = database()",
    "mariadb": "SELECT count(*) FROM information_schema.processlist WHERE db = database()",
}

_BUSINESS = (
    "CREATE TABLE aggregate (id INTEGER PRIMARY KEY, number INTEGER NOT NULL)",
    "CREATE TABLE ledger (entry VARCHAR(64) PRIMARY KEY, aggregate INTEGER NOT NULL, number INTEGER NOT NULL)",
    "CREATE TABLE effect (entry VARCHAR(64) NOT NULL, message_id VARCHAR(64) NOT NULL, process INTEGER NOT NULL)",
)


class LogPositions:
    """How far the log of the database has been written, and acknowledged."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def published(self) -> int:
        return await self._ledger.log_published()

    async def acknowledged(self) -> int:
        return await self._ledger.log_acknowledged()

    async def close(self) -> None: ...


class KafkaPositions:
    """How far a topic has been written, and acknowledged by its group."""

    def __init__(self, bootstrap: str, topic: str, partitions: int) -> None:
        self._partitions = [TopicPartition(topic, number) for number in range(partitions)]
        self._group = topic
        self._consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap)
        self._admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
        self._started = False

    async def published(self) -> int:
        await self._start()
        return sum((await self._consumer.end_offsets(self._partitions)).values())

    async def acknowledged(self) -> int:
        await self._start()
        try:
            offsets = await self._admin.list_consumer_group_offsets(self._group)
        except GroupCoordinatorNotAvailableError:
            return 0  # this Kafka has not had any group yet
        return _sum_of_known(offsets[each].offset for each in self._partitions if each in offsets)

    async def close(self) -> None:
        await self._consumer.stop()
        await self._admin.close()

    async def _start(self) -> None:
        if not self._started:
            self._started = True
            await self._consumer.start()
            await self._admin.start()


def _sum_of_known(offsets: Iterable[int]) -> int:
    """A partition for which nothing was acknowledged says -1."""
    return sum(offset for offset in offsets if offset > 0)
