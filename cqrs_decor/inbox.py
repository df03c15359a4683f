"""The inbox: which consumer has had which message, and what was parked.

A consumer's row, its business rows and its own outbox rows are one transaction: that makes an effect happen once
although delivery is at least once (idempotent receiver, Hohpe & Woolf 2003).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Protocol

from cqrs_decor.context import MessageContext
from cqrs_decor.dispatch import Next
from cqrs_decor.envelope import Envelope
from cqrs_decor.pipeline import Handling
from cqrs_decor.unit_of_work import Transaction

DUPLICATE: Final = object()
"""What a consumer's chain returns when the consumer had the message before: nothing was run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParkedMessage:
    """A message that one consumer could not handle, kept whole until an operator decides.

    Attributes:
        id: Given by the store; 0 before.
        consumer: Service and handler name; the service alone where the message could not even be read.
        envelope: What came in; for what could not be read, whatever of it could.
        error: Type and text of the reason, without payload.
        attempts: How often the handler ran.
        retry_requested: An operator wants it tried again; the consumer's worker will.
    """

    id: int = 0
    consumer: str
    envelope: Envelope
    error: str
    attempts: int
    parked_at: datetime
    retry_requested: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class InboxFilter:
    """Which parked messages an operator means; what is not given does not narrow."""

    ids: Collection[int] = ()
    consumer: str | None = None
    topic: str | None = None
    key: str | None = None
    limit: int = 100


class InboxStore(Protocol):
    """Keeps inbox rows and parked messages. All raise StoreUnavailableError while the database is away."""

    async def record(self, transaction: Transaction, consumer: str, envelope: Envelope) -> bool:
        """Note in this transaction that the consumer has the message (consumer, source, id); False if it had it before.

        While another transaction that noted the same is open, this waits for its end: the copy never runs beside.
        """
        ...

    async def park(self, parked: ParkedMessage) -> None:
        """Keep a message aside, in a transaction of its own.

        Parking one (consumer, source, id) again replaces error and count and takes back the wish for a retry; id and
        place stay.
        """
        ...

    async def unpark(self, transaction: Transaction, parked_id: int) -> bool:
        """Take a parked message out in this transaction; False if somebody else did."""
        ...

    async def retries(self, consumers: Collection[str], limit: int) -> Sequence[ParkedMessage]:
        """Parked messages of these consumers that an operator wants retried, oldest first."""
        ...

    async def find(self, wanted: InboxFilter) -> Sequence[ParkedMessage]:
        """Parked messages, oldest first."""
        ...

    async def parked_count(self) -> int: ...

    async def retry(self, ids: Collection[int], *, who: str) -> int:
        """Ask for another try; the worker of that consumer carries it out. Idempotent, recorded.

        Returns:
            How many were not asked for already.
        """
        ...

    async def discard(self, ids: Collection[int], *, who: str) -> int:
        """Give parked messages up; returns how many. Idempotent, recorded."""
        ...


class InboxStage:
    """Lets a consumer have each message once: its inbox row is written first, in the handler's own transaction."""

    name = "inbox"

    def __init__(self, inbox: InboxStore) -> None:
        self._inbox = inbox

    def wrap(self, handling: Handling, call_next: Next) -> Next:
        if not handling.consumed:
            return call_next
        inbox = self._inbox

        async def run(message: Any, context: MessageContext) -> Any:
            transaction = await context.unit_of_work.open()
            consumer, envelope = context.origin.consumer, context.envelope
            if consumer is None or envelope is None:  # a consumed message always has both: the worker made its context
                raise AssertionError("an inbox without a consumer or an envelope")
            parked_id = context.kept.parked_id
            if parked_id is not None and not await inbox.unpark(transaction, parked_id):
                return DUPLICATE
            if not await inbox.record(transaction, consumer, envelope):
                return DUPLICATE
            return await call_next(message, context)

        return run
