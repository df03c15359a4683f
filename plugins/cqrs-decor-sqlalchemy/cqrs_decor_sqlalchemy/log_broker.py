"""The database as broker: a log of records in tables, on PostgreSQL, MySQL, MariaDB and SQLite."""

import json
import os
import socket
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from sqlalchemy import Connection, Row, Table, inspect
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool
from sqlalchemy.schema import CreateTable

from cqrs_decor.broker import Capabilities, Revoked, Start, TopicPlan
from cqrs_decor.clock import Clock, SystemClock
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import BrokerError, RecordRejectedError, RecordTooLargeError, SchemaMissingError
from cqrs_decor.findings import Finding
from cqrs_decor.lanes import lane_of
from cqrs_decor.observers import Observers
from cqrs_decor.store import Retention
from cqrs_decor_sqlalchemy.database import Database
from cqrs_decor_sqlalchemy.dialects import prepare_sqlite_engine
from cqrs_decor_sqlalchemy.log_database import Log, LogDatabase
from cqrs_decor_sqlalchemy.log_member import LogMember, Membership
from cqrs_decor_sqlalchemy.log_queries import LogQueries
from cqrs_decor_sqlalchemy.log_retention import LogSweep
from cqrs_decor_sqlalchemy.log_settings import LogSettings, log_options
from cqrs_decor_sqlalchemy.log_signals import LogSignals, signals_of
from cqrs_decor_sqlalchemy.log_subscription import LogSubscription
from cqrs_decor_sqlalchemy.log_tables import KEY_LENGTH, LOG_LANES, NAME_LENGTH
from cqrs_decor_sqlalchemy.retention import CleanUp
from cqrs_decor_sqlalchemy.settings import StoreSettings
from cqrs_decor_sqlalchemy.tables import Tables
from cqrs_decor_sqlalchemy.urls import is_memory, read_url


class LogTableBroker:
    """Keeps published records in tables, and the positions of consumer groups beside them.

    Each lane of a topic has one row from which positions are drawn, in the transaction that writes the records: they
    are dense and become visible in order, so that a reader never passes a record that is committed late.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        durable=True,
        ordered_by_key=True,
        replayable=True,
        shared=True,
        creates_topics=True,
        crash_may_lose="nothing that was committed; on SQLite with synchronous=NORMAL a power cut may take the last",
        crash_may_repeat="what was delivered and not yet acknowledged; a batch whose commit was cut off",
        crash_may_reorder="nothing",
    )

    def __init__(
        self,
        database: Database,
        *,
        settings: LogSettings | None = None,
        clock: Clock | None = None,
        owns_database: bool = False,
    ) -> None:
        self.name = database.name
        self.observers = Observers()
        self._engine = database.engine
        self._tables = database.tables.log
        self._members = database.tables.members
        self._settings = settings or LogSettings()
        self._clock = clock or SystemClock()
        self._owns_database = owns_database
        if is_memory(database.engine.url):
            self.capabilities = _IN_MEMORY  # type: ignore[misc]  # a database in memory promises less
        self._database = LogDatabase(database)
        self._queries = LogQueries(self._tables, database.engine.dialect)
        self._clean_up = CleanUp(database, [LogSweep(database)])

    @classmethod
    def from_url(cls, url: str, *, settings: LogSettings | None = None) -> "LogTableBroker":
        """A broker with a database of its own, which several services share; it makes the tables that are not there.

        Args:
            url: A database URL; in its query, settings of the log as `log_lease_s=20`, which are not for the driver.
            settings: Instead of those, and of `CQRS_DECOR_LOG_...` in the environment.

        Raises:
            BadUrlError, UnsupportedError: The URL cannot be read, or its driver cannot be used.
            SettingError: A setting does not fit.
        """
        url, options = log_options(url)
        return cls(_open_database(url), settings=settings or LogSettings.read(options), owns_database=True)

    @classmethod
    def over(cls, database: Database, *, settings: LogSettings | None = None) -> "LogTableBroker":
        """A broker in the database of a store, on the store's engine; the store's schema has the tables.

        Raises:
            SettingError: A setting in the environment does not fit.
        """
        return cls(database, settings=settings or LogSettings.read({}))

    async def open(self) -> None:
        """Connect and look.

        Raises:
            SchemaMissingError: The store's database lacks the tables; a database of the broker's own gets them.
        """
        missing = await self._database.read(self._find_missing_tables)
        if missing and not self._owns_database:
            raise SchemaMissingError(self.name, missing)
        if missing:
            await self._make_tables()

    async def close(self) -> None:
        if self._owns_database:
            await self._engine.dispose()

    # --- publishing ---------------------------------------------------------------------------------------------------

    async def publish(self, envelopes: Sequence[Envelope]) -> Sequence[BrokerError | None]:
        outcomes = self._refusals(envelopes)
        lanes = _by_lane(envelope for envelope, refused in zip(envelopes, outcomes, strict=True) if refused is None)
        if lanes:
            await self._database.write(lambda connection: self._append(connection, lanes))
            self._signals().written.beat()
        return outcomes

    def _refusals(self, envelopes: Sequence[Envelope]) -> list[BrokerError | None]:
        """What cannot be written, and what comes after it under the same key."""
        held_back: set[tuple[str, str]] = set()
        return [self._refusal(envelope, held_back) for envelope in envelopes]

    def _refusal(self, envelope: Envelope, held_back: set[tuple[str, str]]) -> BrokerError | None:
        key = None if envelope.key is None else (envelope.topic, envelope.key)
        if key in held_back:
            return RecordRejectedError(self.name, envelope.topic, "an earlier record of its key was refused")
        error = self._fault(envelope)
        if error is not None and key is not None:
            held_back.add(key)
        return error

    def _fault(self, envelope: Envelope) -> BrokerError | None:
        if len(envelope.data) > self._settings.max_bytes:
            return RecordTooLargeError(self.name, envelope.topic, len(envelope.data), self._settings.max_bytes)
        reason = _unwritable(envelope)
        return None if reason is None else RecordRejectedError(self.name, envelope.topic, reason)

    async def _append(self, connection: AsyncConnection, lanes: "_ByLane") -> None:
        """Lock lanes in one order for all writers, draw positions, write everything."""
        rows: list[dict[str, Any]] = []
        ends: list[dict[str, Any]] = []
        for topic, by_lane in sorted(lanes.items()):
            for locked in await self._lock(connection, topic, sorted(by_lane)):
                drawn = list(enumerate(by_lane[locked.lane], locked.next_position))
                rows.extend(_row(locked, position, envelope) for position, envelope in drawn)
                ends.append({"topic": topic, "lane": locked.lane, "next_position": drawn[-1][0] + 1})
        await connection.execute(self._queries.advance_lane, ends)
        await connection.execute(self._queries.append, rows)

    async def _lock(self, connection: AsyncConnection, topic: str, lanes: Sequence[int]) -> Sequence[Row[Any]]:
        wanted = {"topic": topic, "lanes": lanes}
        found = (await connection.execute(self._queries.lock_lanes, wanted)).all()
        if len(found) < len(lanes):
            await self._add_lanes(connection, topic)
            found = (await connection.execute(self._queries.lock_lanes, wanted)).all()
        return found

    async def _add_lanes(self, connection: AsyncConnection, topic: str) -> None:
        rows = [{"topic": topic, "lane": lane} for lane in range(LOG_LANES)]
        await connection.execute(self._queries.add_lane, rows)

    # --- consuming ----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def subscribe(
        self, group: str, topics: Sequence[str], *, start: Start = "earliest", on_revoked: Revoked | None = None
    ) -> AsyncGenerator[LogSubscription]:
        membership = Membership(
            reader=_reader_id(), group=group, topics=tuple(sorted(set(topics))), on_revoked=on_revoked
        )
        log = Log(
            database=self._database,
            queries=self._queries,
            signals=self._signals(),
            settings=self._settings,
            clock=self._clock,
            observers=self.observers,
        )
        member = LogMember(membership, log)
        await member.join(start)
        try:
            yield LogSubscription(member, membership, log)
        finally:
            await member.leave()

    # --- retention ---------------------------------------------------------------------------------------------------

    async def clean_up(self, retention: Retention, limit: int) -> int:
        """As `Store.clean_up`, for a database of the broker's own; in that of a store the store does it.

        Raises:
            BrokerUnavailableError: The database is away.
        """
        if not self._owns_database:
            return 0
        with self._database.in_words_of_a_broker():
            return await self._clean_up.run(retention, limit)

    # --- topics and tables --------------------------------------------------------------------------------------------

    async def check(self, topics: Sequence[TopicPlan]) -> Sequence[Finding]:
        """See `Broker.check`. Says of each group of these topics whether it has acknowledged everything."""
        try:
            missing = await self._database.read(self._find_missing_tables)
            if missing:
                return [_tables_missing(self.name, missing)]
            groups = await self._database.read(partial(self._progress, topics=[topic.name for topic in topics]))
        except BrokerError as error:
            return [Finding.from_error(error)]
        return [Finding.ok(f"{self.name} has the tables of the log"), *(_progress_of(group) for group in groups)]

    async def _progress(self, connection: AsyncConnection, topics: Sequence[str]) -> Sequence[Row[Any]]:
        return (await connection.execute(self._queries.progress, {"topics": topics})).all()

    async def missing_topics(self, topics: Sequence[TopicPlan]) -> Sequence[TopicPlan]:
        """None: a topic is there as soon as it is published to or subscribed."""
        return []

    async def create_topics(self, topics: Sequence[TopicPlan]) -> None:
        for name in sorted({topic.name for topic in topics}):
            await self._database.write(partial(self._add_lanes, topic=name))

    async def _find_missing_tables(self, connection: AsyncConnection) -> list[str]:
        return await connection.run_sync(self._names_of_missing_tables)

    def _names_of_missing_tables(self, connection: Connection) -> list[str]:
        there = inspect(connection)
        return [table.name for table in self._needed() if not there.has_table(table.name, schema=table.schema)]

    def _needed(self) -> Sequence[Table]:
        """Those of the log, and the one that says who cleans up."""
        return (*self._tables.all(), self._members)

    async def _make_tables(self) -> None:
        """Several services may start at once: who comes second finds the tables, whatever its statement said."""
        try:
            await self._database.write(self._create_missing)
        except SQLAlchemyError:
            if await self._database.read(self._find_missing_tables):
                raise

    async def _create_missing(self, connection: AsyncConnection) -> None:
        for table in self._needed():
            await connection.execute(CreateTable(table, if_not_exists=True))

    def _signals(self) -> LogSignals:
        url = self._engine.url
        return signals_of((url.host, url.port, url.database))


_IN_MEMORY = replace(
    LogTableBroker.capabilities,
    durable=False,
    shared=False,
    crash_may_lose="everything: the database lives in the process",
)

_ByLane = dict[str, dict[int, list[Envelope]]]
"""Envelopes by topic and lane, in the order in which they were given."""


def _by_lane(envelopes: Iterable[Envelope]) -> _ByLane:
    lanes: _ByLane = {}
    for envelope in envelopes:
        lane = lane_of(envelope.topic, envelope.key, envelope.id, LOG_LANES)
        lanes.setdefault(envelope.topic, {}).setdefault(lane, []).append(envelope)
    return lanes


def _row(locked: Row[Any], position: int, envelope: Envelope) -> dict[str, Any]:
    attributes = envelope.attributes()
    for name in _IN_COLUMNS:
        attributes.pop(name, None)
    return {
        "topic": envelope.topic,
        "lane": locked.lane,
        "position": position,
        "message_id": envelope.id,
        "source": envelope.source,
        "type": envelope.type,
        "version": envelope.version,
        "partition_key": envelope.key,
        "content_type": envelope.content_type,
        "attributes": json.dumps(attributes),
        "headers": json.dumps(dict(envelope.headers)) if envelope.headers else None,
        "body": envelope.data,
        "written_at_ms": locked.now_ms,
    }


_IN_COLUMNS = ("id", "source", "type", "dataversion", "partitionkey")


def _unwritable(envelope: Envelope) -> str | None:
    """Why the columns cannot hold it: the same reasons on every database, whatever that one would put up with."""
    texts = (
        ("topic", envelope.topic, NAME_LENGTH),
        ("id", envelope.id, NAME_LENGTH),
        ("source", envelope.source, NAME_LENGTH),
        ("type", envelope.type, NAME_LENGTH),
        ("content type", envelope.content_type, NAME_LENGTH),
        ("key", envelope.key or "", KEY_LENGTH),
    )
    for name, text, limit in texts:
        if len(text) > limit:
            return f"its {name} has {len(text):,} characters, the limit is {limit:,}"
        if "\0" in text or not _is_unicode(text):
            return f"its {name} holds a character that a database cannot store"
    if envelope.topic.endswith(" "):
        return "its topic ends in a blank, which MySQL and MariaDB do not see"
    if not 0 <= envelope.version < _TOO_LARGE:
        return f"its version {envelope.version} is no number from 0 to {_TOO_LARGE - 1}"
    return None


_TOO_LARGE = 2**31


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _reader_id() -> str:
    """Says to a person which process it is, and is never given twice."""
    return f"{socket.gethostname()[:32]}:{os.getpid()}:{uuid.uuid4().hex[:12]}"


def _open_database(url: str) -> Database:
    """An engine of the broker's own, set up as a store's is; SQLite in memory has one connection, taken in turns."""
    settings = StoreSettings()
    parsed = read_url(url)
    size, overflow = (1, 0) if is_memory(parsed) else (settings.pool_size, settings.pool_overflow)
    engine = create_async_engine(parsed, poolclass=AsyncAdaptedQueuePool, pool_size=size, max_overflow=overflow)
    if parsed.get_backend_name() == "sqlite":
        prepare_sqlite_engine(engine, settings)
    return Database(engine, Tables(), settings)


def _progress_of(group: Row[Any]) -> Finding:
    if not group.waiting:
        return Finding.ok(f"topic {group.topic}: group {group.group_name} has acknowledged everything")
    return Finding.ok(f"topic {group.topic}: group {group.group_name} has {group.waiting} messages to acknowledge")


def _tables_missing(broker: str, tables: Sequence[str]) -> Finding:
    return Finding.from_error(SchemaMissingError(broker, tables))
