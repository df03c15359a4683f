"""What must hold after every run. Each check names the ids that break it.

The numbers are those of `docs/explain/faults.md`. An entry is what the business wrote; its event carries the entry, the
aggregate (the key) and the number that the entry got in its aggregate's transaction.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.fault.processes import Footprint

MORE_FILES = 30
"""A pool may have as many connections more than it had when it was first looked at."""

MORE_MEMORY = 48 * 1024 * 1024

MORE_SESSIONS = 20
"""The same, as the database sees it: a session that it still has for a process that is gone is not among those."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Something that a process was at: a handler that ran for an entry, or a batch that was on its way to the broker.

    Attributes:
        what: The entry; the lane of a batch.
        place: Of a batch, how many records of the lane were in it.
        ended: None where the process was killed meanwhile.
    """

    what: str
    place: int
    process: int
    began: float
    ended: float | None


class InvariantBrokenError(AssertionError):
    """A promise of the library does not hold; the text says which, and with which ids."""


def nothing_is_lost(
    committed: Iterable[Entry], deliveries: Iterable[Delivered], effects: Iterable[Effect], *, unhandled: int = 0
) -> None:
    """I1: each entry that was committed has arrived, and has had its effect, but for so many that are parked."""
    wanted = {entry.entry for entry in committed}
    without = wanted - {effect.entry for effect in effects}
    if not unhandled:
        _refuse("I1 lost: committed, never delivered", wanted - {delivery.entry for delivery in deliveries})
    if len(without) != unhandled:
        _refuse("I1 lost: committed, without an effect", without)


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


def nothing_runs_beside_itself(spans: Iterable[Span], what: str) -> None:
    """No two processes are at the same thing at a time; what a kill cut off counts until the next one begins."""
    latest: dict[str, Span] = {}
    beside: list[str] = []
    for span in sorted(spans, key=lambda each: each.began):
        before = latest.get(span.what)
        if before is not None and before.ended is not None and before.ended > span.began:
            beside.append(f"{span.what} (processes {before.process} and {span.process})")
        if before is None or before.ended is None or span.ended is None or span.ended >= before.ended:
            latest[span.what] = span
    _refuse(f"{what} at the same time, twice", beside)


def recovers_soon(seconds: float | None, at_most: float) -> None:
    """I6: so long after the fault the oldest pending record was young again."""
    if seconds is None or seconds > at_most:
        told = "never again" if seconds is None else f"again after {seconds:.1f} s"
        raise InvariantBrokenError(f"I6 slow: the oldest pending record was young {told}, not within {at_most:g} s.")


def nothing_grows(name: str, before: Footprint, after: Footprint) -> None:
    """I8: files and memory are flat. Pools and caches that fill are no growth: what is allowed is generous."""
    if after.files > before.files + MORE_FILES or after.memory > before.memory + MORE_MEMORY:
        raise InvariantBrokenError(f"I8 grown: {name} had {before} and has {after}.")


def no_session_is_left_behind(before: int, after: int) -> None:
    """I8: the database has no more sessions than it had; each that a broken connection leaves behind takes memory."""
    if after > before + MORE_SESSIONS:
        raise InvariantBrokenError(f"I8 grown: the database had {before} sessions and has {after}.")


def faults_are_visible(who: str, moment: str, told: int, action: str, logged: int) -> None:
    """I9: an observer was told, and the log has a line that an alert can be made of."""
    if not told:
        raise InvariantBrokenError(f"I9 unseen: {who} told no observer of {moment}.")
    if not logged:
        raise InvariantBrokenError(f"I9 unseen: {who} logged no line with action={action}.")


def nothing_is_stranded(left: Left, *, parked: int = 0) -> None:
    """I7: the outbox is empty, nothing was parked but on purpose, everything is acknowledged."""
    if left != Left(pending=0, parked=parked, unacknowledged=0):
        raise InvariantBrokenError(
            f"I7 stranded: {left.pending} records in the outbox, {left.parked} parked, "
            f"{left.unacknowledged} deliveries not acknowledged."
        )


def _refuse(what: str, ids: Iterable[str]) -> None:
    found = sorted(ids)
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise InvariantBrokenError(f"{what}: {', '.join(found[:SHOWN])}{more}.")
