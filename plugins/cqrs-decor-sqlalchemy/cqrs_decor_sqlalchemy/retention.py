"""Deletes what retention says is done with: in chunks, oldest first, by one process at a time."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Protocol

from sqlalchemy import Column, Table, and_, bindparam, delete, exists, or_, select, update
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from cqrs_decor.store import Retention
from cqrs_decor_sqlalchemy.columns import DatabaseLater, DatabaseNow, time_type
from cqrs_decor_sqlalchemy.database import Database
from cqrs_decor_sqlalchemy.tables import Tables

CHUNK = 1_000
"""Rows of one transaction at most: a few milliseconds, after which whoever waits for one of them goes on."""

_AT_ONCE = 100
"""Rows that one statement deletes."""

_LEASE = timedelta(minutes=2)
_CLEANER = "cleaner"


class Sweep(Protocol):
    """Deletes old rows of one kind."""

    async def __call__(self, connection: AsyncConnection, retention: Retention, limit: int) -> int:
        """Delete up to `limit` rows in this transaction, oldest first; how many. 0: none is left to delete."""
        ...


class CleanUp:
    """Runs sweeps for all processes of a database, each chunk in a transaction of its own under the cleaner's lease."""

    def __init__(self, database: Database, sweeps: Sequence[Sweep]) -> None:
        self._database = database
        self._sweeps = sweeps
        self._lease = _CleanersLease(database.tables, database.dialect)

    async def run(self, retention: Retention, limit: int) -> int:
        """See `Store.clean_up`."""
        deleted = 0
        while deleted < limit:
            rows = await self._chunk(retention, min(limit - deleted, CHUNK))
            if not rows:
                break
            deleted += rows
        return deleted

    async def _chunk(self, retention: Retention, limit: int) -> int:
        """Delete some rows of the first kind of which there are any: a transaction has locks in one of the tables only.

        Returns:
            How many; 0 where there is nothing to delete, which one transaction finds out for all, or where another
            process is at it.
        """

        async def work(connection: AsyncConnection) -> tuple[int, datetime | None]:
            until = await self._lease.take(connection)
            if until is None:
                return 0, None
            for sweep in self._sweeps:
                if rows := await sweep(connection, retention, limit):
                    return rows, until
            await self._lease.give_back(connection, until)  # an operator's purge, that comes next, need not wait for it
            return 0, until

        rows, until = await self._database.write(work)
        self._lease.until = until or self._lease.until
        return rows


class _CleanersLease:
    """One row of `member`. Its end says whose it is: whoever wrote that very moment there may write a later one.

    Attributes:
        until: What this process wrote there last, by the database's clock; as far as it knows that it was committed.
    """

    def __init__(self, tables: Tables, dialect: str) -> None:
        self.until: datetime | None = None
        members = tables.members.c
        mine = [members.owner == _CLEANER, members.kind == _CLEANER]
        known = bindparam("known", type_=time_type())
        self._extend = (
            update(tables.members)
            .where(*mine, or_(members.seen_until <= DatabaseNow(), members.seen_until == known))
            .values(seen_until=DatabaseLater("seconds"))
        )
        self._end = update(tables.members).where(*mine, members.seen_until == known).values(seen_until=DatabaseNow())
        self._look = select(members.seen_until).where(*mine)
        self._add = _insert_unless_there(tables.members, dialect).values(
            owner=_CLEANER, kind=_CLEANER, seen_until=DatabaseNow()
        )

    async def take(self, connection: AsyncConnection) -> datetime | None:
        """Take or extend it in this transaction; its end, or None where another process has it."""
        if await self._extended(connection):
            until: datetime = (await connection.execute(self._look)).scalar_one()
            return until
        if await connection.scalar(self._look) is not None:
            return None
        await connection.execute(self._add)
        return await self.take(connection)

    async def give_back(self, connection: AsyncConnection, until: datetime) -> None:
        """End it in this transaction, which has taken it until then."""
        await connection.execute(self._end, {"known": until})

    async def _extended(self, connection: AsyncConnection) -> bool:
        values = {"known": self.until, "seconds": _LEASE.total_seconds()}
        return bool((await connection.execute(self._extend, values)).rowcount)


class InboxSweep:
    """Which message a consumer has had; never of a message that is still parked, since it will be handled yet."""

    def __init__(self, tables: Tables) -> None:
        inbox, parked = tables.inbox.c, tables.inbox_parked.c
        still_parked = exists().where(
            parked.consumer == inbox.consumer,
            parked.source == inbox.source,
            parked.message_id == inbox.message_id,
        )
        self._rows = _OldRows(tables.inbox, inbox.handled_at, [inbox.consumer, inbox.source, inbox.message_id])
        self._rows.leave_out(still_parked)

    async def __call__(self, connection: AsyncConnection, retention: Retention, limit: int) -> int:
        return await self._rows.delete(connection, retention.inbox, limit)


class HistorySweep:
    """Delivered outbox records."""

    def __init__(self, tables: Tables) -> None:
        history = tables.history.c
        self._rows = _OldRows(tables.history, history.delivered_at, [history.id])

    async def __call__(self, connection: AsyncConnection, retention: Retention, limit: int) -> int:
        return await self._rows.delete(connection, retention.history, limit)


class IdempotencySweep:
    """Results of commands."""

    def __init__(self, tables: Tables) -> None:
        idempotency = tables.idempotency.c
        self._rows = _OldRows(tables.idempotency, idempotency.created_at, [idempotency.key])

    async def __call__(self, connection: AsyncConnection, retention: Retention, limit: int) -> int:
        return await self._rows.delete(connection, retention.idempotency, limit)


class _OldRows:
    """The rows of a table from before a moment, found by the index on their time and deleted by primary key.

    Rows that somebody has locked are left for later, so that this waits for nobody and cannot be part of a deadlock.
    """

    def __init__(self, table: Table, time: Column[Any], key: Sequence[Column[Any]]) -> None:
        # In a subquery, so that PostgreSQL reads its volatile clock once and can use the index.
        moment = select(DatabaseLater("seconds")).scalar_subquery()
        self._oldest = (
            select(*key).where(time < moment).order_by(time).limit(bindparam("limit")).with_for_update(skip_locked=True)
        )
        # Spelt out: MariaDB reads the whole table, and waits for what is locked in it, for a list of composite keys.
        one_of = [and_(*(column == bindparam(f"{column.name}_{n}") for column in key)) for n in range(_AT_ONCE)]
        self._delete = delete(table).where(or_(*one_of))
        self._names = [column.name for column in key]

    def leave_out(self, those: Any) -> None:
        self._oldest = self._oldest.where(~those)

    async def delete(self, connection: AsyncConnection, age: timedelta | None, limit: int) -> int:
        if age is None:
            return 0
        values = {"seconds": -age.total_seconds(), "limit": limit}
        keys = (await connection.execute(self._oldest, values)).all()
        for start in range(0, len(keys), _AT_ONCE):
            await connection.execute(self._delete, self._parameters(keys[start : start + _AT_ONCE]))
        return len(keys)

    def _parameters(self, keys: Sequence[Any]) -> dict[str, object]:
        """Always of as many keys, so that the statement has one text: the last one fills the places that are left."""
        full = [*keys, *[keys[-1]] * (_AT_ONCE - len(keys))]
        return {
            f"{name}_{n}": value for n, key in enumerate(full) for name, value in zip(self._names, key, strict=True)
        }


def _insert_unless_there(table: Table, dialect: str) -> Any:
    if dialect == "mysql":
        return mysql.insert(table).on_duplicate_key_update(kind=table.c.kind)
    return {"postgresql": postgresql, "sqlite": sqlite}[dialect].insert(table).on_conflict_do_nothing()
