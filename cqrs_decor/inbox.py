"""The inbox: which consumer has had which message, and what was parked.

A consumer's row, its business rows and its own outbox rows are one transaction: that makes an effect happen once
although delivery is at least once (idempotent receiver, Hohpe & Woolf 2003).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum
from typing import Any, Final, Protocol

from cqrs_decor.context import MessageContext
from cqrs_decor.dispatch import Next
from cqrs_decor.envelope import Envelope
from cqrs_decor.pipeline import Handling
from cqrs_decor.unit_of_work import Transaction

DUPLICATE: Final = object()
"""What a consumer's chain returns when the consumer had the message before: nothing was run."""

BEHIND: Final = object()
"""What a consumer's chain returns when the key of the message is held: nothing was run, and nothing was noted."""


class Noted(Enum):
    """What an inbox says to a message.

    NEW: The consumer has it from now on, if the transaction commits.
    HAD: It had it before, or the message is parked for it.
    HELD: An earlier message of its key is parked for this consumer; nothing was noted.
    """

    NEW = "new"
    HAD = "had"
    HELD = "held"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What a worker may have in hand of one partition, committed before it dispatches any of it.

    Attributes:
        until: It has no message with a higher position in hand.
        suspect: The one message that it has in hand, where it goes in single steps after a crash.
        crashes: How many workers vanished with which message as their suspect, by position: of those that no worker has
            outlived yet.
    """

    topic: str
    partition: int
    until: int
    suspect: int | None = None
    crashes: Mapping[int, int] = field(default_factory=dict[int, int])


@dataclass(frozen=True, slots=True, kw_only=True)
class ParkedMessage:
    """A message that one consumer could not handle, kept whole until an operator decides.

    Attributes:
        id: Given by the store; 0 before.
        consumer: Service and handler name; the service alone where the type of the message is unknown, so that nobody
            can say whose it is.
        envelope: What came in; for what could not be read, whatever of it could.
        error: Type and text of the reason, without payload.
        attempts: How often the handler ran.
        retry_requested: An operator wants it tried again, or the one before it in its key has been dealt with; a worker
            of the consumer will.
        held: It did not fail: it stands behind a parked message of its key.
        retries: How often operators have asked for another try already.
    """

    id: int = 0
    consumer: str
    envelope: Envelope
    error: str
    attempts: int
    parked_at: datetime
    retry_requested: bool = False
    held: bool = False
    retries: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class InboxFilter:
    """Which parked messages an operator means; what is not given does not narrow.

    Attributes:
        error: Part of the error's text.
        older_than: Parked longer ago than this, by the database's clock.
        held: Only those that stand behind another (True), or only those that failed (False).
        after: Only messages with a higher id: where the page before ended.
    """

    ids: Collection[int] = ()
    consumer: str | None = None
    topic: str | None = None
    key: str | None = None
    error: str | None = None
    older_than: timedelta | None = None
    held: bool | None = None
    after: int = 0
    limit: int = 100


NOBODY: Final = ""
"""Owner of a mark that only tells of crashes: its worker took it off."""


class InboxStore(Protocol):
    """Keeps inbox rows and parked messages. All raise StoreUnavailableError while the database is away.

    Per consumer, the messages of a (topic, key) are dealt with in order: once one is parked, its key is held, and what
    comes later is kept behind it until it has been retried with success or discarded.
    """

    async def record(self, transaction: Transaction, consumer: str, envelope: Envelope) -> Noted:
        """Note in this transaction that the consumer has the message (consumer, source, id), unless it had it before or
        its key is held.

        While another transaction that noted the same is open, this waits for its end: the copy never runs beside.
        """
        ...

    async def record_all(
        self, transaction: Transaction, consumer: str, envelopes: Sequence[Envelope]
    ) -> Sequence[Noted]:
        """`record` for many at once, one answer for each, in order; a message that is in it twice is new once.

        They are locked in the order of (source, id), so that two batches never wait for each other in a circle.
        """
        ...

    async def park(self, parked: ParkedMessage) -> bool:
        """Keep a message aside, hold its key, and note that the consumer has it, in a transaction of its own.

        Parking one (consumer, source, id) again replaces error and count and takes back the wish for a retry; id and
        place stay, and it is held no longer. False, and nothing is kept, if the consumer has had it with success
        meanwhile. Waits for the end of a transaction that has noted the same, or takes one of its key out.
        """
        ...

    async def hold_back(self, parked: ParkedMessage) -> bool:
        """Keep a message behind the parked ones of its key, and note that the consumer has it.

        False, and nothing is kept, if the key is held no longer, or the consumer has the message meanwhile: then it is
        to be recorded again. Waits for the end of a transaction that takes one of its key out.
        """
        ...

    async def unpark(self, transaction: Transaction, parked_id: int) -> bool:
        """Take a parked message out in this transaction; False if somebody else did. That the consumer has it stays
        noted. The next one behind it is asked for, and is held no longer; with the last one its key is held no longer.

        While another transaction that takes one of the same key out is open, this waits for its end.
        """
        ...

    async def retries(self, consumers: Collection[str], limit: int) -> Sequence[ParkedMessage]:
        """Parked messages of these consumers that are to be tried again, oldest first: of each key only the first."""
        ...

    async def mark(self, group: str, owner: str, marks: Collection[Mark]) -> None:
        """Note what this worker may have in hand of each of these partitions; replaces what was noted for them."""
        ...

    async def take_marks(self, group: str, owner: str, partitions: Collection[tuple[str, int]]) -> Sequence[Mark]:
        """What the last reader of these (topic, number) left noted: it vanished with that in hand. Those that it took
        off, or that the owner itself noted, are left out. What is found stays noted until `mark` replaces it.
        """
        ...

    async def unmark(self, group: str, owner: str, partitions: Collection[tuple[str, int]]) -> None:
        """Take this worker's marks off: it has nothing more of these in hand, or a stop or an outage came between.

        What is known of crashes is no worker's own: it stays, without a suspect, for whoever takes the marks next.
        """
        ...

    async def find(self, wanted: InboxFilter) -> Sequence[ParkedMessage]:
        """Parked messages, oldest first."""
        ...

    async def parked_count(self) -> int: ...

    async def retry(self, ids: Collection[int], *, who: str) -> int:
        """Ask for another try; a worker of that consumer carries it out. Idempotent, recorded.

        One that is held is left alone: it follows by itself.

        Returns:
            How many were not asked for already.
        """
        ...

    async def discard(self, ids: Collection[int], *, who: str) -> int:
        """Give parked messages up; returns how many. Idempotent, recorded.

        That the consumer has them stays noted. Where the first of its key is given up, the next one behind it is asked
        for; with the last one its key is held no longer.
        """
        ...


_NOT_RUN: Final = {Noted.HAD: DUPLICATE, Noted.HELD: BEHIND}


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
            if parked_id is not None:  # it was noted when it was parked
                return await call_next(message, context) if await inbox.unpark(transaction, parked_id) else DUPLICATE
            noted = await inbox.record(transaction, consumer, envelope)
            return await call_next(message, context) if noted is Noted.NEW else _NOT_RUN[noted]

        return run
