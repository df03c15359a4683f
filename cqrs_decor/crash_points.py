"""Named places between two steps that a crash must not be able to tear apart; tests end the process there.

Nothing happens at them unless a test has installed something (`cqrs_decor.testing.faults`): they cost one look at a
global.
"""

from collections.abc import Callable
from typing import Literal, get_args

CrashPoint = Literal[
    "uow.before_commit",
    "outbox.rows_written",
    "uow.after_commit",
    "relay.claimed",
    "relay.published",
    "relay.settled",
    "worker.received",
    "worker.committed",
    "worker.before_ack",
    "worker.acked",
]
"""In the order in which a message passes them."""

CRASH_POINTS: tuple[CrashPoint, ...] = get_args(CrashPoint)

_at: Callable[[CrashPoint], None] | None = None


def reach(point: CrashPoint) -> None:
    """Say that the code is at this point."""
    if _at is not None:
        _at(point)


def install(at: Callable[[CrashPoint], None] | None) -> None:
    """Have `at` called with each crash point that is reached; None takes it out again."""
    global _at
    _at = at
