"""Lanes: fixed shares of the outbox, each held by one relay at a time under a lease and a fencing number.

Source: competing consumers under fenced leases (Hohpe & Woolf 2003; Kleppmann, "Designing Data-Intensive Applications",
2017, ch. 8).
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

LANES = 32
"""How many lanes an outbox has: a constant of its tables. Two processes that disagree on it would break order."""


@dataclass(frozen=True, slots=True)
class HeldLane:
    """A lane in the hand of a relay. The fence rises with each change of owner; a write under an older is refused."""

    number: int
    fence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspicion:
    """What the last holder of a lane may have had in hand when it vanished.

    Attributes:
        until: It had no record with a higher id in hand: up to this one the lane goes in single steps.
        record: The record that it had in hand in a single step, if it went in those already.
        crashes: How many holders in a row vanished with that record in hand.
    """

    until: int
    record: int | None = None
    crashes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenLane:
    """A lane that was just taken; with a suspicion where its last holder vanished instead of giving it back."""

    lane: HeldLane
    suspicion: Suspicion | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewal:
    """What came of a sign of life.

    Attributes:
        held: The lanes that are still held under the same fence; the others are lost.
        relays: How many relays take part, this one included.
        waiting: Whether any record of the held lanes is there, due or not.
    """

    held: Sequence[HeldLane]
    relays: int
    waiting: bool


def lane_of(topic: str, key: str | None, message_id: str, lanes: int = LANES) -> int:
    """The lane of a record: the same for all records of a (topic, key); spread by id where there is no key."""
    text = f"{topic}\0{key}" if key is not None else message_id
    return zlib.crc32(text.encode()) % lanes
