"""How each database begins a transaction that reads, or one of the store's own."""

from typing import Any
from weakref import WeakSet

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry, StaticPool

from cqrs_decor.errors import UnsafeDatabaseSetupError
from cqrs_decor_sqlalchemy.settings import StoreSettings
from cqrs_decor_sqlalchemy.urls import is_memory, shown

READ_ONLY = "cqrs_decor_read_only"
"""Execution option: the transaction must not write, and the database sees to it."""

READING = "cqrs_decor_reading"
"""Execution option: the transaction does not write, so that SQLite need not make it wait for the one who does."""

_prepared: "WeakSet[Engine]" = WeakSet()


def read_only_engine(engine: AsyncEngine) -> AsyncEngine:
    """The same engine and pool, with transactions that cannot write."""
    options: dict[str, object] = {READ_ONLY: True}
    if engine.dialect.name == "postgresql":
        options["postgresql_readonly"] = True  # the driver sends BEGIN READ ONLY: no round trip more
    if engine.dialect.name in ("mysql", "mariadb") and not event.contains(engine.sync_engine, "begin", _begin_mysql):
        event.listen(engine.sync_engine, "begin", _begin_mysql)
    return engine.execution_options(**options)


def prepare_sqlite_engine(engine: AsyncEngine, settings: StoreSettings | None = None) -> AsyncEngine:
    """Set an SQLite engine up so that transactions are whole; call it before the engine is first used.

    The driver begins no transactions by itself any more (a savepoint as first statement would survive an outer
    rollback); each begins with BEGIN IMMEDIATE, so that a read that turns into a write cannot fail at once with
    "database is locked". Files get write-ahead logging, a busy timeout and `synchronous`; foreign keys are left to you.
    A transaction that only reads may say so: `connection.execution_options(cqrs_decor_reading=True)`.

    Raises:
        UnsafeDatabaseSetupError: The engine shares one connection between concurrent sessions.
    """
    _refuse_shared_connection(engine)
    if engine.sync_engine in _prepared:
        return engine
    # First of all: the dialect runs statements of its own on a new connection, and those can be cancelled as well.
    event.listen(engine.sync_engine, "connect", _Pragmas(settings or StoreSettings()), insert=True)
    event.listen(engine.sync_engine, "begin", _begin_sqlite)
    _prepared.add(engine.sync_engine)
    return engine


def is_prepared_sqlite(engine: Engine) -> bool:
    """Whether `prepare_sqlite_engine` was called for this engine, or for the one that it shares its pool with."""
    return any(engine.pool is known.pool for known in _prepared)


def check_sqlite_engine(engine: AsyncEngine) -> None:
    """
    Raises:
        UnsafeDatabaseSetupError: `prepare_sqlite_engine` was not called for it.
    """
    _refuse_shared_connection(engine)
    if not is_prepared_sqlite(engine.sync_engine):
        raise UnsafeDatabaseSetupError(
            shown(engine.url),
            "the SQLite driver begins transactions by itself, so a rolled-back savepoint can leave rows behind",
            "call cqrs_decor_sqlalchemy.prepare_sqlite_engine(engine) right after create_async_engine(...)",
        )


def _refuse_shared_connection(engine: AsyncEngine) -> None:
    if not isinstance(engine.pool, StaticPool):
        return
    name = shown(engine.url) if not is_memory(engine.url) else "sqlite in memory"
    raise UnsafeDatabaseSetupError(
        name,
        "its StaticPool gives one connection to several sessions at once, and the rollback of one undoes the others",
        "create the engine with poolclass=AsyncAdaptedQueuePool, pool_size=1, max_overflow=0: sessions then take turns",
    )


class _Pragmas:
    """What each new SQLite connection is told."""

    def __init__(self, settings: StoreSettings) -> None:
        self._statements = (
            f"PRAGMA busy_timeout = {round(settings.busy_timeout.total_seconds() * 1000)}",
            "PRAGMA journal_mode = WAL",
            f"PRAGMA synchronous = {settings.synchronous}",
        )

    def __call__(self, connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
        _stop_once(getattr(connection, "driver_connection", None))
        connection.isolation_level = None
        cursor = connection.cursor()
        for statement in self._statements:
            cursor.execute(statement)
        cursor.close()


def _stop_once(driver: Any) -> None:
    """Keep a cancelled statement from hanging the end of the process.

    Its connection is stopped twice then: by SQLAlchemy, and by the `close` that it has begun before. The second stop is
    asked of a thread that has ended, and whoever waits for its answer waits for ever: in the end `asyncio.run`. Seen
    with aiosqlite 0.22.1 and SQLAlchemy 2.1.9: `test_cancelled_statements_do_not_hold_up_the_end_of_the_process`.
    """
    stop = getattr(driver, "stop", None)
    if stop is None:  # aiosqlite before 0.22.1 has only `close`
        return
    answers: list[Any] = []

    def stop_once() -> Any:
        if not answers:
            answers.append(stop())
        return answers[0]

    driver.stop = stop_once


def _begin_sqlite(connection: Connection) -> None:
    options = connection.get_execution_options()
    _forbid_writing(connection, forbidden=bool(options.get(READ_ONLY)))
    reads = options.get(READ_ONLY) or options.get(READING)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _forbid_writing(connection: Connection, *, forbidden: bool) -> None:
    """`query_only` is a switch of the connection: it is turned only where its last user wanted it otherwise."""
    if bool(connection.info.get(READ_ONLY)) is not forbidden:
        connection.exec_driver_sql(f"PRAGMA query_only = {'ON' if forbidden else 'OFF'}")
        connection.info[READ_ONLY] = forbidden


def _begin_mysql(connection: Connection) -> None:
    if connection.get_execution_options().get(READ_ONLY):
        connection.exec_driver_sql("START TRANSACTION READ ONLY")
