"""Named places between two steps that a crash must not be able to tear apart; tests end the process there.

Nothing happens at them unless a test has installed something (`cqrs_decor.testing.faults`): they cost one look at a
global.
"""

from collections.abc import Callable

NAMES = (
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
)
"""Every crash point there is, in the order in which a message passes them."""

_at: Callable[[str], None] | None = None


def reach(name: str) -> None:
    """Say that the code is at the crash point `name`, one of `NAMES`."""
    if _at is not None:
        _at(name)


def install(at: Callable[[str], None] | None) -> None:
    """Have `at` called with the name of each crash point that is reached; None takes it out again."""
    global _at
    _at = at
