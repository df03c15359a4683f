"""Outboxes and inboxes with one fault each, of the kind that real ones have had."""

import re
from collections.abc import AsyncGenerator, Collection, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from math import inf
from typing import Any

import anyio
import anyio.lowlevel

from cqrs_decor.clock import Clock
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import StoreUnavailableError
from cqrs_decor.inbox import InboxFilter, Mark, Noted, ParkedMessage
from cqrs_decor.lanes import LANES, HeldLane, Renewal, Suspicion, TakenLane, lane_of
from cqrs_decor.memory import MemoryInbox, MemoryOutbox, MemoryStore, MemoryTransaction
from cqrs_decor.memory.outbox import _Row
from cqrs_decor.memory.wake_ups import MemoryWakeUps
from cqrs_decor.outbox import (
    Backlog,
    ClaimedRecord,
    Ear,
    FailedRecord,
    Heard,
    Holders,
    OutboxFilter,
    Settlement,
    StoredRecord,
)
from cqrs_decor.unit_of_work import Transaction


class FaultyStore(MemoryStore):
    """A store in memory with another outbox, inbox or transaction."""

    def __init__(
        self,
        clock: Clock,
        outbox: type[MemoryOutbox] = MemoryOutbox,
        inbox: type[MemoryInbox] = MemoryInbox,
        transaction: type[MemoryTransaction] = MemoryTransaction,
        wake_ups: type[MemoryWakeUps] = MemoryWakeUps,
    ) -> None:
        super().__init__(clock=clock)
        self.outbox = self._outbox = outbox(clock)
        self._outbox.wake_ups = self._outbox._wake_ups = wake_ups()
        self.inbox = inbox()
        self._transaction = transaction

    async def begin(self, *, read_only: bool = False) -> MemoryTransaction:
        return self._transaction(self._outbox)


# --- writing ---


class WritesBeforeTheCommit(MemoryTransaction):
    def add(self, envelopes: Sequence[Envelope]) -> None:
        self._outbox.append(envelopes)


class DropsHeaders(MemoryOutbox):
    def append(self, envelopes: Iterable[Envelope]) -> None:
        super().append(replace(each, headers={}) for each in envelopes)


class StoresEmptyTextForNothing(MemoryOutbox):
    def append(self, envelopes: Iterable[Envelope]) -> None:
        super().append(replace(each, correlation_id=each.correlation_id or "") for each in envelopes)


class GivesNoSequence(MemoryOutbox):
    def append(self, envelopes: Iterable[Envelope]) -> None:
        super().append(envelopes)
        for row in self._all_rows():
            row.envelope = replace(row.envelope, sequence=None)


class DrawsLanesById(MemoryOutbox):
    """Keeps a key's order within one claim of all lanes, and breaks it as soon as there are two relays."""

    def append(self, envelopes: Iterable[Envelope]) -> None:
        for envelope in envelopes:
            super().append([envelope])
            row = self._lanes[lane_of(envelope.topic, envelope.key, envelope.id)].rows.pop(self._last_id)
            row.lane = row.id % LANES
            self._lanes[row.lane].rows[row.id] = row


class DrawsIdsEarlyAndPages(MemoryOutbox):
    """Ids are drawn when a record is added, and a claim goes on behind the last id that it has seen."""

    last_seen = 0

    def draw(self) -> int:
        self._last_id += 1
        return self._last_id

    def append_drawn(self, drawn: Sequence[tuple[int, Envelope]]) -> None:
        for row_id, envelope in drawn:
            number = lane_of(envelope.topic, envelope.key, envelope.id)
            row = _Row(row_id, number, envelope.with_sequence(row_id), self._clock.now())
            rows = self._lanes[number].rows
            rows[row_id] = row
            self._lanes[number].rows = dict(sorted(rows.items()))

    async def claim(
        self, lanes: Sequence[HeldLane], limit: int, *, in_flight: Collection[int] = ()
    ) -> Sequence[ClaimedRecord]:
        claimed = [each for each in await super().claim(lanes, limit, in_flight=in_flight) if each.id > self.last_seen]
        self.last_seen = max([self.last_seen, *(each.id for each in claimed)])
        return claimed


class DrawsIdsEarly(MemoryTransaction):
    def add(self, envelopes: Sequence[Envelope]) -> None:
        outbox: Any = self._outbox
        drawn = [(outbox.draw(), each) for each in envelopes]
        self.at_commit(lambda: outbox.append_drawn(drawn))


# --- lanes ---


class GivesALaneToTwo(MemoryOutbox):
    async def acquire(self, owner: str, lease: timedelta, limit: int, *, in_hand: int) -> Sequence[TakenLane]:
        for lane in self._lanes:
            lane.owner = None if lane.owner != owner else owner
        return await super().acquire(owner, lease, limit, in_hand=in_hand)


class NeverRaisesTheFence(MemoryOutbox):
    async def acquire(self, owner: str, lease: timedelta, limit: int, *, in_hand: int) -> Sequence[TakenLane]:
        taken = await super().acquire(owner, lease, limit, in_hand=in_hand)
        for each in taken:
            self._lanes[each.lane.number].fence = 1
        return [replace(each, lane=HeldLane(each.lane.number, 1)) for each in taken]


class KeepsLeasesForEver(MemoryOutbox):
    async def acquire(self, owner: str, lease: timedelta, limit: int, *, in_hand: int) -> Sequence[TakenLane]:
        return await super().acquire(owner, timedelta(days=365), limit, in_hand=in_hand)


class RenewsWithoutExtending(MemoryOutbox):
    async def renew(self, owner: str, lanes: Sequence[HeldLane], lease: timedelta) -> Renewal:
        return await super().renew(owner, lanes, timedelta(0))


class RenewsWithoutLookingAtTheOwner(MemoryOutbox):
    """A lease that is extended without checking its owner is no lease."""

    async def renew(self, owner: str, lanes: Sequence[HeldLane], lease: timedelta) -> Renewal:
        return replace(await super().renew(owner, lanes, lease), held=lanes)


class CountsOnlyWhoHoldsLanes(MemoryOutbox):
    """A newcomer to whom nothing was left is no relay, so that nothing is ever left to it."""

    async def renew(self, owner: str, lanes: Sequence[HeldLane], lease: timedelta) -> Renewal:
        renewal = await super().renew(owner, lanes, lease)
        return replace(renewal, relays=len({lane.owner for lane in self._lanes if lane.owner is not None}))


class NeverForgetsARelay(MemoryOutbox):
    """The share of a member never expires."""

    async def renew(self, owner: str, lanes: Sequence[HeldLane], lease: timedelta) -> Renewal:
        renewal = await super().renew(owner, lanes, lease)
        self._seen_until = dict.fromkeys(self._seen_until, inf)
        return renewal


class CountsARelayThatHasLeft(MemoryOutbox):
    async def release(self, owner: str, lanes: Sequence[HeldLane], *, leaving: bool = False) -> None:
        await super().release(owner, lanes)


class TakesAReleaseForLeaving(MemoryOutbox):
    async def release(self, owner: str, lanes: Sequence[HeldLane], *, leaving: bool = False) -> None:
        await super().release(owner, lanes, leaving=True)


class SeesOnlyWhatIsDue(MemoryOutbox):
    """A relay whose records are all rescheduled goes to sleep over them."""

    def _is_waiting(self, lanes: Iterable[HeldLane]) -> bool:
        return any(state == "due" for _, state in self._walk(lane.number for lane in lanes))


class IsKeptAwakeByWhatIsParked(MemoryOutbox):
    def _is_waiting(self, lanes: Iterable[HeldLane]) -> bool:
        return any(self._lanes[lane.number].rows for lane in lanes)


class TakesEndedLeasesForHeld(MemoryOutbox):
    async def holders(self) -> Holders:
        holders = await super().holders()
        return replace(holders, held=holders.held + holders.ended, ended=0, longest_ended=None)


class ReleasesWhatOthersHold(MemoryOutbox):
    async def release(self, owner: str, lanes: Sequence[HeldLane], *, leaving: bool = False) -> None:
        for lane in lanes:
            self._lanes[lane.number].owner = None


# --- crashes ---


class SuspectsNobody(MemoryOutbox):
    async def acquire(self, owner: str, lease: timedelta, limit: int, *, in_hand: int) -> Sequence[TakenLane]:
        taken = await super().acquire(owner, lease, limit, in_hand=in_hand)
        return [replace(each, suspicion=None) for each in taken]


class SuspectsThoseWhoStopped(MemoryOutbox):
    async def release(self, owner: str, lanes: Sequence[HeldLane], *, leaving: bool = False) -> None:
        for lane in lanes:
            if self._is_held(lane, owner):
                self._lanes[lane.number].lease_ends = self._clock.elapsed()


class SuspectsEmptyLanes(MemoryOutbox):
    def _suspicion(self, number: int, until: int) -> Suspicion | None:
        vanished = self._lanes[number].fence > 1
        return super()._suspicion(number, until) or (Suspicion(until=until) if vanished else None)


class SuspectsOneRecordTooFew(MemoryOutbox):
    def _until(self, number: int, in_hand: int) -> int:
        return super()._until(number, in_hand - 1)


class SuspectsOnlyTheFirst(MemoryOutbox):
    """Takes what a relay has in hand for one record of each lane."""

    def _until(self, number: int, in_hand: int) -> int:
        return super()._until(number, 1)


class CountsWhatIsInHandAcrossLanes(MemoryOutbox):
    """What waits in a lane that nobody claims from fills the number."""

    def _until(self, number: int, in_hand: int) -> int:
        ids = sorted(row.id for row, state in self._walk(range(LANES)) if state == "due")
        return max(ids[:in_hand], default=0)


class CountsACrashOnlyAtSettle(MemoryOutbox):
    """The mark is in memory until the step is settled: of a relay that was killed nothing is left."""

    def _mark(self, row: _Row) -> int:
        return 0


class StepsWithTheWholeLane(MemoryOutbox):
    async def step(self, lanes: Sequence[HeldLane], *, until: int) -> Sequence[ClaimedRecord]:
        await super().step(lanes, until=until)
        return [each for each in await self.claim(lanes, 1_000) if each.id <= until]


class AcquitsByWhatComesDue(MemoryOutbox):
    """Steps from the head of the lane, whatever is marked."""

    def _first_due(self, lane: int) -> _Row | None:
        return next((row for row, state in self._walk([lane]) if state == "due"), None)


class StepsAboveUntil(MemoryOutbox):
    async def step(self, lanes: Sequence[HeldLane], *, until: int) -> Sequence[ClaimedRecord]:
        return await super().step(lanes, until=2**63)


class StumblesAtTheHeadOfALane(MemoryOutbox):
    """Looks at the first row of a lane only: one that is parked ends the search."""

    def _first_due(self, lane: int) -> _Row | None:
        row, state = next(self._walk([lane]), (None, ""))
        return row if state == "due" else None


class StepsUnderAnyFence(MemoryOutbox):
    async def step(self, lanes: Sequence[HeldLane], *, until: int) -> Sequence[ClaimedRecord]:
        current = [HeldLane(lane.number, self._lanes[lane.number].fence) for lane in lanes]
        return await super().step(current, until=until)


class CountsTakeOvers(MemoryOutbox):
    """Each take-over of a marked lane is a crash of its record, whether or not it was in hand again."""

    def _suspicion(self, number: int, until: int) -> Suspicion | None:
        suspicion = super()._suspicion(number, until)
        mark = self._lanes[number].mark
        if mark is not None:
            self._lanes[number].mark = replace(mark, crashes=mark.crashes + 1)
        return suspicion


class NeverCountsTwo(MemoryOutbox):
    def _mark(self, row: _Row) -> int:
        return min(super()._mark(row), 1)


class ForgetsCrashesInAnOutage(MemoryOutbox):
    async def unmark(self, lanes: Sequence[HeldLane]) -> None:
        for lane in lanes:
            if self._is_held(lane):
                self._lanes[lane.number].mark = None


class ForgetsCrashesAtAStop(MemoryOutbox):
    async def release(self, owner: str, lanes: Sequence[HeldLane], *, leaving: bool = False) -> None:
        await super().release(owner, lanes, leaving=leaving)
        for lane in lanes:
            self._lanes[lane.number].mark = None


class LeavesTheMarkOfASettledStep(MemoryOutbox):
    """Two keys are enough: the mark of a rescheduled record accuses it although nobody vanished with it."""

    def _take_marks_off(self, records: Iterable[ClaimedRecord]) -> None:
        pass


class KeepsTheCountForAnotherRecord(MemoryOutbox):
    def _mark(self, row: _Row) -> int:
        lane = self._lanes[row.lane]
        if lane.mark is not None:
            lane.mark = replace(lane.mark, record=row.id)
        return super()._mark(row)


class CannotUnmark(MemoryOutbox):
    async def unmark(self, lanes: Sequence[HeldLane]) -> None:
        pass


class UnmarksUnderAnyFence(MemoryOutbox):
    async def unmark(self, lanes: Sequence[HeldLane]) -> None:
        for lane in lanes:
            self._lanes[lane.number].mark = None


class ReleasesWithTheMarkOn(MemoryOutbox):
    async def release(self, owner: str, lanes: Sequence[HeldLane], *, leaving: bool = False) -> None:
        marks = [lane.mark for lane in self._lanes]
        await super().release(owner, lanes, leaving=leaving)
        for lane, mark in zip(self._lanes, marks, strict=True):
            lane.mark = mark


class SettlesStepsWithoutAFence(MemoryOutbox):
    async def settle(self, settlement: Settlement) -> None:
        if settlement.stepped:
            self._take_marks_off(settlement.delivered)
        await super().settle(settlement)


class KeepsTheMarkOfAParkedRecord(MemoryOutbox):
    """Its crashes go on where they were when an operator retries it."""

    def _take_marks_off(self, records: Iterable[ClaimedRecord]) -> None:
        super()._take_marks_off(record for record in records if not self._is_parked(record))

    def _is_parked(self, record: ClaimedRecord) -> bool:
        row = self._lanes[record.lane].rows.get(record.id)
        return row is not None and row.parked


# --- claiming ---


class ForgetsTheFenceAtClaim(MemoryOutbox):
    async def claim(
        self, lanes: Sequence[HeldLane], limit: int, *, in_flight: Collection[int] = ()
    ) -> Sequence[ClaimedRecord]:
        current = [HeldLane(lane.number, self._lanes[lane.number].fence) for lane in lanes]
        return await super().claim(current, limit, in_flight=in_flight)


class ForgetsTheFenceOfDeliveries(MemoryOutbox):
    async def settle(self, settlement: Settlement) -> None:
        for record in settlement.delivered:
            self._lanes[record.lane].rows.pop(record.id, None)
        await super().settle(replace(settlement, delivered=()))


class ForgetsTheFenceOfFailures(MemoryOutbox):
    async def settle(self, settlement: Settlement) -> None:
        for failed in settlement.failed:
            self._fail(failed)
        await super().settle(replace(settlement, failed=()))


class SettlesTheLanesThatAreLeft(MemoryOutbox):
    async def settle(self, settlement: Settlement) -> None:
        kept = [lane for lane in settlement.lanes if self._is_held(lane)]
        numbers = {lane.number for lane in kept}
        await super().settle(
            Settlement(lanes=kept, delivered=[each for each in settlement.delivered if each.lane in numbers])
        )
        self._check_fences(settlement.lanes)


class ClaimsWhatIsInFlight(MemoryOutbox):
    async def claim(
        self, lanes: Sequence[HeldLane], limit: int, *, in_flight: Collection[int] = ()
    ) -> Sequence[ClaimedRecord]:
        return await super().claim(lanes, limit)


class CountsInFlightAgainstTheLimit(MemoryOutbox):
    """As `LIMIT` does when the filter is applied to what the query returns."""

    async def claim(
        self, lanes: Sequence[HeldLane], limit: int, *, in_flight: Collection[int] = ()
    ) -> Sequence[ClaimedRecord]:
        return [each for each in await super().claim(lanes, limit) if each.id not in in_flight]


class ClaimsFromAllLanes(MemoryOutbox):
    async def claim(
        self, lanes: Sequence[HeldLane], limit: int, *, in_flight: Collection[int] = ()
    ) -> Sequence[ClaimedRecord]:
        everything = [HeldLane(number, lane.fence) for number, lane in enumerate(self._lanes) if lane.owner]
        return await super().claim(everything, limit, in_flight=in_flight)


class ClaimsTheNewestFirst(MemoryOutbox):
    async def claim(
        self, lanes: Sequence[HeldLane], limit: int, *, in_flight: Collection[int] = ()
    ) -> Sequence[ClaimedRecord]:
        return list(reversed(await super().claim(lanes, limit, in_flight=in_flight)))


class HandsOutHeldBackKeys(MemoryOutbox):
    def _walk(self, lanes: Iterable[int]) -> Iterator[tuple[_Row, str]]:
        return ((row, "due" if state == "held" else state) for row, state in super()._walk(lanes))


class HoldsBackTheKeyInEveryTopic(MemoryOutbox):
    def _walk(self, lanes: Iterable[int]) -> Iterator[tuple[_Row, str]]:
        held = {row.envelope.key for row in self._all_rows() if row.waits(self._clock.elapsed())} - {None}
        for row, state in super()._walk(lanes):
            yield row, "held" if state == "due" and row.envelope.key in held else state


class HoldsBackTheWholeKey(MemoryOutbox):
    """Also what was written before the parked record, so that a retry of the first of two never comes."""

    def _walk(self, lanes: Iterable[int]) -> Iterator[tuple[_Row, str]]:
        held = {row.order for row in self._all_rows() if row.parked} - {None}
        for row, state in super()._walk(lanes):
            yield row, "held" if state == "due" and row.order in held else state


class HoldsBackWhatHasNoKey(MemoryOutbox):
    def _walk(self, lanes: Iterable[int]) -> Iterator[tuple[_Row, str]]:
        blocked = any(row.parked and row.envelope.key is None for row in self._all_rows())
        for row, state in super()._walk(lanes):
            yield row, "held" if blocked and state == "due" and row.envelope.key is None else state


class TakesTheEmptyKeyForNone(MemoryOutbox):
    def _walk(self, lanes: Iterable[int]) -> Iterator[tuple[_Row, str]]:
        return (
            (row, "due" if state == "held" and not row.envelope.key else state) for row, state in super()._walk(lanes)
        )


class LetsHeldBackKeysUseUpTheLimit(MemoryOutbox):
    async def claim(
        self, lanes: Sequence[HeldLane], limit: int, *, in_flight: Collection[int] = ()
    ) -> Sequence[ClaimedRecord]:
        head = [row.id for row, state in self._walk(lane.number for lane in lanes) if state in ("due", "held")][:limit]
        claimed = await super().claim(lanes, limit, in_flight=in_flight)
        return [each for each in claimed if each.id in head]


# --- settling and operators ---


class KeepsWhatWasDelivered(MemoryOutbox):
    async def settle(self, settlement: Settlement) -> None:
        await super().settle(replace(settlement, delivered=()))


class ForgetsTheDelay(MemoryOutbox):
    def _fail(self, failed: FailedRecord) -> None:
        super()._fail(failed if failed.delay is None else replace(failed, delay=timedelta(0)))


class CountsNoAttempts(MemoryOutbox):
    def _fail(self, failed: FailedRecord) -> None:
        super()._fail(replace(failed, record=replace(failed.record, attempts=0)))


class RetriesAtTheEnd(MemoryOutbox):
    async def retry(self, ids: Collection[int], *, who: str) -> int:
        count = await super().retry(ids, who=who)
        for row in [row for row in self._all_rows() if row.id in ids and not row.parked]:
            del self._lanes[row.lane].rows[row.id]
            self.append([row.envelope])
        return count


class GoesOnCountingAfterARetry(MemoryOutbox):
    async def retry(self, ids: Collection[int], *, who: str) -> int:
        attempts = {row.id: row.attempts for row in self._all_rows()}
        count = await super().retry(ids, who=who)
        for row in self._all_rows():
            row.attempts = attempts[row.id]
        return count


class RetriesTheWholeKey(MemoryOutbox):
    async def retry(self, ids: Collection[int], *, who: str) -> int:
        keys = {row.order for row in self._all_rows() if row.id in ids}
        return await super().retry([row.id for row in self._all_rows() if row.order in keys], who=who)


class LetsARetryOvertake(MemoryOutbox):
    """A retried record is due whatever is parked before it."""

    async def retry(self, ids: Collection[int], *, who: str) -> int:
        self.retried = set(ids)
        return await super().retry(ids, who=who)

    def _walk(self, lanes: Iterable[int]) -> Iterator[tuple[_Row, str]]:
        retried = getattr(self, "retried", set())
        return ((row, "due" if state == "held" and row.id in retried else state) for row, state in super()._walk(lanes))


class DiscardsWhatIsPending(MemoryOutbox):
    async def discard(self, ids: Collection[int], *, who: str) -> int:
        rows = [row for row in self._all_rows() if row.id in ids]
        for row in rows:
            del self._lanes[row.lane].rows[row.id]
        return len(rows)


class StumblesOverDiscardedRecords(MemoryOutbox):
    async def settle(self, settlement: Settlement) -> None:
        for record in [*settlement.delivered, *(failed.record for failed in settlement.failed)]:
            self._lanes[record.lane].rows[record.id]
        await super().settle(settlement)


class FindsByAnyFilter(MemoryOutbox):
    async def find(self, wanted: OutboxFilter) -> Sequence[StoredRecord]:
        if wanted.topic and wanted.key:
            return await super().find(replace(wanted, key=None))
        return await super().find(wanted)


class ShowsHeldRecordsAsPending(MemoryOutbox):
    async def find(self, wanted: OutboxFilter) -> Sequence[StoredRecord]:
        found = await super().find(wanted)
        return [replace(each, state="pending") if each.state == "held" else each for each in found]


class CountsParkedAsPending(MemoryOutbox):
    async def backlog(self) -> Backlog:
        backlog = await super().backlog()
        return replace(backlog, pending=backlog.pending + backlog.parked)


class LosesWhatIsBehindAtARetry(MemoryOutbox):
    """Only the parked record comes back: the rest of its key stays behind nothing, for ever."""

    async def retry(self, ids: Collection[int], *, who: str) -> int:
        behind = {row.id for row, state in self._walk(range(LANES)) if state == "held"}
        count = await super().retry(ids, who=who)
        for row in self._all_rows():
            if row.id in behind:
                row.parked = True
        return count


class PutsNewRecordsBeforeThoseBehind(MemoryOutbox):
    """What was moved out of the way comes back with ids of its own, after what was written meanwhile."""

    async def retry(self, ids: Collection[int], *, who: str) -> int:
        count = await super().retry(ids, who=who)
        for row in [row for row in self._all_rows() if row.id in ids and not row.parked]:
            newer = [each for each in self._all_rows() if each.order == row.order and each.id > row.id][-1:]
            for each in newer:
                del self._lanes[each.lane].rows[each.id]
                self._lanes[each.lane].rows = {each.id: each, **self._lanes[each.lane].rows}
                each.id = 0
        return count


class HidesWhatIsBehind(MemoryOutbox):
    async def find(self, wanted: OutboxFilter) -> Sequence[StoredRecord]:
        return [each for each in await super().find(wanted) if each.state != "held"]


class ForgetsAKeyThatNobodyHolds(MemoryOutbox):
    """That the key is held back is known to the relay that parked it, not to the tables."""

    async def release(self, owner: str, lanes: Sequence[HeldLane], *, leaving: bool = False) -> None:
        await super().release(owner, lanes, leaving=leaving)
        self.forgotten = True

    def _walk(self, lanes: Iterable[int]) -> Iterator[tuple[_Row, str]]:
        forgotten = getattr(self, "forgotten", False)
        return ((row, "due" if forgotten and state == "held" else state) for row, state in super()._walk(lanes))


class DiscardsAndSetsTheWholeKeyFree(MemoryOutbox):
    async def discard(self, ids: Collection[int], *, who: str) -> int:
        keys = {row.order for row in self._all_rows() if row.id in ids}
        count = await super().discard(ids, who=who)
        for row in self._all_rows():
            row.parked = row.parked and row.order not in keys
        return count


class ReadsTheErrorAsAPattern(MemoryOutbox):
    async def find(self, wanted: OutboxFilter) -> Sequence[StoredRecord]:
        return await super().find(replace(wanted, error=None) if wanted.error == "%" else wanted)


class IgnoresTheAge(MemoryOutbox):
    async def find(self, wanted: OutboxFilter) -> Sequence[StoredRecord]:
        return await super().find(replace(wanted, older_than=None))


class ShowsTheFirstPageAlways(MemoryOutbox):
    async def find(self, wanted: OutboxFilter) -> Sequence[StoredRecord]:
        return await super().find(replace(wanted, after=0))


# --- history ---


class KeepsNothing(MemoryOutbox):
    async def settle(self, settlement: Settlement) -> None:
        await super().settle(replace(settlement, keep=False))


class ShowsTheHistoryUnasked(MemoryOutbox):
    async def find(self, wanted: OutboxFilter) -> Sequence[StoredRecord]:
        found = await super().find(wanted)
        return found if wanted.state else [*found, *await super().find(replace(wanted, state="delivered"))]


class ReplaysUnderTheOldSequence(MemoryOutbox):
    async def replay(self, ids: Collection[int], *, who: str) -> int:
        count = await super().replay(ids, who=who)
        kept = {row.envelope.id: row.envelope for _, row in self._history.values()}
        for row in self._all_rows():
            row.envelope = kept.get(row.envelope.id, row.envelope)
        return count


class ReplaysUnderNewIds(MemoryOutbox):
    async def replay(self, ids: Collection[int], *, who: str) -> int:
        rows = [row for record_id, (_, row) in self._history.items() if record_id in ids]
        self.append(replace(row.envelope, id=f"again-{row.envelope.id}") for row in rows)
        return len(rows)


class CleansUpWhatIsYoung(MemoryOutbox):
    def clean_up(self, history: timedelta | None, limit: int) -> int:
        return super().clean_up(None if history is None else timedelta(0), limit)


class CleansUpEverythingAtOnce(MemoryOutbox):
    def clean_up(self, history: timedelta | None, limit: int) -> int:
        return super().clean_up(history, 1_000_000)


# --- wake-ups ---


class SendsNowhere(MemoryWakeUps):
    async def send(self) -> None:
        pass


class WakesOneRelayOnly(MemoryWakeUps):
    async def send(self) -> None:
        for _, ear in self._ears[:1]:
            ear.sound("work")


class NeverEchoes(MemoryWakeUps):
    def echo(self, owner: str) -> None:
        pass


class EchoesToEverybody(MemoryWakeUps):
    def echo(self, owner: str) -> None:
        for _, ear in self._ears:
            ear.sound("echo")


class ForgetsWhatNobodyWaitedFor(MemoryWakeUps):
    """Like an event that is set for a moment."""

    @asynccontextmanager
    async def listen(self, owner: str) -> AsyncGenerator[Ear, None]:
        async with super().listen(owner) as ear:
            deaf: Any = ear
            hear = deaf.hear

            async def hear_from_now_on() -> Heard:
                deaf._heard.clear()
                deaf._sound = anyio.Event()
                return await hear()

            deaf.hear = hear_from_now_on
            yield ear


class StumblesOverThoseWhoLeft(MemoryWakeUps):
    def __init__(self) -> None:
        super().__init__()
        self.gone = False

    @asynccontextmanager
    async def listen(self, owner: str) -> AsyncGenerator[Ear, None]:
        async with super().listen(owner) as ear:
            yield ear
        self.gone = True

    async def send(self) -> None:
        if self.gone:
            raise StoreUnavailableError("memory", "the listener has gone")
        await super().send()


# --- the inbox ---


class KeyedByIdAlone(MemoryInbox):
    async def record(self, transaction: Transaction, consumer: str, envelope: Envelope) -> Noted:
        return await super().record(transaction, "anybody", envelope)


class ForgetsTheSource(MemoryInbox):
    async def record(self, transaction: Transaction, consumer: str, envelope: Envelope) -> Noted:
        return await super().record(transaction, consumer, replace(envelope, source=""))


class ComparesWithoutCase(MemoryInbox):
    async def record(self, transaction: Transaction, consumer: str, envelope: Envelope) -> Noted:
        return await super().record(transaction, consumer, replace(envelope, id=envelope.id.lower()))


class IgnoresTrailingBlanks(MemoryInbox):
    async def record(self, transaction: Transaction, consumer: str, envelope: Envelope) -> Noted:
        return await super().record(transaction, consumer, replace(envelope, id=envelope.id.rstrip()))


class RecordsOutsideTheTransaction(MemoryInbox):
    async def record(self, transaction: Transaction, consumer: str, envelope: Envelope) -> Noted:
        key = (consumer, envelope.source, envelope.id)
        noted = Noted.HAD if key in self._had else Noted.NEW
        self._had.add(key)
        return noted


class LetsCopiesRunSideBySide(MemoryInbox):
    async def _lock(self, key: Any, transaction: MemoryTransaction) -> bool:
        return True


class CallsAnOpenRecordADuplicate(MemoryInbox):
    """Does not wait: the message is lost if the first one rolls back."""

    async def _lock(self, key: Any, transaction: MemoryTransaction) -> bool:
        return key not in self._locked and await super()._lock(key, transaction)


class ParksTwice(MemoryInbox):
    async def park(self, parked: ParkedMessage) -> bool:
        self._ids.pop((parked.consumer, parked.envelope.source, parked.envelope.id), None)
        self._keep(parked, held=False)
        return True


class ParksForAllConsumersAtOnce(MemoryInbox):
    async def park(self, parked: ParkedMessage) -> bool:
        for old in await self.find(InboxFilter()):
            if old.envelope.id == parked.envelope.id and old.envelope.source == parked.envelope.source:
                self._parked.pop(old.id)
        return await super().park(parked)


class KeepsTheOldReason(MemoryInbox):
    async def park(self, parked: ParkedMessage) -> bool:
        known = any(old.envelope.id == parked.envelope.id for old in self._parked.values())
        return known or await super().park(parked)


class GoesOnRetrying(MemoryInbox):
    """A retry that failed leaves the wish for a retry standing."""

    async def park(self, parked: ParkedMessage) -> bool:
        wished = {old.envelope.id for old in self._parked.values() if old.retry_requested}
        kept = await super().park(parked)
        for old in list(self._parked.values()):
            if old.envelope.id in wished:
                self._parked[old.id] = replace(old, retry_requested=True)
        return kept


class MovesParkedAgainToTheEnd(MemoryInbox):
    async def park(self, parked: ParkedMessage) -> bool:
        for old in list(self._parked.values()):
            if old.envelope.id == parked.envelope.id and old.consumer == parked.consumer:
                self._take_out(old.id)
                self._had.discard((parked.consumer, parked.envelope.source, parked.envelope.id))
        return await super().park(parked)


class ParksWithoutHeaders(MemoryInbox):
    async def park(self, parked: ParkedMessage) -> bool:
        return await super().park(replace(parked, envelope=replace(parked.envelope, headers={})))


class UnparksAtOnce(MemoryInbox):
    async def unpark(self, transaction: Transaction, parked_id: int) -> bool:
        known = parked_id in self._parked
        if known:
            self._take_out(parked_id)
        return known


class LetsTwoUnpark(MemoryInbox):
    async def unpark(self, transaction: Transaction, parked_id: int) -> bool:
        await super().unpark(transaction, parked_id)
        return True


class RetriesForEverybody(MemoryInbox):
    async def retries(self, consumers: Collection[str], limit: int) -> Sequence[ParkedMessage]:
        return [each for each in self._parked.values() if each.retry_requested][:limit]


class TakesRetriedMessagesOut(MemoryInbox):
    async def retry(self, ids: Collection[int], *, who: str) -> int:
        return await self.discard(ids, who=who)


# --- keys that are held ---


class HoldsNoKey(MemoryInbox):
    async def record(self, transaction: Transaction, consumer: str, envelope: Envelope) -> Noted:
        noted = await super().record(transaction, consumer, envelope)
        return Noted.NEW if noted is Noted.HELD else noted


class HoldsTheKeyForEverybody(MemoryInbox):
    async def record(self, transaction: Transaction, consumer: str, envelope: Envelope) -> Noted:
        noted = await super().record(transaction, consumer, envelope)
        held = any(line[1:] == (envelope.topic, envelope.key) for line in self._lines)
        return Noted.HELD if noted is Noted.NEW and held else noted


class HoldsTheKeyOnEveryTopic(MemoryInbox):
    async def record(self, transaction: Transaction, consumer: str, envelope: Envelope) -> Noted:
        noted = await super().record(transaction, consumer, envelope)
        held = any((line[0], line[2]) == (consumer, envelope.key) for line in self._lines)
        return Noted.HELD if noted is Noted.NEW and held else noted


class TakesTheEmptyKeyForNoKey(MemoryInbox):
    async def record(self, transaction: Transaction, consumer: str, envelope: Envelope) -> Noted:
        return await super().record(transaction, consumer, replace(envelope, key=envelope.key or None))


class NotesWhatIsHeld(MemoryInbox):
    async def record(self, transaction: Transaction, consumer: str, envelope: Envelope) -> Noted:
        noted = await super().record(transaction, consumer, envelope)
        if noted is Noted.HELD:
            self._had.add((consumer, envelope.source, envelope.id))
        return noted


class ForgetsThatAParkedOneWasHad(MemoryInbox):
    async def park(self, parked: ParkedMessage) -> bool:
        kept = await super().park(parked)
        self._had.discard((parked.consumer, parked.envelope.source, parked.envelope.id))
        return kept


class ParksWhatWasHandled(MemoryInbox):
    async def park(self, parked: ParkedMessage) -> bool:
        self._had.discard((parked.consumer, parked.envelope.source, parked.envelope.id))
        return await super().park(parked)


class ParksBesideACopy(MemoryInbox):
    async def _until_unlocked(self, *keys: Any) -> None:
        """Does not wait for anybody."""


class HoldsBackBehindNothing(MemoryInbox):
    async def hold_back(self, parked: ParkedMessage) -> bool:
        self._keep(parked, held=True)
        return True


class HoldsBackTwice(MemoryInbox):
    async def hold_back(self, parked: ParkedMessage) -> bool:
        self._had.discard((parked.consumer, parked.envelope.source, parked.envelope.id))
        return await super().hold_back(parked)


class ShowsHeldOnesAsFailed(MemoryInbox):
    async def hold_back(self, parked: ParkedMessage) -> bool:
        kept = await super().hold_back(parked)
        self._parked = {each.id: replace(each, held=False) for each in self._parked.values()}
        return kept


class LeavesTheNextWaiting(MemoryInbox):
    def _take_out(self, parked_id: int) -> None:
        super()._take_out(parked_id)
        self._parked = {each.id: replace(each, retry_requested=False) for each in self._parked.values()}


class AsksForAllBehind(MemoryInbox):
    def _take_out(self, parked_id: int) -> None:
        super()._take_out(parked_id)
        self._parked = {each.id: replace(each, retry_requested=True) for each in self._parked.values()}


class FreesTheKeyWithTheFirst(MemoryInbox):
    def _take_out(self, parked_id: int) -> None:
        super()._take_out(parked_id)
        self._lines.clear()

    def _is_first(self, parked: ParkedMessage) -> bool:
        return True


class KeepsTheKeyForEver(MemoryInbox):
    def _take_out(self, parked_id: int) -> None:
        lines = list(self._lines)
        super()._take_out(parked_id)
        for line in lines:
            self._lines.setdefault(line, [0])


class RetriesTheSecondFirst(MemoryInbox):
    def _is_first(self, parked: ParkedMessage) -> bool:
        return True


class LetsHeldOnesBeAskedFor(MemoryInbox):
    async def retry(self, ids: Collection[int], *, who: str) -> int:
        self._parked = {each.id: replace(each, held=False) for each in self._parked.values()}
        return await super().retry(ids, who=who)


class DiscardsWithoutTheNext(MemoryInbox):
    async def discard(self, ids: Collection[int], *, who: str) -> int:
        wished = {each.id for each in self._parked.values() if each.retry_requested}
        count = await super().discard(ids, who=who)
        self._parked = {each.id: replace(each, retry_requested=each.id in wished) for each in self._parked.values()}
        return count


class ForgetsWhatIsDiscarded(MemoryInbox):
    async def discard(self, ids: Collection[int], *, who: str) -> int:
        for each in [self._parked[each] for each in ids if each in self._parked]:
            self._had.discard((each.consumer, each.envelope.source, each.envelope.id))
        return await super().discard(ids, who=who)


class FindsByPatterns(MemoryInbox):
    def _is_meant(self, parked: ParkedMessage, wanted: InboxFilter) -> bool:
        pattern = "" if wanted.error is None else wanted.error.replace("%", ".*").replace("_", ".")
        return super()._is_meant(parked, replace(wanted, error=None)) and bool(re.search(pattern, parked.error))


# --- many at once ---


class RecordsManyWithOneAnswer(MemoryInbox):
    async def record_all(
        self, transaction: Transaction, consumer: str, envelopes: Sequence[Envelope]
    ) -> Sequence[Noted]:
        answers = await super().record_all(transaction, consumer, envelopes)
        return [min(answers, key=list(Noted).index)] * len(answers) if answers else answers


class RecordsManyInTheirOwnOrder(MemoryInbox):
    async def record_all(
        self, transaction: Transaction, consumer: str, envelopes: Sequence[Envelope]
    ) -> Sequence[Noted]:
        answers: list[Noted] = []
        for each in envelopes:
            answers.append(await self.record(transaction, consumer, each))
            await anyio.lowlevel.checkpoint()
        return answers


class RecordsManyOutsideTheTransaction(MemoryInbox):
    async def record_all(
        self, transaction: Transaction, consumer: str, envelopes: Sequence[Envelope]
    ) -> Sequence[Noted]:
        answers = await super().record_all(transaction, consumer, envelopes)
        self._had.update((consumer, each.source, each.id) for each in envelopes)
        return answers


# --- marks ---


class ForgetsTheSuspect(MemoryInbox):
    async def mark(self, group: str, owner: str, marks: Collection[Mark]) -> None:
        await super().mark(group, owner, [replace(each, suspect=None) for each in marks])


class TellsAMarkOnce(MemoryInbox):
    async def take_marks(self, group: str, owner: str, partitions: Collection[tuple[str, int]]) -> Sequence[Mark]:
        taken = await super().take_marks(group, owner, partitions)
        for each in taken:
            del self._marks[group, each.topic, each.partition]
        return taken


class KeepsTheFirstMark(MemoryInbox):
    async def mark(self, group: str, owner: str, marks: Collection[Mark]) -> None:
        await super().mark(group, owner, [m for m in marks if (group, m.topic, m.partition) not in self._marks])


class TellsAWorkerItsOwnMarks(MemoryInbox):
    async def take_marks(self, group: str, owner: str, partitions: Collection[tuple[str, int]]) -> Sequence[Mark]:
        return await super().take_marks(group, "", partitions)


class TakesNoMarkOff(MemoryInbox):
    async def unmark(self, group: str, owner: str, partitions: Collection[tuple[str, int]]) -> None:
        """Leaves them all."""


class AcquitsAtAStop(MemoryInbox):
    async def unmark(self, group: str, owner: str, partitions: Collection[tuple[str, int]]) -> None:
        for place in partitions:
            if self._marks.get((group, *place), ("", None))[0] == owner:
                del self._marks[(group, *place)]


class TakesOffAnybodysMarks(MemoryInbox):
    async def unmark(self, group: str, owner: str, partitions: Collection[tuple[str, int]]) -> None:
        for place in partitions:
            self._marks.pop((group, *place), None)


class SharesMarksAmongGroups(MemoryInbox):
    async def take_marks(self, group: str, owner: str, partitions: Collection[tuple[str, int]]) -> Sequence[Mark]:
        groups = {known[0] for known in self._marks}
        return [mark for each in groups for mark in await super(type(self), self).take_marks(each, owner, partitions)]
