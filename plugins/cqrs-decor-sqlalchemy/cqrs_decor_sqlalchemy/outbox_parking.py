"""Records that an operator has to decide about, and the healthy ones behind them.

A parked record and the later ones of its key stand in a table of their own, out of the way of the claim, each under
the id that it had. A hold keeps the key back: holds are read and changed only while the row of their lane is locked, so
that what is put behind a parked record cannot miss the operator's decision about it.
"""

from collections.abc import Collection, Sequence

from sqlalchemy import (
    Executable,
    Integer,
    SmallInteger,
    Text,
    and_,
    bindparam,
    delete,
    func,
    insert,
    literal,
    null,
    select,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from cqrs_decor.outbox import FailedRecord
from cqrs_decor_sqlalchemy.columns import DatabaseNow, among, delete_among
from cqrs_decor_sqlalchemy.database import Database
from cqrs_decor_sqlalchemy.outbox_lanes import OutboxLanes
from cqrs_decor_sqlalchemy.records import stored_text
from cqrs_decor_sqlalchemy.tables import RECORD_COLUMNS, Tables

_DEPTH = 5_000
"""How many records of a lane are looked at, from its beginning, for those that stand behind a parked one: what is
further behind does not hinder the claim yet."""


class OutboxParking:
    """Moves records between the tables `outbox` and `outbox_parked`."""

    def __init__(self, database: Database, lanes: OutboxLanes) -> None:
        self._database = database
        self._lanes = lanes
        self._queries = _Queries(database.tables, database.dialect)

    async def park(self, connection: AsyncConnection, failed: Sequence[FailedRecord]) -> None:
        """Park records that are in the outbox, and those behind them. Their lanes are locked."""
        parked = [failure.record.id for failure in failed]
        await connection.execute(self._queries.park, [_parked(failure) for failure in failed])
        await connection.execute(self._queries.delete_records, {"ids": parked})
        keyed = [failure.record for failure in failed if failure.record.envelope.key is not None]
        if keyed:
            await connection.execute(self._queries.hold, {"ids": [record.id for record in keyed]})
            await self.sweep(connection, {record.lane for record in keyed})

    async def sweep(self, connection: AsyncConnection, lanes: Collection[int]) -> None:
        """Put the later records of parked keys behind them: those that came since. The lanes are locked."""
        held = await connection.scalars(self._queries.lanes_with_parked, {"lanes": sorted(lanes)})
        for lane in held.all():
            later = (await connection.scalars(self._queries.later, {"number": lane, "depth": _DEPTH})).all()
            if later:
                await connection.execute(self._queries.put_behind, {"ids": later})
                await connection.execute(self._queries.delete_records, {"ids": later})
                await connection.execute(self._queries.delete_holds, {"ids": later})

    async def retry(self, ids: Collection[int], who: str) -> int:
        async def work(connection: AsyncConnection) -> int:
            parked = await self._locked(connection, self._queries.parked, ids)
            if parked:
                await self._put_back(connection, [*parked, *await self._behind(connection, parked)])
                await connection.execute(self._queries.delete_holds, {"ids": parked})
                await self._note(connection, "retry", parked, who)
            return len(parked)

        return await self._database.write(work) if ids else 0

    async def discard(self, ids: Collection[int], who: str) -> int:
        async def work(connection: AsyncConnection) -> int:
            gone = await self._locked(connection, self._queries.parked_or_failed, ids)
            if gone:
                await connection.execute(self._queries.delete_parked, {"ids": gone})
                await connection.execute(self._queries.delete_records, {"ids": gone})
                await self._put_back(connection, await self._behind(connection, gone))
                await connection.execute(self._queries.delete_holds, {"ids": gone})
                await self._note(connection, "discard", gone, who)
            return len(gone)

        return await self._database.write(work) if ids else 0

    async def _locked(self, connection: AsyncConnection, query: Executable, ids: Collection[int]) -> list[int]:
        """Those of the records that are there, with their lanes locked, so that no relay settles one meanwhile."""
        values = {"ids": list(ids)}
        lanes = {row.lane for row in await connection.execute(query, values)}
        if not lanes:
            return []
        await self._lanes.lock_numbers(connection, lanes)
        return [row.id for row in await connection.execute(query, values)]

    async def _behind(self, connection: AsyncConnection, parked: Sequence[int]) -> list[int]:
        return list(await connection.scalars(self._queries.behind, {"ids": parked}))

    async def _put_back(self, connection: AsyncConnection, ids: Sequence[int]) -> None:
        """Each in its old place, which is its id."""
        if not ids:
            return
        rows = await connection.execute(self._queries.firsts, {"ids": ids})
        await self._lanes.lower(connection, {row[0]: row[1] for row in rows})
        await connection.execute(self._queries.put_back, {"ids": ids})
        await connection.execute(self._queries.delete_parked, {"ids": ids})

    async def _note(self, connection: AsyncConnection, action: str, ids: Sequence[int], who: str) -> None:
        rows = [{"who": who, "action": action, "kind": "outbox", "record_id": record_id} for record_id in ids]
        await connection.execute(self._queries.note_action, rows)


class _Queries:
    def __init__(self, tables: Tables, dialect: str) -> None:
        outbox, lanes, holds, parked = tables.outbox.c, tables.lanes.c, tables.holds.c, tables.parked.c
        kept = ["id", *RECORD_COLUMNS, "written_at"]

        # --- to park: by primary key

        self.park = insert(tables.parked).from_select(
            [*kept, "attempts", "error", "parked_at"],
            select(
                *(outbox[name] for name in kept),
                outbox.attempts + 1,
                bindparam("reason", type_=Text()),
                DatabaseNow(),
            ).where(outbox.id == bindparam("failed_id")),
        )
        self.hold = insert(tables.holds).from_select(
            ["record_id", "lane", "topic", "key"],
            select(parked.id, parked.lane, parked.topic, parked.key).where(among(parked.id, "ids", dialect)),
        )
        self.delete_records = delete_among(tables.outbox, dialect)

        # --- behind them: index (lane, topic, key, record_id) of the holds, (lane, id) of the outbox

        self.lanes_with_parked = (
            select(holds.lane)
            .distinct()
            .where(among(holds.lane, "lanes", dialect, SmallInteger()), holds.due_at.is_(None))
        )
        lane = bindparam("number", type_=SmallInteger())
        bound = select(lanes.low_id).where(lanes.lane == lane).scalar_subquery()
        head = (
            select(outbox.id, outbox.topic, outbox.key)
            .where(outbox.lane == lane, outbox.id >= bound)
            .order_by(outbox.id)
            .limit(bindparam("depth", type_=Integer()))
            .subquery("head")
        )
        self.later = (
            select(head.c.id)
            .join(
                tables.holds,
                and_(
                    holds.lane == lane,
                    holds.topic == head.c.topic,
                    holds.key == head.c.key,
                    holds.record_id < head.c.id,
                    holds.due_at.is_(None),
                ),
            )
            .distinct()
        )
        nearest = (
            select(func.max(holds.record_id))
            .where(
                holds.lane == outbox.lane,
                holds.topic == outbox.topic,
                holds.key == outbox.key,
                holds.record_id < outbox.id,
                holds.due_at.is_(None),
            )
            .scalar_subquery()
        )
        self.put_behind = insert(tables.parked).from_select(
            [*kept, "attempts", "error", "parked_at", "behind"],
            select(*(outbox[name] for name in kept), literal(0), null(), DatabaseNow(), nearest).where(
                among(outbox.id, "ids", dialect)
            ),
        )

        # --- what operators decide: primary keys, and index (behind, id) of the parked ones

        decided = [among(parked.id, "ids", dialect), parked.behind.is_(None)]
        self.parked = select(parked.id, parked.lane).where(*decided)
        self.parked_or_failed = self.parked.union_all(
            select(outbox.id, outbox.lane).where(among(outbox.id, "ids", dialect), outbox.attempts > 0)
        )
        self.behind = select(parked.id).where(among(parked.behind, "ids", dialect))
        self.firsts = (
            select(parked.lane, func.min(parked.id)).where(among(parked.id, "ids", dialect)).group_by(parked.lane)
        )
        self.put_back = insert(tables.outbox).from_select(
            [*kept, "attempts"],
            select(*(parked[name] for name in kept), literal(0)).where(among(parked.id, "ids", dialect)),
        )
        self.delete_parked = delete(tables.parked).where(among(parked.id, "ids", dialect))
        self.delete_holds = delete(tables.holds).where(among(holds.record_id, "ids", dialect))
        self.note_action = insert(tables.operator_log).values(done_at=DatabaseNow())


def _parked(failure: FailedRecord) -> dict[str, object]:
    return {"failed_id": failure.record.id, "reason": stored_text(failure.error)}
