"""What can be set about the log as a broker."""

from dataclasses import dataclass
from datetime import timedelta

from cqrs_decor.errors import SettingError


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """Settings of a `LogTableBroker`; all processes of a group should have the same lease.

    Attributes:
        poll: How soon a reader looks again for records that another process wrote; its own process wakes it at once.
        idle_poll: What `poll` grows to while nothing comes.
        lease: How long the lanes of a reader that vanished stay with it.
        beat: How often a reader renews its leases, and sees who else is there. Well below `lease`.
        revoke_limit: How long a reader may take to finish what came from lanes that it has to give away.
        max_bytes: Larger bodies are refused.
    """

    poll: timedelta = timedelta(milliseconds=200)
    idle_poll: timedelta = timedelta(seconds=1)
    lease: timedelta = timedelta(seconds=10)
    beat: timedelta = timedelta(seconds=2)
    revoke_limit: timedelta = timedelta(seconds=30)
    max_bytes: int = 1_048_576

    def __post_init__(self) -> None:
        faults = [
            text
            for wrong, text in (
                (self.poll <= timedelta(0), "poll must be longer than nothing"),
                (self.idle_poll < self.poll, "idle_poll must not be shorter than poll"),
                (self.beat <= timedelta(0), "beat must be longer than nothing"),
                (self.lease < 3 * self.beat, "lease must be at least three times beat, for one that fails"),
                (self.revoke_limit < timedelta(0), "revoke_limit must not be negative"),
                (self.max_bytes < 1, f"max_bytes must be at least 1, not {self.max_bytes}"),
            )
            if wrong
        ]
        if faults:
            raise SettingError("LogSettings", "; ".join(faults), "leave them out to get values that fit together")
