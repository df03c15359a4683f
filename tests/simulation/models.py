"""The database and the broker of a simulation: the ones in memory, telling the oracle what they do."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from datetime import timedelta

from cqrs_decor.clock import Clock
from cqrs_decor.envelope import Envelope
from cqrs_decor.inbox import Mark
from cqrs_decor.lanes import HeldLane, Renewal, TakenLane
from cqrs_decor.memory import MemoryInbox, MemoryOutbox, MemoryStore
from cqrs_decor.outbox import Settlement
from tests.simulation.oracle import Oracle


class WatchedOutbox(MemoryOutbox):
    """The outbox in memory, each step of which is checked from outside."""

    def __init__(self, clock: Clock, oracle: Oracle) -> None:
        super().__init__(clock)
        self._oracle = oracle

    def append(self, envelopes: Iterable[Envelope]) -> None:
        written = list(envelopes)
        for envelope in written:
            self._oracle.commit(envelope)
        super().append(written)

    async def acquire(self, owner: str, lease: timedelta, limit: int, *, in_hand: int) -> Sequence[TakenLane]:
        taken = await super().acquire(owner, lease, limit, in_hand=in_hand)
        for each in taken:
            self._oracle.take_lane(each.lane, owner, self._clock.elapsed(), lease.total_seconds())
        return taken

    async def renew(self, owner: str, lanes: Sequence[HeldLane], lease: timedelta) -> Renewal:
        renewal = await super().renew(owner, lanes, lease)
        for lane in renewal.held:
            self._oracle.keep_lane(lane, owner, self._clock.elapsed(), lease.total_seconds())
        return renewal

    async def release(self, owner: str, lanes: Sequence[HeldLane], *, leaving: bool = False) -> None:
        await super().release(owner, lanes, leaving=leaving)
        for lane in lanes:
            self._oracle.give_lane(lane, owner)

    async def settle(self, settlement: Settlement) -> None:
        await self.write_outcome(settlement)
        records = [*settlement.delivered, *(failed.record for failed in settlement.failed)]
        self._oracle.settle(settlement.lanes, [(record.lane, record.id) for record in records])

    async def write_outcome(self, settlement: Settlement) -> None:
        """What a settlement does, unwatched; planted bugs do it in their own way."""
        await super().settle(settlement)


class WatchedInbox(MemoryInbox):
    """The inbox in memory, which knows of which workers' ends a message may truly be accused.

    Attributes:
        killed: The workers that were killed, by the name under which they leave their marks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.killed: set[str] = set()
        self._accused: set[tuple[str, str, int, int]] = set()

    async def take_marks(self, group: str, owner: str, partitions: Collection[tuple[str, int]]) -> Sequence[Mark]:
        for by, mark in (self._marks.get((group, *place), (owner, None)) for place in partitions):
            if mark is not None and mark.suspect is not None and by in self.killed:
                self._accused.add((by, mark.topic, mark.partition, mark.suspect))
        return await super().take_marks(group, owner, partitions)

    def kills(self) -> Counter[tuple[str, int, int]]:
        """How many workers were killed while their mark named a message, by topic, partition and position."""
        return Counter((topic, partition, position) for _, topic, partition, position in self._accused)


class WatchedStore(MemoryStore):
    """The store in memory, with an outbox that is watched, and the inbox that is given."""

    def __init__(self, clock: Clock, outbox: WatchedOutbox, inbox: MemoryInbox) -> None:
        super().__init__(clock=clock)
        self.outbox = self._outbox = outbox
        self.inbox = self._inbox = inbox
