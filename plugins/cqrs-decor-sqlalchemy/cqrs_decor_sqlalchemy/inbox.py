"""The inbox of one database."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import BigInteger, Connection, Insert, Table, bindparam, delete, func, select, update
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import Session

from cqrs_decor.envelope import Envelope
from cqrs_decor.inbox import InboxFilter, ParkedMessage
from cqrs_decor.unit_of_work import Transaction
from cqrs_decor_sqlalchemy.columns import DatabaseNow
from cqrs_decor_sqlalchemy.database import Database
from cqrs_decor_sqlalchemy.errors import code_of
from cqrs_decor_sqlalchemy.records import fitted, parked_envelope, parked_row, stored_text
from cqrs_decor_sqlalchemy.tables import Tables
from cqrs_decor_sqlalchemy.transaction import SqlAlchemyTransaction

_DUPLICATE_ENTRY = 1062


class InboxQueries:
    """Built once per store, so that SQLAlchemy compiles each statement once. `ids` and `consumers` are lists."""

    def __init__(self, tables: Tables, dialect: str) -> None:
        parked = tables.inbox_parked.c
        ids = parked.id.in_(bindparam("ids", expanding=True, type_=BigInteger()))

        # Primary key (consumer, source, message_id); a second one waits until the first has ended.
        self.record = _insert_if_new(tables, dialect)
        # Unique (consumer, source, message_id).
        self.park = _replace_parked(tables, dialect)
        # Primary key.
        self.unpark = delete(tables.inbox_parked).where(parked.id == bindparam("parked_id"))
        self.lock = select(parked.id).where(ids).order_by(parked.id).with_for_update()
        self.lock_unasked = self.lock.where(parked.retry_requested == 0)
        self.ask = update(tables.inbox_parked).where(ids).values(retry_requested=1)
        self.delete = delete(tables.inbox_parked).where(ids)
        # Index (retry_requested, id).
        self.retries = (
            select(tables.inbox_parked)
            .where(parked.retry_requested == 1, parked.consumer.in_(bindparam("consumers", expanding=True)))
            .order_by(parked.id)
            .limit(bindparam("limit"))
        )
        self.parked = select(tables.inbox_parked).order_by(parked.id)
        self.count = select(func.count()).select_from(tables.inbox_parked)
        self.note_action = tables.operator_log.insert().values(done_at=DatabaseNow())


class SqlAlchemyInbox:
    """Inbox rows and parked messages in the tables `inbox` and `inbox_parked`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._queries = InboxQueries(database.tables, database.dialect)

    async def record(self, transaction: Transaction, consumer: str, envelope: Envelope) -> bool:
        session = _session_of(transaction)
        row = {"consumer": fitted(consumer), "source": fitted(envelope.source), "message_id": fitted(envelope.id)}

        def work(session: Session) -> bool:
            return _is_new(session.connection(), self._queries.record, row)

        new: bool = await session.run_sync(work)
        return new

    async def park(self, parked: ParkedMessage) -> None:
        row = parked_row(parked.consumer, parked.envelope)
        row |= {"error": stored_text(parked.error), "attempts": parked.attempts, "parked_at": parked.parked_at}

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(self._queries.park, row)

        await self._database.write(work)

    async def unpark(self, transaction: Transaction, parked_id: int) -> bool:
        result = await _session_of(transaction).execute(self._queries.unpark, {"parked_id": parked_id})
        return bool(getattr(result, "rowcount", 0))

    async def retries(self, consumers: Collection[str], limit: int) -> Sequence[ParkedMessage]:
        if not consumers:
            return []
        values = {"consumers": [fitted(consumer) for consumer in consumers], "limit": limit}

        async def work(connection: AsyncConnection) -> list[ParkedMessage]:
            return [_parked(row) for row in await connection.execute(self._queries.retries, values)]

        return await self._database.read(work)

    async def find(self, wanted: InboxFilter) -> Sequence[ParkedMessage]:
        parked = self._database.tables.inbox_parked.c
        query = self._queries.parked.limit(wanted.limit)
        if wanted.ids:
            query = query.where(parked.id.in_(list(wanted.ids)))
        for column, value in (
            (parked.consumer, wanted.consumer),
            (parked.topic, wanted.topic),
            (parked.key, wanted.key),
        ):
            if value is not None:
                query = query.where(column == fitted(value))

        async def work(connection: AsyncConnection) -> list[ParkedMessage]:
            return [_parked(row) for row in await connection.execute(query)]

        return await self._database.read(work)

    async def parked_count(self) -> int:
        async def work(connection: AsyncConnection) -> int:
            return await connection.scalar(self._queries.count) or 0

        return await self._database.read(work)

    async def retry(self, ids: Collection[int], *, who: str) -> int:
        async def work(connection: AsyncConnection) -> int:
            there = list((await connection.scalars(self._queries.lock_unasked, {"ids": list(ids)})).all())
            if there:
                await connection.execute(self._queries.ask, {"ids": there})
                await self._note(connection, "retry", there, who)
            return len(there)

        return await self._database.write(work)

    async def discard(self, ids: Collection[int], *, who: str) -> int:
        async def work(connection: AsyncConnection) -> int:
            there = list((await connection.scalars(self._queries.lock, {"ids": list(ids)})).all())
            if there:
                await connection.execute(self._queries.delete, {"ids": there})
                await self._note(connection, "discard", there, who)
            return len(there)

        return await self._database.write(work)

    async def _note(self, connection: AsyncConnection, action: str, ids: Sequence[int], who: str) -> None:
        rows = [{"who": fitted(who), "action": action, "kind": "inbox", "record_id": record_id} for record_id in ids]
        await connection.execute(self._queries.note_action, rows)


def _insert_if_new(tables: Tables, dialect: str) -> Insert:
    """MySQL gets a plain INSERT: IGNORE hides other errors, and its drivers count an unchanged duplicate as a row."""
    insert = _INSERTS[dialect](tables.inbox).values(handled_at=DatabaseNow())
    if not isinstance(insert, mysql.Insert):
        insert = insert.on_conflict_do_nothing()
    return insert.execution_options(preserve_rowcount=True)


_INSERTS: dict[str, Callable[[Table], mysql.Insert | postgresql.Insert | sqlite.Insert]] = {
    "mysql": mysql.insert,
    "postgresql": postgresql.insert,
    "sqlite": sqlite.insert,
}


def _is_new(connection: Connection, insert: Insert, row: Mapping[str, object]) -> bool:
    """A duplicate undoes the statement only, on MySQL as well: the transaction goes on."""
    try:
        return connection.execute(insert, row).rowcount == 1
    except IntegrityError as error:
        if code_of(error) != _DUPLICATE_ENTRY:
            raise
        return False


def _replace_parked(tables: Tables, dialect: str) -> Insert:
    table = tables.inbox_parked
    replaced = ("error", "attempts", "parked_at", "topic", "key", "type", "headers", "body")
    if dialect == "mysql":
        insert = mysql.insert(table)
        return insert.on_duplicate_key_update(
            {name: insert.inserted[name] for name in replaced} | {"retry_requested": 0}
        )
    upsert = postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)
    return upsert.on_conflict_do_update(
        index_elements=[table.c.consumer, table.c.source, table.c.message_id],
        set_={name: upsert.excluded[name] for name in replaced} | {"retry_requested": 0},
    )


def _session_of(transaction: Transaction) -> Any:
    if not isinstance(transaction, SqlAlchemyTransaction):
        raise TypeError(f"{type(transaction).__name__} is not a transaction of this store.")
    return transaction.session


def _parked(row: Any) -> ParkedMessage:
    return ParkedMessage(
        id=row.id,
        consumer=row.consumer,
        envelope=parked_envelope(row),
        error=row.error,
        attempts=row.attempts,
        parked_at=row.parked_at,
        retry_requested=bool(row.retry_requested),
    )
