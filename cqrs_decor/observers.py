"""Named moments in the life of a message, for telemetry: the seam that metrics and tracing plugins implement.

Ids and counts only: no moment carries a payload or a secret.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageDispatched:
    """A handler ended, in process or in a worker; `error` is the type name of what it raised, or None."""

    message: str
    handler: str
    seconds: float
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPublished:
    """The relay put a batch on the broker and settled it."""

    delivered: int
    rescheduled: int
    parked: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageConsumed:
    """A consumer has its outcome for one message on record: done, duplicate, skipped or parked."""

    consumer: str
    message: str
    outcome: str
    attempts: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LanesChanged:
    """A relay holds other lanes than before; `lost` counts those another one took from it."""

    owner: str
    held: int
    gained: int
    lost: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionChanged:
    """A database or broker went away (`up` false) or came back."""

    part: str
    up: bool
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceRejected:
    """A late write of a relay that no longer holds its lane was refused."""

    owner: str
    lane: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OffsetReset:
    """A consumer group had to start over, since its position was no longer kept by the broker."""

    group: str
    topic: str
    partition: int
    restarted_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CrashSuspected:
    """A relay or worker took over from one that vanished with work in hand, and goes in single steps up to `until`.

    Attributes:
        part: relay or worker.
        place: The lane, or topic and partition.
        crashes: How many vanished with the same record in hand; 0 while none is under suspicion.
    """

    part: str
    place: str
    until: int
    crashes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WakeUpChanged:
    """Wake-ups by the database work, or (`works` false) the relay looks for work at intervals instead."""

    works: bool
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionsPaused:
    """A worker that is full has paused so many partitions; 0 when it goes on with all."""

    group: str
    paused: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchUndone:
    """An optimistic batch failed, was rolled back, and is run one by one."""

    consumer: str
    messages: int
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MessagesHeld:
    """Messages were kept behind a parked one of their key."""

    consumer: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanedUp:
    """Rows that retention says are done with were deleted."""

    rows: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopRestarted:
    """A loop failed by a fault of its own and was started again."""

    loop: str
    error: str


Moment = (
    MessageDispatched
    | BatchPublished
    | MessageConsumed
    | LanesChanged
    | ConnectionChanged
    | FenceRejected
    | OffsetReset
    | CrashSuspected
    | WakeUpChanged
    | PartitionsPaused
    | BatchUndone
    | MessagesHeld
    | CleanedUp
    | LoopRestarted
)


class Observer(Protocol):
    """Told of each moment, synchronously, on the loop that runs the app: be quick, do not block, do not raise."""

    def notice(self, moment: Moment) -> None: ...


class Observers:
    """All observers of an app as one. A faulty observer must not stop the main line, so what it raises is logged."""

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._observers = tuple(observers)

    def __bool__(self) -> bool:
        return bool(self._observers)

    def notice(self, moment: Moment) -> None:
        for observer in self._observers:
            _notice(observer, moment)


def _notice(observer: Observer, moment: Moment) -> None:
    try:
        observer.notice(moment)
    except Exception:  # telemetry is not allowed to break what it watches
        _logger.exception(
            "an observer failed", extra={"action": "observer_failed", "observer": type(observer).__name__}
        )
