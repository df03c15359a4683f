"""What can be set, in one place: by `bootstrap(settings=...)` or by environment variables `CQRS_DECOR_...`."""

from datetime import timedelta
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from cqrs_decor.errors import SettingError, validation_faults

PREFIX = "CQRS_DECOR_"


class Settings(BaseSettings):
    """All settings; units are in the names. No `.env` file is read.

    Attributes:
        broker: Broker URL.
        database: Database URL.
        service: Name of this service: consumer group, and source of its events. Never change it.
        handlers: Modules with handlers, separated by commas in the environment.
        app: Where the command line finds the app, `module:attribute`.
        lease_s: A relay holds its lanes so long without a sign of life.
        relay_batch: Records that a relay claims at once.
        poll_interval_s: A relay that nothing wakes looks for work this often.
        worker_concurrency: Keys that a worker handles at a time.
        worker_prefetch: Messages that a worker has in memory at most.
        drain_limit_s: A stop waits this long for work in flight.
        max_event_depth: Domain events may follow domain events this deep.
        max_body_bytes: A larger body is parked unread.
        unknown_events: What a worker does with an event on its topics whose class it does not know.
        start: Where a new consumer group begins.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    broker: str | None = Field(default=None, repr=False)
    database: str | None = Field(default=None, repr=False)
    service: str | None = None
    handlers: Annotated[tuple[str, ...], NoDecode] = ()
    app: str | None = None
    lease_s: float = Field(default=15.0, ge=1.0)
    relay_batch: int = Field(default=500, ge=1, le=10_000)
    poll_interval_s: float = Field(default=0.5, gt=0)
    worker_concurrency: int = Field(default=16, ge=1)
    worker_prefetch: int = Field(default=1_000, ge=1)
    drain_limit_s: float = Field(default=25.0, ge=0)
    max_event_depth: int = Field(default=16, ge=1)
    max_body_bytes: int = Field(default=10_000_000, ge=1)
    unknown_events: Literal["park", "ignore"] = "park"
    start: Literal["earliest", "latest"] = "earliest"

    def __init__(self, **values: Any) -> None:
        """
        Raises:
            SettingError: Of all values that do not fit, with the environment variable of the first.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _setting_error(error) from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What was given, then the environment; nothing else."""
        return (init_settings, env_settings)

    @field_validator("handlers", mode="before")
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return tuple(name.strip() for name in value.split(",") if name.strip())

    @property
    def lease(self) -> timedelta:
        return timedelta(seconds=self.lease_s)


def _setting_error(error: ValidationError) -> SettingError:
    faults = validation_faults(error.errors(include_url=False, include_input=False))
    names = ", ".join(path for path, _ in faults)
    reason = "; ".join(f"{path}: {text}" for path, text in faults)
    variables = ", ".join(f"{PREFIX}{path.upper()}" for path, _ in faults)
    return SettingError(names, reason, "correct it where it is set", where=f"bootstrap(settings=...) or {variables}")
