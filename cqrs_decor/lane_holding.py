"""Which lanes a relay holds, until when, and how many are its share."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import timedelta
from math import ceil, inf

from cqrs_decor.clock import Clock
from cqrs_decor.errors import LaneLostError
from cqrs_decor.lanes import HeldLane, Renewal, Suspicion, TakenLane
from cqrs_decor.observers import CrashSuspected, FenceRejected, LanesChanged, Observers
from cqrs_decor.outbox import OutboxStore

_logger = logging.getLogger(__name__)

SAFETY = 0.3
"""Publishing stops when this share of a lease is left: what flies then still lands before another relay may begin."""

_RENEWAL = 0.34
"""Leases are renewed after this share of them: an idle relay asks once in 5.1 s at the default of 15 s, and when one
renewal fails, the next still comes before publishing has to stop.
"""

_SOON_S = 1.0
"""So often a relay looks for lanes while they are changing hands."""

_SETTLING_S = 60.0
"""Lanes are expected to change hands for so long after relays have come or gone."""

_CAREFUL_EVERY = 12
"""Once in so many renewals a relay looks for lanes although all should have found their holders: once a minute."""


class LaneHolding:
    """The lanes of one relay. One task refreshes it; others read what is held, and report what they lost.

    Args:
        owner: The relay.
        in_hand: How many records a relay has in hand at most.

    Attributes:
        held: By number, those with more than the fair share included.
        surplus: Those above the fair share: nothing more is claimed from them, and they go back once nothing flies.
        suspicions: Of those whose last holder vanished: they go in single steps.
        waits: Whether any record of the held lanes was there at the last renewal.
        inherited: Whether some of those may come due at a time that only the store knows.
    """

    def __init__(
        self,
        outbox: OutboxStore,
        owner: str,
        *,
        lease: timedelta,
        in_hand: int,
        clock: Clock,
        observers: Observers,
    ) -> None:
        self.held: dict[int, HeldLane] = {}
        self.surplus: frozenset[int] = frozenset()
        self.suspicions: dict[int, Suspicion] = {}
        self.waits = False
        self.inherited = False
        self.safe_until = -inf
        self._outbox = outbox
        self._owner = owner
        self._lease = lease
        self._in_hand = in_hand
        self._clock = clock
        self._observers = observers
        self._relays: int = 0
        self._settled_at = -inf
        self._renewals = 0

    # --- what is held -----------------------------------------------------------------------------------------------

    @property
    def is_sure(self) -> bool:
        """Whether lanes are held, and surely still for as long as it takes what flies to land."""
        return bool(self.held) and self._clock.elapsed() < self.safe_until

    def holds(self, lane: HeldLane) -> bool:
        return self.held.get(lane.number) == lane

    def claimable(self) -> list[HeldLane]:
        """Lanes that batches are claimed from."""
        if not self.surplus and not self.suspicions:
            return list(self.held.values())
        kept_out = self.surplus | self.suspicions.keys()
        return [lane for number, lane in self.held.items() if number not in kept_out]

    def accused(self) -> list[HeldLane]:
        """Lanes with a record that a relay vanished with in a single step: each goes alone."""
        return [self.held[number] for number, each in sorted(self.suspicions.items()) if each.record is not None]

    def suspected(self) -> list[HeldLane]:
        """Lanes that go in single steps, side by side."""
        return [self.held[number] for number, each in sorted(self.suspicions.items()) if each.record is None]

    def acquit(self, lane: int) -> None:
        """The step of this lane is on record: the relay outlived it."""
        if lane in self.suspicions:
            self.suspicions[lane] = replace(self.suspicions[lane], record=None, crashes=0)

    def clear(self, lane: int) -> None:
        """Nothing of this lane is under suspicion any longer."""
        if self.suspicions.pop(lane, None) is not None:
            _logger.info("lane %d is above suspicion", lane, extra={"action": "suspicion_cleared", "lane": lane})

    # --- refreshing -------------------------------------------------------------------------------------------------

    @property
    def next_look_s(self) -> float:
        """When to refresh again."""
        period = self._lease.total_seconds() * _RENEWAL
        changing = bool(self.surplus) or (self._missing() > 0 and self._is_unsettled())
        return min(period, _SOON_S) if changing else period

    async def refresh(self) -> None:
        """Show a sign of life, take what is free up to the fair share, and find out what is above it.

        The deadline counts from before the call: a late reply cuts it.

        Raises:
            StoreUnavailableError: What was learnt before still holds.
        """
        began = self._clock.elapsed()
        lost = self._learn(await self._outbox.renew(self._owner, list(self.held.values()), self._lease))
        self.safe_until = began + self._lease.total_seconds() * (1 - SAFETY)
        self.surplus = self._surplus()
        taken: Sequence[TakenLane] = ()
        if self._looks_for_lanes():
            taken = await self._outbox.acquire(self._owner, self._lease, self._missing(), in_hand=self._in_hand)
            self._take(taken)
        self._tell_of_lanes(lost=lost, gained=len(taken))

    async def give_surplus_back(self, in_use: Collection[int]) -> None:
        """Let go of what is above the fair share and not in use; the rest follows when nothing of it flies."""
        free = [self.held[number] for number in sorted(self.surplus - set(in_use))]
        if not free:
            return
        await self._outbox.release(self._owner, free)
        self._forget([lane.number for lane in free])
        self._tell_of_lanes(given=len(free))

    async def leave(self) -> None:
        """Give everything back, and take part no longer."""
        lanes = list(self.held.values())
        self._forget(list(self.held))
        self._relays, self.safe_until, self.inherited = 0, -inf, False
        await self._outbox.release(self._owner, lanes, leaving=True)

    def lose(self, error: LaneLostError) -> None:
        """The store refused a write: these lanes are another's."""
        self._forget(error.lanes)
        for number in error.lanes:
            self._observers.notice(FenceRejected(owner=self._owner, lane=number))
        _logger.warning("a late write was refused", extra={"action": "fence_rejected", "lanes": list(error.lanes)})

    def _learn(self, renewal: Renewal) -> int:
        """Take over what a renewal says; returns how many lanes were lost."""
        still_held = {lane.number for lane in renewal.held}
        lost = [number for number in self.held if number not in still_held]
        self._forget(lost)
        if lost or renewal.relays != self._relays:
            self._settled_at = self._clock.elapsed() + _SETTLING_S
        self._relays = renewal.relays
        self._renewals += 1
        self.waits = renewal.waiting
        self.inherited = self.inherited and renewal.waiting
        return len(lost)

    def _take(self, taken: Sequence[TakenLane]) -> None:
        for each in taken:
            self.held[each.lane.number] = each.lane
            if each.suspicion is not None:
                self.suspicions[each.lane.number] = each.suspicion
        if taken:
            self.waits = self.inherited = True
        self._tell_of_suspicions([each for each in taken if each.suspicion is not None])

    def _forget(self, numbers: Collection[int]) -> None:
        for number in numbers:
            self.held.pop(number, None)
            self.suspicions.pop(number, None)
        self.surplus -= frozenset(numbers)

    # --- the fair share ---------------------------------------------------------------------------------------------

    def _missing(self) -> int:
        return ceil(self._outbox.lane_count / max(self._relays, 1)) - len(self.held)

    def _surplus(self) -> frozenset[int]:
        """Those with the highest numbers, so that the choice stays the same until they are gone. Lanes under suspicion
        are kept until they are cleared: their next holder would not know of it.
        """
        above = -self._missing()
        free = [number for number in sorted(self.held, reverse=True) if number not in self.suspicions]
        return frozenset(free[: max(above, 0)])

    def _is_unsettled(self) -> bool:
        """Whether lanes are likely to become free: relays came or went, or others have clearly more than this one."""
        below = len(self.held) < self._outbox.lane_count // max(self._relays, 1)
        return below or self._clock.elapsed() < self._settled_at

    def _looks_for_lanes(self) -> bool:
        """One that holds a lane less than others, where the shares do not come out even, need not ask all the time."""
        return self._missing() > 0 and (self._is_unsettled() or self._renewals % _CAREFUL_EVERY == 0)

    # --- telling ----------------------------------------------------------------------------------------------------

    def _tell_of_lanes(self, *, lost: int = 0, gained: int = 0, given: int = 0) -> None:
        if not lost and not gained and not given:
            return
        self._observers.notice(LanesChanged(owner=self._owner, held=len(self.held), gained=gained, lost=lost))
        level = logging.WARNING if lost else logging.INFO
        facts = {"action": "lanes_changed", "held": len(self.held), "gained": gained, "lost": lost, "given_back": given}
        _logger.log(level, "relay holds %d lanes", len(self.held), extra=facts)

    def _tell_of_suspicions(self, taken: Sequence[TakenLane]) -> None:
        for each in taken:
            if each.suspicion is not None:
                self._observers.notice(
                    CrashSuspected(
                        part="relay",
                        place=f"lane {each.lane.number}",
                        until=each.suspicion.until,
                        crashes=each.suspicion.crashes,
                    )
                )
        if taken:
            facts = {"action": "crash_suspected", "lanes": [each.lane.number for each in taken]}
            _logger.warning("a relay vanished with records in hand: they go in single steps", extra=facts)
