"""What can be set about a store."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from cqrs_decor.errors import SettingError


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """Settings of a `SqlAlchemyStore`; the defaults are right for most.

    Attributes:
        timeout: When a transaction of the store's own (claim, settle, park ...) counts as failed. Transactions of
            handlers have no such limit.
        idle_limit: When PostgreSQL or MariaDB ends a transaction of the store's own whose process has frozen, so that
            another process can take its lanes over. Whole seconds, at least 1.
        busy_timeout: How long SQLite waits for the one who writes.
        synchronous: SQLite only. FULL: what is committed outlives a power cut. NORMAL: it outlives a killed process,
            but a power cut may take the last commits. Measured: 610 and 1,050 commits a second.
        pool_size: Connections kept open by an engine that was made from a URL.
        pool_overflow: Connections beyond those, closed after use.
    """

    timeout: timedelta = timedelta(seconds=30)
    idle_limit: timedelta = timedelta(seconds=10)
    busy_timeout: timedelta = timedelta(seconds=5)
    synchronous: Literal["FULL", "NORMAL"] = "FULL"
    pool_size: int = 10
    pool_overflow: int = 20

    def __post_init__(self) -> None:
        faults = [
            text
            for wrong, text in (
                (self.timeout <= timedelta(0), "timeout must be longer than nothing"),
                (self.idle_limit < timedelta(seconds=1), "idle_limit must be at least one second"),
                (self.busy_timeout < timedelta(0), "busy_timeout must not be negative"),
                (
                    self.synchronous not in ("FULL", "NORMAL"),
                    f"synchronous must be FULL or NORMAL, not {self.synchronous}",
                ),
                (self.pool_size < 1, f"pool_size must be at least 1, not {self.pool_size}"),
                (self.pool_overflow < 0, f"pool_overflow must not be negative, but is {self.pool_overflow}"),
            )
            if wrong
        ]
        if faults:
            raise SettingError("StoreSettings", "; ".join(faults), "leave them out to get values that fit together")
