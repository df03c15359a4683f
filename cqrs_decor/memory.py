"""Broker and store in memory: the reference implementation of both seams, for tests, tutorials and a first start.

Everything is gone when the process ends; all else is as the contracts in `broker.py`, `store.py`, `outbox.py` and
`inbox.py` say. Two apps of one event loop share a broker or a store by being given the same object.
"""

import heapq
import logging
from collections.abc import AsyncGenerator, Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, ClassVar, NoReturn, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread

from cqrs_decor.broker import Broker, Capabilities, Delivery, Partition, Revoked, Start, TopicPlan
from cqrs_decor.clock import Clock, SystemClock
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import (
    BadUrlError,
    BrokerError,
    LaneLostError,
    RecordRejectedError,
    RecordTooLargeError,
    UnitOfWorkClosedError,
    UnsupportedError,
)
from cqrs_decor.findings import Finding
from cqrs_decor.inbox import InboxFilter, InboxStore, ParkedMessage
from cqrs_decor.lanes import LANES, HeldLane, lane_of
from cqrs_decor.outbox import (
    Backlog,
    ClaimedRecord,
    FailedRecord,
    OutboxFilter,
    OutboxStore,
    Settlement,
    StoredRecord,
)
from cqrs_decor.store import SchemaAdmin, StoreCard
from cqrs_decor.unit_of_work import Transaction

T = TypeVar("T")

_logger = logging.getLogger(__name__)

# --- the broker -----------------------------------------------------------------------------------------------------

_Place = tuple[str, int]
"""Topic and partition number."""


class MemoryBroker:
    """Topics of append-only partitions, consumer groups with positions. Keeps every message until the process ends.

    Args:
        partitions: How many each topic has: at most so many readers of a group get work.
        max_bytes: Refuse larger bodies, as a real broker would; None for no limit.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        durable=False,
        ordered_by_key=True,
        replayable=True,
        shared=False,
        creates_topics=True,
        crash_may_lose="everything: messages and positions live in the process",
        crash_may_repeat="what was delivered and not yet acknowledged, when a reader leaves",
        crash_may_reorder="nothing",
    )

    def __init__(self, *, partitions: int = 8, max_bytes: int | None = None) -> None:
        self.name = "memory://"
        self._partitions = partitions
        self._max_bytes = max_bytes
        self._topics: dict[str, list[list[Envelope]]] = {}
        self._groups: dict[str, _Group] = {}

    @classmethod
    def from_url(cls, url: str) -> "MemoryBroker":
        """A new and empty broker, each time."""
        _expect_memory_url("broker", url)
        return cls()

    async def open(self) -> None:
        """Nothing to connect to."""

    async def close(self) -> None:
        """Keeps its messages: another app may use the same object, and an app can be entered again."""

    async def publish(self, envelopes: Sequence[Envelope]) -> Sequence[BrokerError | None]:
        refused: set[tuple[str, str]] = set()
        outcomes = [self._publish(envelope, refused) for envelope in envelopes]
        for group in self._groups.values():
            group.wake()
        return outcomes

    def _publish(self, envelope: Envelope, refused: set[tuple[str, str]]) -> BrokerError | None:
        error = self._refusal(envelope, refused)
        if error is None:
            partitions = self.partitions_of(envelope.topic)
            partitions[_partition_of(envelope, len(partitions))].append(envelope)
        elif envelope.key is not None:
            refused.add((envelope.topic, envelope.key))
        return error

    def _refusal(self, envelope: Envelope, refused: set[tuple[str, str]]) -> BrokerError | None:
        if envelope.key is not None and (envelope.topic, envelope.key) in refused:
            return RecordRejectedError(self.name, envelope.topic, "an earlier record of its key was refused")
        if self._max_bytes is not None and len(envelope.data) > self._max_bytes:
            return RecordTooLargeError(self.name, envelope.topic, len(envelope.data), self._max_bytes)
        return None

    @asynccontextmanager
    async def subscribe(
        self, group: str, topics: Sequence[str], *, start: Start = "earliest", on_revoked: Revoked | None = None
    ) -> AsyncGenerator["MemorySubscription"]:
        joined = self._groups.setdefault(group, _Group(self))
        reader = MemorySubscription(joined, topics, on_revoked)
        try:
            await joined.join(reader, start)
            yield reader
        finally:
            joined.leave(reader)

    async def check(self, topics: Sequence[TopicPlan]) -> Sequence[Finding]:
        return [Finding.ok(f"{self.name} carries messages within this process")]

    async def missing_topics(self, topics: Sequence[TopicPlan]) -> Sequence[TopicPlan]:
        return []

    async def create_topics(self, topics: Sequence[TopicPlan]) -> None:
        for topic in topics:
            self.partitions_of(topic.name)

    def partitions_of(self, topic: str) -> list[list[Envelope]]:
        """What was published to a topic so far; the topic is made if it is not there."""
        return self._topics.setdefault(topic, [[] for _ in range(self._partitions)])


class _Group:
    """Who of a consumer group reads what, and how far the group has acknowledged."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._readers: list[MemorySubscription] = []
        self._acknowledged: dict[_Place, int] = {}
        self._epoch = 0
        self._joining: anyio.Lock | None = None

    async def join(self, reader: "MemorySubscription", start: Start) -> None:
        """Give a new reader its share. Those who lose partitions are told first and may still acknowledge."""
        self._joining = self._joining or anyio.Lock()
        async with self._joining:
            for topic in reader.topics:
                self._begin(topic, start)
            self._readers.append(reader)
            self._share_out_what_nobody_reads()
            for topic in reader.topics:
                await self._take_a_share(reader, topic)

    def leave(self, reader: "MemorySubscription") -> None:
        """What it had not acknowledged is delivered again, to those who are left."""
        if reader in self._readers:
            self._readers.remove(reader)
        reader.partitions.clear()
        self._share_out_what_nobody_reads()

    def acknowledge(self, reader: "MemorySubscription", delivery: Delivery) -> None:
        place = _place(delivery.partition)
        if reader.partitions.get(place) == delivery.partition:
            self._acknowledged[place] = max(self._acknowledged[place], delivery.position + 1)

    def log(self, place: _Place) -> list[Envelope]:
        topic, number = place
        return self._broker.partitions_of(topic)[number]

    def wake(self) -> None:
        for reader in self._readers:
            reader.wake()

    def _begin(self, topic: str, start: Start) -> None:
        for number, log in enumerate(self._broker.partitions_of(topic)):
            self._acknowledged.setdefault((topic, number), 0 if start == "earliest" else len(log))

    def _share_out_what_nobody_reads(self) -> None:
        read = {place for reader in self._readers for place in reader.partitions}
        for place in [place for place in self._acknowledged if place not in read]:
            takers = [reader for reader in self._readers if place[0] in reader.topics]
            if takers:
                self._assign(place, min(takers, key=lambda reader: len(reader.partitions)))

    async def _take_a_share(self, reader: "MemorySubscription", topic: str) -> None:
        others = [other for other in self._readers if other is not reader and topic in other.topics]
        fair = len(self._broker.partitions_of(topic)) // (len(others) + 1)
        for other in others:
            surplus = other.places_of(topic)[fair:]
            wanted = max(0, fair - len(reader.places_of(topic)))
            await self._move(surplus[:wanted], other, reader)

    async def _move(self, places: Sequence[_Place], giver: "MemorySubscription", taker: "MemorySubscription") -> None:
        if not places:
            return
        giver.pause(places)
        receiver = giver  # also if the taker gives up meanwhile: the giver was told to drop its work and gets it again
        try:
            await giver.give_up(places)
            receiver = taker
        finally:
            for place in places:
                if place in giver.partitions:  # it may have left meanwhile
                    del giver.partitions[place]
                    self._assign(place, receiver)

    def _assign(self, place: _Place, reader: "MemorySubscription") -> None:
        self._epoch += 1
        topic, number = place
        reader.take(Partition(topic=topic, number=number, epoch=self._epoch), self._acknowledged[place])


class MemorySubscription:
    """One reader of a group."""

    def __init__(self, group: _Group, topics: Sequence[str], on_revoked: Revoked | None) -> None:
        self.topics = tuple(topics)
        self.partitions: dict[_Place, Partition] = {}
        self._group = group
        self._on_revoked = on_revoked
        self._next: dict[_Place, int] = {}
        self._woken: anyio.Event | None = None

    async def receive(self, limit: int, wait: timedelta) -> Sequence[Delivery]:
        await anyio.lowlevel.checkpoint()
        with anyio.move_on_after(wait.total_seconds()):
            while not self._ahead():
                self._woken = anyio.Event()
                await self._woken.wait()
        return self._deliver(limit)  # no await after this: a cancelled `receive` has delivered nothing

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self._group.acknowledge(self, delivery)

    async def backlog(self) -> int:
        return self._ahead()

    def wake(self) -> None:
        if self._woken is not None:
            self._woken.set()

    def take(self, partition: Partition, position: int) -> None:
        self.partitions[_place(partition)] = partition
        self._next[_place(partition)] = position
        self.wake()

    def pause(self, places: Iterable[_Place]) -> None:
        """Deliver no more of these; acknowledging what was delivered is still possible."""
        for place in places:
            self._next.pop(place, None)

    async def give_up(self, places: Iterable[_Place]) -> None:
        if self._on_revoked is None:
            return
        try:
            await self._on_revoked([self.partitions[place] for place in places])
        except Exception:  # a reader that cannot let go must not keep the other one from reading
            _logger.exception("a reader failed to let go of partitions", extra={"action": "revoke_failed"})

    def places_of(self, topic: str) -> list[_Place]:
        return [place for place in self.partitions if place[0] == topic]

    def _ahead(self) -> int:
        return sum(len(self._group.log(place)) - position for place, position in self._readable())

    def _deliver(self, limit: int) -> list[Delivery]:
        deliveries: list[Delivery] = []
        for place, position in self._readable():
            fresh = self._group.log(place)[position : position + limit - len(deliveries)]
            deliveries.extend(
                _delivery(self.partitions[place], number, envelope) for number, envelope in enumerate(fresh, position)
            )
            del self._next[place]  # to the end of the line, so that no partition starves another
            self._next[place] = position + len(fresh)
        return deliveries

    def _readable(self) -> list[tuple[_Place, int]]:
        return [(place, position) for place, position in self._next.items() if place in self.partitions]


def _delivery(partition: Partition, position: int, envelope: Envelope) -> Delivery:
    return Delivery(partition=partition, position=position, content=envelope, raw=envelope.data, key=envelope.key)


def _partition_of(envelope: Envelope, partitions: int) -> int:
    return lane_of(envelope.topic, envelope.key, envelope.id, partitions)


def _place(partition: Partition) -> _Place:
    return partition.topic, partition.number


# --- the store ------------------------------------------------------------------------------------------------------


class MemoryStore:
    """Outbox and inbox in memory. It has no session: handlers that ask for one need a database."""

    card: ClassVar[StoreCard] = StoreCard(
        durable=False, shared=False, concurrent_writers=True, crash_may_lose="everything: it lives in the process"
    )
    resources: Mapping[type[Any], bool] = {}

    def __init__(self, *, clock: Clock | None = None) -> None:
        self.name = "memory://"
        self.schema: SchemaAdmin | None = None
        self.inbox: InboxStore = MemoryInbox()
        self.outbox: OutboxStore
        self.outbox = self._outbox = MemoryOutbox(clock or SystemClock())

    @classmethod
    def from_url(cls, url: str) -> "MemoryStore":
        """A new and empty store, each time."""
        _expect_memory_url("database", url)
        return cls()

    async def open(self) -> None:
        """Nothing to connect to."""

    async def close(self) -> None:
        """Keeps its records: another app may use the same object, and an app can be entered again."""

    async def begin(self, *, read_only: bool = False) -> "MemoryTransaction":
        return MemoryTransaction(self._outbox)

    def join(self, session: object) -> "MemoryTransaction":
        """The nearest thing to a session of the caller's is a transaction that they began here."""
        if not isinstance(session, MemoryTransaction):
            raise TypeError(f"{session!r} is no transaction of the store in memory, which has no sessions")
        return session

    def add(self, session: object, envelopes: Sequence[Envelope]) -> None:
        self.join(session).add(envelopes)

    def is_transient(self, error: BaseException) -> bool:
        return False

    def is_unavailable(self, error: BaseException) -> bool:
        return False

    def log_broker(self) -> Broker | None:
        return None

    async def check(self) -> Sequence[Finding]:
        return [Finding.ok(f"{self.name} keeps records within this process")]


class MemoryTransaction:
    """Buffers everything and carries it out at commit, in one step that nothing can interrupt."""

    def __init__(self, outbox: "MemoryOutbox") -> None:
        self._outbox = outbox
        self._envelopes: list[Envelope] = []
        self._changes: list[Callable[[], object]] = []
        self._locks: list[Callable[[], object]] = []
        self._ended = False

    def resource(self, kind: type[T]) -> NoReturn:
        raise UnsupportedError(
            "The store in memory",
            f"give a {kind.__name__}",
            'name a database: bootstrap(database="sqlite+aiosqlite:///app.db")',
        )

    def add(self, envelopes: Sequence[Envelope]) -> None:
        self._require_open()
        self._envelopes.extend(envelopes)

    def mark(self) -> object:
        return self

    def holds(self, mark: object) -> bool:
        """There are no savepoints that could be rolled back."""
        return True

    async def run_sync(self, function: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(function)

    async def commit(self) -> None:
        self._require_open()
        for change in self._changes:
            change()
        self._outbox.append(self._envelopes)
        self._end()

    async def rollback(self) -> None:
        self._end()

    def at_commit(self, change: Callable[[], object]) -> None:
        self._require_open()
        self._changes.append(change)

    def at_end(self, unlock: Callable[[], object]) -> None:
        self._require_open()
        self._locks.append(unlock)

    def _end(self) -> None:
        self._ended = True
        locks, self._locks = self._locks, []
        for unlock in locks:
            unlock()

    def _require_open(self) -> None:
        if self._ended:
            raise UnitOfWorkClosedError("A transaction")


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


class MemoryInbox:
    """The inbox in memory. What an open transaction has touched is locked until it ends, as rows of a database are."""

    def __init__(self) -> None:
        self._had: set[Hashable] = set()
        self._parked: dict[int, ParkedMessage] = {}
        self._last_id = 0
        self._locked: dict[Hashable, tuple[MemoryTransaction, anyio.Event]] = {}

    async def record(self, transaction: Transaction, consumer: str, envelope: Envelope) -> bool:
        key = (consumer, envelope.source, envelope.id)
        mine = _mine(transaction)
        if not await self._lock(key, mine) or key in self._had:
            return False
        mine.at_commit(lambda: self._had.add(key))
        return True

    async def park(self, parked: ParkedMessage) -> None:
        self._last_id += 1
        known = next((old.id for old in self._parked.values() if _identity(old) == _identity(parked)), self._last_id)
        self._parked[known] = replace(parked, id=known, retry_requested=False)

    async def unpark(self, transaction: Transaction, parked_id: int) -> bool:
        mine = _mine(transaction)
        if not await self._lock(parked_id, mine) or parked_id not in self._parked:
            return False
        mine.at_commit(lambda: self._parked.pop(parked_id, None))
        return True

    async def retries(self, consumers: Collection[str], limit: int) -> Sequence[ParkedMessage]:
        wanted = [parked for parked in self._parked.values() if parked.retry_requested and parked.consumer in consumers]
        return wanted[:limit]

    async def find(self, wanted: InboxFilter) -> Sequence[ParkedMessage]:
        return [parked for parked in self._parked.values() if _is_meant(parked, wanted)][: wanted.limit]

    async def parked_count(self) -> int:
        return len(self._parked)

    async def retry(self, ids: Collection[int], *, who: str) -> int:
        asked = [parked for parked in self._parked.values() if parked.id in ids and not parked.retry_requested]
        for parked in asked:
            self._parked[parked.id] = replace(parked, retry_requested=True)
        _logger.info("parked messages retried", extra={"action": "inbox_retried", "who": who, "count": len(asked)})
        return len(asked)

    async def discard(self, ids: Collection[int], *, who: str) -> int:
        given_up = [self._parked.pop(parked_id) for parked_id in set(ids) if parked_id in self._parked]
        _logger.info("messages discarded", extra={"action": "inbox_discarded", "who": who, "count": len(given_up)})
        return len(given_up)

    async def _lock(self, key: Hashable, transaction: MemoryTransaction) -> bool:
        """Wait until no other transaction has touched `key`, then keep others out; False if this one had it already."""
        while key in self._locked:
            holder, ended = self._locked[key]
            if holder is transaction:
                return False
            await ended.wait()
        self._locked[key] = (transaction, anyio.Event())
        transaction.at_end(lambda: self._unlock(key))
        return True

    def _unlock(self, key: Hashable) -> None:
        _, ended = self._locked.pop(key)
        ended.set()


def _mine(transaction: Transaction) -> MemoryTransaction:
    if not isinstance(transaction, MemoryTransaction):
        raise TypeError(f"{transaction!r} is no transaction of the store in memory")
    return transaction


def _identity(parked: ParkedMessage) -> tuple[str, str, str]:
    return parked.consumer, parked.envelope.source, parked.envelope.id


def _is_meant(parked: ParkedMessage, wanted: InboxFilter) -> bool:
    return (
        (not wanted.ids or parked.id in wanted.ids)
        and wanted.consumer in (None, parked.consumer)
        and wanted.topic in (None, parked.envelope.topic)
        and wanted.key in (None, parked.envelope.key)
    )


def _expect_memory_url(what: str, url: str) -> None:
    if url.rstrip("/") != "memory:":
        raise BadUrlError(what, url, "the memory one has no host, path or options", "memory://")
