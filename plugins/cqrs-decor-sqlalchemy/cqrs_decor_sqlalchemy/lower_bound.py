"""The id from which the claims of a lane begin, so that they do not pass over what was settled before.

Settled rows are deleted. PostgreSQL keeps them in its indexes until the last snapshot that could see them is gone, be
it a backup or a forgotten session, and each claim would walk over all of them. So each lane has a `low_id`, and it must
never skip a record that is committed late: ids are drawn when a row is inserted, and commits come in another order.

Why it does not: docs/decisions/0012-lower-bound.md.
"""
# ruff: noqa: S608 - what is put together are names of tables, quoted

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, SmallInteger, TextClause, bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

from cqrs_decor_sqlalchemy.tables import Tables

PUT_BACK = -1
"""What `seen_id` of a lane becomes when records come back to it: no look that was under way counts any more."""

_SCAN_S = 0.5
"""A scan begins no further stretch after so long: the next one goes on where it ended."""

_FIRST_STRETCH = 25_000
"""Ids that a scan passes first, then twice as many each time: the last stretch takes about as long as all before it."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """A moment in the life of the table.

    Attributes:
        last_id: The last id that had been drawn.
        writers: The transactions that may have drawn it or one before it, and had not ended.
    """

    last_id: int
    writers: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What was found without keeping anybody waiting, not yet acted upon.

    Attributes:
        moment: To be remembered for the next look.
        server: On which server it was found: since when that runs.
        read_ids: By lane, its `seen_id` when the look began.
        bounds: By lane, the id up to which there is no record and never will be one.
        is_complete: The scan got to the end of what it may pass.
    """

    moment: _Seen
    server: datetime
    read_ids: Mapping[int, int]
    bounds: Mapping[int, int]
    is_complete: bool


class LowerBound:
    """Moves `low_id` of the lanes that this process holds. On databases other than PostgreSQL it stays where it is."""

    def __init__(self, tables: Tables, dialect: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._on = dialect.name == "postgresql"
        self._table = dialect.identifier_preparer.format_table(tables.outbox)
        self._queries = _Queries(self._table, dialect.identifier_preparer.format_table(tables.lanes))
        self._last_drawn: TextClause | None = None
        self._seen: dict[int, _Seen] = {}

    async def look(self, connection: AsyncConnection, lanes: Sequence[int]) -> Look | None:
        """See which writers are at work, and up to where the lanes are empty of what was seen by the look before.

        Nothing is locked, so that a scan over many dead rows keeps nobody waiting. Each statement must see what was
        committed before it began, as under READ COMMITTED. None where there is no bound.
        """
        if not self._on:
            return None
        rows = (await connection.execute(self._queries.lanes, {"lanes": lanes})).all()
        if not rows:
            return None
        last_id = await self._last_id(connection)
        if last_id is None:
            self._on = False
            return None
        holders = (await connection.execute(self._queries.writers, {"table": self._table})).all()
        now = _Seen(last_id, frozenset(row.writer for row in holders))
        prepared = any(row.prepared for row in holders)

        known: dict[int, tuple[int, int]] = {}
        blocked: set[int] = set()
        for row in rows:
            before = self._seen.get(row.lane)
            # A server that crashed may draw ids again that it had drawn before: what was seen must have outlived it.
            if before is None or before.last_id != row.seen_id:
                continue
            if now.writers.isdisjoint(before.writers) and not prepared:
                known[row.lane] = row.low_id, before.last_id + 1
            else:
                blocked.add(row.lane)
        bounds, is_complete = await self._scan(connection, known)
        return Look(
            moment=now,
            server=rows[0].server,
            read_ids={row.lane: row.seen_id for row in rows if row.lane not in blocked},
            bounds=bounds,
            is_complete=is_complete,
        )

    async def _scan(
        self, connection: AsyncConnection, known: Mapping[int, tuple[int, int]]
    ) -> tuple[dict[int, int], bool]:
        """From where on there may be records, by lane, and whether that was found for all within the time.

        Args:
            known: By lane, from where to where.
        """
        bounds = {lane: low for lane, (low, _) in known.items()}
        unpassed = {lane: end for lane, (low, end) in known.items() if low < end}
        ends_at, stretch = self._clock() + _SCAN_S, _FIRST_STRETCH
        while unpassed and self._clock() < ends_at:
            until = min(bounds[lane] for lane in unpassed) + stretch
            stretch *= 2
            lanes = list(unpassed)
            ends = [min(until, unpassed[lane]) for lane in lanes]
            values = {"lanes": lanes, "starts": [bounds[lane] for lane in lanes], "ends": ends}
            for row, end in zip(await connection.execute(self._queries.scan, values), ends, strict=True):
                bounds[row.lane] = max(bounds[row.lane], end) if row.found is None else row.found
                if row.found is not None or bounds[row.lane] >= unpassed[row.lane]:
                    del unpassed[row.lane]
        return bounds, not unpassed

    async def move(self, connection: AsyncConnection, look: Look, lanes: Sequence[Any]) -> None:
        """Move the bounds to what a look found, and note the look. What was settled before one look can be passed over
        after the next.

        Args:
            lanes: Rows of the lanes, locked in this transaction. Where records were put back since the look began, or
                by another server, what it found does not count.
        """
        server = await connection.scalar(self._queries.server)
        unchanged = [
            row.lane
            for row in lanes
            if row.lane in look.bounds and row.seen_id == look.read_ids.get(row.lane) and server == look.server
        ]
        if unchanged:
            values = {"lanes": unchanged, "bounds": [look.bounds[lane] for lane in unchanged]}
            await connection.execute(self._queries.move, values)
        looked = [row.lane for row in lanes if row.lane in look.read_ids]
        if looked:
            await connection.execute(self._queries.note, {"lanes": looked, "last_id": look.moment.last_id})
            self._seen.update(dict.fromkeys(looked, look.moment))

    async def mend(self, connection: AsyncConnection, lanes: Sequence[int]) -> None:
        """Ids that begin anew, as after TRUNCATE with RESTART IDENTITY, must not stay below the bound for ever."""
        if not self._on:
            return
        last_id = await self._last_id(connection)
        if last_id is not None:
            await connection.execute(self._queries.mend, {"lanes": lanes, "last_id": last_id})

    async def _last_id(self, connection: AsyncConnection) -> int | None:
        """The last id that was drawn; None where it cannot be known, or where a statement sees too little."""
        if self._last_drawn is None:
            row = (await connection.execute(self._queries.sequence, {"table": self._table})).one()
            if row.name is None or row.cache != 1 or not row.readable or row.isolation != "read committed":
                return None
            self._last_drawn = text(f"SELECT last_value, is_called FROM {row.name}")
        row = (await connection.execute(self._last_drawn)).one()
        last_drawn: int = row.last_value if row.is_called else row.last_value - 1
        return last_drawn


class _Queries:
    def __init__(self, outbox: str, lanes: str) -> None:
        numbers = bindparam("lanes", type_=ARRAY(SmallInteger()))
        last_id = bindparam("last_id", type_=BigInteger())

        # A sequence that gives each session ids in advance tells nothing about which were drawn.
        self.sequence = text(
            """
            SELECT
                sequence.name,
                pg_sequence.seqcache AS cache,
                has_sequence_privilege(sequence.name, 'SELECT') AS readable,
                current_setting('transaction_isolation') AS isolation
            FROM (SELECT pg_get_serial_sequence(:table, 'id') AS name) AS sequence
            LEFT JOIN pg_sequence ON pg_sequence.seqrelid = CAST(sequence.name AS regclass)
            """
        )
        # Every INSERT takes this lock before it draws its id, and has it until its transaction has ended.
        self.writers = text(
            """
            SELECT virtualtransaction AS writer, pid IS NULL AS prepared
            FROM pg_locks
            WHERE relation = CAST(CAST(:table AS text) AS regclass)
                AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                AND mode = 'RowExclusiveLock'
                AND granted
            """
        )
        # Index (lane, id) of the outbox.
        self.scan = text(
            f"""
            SELECT
                stretch.lane,
                (
                    SELECT record.id
                    FROM {outbox} AS record
                    WHERE record.lane = stretch.lane AND record.id >= stretch.start AND record.id < stretch.until
                    ORDER BY record.id
                    LIMIT 1
                ) AS found
            FROM unnest(:lanes, :starts, :ends) WITH ORDINALITY AS stretch (lane, start, until, place)
            ORDER BY stretch.place
            """
        ).bindparams(
            numbers, bindparam("starts", type_=ARRAY(BigInteger())), bindparam("ends", type_=ARRAY(BigInteger()))
        )
        self.lanes = text(
            f"""
            SELECT lane, low_id, seen_id, pg_postmaster_start_time() AS server
            FROM {lanes}
            WHERE lane = ANY(:lanes)
            """
        ).bindparams(numbers)
        self.server = text("SELECT pg_postmaster_start_time()")
        self.move = text(
            f"""
            UPDATE {lanes} AS lanes
            SET low_id = GREATEST(lanes.low_id, moved.bound)
            FROM unnest(:lanes, :bounds) AS moved (lane, bound)
            WHERE lanes.lane = moved.lane
            """
        ).bindparams(numbers, bindparam("bounds", type_=ARRAY(BigInteger())))
        self.note = text(f"UPDATE {lanes} SET seen_id = :last_id WHERE lane = ANY(:lanes)").bindparams(numbers, last_id)
        self.mend = text(
            f"UPDATE {lanes} SET low_id = 0 WHERE lane = ANY(:lanes) AND low_id > :last_id + 1"
        ).bindparams(numbers, last_id)
