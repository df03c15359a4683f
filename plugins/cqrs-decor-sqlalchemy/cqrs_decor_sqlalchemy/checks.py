"""What `doctor` says about a database server and the way to it."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.pool import QueuePool, StaticPool

from cqrs_decor.errors import UnsafeDatabaseSetupError
from cqrs_decor.findings import Finding
from cqrs_decor_sqlalchemy.database import Database
from cqrs_decor_sqlalchemy.errors import code_of

_LEVELS = {"postgresql": {"READ COMMITTED", "READ UNCOMMITTED"}}
"""Under which the store's own transactions see, once they have a lane's lock, what the one before them has committed.
PostgreSQL takes the second for the first. On MySQL and MariaDB they set their own level; SQLite has one writer."""

_OTHERS_STATEMENT = ("26000", "42P05")
"""A prepared statement is missing, or there is one of that name already: somebody else's."""

_PID = select(func.pg_backend_pid())


def connections_of(engine: AsyncEngine) -> int | None:
    """How many connections its pool may have open at a time; None where there is no limit."""
    pool: Any = engine.sync_engine.pool
    if isinstance(pool, StaticPool):
        return 1
    if not isinstance(pool, QueuePool) or pool.size() == 0 or pool._max_overflow < 0:  # pyright: ignore[reportPrivateUsage]
        return None
    return pool.size() + pool._max_overflow  # pyright: ignore[reportPrivateUsage]  # it has no public name


async def server_findings(database: Database) -> Sequence[Finding]:
    """Which server answers, under which isolation level, and what stands in between."""
    try:
        return await _server_findings(database)
    except DBAPIError as error:
        if code_of(error) not in _OTHERS_STATEMENT:
            raise
        return [_unfit_for_a_pooler(database)]


async def _server_findings(database: Database) -> Sequence[Finding]:

    async def work(connection: AsyncConnection) -> list[Finding]:
        version = ".".join(str(part) for part in connection.dialect.server_version_info or ())
        findings = [
            Finding.ok(f"{database.name} answers: {connection.dialect.name} {version} by {connection.dialect.driver}"),
            _isolation(database, await connection.get_isolation_level()),
        ]
        if database.dialect == "sqlite":
            mode = await connection.exec_driver_sql("PRAGMA journal_mode")
            findings.append(Finding.ok(f"journal mode {mode.scalar()}"))
        return findings

    findings = await database.read(work)
    if database.dialect == "postgresql" and connections_of(database.engine) != 1:
        findings += await _between(database)
    return findings


def _isolation(database: Database, level: str) -> Finding:
    if level in _LEVELS.get(database.dialect, {level}):
        return Finding.ok(f"isolation level {level}")
    error = UnsafeDatabaseSetupError(
        database.name,
        f"under {level} a relay that waited for a lane would not see what was committed meanwhile",
        "leave the engine and the database at READ COMMITTED, and give single sessions of yours a higher level",
    )
    return Finding.from_error(error)


async def _between(database: Database) -> list[Finding]:
    """A pooler in transaction mode gives the server connection away between two transactions: another takes the first
    one's meanwhile, so that the second gets a different one.
    """
    async with database.engine.connect() as one, database.engine.connect() as other:
        first = await _server_process(one)
        await other.scalar(_PID)
        second = await _server_process(one)
        if first == second:
            return []
        if not await _keeps_statements(one):
            return [Finding.ok("a pooler in transaction mode stands in between, and the driver is set up for it")]
    return [_unfit_for_a_pooler(database)]


def _unfit_for_a_pooler(database: Database) -> Finding:
    error = UnsafeDatabaseSetupError(
        database.name,
        "a pooler in transaction mode stands in between, and the driver keeps prepared statements, which the next "
        "transaction's server connection does not know",
        "set the driver up for it: psycopg with prepare_threshold=None, asyncpg with both statement caches at 0",
    )
    return Finding.from_error(error)


async def _server_process(connection: AsyncConnection) -> int | None:
    async with connection.begin():
        process: int | None = await connection.scalar(_PID)
        return process


async def _keeps_statements(connection: AsyncConnection) -> bool:
    """asyncpg and SQLAlchemy's adapter of it keep them each in a cache of their own, of which neither tells."""
    raw = await connection.get_raw_connection()
    driver: Any = raw.driver_connection
    if connection.dialect.driver == "psycopg":
        return driver.prepare_threshold is not None
    adapter: Any = raw.dbapi_connection
    return bool(adapter._prepared_statement_cache) or driver._config.statement_cache_size > 0
