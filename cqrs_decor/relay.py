"""The relay: takes records from the outbox to the broker, in order per key, each at least once.

Three tasks hand batches on, so that the next claim and the last settlement run while a batch flies:
claim -> publish -> settle. A fourth holds the lanes. What makes it safe is not here but in the store: a claim and a
settlement are refused when the fence of a lane has moved on.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from math import inf

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from cqrs_decor._ids import new_id
from cqrs_decor._loop import Outage, Signal
from cqrs_decor.broker import Broker, worth_retrying
from cqrs_decor.clock import Clock
from cqrs_decor.crash_points import reach
from cqrs_decor.errors import BrokerError, BrokerUnavailableError, LaneLostError, StoreUnavailableError
from cqrs_decor.lanes import HeldLane
from cqrs_decor.observers import BatchPublished, FenceRejected, LanesChanged, Observers
from cqrs_decor.outbox import ClaimedRecord, FailedRecord, OutboxStore, Settlement
from cqrs_decor.retry import RELAY_RETRY, Retry

_logger = logging.getLogger(__name__)

_SAFETY = 0.3
"""Publishing stops when this share of a lease is left: what flies then still lands before another relay may begin."""

Key = tuple[str, str]


@dataclass(slots=True)
class _Batch:
    """A claim on its way.

    Attributes:
        lanes: The lanes with the fences under which it was claimed.
    """

    lanes: dict[int, HeldLane]
    records: Sequence[ClaimedRecord]
    delivered: list[ClaimedRecord] = field(default_factory=list[ClaimedRecord])
    failed: list[FailedRecord] = field(default_factory=list[FailedRecord])
    began: float = 0.0


class Relay:
    """Publishes the records of the lanes it holds. Run one or several; each record is in one relay's hands at a time.

    Args:
        outbox: Where records come from.
        broker: Where they go.
        lease: How long its lanes stay its own without a sign of life.
        batch: Records claimed at once.
        poll_interval_s: How often it looks for work when nothing wakes it.
        clock: Time.
        observers: Told of batches and lanes.
        retry: What it does with a record that the broker refuses.
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
        retry: Retry = RELAY_RETRY,
    ) -> None:
        self.owner = new_id()
        self.published = 0
        self.parked: list[str] = []
        self._outbox = outbox
        self._broker = broker
        self._lease = lease
        self._batch = batch
        self._poll_interval_s = poll_interval_s
        self._clock = clock
        self._observers = observers
        self._retry = retry
        self._lanes: dict[int, HeldLane] = {}
        self._safe_until = -inf
        self._publishing = anyio.CancelScope()
        self._in_flight: set[int] = set()
        self._flying = 0
        self._blocked: set[Key] = set()
        self._wake = Signal()
        self._stopping = False
        self._idle = False
        self._store_outage = Outage("the outbox", _logger, clock, observers)
        self._broker_outage = Outage("the broker", _logger, clock, observers)

    def wake(self) -> None:
        """There may be work: look now instead of at the next poll."""
        self._idle = False
        self._wake.set()

    def stop(self) -> None:
        """Claim nothing more; `run` ends when what flies has been settled."""
        self._stopping = True
        self._wake.set()

    @property
    def idle(self) -> bool:
        """The last look at the outbox found nothing, and nothing is in flight."""
        return self._idle and not self._in_flight

    @property
    def lanes_held(self) -> int:
        return len(self._lanes)

    async def run(self) -> None:
        """Relay until stopped or cancelled, then give the lanes back. It can be run again after a failure."""
        self._in_flight, self._blocked, self._flying = set(), set(), 0
        to_publish, claimed = anyio.create_memory_object_stream[_Batch](1)
        to_settle, published = anyio.create_memory_object_stream[_Batch](1)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._hold_lanes)
                tasks.start_soon(self._publish_all, claimed, to_settle)
                tasks.start_soon(self._claim_all, to_publish)
                await self._settle_all(published)
                tasks.cancel_scope.cancel()
        finally:
            await self._give_lanes_back()

    # --- lanes ------------------------------------------------------------------------------------------------------

    async def _hold_lanes(self) -> None:
        while True:
            try:
                await self._renew_and_acquire()
                self._store_outage.over()
            except StoreUnavailableError as error:
                await self._store_outage.wait(error)
                continue
            await self._clock.sleep(self._lease.total_seconds() / 4)

    async def _renew_and_acquire(self) -> None:
        """Extend what is held; take what is free; the deadline counts from before the call: a late reply cuts it."""
        began = self._clock.elapsed()
        before = set(self._lanes)
        held = (await self._outbox.renew(self.owner, list(self._lanes.values()), self._lease)).held
        missing = self._outbox.lane_count - len(held)
        taken = await self._outbox.acquire(self.owner, self._lease, missing, in_hand=5 * self._batch) if missing else ()
        gained = [each.lane for each in taken]
        self._lanes = {lane.number: lane for lane in (*held, *gained)}
        self._safe_until = began + self._lease.total_seconds() * (1 - _SAFETY)
        if before <= set(self._lanes):
            self._limit_publishing()
        self._tell_of_lanes(lost=len(before) - len(held), gained=len(gained))
        if gained:
            self.wake()

    def _tell_of_lanes(self, *, lost: int, gained: int) -> None:
        if not lost and not gained:
            return
        self._observers.notice(LanesChanged(owner=self.owner, held=len(self._lanes), gained=gained, lost=lost))
        level = logging.WARNING if lost else logging.INFO
        facts = {"action": "lanes_changed", "held": len(self._lanes), "gained": gained, "lost": lost}
        _logger.log(level, "relay holds %d lanes", len(self._lanes), extra=facts)

    async def _give_lanes_back(self) -> None:
        with anyio.move_on_after(2, shield=True):
            try:
                await self._outbox.release(self.owner, list(self._lanes.values()))
            except StoreUnavailableError:
                pass  # their lease ends by itself
        self._lanes = {}

    def _lose(self, error: LaneLostError) -> None:
        for number in error.lanes:
            self._lanes.pop(number, None)
            self._observers.notice(FenceRejected(owner=self.owner, lane=number))
        _logger.warning("a late write was refused", extra={"action": "fence_rejected", "lanes": list(error.lanes)})

    def _may_publish(self) -> bool:
        return bool(self._lanes) and self._clock.elapsed() < self._safe_until

    # --- claim ------------------------------------------------------------------------------------------------------

    async def _claim_all(self, to_publish: MemoryObjectSendStream[_Batch]) -> None:
        async with to_publish:
            while not self._stopping:
                batch = await self._claim()
                if batch is None:
                    await self._wake.wait(self._poll_interval_s)
                    continue
                reach("relay.claimed")
                await to_publish.send(batch)

    async def _claim(self) -> _Batch | None:
        if not self._may_publish() or self._is_left_behind():
            return None
        lanes = dict(self._lanes)
        try:
            records = await self._outbox.claim(list(lanes.values()), self._batch, in_flight=frozenset(self._in_flight))
        except StoreUnavailableError as error:
            await self._store_outage.wait(error)
            return None
        except LaneLostError as error:
            self._lose(error)
            return None
        self._idle = not records
        if not records:
            return None
        self._in_flight.update(record.id for record in records)
        self._flying += 1
        return _Batch(lanes=lanes, records=records)

    def _is_left_behind(self) -> bool:
        """Whether a batch left something behind that those in flight must not overtake. Until all are settled nothing
        more is claimed: it would be blocked as well and left behind in its turn, and so on without end.
        """
        if not self._flying:
            self._blocked.clear()
        return bool(self._blocked)

    # --- publish ----------------------------------------------------------------------------------------------------

    async def _publish_all(
        self, claimed: MemoryObjectReceiveStream[_Batch], to_settle: MemoryObjectSendStream[_Batch]
    ) -> None:
        async with claimed, to_settle:
            async for batch in claimed:
                batch.began = self._clock.elapsed()
                await self._publish(batch)
                reach("relay.published")
                await to_settle.send(batch)

    async def _publish(self, batch: _Batch) -> None:
        """Publish until the broker has taken or refused each record, or the lanes are no longer surely ours."""
        while self._may_publish() and not (self._stopping and self._broker_outage.lasts):
            records = [record for record in batch.records if self._is_publishable(record, batch)]
            if not records:
                break
            try:
                with anyio.CancelScope() as self._publishing:
                    self._limit_publishing()
                    outcomes = await self._broker.publish([record.envelope for record in records])
                    self._broker_outage.over()
                    self._note_outcomes(batch, records, outcomes)
                break
            except BrokerUnavailableError as error:
                await self._broker_outage.wait(error)
        self._block_undelivered(batch)

    def _limit_publishing(self) -> None:
        """What flies may fly for as long as the lanes are surely ours: longer with each renewal that keeps them all. A
        broker slower than a lease would else be cut off, and asked again from the start, for ever.
        """
        self._publishing.deadline = anyio.current_time() + self._safe_until - self._clock.elapsed()

    def _is_publishable(self, record: ClaimedRecord, batch: _Batch) -> bool:
        """Not when its lane was lost since the claim, nor when an earlier record of its key was left behind since."""
        if self._lanes.get(record.lane) != batch.lanes[record.lane]:
            return False
        key = record.envelope.key
        return key is None or (record.envelope.topic, key) not in self._blocked

    def _note_outcomes(
        self, batch: _Batch, records: Sequence[ClaimedRecord], outcomes: Sequence[BrokerError | None]
    ) -> None:
        """Sort the outcomes. A later record of a key that failed was held back, not refused: it stays pending."""
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
        async with published:
            async for batch in published:
                await self._settle(batch)
                self._flying -= 1
                self._in_flight.difference_update(record.id for record in batch.records)
                self._wake.set()

    async def _settle(self, batch: _Batch) -> None:
        """Record the outcome, without what belongs to a lane that was lost: its new owner repeats that."""
        while True:
            settlement = self._settlement(batch)
            if not settlement.delivered and not settlement.failed:
                return
            try:
                await self._outbox.settle(settlement)
            except StoreUnavailableError as error:
                await self._store_outage.wait(error)
            except LaneLostError as error:
                self._lose(error)
            else:
                reach("relay.settled")
                self._tell_of_batch(batch, settlement)
                return

    def _settlement(self, batch: _Batch) -> Settlement:
        ours = {
            number
            for number in {record.lane for record in batch.records}
            if self._lanes.get(number) == batch.lanes[number]
        }
        return Settlement(
            lanes=[batch.lanes[number] for number in sorted(ours)],
            delivered=[record for record in batch.delivered if record.lane in ours],
            failed=[failure for failure in batch.failed if failure.record.lane in ours],
        )

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
            _logger.warning("the broker refused a record: %s", failure.error.partition(":")[0], extra=facts)
