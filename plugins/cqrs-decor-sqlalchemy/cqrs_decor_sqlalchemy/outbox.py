"""The outbox of one database."""

from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import Executable
from sqlalchemy.ext.asyncio import AsyncConnection

from cqrs_decor.lanes import LANES, HeldLane, Renewal, TakenLane
from cqrs_decor.outbox import (
    Backlog,
    ClaimedRecord,
    FailedRecord,
    Holders,
    OutboxFilter,
    Settlement,
    StoredRecord,
    WakeUps,
)
from cqrs_decor_sqlalchemy.database import Database
from cqrs_decor_sqlalchemy.lower_bound import LowerBound
from cqrs_decor_sqlalchemy.merged_claim import MergedClaim
from cqrs_decor_sqlalchemy.outbox_lanes import OutboxLanes
from cqrs_decor_sqlalchemy.outbox_operators import OutboxOperators
from cqrs_decor_sqlalchemy.outbox_parking import OutboxParking
from cqrs_decor_sqlalchemy.outbox_queries import OutboxQueries
from cqrs_decor_sqlalchemy.outbox_upkeep import OutboxUpkeep
from cqrs_decor_sqlalchemy.records import claimed_records, stored_text

COUNTED = 100_000
"""How far the backlog is counted; beyond that it is estimated by the range of the ids, gaps included."""


class SqlAlchemyOutbox:
    """Outbox records in the tables `outbox`, `outbox_lane`, `outbox_hold`, `outbox_parked` and `outbox_history`.

    Attributes:
        upkeep: Runs by itself while there are records.
    """

    lane_count = LANES
    wake_ups: WakeUps | None = None

    def __init__(self, database: Database) -> None:
        dialect = database.engine.dialect
        self._database = database
        self._queries = OutboxQueries(database.tables, database.dialect)
        self._merged = MergedClaim(database.tables, dialect.identifier_preparer.format_table)
        bound = LowerBound(database.tables, dialect)
        self._lanes = OutboxLanes(database, bound)
        self._parking = OutboxParking(database, self._lanes)
        self.upkeep = OutboxUpkeep(database, self._lanes, bound, self._parking)
        self._operators = OutboxOperators(database)

    # --- lanes

    async def acquire(self, owner: str, lease: timedelta, limit: int, *, in_hand: int) -> Sequence[TakenLane]:
        return await self._lanes.acquire(owner, lease, limit, in_hand)

    async def renew(self, owner: str, lanes: Sequence[HeldLane], lease: timedelta) -> Renewal:
        renewal = await self._lanes.renew(owner, lanes, lease)
        if renewal.waiting:
            self.upkeep.note()
        if len(renewal.held) == len(lanes):
            await self.upkeep.run_if_due(lanes)
        return renewal

    async def release(self, owner: str, lanes: Sequence[HeldLane], *, leaving: bool = False) -> None:
        await self._lanes.release(owner, lanes, leaving=leaving)

    async def holders(self) -> Holders:
        return await self._lanes.holders()

    # --- the way of a record

    async def claim(
        self, lanes: Sequence[HeldLane], limit: int, *, in_flight: Collection[int] = ()
    ) -> Sequence[ClaimedRecord]:
        numbers = [lane.number for lane in lanes]

        async def work(connection: AsyncConnection) -> Sequence[Any]:
            rows = (await connection.execute(self._queries.look_at_lanes, {"lanes": numbers})).all()
            self._lanes.check_fences(lanes, rows)
            claim, values = self._claim(numbers, in_flight)
            return (await connection.execute(claim, {**values, "limit": limit, "now": rows[0].now})).all()

        if not lanes:
            return []
        return claimed_records(await self._database.read(work))

    async def step(self, lanes: Sequence[HeldLane], *, until: int) -> Sequence[ClaimedRecord]:
        async def work(connection: AsyncConnection) -> Sequence[ClaimedRecord]:
            rows = await self._lanes.lock(connection, lanes)
            now = (await connection.execute(self._queries.prepare_step)).one()[0]
            ids = await self._next_of_each(connection, rows, until, now)
            firsts = (await connection.execute(self._queries.records, {"ids": ids})).all() if ids else ()
            crashes = await self._lanes.mark(connection, rows, {row.lane: row.id for row in firsts})
            return claimed_records(firsts, [crashes[row.lane] for row in firsts])

        return await self._database.write(work) if lanes else []

    async def _next_of_each(self, connection: AsyncConnection, lanes: Sequence[Any], until: int, now: Any) -> list[int]:
        """What stands accused where it is due, else what is first; the lanes are locked."""
        marked = [lane.marked for lane in lanes if lane.marked is not None and lane.marked <= until]
        accused = (await connection.execute(self._queries.accused, {"ids": marked, "now": now})).all() if marked else ()
        decided = {row.lane for row in accused}
        others = [lane.lane for lane in lanes if lane.lane not in decided]
        values = {"lanes": others, "until": until, "now": now}
        firsts = await connection.scalars(self._queries.firsts, values) if others else ()
        return [row.id for row in accused] + [first for first in firsts if first is not None]

    async def unmark(self, lanes: Sequence[HeldLane]) -> None:
        await self._lanes.unmark(lanes)

    async def settle(self, settlement: Settlement) -> None:
        async def work(connection: AsyncConnection) -> None:
            await self._lanes.lock(connection, settlement.lanes)
            if settlement.delivered:
                await self._remove(connection, settlement.delivered, keep=settlement.keep)
            if settlement.failed:
                await self._put_off(connection, settlement.failed)
            if settlement.stepped:
                await self._lanes.acquit(connection, _lanes_of(settlement))

        self.upkeep.note(len(settlement.delivered))
        await self.upkeep.run_if_due(settlement.lanes)  # before it, so that a failure of it leaves nothing half done
        await self._database.write(work)

    async def backlog(self) -> Backlog:
        async def work(connection: AsyncConnection) -> Backlog:
            pending = await connection.scalar(self._queries.count_pending, {"limit": COUNTED + 1}) or 0
            if pending > COUNTED:
                pending = max(pending, await connection.scalar(self._queries.span) or 0)
            first = await connection.scalar(self._queries.oldest)
            behind, first_behind, now = (await connection.execute(self._queries.count_behind)).one()
            parked = await connection.scalar(self._queries.count_parked) or 0
            ages = [now - written_at for written_at in (first, first_behind) if written_at is not None]
            oldest = max(timedelta(0), *ages) if ages else None
            return Backlog(pending=pending + behind, parked=parked, oldest=oldest)

        return await self._database.read(work)

    # --- operators

    async def find(self, wanted: OutboxFilter) -> Sequence[StoredRecord]:
        return await self._operators.find(wanted)

    async def retry(self, ids: Collection[int], *, who: str) -> int:
        return await self._parking.retry(ids, who)

    async def discard(self, ids: Collection[int], *, who: str) -> int:
        return await self._parking.discard(ids, who)

    async def replay(self, ids: Collection[int], *, who: str) -> int:
        return await self._operators.replay(ids, who=who)

    def _claim(self, lanes: Sequence[int], in_flight: Collection[int]) -> tuple[Executable, dict[str, Any]]:
        """The statement of this database, and what it needs besides limit and time."""
        beside = {"in_flight": list(in_flight)} if in_flight else {}
        if self._database.dialect != "postgresql":
            return self._queries.claim_beside if in_flight else self._queries.claim, {"lanes": lanes, **beside}
        numbers = {} if len(lanes) == LANES else {f"lane_{n}": lane for n, lane in enumerate(lanes)}
        return self._merged.of(len(lanes), beside=bool(in_flight)), {**numbers, **beside}

    async def _remove(self, connection: AsyncConnection, delivered: Sequence[ClaimedRecord], *, keep: bool) -> None:
        ids = [record.id for record in delivered]
        if keep:
            await connection.execute(self._queries.keep, {"ids": ids})
        gone = await connection.execute(self._queries.delete_records, {"ids": ids})
        if gone.rowcount < len(ids):
            # Some were put behind a parked one of their key while they were on their way.
            if keep:
                await connection.execute(self._queries.keep_behind, {"ids": ids})
            await connection.execute(self._queries.delete_behind, {"ids": ids})
        held = [record.id for record in delivered if record.attempts and record.envelope.key is not None]
        if held:
            await connection.execute(self._queries.delete_holds, {"ids": held})

    async def _put_off(self, connection: AsyncConnection, failed: Sequence[FailedRecord]) -> None:
        """Those that an operator discarded meanwhile, or that were put behind a parked one, are left alone; those whose
        failure is on record already, from a commit whose answer was lost, as well.
        """
        rows = await connection.execute(self._queries.existing, {"ids": [failure.record.id for failure in failed]})
        attempts = {row.id: row.attempts for row in rows}
        new = [failure for failure in failed if attempts.get(failure.record.id) == failure.record.attempts]
        if not new:
            return
        await connection.execute(self._queries.delete_holds, {"ids": [failure.record.id for failure in new]})
        later = [failure for failure in new if failure.delay is not None]
        never = [failure for failure in new if failure.delay is None]
        if later:
            await connection.execute(self._queries.reschedule, [_rescheduled(failure) for failure in later])
            await connection.execute(self._queries.hold_rescheduled, {"ids": [failure.record.id for failure in later]})
        if never:
            await self._parking.park(connection, never)


def _lanes_of(settlement: Settlement) -> Sequence[int]:
    failed = [failure.record.lane for failure in settlement.failed]
    return sorted({*(record.lane for record in settlement.delivered), *failed})


def _rescheduled(failure: FailedRecord) -> dict[str, object]:
    delay = failure.delay or timedelta(0)
    return {"failed_id": failure.record.id, "reason": stored_text(failure.error), "seconds": delay.total_seconds()}
