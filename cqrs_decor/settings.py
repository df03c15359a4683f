"""What can be set, in one place: by `bootstrap(settings=...)`, and what is not given there by the environment."""

from datetime import timedelta
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from cqrs_decor.errors import SettingError, validation_faults

PREFIX = "CQRS_DECOR_"

_PUBLISHABLE = 0.7
"""The share of a lease in which a relay publishes."""

_USUAL = 0.6
"""The share of a lease that a broker has for a batch, unless more is asked for."""


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
        publish_timeout_s: What a broker may take for one batch before the relay calls it away: at most 70 % of the
            lease. Unless set, 9 s or 60 % of a lease that is shorter than 15 s.
        history_days: Delivered outbox records are kept so long; 0 keeps none.
        inbox_retention_days: So long the inbox remembers which message a consumer has had.
        replay_horizon_days: So old a message may be when it comes (again): what the broker keeps, or a restored backup.
        idempotency_days: So long the result of a command with an idempotency key is kept.
        log_retention_days: So long the database as broker keeps what every group has acknowledged.
        log_group_days: A group of that broker that nobody was in for so long is given up.
        worker_concurrency: Keys that a worker handles at a time; unless set, 1 on a database with one writer (SQLite).
        worker_prefetch: Messages that a worker has in memory at most.
        worker_batch: Messages of an optimistic batch at most.
        drain_limit_s: A stop waits this long for work in flight.
        max_event_depth: Domain events may follow domain events this deep.
        max_body_bytes: A larger body is parked unread.
        unknown_events: What a worker does with an event on its topics whose class it does not know.
        start: Where a new consumer group begins.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    broker: str | None = Field(default=None, repr=False)
    database: str | None = Field(default=None, repr=False)
    service: str | None = None
    handlers: tuple[str, ...] = ()
    app: str | None = None
    lease_s: float = Field(default=15.0, ge=1.0)
    relay_batch: int = Field(default=500, ge=1, le=10_000)
    poll_interval_s: float = Field(default=0.5, gt=0)
    publish_timeout_s: float = Field(default=9.0, gt=0)
    history_days: float = Field(default=0, ge=0)
    inbox_retention_days: float = Field(default=30, gt=0)
    replay_horizon_days: float = Field(default=14, ge=0)
    idempotency_days: float = Field(default=7, gt=0)
    log_retention_days: float = Field(default=7, ge=0)
    log_group_days: float = Field(default=30, gt=0)
    worker_concurrency: int = Field(default=16, ge=1)
    worker_prefetch: int = Field(default=1_000, ge=1)
    worker_batch: int = Field(default=50, ge=2, le=1_000)
    drain_limit_s: float = Field(default=25.0, ge=0)
    max_event_depth: int = Field(default=16, ge=1)
    max_body_bytes: int = Field(default=10_000_000, ge=1)
    unknown_events: Literal["park", "ignore"] = "park"
    start: Literal["earliest", "latest"] = "earliest"

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

    @field_validator("publish_timeout_s")
    @classmethod
    def _ends_before_the_lease(cls, value: float, info: ValidationInfo) -> float:
        """What a relay had in hand when its lease ended could land after the first records of its successor."""
        lease_s = info.data.get("lease_s")
        if lease_s is not None and value > lease_s * _PUBLISHABLE:
            raise PydanticCustomError(
                "beyond_the_lease",
                "must not be more than {limit} s, 70 % of the lease: the rest is for what still flies then",
                {"limit": f"{lease_s * _PUBLISHABLE:g}"},
            )
        return value

    @property
    def lease(self) -> timedelta:
        return timedelta(seconds=self.lease_s)

    @property
    def publish_timeout(self) -> timedelta:
        if "publish_timeout_s" in self.model_fields_set:
            return timedelta(seconds=self.publish_timeout_s)
        return timedelta(seconds=min(self.publish_timeout_s, self.lease_s * _USUAL))


def _setting_error(error: ValidationError) -> SettingError:
    faults = validation_faults(error.errors(include_url=False, include_input=False))
    names = ", ".join(path for path, _ in faults)
    reason = "; ".join(f"{path}: {text}" for path, text in faults)
    variables = ", ".join(f"{PREFIX}{path.upper()}" for path, _ in faults)
    return SettingError(names, reason, "correct it where it is set", where=f"bootstrap(settings=...) or {variables}")
