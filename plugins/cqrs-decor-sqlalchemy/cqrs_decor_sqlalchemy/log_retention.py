"""Deletes from a log what every group has acknowledged."""

import logging
from datetime import timedelta
from typing import Any

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from cqrs_decor.store import Retention
from cqrs_decor_sqlalchemy.database import Database
from cqrs_decor_sqlalchemy.log_queries import LogQueries

_logger = logging.getLogger(__name__)

_EVERYTHING = 2**62


class LogSweep:
    """Takes records from the front of one lane at a time, so that positions stay dense.

    A record goes when it is old enough and every group that counts has acknowledged it; where there is no group, when
    it is old enough. A group that nobody was in for `Retention.groups` does not count: it is given up. When it comes
    back all the same, it begins with what is left and says so (`OffsetReset`).
    """

    def __init__(self, database: Database) -> None:
        self._queries = LogQueries(database.tables.log, database.engine.dialect)
        self._given_up: set[tuple[str, str]] = set()

    async def __call__(self, connection: AsyncConnection, retention: Retention, limit: int) -> int:
        if retention.log is None:
            return 0
        ages = {"kept_ms": _milliseconds(retention.log), "given_up_ms": _milliseconds(retention.groups)}
        lane = (await connection.execute(self._queries.oldest_done, ages)).first()
        return 0 if lane is None else await self._shorten(connection, lane, ages, limit)

    async def _shorten(self, connection: AsyncConnection, lane: Row[Any], ages: dict[str, int], limit: int) -> int:
        place = {"topic": lane.topic, "lane": lane.lane, "first": lane.first_position}
        groups = (await connection.execute(self._queries.lock_positions, {**place, **ages})).all()
        acknowledged = min((group.position for group in groups if group.counts), default=_EVERYTHING)
        bounds = {**place, **ages, "acknowledged": acknowledged, "limit": limit}
        done = 0
        for row in await connection.execute(self._queries.oldest, bounds):
            if not row.done:
                break
            done += 1
        if done:
            moved = {**place, "next_first": lane.first_position + done}
            await connection.execute(self._queries.delete_before, moved)
            await connection.execute(self._queries.begin_lane_at, moved)
            self._say_who_loses(lane, [group for group in groups if group.position < lane.first_position + done - 1])
        return done

    def _say_who_loses(self, lane: Row[Any], groups: list[Row[Any]]) -> None:
        for group in groups:
            if (group.group_name, lane.topic) not in self._given_up:
                self._given_up.add((group.group_name, lane.topic))
                _logger.warning(
                    "Group %s was not there for so long that it is given up: what it has not read of %s is deleted",
                    *(group.group_name, lane.topic),
                    extra={"action": "log_group_given_up", "group": group.group_name, "topic": lane.topic},
                )


def _milliseconds(age: timedelta | None) -> int:
    """None is for ever."""
    return _EVERYTHING if age is None else round(age.total_seconds() * 1000)
