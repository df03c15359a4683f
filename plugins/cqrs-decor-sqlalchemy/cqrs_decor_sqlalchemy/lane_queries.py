"""The statements about lanes and those who share them, by name, for one set of tables and one database."""
# ruff: noqa: S608 - what is put together are names of tables, quoted

from typing import Any

from sqlalchemy import (
    BigInteger,
    Float,
    SmallInteger,
    Text,
    TextClause,
    bindparam,
    case,
    delete,
    exists,
    func,
    literal,
    null,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.dialects.postgresql import ARRAY

from cqrs_decor_sqlalchemy.columns import DatabaseLater, DatabaseNow, among
from cqrs_decor_sqlalchemy.frozen_sessions import IDLE_LIMIT
from cqrs_decor_sqlalchemy.lower_bound import PUT_BACK
from cqrs_decor_sqlalchemy.tables import Tables

_RELAY = "relay"
"""The kind of a member that shares the lanes of the outbox."""


class LaneQueries:
    """Built once per store, so that SQLAlchemy compiles each statement once.

    Parameters: `lanes` is a list of numbers; `seconds` is added to the database's own time.
    """

    def __init__(self, tables: Tables, dialect: str) -> None:
        lanes, members, outbox, holds = tables.lanes.c, tables.members.c, tables.outbox.c, tables.holds.c
        ours = among(lanes.lane, "lanes", dialect, SmallInteger())

        # --- lanes: found by primary key; locked in the order of their numbers, so that no two can wait for each other

        self.free = (
            select(lanes.lane, lanes.fence, lanes.owner, lanes.marked, lanes.crashes, lanes.stepping)
            .where(or_(lanes.owner.is_(None), lanes.lease_until <= DatabaseNow()))
            .order_by(lanes.lane)
            .limit(bindparam("limit"))
            .with_for_update(skip_locked=True)
        )
        self.lock = (
            select(lanes.lane, lanes.fence, lanes.owner, lanes.marked, lanes.crashes, lanes.seen_id)
            .where(ours)
            .order_by(lanes.lane)
            .with_for_update()
        )
        self.take = (
            update(tables.lanes)
            .where(ours)
            .values(
                owner=bindparam("new_owner"),
                fence=lanes.fence + 1,
                lease_until=DatabaseLater("seconds"),
                crashes=lanes.crashes + lanes.stepping,
                stepping=0,
            )
        )
        self.extend = update(tables.lanes).where(ours).values(lease_until=DatabaseLater("seconds"))
        put_down: dict[str, Any] = {"marked": case((lanes.crashes > 0, lanes.marked), else_=null()), "stepping": 0}
        self.give_back = update(tables.lanes).where(ours).values(owner=null(), lease_until=null(), **put_down)
        self.mark = (
            update(tables.lanes)
            .where(lanes.lane == bindparam("number"))
            .values(marked=bindparam("in_hand"), crashes=bindparam("count"), stepping=1)
        )
        self.unmark = update(tables.lanes).where(ours).values(**put_down)
        self.acquit = update(tables.lanes).where(ours).values(marked=null(), crashes=0, stepping=0)
        first = bindparam("first", type_=BigInteger())
        self.lower = (
            update(tables.lanes)
            .where(lanes.lane == bindparam("number"))
            .values(low_id=case((lanes.low_id > first, first), else_=lanes.low_id), seen_id=PUT_BACK)
        )
        self.all = select(lanes.lane, lanes.owner, lanes.lease_until, DatabaseNow().label("now")).order_by(lanes.lane)

        # --- what one who vanished may have had in hand: what nothing kept from being claimed; by index (lane, id)

        in_lane = [outbox.lane == lanes.lane, outbox.id >= lanes.low_id]
        held = exists().where(
            holds.lane == outbox.lane,
            holds.topic == outbox.topic,
            holds.key == outbox.key,
            holds.record_id <= outbox.id,
        )
        nth = (
            select(outbox.id)
            .where(*in_lane, outbox.attempts == 0, ~held)
            .order_by(outbox.id)
            .limit(1)
            .offset(bindparam("before"))
            .scalar_subquery()
        )
        last = select(outbox.id).where(*in_lane).order_by(outbox.id.desc()).limit(1).scalar_subquery()
        self.reach = select(lanes.lane, func.coalesce(nth, last).label("until")).where(ours)
        self.existing = select(outbox.id).where(among(outbox.id, "ids", dialect))

        # --- members: a few rows

        relays = members.kind == _RELAY
        self.take_part = _take_part(tables, dialect)
        self.leave = delete(tables.members).where(relays, members.owner == bindparam("member"))
        self.forget = delete(tables.members).where(relays, members.seen_until <= DatabaseNow())
        self.relays = select(members.owner).where(relays, members.seen_until > DatabaseNow()).order_by(members.owner)
        # Index (lane, id) of the outbox.
        self.waiting = select(exists().where(among(outbox.lane, "lanes", dialect, SmallInteger())))


def renewal(tables: Tables, named: Any) -> TextClause:
    """Everything about a sign of life in one statement, for PostgreSQL.

    Parameters: lanes, fences, owner, seconds, idle_limit_ms (as text), channel, echo. Indexes: primary keys of lanes
    and members, (lane, id) of the outbox. The order within LATERAL keeps the planner from reading a large, empty table
    from its beginning.
    """
    lanes, members, outbox = named(tables.lanes), named(tables.members), named(tables.outbox)
    return text(
        f"""
        WITH mine AS (
            SELECT lane, fence
            FROM {lanes}
            WHERE lane = ANY(:lanes) AND owner = :owner
            ORDER BY lane
            FOR UPDATE
        ), held AS (
            UPDATE {lanes} AS lanes
            SET lease_until = clock_timestamp() + make_interval(secs => :seconds)
            FROM mine
            JOIN unnest(:lanes, :fences) AS known (lane, fence) ON known.lane = mine.lane AND known.fence = mine.fence
            WHERE lanes.lane = mine.lane
            RETURNING lanes.lane, lanes.low_id
        ), myself AS (
            INSERT INTO {members} (owner, kind, seen_until)
            VALUES (:owner, '{_RELAY}', clock_timestamp() + make_interval(secs => :seconds))
            ON CONFLICT (owner, kind) DO UPDATE SET seen_until = excluded.seen_until
        )
        SELECT
            ARRAY(SELECT lane FROM held) AS lanes,
            1 + (
                SELECT count(*)
                FROM {members}
                WHERE kind = '{_RELAY}' AND owner <> :owner AND seen_until > clock_timestamp()
            ) AS relays,
            EXISTS (
                SELECT
                FROM held
                CROSS JOIN LATERAL (
                    SELECT FROM {outbox} AS record
                    WHERE record.lane = held.lane AND record.id >= held.low_id
                    ORDER BY record.id
                    LIMIT 1
                ) AS first
            ) AS waiting,
            set_config('{IDLE_LIMIT}', :idle_limit_ms, true),
            pg_notify(:channel, :echo)
        """
    ).bindparams(
        bindparam("lanes", type_=ARRAY(SmallInteger())),
        bindparam("fences", type_=ARRAY(BigInteger())),
        bindparam("seconds", type_=Float()),
        bindparam("idle_limit_ms", type_=Text()),
    )


def _take_part(tables: Tables, dialect: str) -> Any:
    insert: Any = {"postgresql": postgresql, "mysql": mysql, "sqlite": sqlite}[dialect].insert(tables.members)
    insert = insert.values(owner=bindparam("member"), kind=literal(_RELAY), seen_until=DatabaseLater("seconds"))
    if dialect == "mysql":
        return insert.on_duplicate_key_update(seen_until=insert.inserted.seen_until)
    keys = [tables.members.c.owner, tables.members.c.kind]
    return insert.on_conflict_do_update(index_elements=keys, set_={"seen_until": insert.excluded.seen_until})
