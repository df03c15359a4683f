"""Lanes: fixed shares of the outbox, each held by one relay at a time under a lease and a fencing number.

Source: competing consumers under fenced leases (Hohpe & Woolf 2003; Kleppmann, "Designing Data-Intensive Applications",
2017, ch. 8).
"""

import zlib
from dataclasses import dataclass

LANES = 32
"""How many lanes an outbox has: a constant of its tables. Two processes that disagree on it would break order."""


@dataclass(frozen=True, slots=True)
class HeldLane:
    """A lane in the hand of a relay. The fence rises with each change of owner; a write under an older is refused."""

    number: int
    fence: int


def lane_of(topic: str, key: str | None, message_id: str, lanes: int = LANES) -> int:
    """The lane of a record: the same for all records of a (topic, key); spread by id where there is no key."""
    text = f"{topic}\0{key}" if key is not None else message_id
    return zlib.crc32(text.encode()) % lanes
