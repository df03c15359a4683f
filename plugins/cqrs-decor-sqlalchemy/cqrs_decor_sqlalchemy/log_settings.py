"""What can be set about the log as a broker, and where it comes from: code, URL, environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from difflib import get_close_matches
from math import isfinite

from cqrs_decor.errors import SettingError

ENVIRONMENT_PREFIX = "CQRS_DECOR_LOG_"
_URL_PREFIX = "log_"
_UNITS = {
    "poll_s": "poll",
    "idle_poll_s": "idle_poll",
    "lease_s": "lease",
    "beat_s": "beat",
    "revoke_limit_s": "revoke_limit",
    "max_bytes": "max_bytes",
}
"""Options by name, with the unit in it, and the attribute that each sets."""


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

    @classmethod
    def read(cls, given: Mapping[str, str]) -> "LogSettings":
        """Take the options that are given, then `CQRS_DECOR_LOG_*`, then the defaults.

        Args:
            given: By name with unit: poll_s, idle_poll_s, lease_s, beat_s, revoke_limit_s, max_bytes.

        Raises:
            SettingError: With everything that is wrong.
        """
        known = {name: os.environ[ENVIRONMENT_PREFIX + name.upper()] for name in _UNITS if _in_environment(name)}
        faults = [f"there is no option {_URL_PREFIX}{name}{_near(name)}" for name in given if name not in _UNITS]
        values: dict[str, timedelta | int] = {}
        for name, text in {**known, **{name: text for name, text in given.items() if name in _UNITS}}.items():
            value = _value(name, text)
            if value is None:
                faults.append(f"{name} must be a number, not {text!r}")
            else:
                values[_UNITS[name]] = value
        if faults:
            fix = (
                f"mend it in the broker's URL ({_URL_PREFIX}lease_s=10) or in {ENVIRONMENT_PREFIX}LEASE_S and the like"
            )
            raise SettingError("LogSettings", "; ".join(faults), fix)
        return cls(**values)  # type: ignore[arg-type]  # each has the type of its attribute: see _value

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


def log_options(url: str) -> tuple[str, dict[str, str]]:
    """A broker's URL without the settings of the log in its query, which no driver knows; and those settings."""
    address, _, query = url.partition("?")
    parts = [part for part in query.split("&") if part]
    ours = [part.removeprefix(_URL_PREFIX).partition("=") for part in parts if part.startswith(_URL_PREFIX)]
    others = "&".join(part for part in parts if not part.startswith(_URL_PREFIX))
    return f"{address}?{others}" if others else address, {name: value for name, _, value in ours}


def _in_environment(name: str) -> bool:
    return ENVIRONMENT_PREFIX + name.upper() in os.environ


def _value(name: str, text: str) -> timedelta | int | None:
    try:
        if not name.endswith("_s"):
            return int(text)
        seconds = float(text)
    except ValueError:
        return None
    return timedelta(seconds=seconds) if isfinite(seconds) else None


def _near(name: str) -> str:
    close = get_close_matches(name, _UNITS, n=1)
    return f", did you mean {_URL_PREFIX}{close[0]}?" if close else ""
