"""What operators look for in an outbox and its history, and what they send once more."""

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import Select, Table, case, exists, false, func, insert, literal, null, select
from sqlalchemy.ext.asyncio import AsyncConnection

from cqrs_decor.outbox import OutboxFilter, StoredRecord
from cqrs_decor_sqlalchemy.columns import DatabaseLater, DatabaseNow, among
from cqrs_decor_sqlalchemy.database import Database
from cqrs_decor_sqlalchemy.records import envelope_of
from cqrs_decor_sqlalchemy.tables import RECORD_COLUMNS, Tables

PENDING, RESCHEDULED, HELD, PARKED, DELIVERED = "pending", "rescheduled", "held", "parked", "delivered"


class OutboxOperators:
    """Reads the tables `outbox`, `outbox_parked` and `outbox_history`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._queries = _Queries(database.tables, database.dialect)

    async def find(self, wanted: OutboxFilter) -> Sequence[StoredRecord]:
        queries = self._queries.matching(wanted)

        async def work(connection: AsyncConnection) -> list[StoredRecord]:
            found = [row for query in queries for row in await connection.execute(query)]
            rows = sorted(found, key=lambda row: row.id)[: wanted.limit]
            retries = await self._retries(connection, [row.id for row in rows if row.state != DELIVERED])
            return [_stored(row, retries.get(row.id, 0)) for row in rows]

        return await self._database.read(work)

    async def _retries(self, connection: AsyncConnection, ids: Collection[int]) -> dict[int, int]:
        if not ids:
            return {}
        return {row[0]: row[1] for row in await connection.execute(self._queries.retries, {"ids": list(ids)})}

    async def replay(self, ids: Collection[int], *, who: str) -> int:
        async def work(connection: AsyncConnection) -> int:
            kept = (await connection.scalars(self._queries.kept, {"ids": list(ids)})).all()
            if kept:
                await connection.execute(self._queries.write_again, {"ids": kept})
                rows = [{"who": who, "action": "replay", "kind": "outbox", "record_id": each} for each in kept]
                await connection.execute(self._queries.note_action, rows)
            return len(kept)

        return await self._database.write(work) if ids else 0


class _Queries:
    def __init__(self, tables: Tables, dialect: str) -> None:
        outbox, holds, parked, history = tables.outbox.c, tables.holds.c, tables.parked.c, tables.history.c
        log = tables.operator_log.c
        self._tables = tables
        self._part_of = func.strpos if dialect == "postgresql" else func.instr

        # Index (lane, topic, key, record_id) of the holds.
        behind = exists().where(
            holds.lane == outbox.lane,
            holds.topic == outbox.topic,
            holds.key == outbox.key,
            holds.record_id < outbox.id,
        )
        self._outbox_state = case((outbox.attempts > 0, RESCHEDULED), (behind, HELD), else_=PENDING)
        self._parked_state = case((parked.behind.is_(None), PARKED), else_=HELD)
        self._stored = select(tables.outbox, self._outbox_state.label("state"))
        self._stored_parked = select(tables.parked, self._parked_state.label("state"), null().label("due_at"))
        self._delivered = select(
            tables.history,
            literal(DELIVERED).label("state"),
            literal(0).label("attempts"),
            null().label("error"),
            null().label("due_at"),
        )

        # Index (record_id) of the log of what operators did.
        self.retries = (
            select(log.record_id, func.count())
            .where(log.kind == "outbox", log.action == "retry", among(log.record_id, "ids", dialect))
            .group_by(log.record_id)
        )
        # Primary key. Ids are given in the order of the rows: each record comes after those that it came after before.
        self.kept = select(history.id).where(among(history.id, "ids", dialect)).order_by(history.id).with_for_update()
        self.write_again = insert(tables.outbox).from_select(
            [*RECORD_COLUMNS, "written_at"],
            select(*(history[name] for name in RECORD_COLUMNS), DatabaseNow())
            .where(among(history.id, "ids", dialect))
            .order_by(history.id),
        )
        self.note_action = insert(tables.operator_log).values(done_at=DatabaseNow())

    def matching(self, wanted: OutboxFilter) -> list[Select[Any]]:
        """One for each table that may have such records."""
        tables, state = self._tables, wanted.state
        if state == DELIVERED:
            return [self._narrowed(self._delivered, tables.history, wanted)]
        queries: list[Select[Any]] = []
        if state != PARKED:
            query = self._narrowed(self._stored, tables.outbox, wanted)
            queries.append(query if state is None else query.where(self._outbox_state == state))
        if state in (None, PARKED, HELD):
            query = self._narrowed(self._stored_parked, tables.parked, wanted)
            queries.append(query if state is None else query.where(self._parked_state == state))
        return queries

    def _narrowed(self, query: Select[Any], table: Table, wanted: OutboxFilter) -> Select[Any]:
        column = table.c
        if wanted.ids:
            query = query.where(column.id.in_(list(wanted.ids)))
        if wanted.after:
            query = query.where(column.id > wanted.after)
        if wanted.topic is not None:
            query = query.where(column.topic == wanted.topic)
        if wanted.key is not None:
            query = query.where(column.key == wanted.key)
        if wanted.error is not None:
            query = query.where(self._part_of(column.error, wanted.error) > 0 if "error" in column else false())
        if wanted.older_than is not None:
            moment = select(DatabaseLater("seconds")).scalar_subquery()
            query = query.where(column.written_at < moment).params(seconds=-wanted.older_than.total_seconds())
        return query.order_by(column.id).limit(wanted.limit)


def _stored(row: Any, retries: int) -> StoredRecord:
    return StoredRecord(
        id=row.id,
        lane=row.lane,
        envelope=envelope_of(row),
        state=row.state,
        attempts=row.attempts,
        error=row.error,
        written_at=row.written_at,
        due_at=row.due_at,
        retries=retries,
    )
