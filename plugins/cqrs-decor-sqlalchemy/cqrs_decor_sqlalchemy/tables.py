"""The store's tables, as they can stand in a user's own metadata.

Rows that wait to be published stand in one hot table, which delivered rows leave at once. What is parked, kept as
history or only asked for by operators stands elsewhere, so that the hot table stays as small as what waits.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Identity,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    UniqueConstraint,
    event,
)
from sqlalchemy.sql.schema import SchemaItem

from cqrs_decor_sqlalchemy.columns import DatabaseNow, body_type, id_type, long_text_type, name_type, time_type
from cqrs_decor_sqlalchemy.driver_insert import DriverInsert
from cqrs_decor_sqlalchemy.log_tables import LogTables, define_log_tables
from cqrs_decor_sqlalchemy.storage import set_storage

SCHEMA_VERSION = 1

RECORD_COLUMNS = (
    *("lane", "message_id", "source", "type", "version", "topic", "key"),
    *("content_type", "headers", "body"),
)
"""What is kept of an envelope, wherever its record stands."""


class Tables:
    """All tables of the library in one metadata.

    Args:
        metadata: The user's own, e.g. `Base.metadata`, so that Alembic's autogenerate knows them; else one apart.
        schema: The database schema they stand in; the default one if None.
        prefix: What their names begin with.

    Attributes:
        outbox: What waits to be published. `id` rises in the order of writing; `due_at` is when a record may be tried
            (again); `headers` is JSON with every attribute of the envelope that has no column.
        lanes: One row per lane: who holds it, under which fence, until when. `marked` is the record that goes in a
            single step, `crashes` how many holders vanished with it, `stepping` whether this holder has it in hand. No
            record of the lane has an id below `low_id`, and none ever will; `seen_id` is what it is to move to.
        holds: One row per record that failed and has a key: it holds back every record of that key with the same or a
            higher id, until `due_at`; for good where that is NULL, since the record is parked.
        parked: Records that wait for an operator, under the id that they had in the outbox; `behind` is the parked
            record for whose sake a healthy one was put here.
        history: Delivered records, for those who keep them.
        members: Who takes part, until when: relays (and workers) that share lanes.
        inbox: Which consumer has had which message.
        inbox_parked: Messages that a consumer could not handle, and behind them (`held`) the later ones of their keys.
            `message_id` and `source` may be shortened for the index; `headers` is JSON with the whole envelope but its
            body.
        inbox_holds: Keys whose later messages wait behind a parked one.
        marks: What a worker has in hand, noted before it dispatches: a message that kills the process is found by it.
        idempotency: Results of commands that were sent with an idempotency key.
        operator_log: Who retried or discarded what, and when.
        schema_version: One row: the version of all these tables.
        log: The tables of the database as broker.
    """

    def __init__(self, metadata: MetaData | None = None, *, schema: str | None = None, prefix: str = "cqrs_") -> None:
        self.metadata = MetaData() if metadata is None else metadata
        self.schema = schema
        self.prefix = prefix
        self.outbox = self._table(
            "outbox",
            Column("id", id_type(), Identity(always=False), primary_key=True),
            *_record_columns(),
            Column("due_at", time_type(), nullable=True),
            Column("attempts", Integer, nullable=False, server_default="0"),
            Column("error", long_text_type(), nullable=True),
            # The claim reads the records of its lanes in the order of their ids.
            Index(f"ix_{prefix}outbox_lane", "lane", "id"),
            sqlite_autoincrement=_NEVER_AGAIN,
            postgresql_with=_EMPTIED_ALL_THE_TIME,
        )
        self.lanes = self._table(
            "outbox_lane",
            Column("lane", SmallInteger, primary_key=True, autoincrement=False),
            Column("owner", name_type(), nullable=True),
            Column("fence", BigInteger, nullable=False, server_default="0"),
            Column("lease_until", time_type(), nullable=True),
            Column("marked", BigInteger, nullable=True),
            Column("crashes", Integer, nullable=False, server_default="0"),
            Column("stepping", SmallInteger, nullable=False, server_default="0"),
            Column("low_id", BigInteger, nullable=False, server_default="0"),
            Column("seen_id", BigInteger, nullable=False, server_default="0"),
            postgresql_with=_UPDATED_ALL_THE_TIME,
        )
        self.holds = self._table(
            "outbox_hold",
            Column("record_id", BigInteger, primary_key=True, autoincrement=False),
            Column("lane", SmallInteger, nullable=False),
            Column("topic", name_type(), nullable=False),
            Column("key", name_type(), nullable=False),
            Column("due_at", time_type(), nullable=True),
            # The claim asks for each record whether an earlier one of its key failed.
            Index(f"ix_{prefix}outbox_hold_key", "lane", "topic", "key", "record_id"),
            postgresql_with=_EMPTIED_ALL_THE_TIME,
        )
        self.parked = self._table(
            "outbox_parked",
            Column("id", BigInteger, primary_key=True, autoincrement=False),
            *_record_columns(),
            Column("attempts", Integer, nullable=False),
            Column("error", long_text_type(), nullable=True),
            Column("parked_at", time_type(), nullable=False),
            Column("behind", BigInteger, nullable=True),
            # Operators look for a key; the records behind a parked one go back together.
            Index(f"ix_{prefix}outbox_parked_key", "topic", "key", "id"),
            Index(f"ix_{prefix}outbox_parked_behind", "behind", "id"),
        )
        self.history = self._table(
            "outbox_history",
            Column("id", BigInteger, primary_key=True, autoincrement=False),
            *_record_columns(),
            Column("delivered_at", time_type(), nullable=False),
            # Retention takes the oldest first, in chunks.
            Index(f"ix_{prefix}outbox_history_delivered", "delivered_at"),
        )
        self.members = self._table(
            "member",
            Column("owner", name_type(), primary_key=True),
            Column("kind", name_type(), primary_key=True),
            Column("seen_until", time_type(), nullable=False),
            postgresql_with=_UPDATED_ALL_THE_TIME,
        )
        self.inbox = self._table(
            "inbox",
            Column("consumer", name_type(), nullable=False),
            Column("source", name_type(), nullable=False),
            Column("message_id", name_type(), nullable=False),
            Column("handled_at", time_type(), nullable=False),
            PrimaryKeyConstraint("consumer", "source", "message_id"),
            # Retention takes the oldest first, in chunks.
            Index(f"ix_{prefix}inbox_handled", "handled_at"),
        )
        self.inbox_parked = self._table(
            "inbox_parked",
            Column("id", id_type(), Identity(always=False), primary_key=True),
            Column("consumer", name_type(), nullable=False),
            Column("source", name_type(), nullable=False),
            Column("message_id", name_type(), nullable=False),
            Column("topic", name_type(), nullable=False),
            Column("key", name_type(), nullable=True),
            Column("type", name_type(), nullable=False),
            Column("headers", long_text_type(), nullable=False),
            Column("body", body_type(), nullable=False),
            Column("error", long_text_type(), nullable=False),
            Column("attempts", Integer, nullable=False),
            Column("parked_at", time_type(), nullable=False),
            Column("retry_requested", SmallInteger, nullable=False, server_default="0"),
            Column("held", SmallInteger, nullable=False, server_default="0"),
            Column("retries", Integer, nullable=False, server_default="0"),
            UniqueConstraint("consumer", "source", "message_id", name=f"uq_{prefix}inbox_parked_message"),
            # Workers look for what an operator wants retried, and for the first of a key.
            Index(f"ix_{prefix}inbox_parked_retry", "retry_requested", "id"),
            Index(f"ix_{prefix}inbox_parked_key", "consumer", "topic", "key", "id"),
            sqlite_autoincrement=_NEVER_AGAIN,
        )
        self.inbox_holds = self._table(
            "inbox_hold",
            Column("consumer", name_type(), nullable=False),
            Column("topic", name_type(), nullable=False),
            Column("key", name_type(), nullable=False),
            Column("since", time_type(), nullable=False),
            PrimaryKeyConstraint("consumer", "topic", "key"),
        )
        self.marks = self._table(
            "worker_mark",
            Column("group_name", name_type(), nullable=False),
            Column("topic", name_type(), nullable=False),
            Column("part", Integer, nullable=False, autoincrement=False),
            Column("owner", name_type(), nullable=False),
            Column("until_position", BigInteger, nullable=False),
            Column("suspect", BigInteger, nullable=True),
            Column("crashes", long_text_type(), nullable=False),
            PrimaryKeyConstraint("group_name", "topic", "part"),
            postgresql_with=_UPDATED_ALL_THE_TIME,
        )
        self.idempotency = self._table(
            "idempotency",
            Column("key", name_type(), primary_key=True),
            Column("fingerprint", name_type(), nullable=False),
            Column("result", body_type(), nullable=True),
            Column("created_at", time_type(), nullable=False),
            # Retention takes the oldest first, in chunks.
            Index(f"ix_{prefix}idempotency_created", "created_at"),
        )
        self.operator_log = self._table(
            "operator_log",
            Column("id", id_type(), Identity(always=False), primary_key=True),
            Column("done_at", time_type(), nullable=False),
            Column("who", name_type(), nullable=False),
            Column("action", name_type(), nullable=False),
            Column("kind", name_type(), nullable=False),
            Column("record_id", BigInteger, nullable=False),
            # How often a record was retried is counted wherever it is listed.
            Index(f"ix_{prefix}operator_log_record", "record_id"),
            sqlite_autoincrement=_NEVER_AGAIN,
        )
        self.schema_version = self._table(
            "schema",
            Column("name", name_type(), primary_key=True),
            Column("version", Integer, nullable=False),
        )
        self.insert_record = DriverInsert(self.outbox.insert().values(written_at=DatabaseNow()), RECORD_COLUMNS)
        self.log: LogTables = define_log_tables(self.metadata, schema, prefix)
        for table in self.all():
            event.listen(table, "after_create", set_storage)

    def all(self) -> Sequence[Table]:
        """Every table, in an order in which they can be created."""
        return (
            self.schema_version,
            self.outbox,
            self.lanes,
            self.holds,
            self.parked,
            self.history,
            self.members,
            self.inbox,
            self.inbox_parked,
            self.inbox_holds,
            self.marks,
            self.idempotency,
            self.operator_log,
            *self.log.all(),
        )

    def leave_out(
        self, object_: SchemaItem, name: str | None, type_: str, reflected: bool, compare_to: SchemaItem | None
    ) -> bool:
        """For Alembic's `include_object`, where `cqrs-decor db upgrade` makes them: Alembic must not see them."""
        table = object_ if type_ == "table" else getattr(object_, "table", None)
        return getattr(table, "name", None) not in self._names

    @property
    def _names(self) -> frozenset[str]:
        return frozenset(table.name for table in self.all())

    def _table(self, name: str, *items: SchemaItem, **options: Any) -> Table:
        return Table(
            f"{self.prefix}{name}",
            self.metadata,
            *items,
            schema=self.schema,
            mysql_engine="InnoDB",
            mariadb_engine="InnoDB",
            **options,
        )


def leave_out_our_tables(
    object_: SchemaItem, name: str | None, type_: str, reflected: bool, compare_to: SchemaItem | None
) -> bool:
    """`context.configure(..., include_object=leave_out_our_tables)`; with a prefix of your own: `Tables.leave_out`."""
    return _DEFAULT.leave_out(object_, name, type_, reflected, compare_to)


def _record_columns() -> list[Column[Any]]:
    """What is kept of an envelope, wherever its record stands."""
    return [
        Column("lane", SmallInteger, nullable=False),
        Column("message_id", name_type(), nullable=False),
        Column("source", name_type(), nullable=False),
        Column("type", name_type(), nullable=False),
        Column("version", Integer, nullable=False),
        Column("topic", name_type(), nullable=False),
        Column("key", name_type(), nullable=True),
        Column("content_type", name_type(), nullable=False),
        Column("headers", long_text_type(), nullable=False),
        Column("body", body_type(), nullable=False),
        Column("written_at", time_type(), nullable=False),
    ]


# SQLite gives an id again once the rows with the highest ones are deleted, unless it is told not to.
_NEVER_AGAIN = True
# Vacuum by count and not by share of the table: it is empty at most times and holds millions of rows at some.
_EMPTIED_ALL_THE_TIME = {
    "autovacuum_vacuum_scale_factor": "0",
    "autovacuum_vacuum_threshold": "5000",
    "autovacuum_vacuum_cost_delay": "0",
    "autovacuum_analyze_scale_factor": "0",
    "autovacuum_analyze_threshold": "50000",
}
# Room on each page lets PostgreSQL replace these few, ever changing rows in place (heap-only tuples).
_UPDATED_ALL_THE_TIME = {
    "fillfactor": "50",
    "autovacuum_vacuum_scale_factor": "0",
    "autovacuum_vacuum_threshold": "500",
}

_DEFAULT = Tables()
