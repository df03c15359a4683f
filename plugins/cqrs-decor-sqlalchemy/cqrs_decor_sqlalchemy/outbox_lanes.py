"""Who holds the lanes of an outbox, and what those who vanished had in hand."""

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from cqrs_decor.errors import LaneLostError
from cqrs_decor.lanes import HeldLane, Renewal, Suspicion, TakenLane
from cqrs_decor.outbox import Holders
from cqrs_decor_sqlalchemy.database import Database
from cqrs_decor_sqlalchemy.lane_queries import LaneQueries, renewal
from cqrs_decor_sqlalchemy.lower_bound import LowerBound
from cqrs_decor_sqlalchemy.wake_up_channel import channel_of, echo_of


class OutboxLanes:
    """The rows of `outbox_lane`, and those of `member` for the relays that share them."""

    def __init__(self, database: Database, bound: LowerBound) -> None:
        self._database = database
        self._queries = LaneQueries(database.tables, database.dialect)
        self._bound = bound
        self._owners: dict[HeldLane, str] = {}
        self._renewal = renewal(database.tables, database.engine.dialect.identifier_preparer.format_table)

    async def acquire(self, owner: str, lease: timedelta, limit: int, in_hand: int) -> Sequence[TakenLane]:
        async def work(connection: AsyncConnection) -> list[TakenLane]:
            free = (await connection.execute(self._queries.free, {"limit": limit})).all()
            if len(free) < limit:
                await self._database.end_frozen_sessions(connection)
            if not free:
                return []
            numbers = [row.lane for row in free]
            values = {"lanes": numbers, "new_owner": owner, "seconds": lease.total_seconds()}
            await connection.execute(self._queries.take, values)
            await connection.execute(self._queries.forget)
            await self._bound.mend(connection, numbers)
            suspicions = await self._suspicions(connection, free, in_hand)
            return [
                TakenLane(lane=HeldLane(row.lane, row.fence + 1), suspicion=suspicions.get(row.lane)) for row in free
            ]

        taken = await self._database.write(work)
        self._owners.update({each.lane: owner for each in taken})
        return taken

    async def renew(self, owner: str, lanes: Sequence[HeldLane], lease: timedelta) -> Renewal:
        async def work(connection: AsyncConnection) -> Renewal:
            held = await self._still_held(connection, owner, lanes)
            waiting = bool(held) and await self._extend(connection, [lane.number for lane in held], lease)
            await connection.execute(self._queries.take_part, {"member": owner, "seconds": lease.total_seconds()})
            relays = (await connection.scalars(self._queries.relays)).all()
            return Renewal(held=held, relays=len(relays), waiting=waiting)

        async def at_once(connection: AsyncConnection) -> Renewal:
            row = (await connection.execute(self._renewal, self._signs_of_life(owner, lanes, lease))).one()
            held = [lane for lane in lanes if lane.number in row.lanes]
            return Renewal(held=held, relays=row.relays, waiting=row.waiting)

        if self._database.dialect == "postgresql":
            return await self._database.write_at_once(at_once)
        return await self._database.write(work)

    async def release(self, owner: str, lanes: Sequence[HeldLane], *, leaving: bool) -> None:
        async def work(connection: AsyncConnection) -> None:
            held = await self._still_held(connection, owner, lanes)
            if held:
                await connection.execute(self._queries.give_back, {"lanes": [lane.number for lane in held]})
            if leaving:
                await connection.execute(self._queries.leave, {"member": owner})

        if lanes or leaving:
            await self._database.write(work)
        for lane in lanes:
            self._owners.pop(lane, None)

    async def unmark(self, lanes: Sequence[HeldLane]) -> None:
        async def work(connection: AsyncConnection) -> None:
            rows = {HeldLane(row.lane, row.fence) for row in await self._locked(connection, lanes)}
            numbers = [lane.number for lane in lanes if lane in rows]
            if numbers:
                await connection.execute(self._queries.unmark, {"lanes": numbers})

        if lanes:
            await self._database.write(work)

    async def holders(self) -> Holders:
        async def work(connection: AsyncConnection) -> Holders:
            relays = (await connection.scalars(self._queries.relays)).all()
            rows = (await connection.execute(self._queries.all)).all()
            ended = [row.now - row.lease_until for row in rows if row.owner is not None and row.lease_until <= row.now]
            free = sum(row.owner is None for row in rows)
            return Holders(
                relays=relays,
                held=len(rows) - free - len(ended),
                free=free,
                ended=len(ended),
                longest_ended=max(ended, default=None),
                now=rows[0].now,
            )

        return await self._database.read(work)

    async def lock(self, connection: AsyncConnection, lanes: Sequence[HeldLane]) -> Sequence[Any]:
        """The rows of these lanes, locked until the transaction ends.

        Raises:
            LaneLostError: Another relay holds one of them.
        """
        rows = await self._locked(connection, lanes)
        self.check_fences(lanes, rows)
        return rows

    async def lock_numbers(self, connection: AsyncConnection, numbers: Iterable[int]) -> None:
        """Keep whoever holds these lanes from settling meanwhile."""
        await connection.execute(self._queries.lock, {"lanes": sorted(set(numbers))})

    def check_fences(self, lanes: Sequence[HeldLane], rows: Iterable[Any]) -> None:
        fences = {row.lane: row.fence for row in rows}
        lost = [lane for lane in lanes if fences.get(lane.number) != lane.fence]
        if lost:
            owner = self._owners.get(lost[0], "(unknown)")
            raise LaneLostError(owner, [lane.number for lane in lost])

    async def mark(self, connection: AsyncConnection, rows: Sequence[Any], in_hand: dict[int, int]) -> dict[int, int]:
        """Note the record that each lane is about to have in hand, by number of the lane; the rows are locked.

        Returns:
            How many vanished with it before, by number of the lane.
        """
        crashes = {
            row.lane: row.crashes if row.marked == in_hand[row.lane] else 0 for row in rows if row.lane in in_hand
        }
        marks = [{"number": lane, "in_hand": in_hand[lane], "count": count} for lane, count in crashes.items()]
        if marks:
            await connection.execute(self._queries.mark, marks)
        return crashes

    async def acquit(self, connection: AsyncConnection, numbers: Sequence[int]) -> None:
        """The steps of these lanes are over, and their holder is still there."""
        if numbers:
            await connection.execute(self._queries.acquit, {"lanes": numbers})

    async def lower(self, connection: AsyncConnection, firsts: dict[int, int]) -> None:
        """Records came back to these lanes, the first of them with this id; the lanes are locked."""
        lowered = [{"number": lane, "first": first} for lane, first in firsts.items()]
        if lowered:
            await connection.execute(self._queries.lower, lowered)

    async def _locked(self, connection: AsyncConnection, lanes: Sequence[HeldLane]) -> Sequence[Any]:
        return (await connection.execute(self._queries.lock, {"lanes": [lane.number for lane in lanes]})).all()

    async def _extend(self, connection: AsyncConnection, numbers: Sequence[int], lease: timedelta) -> bool:
        """Whether any record of these lanes is there."""
        await connection.execute(self._queries.extend, {"lanes": numbers, "seconds": lease.total_seconds()})
        return bool(await connection.scalar(self._queries.waiting, {"lanes": numbers}))

    async def _still_held(
        self, connection: AsyncConnection, owner: str, lanes: Sequence[HeldLane]
    ) -> Sequence[HeldLane]:
        """Those of the lanes that the owner still has under the same fence, locked."""
        if not lanes:
            return []
        rows = await self._locked(connection, lanes)
        there = {HeldLane(row.lane, row.fence) for row in rows if row.owner == owner}
        return [lane for lane in lanes if lane in there]

    def _signs_of_life(self, owner: str, lanes: Sequence[HeldLane], lease: timedelta) -> dict[str, object]:
        return {
            "lanes": [lane.number for lane in lanes],
            "fences": [lane.fence for lane in lanes],
            "owner": owner,
            "seconds": lease.total_seconds(),
            "idle_limit_ms": str(self._database.idle_limit_ms),
            "channel": channel_of(self._database.tables),
            "echo": echo_of(owner),
        }

    async def _suspicions(
        self, connection: AsyncConnection, taken: Sequence[Any], in_hand: int
    ) -> dict[int, Suspicion]:
        """By number of the lane: for those of `taken` whose owner vanished, and for those with a record that others
        vanished with before. A marked record that is there no longer was discarded by an operator.
        """
        reach = await self._reach_of_the_vanished(connection, taken, in_hand)
        there = await self._there(connection, [row.marked for row in taken if row.marked is not None])
        suspicions = {lane: Suspicion(until=until) for lane, until in reach.items()}
        for row in taken:
            if row.marked in there:
                until = max(reach.get(row.lane, 0), row.marked)
                crashes = row.crashes + row.stepping
                suspicions[row.lane] = Suspicion(until=until, record=row.marked, crashes=crashes)
        return suspicions

    async def _reach_of_the_vanished(
        self, connection: AsyncConnection, taken: Sequence[Any], in_hand: int
    ) -> dict[int, int]:
        """Up to which record lanes go in single steps. Counted lane by lane: what waited in one that its holder did not
        claim from, since it was under suspicion or about to be given away, must not stand for what it had of another.
        """
        vanished = [row.lane for row in taken if row.owner is not None]
        if not vanished:
            return {}
        rows = await connection.execute(self._queries.reach, {"lanes": vanished, "before": max(in_hand, 1) - 1})
        return {row.lane: row.until for row in rows if row.until is not None}

    async def _there(self, connection: AsyncConnection, ids: Sequence[int]) -> set[int]:
        return set(await connection.scalars(self._queries.existing, {"ids": ids})) if ids else set()
