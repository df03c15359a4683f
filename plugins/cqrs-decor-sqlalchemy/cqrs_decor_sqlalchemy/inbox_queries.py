"""The statements of the inbox, by name, for one set of tables and one database."""

from collections.abc import Callable
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Exists,
    Insert,
    Table,
    Text,
    bindparam,
    delete,
    exists,
    func,
    not_,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.dialects.postgresql import ARRAY

from cqrs_decor_sqlalchemy.columns import DatabaseNow
from cqrs_decor_sqlalchemy.driver_insert import DriverInsert
from cqrs_decor_sqlalchemy.tables import Tables

_Upsert = mysql.Insert | postgresql.Insert | sqlite.Insert

INSERTS: dict[str, Callable[[Table], _Upsert]] = {
    "mysql": mysql.insert,
    "postgresql": postgresql.insert,
    "sqlite": sqlite.insert,
}
"""INSERT with what each database has for rows that are there already."""


class InboxQueries:
    """Built once per store, so that SQLAlchemy compiles each statement once.

    Locks are taken in one order: holds by (consumer, topic, key), then parked messages by id. A parked message with a
    key is changed only under the hold of its key. A hold is locked by an UPDATE that changes nothing and not by
    SELECT ... FOR UPDATE: then a transaction with a snapshot from before cannot overlook what was put behind meanwhile;
    it fails and is run again.

    Parameters: `ids`, `consumers`, `keys` (topic, key), `lines` (consumer, topic, key) and `messages` (source, id) are
    lists.
    """

    def __init__(self, tables: Tables, dialect: str) -> None:
        inbox, parked, holds = tables.inbox.c, tables.inbox_parked.c, tables.inbox_holds.c
        line = (parked.consumer, parked.topic, parked.key)
        message = (parked.consumer, parked.source, parked.message_id)
        ids = parked.id.in_(bindparam("ids", expanding=True, type_=BigInteger()))

        # --- note: primary key (consumer, source, message_id), for which a second one waits until the first has ended;
        # primary key (consumer, topic, key) of the holds

        self.record = _insert_unless_held(tables, dialect)
        self.record_all = _insert_all_unless_held(tables)
        self.note = _insert_if_new(tables, dialect)
        self.note_all = tables.inbox.insert()
        self.had = select(inbox.message_id).where(*_equal(inbox.consumer, inbox.source, inbox.message_id))
        self.had_of_all = select(inbox.source, inbox.message_id).where(
            *_equal(inbox.consumer),
            tuple_(inbox.source, inbox.message_id).in_(bindparam("messages", expanding=True)),
        )
        self.held = select(holds.key).where(*_equal(holds.consumer, holds.topic, holds.key))
        self.held_of_all = select(holds.topic, holds.key).where(
            *_equal(holds.consumer), tuple_(holds.topic, holds.key).in_(bindparam("keys", expanding=True))
        )
        self.now = select(DatabaseNow())

        # --- park

        self.hold = _hold_or_lock(tables, dialect)
        # An UPDATE takes a parameter with the name of a column for a value to set.
        self.lock_hold = (
            update(tables.inbox_holds)
            .where(*(column == bindparam(f"its_{column.name}") for column in (holds.consumer, holds.topic, holds.key)))
            .values(since=holds.since)
        )
        # Unique (consumer, source, message_id).
        self.parked_as = select(parked.id).where(*_equal(*message))
        self.park = _replace_parked(tables, dialect)
        self.keep_behind = tables.inbox_parked.insert().values(held=1)

        # --- retry: primary key; index (consumer, topic, key, id)

        self.line_of = select(*line).where(parked.id == bindparam("parked_id"))
        self.take_out = delete(tables.inbox_parked).where(parked.id == bindparam("parked_id"))
        self.first_of_line = select(parked.id).where(*_equal(*line)).order_by(parked.id).limit(1).with_for_update()
        self.ask_for_next = (
            update(tables.inbox_parked).where(parked.id == bindparam("next_id")).values(retry_requested=1, held=0)
        )
        self.release = delete(tables.inbox_holds).where(*_equal(holds.consumer, holds.topic, holds.key))
        earlier = tables.inbox_parked.alias("earlier")
        is_first = not_(
            exists().where(
                earlier.c.consumer == parked.consumer,
                earlier.c.topic == parked.topic,
                earlier.c.key == parked.key,
                earlier.c.id < parked.id,
            )
        )
        # Index (retry_requested, id).
        self.retries = (
            select(tables.inbox_parked)
            .where(parked.retry_requested == 1, parked.consumer.in_(bindparam("consumers", expanding=True)), is_first)
            .order_by(parked.id)
            .limit(bindparam("limit"))
        )

        # --- operators: primary keys

        self.parked = select(tables.inbox_parked).order_by(parked.id)
        self.count = select(func.count()).select_from(tables.inbox_parked)
        self.lines = select(parked.id, *line).where(ids)
        self.unasked_lines = _unasked(self.lines, tables)
        self.lock_holds = (
            select(holds.key)
            .where(
                tuple_(holds.consumer, holds.topic, holds.key).in_(bindparam("lines", expanding=True)),
            )
            .order_by(holds.consumer, holds.topic, holds.key)
            .with_for_update()
        )
        self.lock = self.lines.order_by(parked.id).with_for_update()
        self.lock_unasked = _unasked(self.lock, tables)
        self.ask = update(tables.inbox_parked).where(ids).values(retry_requested=1, retries=parked.retries + 1)
        self.delete = delete(tables.inbox_parked).where(ids)
        self.note_action = tables.operator_log.insert().values(done_at=DatabaseNow())


def _equal(*columns: ColumnElement[Any]) -> list[ColumnElement[bool]]:
    """Each column is what the parameter of its name says."""
    return [column == _given(column) for column in columns]


def _given(column: Any) -> Any:
    return bindparam(column.name, type_=column.type)


def _unasked(query: Any, tables: Tables) -> Any:
    parked = tables.inbox_parked.c
    return query.where(parked.retry_requested == 0, parked.held == 0)


def _is_held(tables: Tables, consumer: Any, topic: Any, key: Any) -> Exists:
    holds = tables.inbox_holds.c
    return exists().where(holds.consumer == consumer, holds.topic == topic, holds.key == key)


def _insert_if_new(tables: Tables, dialect: str) -> Insert:
    """MySQL gets a plain INSERT: IGNORE hides other errors, and its drivers count an unchanged duplicate as a row."""
    insert = INSERTS[dialect](tables.inbox).values(handled_at=DatabaseNow())
    if not isinstance(insert, mysql.Insert):
        insert = insert.on_conflict_do_nothing()
    return insert.execution_options(preserve_rowcount=True)


def _insert_unless_held(tables: Tables, dialect: str) -> DriverInsert:
    """One statement for note and look. Not on MySQL: there the look would lock the gap in which a hold would stand."""
    inbox, holds = tables.inbox.c, tables.inbox_holds.c
    insert = INSERTS[dialect](tables.inbox)
    if isinstance(insert, mysql.Insert):
        return DriverInsert(_insert_if_new(tables, dialect), ("consumer", "source", "message_id"))
    held = _is_held(tables, _given(holds.consumer), _given(holds.topic), _given(holds.key))
    columns = [_given(inbox.consumer), _given(inbox.source), _given(inbox.message_id), DatabaseNow()]
    unless_held = insert.from_select(_INBOX_COLUMNS, select(*columns).where(not_(held)))
    return DriverInsert(unless_held.on_conflict_do_nothing())


def _insert_all_unless_held(tables: Tables) -> Insert:
    """For PostgreSQL, which has arrays: `sources`, `message_ids`, `topics` and `keys`, one element for each message."""
    inbox = tables.inbox.c
    names = ("sources", "message_ids", "topics", "keys")
    arrays = [bindparam(name, type_=ARRAY(Text())) for name in names]
    messages = func.unnest(*arrays).table_valued("source", "message_id", "topic", "key", name="m").render_derived()
    held = _is_held(tables, _given(inbox.consumer), messages.c.topic, messages.c.key)
    return (
        postgresql.insert(tables.inbox)
        .from_select(
            _INBOX_COLUMNS,
            select(_given(inbox.consumer), messages.c.source, messages.c.message_id, DatabaseNow())
            .where(not_(held))
            .order_by(messages.c.source, messages.c.message_id),
        )
        .on_conflict_do_nothing()
        .returning(inbox.source, inbox.message_id)
    )


_INBOX_COLUMNS = ["consumer", "source", "message_id", "handled_at"]


def _hold_or_lock(tables: Tables, dialect: str) -> Insert:
    """Hold a key; where it is held already, lock its hold."""
    holds = tables.inbox_holds
    insert = INSERTS[dialect](holds).values(since=DatabaseNow())
    if isinstance(insert, mysql.Insert):
        return insert.on_duplicate_key_update(since=holds.c.since)
    return insert.on_conflict_do_update(
        index_elements=[holds.c.consumer, holds.c.topic, holds.c.key], set_={"since": holds.c.since}
    )


def _replace_parked(tables: Tables, dialect: str) -> Insert:
    """Id, place and the number of retries stay."""
    table = tables.inbox_parked
    replaced = ("error", "attempts", "parked_at", "topic", "key", "type", "headers", "body")
    insert = INSERTS[dialect](table)
    if isinstance(insert, mysql.Insert):
        return insert.on_duplicate_key_update({name: insert.inserted[name] for name in replaced} | _FAILED)
    return insert.on_conflict_do_update(
        index_elements=[table.c.consumer, table.c.source, table.c.message_id],
        set_={name: insert.excluded[name] for name in replaced} | _FAILED,
    )


_FAILED: dict[str, Any] = {"retry_requested": 0, "held": 0}
