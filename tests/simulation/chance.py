"""What goes wrong, drawn by seed, and counted."""

from collections import Counter
from dataclasses import dataclass, fields
from random import Random
from typing import Literal

Fate = Literal[
    "well", "slow", "request lost", "reply lost", "belated", "crash before", "crash after", "conflict", "refused"
]
"""Of one call to a store or a broker.

belated: The caller is told that the other side is away, and the call is carried out later all the same.
crash before, crash after: The caller's process dies, before the call has arrived, or once it was carried out.
"""

_USUAL_S = 0.003
"""What a call takes on average."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Odds:
    """How likely each fault is: per call, per message, or per second of virtual time.

    Attributes:
        refused: Per publication of a record, by a whim of the broker's.
        flaky: Per run of a handler.
        refused_always: Per message: the broker refuses it until an operator has mended the cause.
        raising_always: Per message: its first consumer fails with it until then.
        killing_relays, killing_workers: Per message: whoever has it in hand dies, until then.
        kills, stops, pauses, steps, outages, cuts, changes: Per second: a process is killed, told to stop, stopped by a
            signal, its wall clock set; a server is away for all, or for one process; a worker more, or one less.
    """

    slow: float = 0.004
    request_lost: float = 0.002
    reply_lost: float = 0.002
    belated: float = 0.001
    crash_before: float = 0.0002
    crash_after: float = 0.0002
    conflict: float = 0.002
    refused: float = 0.002
    flaky: float = 0.004
    refused_always: float = 0.0003
    raising_always: float = 0.0003
    killing_relays: float = 0.0001
    killing_workers: float = 0.0001
    kills: float = 0.3
    stops: float = 0.1
    pauses: float = 0.3
    steps: float = 0.2
    outages: float = 0.06
    cuts: float = 0.2
    changes: float = 0.2


QUIET = Odds(**{field.name: 0.0 for field in fields(Odds)})
"""Nothing goes wrong any more."""

_OF_CALLS: tuple[tuple[str, Fate], ...] = (
    ("slow", "slow"),
    ("request_lost", "request lost"),
    ("reply_lost", "reply lost"),
    ("belated", "belated"),
    ("crash_before", "crash before"),
    ("crash_after", "crash after"),
)


class Chance:
    """The dice of a run."""

    def __init__(self, seed: int, odds: Odds) -> None:
        self.random = Random(seed)
        self.faults: Counter[str] = Counter()
        self.odds = odds
        self.use(odds)

    def use(self, odds: Odds) -> None:
        """From now on with these odds."""
        self.odds = odds
        self._fates: list[Fate] = [fate for _, fate in _OF_CALLS]
        self._weights = [getattr(odds, name) for name, _ in _OF_CALLS]
        self._trouble = sum(self._weights)

    @property
    def is_quiet(self) -> bool:
        """Nothing goes wrong any more."""
        return self.odds is QUIET

    def latency(self) -> float:
        """What an ordinary call takes one way, in seconds."""
        return self.random.expovariate(1 / _USUAL_S)

    def fate(self) -> Fate:
        """What becomes of a call."""
        if self.random.random() >= self._trouble:
            return "well"
        fate = self.random.choices(self._fates, self._weights)[0]
        self.faults[fate] += 1
        return fate

    def happens(self, fault: str) -> bool:
        """Whether a fault that has odds of its own happens now."""
        odds: float = getattr(self.odds, fault)
        if not odds or self.random.random() >= odds:
            return False
        self.faults[fault.replace("_", " ")] += 1
        return True
