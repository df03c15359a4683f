"""The inbox of one database."""

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from sqlalchemy import Connection, Executable, Select, func
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from cqrs_decor.envelope import Envelope
from cqrs_decor.inbox import InboxFilter, Mark, Noted, ParkedMessage
from cqrs_decor.unit_of_work import Transaction
from cqrs_decor_sqlalchemy.columns import DatabaseLater
from cqrs_decor_sqlalchemy.database import Database
from cqrs_decor_sqlalchemy.errors import code_of
from cqrs_decor_sqlalchemy.inbox_queries import InboxQueries
from cqrs_decor_sqlalchemy.marks import SqlAlchemyMarks
from cqrs_decor_sqlalchemy.records import fitted, parked_envelope, parked_row, stored_text
from cqrs_decor_sqlalchemy.transaction import in_transaction

_DUPLICATE = (1062, "sqlite 19")
_AT_ONCE = 200
"""Rows of one INSERT on MySQL, which its drivers write as one statement up to a megabyte; ids of one transaction."""

Row = dict[str, Any]


class SqlAlchemyInbox:
    """Inbox rows, parked messages and the keys that they hold, in the tables `inbox`, `inbox_parked`, `inbox_hold`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._queries = InboxQueries(database.tables, database.dialect)
        self._marks = SqlAlchemyMarks(database)

    # --- note ---------------------------------------------------------------------------------------------------------

    async def record(self, transaction: Transaction, consumer: str, envelope: Envelope) -> Noted:
        row = _row(consumer, envelope)
        return await in_transaction(transaction, lambda connection: self._record(connection, row))

    async def record_all(
        self, transaction: Transaction, consumer: str, envelopes: Sequence[Envelope]
    ) -> Sequence[Noted]:
        rows = [_row(consumer, envelope) for envelope in envelopes]
        if not rows:
            return []
        record = self._record_arrays if self._database.dialect == "postgresql" else self._record_many
        return await in_transaction(transaction, lambda connection: record(connection, rows))

    def _record(self, connection: Connection, row: Row) -> Noted:
        if self._database.dialect == "mysql":
            if self._is_held(connection, row):
                return self._why_not(connection, row)
            return Noted.NEW if self._is_recorded(connection, row) else Noted.HAD
        return Noted.NEW if self._is_recorded(connection, row) else self._why_not(connection, row)

    def _is_recorded(self, connection: Connection, row: Row) -> bool:
        return _is_written(lambda: self._queries.record.write(connection, [row]))

    def _is_held(self, connection: Connection, row: Row) -> bool:
        return row["key"] is not None and connection.execute(self._queries.held, row).first() is not None

    def _why_not(self, connection: Connection, row: Row) -> Noted:
        return Noted.HELD if connection.execute(self._queries.had, row).first() is None else Noted.HAD

    def _record_arrays(self, connection: Connection, rows: Sequence[Row]) -> list[Noted]:
        """PostgreSQL: one statement where all are new."""
        values = {
            "consumer": rows[0]["consumer"],
            "sources": [row["source"] for row in rows],
            "message_ids": [row["message_id"] for row in rows],
            "topics": [row["topic"] for row in rows],
            "keys": [row["key"] for row in rows],
        }
        new = {tuple(inserted) for inserted in connection.execute(self._queries.record_all, values)}
        if len(new) == len(rows):
            return [Noted.NEW] * len(rows)
        return _answers(rows, new, self._had_of(connection, rows))

    def _record_many(self, connection: Connection, rows: Sequence[Row]) -> list[Noted]:
        """Look first, then write the new ones; should a copy get in between, go one by one from there."""
        had, held = self._had_of(connection, rows), self._held_of(connection, rows)
        fresh = {_message(row): row for row in rows if _message(row) not in had and _line(row)[1:] not in held}
        new: set[tuple[str, ...]] = set()
        now = connection.execute(self._queries.now).scalar_one()
        for some in _portions([fresh[message] for message in sorted(fresh)]):
            columns = [_inbox_columns(row) | {"handled_at": now} for row in some]
            if _is_written(partial(_insert, connection, self._queries.note_all, columns)):
                new.update(_message(row) for row in some)
            else:
                new.update(_message(row) for row in some if self._record(connection, row) is Noted.NEW)
        return _answers(rows, new, had | (fresh.keys() - new))

    def _had_of(self, connection: Connection, rows: Sequence[Row]) -> set[tuple[str, ...]]:
        had: set[tuple[str, ...]] = set()
        for some in _portions(rows):
            values = {"consumer": rows[0]["consumer"], "messages": [_message(row) for row in some]}
            had.update(tuple(found) for found in connection.execute(self._queries.had_of_all, values))
        return had

    def _held_of(self, connection: Connection, rows: Sequence[Row]) -> set[tuple[str, ...]]:
        keys = sorted({_line(row)[1:] for row in rows if row["key"] is not None})
        held: set[tuple[str, ...]] = set()
        for some in _portions(keys):
            values = {"consumer": rows[0]["consumer"], "keys": some}
            held.update(tuple(found) for found in connection.execute(self._queries.held_of_all, values))
        return held

    # --- park ---------------------------------------------------------------------------------------------------------

    async def park(self, parked: ParkedMessage) -> bool:
        row = _parked_row(parked)

        async def work(connection: AsyncConnection) -> bool:
            if row["key"] is not None:
                await connection.execute(self._queries.hold, _hold_columns(row))
            new = await self._note(connection, row)
            if not new and (await connection.execute(self._queries.parked_as, row)).first() is None:
                await connection.rollback()
                return False
            await connection.execute(self._queries.park, row)
            return True

        return await self._database.write(work)

    async def hold_back(self, parked: ParkedMessage) -> bool:
        row = _parked_row(parked)

        async def work(connection: AsyncConnection) -> bool:
            held = await connection.execute(self._queries.lock_hold, _its(_hold_columns(row)))
            if not held.rowcount or not await self._note(connection, row):
                return False
            await connection.execute(self._queries.keep_behind, row)
            return True

        return row["key"] is not None and await self._database.write(work)

    async def _note(self, connection: AsyncConnection, row: Row) -> bool:
        columns = _inbox_columns(row)
        return await connection.run_sync(lambda each: _is_written(partial(_insert, each, self._queries.note, columns)))

    # --- retry --------------------------------------------------------------------------------------------------------

    async def unpark(self, transaction: Transaction, parked_id: int) -> bool:
        def work(connection: Connection) -> bool:
            line = connection.execute(self._queries.line_of, {"parked_id": parked_id}).first()
            if line is None:
                return False
            if line.key is not None:
                connection.execute(self._queries.lock_hold, _its(_line_of(line)))
            if not connection.execute(self._queries.take_out, {"parked_id": parked_id}).rowcount:
                return False
            if line.key is not None:
                self._pass_on(connection, _line_of(line), parked_id)
            return True

        return await in_transaction(transaction, work)

    def _pass_on(self, connection: Connection, line: Row, parked_id: int) -> None:
        """Ask for the one behind what was the first of its key; behind the last one the key is free."""
        first = connection.execute(self._queries.first_of_line, line).scalar()
        if first is None:
            connection.execute(self._queries.release, line)
        elif first > parked_id:
            connection.execute(self._queries.ask_for_next, {"next_id": first})

    async def retries(self, consumers: Collection[str], limit: int) -> Sequence[ParkedMessage]:
        if not consumers:
            return []
        values = {"consumers": [fitted(consumer) for consumer in consumers], "limit": limit}

        async def work(connection: AsyncConnection) -> list[ParkedMessage]:
            return [_parked(row) for row in await connection.execute(self._queries.retries, values)]

        return await self._database.read(work)

    # --- marks --------------------------------------------------------------------------------------------------------

    async def mark(self, group: str, owner: str, marks: Collection[Mark]) -> None:
        await self._marks.mark(group, owner, marks)

    async def take_marks(self, group: str, owner: str, partitions: Collection[tuple[str, int]]) -> Sequence[Mark]:
        return await self._marks.take_marks(group, owner, partitions)

    async def unmark(self, group: str, owner: str, partitions: Collection[tuple[str, int]]) -> None:
        await self._marks.unmark(group, owner, partitions)

    # --- operators ----------------------------------------------------------------------------------------------------

    async def find(self, wanted: InboxFilter) -> Sequence[ParkedMessage]:
        query = self._narrowed(self._queries.parked, wanted)
        values = {} if wanted.older_than is None else {"seconds": -wanted.older_than.total_seconds()}

        async def work(connection: AsyncConnection) -> list[ParkedMessage]:
            return [_parked(row) for row in await connection.execute(query, values)]

        return await self._database.read(work)

    def _narrowed(self, query: Select[Any], wanted: InboxFilter) -> Select[Any]:
        parked = self._database.tables.inbox_parked.c
        query = query.where(parked.id > wanted.after).limit(wanted.limit)
        if wanted.ids:
            query = query.where(parked.id.in_(list(wanted.ids)))
        for column, value in (
            (parked.consumer, wanted.consumer),
            (parked.topic, wanted.topic),
            (parked.key, wanted.key),
        ):
            if value is not None:
                query = query.where(column == fitted(value))
        if wanted.error is not None:
            # Not LIKE, for which SQLite takes upper and lower case for the same.
            place = func.strpos if self._database.dialect == "postgresql" else func.instr
            query = query.where(place(parked.error, stored_text(wanted.error)) > 0)
        if wanted.older_than is not None:
            query = query.where(parked.parked_at <= DatabaseLater("seconds"))
        return query if wanted.held is None else query.where(parked.held == int(wanted.held))

    async def parked_count(self) -> int:
        async def work(connection: AsyncConnection) -> int:
            return await connection.scalar(self._queries.count) or 0

        return await self._database.read(work)

    async def retry(self, ids: Collection[int], *, who: str) -> int:
        async def work(connection: AsyncConnection, some: Sequence[int]) -> int:
            there = await self._locked(connection, self._queries.unasked_lines, self._queries.lock_unasked, some)
            if there:
                await connection.execute(self._queries.ask, {"ids": [row.id for row in there]})
                await self._log(connection, "retry", there, who)
            return len(there)

        return await self._in_portions(ids, work)

    async def discard(self, ids: Collection[int], *, who: str) -> int:
        async def work(connection: AsyncConnection, some: Sequence[int]) -> int:
            there = await self._locked(connection, self._queries.lines, self._queries.lock, some)
            if there:
                await connection.execute(self._queries.delete, {"ids": [row.id for row in there]})
                await connection.run_sync(lambda each: self._pass_on_all(each, there))
                await self._log(connection, "discard", there, who)
            return len(there)

        return await self._in_portions(ids, work)

    async def _in_portions(self, ids: Collection[int], work: Callable[..., Awaitable[int]]) -> int:
        """Each portion in a transaction of its own: what was done stays done, and doing it again does no harm."""
        count = 0
        for some in _portions(sorted(set(ids))):
            count += await self._database.write(partial(work, some=some))
        return count

    async def _locked(
        self, connection: AsyncConnection, look: Executable, lock: Executable, ids: Sequence[int]
    ) -> Sequence[Any]:
        """Those of the messages that are there, locked, and before them the holds of their keys."""
        seen = (await connection.execute(look, {"ids": ids})).all()
        lines = sorted({(row.consumer, row.topic, row.key) for row in seen if row.key is not None})
        if lines:
            await connection.execute(self._queries.lock_holds, {"lines": lines})
        return (await connection.execute(lock, {"ids": [row.id for row in seen]})).all() if seen else []

    def _pass_on_all(self, connection: Connection, discarded: Iterable[Any]) -> None:
        """As for one; of each key what was given up first counts, since they come in the order of their ids."""
        firsts: dict[tuple[str, str, str], Any] = {}
        for row in discarded:
            if row.key is not None:
                firsts.setdefault((row.consumer, row.topic, row.key), row)
        for row in firsts.values():
            self._pass_on(connection, _line_of(row), row.id)

    async def _log(self, connection: AsyncConnection, action: str, rows: Sequence[Any], who: str) -> None:
        done = [{"who": fitted(who), "action": action, "kind": "inbox", "record_id": row.id} for row in rows]
        await connection.execute(self._queries.note_action, done)


def _row(consumer: str, envelope: Envelope) -> Row:
    """What tells a message, and the line in which it stands, apart from others."""
    return {
        "consumer": fitted(consumer),
        "source": fitted(envelope.source),
        "message_id": fitted(envelope.id),
        "topic": fitted(envelope.topic),
        "key": None if envelope.key is None else fitted(envelope.key),
    }


def _parked_row(parked: ParkedMessage) -> Row:
    row = parked_row(parked.consumer, parked.envelope)
    return row | {"error": stored_text(parked.error), "attempts": parked.attempts, "parked_at": parked.parked_at}


def _inbox_columns(row: Row) -> Row:
    return {name: row[name] for name in ("consumer", "source", "message_id")}


def _hold_columns(row: Row) -> Row:
    return {name: row[name] for name in ("consumer", "topic", "key")}


def _line_of(found: Any) -> Row:
    return {"consumer": found.consumer, "topic": found.topic, "key": found.key}


def _its(columns: Row) -> Row:
    return {f"its_{name}": value for name, value in columns.items()}


def _message(row: Row) -> tuple[str, ...]:
    return row["source"], row["message_id"]


def _line(row: Row) -> tuple[str, ...]:
    return row["consumer"], row["topic"], row["key"]


def _is_written(write: Callable[[], int]) -> bool:
    """A duplicate undoes the statement only, on MySQL as well: the transaction goes on."""
    try:
        return write() != 0
    except IntegrityError as error:
        if code_of(error) not in _DUPLICATE:
            raise
        return False


def _insert(
    connection: Connection, insert: Executable, rows: Mapping[str, object] | Sequence[Mapping[str, object]]
) -> int:
    return connection.execute(insert, rows).rowcount


def _answers(rows: Sequence[Row], new: Collection[tuple[str, ...]], had: Collection[tuple[str, ...]]) -> list[Noted]:
    """One answer for each row; what comes twice is new once."""
    answered: set[tuple[str, ...]] = set()
    answers: list[Noted] = []
    for row in rows:
        message = _message(row)
        if message in new and message not in answered:
            answers.append(Noted.NEW)
        else:
            answers.append(Noted.HAD if message in new or message in had else Noted.HELD)
        answered.add(message)
    return answers


def _portions(things: Sequence[Any]) -> Iterable[Sequence[Any]]:
    return (things[start : start + _AT_ONCE] for start in range(0, len(things), _AT_ONCE))


def _parked(row: Any) -> ParkedMessage:
    return ParkedMessage(
        id=row.id,
        consumer=row.consumer,
        envelope=parked_envelope(row),
        error=row.error,
        attempts=row.attempts,
        parked_at=row.parked_at,
        retry_requested=bool(row.retry_requested),
        held=bool(row.held),
        retries=row.retries,
    )
