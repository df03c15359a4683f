"""What must hold, watched from outside the library: at each commit, landing, effect, lease and settlement, and at rest.

The numbers are those of `docs/explain/faults.md`.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cqrs_decor.envelope import Envelope
from cqrs_decor.lanes import HeldLane

Place = tuple[str, str | None]
"""Topic and key."""


KILLS_AT_MOST = 8
"""So many processes may die of one message before it has to be parked: one in a batch, three in single steps, and some
whose mark was taken off in between, by a stop or an outage.
"""


class InvariantBrokenError(AssertionError):
    """A promise of the library does not hold; the text says which, and with which ids."""


@dataclass(slots=True)
class _Line:
    """Messages that must come for the first time in this order, and how many of them have."""

    ids: list[str] = field(default_factory=list[str])
    come: int = 0


@dataclass(frozen=True, slots=True)
class _Lease:
    owner: str
    fence: int
    ends: float


class Oracle:
    """Knows what was committed, and so what has to come; told by the models of store and broker, never by the library.

    Args:
        consumers: By wire name, who must have an effect of each such message.
        broken: Called once, at the first promise that does not hold.
    """

    def __init__(
        self,
        consumers: Mapping[str, Sequence[str]],
        *,
        broken: Callable[[InvariantBrokenError], None],
    ) -> None:
        self.committed: dict[str, Envelope] = {}
        self.landed: set[str] = set()
        self.repeats = 0
        self.kills: Counter[str] = Counter()
        self._consumers = consumers
        self._tell = broken
        self._effects: set[tuple[str, str]] = set()
        self._to_land: dict[Place, _Line] = defaultdict(_Line)
        self._to_take_effect: dict[tuple[str, Place], deque[str]] = defaultdict(deque)
        self._leases: dict[int, _Lease] = {}
        self._is_broken = False

    def refuse(self, text: str) -> None:
        """A promise is broken."""
        if not self._is_broken:
            self._is_broken = True
            self._tell(InvariantBrokenError(text))

    # --- messages ---------------------------------------------------------------------------------------------------

    def commit(self, envelope: Envelope) -> None:
        """Its transaction commits, after all that were told before."""
        self.committed[envelope.id] = envelope
        place = (envelope.topic, envelope.key)
        if envelope.key is not None:
            self._to_land[place].ids.append(envelope.id)
            for consumer in self._consumers[envelope.type]:
                self._to_take_effect[consumer, place].append(envelope.id)

    def land(self, envelope: Envelope) -> None:
        """The broker has it (again)."""
        if envelope.id in self.landed:
            self.repeats += 1
            return
        if envelope.id not in self.committed:
            self.refuse(f"I2 ghost: {envelope.id} reached the broker and was never committed")
        self.landed.add(envelope.id)
        if envelope.key is None:
            return
        line = self._to_land[envelope.topic, envelope.key]
        due = line.ids[line.come] if line.come < len(line.ids) else None
        if due != envelope.id:
            self.refuse(f"I4 order: {envelope.id} of {envelope.topic}/{envelope.key} landed before {due}")
        line.come += 1

    def take_effect(self, consumer: str, envelope: Envelope) -> None:
        """The transaction of a consumer commits, with the effect of a message."""
        if (consumer, envelope.id) in self._effects:
            self.refuse(f"I3 twice: {consumer} had {envelope.id} already")
        if envelope.id not in self.committed:
            self.refuse(f"I2 ghost: {consumer} had {envelope.id}, which was never committed")
        self._effects.add((consumer, envelope.id))
        if envelope.key is None:
            return
        line = self._to_take_effect[consumer, (envelope.topic, envelope.key)]
        due = line.popleft() if line else None
        if due != envelope.id:
            self.refuse(f"I4 order: {consumer} had {envelope.id} of {envelope.topic}/{envelope.key} before {due}")

    def kill(self, message_id: str) -> None:
        """A process dies of a message."""
        self.kills[message_id] += 1
        if self.kills[message_id] > KILLS_AT_MOST:
            self.refuse(f"I6 crash loop: {message_id} has killed {self.kills[message_id]} processes and is not parked")

    # --- lanes ------------------------------------------------------------------------------------------------------

    def take_lane(self, lane: HeldLane, owner: str, now: float, lease_s: float) -> None:
        """The database gave a lane to an owner."""
        held = self._leases.get(lane.number)
        if held is not None and held.ends > now:
            self.refuse(f"two owners: lane {lane.number} is {held.owner}'s until {held.ends:.3f}, {owner} has it too")
        if held is not None and held.fence >= lane.fence:
            self.refuse(f"fence: that of lane {lane.number} went from {held.fence} to {lane.fence}")
        self._leases[lane.number] = _Lease(owner, lane.fence, now + lease_s)

    def keep_lane(self, lane: HeldLane, owner: str, now: float, lease_s: float) -> None:
        """The database extended a lease."""
        held = self._leases.get(lane.number)
        if held is None or held.owner != owner or held.fence != lane.fence:
            self.refuse(
                f"two owners: {owner} extends lane {lane.number}, which is {held.owner if held else 'nobody'}'s"
            )
        self._leases[lane.number] = _Lease(owner, lane.fence, now + lease_s)

    def give_lane(self, lane: HeldLane, owner: str) -> None:
        """The database was asked to take a lane back."""
        held = self._leases.get(lane.number)
        if held is not None and held.owner == owner and held.fence == lane.fence:
            self._leases[lane.number] = _Lease(owner, lane.fence, float("-inf"))

    def settle(self, lanes: Sequence[HeldLane], records: Sequence[tuple[int, int]]) -> None:
        """The database carried a settlement out: (lane, id) of its records."""
        fences = {lane.number: lane.fence for lane in lanes}
        for lane in lanes:
            held = self._leases.get(lane.number)
            if held is None or held.fence != lane.fence:
                self.refuse(f"fence: lane {lane.number} was settled under {lane.fence}, it is at {held and held.fence}")
        strays = [record for lane, record in records if lane not in fences]
        if strays:
            self.refuse(f"fence: records {strays[:8]} were settled without their lane")

    # --- at rest ----------------------------------------------------------------------------------------------------

    def at_rest(self, *, repeats_at_most: int) -> None:
        """When all is quiet: nothing was lost, little came twice."""
        lost = [each for each in self.committed if each not in self.landed]
        if lost:
            self.refuse(f"I1 lost: {len(lost)} committed and never landed: {', '.join(lost[:8])}")
        idle = [
            f"{consumer} {envelope.id}"
            for envelope in self.committed.values()
            for consumer in self._consumers[envelope.type]
            if (consumer, envelope.id) not in self._effects
        ]
        if idle:
            self.refuse(f"I1 lost: {len(idle)} without their effect: {', '.join(idle[:8])}")
        if self.repeats > repeats_at_most:
            self.refuse(f"I5 repeats: {self.repeats} messages landed again, {repeats_at_most} can have been in flight")
