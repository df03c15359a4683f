"""Short transactions on the database of a log, with its errors in the words of a broker."""

import random
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import anyio
from sqlalchemy import Connection, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from cqrs_decor.clock import Clock
from cqrs_decor.errors import BadUrlError, BrokerAccessError, BrokerError, BrokerUnavailableError
from cqrs_decor_sqlalchemy.log_queries import LogQueries
from cqrs_decor_sqlalchemy.log_settings import LogSettings
from cqrs_decor_sqlalchemy.log_signals import LogSignals

T = TypeVar("T")
Work = Callable[[AsyncConnection], Awaitable[T]]

_ATTEMPTS = 10
_READING = {"cqrs_decor_reading": True}


class LogDatabase:
    """One database, used concurrently; each call is a transaction of its own.

    Args:
        engine: On SQLite one whose transactions begin with BEGIN IMMEDIATE, unless they only read.
        name: How texts call it: a URL without secrets.
        timeout: When a transaction counts as failed.
    """

    def __init__(self, engine: AsyncEngine, *, name: str, timeout: timedelta) -> None:
        self.engine = engine
        self.name = name
        self._timeout = timeout

    async def read(self, work: Work[T]) -> T:
        """Run `work` in a transaction that only reads.

        Raises:
            BrokerUnavailableError, BrokerAccessError: The database is away, or refuses.
        """
        try:
            with anyio.fail_after(self._timeout.total_seconds()):
                async with self.engine.connect() as connection:
                    await connection.execution_options(**_READING)
                    return await work(connection)
        except (DBAPIError, PoolTimeoutError, OSError) as error:
            raise self._translated(error) from error

    async def write(self, work: Work[T]) -> T:
        """Run `work` in a transaction and commit it; again when the database chose it to give way to another.

        Raises:
            BrokerUnavailableError, BrokerAccessError: The database is away, or refuses. Whether a commit that was
                under way has happened is unknown.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with anyio.fail_after(self._timeout.total_seconds()):
                    async with self.engine.begin() as connection:
                        return await work(connection)
            except (DBAPIError, PoolTimeoutError, OSError) as error:
                if attempt == _ATTEMPTS or not _gave_way(error):
                    raise self._translated(error) from error
            await anyio.sleep(random.uniform(0, 0.02 * attempt))
        raise AssertionError("the last attempt returns or raises")

    def _translated(self, error: Exception) -> BrokerError | Exception:
        state = _state(error)
        if state in _REFUSED_ACCESS:
            return BrokerAccessError(self.name, _reason(error))
        if _is_away(error, state):
            return BrokerUnavailableError(self.name, _reason(error))
        return error


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """What the readers and writers of one log have in common."""

    database: LogDatabase
    queries: LogQueries
    signals: LogSignals
    settings: LogSettings
    clock: Clock


def open_engine(url: str) -> AsyncEngine:
    """An engine of the log's own.

    Raises:
        BadUrlError: It cannot be read.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise BadUrlError("broker", url, str(error), "postgresql+asyncpg://user@host/database") from error
    engine = create_async_engine(parsed)
    if engine.dialect.name == "sqlite":
        event.listen(engine.sync_engine, "connect", _set_up_sqlite)
        event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    for setting in ("busy_timeout = 5000", "journal_mode = WAL", "synchronous = FULL"):
        cursor.execute(f"PRAGMA {setting}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    reads = connection.get_execution_options().get("cqrs_decor_reading")
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


_GIVE_WAY = {"40001", "40P01", "55P03", 1213, 1205, 1020}
_REFUSED_ACCESS = {"28000", "28P01", "3D000", "42501", 1044, 1045, 1049, 1142}


def _gave_way(error: Exception) -> bool:
    """Whether the database rolled the transaction back for the sake of another: deadlock, conflict, busy."""
    return _state(error) in _GIVE_WAY or "database is locked" in str(error)


def _is_away(error: Exception, state: str | int | None) -> bool:
    if isinstance(error, DBAPIError) and not error.connection_invalidated:
        return isinstance(error, OperationalError | InterfaceError) or str(state)[:2] in ("08", "53", "57")
    return True


def _state(error: Exception) -> str | int | None:
    """SQLSTATE, or MySQL's own number, of what the driver raised."""
    cause: Any = getattr(error, "orig", error)
    state = getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)
    if state is None and cause.args and isinstance(cause.args[0], int) and not isinstance(cause, sqlite3.Error):
        return int(cause.args[0])
    return state


def _reason(error: Exception) -> str:
    text = str(getattr(error, "orig", error)) or type(error).__name__
    return text.splitlines()[0]
