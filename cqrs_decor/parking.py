"""Keeps aside what a consumer cannot handle, and what comes after it in its key, until it is stored."""

import logging
from collections import deque
from collections.abc import Awaitable, Callable

from cqrs_decor.clock import Clock
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import CqrsDecorError, Park, RetryLater
from cqrs_decor.in_hand import Turn
from cqrs_decor.inbox import InboxStore, ParkedMessage
from cqrs_decor.observers import MessageConsumed, MessagesHeld, Observers
from cqrs_decor.patience import Patience

_logger = logging.getLogger(__name__)

_BEHIND = "stands behind an earlier message of its key"

_SHOWN = 1_000
"""So many of the last that were parked are kept in words, for whoever drains; all of them are in the store."""

_REMEMBERED = 10_000
"""So many keys at most are remembered as held back: what is forgotten is found out again, by one look more."""


class Parking:
    """Parks for all consumers of a worker.

    Args:
        inbox: Where it is kept.
        patience: Asks it until it answers.
        clock: Time.
        observers: Told of each outcome.
    """

    def __init__(self, inbox: InboxStore, patience: Patience, clock: Clock, observers: Observers) -> None:
        self.parked: deque[str] = deque(maxlen=_SHOWN)
        self._lines: set[tuple[str, str, str | None]] = set()
        self._inbox = inbox
        self._patience = patience
        self._clock = clock
        self._observers = observers

    async def park(self, turn: Turn, consumer: str, envelope: Envelope, error: Exception, attempts: int) -> bool:
        """Keep the message aside; repeated until it is stored, since the next step is to acknowledge it.

        Returns:
            Whether it is dealt with; False if it was given up first.
        """
        reason = described(error)
        kept = await self._keep(turn, self._inbox.park, self._message(consumer, envelope, reason, attempts))
        if kept is None:
            return False
        if kept:
            self.parked.append(f"{consumer}: {envelope.type} {envelope.id}: {reason}")
            facts = {"action": "message_parked", "consumer": consumer, "message_id": envelope.id}
            _logger.error(
                "parked a message: %s",
                type(error).__name__,
                extra={**facts, "topic": envelope.topic, "attempts": attempts},
            )
            self._remember(consumer, envelope)
        self._tell(consumer, envelope, "parked" if kept else "duplicate", attempts)
        return True

    def knows_as_behind(self, consumer: str, envelope: Envelope) -> bool:
        """Whether something of its key was kept aside here, so that it most likely stands behind that. An operator, or
        another worker, may have released the key meanwhile: `hold_back` knows.
        """
        return envelope.key is not None and (consumer, envelope.topic, envelope.key) in self._lines

    async def hold_back(self, turn: Turn, consumer: str, envelope: Envelope) -> bool:
        """Keep the message behind the parked one of its key; False if it is its turn after all, or it was given up."""
        kept = await self._keep(turn, self._inbox.hold_back, self._message(consumer, envelope, _BEHIND, 0))
        if not kept:
            self._lines.discard((consumer, envelope.topic, envelope.key))
            return False
        self._remember(consumer, envelope)
        facts = {"action": "message_held", "consumer": consumer, "message_id": envelope.id, "topic": envelope.topic}
        _logger.debug("kept a message behind a parked one of its key", extra=facts)
        self._observers.notice(MessagesHeld(consumer=consumer, count=1))
        self._tell(consumer, envelope, "held", 0)
        return True

    def _remember(self, consumer: str, envelope: Envelope) -> None:
        if len(self._lines) >= _REMEMBERED:
            self._lines.clear()
        self._lines.add((consumer, envelope.topic, envelope.key))

    async def _keep(
        self, turn: Turn, keep: Callable[[ParkedMessage], Awaitable[bool]], parked: ParkedMessage
    ) -> bool | None:
        return await self._patience.until_answered(lambda: keep(parked), lambda: turn.given_up)

    def _message(self, consumer: str, envelope: Envelope, reason: str, attempts: int) -> ParkedMessage:
        return ParkedMessage(
            consumer=consumer, envelope=envelope, error=reason, attempts=attempts, parked_at=self._clock.now()
        )

    def _tell(self, consumer: str, envelope: Envelope, outcome: str, attempts: int) -> None:
        self._observers.notice(
            MessageConsumed(consumer=consumer, message=envelope.type, outcome=outcome, attempts=attempts, seconds=0)
        )


def described(error: Exception) -> str:
    """Type and text of an error; of one that is not ours only the type, since its text may quote the payload."""
    if isinstance(error, CqrsDecorError):
        return f"{type(error).__name__} ({error.code}): {error.problem}"
    if isinstance(error, Park | RetryLater):
        return f"{type(error).__name__}: {error}"
    return type(error).__name__
