"""What operators look for in an outbox."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Select, Table, case, exists, select
from sqlalchemy.ext.asyncio import AsyncConnection

from cqrs_decor.outbox import OutboxFilter, StoredRecord
from cqrs_decor_sqlalchemy.database import Database
from cqrs_decor_sqlalchemy.records import envelope_of
from cqrs_decor_sqlalchemy.tables import Tables

PENDING, RESCHEDULED, HELD, PARKED = "pending", "rescheduled", "held", "parked"


class OutboxOperators:
    """Finds records in the tables `outbox` and `outbox_parked`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._queries = _Queries(database.tables)

    async def find(self, wanted: OutboxFilter) -> Sequence[StoredRecord]:
        async def work(connection: AsyncConnection) -> list[StoredRecord]:
            found: list[StoredRecord] = []
            if wanted.state != PARKED:
                query = _narrowed(self._queries.stored, self._database.tables.outbox, wanted)
                if wanted.state is not None:
                    query = query.where(self._queries.state == wanted.state)
                found += [_stored(row, row.state, row.due_at) for row in await connection.execute(query)]
            if wanted.state in (None, PARKED):
                query = _narrowed(self._queries.stored_parked, self._database.tables.parked, wanted)
                found += [_stored(row, PARKED, None) for row in await connection.execute(query)]
            return sorted(found, key=lambda record: record.id)[: wanted.limit]

        return await self._database.read(work)


class _Queries:
    def __init__(self, tables: Tables) -> None:
        outbox, holds, parked = tables.outbox.c, tables.holds.c, tables.parked.c

        # Index (lane, topic, key, record_id) of the holds.
        behind = exists().where(
            holds.lane == outbox.lane,
            holds.topic == outbox.topic,
            holds.key == outbox.key,
            holds.record_id < outbox.id,
        )
        self.state = case((outbox.attempts > 0, RESCHEDULED), (behind, HELD), else_=PENDING)
        self.stored = select(tables.outbox, self.state.label("state")).order_by(outbox.id)
        self.stored_parked = select(tables.parked).order_by(parked.id)


def _narrowed(query: Select[Any], table: Table, wanted: OutboxFilter) -> Select[Any]:
    if wanted.ids:
        query = query.where(table.c.id.in_(list(wanted.ids)))
    if wanted.topic is not None:
        query = query.where(table.c.topic == wanted.topic)
    if wanted.key is not None:
        query = query.where(table.c.key == wanted.key)
    return query.limit(wanted.limit)


def _stored(row: Any, state: str, due_at: Any) -> StoredRecord:
    return StoredRecord(
        id=row.id,
        lane=row.lane,
        envelope=envelope_of(row),
        state=state,
        attempts=row.attempts,
        error=row.error,
        written_at=row.written_at,
        due_at=due_at,
    )
