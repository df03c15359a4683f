"""The inbox: which consumer has had which message, and what was parked.

A consumer's row, its business rows and its own outbox rows are one transaction: that is what makes an effect happen once
although delivery is at least once (idempotent receiver, Hohpe & Woolf 2003).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from cqrs_decor.envelope import Envelope
from cqrs_decor.unit_of_work import Transaction


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
        """Note in this transaction that the consumer has the message (by consumer, source, id); False if it had it before.

        While another transaction that noted the same is open, this waits for its end: the copy never runs beside.
        """
        ...

    async def park(self, parked: ParkedMessage) -> None:
        """Keep a message aside, in a transaction of its own. Parking one (consumer, source, id) again replaces error and count."""
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
        """Ask for another try; the worker of that consumer carries it out. Returns how many. Idempotent, recorded."""
        ...

    async def discard(self, ids: Collection[int], *, who: str) -> int:
        """Give parked messages up; returns how many. Idempotent, recorded."""
        ...
