"""Brings a message to an outcome on record with each of its consumers: done, had before, held back, or parked."""

import logging
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import anyio

from cqrs_decor._loop import Outage
from cqrs_decor.clock import Clock
from cqrs_decor.context import MessageContext, current_context
from cqrs_decor.crash_points import reach
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import RetryLater
from cqrs_decor.in_hand import Turn
from cqrs_decor.inbox import BEHIND, DUPLICATE
from cqrs_decor.observers import MessageConsumed, Observers
from cqrs_decor.parking import Parking
from cqrs_decor.patience import Patience
from cqrs_decor.pipeline import Plan
from cqrs_decor.places import Places
from cqrs_decor.reading import Read
from cqrs_decor.retry import WORKER_RETRY, Retry
from cqrs_decor.stages.retries import TRANSIENT_RETRY, is_hopeless
from cqrs_decor.store import Store

_logger = logging.getLogger(__name__)

_CONFLICTS = 50
"""So often a message may lose a race in the database (deadlock, busy) before it counts as a failure of its handler."""


@dataclass(slots=True)
class _Tries:
    """How often one consumer has run for one message, and how often the database made it start over."""

    attempts: int = 0
    conflicts: int = 0
    survived: bool = False


class Consuming:
    """Runs consumers, one transaction for each message.

    Args:
        store: Inbox and transactions.
        places: Where attempts run.
        parking: Keeps what cannot be handled.
        patience: Knows an outage of the store.
        outage: Waits while the store is away.
        clock: Time.
        observers: Told of each outcome.
    """

    def __init__(
        self,
        store: Store,
        places: Places,
        parking: Parking,
        patience: Patience,
        outage: Outage,
        clock: Clock,
        observers: Observers,
    ) -> None:
        self.handled = 0
        self._store = store
        self._places = places
        self._parking = parking
        self._patience = patience
        self._outage = outage
        self._clock = clock
        self._observers = observers

    async def by_all(self, turn: Turn, read: Read) -> bool:
        """Each handler is a consumer of its own: one that fails does not hold up the others.

        Returns:
            Whether all have their outcome; False if the message was given up first.
        """
        if len(read.plans) == 1:
            return await self.by_one(turn, read.plans[0], read)
        outcomes: list[bool] = []

        async def consume(plan: Plan) -> None:
            outcomes.append(await self.by_one(turn, plan, read))

        async with anyio.create_task_group() as tasks:
            for plan in read.plans:
                tasks.start_soon(consume, plan)
        return all(outcomes)

    async def by_one(self, turn: Turn, plan: Plan, read: Read, parked_id: int | None = None) -> bool:
        """Run one consumer until it is done or the message is parked; False if it was given up first.

        Waiting for the next attempt holds no place.

        Args:
            turn: The message's time here.
            plan: The consumer.
            read: The message.
            parked_id: It is parked already, and is taken out with its success.
        """
        began = self._clock.elapsed()
        consumer, envelope = plan.origin.consumer or "", read.envelope
        tries = _Tries()
        if parked_id is None and await self._is_put_behind(turn, consumer, envelope):
            self._survived(turn, tries)
            return True
        while not turn.given_up:
            await self._outage.in_turn(lambda: turn.given_up)
            if turn.given_up:
                break
            tries.attempts += 1
            try:
                async with self._places.one if turn.place is None else turn.place():
                    result = await self._attempt(plan, read, tries.attempts, parked_id)
            except Exception as error:  # whatever a handler raises is judged by its policy, none is dropped
                if not self._is_no_try(error):
                    self._survived(turn, tries)
                if not await self._wait_for_next(turn, plan, envelope, error, tries):
                    return await self._parking.park(turn, consumer, envelope, error, tries.attempts)
            else:
                self._survived(turn, tries)
                self._outage.over()
                if result is not BEHIND:
                    self.tell(plan, envelope, "duplicate" if result is DUPLICATE else "done", tries.attempts, began)
                    return True
                if await self._parking.hold_back(turn, consumer, envelope):
                    return True
                tries.attempts -= 1  # it did not run; by now it is its turn
        return False

    async def _is_put_behind(self, turn: Turn, consumer: str, envelope: Envelope) -> bool:
        """Whether it was kept behind a parked message of its key, without a transaction begun to find that out: a key
        that goes on sending would slow down all that is healthy.
        """
        if turn.place is not None or not self._parking.knows_as_behind(consumer, envelope):
            return False
        return await self._parking.hold_back(turn, consumer, envelope)

    def _is_no_try(self, error: Exception) -> bool:
        """The handler may not even have been reached: nothing is known of what it does to the process."""
        return self._patience.is_outage(error) or self._store.is_transient(error)

    def tell(self, plan: Plan, envelope: Envelope, outcome: str, attempts: int, began: float) -> None:
        """Count an outcome, and let it be seen."""
        self.handled += outcome == "done"
        if self._observers:
            self._observers.notice(
                MessageConsumed(
                    consumer=plan.origin.consumer or "",
                    message=envelope.type,
                    outcome=outcome,
                    attempts=attempts,
                    seconds=self._clock.elapsed() - began,
                )
            )

    def _survived(self, turn: Turn, tries: _Tries) -> None:
        if not tries.survived:
            tries.survived = True
            turn.survived()

    async def _attempt(self, plan: Plan, read: Read, attempt: int, parked_id: int | None) -> Any:
        context = MessageContext.of(read.message, plan.origin, envelope=read.envelope)
        context.kept.attempt = attempt
        context.kept.parked_id = parked_id
        token = current_context.set(context)
        try:
            result = await plan.own(read.message, context)
            reach("worker.committed")
            return result
        finally:
            context.close()
            current_context.reset(token)

    async def _wait_for_next(self, turn: Turn, plan: Plan, envelope: Envelope, error: Exception, tries: _Tries) -> bool:
        """Wait before the next attempt; False when there is none. An outage or a lost race for a row is no attempt."""
        if self._patience.is_outage(error):
            tries.attempts -= 1
            self._outage.begin(error)
            return True
        if self._store.is_transient(error) and tries.conflicts < _CONFLICTS:
            tries.attempts -= 1
            tries.conflicts += 1
            await turn.nap(self._clock, TRANSIENT_RETRY.delay(tries.conflicts).total_seconds())
            return True
        delay = _delay(plan.spec.options.retry or WORKER_RETRY, error, tries.attempts)
        if delay is None:
            return False
        _tell_of_retry(plan, envelope, error, tries.attempts, delay)
        await turn.nap(self._clock, delay.total_seconds())
        return True


def _delay(policy: Retry, error: Exception, attempt: int) -> timedelta | None:
    """The wait before the next attempt, or None when the message is to be parked."""
    if isinstance(error, RetryLater):
        return error.delay if attempt < policy.max_attempts else None
    if is_hopeless(error) or not policy.allows(error, attempt):
        return None
    return policy.delay(attempt)


def _tell_of_retry(plan: Plan, envelope: Envelope, error: Exception, attempt: int, delay: timedelta) -> None:
    _logger.warning(
        "a consumer failed and will try again: %s",
        type(error).__name__,
        extra={
            "action": "consumer_retry",
            "consumer": plan.origin.consumer,
            "message_id": envelope.id,
            "attempt": attempt,
            "delay_s": delay.total_seconds(),
        },
    )
