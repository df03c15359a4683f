"""The tables of the log: the database as broker."""

from dataclasses import dataclass

from sqlalchemy import BigInteger, Column, Integer, LargeBinary, MetaData, String, Table, Text
from sqlalchemy.dialects import mysql
from sqlalchemy.types import TypeEngine

LOG_LANES = 16
"""How many lanes a topic has: a constant of the tables. Two processes that disagree on it would break order."""

NAME_LENGTH = 255
KEY_LENGTH = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class LogTables:
    """The tables of one log, in the order in which they can be created.

    All times are milliseconds since 1970 by the database's clock, all positions count from 1 in each lane of a topic.

    Attributes:
        log: The records, never changed once written. Positions are dense: those below the lane's `next_position` are
            all committed, save what retention has taken from the front.
        lanes: One row per lane of a topic. Locked by whoever writes to the lane, so that its positions are drawn and
            committed in one order. `first_position` is the oldest that is kept.
        positions: One row per consumer group and lane: what the group has acknowledged, and which reader holds the
            lane under which fence until when. `crashes` counts owners that vanished since the last acknowledgement.
        readers: One row per reader and topic, for sharing the lanes between those whose `seen_until_ms` is to come.
    """

    log: Table
    lanes: Table
    positions: Table
    readers: Table

    def all(self) -> tuple[Table, ...]:
        return (self.log, self.lanes, self.positions, self.readers)


def define_log_tables(metadata: MetaData, schema: str | None = None, prefix: str = "cqrs_") -> LogTables:
    """Describe the log's tables in this metadata; nothing is created yet."""
    log = Table(
        f"{prefix}log",
        metadata,
        Column("topic", _text(NAME_LENGTH), primary_key=True),
        Column("lane", Integer, primary_key=True, autoincrement=False),
        Column("position", BigInteger, primary_key=True, autoincrement=False),
        Column("message_id", _text(NAME_LENGTH), nullable=False),
        Column("source", _text(NAME_LENGTH), nullable=False),
        Column("type", _text(NAME_LENGTH), nullable=False),
        Column("version", Integer, nullable=False),
        Column("partition_key", _text(KEY_LENGTH), nullable=True),
        Column("content_type", _text(NAME_LENGTH), nullable=False),
        Column("attributes", _long_text(), nullable=False),
        Column("headers", _long_text(), nullable=True),
        Column("body", _long_binary(), nullable=False),
        Column("written_at_ms", BigInteger, nullable=False),
        schema=schema,
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
    )
    lanes = Table(
        f"{prefix}log_lane",
        metadata,
        Column("topic", _text(NAME_LENGTH), primary_key=True),
        Column("lane", Integer, primary_key=True, autoincrement=False),
        Column("next_position", BigInteger, nullable=False),
        Column("first_position", BigInteger, nullable=False),
        schema=schema,
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
        postgresql_with=_OFTEN_UPDATED,
    )
    positions = Table(
        f"{prefix}log_position",
        metadata,
        Column("group_name", _text(NAME_LENGTH), primary_key=True),
        Column("topic", _text(NAME_LENGTH), primary_key=True),
        Column("lane", Integer, primary_key=True, autoincrement=False),
        Column("position", BigInteger, nullable=False),
        Column("owner", _text(64), nullable=True),
        Column("fence", BigInteger, nullable=False),
        Column("lease_until_ms", BigInteger, nullable=False),
        Column("crashes", Integer, nullable=False),
        schema=schema,
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
        postgresql_with=_OFTEN_UPDATED,
    )
    readers = Table(
        f"{prefix}log_reader",
        metadata,
        Column("group_name", _text(NAME_LENGTH), primary_key=True),
        Column("topic", _text(NAME_LENGTH), primary_key=True),
        Column("reader", _text(64), primary_key=True),
        Column("seen_until_ms", BigInteger, nullable=False),
        schema=schema,
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
    )
    return LogTables(log=log, lanes=lanes, positions=positions, readers=readers)


# Room on each page lets PostgreSQL replace these few, ever changing rows in place (heap-only tuples).
_OFTEN_UPDATED = {
    "fillfactor": "50",
    "autovacuum_vacuum_scale_factor": "0",
    "autovacuum_vacuum_threshold": "500",
}


def _text(length: int) -> TypeEngine[str]:
    """Text that is compared byte by byte everywhere: MySQL's and MariaDB's default takes `Orders` for `orders`."""
    binary = mysql.VARCHAR(length, charset="utf8mb4", collation="utf8mb4_bin")
    return (
        String(length)
        .with_variant(String(length, collation="C"), "postgresql")
        .with_variant(binary, "mysql", "mariadb")
    )


def _long_text() -> TypeEngine[str]:
    longer = mysql.LONGTEXT(charset="utf8mb4", collation="utf8mb4_bin")
    return Text().with_variant(longer, "mysql", "mariadb")


def _long_binary() -> TypeEngine[bytes]:
    return LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")
