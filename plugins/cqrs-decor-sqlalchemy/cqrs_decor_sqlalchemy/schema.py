"""The tables in the database: what is missing, how it is made, and which version stands there."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, Executable, Table, inspect, select, text
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.schema import CreateIndex, CreateSchema, CreateTable, DDLElement

from cqrs_decor.errors import SchemaMissingError, SchemaOutdatedError, StoreUnavailableError
from cqrs_decor.findings import Finding
from cqrs_decor.lanes import LANES
from cqrs_decor_sqlalchemy.database import Database
from cqrs_decor_sqlalchemy.storage import storage_statements
from cqrs_decor_sqlalchemy.tables import SCHEMA_VERSION

_NAME = "cqrs_decor"
_LOCK = 0x63717273  # "cqrs"
_LOCK_WAIT_S = 60
_LIMIT = timedelta(minutes=5)


class SqlAlchemySchema:
    """Makes and checks the store's own tables. Never drops anything."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._tables = database.tables

    async def plan(self) -> Sequence[str]:
        return await self._database.read(self._plan)

    async def upgrade(self) -> Sequence[str]:
        """Under a lock of the database, so that the second of two processes finds everything done."""

        async def work(connection: AsyncConnection) -> Sequence[str]:
            await self._lock(connection)
            self._refuse_newer(await self._version(connection))
            statements = await connection.run_sync(self._statements)
            for statement in statements:
                await connection.execute(statement)
            await self._unlock(connection)
            return [_as_text(statement, connection) for statement in statements]

        return await self._database.write(work, limit=_LIMIT)

    async def check(self) -> Sequence[Finding]:
        async def work(connection: AsyncConnection) -> Sequence[Finding]:
            faults = await connection.run_sync(self._faults)
            version = await self._version(connection) if not faults else None
            if version is not None and version != SCHEMA_VERSION:
                faults.append(Finding.from_error(SchemaOutdatedError(self._database.name, version, SCHEMA_VERSION)))
            return faults

        faults = await self._database.read(work)
        return faults or [Finding.ok(f"{self._database.name} has the tables of version {SCHEMA_VERSION}")]

    async def ensure(self) -> None:
        """What `open` does: SQLite gets its tables, servers must have theirs; rows that belong to them are filled in.

        Raises:
            SchemaMissingError, SchemaOutdatedError: The tables are not what is needed.
        """
        if self._database.dialect == "sqlite":
            await self.upgrade()
            return
        if await self._is_current():
            return
        missing = await self._database.read(lambda connection: connection.run_sync(self._missing))
        if missing:
            raise SchemaMissingError(self._database.name, [table.name for table in missing])
        await self._fill()

    async def _is_current(self) -> bool:
        """One query in the ordinary case."""

        async def work(connection: AsyncConnection) -> int | None:
            return await self._version(connection)

        try:
            version = await self._database.read(work)
        except SchemaMissingError:
            return False
        self._refuse_other(version)
        return version is not None

    async def _fill(self) -> None:
        """The tables came from a migration of the user's, which knows nothing of the rows in them."""

        async def work(connection: AsyncConnection) -> None:
            for statement in await connection.run_sync(self._missing_rows):
                await connection.execute(statement)

        await self._database.write(work)

    async def _version(self, connection: AsyncConnection) -> int | None:
        table = self._tables.schema_version
        if not await connection.run_sync(lambda sync: inspect(sync).has_table(table.name, table.schema)):
            return None
        return await connection.scalar(select(table.c.version).where(table.c.name == _NAME))

    def _refuse_newer(self, version: int | None) -> None:
        if version is not None and version > SCHEMA_VERSION:
            raise SchemaOutdatedError(self._database.name, version, SCHEMA_VERSION)

    def _refuse_other(self, version: int | None) -> None:
        if version is not None and version != SCHEMA_VERSION:
            raise SchemaOutdatedError(self._database.name, version, SCHEMA_VERSION)

    async def _plan(self, connection: AsyncConnection) -> Sequence[str]:
        return [_as_text(statement, connection) for statement in await connection.run_sync(self._statements)]

    def _statements(self, connection: Connection) -> Sequence[Executable]:
        missing = self._missing(connection)
        ddl: list[Any] = []
        schema = self._tables.schema
        if schema is not None and self._database.dialect == "postgresql" and not inspect(connection).has_schema(schema):
            ddl.append(CreateSchema(schema, if_not_exists=True))
        for table in missing:
            ddl.append(CreateTable(table, if_not_exists=True))
            ddl.extend(storage_statements(table, connection))
            ddl.extend(CreateIndex(index) for index in sorted(table.indexes, key=lambda index: str(index.name)))
        return [*ddl, *self._missing_rows(connection, made=missing)]

    def _missing(self, connection: Connection) -> list[Table]:
        found = inspect(connection).get_table_names(schema=self._tables.schema)
        return [table for table in self._tables.all() if table.name not in found]

    def _missing_rows(self, connection: Connection, made: Sequence[Table] = ()) -> Sequence[Executable]:
        lanes, version = self._tables.lanes, self._tables.schema_version
        there: set[int] = set()
        noted = False
        if lanes not in made:
            there = set(connection.scalars(select(lanes.c.lane)))
        if version not in made:
            noted = connection.scalar(select(version.c.version).where(version.c.name == _NAME)) is not None
        statements: list[Executable] = []
        missing = sorted(set(range(LANES)) - there)
        if missing:
            statements.append(_insert_missing(self._database.dialect, lanes, [{"lane": lane} for lane in missing]))
        if not noted:
            row = {"name": _NAME, "version": SCHEMA_VERSION}
            statements.append(_insert_missing(self._database.dialect, version, [row]))
        return statements

    def _faults(self, connection: Connection) -> list[Finding]:
        missing = self._missing(connection)
        if missing:
            names = [table.name for table in missing]
            return [Finding.from_error(SchemaMissingError(self._database.name, names))]
        faults = [fault for table in self._tables.all() for fault in self._column_faults(connection, table)]
        if not faults and self._missing_rows(connection):
            faults.append(_fault("lane rows or the version row are missing", "run `cqrs-decor db upgrade`"))
        return faults

    def _column_faults(self, connection: Connection, table: Table) -> list[Finding]:
        found = {column["name"] for column in inspect(connection).get_columns(table.name, schema=table.schema)}
        return [
            _fault(
                f"table {table.name} lacks the column {column.name}",
                "compare your migration with `cqrs-decor db plan` on an empty database",
            )
            for column in table.columns
            if column.name not in found
        ]

    async def _lock(self, connection: AsyncConnection) -> None:
        """SQLite has its lock since BEGIN IMMEDIATE."""
        if self._database.dialect == "postgresql":
            await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        elif self._database.dialect == "mysql":
            values = {"lock": _NAME, "wait": _LOCK_WAIT_S}
            if await connection.scalar(text("SELECT GET_LOCK(:lock, :wait)"), values) != 1:
                reason = f"another process has been changing the tables for {_LOCK_WAIT_S} s"
                raise StoreUnavailableError(self._database.name, reason)

    async def _unlock(self, connection: AsyncConnection) -> None:
        """MySQL commits each CREATE TABLE by itself; the lock stays until it is given back or the connection ends."""
        if self._database.dialect == "mysql":
            await connection.execute(text("SELECT RELEASE_LOCK(:lock)"), {"lock": _NAME})


def _insert_missing(dialect: str, table: Table, rows: Sequence[Mapping[str, object]]) -> Executable:
    if dialect == "mysql":
        insert = mysql.insert(table).values([*rows])
        first = next(iter(table.primary_key.columns))
        return insert.on_duplicate_key_update({first.name: insert.inserted[first.name]})
    if dialect == "postgresql":
        return postgresql.insert(table).values([*rows]).on_conflict_do_nothing()
    return sqlite.insert(table).values([*rows]).on_conflict_do_nothing()


def _as_text(statement: Any, connection: AsyncConnection) -> str:
    """The statement as it could be pasted into a migration."""
    if isinstance(statement, DDLElement):
        return str(statement.compile(dialect=connection.dialect)).strip()
    return str(statement.compile(dialect=connection.dialect, compile_kwargs={"literal_binds": True})).strip()


def _fault(problem: str, fix: str) -> Finding:
    return Finding(code=SchemaMissingError.code, severity="error", problem=problem, fix=fix)
