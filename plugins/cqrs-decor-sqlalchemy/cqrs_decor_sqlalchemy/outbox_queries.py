"""The statements of the outbox, by name, for one set of tables and one database."""

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Function,
    SmallInteger,
    Text,
    any_,
    bindparam,
    delete,
    exists,
    func,
    insert,
    literal,
    not_,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.types import TypeEngine

from cqrs_decor_sqlalchemy.columns import DatabaseLater, DatabaseNow
from cqrs_decor_sqlalchemy.tables import RECORD_COLUMNS, Tables


class OutboxQueries:
    """Built once per store, so that SQLAlchemy compiles each statement once.

    Parameters: `lanes`, `ids` and `in_flight` are lists; `seconds` is added to the database's own time.
    """

    def __init__(self, tables: Tables, dialect: str) -> None:
        outbox, lanes, holds, parked = tables.outbox.c, tables.lanes.c, tables.holds.c, tables.parked.c
        self._arrays = dialect == "postgresql"

        # --- lanes: found by primary key; locked in the order of their numbers, so that no two can wait for each other

        self.free_lanes = (
            select(lanes.lane, lanes.fence)
            .where(or_(lanes.owner.is_(None), lanes.lease_until <= DatabaseNow()))
            .order_by(lanes.lane)
            .limit(bindparam("limit"))
            .with_for_update(skip_locked=True)
        )
        self.lock_lanes = (
            select(lanes.lane, lanes.fence, lanes.owner)
            .where(self._among(lanes.lane, "lanes", SmallInteger()))
            .order_by(lanes.lane)
            .with_for_update()
        )
        self.look_at_lanes = select(lanes.lane, lanes.fence, *_planner_settings(dialect)).where(
            self._among(lanes.lane, "lanes", SmallInteger())
        )
        self.take_lanes = (
            update(tables.lanes)
            .where(self._among(lanes.lane, "lanes", SmallInteger()))
            .values(owner=bindparam("new_owner"), fence=lanes.fence + 1, lease_until=DatabaseLater("seconds"))
        )
        self.renew_lanes = (
            update(tables.lanes)
            .where(self._among(lanes.lane, "lanes", SmallInteger()))
            .values(lease_until=DatabaseLater("seconds"))
        )
        self.free_lanes_again = (
            update(tables.lanes)
            .where(self._among(lanes.lane, "lanes", SmallInteger()))
            .values(owner=null(), lease_until=null(), claimed_first=null(), claimed_last=null())
        )

        # --- claim: the primary key, read in its order until there are enough, past the records of others' lanes; for
        # each record index (lane, topic, key, record_id) of the holds. The time is read once: were it read per record,
        # an earlier record of a key could be found not yet due and a later one due.

        moment = select(DatabaseNow()).scalar_subquery()
        held_back = exists().where(
            holds.lane == outbox.lane,
            holds.topic == outbox.topic,
            holds.key == outbox.key,
            holds.record_id <= outbox.id,
            or_(holds.due_at.is_(None), holds.due_at > moment),
        )
        self.claim = (
            select(outbox.id, *(outbox[name] for name in RECORD_COLUMNS), outbox.attempts)
            .where(
                # SQLite takes an index for every column that stands alone, and sorts all pending records afterwards.
                self._among(outbox.lane + 0 if dialect == "sqlite" else outbox.lane, "lanes", SmallInteger()),
                or_(outbox.due_at.is_(None), outbox.due_at <= moment),
                not_(held_back),
            )
            .order_by(outbox.id)
            .limit(bindparam("limit"))
            .with_hint(tables.outbox, "FORCE INDEX (PRIMARY)", "mysql")
            .with_hint(tables.outbox, "FORCE INDEX (PRIMARY)", "mariadb")
        )
        self.claim_beside = self.claim.where(self._not_among(outbox.id, "in_flight"))

        # --- settle: all by primary key

        self.delete_records = delete(tables.outbox).where(self._among(outbox.id, "ids"))
        self.delete_holds = delete(tables.holds).where(self._among(holds.record_id, "ids"))
        self.existing = select(outbox.id).where(self._among(outbox.id, "ids"))
        self.reschedule = (
            update(tables.outbox)
            .where(outbox.id == bindparam("failed_id"))
            .values(
                attempts=outbox.attempts + 1,
                error=bindparam("reason"),
                due_at=DatabaseLater("seconds"),
            )
        )
        # A hold is due exactly when its record is, so that no later record can be due before it.
        self.hold_rescheduled = insert(tables.holds).from_select(
            ["record_id", "lane", "topic", "key", "due_at"],
            select(outbox.id, outbox.lane, outbox.topic, outbox.key, outbox.due_at).where(
                self._among(outbox.id, "ids"), outbox.key.is_not(None)
            ),
        )
        kept = ["id", *RECORD_COLUMNS, "written_at"]
        self.park = insert(tables.parked).from_select(
            [*kept, "attempts", "error", "parked_at"],
            select(
                *(outbox[name] for name in kept),
                outbox.attempts + 1,
                bindparam("reason", type_=Text()),
                DatabaseNow(),
            ).where(outbox.id == bindparam("failed_id")),
        )
        self.hold_parked = insert(tables.holds).from_select(
            ["record_id", "lane", "topic", "key"],
            select(parked.id, parked.lane, parked.topic, parked.key).where(
                self._among(parked.id, "ids"), parked.key.is_not(None)
            ),
        )

        # --- operators

        # Primary keys.
        self.parked_lanes = select(parked.id, parked.lane).where(self._among(parked.id, "ids"))
        self.failed_lanes = select(outbox.id, outbox.lane).where(self._among(outbox.id, "ids"), outbox.attempts > 0)
        self.put_back = insert(tables.outbox).from_select(
            [*kept, "attempts"],
            select(*(parked[name] for name in kept), literal(0)).where(self._among(parked.id, "ids")),
        )
        self.delete_parked = delete(tables.parked).where(self._among(parked.id, "ids"))
        self.note_action = insert(tables.operator_log).values(done_at=DatabaseNow())

        # Both ends of the primary key; the exact count stops early.
        counted = select(literal(1)).select_from(tables.outbox).limit(bindparam("limit")).subquery()
        self.count_pending = select(func.count()).select_from(counted)
        self.span = select(func.max(outbox.id) - func.min(outbox.id) + 1)
        self.oldest = select(outbox.written_at, DatabaseNow()).order_by(outbox.id).limit(1)
        self.count_parked = select(func.count()).select_from(tables.parked)

    def _among(self, column: ColumnElement[int], name: str, kind: TypeEngine[int] | None = None) -> ColumnElement[bool]:
        """`= ANY` of an array where there are arrays: one text for any number of ids, and the index keeps its order."""
        if self._arrays:
            return column == any_(bindparam(name, type_=ARRAY(kind or BigInteger())))
        return column.in_(bindparam(name, expanding=True, literal_execute=True, type_=BigInteger()))

    def _not_among(self, column: ColumnElement[int], name: str) -> ColumnElement[bool]:
        """PostgreSQL hashes the ids of a subquery once; it would compare `<> ALL` of an array one by one."""
        if self._arrays:
            return column.not_in(select(func.unnest(bindparam(name, type_=ARRAY(BigInteger())))))
        return column.not_in(bindparam(name, expanding=True, literal_execute=True, type_=BigInteger()))


def _planner_settings(dialect: str) -> list[Function[str]]:
    """Settings for the rest of the transaction, at no round trip of their own.

    The table is filled and emptied all the time, so that its statistics are wrong more often than not. PostgreSQL then
    sorts all that waits to find its beginning: 66 ms instead of 0.6 ms at 20,000 records, and it grows with them.
    """
    if dialect != "postgresql":
        return []
    return [func.set_config(name, "off", True) for name in ("enable_sort", "enable_bitmapscan", "jit")]
