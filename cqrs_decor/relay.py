"""The relay: takes records from the outbox to the broker, in order per key, each at least once.

Three tasks hand batches on, so that the next claim and the last settlement run while a batch flies:
claim -> publish -> settle. A fourth holds the lanes, a fifth listens for wake-ups. What makes it safe is not here but
in the store: a claim and a settlement are refused when the fence of a lane has moved on.

Lanes whose last holder vanished go in single steps, through the same tasks, until what it had in hand has got through.
"""

import heapq
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from math import inf
from typing import Final

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from cqrs_decor._ids import new_id
from cqrs_decor._loop import Outage, Signal, Turns
from cqrs_decor._time_limit import TimeGuard, time_limit
from cqrs_decor.broker import Broker, worth_retrying
from cqrs_decor.clock import Clock
from cqrs_decor.crash_points import reach
from cqrs_decor.errors import (
    BrokerError,
    BrokerUnavailableError,
    LaneLostError,
    RecordKillsRelaysError,
    StoreError,
    StoreUnavailableError,
    UnreadableRecordError,
)
from cqrs_decor.lane_holding import LaneHolding
from cqrs_decor.lanes import HeldLane
from cqrs_decor.observers import BatchPublished, Observers
from cqrs_decor.outbox import ClaimedRecord, FailedRecord, OutboxStore, Settlement
from cqrs_decor.retry import RELAY_RETRY, Retry
from cqrs_decor.wakeups import ECHO_WITHIN_S, Listening

_logger = logging.getLogger(__name__)

MAX_CRASHES: Final = 3
"""A record that so many relays in a row vanished with is parked instead of being published once more."""

_BATCHES_IN_HAND: Final = 5
"""One each of claim, publish and settle, and one in each of the two streams between them."""

_SHOWN = 1_000
"""So many of the last records that were parked are kept in words, for whoever drains; all of them are in the store."""

Key = tuple[str, str]


@dataclass(slots=True, eq=False)
class _Batch:
    """A claim on its way.

    Attributes:
        lanes: The lanes with the fences under which it was claimed; of a step, those that are marked.
        stepped: It has one record of each of its lanes, which are marked with them.
        unmarked: The marks are off again: it was given up.
        alone: Nothing else of this relay flies meanwhile.
        safe_until: Until then it may fly, unless a renewal that keeps its lanes allows it more.
    """

    lanes: dict[int, HeldLane]
    records: Sequence[ClaimedRecord]
    delivered: list[ClaimedRecord] = field(default_factory=list[ClaimedRecord])
    failed: list[FailedRecord] = field(default_factory=list[FailedRecord])
    stepped: bool = False
    unmarked: bool = False
    alone: bool = False
    began: float = 0.0
    safe_until: float = -inf


class Relay:
    """Publishes the records of the lanes it holds. Run one or several; each record is in one relay's hands at a time.

    Args:
        outbox: Where records come from.
        broker: Where they go.
        lease: How long its lanes stay its own without a sign of life.
        batch: Records claimed at once.
        poll_interval_s: How often it looks for work when the store cannot wake it.
        clock: Time.
        observers: Told of batches, lanes, suspicions and wake-ups.
        publish_timeout: What the broker may take for one batch before it is called away.
        keep_history: Whether delivered records are kept.
        retry: What it does with a record that the broker refuses.
        store_turns: Of all in this process that wait for the same database.
        broker_turns: Of all in this process that wait for the same broker.
    """

    def __init__(
        self,
        outbox: OutboxStore,
        broker: Broker,
        *,
        lease: timedelta,
        batch: int,
        poll_interval_s: float,
        clock: Clock,
        observers: Observers,
        publish_timeout: timedelta = timedelta(seconds=9),
        keep_history: bool = False,
        retry: Retry = RELAY_RETRY,
        store_turns: Turns | None = None,
        broker_turns: Turns | None = None,
    ) -> None:
        self.owner = new_id()
        self.published = 0
        self.parked: deque[str] = deque(maxlen=_SHOWN)
        self._outbox = outbox
        self._broker = broker
        self._batch = batch
        self._poll_interval_s = poll_interval_s
        self._clock = clock
        self._observers = observers
        self._publish_timeout_s = publish_timeout.total_seconds()
        self._guard = TimeGuard(clock)
        self._keep_history = keep_history
        self._retry = retry
        self._holding = LaneHolding(
            outbox, self.owner, lease=lease, in_hand=_BATCHES_IN_HAND * batch, clock=clock, observers=observers
        )
        self._listening: Listening | None = None
        if outbox.wake_ups is not None:
            self._listening = Listening(
                outbox.wake_ups,
                self.owner,
                wake=self.wake,
                connected=self._look_at_lanes,
                clock=clock,
                observers=observers,
            )
        self._flying: list[_Batch] = []
        self._asking: Sequence[HeldLane] = ()
        self._unsure: dict[int, HeldLane] = {}
        self._in_flight: set[int] = set()
        self._blocked: set[Key] = set()
        self._due: list[float] = []
        self._wake = Signal()
        self._look = Signal()
        self._stopping = False
        self._idle = False
        self._progress_at: float | None = None
        self._store_outage = Outage("the outbox", _logger, clock, observers, store_turns)
        self._broker_outage = Outage("the broker", _logger, clock, observers, broker_turns)

    def wake(self) -> None:
        """There may be work: look now instead of when the time for it has come."""
        self._idle = False
        self._wake.set()

    def stop(self) -> None:
        """Claim nothing more; `run` ends when what flies has been settled."""
        self._stopping = True
        self._wake.set()

    @property
    def idle(self) -> bool:
        """The last look at the outbox found nothing, and nothing is in flight."""
        return self._idle and not self._flying

    @property
    def lanes_held(self) -> int:
        return len(self._holding.held)

    @property
    def wake_ups_work(self) -> bool:
        """Whether commits of other processes wake it; else it looks for work at intervals."""
        return self._listening is not None and self._listening.works

    @property
    def progress_at(self) -> float | None:
        """The clock's `elapsed()` when the store last answered it; None before it ever did."""
        return self._progress_at

    async def run(self) -> None:
        """Relay until stopped or cancelled, then give the lanes back. It can be run again after a failure."""
        self._flying, self._asking, self._unsure, self._in_flight, self._blocked = [], (), {}, set(), set()
        to_publish, claimed = anyio.create_memory_object_stream[_Batch](1)
        to_settle, published = anyio.create_memory_object_stream[_Batch](1)
        try:
            # Closed last: a task that is cancelled must not find the one it hands on to gone, and call that a fault.
            async with claimed, published, anyio.create_task_group() as tasks:
                tasks.start_soon(self._hold_lanes)
                if self._listening is not None:
                    tasks.start_soon(self._listening.run)
                tasks.start_soon(self._guard.run)
                tasks.start_soon(self._publish_all, claimed, to_settle)
                tasks.start_soon(self._claim_all, to_publish)
                await self._settle_all(published)
                tasks.cancel_scope.cancel()
        finally:
            await self._give_lanes_back()

    def _note_progress(self) -> None:
        self._progress_at = self._clock.elapsed()

    async def _pause(self, signal: Signal, seconds: float) -> bool:
        """Wait for the signal, at most so long by the relay's clock; whether it came."""
        if seconds == inf:
            return await signal.wait(inf)
        ends_at = self._clock.elapsed() + seconds
        async with time_limit(self._clock, lambda: ends_at - self._clock.elapsed()):
            return await signal.wait(inf)
        return False

    # --- lanes ------------------------------------------------------------------------------------------------------

    async def _hold_lanes(self) -> None:
        while True:
            try:
                await self._refresh()
                self._store_outage.over()
            except StoreUnavailableError as error:
                await self._store_outage.wait(error)
                continue
            except LaneLostError as error:
                self._holding.lose(error)
                continue
            self._note_progress()
            if self._holding.waits:
                self.wake()
            await self._until_next_look()

    async def _refresh(self) -> None:
        try:
            if self._listening is not None:
                self._listening.expect_echo()
            await self._holding.refresh()
        except StoreUnavailableError:
            if self._listening is not None:
                self._listening.expect_nothing()
            raise
        await self._holding.give_surplus_back(self._lanes_in_use())

    async def _until_next_look(self) -> None:
        """Wait; on the way, find out whether the renewal was heard."""
        look_at = self._clock.elapsed() + self._holding.next_look_s
        if self._listening is not None:
            looks_now = await self._pause(self._look, min(self._holding.next_look_s, ECHO_WITHIN_S))
            self._listening.judge()
            if looks_now:
                return
        await self._pause(self._look, look_at - self._clock.elapsed())

    def _look_at_lanes(self) -> None:
        """Renew now instead of when the time for it has come."""
        self._look.set()
        self.wake()

    def _lanes_in_use(self) -> set[int]:
        """Lanes of what flies, and of what is being asked for at this moment."""
        in_use = {lane.number for lane in self._asking}
        for batch in self._flying:
            in_use.update(batch.lanes if batch.stepped else (record.lane for record in batch.records))
        return in_use

    async def _give_lanes_back(self) -> None:
        with anyio.move_on_after(2, shield=True):
            try:
                await self._holding.leave()
            except StoreUnavailableError:
                pass  # their lease ends by itself

    # --- claim ------------------------------------------------------------------------------------------------------

    async def _claim_all(self, to_publish: MemoryObjectSendStream[_Batch]) -> None:
        async with to_publish:
            while not self._stopping:
                batch = await self._next()
                if batch is None:
                    await self._pause(self._wake, self._patience_s())
                    continue
                self._in_flight.update(record.id for record in batch.records)
                self._flying.append(batch)
                reach("relay.claimed")
                await to_publish.send(batch)

    def _patience_s(self) -> float:
        """When to look for work if nothing says that there is some: while wake-ups work, when a record comes due."""
        if not self.wake_ups_work or self._holding.inherited or not self._may_claim():
            return self._poll_interval_s
        return max(self._due[0] - self._clock.elapsed(), 0.0) if self._due else inf

    async def _next(self) -> _Batch | None:
        """What to publish next. A lane in which a record is accused goes alone: if this relay vanishes with it as well,
        nothing else can have been the cause.
        """
        if not self._may_claim():
            return None
        while self._due and self._due[0] <= self._clock.elapsed():
            heapq.heappop(self._due)
        if accused := self._holding.accused():
            return None if self._flying else await self._step(accused[:1], alone=True)
        suspected = self._holding.suspected()
        if suspected and not any(batch.stepped for batch in self._flying):
            batch = await self._step(suspected)
            if batch is not None:
                return batch
        return await self._claim()

    def _may_claim(self) -> bool:
        alone = any(batch.alone for batch in self._flying)
        return self._holding.is_sure and not self._is_left_behind() and not alone

    def _is_left_behind(self) -> bool:
        """Whether a batch left something behind that those in flight must not overtake. Until all are settled nothing
        more is claimed: it would be blocked as well and left behind in its turn, and so on without end.
        """
        if not self._flying:
            self._blocked.clear()
        return bool(self._blocked)

    async def _claim(self) -> _Batch | None:
        lanes = self._holding.claimable()
        if not lanes:
            return None
        self._asking = lanes
        try:
            records = await self._outbox.claim(lanes, self._batch, in_flight=frozenset(self._in_flight))
        except StoreUnavailableError as error:
            await self._store_outage.wait(error)
            return None
        except LaneLostError as error:
            self._holding.lose(error)
            return None
        finally:
            self._asking = ()
        self._note_progress()
        self._idle = not records
        return _Batch(lanes={lane.number: lane for lane in lanes}, records=records) if records else None

    async def _step(self, lanes: Sequence[HeldLane], *, alone: bool = False) -> _Batch | None:
        """The first record of each of these lanes, marked on its lane; a lane that has none left is cleared."""
        until = max(self._holding.suspicions[lane.number].until for lane in lanes)
        self._asking = lanes
        try:
            await self._unmark_unsure(lanes)
            records = await self._outbox.step(lanes, until=until)
        except StoreUnavailableError as error:
            self._unsure.update((lane.number, lane) for lane in lanes)
            await self._store_outage.wait(error)
            return None
        except LaneLostError as error:
            self._holding.lose(error)
            return None
        finally:
            self._asking = ()
        self._note_progress()
        marked = {record.lane for record in records}
        for lane in lanes:
            if lane.number not in marked:
                self._holding.clear(lane.number)
        if not records:
            self._wake.set()
            return None
        return _Batch(
            lanes={lane.number: lane for lane in lanes if lane.number in marked},
            records=[record for record in records if record.crashes < MAX_CRASHES],
            failed=[_condemned(record) for record in records if record.crashes >= MAX_CRASHES],
            stepped=True,
            alone=alone,
        )

    async def _unmark_unsure(self, lanes: Sequence[HeldLane]) -> None:
        """Marks that may stand although nobody vanished (an answer was lost, a step was left behind) must not count."""
        unsure = [lane for lane in lanes if self._unsure.get(lane.number) == lane]
        if unsure:
            await self._outbox.unmark(unsure)
        for lane in lanes:
            self._unsure.pop(lane.number, None)

    # --- publish ----------------------------------------------------------------------------------------------------

    async def _publish_all(
        self, claimed: MemoryObjectReceiveStream[_Batch], to_settle: MemoryObjectSendStream[_Batch]
    ) -> None:
        async with to_settle:
            async for batch in claimed:
                batch.began = self._clock.elapsed()
                await self._publish(batch)
                if batch.delivered:
                    reach("relay.published")
                await to_settle.send(batch)

    async def _publish(self, batch: _Batch) -> None:
        """Publish until the broker has taken or refused each record, or the lanes are no longer surely ours. A step
        that meets an outage is given up, to be taken anew: its mark must not stand while nothing is published.
        """
        self._set_unreadable_aside(batch)
        while self._holding.is_sure and not (self._stopping and self._broker_outage.lasts):
            records = self._publishable(batch)
            if not records:
                break
            try:
                outcomes = await self._publish_in_time(batch, records)
            except BrokerUnavailableError as error:
                if batch.stepped:
                    await self._unmark(batch)
                await self._broker_outage.wait(error)
                if batch.stepped:
                    break
            else:
                if outcomes is not None:
                    self._note_outcomes(batch, records, outcomes)
                break
        self._block_undelivered(batch)

    def _set_unreadable_aside(self, batch: _Batch) -> None:
        """Records that are no messages are parked unpublished; nothing of their keys passes them meanwhile."""
        for record in batch.records:
            if record.unreadable is not None:
                batch.failed.append(_unreadable(record, record.unreadable))
                if record.envelope.key is not None:
                    self._blocked.add((record.envelope.topic, record.envelope.key))

    async def _publish_in_time(
        self, batch: _Batch, records: Sequence[ClaimedRecord]
    ) -> Sequence[BrokerError | None] | None:
        """The outcomes; None if they had not come when the lanes were no longer surely ours.

        Raises:
            BrokerUnavailableError: Also when the broker took too long.
        """
        batch.safe_until = self._holding.safe_until
        late_at = self._clock.elapsed() + self._publish_timeout_s
        with self._guard.limit(lambda: min(late_at, self._safe_until(batch)) - self._clock.elapsed()):
            outcomes = await self._broker.publish([record.envelope for record in records])
            self._broker_outage.over()
            return outcomes
        if self._clock.elapsed() < self._safe_until(batch):
            raise BrokerUnavailableError(self._broker.name, f"no answer within {self._publish_timeout_s:g} s")
        return None

    def _safe_until(self, batch: _Batch) -> float:
        """What flies may fly for as long as its lanes are surely ours: longer with each renewal that keeps them all."""
        if all(self._holding.holds(lane) for lane in batch.lanes.values()):
            batch.safe_until = self._holding.safe_until
        return batch.safe_until

    async def _unmark(self, batch: _Batch) -> None:
        lanes = list(batch.lanes.values())
        try:
            await self._outbox.unmark(lanes)
        except StoreUnavailableError:
            self._unsure.update((lane.number, lane) for lane in lanes)
        batch.unmarked = True

    def _publishable(self, batch: _Batch) -> list[ClaimedRecord]:
        """Without those whose lane was lost since the claim, or of whose key an earlier one was left behind since."""
        ours = {number for number, lane in batch.lanes.items() if self._holding.holds(lane)}
        return [
            record
            for record in batch.records
            if record.lane in ours
            and record.unreadable is None
            and (not self._blocked or (record.envelope.topic, record.envelope.key) not in self._blocked)
        ]

    def _note_outcomes(
        self, batch: _Batch, records: Sequence[ClaimedRecord], outcomes: Sequence[BrokerError | None]
    ) -> None:
        """Sort the outcomes. A later record of a key that failed was held back, not refused: it stays pending."""
        if len(outcomes) == len(records) and not any(outcomes):
            batch.delivered.extend(records)
            return
        refused: set[Key] = set()
        for record, error in zip(records, outcomes, strict=True):
            key = record.envelope.key
            if error is None:
                batch.delivered.append(record)
            elif key is None or (record.envelope.topic, key) not in refused:
                batch.failed.append(self._failure(record, error))
                if key is not None:
                    refused.add((record.envelope.topic, key))

    def _block_undelivered(self, batch: _Batch) -> None:
        """Batches that were claimed before this one is settled must not overtake what it leaves behind."""
        if len(batch.delivered) == len(batch.records):
            return
        delivered = {record.id for record in batch.delivered}
        for record in batch.records:
            if record.id not in delivered and record.envelope.key is not None:
                self._blocked.add((record.envelope.topic, record.envelope.key))

    def _failure(self, record: ClaimedRecord, error: BrokerError) -> FailedRecord:
        attempt = record.attempts + 1
        again = worth_retrying(error) and self._retry.allows(error, attempt)
        return FailedRecord(
            record=record,
            error=f"{type(error).__name__}: {error.problem}",
            delay=self._retry.delay(attempt) if again else None,
        )

    # --- settle -----------------------------------------------------------------------------------------------------

    async def _settle_all(self, published: MemoryObjectReceiveStream[_Batch]) -> None:
        async for batch in published:
            await self._settle(batch)
            self._flying.remove(batch)
            self._in_flight.difference_update(record.id for record in batch.records)
            self._wake.set()
            if self._holding.surplus:
                self._look.set()

    async def _settle(self, batch: _Batch) -> None:
        """Record the outcome, without what belongs to a lane that was lost: its new owner repeats that."""
        while True:
            settlement = self._settlement(batch)
            if not settlement.delivered and not settlement.failed:
                break
            try:
                await self._outbox.settle(settlement)
            except StoreUnavailableError as error:
                await self._store_outage.wait(error)
            except LaneLostError as error:
                self._holding.lose(error)
            else:
                reach("relay.settled")
                self._store_outage.over()
                self._note_progress()
                self._note_due(settlement)
                self._tell_of_batch(batch, settlement)
                break
        if batch.stepped:
            self._end_step(batch, settlement)

    def _settlement(self, batch: _Batch) -> Settlement:
        numbers = {record.lane for record in batch.delivered} | {each.record.lane for each in batch.failed}
        ours = {number for number in numbers if self._holding.holds(batch.lanes[number])}
        return Settlement(
            lanes=[batch.lanes[number] for number in sorted(ours)],
            delivered=[record for record in batch.delivered if record.lane in ours],
            failed=[failure for failure in batch.failed if failure.record.lane in ours],
            stepped=batch.stepped,
            keep=self._keep_history,
        )

    def _note_due(self, settlement: Settlement) -> None:
        """By then the store has them due as well: it counted from an earlier moment."""
        for failure in settlement.failed:
            if failure.delay is not None:
                heapq.heappush(self._due, self._clock.elapsed() + failure.delay.total_seconds())

    def _end_step(self, batch: _Batch, settlement: Settlement) -> None:
        settled = {lane.number for lane in settlement.lanes}
        for number, lane in batch.lanes.items():
            if number in settled:
                self._holding.acquit(number)
            elif not batch.unmarked:
                self._unsure[number] = lane

    def _tell_of_batch(self, batch: _Batch, settlement: Settlement) -> None:
        parked = [failure for failure in settlement.failed if failure.delay is None]
        self.published += len(settlement.delivered)
        self.parked.extend(
            f"{failure.record.envelope.type} {failure.record.envelope.id}: {failure.error}" for failure in parked
        )
        self._observers.notice(
            BatchPublished(
                delivered=len(settlement.delivered),
                rescheduled=len(settlement.failed) - len(parked),
                parked=len(parked),
                seconds=self._clock.elapsed() - batch.began,
            )
        )
        for failure in settlement.failed:
            facts = {
                "action": "record_parked" if failure.delay is None else "record_rescheduled",
                "record_id": failure.record.id,
                "message_id": failure.record.envelope.id,
                "topic": failure.record.envelope.topic,
                "attempts": failure.record.attempts + 1,
            }
            _logger.warning("a record was not delivered: %s", failure.error.partition(":")[0], extra=facts)


def _condemned(record: ClaimedRecord) -> FailedRecord:
    return _parked(record, RecordKillsRelaysError(record.id, record.envelope.type, record.crashes))


def _unreadable(record: ClaimedRecord, reason: str) -> FailedRecord:
    return _parked(record, UnreadableRecordError(record.id, reason))


def _parked(record: ClaimedRecord, error: StoreError) -> FailedRecord:
    return FailedRecord(record=record, error=f"{type(error).__name__}: {error.problem}", delay=None)
