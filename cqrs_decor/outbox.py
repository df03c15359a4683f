"""The transactional outbox: its records, their states, and the store that keeps them.

    pending --claim--> in flight --settle--> delivered (the row is gone)
       ^                   |------settle--> rescheduled (due later; holds back the later records of its key)
       |                   `------settle--> parked (kept apart, and the later records of its key behind it)
       `----------- retry (an operator) -------'

Claiming writes no row: a record is in flight because the relay that holds its lane says so. After a relay vanished, its
lanes go in single steps: each record is marked on its lane before it is published, so that one which makes relays
vanish is found.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal, Protocol

from cqrs_decor._ids import new_id
from cqrs_decor.clock import Clock
from cqrs_decor.codec import Codec
from cqrs_decor.context import MessageContext
from cqrs_decor.envelope import Envelope
from cqrs_decor.lanes import HeldLane, Renewal, TakenLane
from cqrs_decor.routing import Routes


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedRecord:
    """A record that a relay is about to publish.

    Attributes:
        id: Rises in the order of writing; it is the envelope's sequence.
        attempts: How often the broker refused it.
        crashes: How many relays vanished with it in hand, this step not counted.
        unreadable: Why the row is no message, if it is none: the envelope then has what could be read of it, and it is
            parked instead of published.
    """

    id: int
    lane: int
    envelope: Envelope
    attempts: int = 0
    crashes: int = 0
    unreadable: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedRecord:
    """A record that the broker refused: tried again after `delay`, or parked where there is none."""

    record: ClaimedRecord
    error: str
    delay: timedelta | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """The outcome of a batch, recorded in one transaction under the fences of its lanes.

    Attributes:
        stepped: Its records came from `step`: their marks are taken off.
        keep: Delivered records go to the history instead of vanishing.
    """

    lanes: Sequence[HeldLane]
    delivered: Sequence[ClaimedRecord] = ()
    failed: Sequence[FailedRecord] = ()
    stepped: bool = False
    keep: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRecord:
    """A record as operators see it.

    Attributes:
        state: pending, rescheduled, held (behind an earlier record of its key that failed), parked, or delivered (in
            the history).
        retries: How often operators have retried it already.
    """

    id: int
    lane: int
    envelope: Envelope
    state: str
    attempts: int
    error: str | None
    written_at: datetime
    due_at: datetime | None
    retries: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxFilter:
    """Which records an operator means; what is not given does not narrow. Delivered ones only when asked for by state.

    Attributes:
        error: Part of the error's text.
        older_than: Written longer ago than this, by the database's clock.
        after: Only records with a higher id: where the page before ended.
    """

    ids: Collection[int] = ()
    state: str | None = None
    topic: str | None = None
    key: str | None = None
    error: str | None = None
    older_than: timedelta | None = None
    after: int = 0
    limit: int = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """How much waits.

    Attributes:
        pending: Every record that is not parked: due, rescheduled or held back.
        parked: Those that an operator has to decide about.
        oldest: Age of the oldest pending one; None when there is none.
    """

    pending: int
    parked: int
    oldest: timedelta | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Holders:
    """Who holds the lanes of an outbox, by the database's clock.

    Attributes:
        relays: Owners that take part.
        held: Lanes under a lease that has not ended.
        free: Lanes that nobody holds.
        ended: Lanes whose holder vanished and that nobody took over yet.
        longest_ended: For how long the oldest of those leases has ended.
        now: The database's clock.
    """

    relays: Sequence[str]
    held: int
    free: int
    ended: int
    longest_ended: timedelta | None
    now: datetime


@dataclass(slots=True)
class Drained:
    """What `App.drain` saw until everything was quiet."""

    published: int = 0
    handled: int = 0
    parked: list[str] = field(default_factory=list[str])


Heard = Literal["work", "echo"]


class Ear(Protocol):
    """Listens for wake-ups on a connection of its own."""

    async def hear(self) -> Heard:
        """Wait for the next: `work` when somebody committed records, `echo` for the sound of one's own renewal. Those
        that came while nobody waited are one.

        Raises:
            StoreUnavailableError: The connection is lost; listening again makes a new one.
        """
        ...


class WakeUps(Protocol):
    """How the processes of one outbox wake each other, where the database can."""

    async def send(self) -> None:
        """Wake every relay that listens: records were committed. Raises StoreUnavailableError."""
        ...

    def listen(self, owner: str) -> AbstractAsyncContextManager[Ear]:
        """Hear wake-ups from now on, as the relay `owner`. Entering raises StoreUnavailableError."""
        ...


class OutboxStore(Protocol):
    """Keeps outbox records. Every method is a transaction of its own, at the database's own time; rows are appended
    through `Transaction.add`, in the caller's transaction.

    All of them raise StoreUnavailableError while the database is away; calling again is safe.
    """

    lane_count: int
    wake_ups: WakeUps | None
    """None where the database has nothing of the kind: relays look for work at intervals."""

    async def acquire(self, owner: str, lease: timedelta, limit: int, *, in_hand: int) -> Sequence[TakenLane]:
        """Take up to `limit` lanes that nobody holds, or whose lease has ended; the fence of each rises by one.

        Args:
            in_hand: How many records a relay has in hand at most. A holder whose lease has ended vanished: what it may
                have had in hand are the first so many records of each of its lanes (it may have claimed from one only);
                where there are none, nothing is suspected.
        """
        ...

    async def renew(self, owner: str, lanes: Sequence[HeldLane], lease: timedelta) -> Renewal:
        """Extend the leases, and note that the owner takes part for as long (also when it holds no lane).

        Where there are wake-ups, the owner's own `Ear` hears an echo of it: that shows that listening works, across
        connections.

        Raises:
            LaneLostError: Another relay took some of the lanes while it went on to tidy up under them. Otherwise lanes
                that were lost are just not among those that are held.
        """
        ...

    async def release(self, owner: str, lanes: Sequence[HeldLane], *, leaving: bool = False) -> None:
        """Give lanes back at once, with their steps undone as by `unmark`; those that were lost meanwhile are left
        alone.

        Args:
            leaving: The owner takes part no longer.
        """
        ...

    async def claim(
        self, lanes: Sequence[HeldLane], limit: int, *, in_flight: Collection[int] = ()
    ) -> Sequence[ClaimedRecord]:
        """Take up to `limit` due records of these lanes, in the order in which they were written.

        A record is due when its time has come by the store's clock and its key is not held back. Each envelope carries
        the record's id as its sequence. Called by one relay at a time per lane. A row that cannot be read is no error:
        the record says so.

        Args:
            lanes: Held by the caller: the fence of each is checked in the same transaction.
            limit: How many at most.
            in_flight: Ids that the caller is publishing already; they are left out.

        Raises:
            LaneLostError: Another relay holds one of the lanes; nothing was claimed.
        """
        ...

    async def step(self, lanes: Sequence[HeldLane], *, until: int) -> Sequence[ClaimedRecord]:
        """Take the first due record of each of these lanes, none with an id above `until`, and mark it on its lane in
        the same transaction. Whoever takes over a lane whose step stands counts a crash of its record; the mark for
        another record is replaced.

        Where a marked record is due, it is the one that is taken, unless an earlier record of its key is there: what
        becomes due before it now and then must not acquit it.

        A lane for which none comes back has none that is due. In other things like `claim`.

        Raises:
            LaneLostError: Another relay holds one of the lanes; nothing was taken.
        """
        ...

    async def unmark(self, lanes: Sequence[HeldLane]) -> None:
        """Undo these steps: the broker was away, and that is no crash. The crashes that were counted before stay, and
        so does the mark of such a record. Lanes that were lost are left alone.
        """
        ...

    async def settle(self, settlement: Settlement) -> None:
        """Record the outcome of a batch in one transaction: delivered rows leave the table, failed ones are rescheduled
        or parked and hold back the later records of their key (those without a key hold back nothing).

        The later records of a parked one stand behind it: in order, out of the way of what is due, and held back until
        an operator retries or discards it.

        Raises:
            LaneLostError: A fence no longer holds; nothing was written.
        """
        ...

    async def backlog(self) -> Backlog:
        """How much waits; may be an estimate above a few thousand."""
        ...

    async def holders(self) -> "Holders":
        """Who takes part and holds what, for `doctor` and health."""
        ...

    async def find(self, wanted: OutboxFilter) -> Sequence[StoredRecord]:
        """Records, oldest first."""
        ...

    async def retry(self, ids: Collection[int], *, who: str) -> int:
        """Put parked records back in their old place in the order of their key, their attempts and crashes counted from
        0 again, and with each the records behind it.

        One that stands behind another parked one of its key stays held back. Idempotent, recorded.

        Returns:
            How many were parked.
        """
        ...

    async def discard(self, ids: Collection[int], *, who: str) -> int:
        """Give up parked or rescheduled records, so that their key goes on. Idempotent, recorded.

        Pending ones are left alone: they may be on their way to the broker. A settlement that names a discarded record
        passes it over.

        Returns:
            How many were given up.
        """
        ...

    async def replay(self, ids: Collection[int], *, who: str) -> int:
        """Write delivered records of the history once more, as new ones at the end of the order, each under its own
        message id: consumers that had it drop it. Recorded; not idempotent.

        Returns:
            How many were in the history.
        """
        ...


class OutboxWriter:
    """The event sink that writes to the outbox: envelope and body are made where the event is emitted, so that what
    cannot be encoded fails at that line, and a later change of the event's parts changes nothing.
    """

    def __init__(self, routes: Routes, codec: Codec, clock: Clock, source: str, wake_relay: Callable[[], None]) -> None:
        self._routes = routes
        self._codec = codec
        self._clock = clock
        self._source = source
        self._wake_relay = wake_relay

    def take(self, context: MessageContext, event: Any) -> None:
        unit_of_work = context.unit_of_work
        first = unit_of_work.add(self.envelope(event, context))
        if first:
            unit_of_work.after_commit(self._wake)

    async def _wake(self) -> None:
        self._wake_relay()

    def envelope(self, event: Any, context: MessageContext | None = None) -> Envelope:
        """The envelope of an event, caused by the message in hand if there is one.

        Raises:
            UnknownTopicError: The event has no topic.
            PayloadInvalidError: It cannot be encoded.
        """
        route = self._routes.route(event.__class__)
        event_id = new_id()
        key = None if route.key is None else route.key(event)
        return Envelope(
            id=event_id,
            source=self._source,
            type=route.name,
            version=route.version,
            topic=route.topic,
            key=None if key is None else str(key),
            time=self._clock.now(),
            data=self._codec.encode(event),
            content_type=self._codec.content_type,
            correlation_id=event_id if context is None else context.correlation_id,
            causation_id=None if context is None else context.id,
        )
