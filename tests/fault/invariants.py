"""What must hold after every run. Each check names the ids that break it.

The numbers are those of `docs/explain/faults.md`. An entry is what the business wrote; its event carries the entry, the
aggregate (the key) and the number that the entry got in its aggregate's transaction.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SHOWN = 8
"""So many ids are named, and the rest counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A committed business row."""

    entry: str
    aggregate: int
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered:
    """A delivery that the sink saw, in the order in which it saw them; repeats too."""

    message_id: str
    entry: str
    aggregate: int
    number: int
    attempt: int
    process: int
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """A row that a consumer wrote in its transaction."""

    entry: str
    message_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What is still somewhere on the way when everything should be done."""

    pending: int
    parked: int
    unacknowledged: int


class InvariantBrokenError(AssertionError):
    """A promise of the library does not hold; the text says which, and with which ids."""


def nothing_is_lost(committed: Iterable[Entry], deliveries: Iterable[Delivered], effects: Iterable[Effect]) -> None:
    """I1: each entry that was committed has arrived, and has had its effect."""
    wanted = {entry.entry for entry in committed}
    _refuse("I1 lost: committed, never delivered", wanted - {delivery.entry for delivery in deliveries})
    _refuse("I1 lost: committed, without an effect", wanted - {effect.entry for effect in effects})


def there_are_no_ghosts(committed: Iterable[Entry], deliveries: Iterable[Delivered]) -> None:
    """I2: what has arrived was committed."""
    ghosts = {delivery.entry for delivery in deliveries} - {entry.entry for entry in committed}
    _refuse("I2 ghosts: delivered, never committed", ghosts)


def effects_happen_once(effects: Iterable[Effect]) -> None:
    """I3: one effect for each message, although it may be delivered again."""
    counted = Counter(effect.entry for effect in effects)
    _refuse("I3 doubled: more than one effect", {entry for entry, count in counted.items() if count > 1})


def order_is_kept(deliveries: Iterable[Delivered]) -> None:
    """I4: in each aggregate, first deliveries come in the order of the numbers, which is the order of the commits."""
    highest: dict[int, int] = defaultdict(int)
    seen: set[str] = set()
    late: list[str] = []
    for delivery in deliveries:
        if delivery.entry in seen:
            continue
        seen.add(delivery.entry)
        if delivery.number < highest[delivery.aggregate]:
            late.append(f"{delivery.entry} (number {delivery.number} of aggregate {delivery.aggregate})")
        highest[delivery.aggregate] = max(highest[delivery.aggregate], delivery.number)
    _refuse("I4 out of order: delivered after a later one of its aggregate", late)


def repeats_are_few(deliveries: Sequence[Delivered], at_most: int) -> None:
    """I5: no more is delivered again than was in flight, and each time under the same message id."""
    ids: dict[str, set[str]] = defaultdict(set)
    for delivery in deliveries:
        ids[delivery.entry].add(delivery.message_id)
    _refuse(
        "I5 renamed: delivered under several message ids", {entry for entry, names in ids.items() if len(names) > 1}
    )

    counted = Counter(delivery.entry for delivery in deliveries if delivery.attempt == 1)
    repeats = counted.total() - len(counted)
    if repeats > at_most:
        raise InvariantBrokenError(f"I5 repeated: {repeats} deliveries came again, {at_most} can have been in flight.")


def nothing_is_stranded(left: Left) -> None:
    """I7: the outbox is empty, nothing was parked, everything is acknowledged."""
    if left != Left(pending=0, parked=0, unacknowledged=0):
        raise InvariantBrokenError(
            f"I7 stranded: {left.pending} records in the outbox, {left.parked} parked, "
            f"{left.unacknowledged} deliveries not acknowledged."
        )


def _refuse(what: str, ids: Iterable[str]) -> None:
    found = sorted(ids)
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise InvariantBrokenError(f"{what}: {', '.join(found[:SHOWN])}{more}.")
