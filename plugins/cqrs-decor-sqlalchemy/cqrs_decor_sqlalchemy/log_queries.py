"""The statements of the log, by name. Portable SQL; where a database insists on its own words, they are given below."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from sqlalchemy import Dialect, Integer, String, TextClause, bindparam, text
from sqlalchemy.types import TypeEngine

from cqrs_decor_sqlalchemy.log_tables import LogTables


class LogQueries:
    """Every statement that the log sends, for one dialect and one set of table names.

    Parameters are named as the columns they are compared with. `topics` and `lanes` are lists; `lease_ms` is added to
    the database's own time.
    """

    def __init__(self, tables: LogTables, dialect: Dialect) -> None:
        table = dialect.identifier_preparer.format_table
        words = _WORDS[dialect.name]
        self._names = {
            "log": table(tables.log),
            "log_lane": table(tables.lanes),
            "log_position": table(tables.positions),
            "log_reader": table(tables.readers),
            **words,
        }
        self._names["counts"] = _COUNTS.format_map(self._names)
        self.read = lru_cache(maxsize=64)(self._read)

        # --- writing records

        # Primary key (topic, lane). Rows are locked in the order of their lanes, so that two writers cannot wait for
        # each other; SQLite's write lock was taken at BEGIN.
        self.lock_lanes = self._query("""
            SELECT lane, next_position, {now_ms} AS now_ms
            FROM {log_lane}
            WHERE topic = :topic AND lane IN :lanes
            ORDER BY lane
            {for_update}
        """)
        self.add_lane = self._query("""
            INSERT INTO {log_lane} (topic, lane, next_position, first_position)
            VALUES (:topic, :lane, 1, 1)
            {or_leave_lane}
        """)
        self.advance_lane = self._query("""
            UPDATE {log_lane}
            SET next_position = :next_position
            WHERE topic = :topic AND lane = :lane
        """)
        # Nothing but parameters between the brackets: else the MySQL drivers send a statement for each row.
        self.append = self._query("""
            INSERT INTO {log} (topic, lane, position, message_id, source, type, version, partition_key,
                               content_type, attributes, headers, body, written_at_ms)
            VALUES (:topic, :lane, :position, :message_id, :source, :type, :version, :partition_key,
                    :content_type, :attributes, :headers, :body, :written_at_ms)
        """)

        # --- reading records

        self.heads = self._query("""
            SELECT topic, lane, next_position - 1 AS head
            FROM {log_lane}
            WHERE topic IN :topics
        """)
        self.backlog = self._query("""
            SELECT kept.topic, kept.lane, kept.position, written.next_position - 1 AS head
            FROM {log_position} kept
            JOIN {log_lane} written ON written.topic = kept.topic AND written.lane = kept.lane
            WHERE kept.group_name = :group_name AND kept.topic IN :topics
        """)

        # --- groups

        self.count_positions = self._query("""
            SELECT topic, COUNT(*) AS lanes
            FROM {log_position}
            WHERE group_name = :group_name AND topic IN :topics
            GROUP BY topic
        """)
        self.begin_at = {
            "earliest": self._query(_BEGIN_GROUP.replace("{start}", "first_position - 1")),
            "latest": self._query(_BEGIN_GROUP.replace("{start}", "next_position - 1")),
        }
        self.acknowledge = self._query("""
            UPDATE {log_position}
            SET position = :position, crashes = 0
            WHERE group_name = :group_name AND topic = :topic AND lane = :lane
              AND owner = :reader AND fence = :fence AND position < :position
        """)

        # --- sharing lanes

        self.add_reader = self._query("""
            INSERT INTO {log_reader} (group_name, topic, reader, seen_until_ms)
            VALUES (:group_name, :topic, :reader, {now_ms} + :lease_ms)
            {or_see_reader}
        """)
        self.see_reader = self._query("""
            UPDATE {log_reader}
            SET seen_until_ms = {now_ms} + :lease_ms
            WHERE group_name = :group_name AND topic IN :topics AND reader = :reader
        """)
        self.forget_reader = self._query("""
            DELETE FROM {log_reader}
            WHERE group_name = :group_name AND topic IN :topics AND reader = :reader
        """)
        self.forget_vanished_readers = self._query("""
            DELETE FROM {log_reader}
            WHERE group_name = :group_name AND seen_until_ms < {now_ms} - :kept_ms
        """)
        self.living_readers = self._query("""
            SELECT topic, reader
            FROM {log_reader}
            WHERE group_name = :group_name AND topic IN :topics AND seen_until_ms > {now_ms}
        """)
        self.leases = self._query("""
            SELECT kept.topic, kept.lane, kept.position, kept.owner, kept.fence, written.first_position,
                   CASE WHEN kept.owner IS NOT NULL AND kept.lease_until_ms > {now_ms} THEN 1 ELSE 0 END AS held
            FROM {log_position} kept
            JOIN {log_lane} written ON written.topic = kept.topic AND written.lane = kept.lane
            WHERE kept.group_name = :group_name AND kept.topic IN :topics
        """)
        self.renew = self._query("""
            UPDATE {log_position}
            SET lease_until_ms = {now_ms} + :lease_ms
            WHERE group_name = :group_name AND topic IN :topics AND owner = :reader
        """)
        # MySQL assigns from left to right: `crashes` has to look at the owner before it changes.
        self.take = self._query("""
            UPDATE {log_position}
            SET crashes = crashes + CASE WHEN owner IS NULL THEN 0 ELSE 1 END,
                owner = :reader,
                fence = fence + 1,
                lease_until_ms = {now_ms} + :lease_ms
            WHERE group_name = :group_name AND topic = :topic AND lane IN :lanes
              AND (owner IS NULL OR owner = :reader OR lease_until_ms <= {now_ms})
        """)
        # The end of the last lease says when a group was last there.
        self.give_back = self._query("""
            UPDATE {log_position}
            SET owner = NULL, lease_until_ms = {now_ms}
            WHERE group_name = :group_name AND topic = :topic AND lane = :lane AND owner = :reader AND fence = :fence
        """)
        self.give_back_all = self._query("""
            UPDATE {log_position}
            SET owner = NULL, lease_until_ms = {now_ms}
            WHERE group_name = :group_name AND topic IN :topics AND owner = :reader
        """)

        self.progress = self._query("""
            SELECT kept.topic, kept.group_name,
                   SUM(written.next_position - 1 - kept.position) AS waiting
            FROM {log_position} kept
            JOIN {log_lane} written ON written.topic = kept.topic AND written.lane = kept.lane
            WHERE kept.topic IN :topics
            GROUP BY kept.topic, kept.group_name
            ORDER BY kept.topic, kept.group_name
        """)

        # --- retention

        # All lanes, a few for each topic; for each the primary keys of its first record and of its groups' positions.
        self.oldest_done = self._query("""
            SELECT written.topic, written.lane, written.first_position
            FROM {log_lane} written
            JOIN {log} oldest ON oldest.topic = written.topic AND oldest.lane = written.lane
                             AND oldest.position = written.first_position
            WHERE oldest.written_at_ms <= {now_ms} - :kept_ms
              AND NOT EXISTS (
                SELECT 1
                FROM {log_position} kept
                WHERE kept.topic = written.topic AND kept.lane = written.lane
                  AND kept.position < written.first_position
                  AND {counts}
              )
            ORDER BY oldest.written_at_ms, written.topic, written.lane
            LIMIT 1
        """)
        # Whoever takes one of these meanwhile waits, and sees then where the lane begins.
        self.lock_positions = self._query("""
            SELECT kept.group_name, kept.position, CASE WHEN {counts} THEN 1 ELSE 0 END AS counts
            FROM {log_position} kept
            WHERE kept.topic = :topic AND kept.lane = :lane
            ORDER BY kept.group_name
            {for_update}
        """)
        self.oldest = self._query("""
            SELECT position, CASE WHEN written_at_ms <= {now_ms} - :kept_ms THEN 1 ELSE 0 END AS done
            FROM {log}
            WHERE topic = :topic AND lane = :lane AND position >= :first AND position <= :acknowledged
            ORDER BY position
            LIMIT :limit
        """)
        self.delete_before = self._query("""
            DELETE FROM {log}
            WHERE topic = :topic AND lane = :lane AND position >= :first AND position < :next_first
        """)
        self.begin_lane_at = self._query("""
            UPDATE {log_lane}
            SET first_position = :next_first
            WHERE topic = :topic AND lane = :lane
        """)

    def _read(self, lanes: int) -> TextClause:
        """Records of so many lanes: those after `after_N` up to `upto_N` of `topic_N`, `lane_N`, in no order.

        One range of the primary key for each lane. A UNION ALL, since OR makes planners scan the table on a bad day.
        """
        return self._query("UNION ALL".join(_READ_ONE_LANE.replace("_N", f"_{number}") for number in range(lanes)))

    def _query(self, statement: str) -> TextClause:
        clause = text(statement.format_map(self._names))
        for name, kind in _LISTS.items():
            if f":{name}" in statement:
                clause = clause.bindparams(bindparam(name, expanding=True, type_=kind))
        return clause


# PostgreSQL has to know of what type an empty list is.
_LISTS: Mapping[str, TypeEngine[Any]] = {"topics": String(), "lanes": Integer()}

_READ_ONE_LANE = """
    SELECT topic, lane, position, message_id, source, type, version, partition_key,
           content_type, attributes, headers, body
    FROM {log}
    WHERE topic = :topic_N AND lane = :lane_N AND position > :after_N AND position <= :upto_N
"""

# A group counts while any of its lanes of the topic has been held since `given_up_ms` ago.
_COUNTS = """EXISTS (
    SELECT 1
    FROM {log_position} seen
    WHERE seen.group_name = kept.group_name AND seen.topic = kept.topic
      AND seen.lease_until_ms > {now_ms} - :given_up_ms
)"""

# Every lane of the topic in one statement: the positions of a group are those of one moment.
_BEGIN_GROUP = """
    INSERT INTO {log_position} (group_name, topic, lane, position, owner, fence, lease_until_ms, crashes)
    SELECT :group_name, topic, lane, {start}, NULL, 0, {now_ms}, 0
    FROM {log_lane}
    WHERE topic = :topic
    {or_leave_position}
"""

_ON_CONFLICT: Mapping[str, str] = {
    "or_leave_lane": "ON CONFLICT (topic, lane) DO NOTHING",
    "or_leave_position": "ON CONFLICT (group_name, topic, lane) DO NOTHING",
    "or_see_reader": "ON CONFLICT (group_name, topic, reader) DO UPDATE SET seen_until_ms = excluded.seen_until_ms",
}

# The times of day are those of the statement, not of the transaction, which may have waited for a lock.
_POSTGRESQL: Mapping[str, str] = {
    **_ON_CONFLICT,
    "for_update": "FOR UPDATE",
    "now_ms": "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)",
}
_SQLITE: Mapping[str, str] = {
    **_ON_CONFLICT,
    "for_update": "",
    "now_ms": "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)",
}
# In UTC, so that neither the session's time zone nor its summer time moves a lease. VALUES() is what MariaDB has.
_MYSQL: Mapping[str, str] = {
    "for_update": "FOR UPDATE",
    "or_leave_lane": "ON DUPLICATE KEY UPDATE next_position = next_position",
    "or_leave_position": "ON DUPLICATE KEY UPDATE fence = fence",
    "or_see_reader": "ON DUPLICATE KEY UPDATE seen_until_ms = VALUES(seen_until_ms)",
    "now_ms": "TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6)) DIV 1000",
}
_WORDS: Mapping[str, Mapping[str, str]] = {
    "postgresql": _POSTGRESQL,
    "sqlite": _SQLITE,
    "mysql": _MYSQL,
    "mariadb": _MYSQL,
}
