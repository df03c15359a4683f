"""One reader of a consumer group, and the lanes it holds: joining, sharing, renewing, giving away, leaving.

Lanes are rows with an owner, a fencing number and a lease by the database's clock. Each reader works out by itself how
many are its share of those who are alive, gives back what is above that and takes what is free.

Source: competing consumers under fenced leases (Hohpe & Woolf 2003; Kleppmann, "Designing Data-Intensive Applications",
2017, ch. 8).
"""

import asyncio
import logging
import zlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import anyio
from anyio.abc import TaskGroup
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from cqrs_decor.broker import Partition, Revoked, Start
from cqrs_decor.errors import BrokerError
from cqrs_decor.observers import Observers, OffsetReset
from cqrs_decor_sqlalchemy.log_database import Log
from cqrs_decor_sqlalchemy.log_shares import Lane, share_of
from cqrs_decor_sqlalchemy.log_signals import Pulse
from cqrs_decor_sqlalchemy.log_tables import LOG_LANES

_logger = logging.getLogger(__name__)

_LOOK_S = 0.25
"""How soon a reader that lacks lanes looks again whether some have become free."""
_AFTER_FAILURE_S = 1.0
"""So soon a renewal that failed is tried again, and each time after twice as long, if nobody receives meanwhile."""
_LONGEST_AFTER_FAILURE_S = 10.0
_LEAVE_LIMIT_S = 5.0
_VANISHED_KEPT_MS = 3_600_000


@dataclass(slots=True, kw_only=True)
class HeldPartition:
    """A lane in the hand of this reader.

    Attributes:
        partition: Its epoch is the fence.
        read: Position of the last record that was delivered.
        head: Position of the last record that is known to be there.
        lease_ends: By this machine's clock, and never later than by the database's.
        leaving: The reader is finishing what came from it; nothing more is delivered.
        finished: The reader has finished: the lane can be given back.
    """

    partition: Partition
    read: int
    head: int
    lease_ends: float
    leaving: bool = False
    finished: bool = False

    @property
    def lane(self) -> Lane:
        return self.partition.topic, self.partition.number


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """Who reads what: an id that nobody else has, for a group, for topics."""

    reader: str
    group: str
    topics: tuple[str, ...]
    on_revoked: Revoked | None


class LogMember:
    """A reader's place in its group, kept by a task of its own from `join` to `leave`.

    While the database is away, leases run out and nothing is delivered. A lease that has run out is lost, whether or
    not somebody took the lane; it comes back, if it does, under a new epoch, and is read again from what the group has
    acknowledged. So a database that has gone back in time meanwhile, as one does that fails over, makes nobody skip.
    """

    def __init__(self, membership: Membership, log: Log) -> None:
        self.held: dict[Lane, HeldPartition] = {}
        self.writing = anyio.Lock()
        """Held while rows of lanes are written, so that this reader's own statements never wait for each other."""
        self._membership = membership
        self._database = log.database
        self._queries = log.queries
        self._signals = log.signals
        self._settings = log.settings
        self._clock = log.clock
        self._observers = log.observers
        self._scope: dict[str, object] = {"group_name": membership.group, "topics": membership.topics}
        self._mine: dict[str, object] = {**self._scope, "reader": membership.reader}
        self._lease_ms = round(log.settings.lease.total_seconds() * 1000)
        self._shares: dict[str, int] = {}
        self._lost: list[HeldPartition] = []
        self._being_told: set[Lane] = set()
        self._lacks = False
        self._beat_due = 0.0
        self._trouble: Exception | None = None
        self._after_failure_s = _AFTER_FAILURE_S
        self._asked = Pulse()
        self._tried = Pulse()
        self._leaving = False
        self._keeper: asyncio.Task[None] | None = None

    def readable(self) -> list[HeldPartition]:
        """What may be delivered from now: held, and not on its way to somebody else."""
        now = self._clock.elapsed()
        return [held for held in self.held.values() if not held.leaving and held.lease_ends > now]

    async def recover(self) -> None:
        """Try again where this reader's leases could not be renewed, and raise what still keeps it from that. Whoever
        receives says how often a database that is away is asked: it knows who else in the process waits for it.
        """
        if self._trouble is None:
            return
        tried = self._tried.next()
        self._asked.beat()
        await tried.wait()
        if self._trouble is not None:
            raise self._trouble

    def lose(self, held: HeldPartition) -> None:
        """Let a lane go whose place in the log is in doubt; it is taken again once the reader was told."""
        del self.held[held.lane]
        if not held.leaving:
            self._lost.append(held)
            self._being_told.add(held.lane)
            self._signals.shared.beat()

    async def join(self, start: Start) -> None:
        """Enter the group, take what is free of the own share, and keep it from then on.

        Raises:
            BrokerUnavailableError, BrokerAccessError: Not joined.
        """
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self.leave)
            await self._database.write(lambda connection: self._enter(connection, start))
            await self._turn()
            undo.pop_all()
        self._keeper = asyncio.create_task(self._keep())
        self._signals.shared.beat()

    async def leave(self) -> None:
        """Give everything back at once. If that fails, the leases end by themselves."""
        self._leaving = True
        with anyio.move_on_after(_LEAVE_LIMIT_S, shield=True):
            await self._end_keeper()
            try:
                await self._database.write(self._exit)
            except BrokerError as error:
                _logger.warning("lanes could not be given back: %s", error, extra=self._facts("log_leave_failed"))
        self.held.clear()
        self._signals.shared.beat()

    # --- the task -----------------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        async with anyio.create_task_group() as callbacks:
            while not self._leaving:
                changed = self._signals.shared.next()
                await self._turn_and_note_trouble(callbacks)
                asked = self._asked.next()
                self._tried.beat()
                with anyio.move_on_after(self._pause()):
                    await (changed if self._trouble is None else asked).wait()
            callbacks.cancel_scope.cancel()

    async def _end_keeper(self) -> None:
        if self._keeper is None:
            return
        self._signals.shared.beat()
        self._asked.beat()
        await asyncio.wait([self._keeper], timeout=_LEAVE_LIMIT_S / 2)
        self._keeper.cancel()
        await asyncio.wait([self._keeper])

    async def _turn_and_note_trouble(self, callbacks: TaskGroup) -> None:
        try:
            await self._turn()
            self._let_go(callbacks)
            self._trouble = None
        except Exception as error:  # whatever it is, the leases must be tried again, and `receive` raises it
            if self._trouble is None:
                self._after_failure_s = _AFTER_FAILURE_S
                _logger.warning("leases could not be renewed: %s", error, extra=self._facts("log_renewal_failed"))
            else:
                self._after_failure_s = min(self._after_failure_s * 2, _LONGEST_AFTER_FAILURE_S)
            self._trouble = error

    def _pause(self) -> float:
        if self._trouble is not None:
            return self._after_failure_s
        if any(held.finished for held in self.held.values()):
            return 0
        due = max(0.0, self._beat_due - self._clock.elapsed())
        return min(due, _LOOK_S) if self._lacks else due

    # --- a turn -------------------------------------------------------------------------------------------------------

    async def _turn(self) -> None:
        """Renew what is held and give back what is finished, see who is there, take what is missing."""
        asked = self._clock.elapsed()
        finished = [held for held in self.held.values() if held.finished]
        if finished or asked >= self._beat_due:
            async with self.writing:
                group = await self._database.write(lambda connection: self._beat(connection, finished))
            self._beat_due = asked + self._settings.beat.total_seconds()
            self._forget(finished)
            self._compare(group, renewed_at=asked)
        else:
            group = await self._database.read(self._look)
            self._compare(group, renewed_at=None)
        self._shares = {topic: self._share_of(topic, group) for topic in self._membership.topics}
        missing = self._missing(group)
        if missing:
            await self._take(missing)
        if unread := self._unread(group):
            await self._give_back(unread)
        self._lacks = any(share > len(self._kept(topic)) for topic, share in self._shares.items())

    async def _beat(self, connection: AsyncConnection, finished: Sequence[HeldPartition]) -> "_Group":
        if finished:
            await connection.execute(self._queries.give_back, [self._fenced(held) for held in finished])
        seen = await connection.execute(self._queries.see_reader, self._mine | {"lease_ms": self._lease_ms})
        if seen.rowcount < len(self._membership.topics):
            await self._add_reader(connection)
        await connection.execute(self._queries.renew, self._mine | {"lease_ms": self._lease_ms})
        return await self._look(connection)

    async def _look(self, connection: AsyncConnection) -> "_Group":
        readers: dict[str, set[str]] = {topic: {self._membership.reader} for topic in self._membership.topics}
        for row in await connection.execute(self._queries.living_readers, self._scope):
            readers[row.topic].add(row.reader)
        leases = await connection.execute(self._queries.leases, self._scope)
        return _Group(readers=readers, leases=leases.all())

    def _forget(self, finished: Sequence[HeldPartition]) -> None:
        for held in finished:
            self.held.pop(held.lane, None)
        if finished:
            self._signals.shared.beat()

    def _compare(self, group: "_Group", *, renewed_at: float | None) -> None:
        """Drop what somebody else has taken, or might have. A renewal counts from before it was asked for."""
        for lease in group.leases:
            held = self.held.get((lease.topic, lease.lane))
            if held is None:
                continue
            taken = lease.owner != self._membership.reader or lease.fence != held.partition.epoch
            if taken or held.lease_ends <= self._clock.elapsed():
                self.lose(held)
            elif renewed_at is not None:
                held.lease_ends = renewed_at + self._settings.lease.total_seconds()

    def _share_of(self, topic: str, group: "_Group") -> int:
        return share_of(self._membership.reader, group.readers[topic], topic, LOG_LANES)

    def _kept(self, topic: str) -> list[HeldPartition]:
        return [held for held in self.held.values() if held.partition.topic == topic and not held.leaving]

    def _missing(self, group: "_Group") -> dict[str, list[int]]:
        """Which lanes to take, per topic. Every reader looks in another order, so that newcomers do not collide."""
        missing: dict[str, list[int]] = {}
        for topic, share in self._shares.items():
            free = [lease.lane for lease in group.leases if lease.topic == topic and self._is_free(lease)]
            free.sort(key=lambda lane: zlib.crc32(f"{self._membership.reader}{lane}".encode()))
            wanted = free[: max(0, share - len(self._kept(topic)))]
            if wanted:
                missing[topic] = sorted(wanted)
        return missing

    def _is_free(self, lease: Row[Any]) -> bool:
        lane = (lease.topic, lease.lane)
        if lane in self.held or lane in self._being_told:
            return False
        return not lease.held or lease.owner == self._membership.reader

    def _unread(self, group: "_Group") -> list[Row[Any]]:
        """Lanes that are this reader's by their rows, and that it does not read: it has lost them by its own clock, and
        its share is smaller than it was. Its beats renew them, so that nobody else would ever read them.
        """
        known = self.held.keys() | self._being_told
        mine = [lease for lease in group.leases if lease.owner == self._membership.reader]
        return [lease for lease in mine if (lease.topic, lease.lane) not in known]

    async def _give_back(self, unread: Sequence[Row[Any]]) -> None:
        rows = [self._mine | {"topic": lease.topic, "lane": lease.lane, "fence": lease.fence} for lease in unread]
        async with self.writing:
            await self._database.write(lambda connection: connection.execute(self._queries.give_back, rows))
        self._signals.shared.beat()

    async def _take(self, missing: Mapping[str, Sequence[int]]) -> None:
        asked = self._clock.elapsed()
        async with self.writing:
            leases = await self._database.write(lambda connection: self._take_rows(connection, missing))
        for lease in leases:
            if lease.owner == self._membership.reader and lease.lane in missing.get(lease.topic, ()):
                begin = self._place_in_lane(lease)
                self.held[lease.topic, lease.lane] = HeldPartition(
                    partition=Partition(topic=lease.topic, number=lease.lane, epoch=lease.fence),
                    read=begin,
                    head=begin,
                    lease_ends=asked + self._settings.lease.total_seconds(),
                )
        self._signals.written.beat()

    def _place_in_lane(self, lease: Row[Any]) -> int:
        """Where to read on; further on than the group wanted, where retention had given it up."""
        before_first: int = lease.first_position - 1
        if not _is_behind(lease):
            return int(lease.position)
        note_reset(self._membership.group, lease.topic, lease.lane, lease.position, before_first, self._observers)
        return before_first

    async def _take_rows(self, connection: AsyncConnection, missing: Mapping[str, Sequence[int]]) -> Sequence[Row[Any]]:
        for topic, lanes in sorted(missing.items()):
            wanted = {"topic": topic, "lanes": lanes, "lease_ms": self._lease_ms}
            await connection.execute(self._queries.take, self._mine | wanted)
        leases = (await connection.execute(self._queries.leases, self._scope)).all()
        behind = [lease for lease in leases if lease.owner == self._membership.reader and _is_behind(lease)]
        if behind:
            await connection.execute(self._queries.acknowledge, [self._begun(lease) for lease in behind])
        return leases

    # --- giving away --------------------------------------------------------------------------------------------------

    def _let_go(self, callbacks: TaskGroup) -> None:
        """Have the reader finish what came from lanes above its share, and drop what came from lanes that were lost."""
        if self._lost:
            _logger.warning("lost %d lanes, reading them again", len(self._lost), extra=self._facts("log_lanes_lost"))
        surplus = [held for topic, share in self._shares.items() for held in self._kept(topic)[share:]]
        for held in surplus:
            held.leaving = True
        for leaving in (surplus, self._lost):
            if leaving:
                self._being_told.update(held.lane for held in leaving)
                callbacks.start_soon(self._tell, list(leaving))
        self._lost.clear()

    async def _tell(self, leaving: Sequence[HeldPartition]) -> None:
        try:
            if self._membership.on_revoked is not None:
                with anyio.move_on_after(self._settings.revoke_limit.total_seconds()) as limit:
                    await self._membership.on_revoked([held.partition for held in leaving])
                if limit.cancelled_caught:
                    _logger.warning("a reader did not let go in time", extra=self._facts("log_revoke_timed_out"))
        except Exception:  # a reader that cannot let go must not keep the others from reading
            _logger.exception("a reader failed to let go of lanes", extra=self._facts("log_revoke_failed"))
        for held in leaving:
            held.finished = True
            self._being_told.discard(held.lane)
        self._signals.shared.beat()

    # --- rows ---------------------------------------------------------------------------------------------------------

    async def _enter(self, connection: AsyncConnection, start: Start) -> None:
        """Record where a new group begins, at once: `latest` is the moment of joining."""
        counts = await connection.execute(self._queries.count_positions, self._scope)
        known = {row.topic for row in counts if row.lanes == LOG_LANES}
        for topic in sorted(set(self._membership.topics) - known):
            lanes = [{"topic": topic, "lane": lane} for lane in range(LOG_LANES)]
            await connection.execute(self._queries.add_lane, lanes)
            await connection.execute(self._queries.begin_at[start], {**self._scope, "topic": topic})
        await connection.execute(self._queries.forget_vanished_readers, {**self._scope, "kept_ms": _VANISHED_KEPT_MS})
        await self._add_reader(connection)

    async def _add_reader(self, connection: AsyncConnection) -> None:
        rows = [self._mine | {"topic": topic, "lease_ms": self._lease_ms} for topic in self._membership.topics]
        if rows:
            await connection.execute(self._queries.add_reader, rows)

    async def _exit(self, connection: AsyncConnection) -> None:
        await connection.execute(self._queries.give_back_all, self._mine)
        await connection.execute(self._queries.forget_reader, self._mine)

    def _fenced(self, held: HeldPartition) -> dict[str, object]:
        partition = held.partition
        return {
            "group_name": self._membership.group,
            "reader": self._membership.reader,
            "topic": partition.topic,
            "lane": partition.number,
            "fence": partition.epoch,
        }

    def _begun(self, lease: Row[Any]) -> dict[str, object]:
        """On record at once, so that the reset is told once."""
        place = {"topic": lease.topic, "lane": lease.lane, "fence": lease.fence, "position": lease.first_position - 1}
        return {"group_name": self._membership.group, "reader": self._membership.reader, **place}

    def _facts(self, action: str) -> dict[str, object]:
        return {"action": action, "group": self._membership.group, "reader": self._membership.reader}


def note_reset(group: str, topic: str, lane: int, wanted_after: int, goes_on_after: int, observers: Observers) -> None:
    """Say loudly that records were deleted which this group has not acknowledged."""
    _logger.warning(
        "Group %s wanted to go on after %d of lane %d of %s, which is deleted; it goes on after %d. Messages are lost",
        *(group, wanted_after, lane, topic, goes_on_after),
        extra={
            "action": "offset_reset",
            "group": group,
            "topic": topic,
            "partition": lane,
            "lost_position": wanted_after + 1,
            "restarted_at": goes_on_after + 1,
        },
    )
    observers.notice(OffsetReset(group=group, topic=topic, partition=lane, restarted_at=str(goes_on_after + 1)))


def _is_behind(lease: Row[Any]) -> bool:
    return bool(lease.position < lease.first_position - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """What the database says: living readers per topic (this one always), and the lanes' rows."""

    readers: Mapping[str, Collection[str]]
    leases: Sequence[Row[Any]]
