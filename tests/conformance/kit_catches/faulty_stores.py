"""Outboxes and inboxes with one fault each, of the kind that real ones have had."""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import anyio
import anyio.lowlevel

from cqrs_decor.clock import Clock
from cqrs_decor.envelope import Envelope
from cqrs_decor.inbox import InboxFilter, Mark, Noted, ParkedMessage
from cqrs_decor.lanes import LANES, HeldLane, lane_of
from cqrs_decor.memory import MemoryInbox, MemoryOutbox, MemoryStore, MemoryTransaction
from cqrs_decor.memory.outbox import _Row
from cqrs_decor.outbox import Backlog, ClaimedRecord, FailedRecord, OutboxFilter, Settlement, StoredRecord
from cqrs_decor.unit_of_work import Transaction


class FaultyStore(MemoryStore):
    """A store in memory with another outbox, inbox or transaction."""

    def __init__(
        self,
        clock: Clock,
        outbox: type[MemoryOutbox] = MemoryOutbox,
        inbox: type[MemoryInbox] = MemoryInbox,
        transaction: type[MemoryTransaction] = MemoryTransaction,
    ) -> None:
        super().__init__(clock=clock)
        self.outbox = self._outbox = outbox(clock)
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
    async def acquire(self, owner: str, lease: timedelta, limit: int) -> Sequence[HeldLane]:
        for lane in self._lanes:
            lane.owner = None if lane.owner != owner else owner
        return await super().acquire(owner, lease, limit)


class NeverRaisesTheFence(MemoryOutbox):
    async def acquire(self, owner: str, lease: timedelta, limit: int) -> Sequence[HeldLane]:
        lanes = await super().acquire(owner, lease, limit)
        for lane in lanes:
            self._lanes[lane.number].fence = 1
        return [HeldLane(lane.number, 1) for lane in lanes]


class KeepsLeasesForEver(MemoryOutbox):
    async def acquire(self, owner: str, lease: timedelta, limit: int) -> Sequence[HeldLane]:
        return await super().acquire(owner, timedelta(days=365), limit)


class RenewsWithoutExtending(MemoryOutbox):
    async def renew(self, owner: str, lanes: Sequence[HeldLane], lease: timedelta) -> Sequence[HeldLane]:
        return [lane for lane in lanes if self._is_held(lane, owner)]


class RenewsWithoutLookingAtTheOwner(MemoryOutbox):
    """A lease that is extended without checking its owner is no lease."""

    async def renew(self, owner: str, lanes: Sequence[HeldLane], lease: timedelta) -> Sequence[HeldLane]:
        return lanes


class ReleasesWhatOthersHold(MemoryOutbox):
    async def release(self, owner: str, lanes: Sequence[HeldLane]) -> None:
        for lane in lanes:
            self._lanes[lane.number].owner = None


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


# --- claiming ---


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


class TakesOffAnybodysMarks(MemoryInbox):
    async def unmark(self, group: str, owner: str, partitions: Collection[tuple[str, int]]) -> None:
        for place in partitions:
            self._marks.pop((group, *place), None)


class SharesMarksAmongGroups(MemoryInbox):
    async def take_marks(self, group: str, owner: str, partitions: Collection[tuple[str, int]]) -> Sequence[Mark]:
        groups = {known[0] for known in self._marks}
        return [mark for each in groups for mark in await super(type(self), self).take_marks(each, owner, partitions)]
