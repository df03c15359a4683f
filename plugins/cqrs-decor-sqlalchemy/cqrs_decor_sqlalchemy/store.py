"""One database as the store of an app: where it is, and the transactions in it."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, cast

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.ext.asyncio import async_session as async_session_of
from sqlalchemy.orm import Session
from sqlalchemy.pool import AsyncAdaptedQueuePool

from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import AutocommitRefusedError, CqrsDecorError, UnsupportedError
from cqrs_decor.findings import Finding
from cqrs_decor.store import Retention, StoreCard
from cqrs_decor_sqlalchemy.checks import connections_of, server_findings
from cqrs_decor_sqlalchemy.database import Database
from cqrs_decor_sqlalchemy.dialects import check_sqlite_engine, prepare_sqlite_engine, read_only_engine
from cqrs_decor_sqlalchemy.errors import is_transient, is_unavailable
from cqrs_decor_sqlalchemy.idempotency import SqlAlchemyIdempotency
from cqrs_decor_sqlalchemy.inbox import SqlAlchemyInbox
from cqrs_decor_sqlalchemy.ledger import follow
from cqrs_decor_sqlalchemy.log_broker import LogTableBroker
from cqrs_decor_sqlalchemy.log_retention import LogSweep
from cqrs_decor_sqlalchemy.outbox import SqlAlchemyOutbox
from cqrs_decor_sqlalchemy.records import record_row
from cqrs_decor_sqlalchemy.retention import CleanUp, HistorySweep, IdempotencySweep, InboxSweep
from cqrs_decor_sqlalchemy.schema import SqlAlchemySchema
from cqrs_decor_sqlalchemy.sessions import engine_in_autocommit, guarded, notes_of, own_session, sync_session
from cqrs_decor_sqlalchemy.settings import StoreSettings
from cqrs_decor_sqlalchemy.tables import Tables
from cqrs_decor_sqlalchemy.transaction import SqlAlchemyTransaction
from cqrs_decor_sqlalchemy.urls import is_memory, read_url
from cqrs_decor_sqlalchemy.wake_ups import wake_ups_of

Sessions = async_sessionmaker[Any]

SUPPORTED = ("postgresql", "mysql", "mariadb", "sqlite")


class SqlAlchemyStore:
    """Outbox, inbox and unit of work on PostgreSQL, MySQL, MariaDB or SQLite.

    Args:
        source: Your engine, or your sessionmaker: its pool, session class and `expire_on_commit` stay as they are.
        tables: Where the store's tables are described, e.g. `Tables(metadata=Base.metadata)`.
        settings: Limits and durability.

    Attributes:
        connections: How many its pool may have open at a time; None where there is no limit.
    """

    card: ClassVar[StoreCard] = StoreCard(
        durable=True,
        shared=True,
        concurrent_writers=True,
        crash_may_lose="nothing that was committed",
    )

    def __init__(
        self,
        source: AsyncEngine | Sessions,
        *,
        tables: Tables | None = None,
        settings: StoreSettings | None = None,
    ) -> None:
        engine, sessions = _engine_and_sessions(source)
        self.settings = settings or StoreSettings()
        self.database = Database(engine, tables or Tables(), self.settings)
        self.name = self.database.name
        self.connections = connections_of(engine)
        self.outbox = SqlAlchemyOutbox(self.database)
        self.outbox.wake_ups = wake_ups_of(self.database)
        self.inbox = SqlAlchemyInbox(self.database)
        self.idempotency = SqlAlchemyIdempotency(self.database)
        self.schema = SqlAlchemySchema(self.database)
        self._clean_up = _clean_up_of(self.database)
        if engine.dialect.name == "sqlite":
            self.card = _SQLITE_CARD[is_memory(engine.url)]  # type: ignore[misc]  # an SQLite store promises less
        self._sessions = sessions
        self._read_only = read_only_engine(engine)
        self._session_class = guarded(_sync_class(sessions))
        self.resources: Mapping[type[Any], bool] = MappingProxyType(_resources(sessions))
        self._owns_engine = False
        follow(engine.sync_engine)

    @classmethod
    def from_url(
        cls, url: str, *, tables: Tables | None = None, settings: StoreSettings | None = None
    ) -> "SqlAlchemyStore":
        """A store with an engine of its own.

        Raises:
            BadUrlError, UnsupportedError: The URL cannot be read, or its driver is not installed.
        """
        settings = settings or StoreSettings()
        store = cls(make_engine(url, settings), tables=tables, settings=settings)
        store._owns_engine = True
        return store

    @classmethod
    def from_object(cls, source: object) -> "SqlAlchemyStore | None":
        """A store on an engine or sessionmaker of the caller's; None if it is neither."""
        if isinstance(source, AsyncEngine):
            return cls(source)
        return cls(cast(Any, source)) if isinstance(source, async_sessionmaker) else None

    async def open(self) -> None:
        engine = self.database.engine
        if engine_in_autocommit(engine.sync_engine):
            raise AutocommitRefusedError(self.name)
        if engine.dialect.name == "sqlite":
            check_sqlite_engine(engine)
        await self.schema.ensure()

    async def close(self) -> None:
        if self._owns_engine:
            await self.database.engine.dispose()

    async def begin(self, *, read_only: bool = False) -> SqlAlchemyTransaction:
        """The connection is taken from the pool when the session first needs it."""
        if read_only:
            session = self._sessions(sync_session_class=self._session_class, bind=self._read_only)
        else:
            session = self._sessions(sync_session_class=self._session_class)
        notes = own_session(session.sync_session, self.database)
        return SqlAlchemyTransaction(session, notes, self.database, notes.guard, read_only=read_only)

    def join(self, session: object) -> SqlAlchemyTransaction:
        own = session if isinstance(session, AsyncSession) else None
        if isinstance(session, Session):
            own = async_session_of(session)
        if own is None:
            raise TypeError(f"{type(session).__name__} is not a session of {self.name}: give an AsyncSession.")
        return SqlAlchemyTransaction(own, notes_of(own.sync_session, self.database), self.database, None)

    def add(self, session: object, envelopes: Sequence[Envelope]) -> None:
        own = sync_session(session)
        if own is None:
            raise TypeError(f"{type(session).__name__} is not a session of {self.name}.")
        rows = [record_row(envelope) for envelope in envelopes]
        notes_of(own, self.database).add(own, self.database.tables.insert_record, rows)

    def is_transient(self, error: BaseException) -> bool:
        return is_transient(error)

    def is_unavailable(self, error: BaseException) -> bool:
        return is_unavailable(error)

    def log_broker(self) -> LogTableBroker:
        """The same database as broker, on the same engine."""
        return LogTableBroker.over(self.database)

    async def clean_up(self, retention: Retention, limit: int) -> int:
        return await self._clean_up.run(retention, limit)

    async def check(self) -> Sequence[Finding]:
        try:
            return [*await self._check_server(), *await self.schema.check()]
        except CqrsDecorError as error:
            return [Finding.from_error(error)]
        except SQLAlchemyError as error:
            return [Finding(code="CD401", severity="error", problem=f"{self.name}: {type(error).__name__}")]

    async def _check_server(self) -> Sequence[Finding]:
        engine = self.database.engine
        if engine_in_autocommit(engine.sync_engine):
            raise AutocommitRefusedError(self.name)
        if engine.dialect.name == "sqlite":
            check_sqlite_engine(engine)

        return await server_findings(self.database)


def make_engine(url: str, settings: StoreSettings) -> AsyncEngine:
    """The engine that a URL gets. SQLite in memory has one connection, for which sessions take turns."""
    parsed = read_url(url)
    size, overflow = (1, 0) if is_memory(parsed) else (settings.pool_size, settings.pool_overflow)
    engine = create_async_engine(
        parsed,
        poolclass=AsyncAdaptedQueuePool,
        pool_size=size,
        max_overflow=overflow,
        hide_parameters=True,  # they are the bodies of messages, and errors go to logs
    )
    return prepare_sqlite_engine(engine, settings) if parsed.get_backend_name() == "sqlite" else engine


def _clean_up_of(database: Database) -> CleanUp:
    tables = database.tables
    return CleanUp(database, [InboxSweep(tables), HistorySweep(tables), IdempotencySweep(tables), LogSweep(database)])


_SQLITE_CARD = {
    False: StoreCard(
        durable=True,
        shared=True,
        concurrent_writers=False,
        crash_may_lose="nothing that was committed; with synchronous=NORMAL a power cut may take the last commits",
    ),
    True: StoreCard(durable=False, shared=False, concurrent_writers=False, crash_may_lose="everything"),
}


def _engine_and_sessions(source: AsyncEngine | Sessions) -> tuple[AsyncEngine, Sessions]:
    sessions = async_sessionmaker(source, expire_on_commit=False) if isinstance(source, AsyncEngine) else source
    engine = sessions.kw.get("bind")
    if not isinstance(engine, AsyncEngine):
        raise UnsupportedError(
            "The store",
            "work with a sessionmaker that is not bound to an engine",
            "bind it: async_sessionmaker(engine)",
        )
    if engine.dialect.name not in SUPPORTED:
        raise UnsupportedError("The store", f"work on {engine.dialect.name}", f"use one of {', '.join(SUPPORTED)}")
    return engine, sessions


def _sync_class(sessions: Sessions) -> type[Session]:
    """What the user's sessions are underneath."""
    given: type[Session] | None = sessions.kw.get("sync_session_class")
    return given or cast("type[AsyncSession]", sessions.class_).sync_session_class


def _resources(sessions: Sessions) -> dict[type[Any], bool]:
    """`AsyncSession` and `Session`, and the user's own classes between those and what the sessionmaker makes."""
    asynchronous = [kind for kind in sessions.class_.__mro__ if issubclass(kind, AsyncSession)]
    synchronous = [kind for kind in _sync_class(sessions).__mro__ if issubclass(kind, Session)]
    return dict.fromkeys(asynchronous, False) | dict.fromkeys(synchronous, True)
