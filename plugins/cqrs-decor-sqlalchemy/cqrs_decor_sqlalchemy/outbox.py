"""The outbox of one database."""

from collections.abc import Collection, Iterable, Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import Executable, Update
from sqlalchemy.ext.asyncio import AsyncConnection

from cqrs_decor.errors import LaneLostError
from cqrs_decor.lanes import LANES, HeldLane
from cqrs_decor.outbox import Backlog, ClaimedRecord, FailedRecord, OutboxFilter, Settlement, StoredRecord
from cqrs_decor_sqlalchemy.database import Database
from cqrs_decor_sqlalchemy.outbox_operators import OutboxOperators
from cqrs_decor_sqlalchemy.outbox_queries import OutboxQueries
from cqrs_decor_sqlalchemy.records import claimed_record, stored_text

COUNTED = 100_000
"""How far the backlog is counted; beyond that it is estimated by the range of the ids, gaps included."""


class SqlAlchemyOutbox:
    """Outbox records in the tables `outbox`, `outbox_lane`, `outbox_hold` and `outbox_parked`."""

    lane_count = LANES

    def __init__(self, database: Database) -> None:
        self._database = database
        self._queries = OutboxQueries(database.tables, database.dialect)
        self._operators = OutboxOperators(database)
        self._owners: dict[HeldLane, str] = {}

    async def acquire(self, owner: str, lease: timedelta, limit: int) -> Sequence[HeldLane]:
        async def work(connection: AsyncConnection) -> list[HeldLane]:
            free = (await connection.execute(self._queries.free_lanes, {"limit": limit})).all()
            if free:
                values = {"lanes": [lane for lane, _ in free], "new_owner": owner, "seconds": lease.total_seconds()}
                await connection.execute(self._queries.take_lanes, values)
            return [HeldLane(lane, fence + 1) for lane, fence in free]

        taken = await self._database.write(work)
        self._owners.update(dict.fromkeys(taken, owner))
        return taken

    async def renew(self, owner: str, lanes: Sequence[HeldLane], lease: timedelta) -> Sequence[HeldLane]:
        return await self._change_lanes(owner, lanes, self._queries.renew_lanes, {"seconds": lease.total_seconds()})

    async def release(self, owner: str, lanes: Sequence[HeldLane]) -> None:
        await self._change_lanes(owner, lanes, self._queries.free_lanes_again, {})
        for lane in lanes:
            self._owners.pop(lane, None)

    async def claim(
        self, lanes: Sequence[HeldLane], limit: int, *, in_flight: Collection[int] = ()
    ) -> Sequence[ClaimedRecord]:
        numbers = [lane.number for lane in lanes]

        async def work(connection: AsyncConnection) -> Sequence[Any]:
            self._check_fences(lanes, await connection.execute(self._queries.look_at_lanes, {"lanes": numbers}))
            values: dict[str, Any] = {"lanes": numbers, "limit": limit}
            if not in_flight:
                return (await connection.execute(self._queries.claim, values)).all()
            values["in_flight"] = list(in_flight)
            return (await connection.execute(self._queries.claim_beside, values)).all()

        if not lanes:
            return []
        return [claimed_record(row) for row in await self._database.read(work)]

    async def settle(self, settlement: Settlement) -> None:
        async def work(connection: AsyncConnection) -> None:
            await self._lock(connection, settlement.lanes)
            await self._remove(connection, settlement.delivered)
            if settlement.failed:
                await self._put_off(connection, settlement.failed)

        await self._database.write(work)

    async def backlog(self) -> Backlog:
        async def work(connection: AsyncConnection) -> Backlog:
            pending = await connection.scalar(self._queries.count_pending, {"limit": COUNTED + 1}) or 0
            if pending > COUNTED:
                pending = max(pending, await connection.scalar(self._queries.span) or 0)
            oldest = (await connection.execute(self._queries.oldest)).first()
            return Backlog(
                pending=pending,
                parked=await connection.scalar(self._queries.count_parked) or 0,
                oldest=None if oldest is None else max(oldest[1] - oldest[0], timedelta(0)),
            )

        return await self._database.read(work)

    async def find(self, wanted: OutboxFilter) -> Sequence[StoredRecord]:
        return await self._operators.find(wanted)

    async def retry(self, ids: Collection[int], *, who: str) -> int:
        async def work(connection: AsyncConnection) -> int:
            parked = await self._locked(connection, self._queries.parked_lanes, ids)
            if parked:
                await connection.execute(self._queries.put_back, {"ids": parked})
                await connection.execute(self._queries.delete_parked, {"ids": parked})
                await connection.execute(self._queries.delete_holds, {"ids": parked})
                await self._note(connection, "retry", parked, who)
            return len(parked)

        return await self._database.write(work)

    async def discard(self, ids: Collection[int], *, who: str) -> int:
        async def work(connection: AsyncConnection) -> int:
            parked = await self._locked(connection, self._queries.parked_lanes, ids)
            failed = await self._locked(connection, self._queries.failed_lanes, ids)
            if parked:
                await connection.execute(self._queries.delete_parked, {"ids": parked})
            if failed:
                await connection.execute(self._queries.delete_records, {"ids": failed})
            if parked or failed:
                await connection.execute(self._queries.delete_holds, {"ids": parked + failed})
                await self._note(connection, "discard", parked + failed, who)
            return len(parked) + len(failed)

        return await self._database.write(work)

    async def _change_lanes(
        self, owner: str, lanes: Sequence[HeldLane], change: Update, values: dict[str, object]
    ) -> list[HeldLane]:
        """Change the rows of those lanes that the owner still has under the same fence; returns them."""

        async def work(connection: AsyncConnection) -> list[HeldLane]:
            numbers = [lane.number for lane in lanes]
            rows = await connection.execute(self._queries.lock_lanes, {"lanes": numbers})
            there = {HeldLane(row.lane, row.fence) for row in rows if row.owner == owner}
            held = [lane for lane in lanes if lane in there]
            if held:
                await connection.execute(change, {"lanes": [lane.number for lane in held], **values})
            return held

        return await self._database.write(work) if lanes else []

    async def _lock(self, connection: AsyncConnection, lanes: Sequence[HeldLane]) -> None:
        numbers = [lane.number for lane in lanes]
        self._check_fences(lanes, await connection.execute(self._queries.lock_lanes, {"lanes": numbers}))

    def _check_fences(self, lanes: Sequence[HeldLane], rows: Iterable[Any]) -> None:
        fences = {row.lane: row.fence for row in rows}
        lost = [lane for lane in lanes if fences.get(lane.number) != lane.fence]
        if lost:
            owner = self._owners.get(lost[0], "(unknown)")
            raise LaneLostError(owner, [lane.number for lane in lost])

    async def _remove(self, connection: AsyncConnection, delivered: Sequence[ClaimedRecord]) -> None:
        if not delivered:
            return
        await connection.execute(self._queries.delete_records, {"ids": [record.id for record in delivered]})
        held = [record.id for record in delivered if record.attempts and record.envelope.key is not None]
        if held:
            await connection.execute(self._queries.delete_holds, {"ids": held})

    async def _put_off(self, connection: AsyncConnection, failed: Sequence[FailedRecord]) -> None:
        """Those that an operator discarded meanwhile are left alone."""
        ids = [failure.record.id for failure in failed]
        there = set((await connection.scalars(self._queries.existing, {"ids": ids})).all())
        await connection.execute(self._queries.delete_holds, {"ids": ids})
        later = [failure for failure in failed if failure.delay is not None and failure.record.id in there]
        never = [failure for failure in failed if failure.delay is None and failure.record.id in there]
        if later:
            await connection.execute(self._queries.reschedule, [_rescheduled(failure) for failure in later])
            await connection.execute(self._queries.hold_rescheduled, {"ids": [failure.record.id for failure in later]})
        if never:
            parked = [failure.record.id for failure in never]
            await connection.execute(self._queries.park, [_parked(failure) for failure in never])
            await connection.execute(self._queries.hold_parked, {"ids": parked})
            await connection.execute(self._queries.delete_records, {"ids": parked})

    async def _locked(self, connection: AsyncConnection, query: Executable, ids: Collection[int]) -> list[int]:
        """Those of the records that are there, with their lanes locked, so that no relay settles one meanwhile."""
        if not ids:
            return []
        rows = (await connection.execute(query, {"ids": list(ids)})).all()
        if not rows:
            return []
        await connection.execute(self._queries.lock_lanes, {"lanes": sorted({row.lane for row in rows})})
        return [row.id for row in await connection.execute(query, {"ids": list(ids)})]

    async def _note(self, connection: AsyncConnection, action: str, ids: Sequence[int], who: str) -> None:
        rows = [{"who": who, "action": action, "kind": "outbox", "record_id": record_id} for record_id in ids]
        await connection.execute(self._queries.note_action, rows)


def _rescheduled(failure: FailedRecord) -> dict[str, object]:
    delay = failure.delay or timedelta(0)
    return {"failed_id": failure.record.id, "reason": stored_text(failure.error), "seconds": delay.total_seconds()}


def _parked(failure: FailedRecord) -> dict[str, object]:
    return {"failed_id": failure.record.id, "reason": stored_text(failure.error)}
