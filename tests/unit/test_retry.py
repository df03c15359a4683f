"""The arithmetic of trying again."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cqrs_decor.retry import RELAY_RETRY, WORKER_RETRY, Retry

SECOND = timedelta(seconds=1)
PLAIN = Retry(max_attempts=10, first_delay=SECOND, max_delay=10 * SECOND, factor=2, jitter=0)


@pytest.mark.parametrize(("attempt", "seconds"), [(1, 1), (2, 2), (3, 4), (4, 8), (5, 10), (6, 10), (10_000, 10)])
def test_each_wait_is_twice_the_one_before_up_to_the_limit(attempt: int, seconds: int) -> None:
    """Exponential, so that what is down gets room; limited, so that what is up again is seen."""
    assert PLAIN.delay(attempt) == timedelta(seconds=seconds)


@pytest.mark.parametrize(("chance", "seconds"), [(0.0, 4.0), (0.5, 3.0), (1.0, 2.0)])
def test_jitter_takes_a_share_of_the_wait(chance: float, seconds: float) -> None:
    """A thousand workers that failed together must not come back together."""
    policy = Retry(first_delay=SECOND, max_delay=10 * SECOND, factor=2, jitter=0.5)

    assert policy.delay(3, lambda: chance) == timedelta(seconds=seconds)


@given(
    attempt=st.integers(1, 1_000_000),
    first=st.integers(0, 10_000),
    more=st.integers(0, 10_000),
    factor=st.floats(1, 10),
    jitter=st.floats(0, 1),
    chance=st.floats(0, 1, exclude_max=True),
)
def test_a_wait_is_never_negative_and_never_over_the_limit(
    attempt: int, first: int, more: int, factor: float, jitter: float, chance: float
) -> None:
    """Also for the millionth attempt, where the power itself would overflow."""
    limit = timedelta(milliseconds=first + more)
    policy = Retry(first_delay=timedelta(milliseconds=first), max_delay=limit, factor=factor, jitter=jitter)

    assert timedelta(0) <= policy.delay(attempt, lambda: chance) <= limit


def test_the_first_time_counts_as_an_attempt() -> None:
    """`max_attempts=1` means: never again."""
    assert not Retry(max_attempts=1).allows(ValueError(), 1)
    assert [Retry(max_attempts=3).allows(ValueError(), attempt) for attempt in (1, 2, 3, 4)] == [
        True,
        True,
        False,
        False,
    ]


def test_only_what_is_named_is_tried_again() -> None:
    """A bug does not go away by waiting."""
    policy = Retry(on=(ConnectionError, TimeoutError))

    assert policy.allows(ConnectionResetError(), 1)
    assert policy.allows(TimeoutError(), 1)
    assert not policy.allows(ValueError(), 1)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit()])
def test_the_end_of_the_process_is_never_tried_again(error: BaseException) -> None:
    """Retrying it would hang a shutdown."""
    assert not Retry().allows(error, 1)


def test_all_faults_of_a_policy_are_named_at_once() -> None:
    """It is written once and read at start-up: one round of mending."""
    with pytest.raises(ValueError, match=r"^Retry\(\.\.\.\): ") as caught:
        Retry(max_attempts=0, first_delay=-SECOND, max_delay=-2 * SECOND, factor=0.5, jitter=2)

    assert str(caught.value).split(": ", 1)[1].split("; ") == [
        "max_attempts must be at least 1, not 0",
        "first_delay must not be negative",
        "max_delay must not be shorter than first_delay",
        "factor must be at least 1, not 0.5",
        "jitter must lie between 0 and 1, not 2",
    ]


@pytest.mark.parametrize("policy", [WORKER_RETRY, RELAY_RETRY])
def test_the_defaults_try_for_some_time_and_then_give_up(policy: Retry) -> None:
    """A short outage passes unnoticed; a broken message is parked while somebody is awake."""
    waits = sum((policy.delay(attempt, lambda: 0.0) for attempt in range(1, policy.max_attempts)), timedelta(0))

    assert 10 * SECOND < waits < 300 * SECOND
