"""What each worker may have in hand of each partition, noted before it dispatches."""

import json
from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import Insert, bindparam, delete, null, select, tuple_, update
from sqlalchemy.dialects import mysql
from sqlalchemy.ext.asyncio import AsyncConnection

from cqrs_decor.inbox import NOBODY, Mark
from cqrs_decor_sqlalchemy.database import Database
from cqrs_decor_sqlalchemy.inbox_queries import INSERTS
from cqrs_decor_sqlalchemy.records import fitted
from cqrs_decor_sqlalchemy.tables import Tables

_NONE = "{}"


class MarkQueries:
    """Built once per store. All by primary key (group_name, topic, part); `partitions` is a list of (topic, part)."""

    def __init__(self, tables: Tables, dialect: str) -> None:
        marks = tables.marks.c
        among = tuple_(marks.topic, marks.part).in_(bindparam("partitions", expanding=True))
        group = marks.group_name == bindparam("group", type_=marks.group_name.type)
        owner = bindparam("reader", type_=marks.owner.type)

        self.mark = _replace(tables, dialect)
        self.of_others = select(tables.marks).where(group, among, marks.owner != owner)
        ours = (group, among, marks.owner == owner)
        self.keep_crashes = (
            update(tables.marks).where(*ours, marks.crashes != _NONE).values(owner=NOBODY, suspect=null())
        )
        self.unmark = delete(tables.marks).where(*ours)


class SqlAlchemyMarks:
    """Marks in the table `worker_mark`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._queries = MarkQueries(database.tables, database.dialect)

    async def mark(self, group: str, owner: str, marks: Collection[Mark]) -> None:
        rows = [_row(group, owner, mark) for mark in sorted(marks, key=lambda mark: (mark.topic, mark.partition))]

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(self._queries.mark, rows)

        if rows:
            await self._database.write(work)

    async def take_marks(self, group: str, owner: str, partitions: Collection[tuple[str, int]]) -> Sequence[Mark]:
        values = _values(group, owner, partitions)

        async def work(connection: AsyncConnection) -> list[Mark]:
            return [_mark(row) for row in await connection.execute(self._queries.of_others, values)]

        return await self._database.read(work) if partitions else []

    async def unmark(self, group: str, owner: str, partitions: Collection[tuple[str, int]]) -> None:
        values = _values(group, owner, partitions)

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(self._queries.keep_crashes, values)
            await connection.execute(self._queries.unmark, values)

        if partitions:
            await self._database.write(work)


def _replace(tables: Tables, dialect: str) -> Insert:
    table = tables.marks
    replaced = ("owner", "until_position", "suspect", "crashes")
    insert = INSERTS[dialect](table)
    if isinstance(insert, mysql.Insert):
        return insert.on_duplicate_key_update({name: insert.inserted[name] for name in replaced})
    return insert.on_conflict_do_update(
        index_elements=[table.c.group_name, table.c.topic, table.c.part],
        set_={name: insert.excluded[name] for name in replaced},
    )


def _values(group: str, owner: str, partitions: Collection[tuple[str, int]]) -> dict[str, object]:
    places = sorted((fitted(topic), number) for topic, number in partitions)
    return {"group": fitted(group), "reader": fitted(owner), "partitions": places}


def _row(group: str, owner: str, mark: Mark) -> dict[str, object]:
    return {
        "group_name": fitted(group),
        "topic": fitted(mark.topic),
        "part": mark.partition,
        "owner": fitted(owner),
        "until_position": mark.until,
        "suspect": mark.suspect,
        "crashes": json.dumps(mark.crashes),
    }


def _mark(row: Any) -> Mark:
    crashes = {int(position): count for position, count in json.loads(row.crashes).items()}
    return Mark(topic=row.topic, partition=row.part, until=row.until_position, suspect=row.suspect, crashes=crashes)
