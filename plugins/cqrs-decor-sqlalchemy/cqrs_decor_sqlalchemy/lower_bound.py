"""The id from which the claims of a lane begin, so that they do not pass over what was settled before.

Settled rows are deleted. PostgreSQL keeps them in its indexes until the last snapshot that could see them is gone, be
it a backup or a forgotten session, and each claim would walk over all of them. So each lane has a `low_id`, and it must
never skip a record that is committed late: ids are drawn when a row is inserted, and commits come in another order.

Why it does not: docs/decisions/0012-lower-bound.md.
"""
# ruff: noqa: S608 - what is put together are names of tables, quoted

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import BigInteger, SmallInteger, TextClause, bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

from cqrs_decor_sqlalchemy.tables import Tables


@dataclass(frozen=True, slots=True)
class _Seen:
    """A moment in the life of the table.

    Attributes:
        last_id: The last id that had been drawn.
        writers: The transactions that may have drawn it or one before it, and had not ended.
    """

    last_id: int
    writers: frozenset[str]


class LowerBound:
    """Moves `low_id` of the lanes that this process holds. On databases other than PostgreSQL it stays where it is."""

    def __init__(self, tables: Tables, dialect: Any) -> None:
        self._on = dialect.name == "postgresql"
        self._table = dialect.identifier_preparer.format_table(tables.outbox)
        self._queries = _Queries(self._table, dialect.identifier_preparer.format_table(tables.lanes))
        self._last_drawn: TextClause | None = None
        self._seen: dict[int, _Seen] = {}

    async def move(self, connection: AsyncConnection, lanes: Sequence[Any]) -> None:
        """Look which writers are at work, and move the bound to where it is known by now that nobody can write below.
        What was settled before one look can be passed over after the next.

        Args:
            lanes: Rows of the lanes, locked in this transaction, so that nobody puts records back meanwhile. Each
                statement must see what was committed before it began, as under READ COMMITTED.
        """
        if not self._on:
            return
        last_id = await self._last_id(connection)
        if last_id is None:
            self._on = False
            return
        holders = (await connection.execute(self._queries.writers, {"table": self._table})).all()
        now = _Seen(last_id, frozenset(row.writer for row in holders))
        prepared = any(row.prepared for row in holders)

        looked: list[int] = []
        passed: defaultdict[int, list[int]] = defaultdict(list)
        for row in lanes:
            before = self._seen.get(row.lane)
            # A server that crashed may draw ids again that it had drawn before: what was seen must have outlived it.
            if before is None or before.last_id != row.seen_id:
                looked.append(row.lane)
            elif now.writers.isdisjoint(before.writers) and not prepared:
                looked.append(row.lane)
                passed[before.last_id].append(row.lane)
        for seen_id, numbers in passed.items():
            await connection.execute(self._queries.move, {"lanes": numbers, "last_id": seen_id})
        if looked:
            await connection.execute(self._queries.note, {"lanes": looked, "last_id": last_id})
            self._seen.update(dict.fromkeys(looked, now))

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
        self.move = text(
            f"""
            UPDATE {lanes} AS lanes
            SET low_id = GREATEST(
                lanes.low_id,
                COALESCE(
                    (
                        SELECT record.id
                        FROM {outbox} AS record
                        WHERE record.lane = lanes.lane AND record.id >= lanes.low_id AND record.id <= :last_id
                        ORDER BY record.id
                        LIMIT 1
                    ),
                    :last_id + 1
                )
            )
            WHERE lanes.lane = ANY(:lanes)
            """
        ).bindparams(numbers, last_id)
        self.note = text(f"UPDATE {lanes} SET seen_id = :last_id WHERE lane = ANY(:lanes)").bindparams(numbers, last_id)
        self.mend = text(
            f"UPDATE {lanes} SET low_id = 0 WHERE lane = ANY(:lanes) AND low_id > :last_id + 1"
        ).bindparams(numbers, last_id)
