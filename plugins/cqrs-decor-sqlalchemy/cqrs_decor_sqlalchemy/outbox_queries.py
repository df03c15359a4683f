"""The statements on the way of a record, by name, for one set of tables and one database."""

from sqlalchemy import (
    Function,
    SmallInteger,
    bindparam,
    delete,
    exists,
    func,
    insert,
    literal,
    not_,
    or_,
    select,
    update,
)

from cqrs_decor_sqlalchemy.columns import DatabaseLater, DatabaseNow, among, delete_among, not_among, time_type
from cqrs_decor_sqlalchemy.tables import RECORD_COLUMNS, Tables


class OutboxQueries:
    """Built once per store, so that SQLAlchemy compiles each statement once.

    Parameters: `lanes`, `ids` and `in_flight` are lists; `seconds` is added to the database's own time.
    """

    def __init__(self, tables: Tables, dialect: str) -> None:
        outbox, lanes, holds, parked = tables.outbox.c, tables.lanes.c, tables.holds.c, tables.parked.c
        ours = among(lanes.lane, "lanes", dialect, SmallInteger())

        # --- claim. The time is read once, with the lanes: were it read per record, an earlier record of a key could be
        # found not yet due and a later one due.

        self.look_at_lanes = select(
            lanes.lane, lanes.fence, DatabaseNow().label("now"), *_planner_settings(dialect)
        ).where(ours)

        # The primary key, read in its order until there are enough, past the records of others' lanes; for each record
        # index (lane, topic, key, record_id) of the holds.
        now = bindparam("now", type_=time_type())
        held_back = exists().where(
            holds.lane == outbox.lane,
            holds.topic == outbox.topic,
            holds.key == outbox.key,
            holds.record_id <= outbox.id,
            or_(holds.due_at.is_(None), holds.due_at > now),
        )
        is_due = or_(outbox.due_at.is_(None), outbox.due_at <= now)
        self.claim = (
            select(outbox.id, *(outbox[name] for name in RECORD_COLUMNS), outbox.attempts)
            .where(
                # SQLite takes an index for every column that stands alone, and sorts all pending records afterwards.
                among(outbox.lane + 0 if dialect == "sqlite" else outbox.lane, "lanes", dialect, SmallInteger()),
                is_due,
                not_(held_back),
            )
            .order_by(outbox.id)
            .limit(bindparam("limit"))
            .with_hint(tables.outbox, "FORCE INDEX (PRIMARY)", "mysql")
            .with_hint(tables.outbox, "FORCE INDEX (PRIMARY)", "mariadb")
        )
        self.claim_beside = self.claim.where(not_among(outbox.id, "in_flight", dialect))

        # --- step: for each lane index (lane, id), from its beginning to the first that is due

        first = (
            select(outbox.id)
            .where(
                outbox.lane == lanes.lane,
                outbox.id >= lanes.low_id,
                outbox.id <= bindparam("until"),
                is_due,
                not_(held_back),
            )
            .order_by(outbox.id)
            .limit(1)
            .correlate(tables.lanes)
            .scalar_subquery()
        )
        # By primary key; what is before it in its lane, by index (lane, id).
        earlier = tables.outbox.alias("earlier").c
        low_id = select(lanes.low_id).where(lanes.lane == outbox.lane).correlate(tables.outbox).scalar_subquery()
        of_its_key_before = exists().where(
            earlier.lane == outbox.lane,
            earlier.id >= low_id,
            earlier.id < outbox.id,
            earlier.topic == outbox.topic,
            earlier.key == outbox.key,
        )
        self.accused = select(outbox.id, outbox.lane).where(
            among(outbox.id, "ids", dialect), is_due, not_(held_back), not_(of_its_key_before)
        )
        # Not as a join on that id: PostgreSQL may then take each pair of lane and record, and look at the beginning of
        # the lane for each: minutes at 40,000 records.
        self.firsts = select(first.label("id")).select_from(tables.lanes).where(ours)
        self.records = (
            select(outbox.id, *(outbox[name] for name in RECORD_COLUMNS), outbox.attempts)
            .where(among(outbox.id, "ids", dialect))
            .order_by(outbox.id)
        )
        self.prepare_step = select(DatabaseNow(), *_planner_settings(dialect))

        # --- settle: all by primary key

        kept = [*RECORD_COLUMNS, "written_at"]
        self.keep = insert(tables.history).from_select(
            ["id", *kept, "delivered_at"],
            select(outbox.id, *(outbox[name] for name in kept), DatabaseNow()).where(among(outbox.id, "ids", dialect)),
        )
        self.keep_behind = insert(tables.history).from_select(
            ["id", *kept, "delivered_at"],
            select(parked.id, *(parked[name] for name in kept), DatabaseNow()).where(
                among(parked.id, "ids", dialect), parked.behind.is_not(None)
            ),
        )
        self.delete_records = delete_among(tables.outbox, dialect)
        self.delete_behind = delete(tables.parked).where(among(parked.id, "ids", dialect), parked.behind.is_not(None))
        self.delete_holds = delete(tables.holds).where(among(holds.record_id, "ids", dialect))
        self.existing = select(outbox.id, outbox.attempts).where(among(outbox.id, "ids", dialect))
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
                among(outbox.id, "ids", dialect), outbox.key.is_not(None)
            ),
        )

        # --- backlog: both ends of the primary key; the exact count stops early

        beginning = outbox.id >= select(func.min(lanes.low_id)).scalar_subquery()
        counted = select(literal(1)).select_from(tables.outbox).where(beginning).limit(bindparam("limit")).subquery()
        self.count_pending = select(func.count()).select_from(counted)
        self.span = select(func.max(outbox.id) - func.min(outbox.id) + 1).where(beginning)
        self.oldest = select(outbox.written_at).where(beginning).order_by(outbox.id).limit(1)
        # Index (behind, id) of the parked ones.
        self.count_parked = select(func.count()).select_from(tables.parked).where(parked.behind.is_(None))
        self.count_behind = select(func.count(), func.min(parked.written_at), DatabaseNow()).where(
            parked.behind.is_not(None)
        )


def _planner_settings(dialect: str) -> list[Function[str]]:
    """Settings for the rest of the transaction, at no round trip of their own.

    The table is filled and emptied all the time, so that its statistics are wrong more often than not. PostgreSQL then
    sorts all that waits to find its beginning: 66 ms instead of 0.6 ms at 20,000 records, and it grows with them; or it
    reads the primary key where a lane's index is meant, since that looks as good while the table is small, and keeps
    the plan, or since it fears to fetch pages in another order than they have: 900 ms instead of 2 ms at 1,000,000.
    What it could win by several processes it loses by starting them.
    """
    if dialect != "postgresql":
        return []
    settings = {
        **dict.fromkeys(("enable_sort", "enable_bitmapscan", "enable_seqscan", "jit"), "off"),
        **dict.fromkeys(("seq_page_cost", "random_page_cost", "max_parallel_workers_per_gather"), "0"),
        "plan_cache_mode": "force_custom_plan",
    }
    return [func.set_config(name, value, True) for name, value in settings.items()]
