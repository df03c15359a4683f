"""Column types, lists and the database's clock, each in the words of its database."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    ColumnElement,
    DateTime,
    Dialect,
    Executable,
    Float,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    any_,
    bindparam,
    delete,
    func,
    select,
    text,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator, TypeEngine

NAME_LENGTH = 255
"""Characters of a topic, key, source, type, message id or consumer; three fit into an InnoDB index of 3,072 bytes."""

_BYTES_PER_CHARACTER = 4


class _ByteText(TypeDecorator[str]):
    """Text kept as its UTF-8 bytes: MySQL and MariaDB take `Key`, `key` and `key ` for the same otherwise."""

    impl = mysql.VARBINARY
    cache_ok = True

    def __init__(self, length: int) -> None:
        super().__init__(length * _BYTES_PER_CHARACTER)

    def process_bind_param(self, value: str | None, dialect: Dialect) -> bytes | None:
        return None if value is None else value.encode()

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else bytes(value).decode()


class _NaiveUtc(TypeDecorator[datetime]):
    """Databases without time zones keep UTC; Python always sees it with its zone."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


class _NaiveUtcMicroseconds(_NaiveUtc):
    impl = mysql.DATETIME
    cache_ok = True


def name_type(length: int = NAME_LENGTH) -> TypeEngine[str]:
    """Short text that is compared byte by byte on every database."""
    return (
        String(length)
        .with_variant(String(length, collation="C"), "postgresql")
        .with_variant(_ByteText(length), "mysql", "mariadb")
    )


def long_text_type() -> TypeEngine[str]:
    return Text().with_variant(mysql.LONGTEXT(charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb")


def body_type() -> TypeEngine[bytes]:
    return LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")


def time_type() -> TypeEngine[datetime]:
    return (
        DateTime(timezone=True)
        .with_variant(_NaiveUtcMicroseconds(fsp=6), "mysql", "mariadb")
        .with_variant(_NaiveUtc(), "sqlite")
    )


def id_type() -> TypeEngine[int]:
    """64 bits; on SQLite the type that makes a primary key the row's own number."""
    return BigInteger().with_variant(Integer(), "sqlite")


def among(
    column: ColumnElement[int], name: str, dialect: str, kind: TypeEngine[int] | None = None
) -> ColumnElement[bool]:
    """Whether the column is in the list `name`. `= ANY` of an array where there are arrays: one text for any number of
    ids, and the index keeps its order.
    """
    if dialect == "postgresql":
        return column == any_(bindparam(name, type_=ARRAY(kind or BigInteger())))
    return column.in_(bindparam(name, expanding=True, literal_execute=True, type_=BigInteger()))


def delete_among(table: Table, dialect: str) -> Executable:
    """Deletes the rows whose ids are in the list `ids`, and looks at no others.

    MariaDB reads the whole table when the list names most of its rows, and waits for each row that another transaction
    has written: one that stays open would hold up every settlement. A join in this order finds each row by its key.
    """
    if dialect != "mysql":
        return delete(table).where(among(table.c.id, "ids", dialect))
    name = mysql.dialect().identifier_preparer.format_table(table)
    return text(
        f"""
        DELETE {name}
        FROM JSON_TABLE(:ids, '$[*]' COLUMNS (id BIGINT PATH '$')) AS wanted
        STRAIGHT_JOIN {name} ON {name}.id = wanted.id
        """
    ).bindparams(bindparam("ids", type_=JSON()))


def not_among(column: ColumnElement[int], name: str, dialect: str) -> ColumnElement[bool]:
    """PostgreSQL hashes the ids of a subquery once; it would compare `<> ALL` of an array one by one."""
    if dialect == "postgresql":
        return column.not_in(select(func.unnest(bindparam(name, type_=ARRAY(BigInteger())))))
    return column.not_in(bindparam(name, expanding=True, literal_execute=True, type_=BigInteger()))


class DatabaseNow(FunctionElement[datetime]):
    """The time by the database's clock, in UTC, not that of the transaction's start."""

    type = time_type()
    inherit_cache = True


class DatabaseLater(FunctionElement[datetime]):
    """So many seconds after `DatabaseNow`."""

    type = time_type()
    inherit_cache = True

    def __init__(self, parameter: str) -> None:
        super().__init__(bindparam(parameter, type_=Float()))


@compiles(DatabaseNow)
def _now(element: DatabaseNow, compiler: SQLCompiler, **kw: Any) -> str:
    return "clock_timestamp()"


@compiles(DatabaseNow, "mysql", "mariadb")
def _now_mysql(element: DatabaseNow, compiler: SQLCompiler, **kw: Any) -> str:
    return "UTC_TIMESTAMP(6)"


@compiles(DatabaseNow, "sqlite")
def _now_sqlite(element: DatabaseNow, compiler: SQLCompiler, **kw: Any) -> str:
    return f"strftime({_SQLITE_FORMAT}, 'now')"


@compiles(DatabaseLater)
def _later(element: DatabaseLater, compiler: SQLCompiler, **kw: Any) -> str:
    return f"clock_timestamp() + make_interval(secs => {compiler.process(element.clauses, **kw)})"


@compiles(DatabaseLater, "mysql", "mariadb")
def _later_mysql(element: DatabaseLater, compiler: SQLCompiler, **kw: Any) -> str:
    return f"UTC_TIMESTAMP(6) + INTERVAL {compiler.process(element.clauses, **kw)} SECOND"


@compiles(DatabaseLater, "sqlite")
def _later_sqlite(element: DatabaseLater, compiler: SQLCompiler, **kw: Any) -> str:
    seconds = compiler.process(element.clauses, **kw)
    return f"strftime({_SQLITE_FORMAT}, 'now', {seconds} || ' seconds')"


# As SQLAlchemy writes a time on SQLite: with six digits, so that the texts compare as the times do.
_SQLITE_FORMAT = "'%Y-%m-%d %H:%M:%f000'"
