"""What can be set, in one place: by `bootstrap(settings=...)`, and what is not given there by the environment."""

from datetime import timedelta
from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from cqrs_decor.errors import SettingError, validation_faults

PREFIX = "CQRS_DECOR_"

_LEASE_S = 15.0
_PREFETCH = 1_000


def _fitting_the_lease(data: dict[str, Any]) -> float:
    """A setting that nobody gave must not contradict one that somebody did."""
    return 0.6 * float(data.get("lease_s", _LEASE_S))


def _fitting_the_prefetch(usual: int, data: dict[str, Any]) -> int:
    return min(usual, max(int(data.get("worker_prefetch", _PREFETCH)), 2))


class Settings(BaseModel):
    """All settings; units are in the names. What is not given here is taken from `CQRS_DECOR_...` variables by the app.

    Attributes:
        broker: Broker URL.
        database: Database URL.
        service: Name of this service: consumer group, and source of its events. Never change it.
        handlers: Modules with handlers, separated by commas in the environment.
        app: Where the command line finds the app, `module:attribute`.
        lease_s: A relay holds its lanes so long without a sign of life.
        relay_batch: Records that a relay claims at once.
        poll_interval_s: A relay that the database cannot wake looks for work this often.
        publish_timeout_s: What a broker may take for one batch before the relay calls it away: at most 0.7 of the lease
            (so long a relay trusts it), and 0.6 of it unless set.
        history_days: Delivered outbox records are kept so long; 0 keeps none.
        inbox_retention_days: So long the inbox remembers which message a consumer has had.
        replay_horizon_days: So old a message may be when it comes (again): what the broker keeps, or a restored backup.
        idempotency_days: So long the result of a command with an idempotency key is kept.
        log_retention_days: So long the database as broker keeps what every group has acknowledged.
        log_group_days: A group of that broker that nobody was in for so long is given up.
        worker_prefetch: Messages that a worker has in memory at most.
        worker_concurrency: Keys that a worker handles at a time, no more than it may have in memory; unless set, 1 on a
            database with one writer (SQLite), and no more than the engine's pool has connections for.
        worker_batch: Messages of an optimistic batch at most, no more than a worker may have in memory.
        drain_limit_s: A stop waits this long for work in flight.
        max_event_depth: Domain events may follow domain events this deep.
        max_body_bytes: A larger body is parked unread.
        unknown_events: What a worker does with an event on its topics whose class it does not know.
        start: Where a new consumer group begins.
        health_port: Where `run` answers health checks over HTTP; unless set, it does not.
        health_host: The address that it listens at for them; `0.0.0.0` for every one of the machine.
        health_silence_s: A loop that shows no progress for so long (two leases at least), though all is reachable, is
            stuck. Longer than the slowest handler takes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    broker: str | None = Field(default=None, repr=False)
    database: str | None = Field(default=None, repr=False)
    service: str | None = None
    handlers: tuple[str, ...] = ()
    app: str | None = None
    lease_s: float = Field(default=_LEASE_S, ge=1.0)
    relay_batch: int = Field(default=500, ge=1, le=10_000)
    poll_interval_s: float = Field(default=0.5, gt=0)
    publish_timeout_s: float = Field(default_factory=_fitting_the_lease, gt=0)
    history_days: float = Field(default=0, ge=0)
    inbox_retention_days: float = Field(default=30, gt=0)
    replay_horizon_days: float = Field(default=14, ge=0)
    idempotency_days: float = Field(default=7, gt=0)
    log_retention_days: float = Field(default=7, ge=0)
    log_group_days: float = Field(default=30, gt=0)
    worker_prefetch: int = Field(default=_PREFETCH, ge=1)
    worker_concurrency: int = Field(default_factory=partial(_fitting_the_prefetch, 16), ge=1)
    worker_batch: int = Field(default_factory=partial(_fitting_the_prefetch, 50), ge=2, le=1_000)
    drain_limit_s: float = Field(default=25.0, ge=0)
    max_event_depth: int = Field(default=16, ge=1)
    max_body_bytes: int = Field(default=10_000_000, ge=1)
    unknown_events: Literal["park", "ignore"] = "park"
    start: Literal["earliest", "latest"] = "earliest"
    health_port: int | None = Field(default=None, ge=0, le=65_535)
    health_host: str = "127.0.0.1"
    health_silence_s: float = Field(default=120.0, gt=0)

    def __init__(self, **values: Any) -> None:
        """
        Raises:
            SettingError: Of all values that do not fit, at once.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _setting_error(error) from None

    @field_validator("handlers", mode="before")
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return tuple(name.strip() for name in value.split(",") if name.strip())

    @property
    def lease(self) -> timedelta:
        return timedelta(seconds=self.lease_s)

    @property
    def publish_timeout(self) -> timedelta:
        return timedelta(seconds=self.publish_timeout_s)


def _setting_error(error: ValidationError) -> SettingError:
    faults = validation_faults(error.errors(include_url=False, include_input=False))
    names = ", ".join(path for path, _ in faults)
    reason = "; ".join(f"{path}: {text}" for path, text in faults)
    variables = ", ".join(f"{PREFIX}{path.upper()}" for path, _ in faults)
    return SettingError(names, reason, "correct it where it is set", where=f"bootstrap(settings=...) or {variables}")
