"""Runs a command or query again after a failure that another try may mend, each time in a fresh transaction."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from pydantic import ValidationError

from cqrs_decor.context import MessageContext
from cqrs_decor.dispatch import Next
from cqrs_decor.errors import (
    CommitOutcomeUnknownError,
    DefinitionError,
    MessageValidationError,
    Park,
    RetryLater,
    UnitOfWorkError,
    WireError,
)
from cqrs_decor.pipeline import Handling
from cqrs_decor.retry import Retry

TRANSIENT_RETRY = Retry(max_attempts=4, first_delay=timedelta(milliseconds=20), max_delay=timedelta(seconds=1))
"""What a command does when the store says that running the same transaction again may pass."""

_HOPELESS = (
    CommitOutcomeUnknownError,
    DefinitionError,
    MessageValidationError,
    Park,
    UnitOfWorkError,
    ValidationError,
    WireError,
)


def is_hopeless(error: BaseException) -> bool:
    """Whether another try cannot help, or would not be safe (a commit whose outcome is unknown)."""
    return isinstance(error, _HOPELESS)


class RetriesStage:
    """Consumers are retried by the worker instead, which gives the place to another key while one waits."""

    name = "retries"

    def __init__(self, is_transient: Callable[[BaseException], bool]) -> None:
        self._is_transient = is_transient

    def wrap(self, handling: Handling, call_next: Next) -> Next:
        policy = handling.spec.options.retry
        if handling.joined or handling.consumed:
            return call_next
        if policy is None and not (handling.uses_resources or handling.keyed):
            return call_next
        import stamina  # slow to import, and needed only where something is retried

        limit = (policy or TRANSIENT_RETRY).max_attempts

        async def run(message: Any, context: MessageContext) -> Any:
            again = self._backoff(policy, context)
            async for attempt in stamina.retry_context(on=again, attempts=limit, timeout=None):
                with attempt:
                    context.begin_attempt(attempt.num)
                    return await call_next(message, context)
            return None

        return run

    def _backoff(self, policy: Retry | None, context: MessageContext) -> Callable[[Exception], timedelta | bool]:
        """What stamina asks after a failure: the wait before the next attempt, or False to give up."""

        def backoff(error: Exception) -> timedelta | bool:
            if is_hopeless(error):
                return False
            if isinstance(error, RetryLater):
                return error.delay
            if policy is not None and policy.allows(error, context.attempt):
                return policy.delay(context.attempt)
            return TRANSIENT_RETRY.delay(context.attempt) if self._is_transient(error) else False

        return backoff
