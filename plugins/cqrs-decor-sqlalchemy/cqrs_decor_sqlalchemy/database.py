"""The store's own short transactions: claim, settle, park and what operators do."""

import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import anyio
from sqlalchemy import Executable
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from cqrs_decor_sqlalchemy.dialects import READING
from cqrs_decor_sqlalchemy.errors import is_transient, translated
from cqrs_decor_sqlalchemy.frozen_sessions import end_frozen_sessions, limits
from cqrs_decor_sqlalchemy.settings import StoreSettings
from cqrs_decor_sqlalchemy.tables import Tables
from cqrs_decor_sqlalchemy.urls import shown

T = TypeVar("T")
Work = Callable[[AsyncConnection], Awaitable[T]]
_Transaction = Callable[[], AbstractAsyncContextManager[AsyncConnection]]

_logger = logging.getLogger(__name__)

_ATTEMPTS = 8


class Database:
    """An engine, the tables in it, and transactions of the store's own. Used concurrently.

    Attributes:
        name: How texts call it: a URL without secrets.
    """

    def __init__(self, engine: AsyncEngine, tables: Tables, settings: StoreSettings) -> None:
        self.engine = engine
        self.tables = tables
        self.settings = settings
        self.name = shown(engine.url)
        self._reading = engine.execution_options(**{READING: True})

    @property
    def dialect(self) -> str:
        """postgresql, mysql (MariaDB too) or sqlite."""
        return {"mariadb": "mysql"}.get(self.engine.dialect.name, self.engine.dialect.name)

    @property
    def idle_limit_ms(self) -> int:
        return round(self.settings.idle_limit.total_seconds() * 1000)

    async def read(self, work: Work[T]) -> T:
        """Run `work` in a transaction that does not write; again when the database is busy, as SQLite is while several
        processes open a new file.

        Raises:
            StoreUnavailableError, StoreAccessError, SchemaMissingError: By what the driver says.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with anyio.fail_after(self.settings.timeout.total_seconds()):
                    async with self._reading.connect() as connection:
                        return await work(connection)
            except Exception as error:  # drivers raise classes of their own while they connect
                if attempt == _ATTEMPTS or not is_transient(error):
                    self.raise_translated(error)
            await anyio.sleep(random.uniform(0, 0.01 * attempt))
        raise AssertionError("the last attempt returns or raises")

    async def write(self, work: Work[T], *, limit: timedelta | None = None) -> T:
        """Run `work` in a transaction and commit it; again when the database chose it to give way to another.

        Args:
            work: What to do with the connection.
            limit: When it counts as failed, where the setting `timeout` is too short for it.

        Raises:
            StoreUnavailableError, StoreAccessError, SchemaMissingError: By what the driver says. A commit that was
                under way may have happened.
        """
        return await self._again_and_again(self._transaction, work, limit or self.settings.timeout)

    async def write_at_once(self, work: Work[T]) -> T:
        """As `write`, for work of one statement that sets the idle limit by itself: no round trip more."""
        return await self._again_and_again(self._plain_transaction, work, self.settings.timeout)

    async def _again_and_again(self, transaction: _Transaction, work: Work[T], limit: timedelta) -> T:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with anyio.fail_after(limit.total_seconds()):
                    async with transaction() as connection:
                        return await work(connection)
            except Exception as error:  # drivers raise classes of their own while they connect
                if isinstance(error, TimeoutError) and self.dialect == "postgresql":
                    await self._end_who_is_in_the_way()
                if attempt == _ATTEMPTS or not is_transient(error):
                    self.raise_translated(error)
                _logger.debug(
                    "gave way to another transaction", extra={"action": "transaction_again", "attempt": attempt}
                )
            await anyio.sleep(random.uniform(0, 0.01 * attempt))
        raise AssertionError("the last attempt returns or raises")

    async def run(self, statement: Executable, parameters: Mapping[str, object]) -> None:
        """Run one statement and commit it, without what `write` sets up for transactions of several.

        Raises:
            StoreUnavailableError, StoreAccessError: By what the driver says.
        """
        try:
            with anyio.fail_after(self.settings.timeout.total_seconds()):
                async with self.engine.begin() as connection:
                    await connection.execute(statement, parameters)
        except Exception as error:  # drivers raise classes of their own while they connect
            self.raise_translated(error)

    async def end_frozen_sessions(self, connection: AsyncConnection) -> None:
        """A process that stands still must not keep a row locked: end those that the server does not by itself."""
        if self.dialect != "postgresql":
            return
        seconds = self.settings.idle_limit.total_seconds()
        ended = (await connection.execute(end_frozen_sessions, {"seconds": seconds})).all()
        if ended:
            facts = {"action": "frozen_sessions_ended", "sessions": len(ended)}
            _logger.warning("ended sessions of ours that stood still in the middle of a statement", extra=facts)

    async def _end_who_is_in_the_way(self) -> None:
        with suppress(Exception):  # the failure that made it look is what is told
            await self.read(self.end_frozen_sessions)

    def raise_translated(self, error: Exception) -> NoReturn:
        """Raise the library's own error for what a driver raised; everything else as it is."""
        tables = self.tables
        ours = translated(error, self.name, (tables.outbox.name, tables.inbox.name, tables.lanes.name))
        if ours is error:
            raise error
        raise ours from error

    @asynccontextmanager
    async def _transaction(self) -> AsyncGenerator[AsyncConnection]:
        async with self.engine.connect() as connection:
            if self.dialect == "postgresql":
                await connection.exec_driver_sql(limits(self.idle_limit_ms))
                yield connection
                await connection.commit()
            elif self.dialect == "mysql":
                async with _session_settings(connection, self.settings):
                    yield connection
                    await connection.commit()
            else:
                yield connection
                await connection.commit()

    @asynccontextmanager
    async def _plain_transaction(self) -> AsyncGenerator[AsyncConnection]:
        async with self.engine.begin() as connection:
            yield connection


@asynccontextmanager
async def _session_settings(connection: AsyncConnection, settings: StoreSettings) -> AsyncGenerator[None]:
    """As for PostgreSQL; and without the gap locks of REPEATABLE READ, for which emitting transactions would wait.

    These are settings of the session, so they are put back; a connection on which that did not come about is dropped.
    """
    wanted = _mysql_settings(connection, settings)
    saved = [f"@cqrs_decor_{name} = @@SESSION.{name}" for name in wanted]
    changed = [f"SESSION {name} = {value}" for name, value in wanted.items()]
    restored = [f"SESSION {name} = @cqrs_decor_{name}" for name in wanted]
    try:
        await connection.exec_driver_sql("SET " + ", ".join([*saved, *changed]))
        yield
        await connection.exec_driver_sql("SET " + ", ".join(restored))
    except BaseException:
        with anyio.CancelScope(shield=True):
            await connection.invalidate()
        raise


def _mysql_settings(connection: AsyncConnection, settings: StoreSettings) -> dict[str, str]:
    """MySQL knows no idle limit for transactions, and calls the isolation level differently.

    MariaDB's `idle_write_transaction_timeout` does not do: it overlooks a transaction that has only locked rows.
    """
    dialect: Any = connection.dialect
    if not dialect.is_mariadb:
        return {"transaction_isolation": "'READ-COMMITTED'"}
    limit_s = round(settings.idle_limit.total_seconds())
    return {"tx_isolation": "'READ-COMMITTED'", "idle_transaction_timeout": str(limit_s)}
