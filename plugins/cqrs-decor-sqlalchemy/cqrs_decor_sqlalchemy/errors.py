"""What drivers raise, sorted: who is at fault, and whether trying again can help."""

import asyncio
import sqlite3
from collections.abc import Iterator
from traceback import walk_tb
from typing import Any

from sqlalchemy.exc import DBAPIError, DisconnectionError, InterfaceError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from cqrs_decor.errors import (
    CommitOutcomeUnknownError,
    SchemaMissingError,
    StoreAccessError,
    StoreUnavailableError,
)

# SQLSTATE (PostgreSQL), error numbers (MySQL, MariaDB) and primary result codes (SQLite): they never look alike.
_TRANSIENT = {"40001", "40P01", 1020, 1205, 1213, "sqlite 5", "sqlite 6"}  # 5 busy, 6 locked
_ACCESS = {"28000", "28P01", "3D000", "3F000", "42501", 1044, 1045, 1049, 1142, 1143, 1227, 1370}
_ACCESS_SQLITE = {"sqlite 3", "sqlite 8", "sqlite 26"}  # permission, read-only, not a database
_TABLE_MISSING = {"42P01", 1146}
# An idle transaction was ended (PostgreSQL); connections, disk or server gone (MySQL).
_AWAY = {"25P03", 1021, 1040, 1053, 1114, 1203, 1927, 2002, 2003, 2006, 2013, 2055, 4031}
_AWAY_SQLITE = {"sqlite 10", "sqlite 13", "sqlite 14"}  # I/O error, disk full, cannot open
# Connection faults, a server out of memory, disk or connections, a server that starts or stops, a fault of its system.
_AWAY_CLASSES = ("08", "53", "57P", "58")


def is_transient(error: BaseException) -> bool:
    """Whether the same transaction may pass when it is run again: deadlock, serialization failure, busy SQLite file."""
    return any(code_of(cause) in _TRANSIENT for cause in _chain(error))


def is_unavailable(error: BaseException) -> bool:
    """Whether the database is away or overloaded, which says nothing about the work in hand.

    A network fails in the same words wherever it fails: what a handler met on its way to another service, or its own
    time limit, is no outage of the database.
    """
    return any(
        _says_away(cause) or (_is_of_any_network(cause) and _came_from_the_database(cause)) for cause in _chain(error)
    )


def translated(error: Exception, store: str, tables: tuple[str, ...] = ()) -> Exception:
    """The library's own error for what a driver raised during the store's own work; others come back as they are."""
    if any(isinstance(cause, CommitOutcomeUnknownError) for cause in _chain(error)):
        return error
    for cause in _chain(error):
        code = code_of(cause)
        if code in _TABLE_MISSING or _is_missing_on_sqlite(cause):
            return SchemaMissingError(store, tables)
        if code in _ACCESS or code in _ACCESS_SQLITE or _is_refused_by_psycopg(cause):
            return StoreAccessError(store, reason_of(cause))
        if _says_away(cause) or _is_of_any_network(cause):
            return StoreUnavailableError(store, reason_of(cause))
    return error


def code_of(error: BaseException) -> str | int | None:
    """SQLSTATE, MySQL's error number or SQLite's primary result code (`sqlite 5`) of what a driver raised."""
    cause: Any = getattr(error, "orig", None) or error
    if isinstance(cause, sqlite3.Error):
        extended = getattr(cause, "sqlite_errorcode", None)
        return None if extended is None else f"sqlite {extended & 0xFF}"
    if type(cause).__module__.startswith(("asyncmy", "aiomysql", "pymysql")):
        number = cause.args[0] if cause.args else None
        return number if isinstance(number, int) else None
    state = getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)
    return state if isinstance(state, str) else None


def reason_of(error: BaseException) -> str:
    """The first line of what the driver says; never the statement, its parameters or a URL."""
    cause = getattr(error, "orig", None) or error
    text = str(cause).strip() or type(cause).__name__
    line = text.splitlines()[0]
    # SQLAlchemy's asyncpg adapter puts the driver's class in front.
    return line.partition(">: ")[2] if line.startswith("<class ") else line


def _says_away(error: BaseException) -> bool:
    if isinstance(error, StoreUnavailableError | PoolTimeoutError | DisconnectionError):
        return True
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    code = code_of(error)
    if code is not None:
        return code in _AWAY or code in _AWAY_SQLITE or (isinstance(code, str) and code.startswith(_AWAY_CLASSES))
    if _is_refused_by_psycopg(error):
        return False
    if isinstance(error, InterfaceError):
        return "closed" in str(error)
    cause = getattr(error, "orig", None) or error  # psycopg gives no code when nobody answers
    return type(cause).__module__.startswith("psycopg") and type(cause).__name__ == "OperationalError"


def _is_of_any_network(error: BaseException) -> bool:
    """asyncpg and asyncio raise an OSError when nobody answers, or a connection ends."""
    if _is_refused_by_psycopg(error) or code_of(error) is not None:
        return False
    if isinstance(error, OSError):  # also TimeoutError
        return not isinstance(error, FileNotFoundError | PermissionError)
    return isinstance(error, asyncio.IncompleteReadError)


def _came_from_the_database(error: BaseException) -> bool:
    """Whether it was raised beneath SQLAlchemy's engine. Not beneath its sessions: those also run handlers."""
    names = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))
    return any(name.startswith(_ENGINE) for name in names)


_ENGINE = ("sqlalchemy.dialects", "sqlalchemy.engine", "sqlalchemy.pool")


def _is_refused_by_psycopg(error: BaseException) -> bool:
    """libpq gives no SQLSTATE for a connection that is refused, only the server's words; others count as an outage."""
    cause = getattr(error, "orig", None) or error
    if not type(cause).__module__.startswith("psycopg") or code_of(error) is not None:
        return False
    return any(words in str(cause) for words in _REFUSALS)


_REFUSALS = (
    "password authentication failed",
    "authentication failed for user",
    "does not exist",
    "is not permitted to log in",
    "no pg_hba.conf entry",
    "permission denied for database",
    "no password supplied",
)


def _is_missing_on_sqlite(error: BaseException) -> bool:
    cause = getattr(error, "orig", None) or error
    return isinstance(cause, sqlite3.OperationalError) and "no such table" in str(cause)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it, outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__
