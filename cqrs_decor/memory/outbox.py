"""The outbox in memory."""

import heapq
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from cqrs_decor.clock import Clock
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import LaneLostError
from cqrs_decor.lanes import LANES, HeldLane, Renewal, Suspicion, TakenLane, lane_of
from cqrs_decor.memory.wake_ups import MemoryWakeUps
from cqrs_decor.outbox import (
    Backlog,
    ClaimedRecord,
    FailedRecord,
    Holders,
    OutboxFilter,
    Settlement,
    StoredRecord,
    WakeUps,
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
    retries: int = 0

    @property
    def order(self) -> tuple[str, str] | None:
        """What it must keep its place in: its topic and key."""
        return None if self.envelope.key is None else (self.envelope.topic, self.envelope.key)

    def waits(self, elapsed: float) -> bool:
        return self.parked or (self.due is not None and self.due > elapsed)


@dataclass(frozen=True, slots=True)
class _StepMark:
    """The record of a single step, how many relays vanished with it, and whether the lane's holder has it in hand."""

    record: int
    crashes: int
    in_hand: bool


@dataclass(slots=True)
class _Lane:
    rows: dict[int, _Row] = field(default_factory=dict[int, _Row])
    owner: str | None = None
    fence: int = 0
    lease_ends: float = 0.0
    mark: _StepMark | None = None


class MemoryOutbox:
    """The outbox in memory. Rows stay in the order of their ids, parked ones and those behind them as well: that is
    their old place.
    """

    wake_ups: WakeUps | None

    def __init__(self, clock: Clock) -> None:
        self.lane_count = LANES
        self.wake_ups = self._wake_ups = MemoryWakeUps()
        self._clock = clock
        self._lanes = [_Lane() for _ in range(LANES)]
        self._seen_until: dict[str, float] = {}
        self._history: dict[int, tuple[float, _Row]] = {}
        self._last_id = 0

    def append(self, envelopes: Iterable[Envelope]) -> None:
        """Write rows; what a commit does."""
        for envelope in envelopes:
            self._last_id += 1
            number = lane_of(envelope.topic, envelope.key, envelope.id)
            row = _Row(self._last_id, number, envelope.with_sequence(self._last_id), self._clock.now())
            self._lanes[number].rows[row.id] = row

    # --- lanes ------------------------------------------------------------------------------------------------------

    async def acquire(self, owner: str, lease: timedelta, limit: int, *, in_hand: int) -> Sequence[TakenLane]:
        elapsed = self._clock.elapsed()
        free = [n for n, lane in enumerate(self._lanes) if lane.owner is None or lane.lease_ends <= elapsed]
        taken: list[TakenLane] = []
        for number in free[: max(limit, 0)]:
            lane = self._lanes[number]
            until = 0 if lane.owner is None else self._until(number, in_hand)
            lane.owner, lane.fence, lane.lease_ends = owner, lane.fence + 1, elapsed + lease.total_seconds()
            if lane.mark is not None and lane.mark.in_hand:
                lane.mark = replace(lane.mark, crashes=lane.mark.crashes + 1, in_hand=False)
            taken.append(TakenLane(lane=HeldLane(number, lane.fence), suspicion=self._suspicion(number, until)))
        return taken

    def _until(self, number: int, in_hand: int) -> int:
        """The last of the first `in_hand` records of this lane; 0 if there are none."""
        ids = [row.id for row, state in self._walk([number]) if state == "due"]
        return max(ids[:in_hand], default=0)

    def _suspicion(self, number: int, until: int) -> Suspicion | None:
        lane = self._lanes[number]
        mark = lane.mark
        if mark is not None and mark.record in lane.rows and not lane.rows[mark.record].parked:
            return Suspicion(until=max(until, mark.record), record=mark.record, crashes=mark.crashes)
        first = self._first_due(number)
        return Suspicion(until=until) if first is not None and first.id <= until else None

    async def renew(self, owner: str, lanes: Sequence[HeldLane], lease: timedelta) -> Renewal:
        elapsed = self._clock.elapsed()
        lease_ends = elapsed + lease.total_seconds()
        self._seen_until = {each: until for each, until in self._seen_until.items() if until > elapsed}
        self._seen_until[owner] = lease_ends
        kept = [lane for lane in lanes if self._is_held(lane, owner)]
        for lane in kept:
            self._lanes[lane.number].lease_ends = lease_ends
        self._wake_ups.echo(owner)
        return Renewal(held=kept, relays=len(self._seen_until), waiting=self._is_waiting(kept))

    def _is_waiting(self, lanes: Iterable[HeldLane]) -> bool:
        """Whether there is a record that is neither parked nor behind a parked one."""
        parked: set[tuple[str, str] | None] = set()
        for row, _ in self._walk(lane.number for lane in lanes):
            if row.parked:
                parked.add(row.order)
            elif row.order is None or row.order not in parked:
                return True
        return False

    async def release(self, owner: str, lanes: Sequence[HeldLane], *, leaving: bool = False) -> None:
        for lane in lanes:
            if self._is_held(lane, owner):
                self._lanes[lane.number].owner = None
                self._put_down(lane)
        if leaving:
            self._seen_until.pop(owner, None)

    async def holders(self) -> Holders:
        elapsed = self._clock.elapsed()
        owned = [lane for lane in self._lanes if lane.owner is not None]
        ended = [elapsed - lane.lease_ends for lane in owned if lane.lease_ends <= elapsed]
        return Holders(
            relays=[owner for owner, until in self._seen_until.items() if until > elapsed],
            held=len(owned) - len(ended),
            free=LANES - len(owned),
            ended=len(ended),
            longest_ended=timedelta(seconds=max(ended)) if ended else None,
            now=self._clock.now(),
        )

    # --- the way of a record ----------------------------------------------------------------------------------------

    async def claim(
        self, lanes: Sequence[HeldLane], limit: int, *, in_flight: Collection[int] = ()
    ) -> Sequence[ClaimedRecord]:
        self._check_fences(lanes)
        claimed: list[ClaimedRecord] = []
        for row, state in self._walk(lane.number for lane in lanes):
            if len(claimed) == limit:
                break
            if state == "due" and row.id not in in_flight:
                claimed.append(_claimed(row))
        return claimed

    async def step(self, lanes: Sequence[HeldLane], *, until: int) -> Sequence[ClaimedRecord]:
        self._check_fences(lanes)
        firsts = (self._first_due(lane.number) for lane in lanes)
        return [_claimed(row, self._mark(row)) for row in firsts if row is not None and row.id <= until]

    def _first_due(self, lane: int) -> _Row | None:
        """The marked record, where it is due and the first of its key that is there; else the first that is due."""
        first: _Row | None = None
        seen: set[object] = set()
        mark = self._lanes[lane].mark
        for row, state in self._walk([lane]):
            if state == "due" and first is None:
                first = row
            if mark is not None and row.id == mark.record and state == "due" and row.order not in seen:
                return row
            if row.order is not None:
                seen.add(row.order)
        return first

    def _mark(self, row: _Row) -> int:
        """Note that its lane goes with this record in hand; how many vanished with it before."""
        lane = self._lanes[row.lane]
        crashes = lane.mark.crashes if lane.mark is not None and lane.mark.record == row.id else 0
        lane.mark = _StepMark(row.id, crashes, in_hand=True)
        return crashes

    async def unmark(self, lanes: Sequence[HeldLane]) -> None:
        for lane in lanes:
            if self._is_held(lane):
                self._put_down(lane)

    def _put_down(self, lane: HeldLane) -> None:
        """Nobody has its marked record in hand any more; how many vanished with it stays known."""
        mark = self._lanes[lane.number].mark
        self._lanes[lane.number].mark = replace(mark, in_hand=False) if mark is not None and mark.crashes else None

    async def settle(self, settlement: Settlement) -> None:
        self._check_fences(settlement.lanes)
        for record in settlement.delivered:
            self._deliver(record, keep=settlement.keep)
        for failed in settlement.failed:
            self._fail(failed)
        if settlement.stepped:
            self._take_marks_off([*settlement.delivered, *(failed.record for failed in settlement.failed)])

    def _deliver(self, record: ClaimedRecord, *, keep: bool) -> None:
        row = self._lanes[record.lane].rows.pop(record.id, None)
        if keep and row is not None:
            self._history[row.id] = (self._clock.elapsed(), row)

    def _fail(self, failed: FailedRecord) -> None:
        row = self._lanes[failed.record.lane].rows.get(failed.record.id)
        if row is None:  # an operator discarded it meanwhile
            return
        row.attempts, row.error = failed.record.attempts + 1, failed.error
        row.parked = failed.delay is None
        row.due = None if failed.delay is None else self._clock.elapsed() + failed.delay.total_seconds()
        row.due_at = None if failed.delay is None else self._clock.now() + failed.delay

    def _take_marks_off(self, records: Iterable[ClaimedRecord]) -> None:
        for record in records:
            lane = self._lanes[record.lane]
            if lane.mark is not None and lane.mark.record == record.id:
                lane.mark = None

    # --- operators --------------------------------------------------------------------------------------------------

    async def backlog(self) -> Backlog:
        rows = self._all_rows()
        waiting = [row.written_at for row in rows if not row.parked]
        return Backlog(
            pending=len(waiting),
            parked=len(rows) - len(waiting),
            oldest=self._clock.now() - min(waiting) if waiting else None,
        )

    async def find(self, wanted: OutboxFilter) -> Sequence[StoredRecord]:
        if wanted.state == "delivered":
            records = [_stored(row, "delivered") for _, row in sorted(self._history.values(), key=_id_of_kept)]
        else:
            records = [_stored(row, state) for row, state in self._walk(range(LANES))]
        is_wanted = _filter(wanted, self._clock.now())
        return [record for record in records if is_wanted(record)][: wanted.limit]

    async def retry(self, ids: Collection[int], *, who: str) -> int:
        rows = [row for row in self._all_rows() if row.id in ids and row.parked]
        for row in rows:
            row.parked, row.attempts, row.due, row.due_at = False, 0, None, None
            row.retries += 1
        _logger.info("outbox records retried", extra={"action": "outbox_retried", "who": who, "count": len(rows)})
        return len(rows)

    async def discard(self, ids: Collection[int], *, who: str) -> int:
        rows = [row for row in self._all_rows() if row.id in ids and (row.parked or row.due is not None)]
        for row in rows:
            del self._lanes[row.lane].rows[row.id]
        _logger.info("outbox records discarded", extra={"action": "outbox_discarded", "who": who, "count": len(rows)})
        return len(rows)

    async def replay(self, ids: Collection[int], *, who: str) -> int:
        rows = [self._history[record_id][1] for record_id in sorted(set(ids)) if record_id in self._history]
        self.append(row.envelope for row in rows)
        _logger.info("outbox records replayed", extra={"action": "outbox_replayed", "who": who, "count": len(rows)})
        return len(rows)

    def clean_up(self, history: timedelta | None, limit: int) -> int:
        """Delete up to `limit` records that have been in the history for longer than `history`, oldest first."""
        if history is None:
            return 0
        kept_since = self._clock.elapsed() - history.total_seconds()
        old = sorted(row_id for row_id, (delivered, _) in self._history.items() if delivered <= kept_since)[:limit]
        for row_id in old:
            del self._history[row_id]
        return len(old)

    # --- looking at rows --------------------------------------------------------------------------------------------

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

    def _check_fences(self, lanes: Iterable[HeldLane]) -> None:
        lost = [lane for lane in lanes if not self._is_held(lane)]
        if lost:
            raise LaneLostError(f"with fence {lost[0].fence}", [lane.number for lane in lost])

    def _is_held(self, held: HeldLane, owner: str | None = None) -> bool:
        lane = self._lanes[held.number]
        return lane.fence == held.fence and lane.owner is not None and owner in (None, lane.owner)

    def _all_rows(self) -> list[_Row]:
        return [row for lane in self._lanes for row in lane.rows.values()]


def _claimed(row: _Row, crashes: int = 0) -> ClaimedRecord:
    return ClaimedRecord(id=row.id, lane=row.lane, envelope=row.envelope, attempts=row.attempts, crashes=crashes)


def _id_of_kept(kept: tuple[float, _Row]) -> int:
    return kept[1].id


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
        retries=row.retries,
    )


def _filter(wanted: OutboxFilter, now: datetime) -> Callable[[StoredRecord], bool]:
    written_before = None if wanted.older_than is None else now - wanted.older_than

    def is_wanted(record: StoredRecord) -> bool:
        return (
            record.id > wanted.after
            and (not wanted.ids or record.id in wanted.ids)
            and wanted.state in (None, record.state)
            and wanted.topic in (None, record.envelope.topic)
            and wanted.key in (None, record.envelope.key)
            and (wanted.error is None or wanted.error in (record.error or ""))
            and (written_before is None or record.written_at <= written_before)
        )

    return is_wanted
