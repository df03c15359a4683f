"""How often and how soon to try again: a policy and its arithmetic, no waiting."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Try a handler again after a failure, with exponential back-off and jitter.

    Args:
        max_attempts: How often the handler runs at most, the first time included.
        on: Which exceptions are worth another try. Every `Exception` unless given; never a validation error and
            never `Park`, which say that another try cannot help.
        first_delay: The wait after the first failure.
        max_delay: No wait is longer than this.
        factor: Each wait is this many times the one before.
        jitter: The share of a wait that is left to chance, from 0 (none) to 1 (all of it).

    Source: exponential back-off with jitter (Brooker, "Exponential Backoff And Jitter", AWS 2015).
    """

    max_attempts: int = 5
    on: tuple[type[Exception], ...] = (Exception,)
    first_delay: timedelta = timedelta(milliseconds=100)
    max_delay: timedelta = timedelta(seconds=60)
    factor: float = 2.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        faults = [
            text
            for wrong, text in (
                (self.max_attempts < 1, f"max_attempts must be at least 1, not {self.max_attempts}"),
                (self.first_delay < timedelta(0), "first_delay must not be negative"),
                (self.max_delay < self.first_delay, "max_delay must not be shorter than first_delay"),
                (self.factor < 1, f"factor must be at least 1, not {self.factor}"),
                (not 0 <= self.jitter <= 1, f"jitter must lie between 0 and 1, not {self.jitter}"),
            )
            if wrong
        ]
        if faults:
            raise ValueError(f"Retry(...): {'; '.join(faults)}")

    def delay(self, attempt: int, chance: Callable[[], float] = random.random) -> timedelta:
        """The wait after failed attempt number `attempt` (1 for the first)."""
        exponent = min(attempt - 1, 64)
        full = min(self.first_delay.total_seconds() * self.factor**exponent, self.max_delay.total_seconds())
        return timedelta(seconds=full * (1 - self.jitter * chance()))

    def allows(self, error: BaseException, attempt: int) -> bool:
        """Whether the handler runs again after `error` ended attempt number `attempt`."""
        return attempt < self.max_attempts and isinstance(error, self.on)


WORKER_RETRY = Retry(max_attempts=8, first_delay=timedelta(milliseconds=200), max_delay=timedelta(seconds=30))
"""What a consumer does unless it says otherwise: about a minute of tries, then parked."""

RELAY_RETRY = Retry(max_attempts=8, first_delay=timedelta(milliseconds=200), max_delay=timedelta(seconds=60))
"""What the relay does with a record that the broker refuses, before it parks it."""
