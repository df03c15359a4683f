"""Reading the log as one member of a consumer group."""

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any

import anyio
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from cqrs_decor.broker import Delivery, Partition
from cqrs_decor.envelope import Envelope, envelope_from_attributes
from cqrs_decor.errors import MalformedEnvelopeError, WireError
from cqrs_decor.observers import OffsetReset
from cqrs_decor_sqlalchemy.log_database import Log
from cqrs_decor_sqlalchemy.log_member import HeldPartition, LogMember, Membership
from cqrs_decor_sqlalchemy.log_shares import Lane, fair_counts

_logger = logging.getLogger(__name__)

_LANES_AT_ONCE = 64
_GROWTH = 1.5


class LogSubscription:
    """One reader of a group. It reads on from where it is, which is ahead of what the group has acknowledged."""

    def __init__(self, member: LogMember, membership: Membership, log: Log) -> None:
        self._member = member
        self._group = membership.group
        self._reader = membership.reader
        self._topics = membership.topics
        self._database = log.database
        self._queries = log.queries
        self._signals = log.signals
        self._settings = log.settings
        self._clock = log.clock
        self._observers = log.observers
        self._poll_s = log.settings.poll.total_seconds()
        self._paused: frozenset[Partition] = frozenset()

    async def receive(self, limit: int, wait: timedelta, *, paused: Collection[Partition] = ()) -> Sequence[Delivery]:
        self._paused = frozenset(paused)
        ends = self._clock.elapsed() + wait.total_seconds()
        while True:
            await self._member.recover()
            written = self._signals.written.next()
            deliveries = await self._read(limit)
            left = ends - self._clock.elapsed()
            if deliveries or left <= 0:
                return deliveries  # no await since they were taken: a cancelled `receive` has delivered nothing
            with anyio.move_on_after(min(left, self._poll_s)):
                await written.wait()
            self._poll_s = min(self._poll_s * _GROWTH, self._settings.idle_poll.total_seconds())

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        reached: dict[Partition, int] = {}
        for delivery in deliveries:
            reached[delivery.partition] = max(delivery.position, reached.get(delivery.partition, 0))
        if not reached:
            return
        rows = [self._acknowledgement(partition, position) for partition, position in reached.items()]
        rows.sort(key=lambda row: (row["topic"], row["lane"]))
        async with self._member.writing:
            await self._database.write(lambda connection: connection.execute(self._queries.acknowledge, rows))

    async def backlog(self) -> int:
        rows = await self._database.read(self._count)
        return sum(max(0, row.head - self._position(row)) for row in rows)

    # --- reading ------------------------------------------------------------------------------------------------------

    async def _read(self, limit: int) -> Sequence[Delivery]:
        if limit < 1 or not self._wanted():
            return []
        ranges, rows = await self._database.read(lambda connection: self._fetch(connection, limit))
        deliveries = self._deliver(ranges, rows)
        if deliveries:
            self._poll_s = self._settings.poll.total_seconds()
        return deliveries

    async def _fetch(self, connection: AsyncConnection, limit: int) -> tuple[list["_Range"], Sequence[Row[Any]]]:
        """The next records, in one query if some are known to wait, else after a look at how far the lanes are."""
        if not self._waiting():
            await self._see_heads(connection)
        ranges = self._ranges(limit)
        if not ranges:
            return [], []
        arms = 1 << (len(ranges) - 1).bit_length()  # few shapes of the statement; those too many find nothing
        bounds = [*ranges, *[ranges[-1].empty()] * (arms - len(ranges))]
        parameters = {name: value for number, bound in enumerate(bounds) for name, value in bound.named(number)}
        result = await connection.execute(self._queries.read(arms), parameters)
        return ranges, result.all()

    async def _see_heads(self, connection: AsyncConnection) -> None:
        for row in await connection.execute(self._queries.heads, {"topics": self._topics}):
            held = self._member.held.get((row.topic, row.lane))
            if held is None:
                continue
            held.head = row.head
            if held.head < held.read:
                _logger.error(
                    "lane %d ends before what was read from it: the database has gone back in time",
                    held.partition.number,
                    extra={"action": "log_went_back", "group": self._group, "topic": held.partition.topic},
                )
                self._member.lose(held)

    def _wanted(self) -> list[HeldPartition]:
        return [held for held in self._member.readable() if held.partition not in self._paused]

    def _waiting(self) -> dict[Lane, int]:
        return {held.lane: held.head - held.read for held in self._wanted() if held.head > held.read}

    def _ranges(self, limit: int) -> list["_Range"]:
        counts = fair_counts(dict(islice(self._waiting().items(), _LANES_AT_ONCE)), limit)
        chosen = [(self._member.held[lane], count) for lane, count in counts.items()]
        return [_Range(partition=held.partition, after=held.read, upto=held.read + count) for held, count in chosen]

    def _deliver(self, ranges: Sequence["_Range"], rows: Sequence[Row[Any]]) -> list[Delivery]:
        """Take what was read, unless its lane went elsewhere meanwhile."""
        found: dict[Lane, list[Row[Any]]] = {wanted.lane: [] for wanted in ranges}
        for row in rows:
            found[row.topic, row.lane].append(row)
        readable = {held.partition: held for held in self._member.readable()}
        deliveries: list[Delivery] = []
        for wanted in ranges:
            held = readable.get(wanted.partition)
            if held is None:
                continue
            records = sorted(found[wanted.lane], key=lambda row: row.position)
            deliveries.extend(_delivery(held.partition, row) for row in records)
            self._note_missing(wanted, len(records))
            held.read = wanted.upto
            self._member.held[held.lane] = self._member.held.pop(held.lane)  # to the end of the line
        return deliveries

    def _note_missing(self, wanted: "_Range", found: int) -> None:
        """Positions are dense, and retention leaves what a group with readers has not acknowledged: what is not there
        was deleted by hand.
        """
        if found == wanted.upto - wanted.after:
            return
        facts = {"action": "log_records_missing", "group": self._group, "topic": wanted.partition.topic}
        _logger.error(
            "records %d to %d of lane %d are not all there any more",
            wanted.after + 1,
            wanted.upto,
            wanted.partition.number,
            extra=facts,
        )
        place = wanted.partition
        restarted_at = str(wanted.upto + 1)
        self._observers.notice(
            OffsetReset(group=self._group, topic=place.topic, partition=place.number, restarted_at=restarted_at)
        )

    # --- rows ---------------------------------------------------------------------------------------------------------

    def _acknowledgement(self, partition: Partition, position: int) -> dict[str, Any]:
        return {
            "group_name": self._group,
            "reader": self._reader,
            "topic": partition.topic,
            "lane": partition.number,
            "fence": partition.epoch,
            "position": position,
        }

    async def _count(self, connection: AsyncConnection) -> Sequence[Row[Any]]:
        scope = {"group_name": self._group, "topics": self._topics}
        result = await connection.execute(self._queries.backlog, scope)
        return result.all()

    def _position(self, row: Row[Any]) -> int:
        held = self._member.held.get((row.topic, row.lane))
        return int(row.position) if held is None else held.read


@dataclass(frozen=True, slots=True, kw_only=True)
class _Range:
    """Records of one lane: those after one position up to another."""

    partition: Partition
    after: int
    upto: int

    @property
    def lane(self) -> Lane:
        return self.partition.topic, self.partition.number

    def empty(self) -> "_Range":
        return _Range(partition=self.partition, after=self.after, upto=self.after)

    def named(self, number: int) -> list[tuple[str, object]]:
        return [
            (f"topic_{number}", self.partition.topic),
            (f"lane_{number}", self.partition.number),
            (f"after_{number}", self.after),
            (f"upto_{number}", self.upto),
        ]


def _delivery(partition: Partition, row: Row[Any]) -> Delivery:
    return Delivery(
        partition=partition, position=row.position, content=_content(row), raw=row.body, key=row.partition_key
    )


def _content(row: Row[Any]) -> Envelope | WireError:
    try:
        return _envelope(row)
    except WireError as error:
        return error


def _envelope(row: Row[Any]) -> Envelope:
    attributes = {
        **_texts("attributes", row.attributes),
        "id": row.message_id,
        "source": row.source,
        "type": row.type,
        "dataversion": str(row.version),
    }
    return envelope_from_attributes(
        attributes,
        topic=row.topic,
        data=row.body,
        content_type=row.content_type,
        key=row.partition_key,
        headers=_texts("headers", row.headers) if row.headers else None,
    )


def _texts(column: str, text: str) -> Mapping[str, str]:
    try:
        found: object = json.loads(text)
    except ValueError:
        raise MalformedEnvelopeError(f"{column} are not JSON") from None
    if not isinstance(found, dict):
        raise MalformedEnvelopeError(f"{column} are not an object of texts")
    texts: dict[object, object] = found  # pyright: ignore[reportUnknownVariableType]
    if not all(isinstance(value, str) for value in texts.values()):
        raise MalformedEnvelopeError(f"{column} are not an object of texts")
    return {str(name): str(value) for name, value in texts.items()}
