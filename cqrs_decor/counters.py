"""Counts the moments of an app: what health checks and tests look at, and what a metrics plugin may start from."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

from cqrs_decor.observers import ConnectionChanged, Moment, PartitionsPaused, WakeUpChanged

_AMOUNTS: Mapping[str, tuple[str, ...]] = {
    "BatchPublished": ("delivered", "rescheduled", "parked"),
    "LanesChanged": ("gained", "lost"),
    "BatchUndone": ("messages",),
    "MessagesHeld": ("count",),
    "CleanedUp": ("rows",),
}
"""Fields that are summed up, by kind of moment."""

_LABELS: Mapping[str, tuple[str, ...]] = {
    "MessageDispatched": ("message", "handler", "error"),
    "MessageConsumed": ("consumer", "message", "outcome"),
    "ConnectionChanged": ("part", "up"),
    "OffsetReset": ("group", "topic", "restarted_at"),
    "CrashSuspected": ("part",),
    "WakeUpChanged": ("works",),
    "BatchUndone": ("consumer", "error"),
    "MessagesHeld": ("consumer",),
    "LoopRestarted": ("loop", "error"),
}
"""Fields that tell one count of a kind from another; those with few values only, so that the counts stay few."""


@dataclass(frozen=True, slots=True)
class Count:
    """What is counted: a kind of moment with its labels, or with an `amount` the sum of that field of it."""

    kind: str
    labels: tuple[tuple[str, str], ...] = ()
    amount: str = ""


class Counters:
    """An observer: how often each kind of moment has come, by its labels, and what its amounts add up to.

    Attributes:
        away: Parts that a connection was lost to and has not come back: "the outbox", "the inbox", "the broker".
        wake_ups_work: What the last `WakeUpChanged` said; None before the first.
        paused: How many partitions the worker has paused, since it is full.
    """

    def __init__(self) -> None:
        self.away: set[str] = set()
        self.wake_ups_work: bool | None = None
        self.paused = 0
        self._counts: Counter[Count] = Counter()

    def notice(self, moment: Moment) -> None:
        kind = type(moment).__name__
        labels = tuple(_labels(moment, _LABELS.get(kind, ())))
        self._counts[Count(kind, labels)] += 1
        for name in _AMOUNTS.get(kind, ()):
            self._counts[Count(kind, labels, name)] += getattr(moment, name)
        self._keep_state(moment)

    def count(self, kind: type[Moment], amount: str = "", **labels: object) -> int:
        """How often `kind` came, or what its field `amount` adds up to, with these labels; those not given are any."""
        wanted = {name: str(value) for name, value in labels.items()}
        return sum(
            number
            for count, number in self._counts.items()
            if count.kind == kind.__name__ and count.amount == amount and wanted.items() <= dict(count.labels).items()
        )

    def document(self) -> dict[str, int]:
        """Every count under a name like `MessageConsumed{consumer="shop.bill",outcome="done"}.messages`."""
        return {_name(count): number for count, number in sorted(self._counts.items(), key=lambda each: _name(each[0]))}

    def _keep_state(self, moment: Moment) -> None:
        match moment:
            case ConnectionChanged(part=part, up=True):
                self.away.discard(part)
            case ConnectionChanged(part=part):
                self.away.add(part)
            case WakeUpChanged(works=works):
                self.wake_ups_work = works
            case PartitionsPaused(paused=paused):
                self.paused = paused
            case _:
                pass  # counted, and of no state


def _labels(moment: Moment, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for field in fields(moment):
        if field.name in names:
            yield field.name, str(getattr(moment, field.name))


def _name(count: Count) -> str:
    labels = ",".join(f'{name}="{value}"' for name, value in count.labels)
    return count.kind + (f"{{{labels}}}" if labels else "") + (f".{count.amount}" if count.amount else "")
