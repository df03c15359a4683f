"""The outbox in memory."""

import heapq
import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from cqrs_decor.clock import Clock
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import (
    LaneLostError,
)
from cqrs_decor.lanes import LANES, HeldLane, lane_of
from cqrs_decor.outbox import (
    Backlog,
    ClaimedRecord,
    FailedRecord,
    OutboxFilter,
    Settlement,
    StoredRecord,
)

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Row:
    id: int
    lane: int
    envelope: Envelope
    written_at: datetime
    attempts: int = 0
    error: str | None = None
    due: float | None = None
    due_at: datetime | None = None
    parked: bool = False

    @property
    def order(self) -> tuple[str, str] | None:
        """What it must keep its place in: its topic and key."""
        return None if self.envelope.key is None else (self.envelope.topic, self.envelope.key)

    def waits(self, elapsed: float) -> bool:
        return self.parked or (self.due is not None and self.due > elapsed)


@dataclass(slots=True)
class _Lane:
    rows: dict[int, _Row] = field(default_factory=dict[int, _Row])
    owner: str | None = None
    fence: int = 0
    lease_ends: float = 0.0


class MemoryOutbox:
    """The outbox in memory. Rows stay in the order of their ids, parked ones as well: that is their old place."""

    def __init__(self, clock: Clock) -> None:
        self.lane_count = LANES
        self._clock = clock
        self._lanes = [_Lane() for _ in range(LANES)]
        self._last_id = 0

    def append(self, envelopes: Iterable[Envelope]) -> None:
        """Write rows; what a commit does."""
        for envelope in envelopes:
            self._last_id += 1
            number = lane_of(envelope.topic, envelope.key, envelope.id)
            row = _Row(self._last_id, number, envelope.with_sequence(self._last_id), self._clock.now())
            self._lanes[number].rows[row.id] = row

    async def acquire(self, owner: str, lease: timedelta, limit: int) -> Sequence[HeldLane]:
        elapsed = self._clock.elapsed()
        free = [n for n, lane in enumerate(self._lanes) if lane.owner is None or lane.lease_ends <= elapsed]
        for number in free[:limit]:
            lane = self._lanes[number]
            lane.owner, lane.fence, lane.lease_ends = owner, lane.fence + 1, elapsed + lease.total_seconds()
        return [HeldLane(number, self._lanes[number].fence) for number in free[:limit]]

    async def renew(self, owner: str, lanes: Sequence[HeldLane], lease: timedelta) -> Sequence[HeldLane]:
        kept = [lane for lane in lanes if self._is_held(lane, owner)]
        for lane in kept:
            self._lanes[lane.number].lease_ends = self._clock.elapsed() + lease.total_seconds()
        return kept

    async def release(self, owner: str, lanes: Sequence[HeldLane]) -> None:
        for lane in lanes:
            if self._is_held(lane, owner):
                self._lanes[lane.number].owner = None

    async def claim(
        self, lanes: Sequence[HeldLane], limit: int, *, in_flight: Collection[int] = ()
    ) -> Sequence[ClaimedRecord]:
        self._check_fences(lanes)
        claimed: list[ClaimedRecord] = []
        for row, state in self._walk(lane.number for lane in lanes):
            if len(claimed) == limit:
                break
            if state == "due" and row.id not in in_flight:
                claimed.append(ClaimedRecord(id=row.id, lane=row.lane, envelope=row.envelope, attempts=row.attempts))
        return claimed

    async def settle(self, settlement: Settlement) -> None:
        self._check_fences(settlement.lanes)
        for record in settlement.delivered:
            self._lanes[record.lane].rows.pop(record.id, None)
        for failed in settlement.failed:
            self._fail(failed)

    async def backlog(self) -> Backlog:
        rows = self._all_rows()
        waiting = [row.written_at for row in rows if not row.parked]
        return Backlog(
            pending=len(waiting),
            parked=len(rows) - len(waiting),
            oldest=self._clock.now() - min(waiting) if waiting else None,
        )

    async def find(self, wanted: OutboxFilter) -> Sequence[StoredRecord]:
        records = [_stored(row, state) for row, state in self._walk(range(LANES))]
        return [record for record in records if _is_wanted(record, wanted)][: wanted.limit]

    async def retry(self, ids: Collection[int], *, who: str) -> int:
        rows = [row for row in self._all_rows() if row.id in ids and row.parked]
        for row in rows:
            row.parked, row.attempts, row.due, row.due_at = False, 0, None, None
        _logger.info("outbox records retried", extra={"action": "outbox_retried", "who": who, "count": len(rows)})
        return len(rows)

    async def discard(self, ids: Collection[int], *, who: str) -> int:
        rows = [row for row in self._all_rows() if row.id in ids and (row.parked or row.due is not None)]
        for row in rows:
            del self._lanes[row.lane].rows[row.id]
        _logger.info("outbox records discarded", extra={"action": "outbox_discarded", "who": who, "count": len(rows)})
        return len(rows)

    def _walk(self, lanes: Iterable[int]) -> Iterator[tuple[_Row, str]]:
        """Rows in the order of writing, each with its state: due, rescheduled, parked or held (behind one of those)."""
        elapsed = self._clock.elapsed()
        held: set[tuple[str, str]] = set()
        for row in heapq.merge(*(self._lanes[number].rows.values() for number in lanes), key=lambda row: row.id):
            if row.waits(elapsed):
                yield row, "parked" if row.parked else "rescheduled"
                if row.order is not None:
                    held.add(row.order)
            else:
                yield row, "held" if row.order in held else "due"

    def _fail(self, failed: FailedRecord) -> None:
        row = self._lanes[failed.record.lane].rows.get(failed.record.id)
        if row is None:  # an operator discarded it meanwhile
            return
        row.attempts, row.error = failed.record.attempts + 1, failed.error
        row.parked = failed.delay is None
        row.due = None if failed.delay is None else self._clock.elapsed() + failed.delay.total_seconds()
        row.due_at = None if failed.delay is None else self._clock.now() + failed.delay

    def _check_fences(self, lanes: Iterable[HeldLane]) -> None:
        lost = [lane for lane in lanes if not self._is_held(lane)]
        if lost:
            raise LaneLostError(f"with fence {lost[0].fence}", [lane.number for lane in lost])

    def _is_held(self, held: HeldLane, owner: str | None = None) -> bool:
        lane = self._lanes[held.number]
        return lane.fence == held.fence and lane.owner is not None and owner in (None, lane.owner)

    def _all_rows(self) -> list[_Row]:
        return [row for lane in self._lanes for row in lane.rows.values()]


def _stored(row: _Row, state: str) -> StoredRecord:
    return StoredRecord(
        id=row.id,
        lane=row.lane,
        envelope=row.envelope,
        state="pending" if state == "due" else state,
        attempts=row.attempts,
        error=row.error,
        written_at=row.written_at,
        due_at=row.due_at,
    )


def _is_wanted(record: StoredRecord, wanted: OutboxFilter) -> bool:
    return (
        (not wanted.ids or record.id in wanted.ids)
        and wanted.state in (None, record.state)
        and wanted.topic in (None, record.envelope.topic)
        and wanted.key in (None, record.envelope.key)
    )
