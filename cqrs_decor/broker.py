"""The broker seam: what carries envelopes between services, and what it promises.

A plugin implements `Broker` and its `Subscription`; `cqrs_decor.testing.conformance.BrokerConformance` holds it to the
contract that is written here.
"""

from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar, Literal, Protocol

from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import BrokerError, CqrsDecorError, WireError
from cqrs_decor.findings import Finding
from cqrs_decor.observers import Observers

Start = Literal["earliest", "latest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a broker can do, declared once on its class; docs, `doctor` and the conformance tests read the same card.

    Attributes:
        durable: What is acknowledged outlives the broker's process.
        ordered_by_key: Messages of one (topic, key) are delivered in the order in which they were published.
        replayable: A new group can read what was published before it was there.
        shared: Several processes can use it at once.
        creates_topics: A topic is there as soon as it is published to.
        crash_may_lose: In words, what a crash of a part may lose; "nothing" where it may not.
        crash_may_repeat: In words, what may be delivered twice after a crash.
        crash_may_reorder: In words, what may arrive out of order after a crash.
    """

    durable: bool
    ordered_by_key: bool
    replayable: bool
    shared: bool
    creates_topics: bool
    crash_may_lose: str
    crash_may_repeat: str
    crash_may_reorder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """An ordered part of a topic as the broker sees it; `epoch` tells one assignment to this reader from the next."""

    topic: str
    number: int
    epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One message as it came in.

    Attributes:
        partition: Where it was read.
        position: Rises within the partition, not necessarily by one.
        content: The envelope; or, for what cannot be read as one, the reason (the raw body is in `raw`).
        raw: The body as it came.
        key: The broker's own key, for keeping the order of what cannot be read.
    """

    partition: Partition
    position: int
    content: Envelope | WireError
    raw: bytes
    key: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicPlan:
    """A topic that the app needs, for `topics plan` and `topics create`.

    Attributes:
        compacted: Its events carry state: the newest of each key is kept for ever.
        remembered: For so long a consumer of this app knows which messages it has had; None where none reads it.
    """

    name: str
    compacted: bool = False
    remembered: timedelta | None = None


Revoked = Callable[[Collection[Partition]], Awaitable[None]]
"""Called by the subscription before it gives partitions away: finish or drop what came from them, then return."""


class Subscription(Protocol):
    """One reader of a consumer group. Used by one worker task at a time; `ack` may be called while `receive` waits."""

    async def receive(self, limit: int, wait: timedelta, *, paused: Collection[Partition] = ()) -> Sequence[Delivery]:
        """Up to `limit` next messages, in order within each partition; waits up to `wait` for the first, then returns.

        Partitions that are `paused` are left out this time; they stay with this reader. Nothing is delivered twice to
        one reader unless its partition was taken away in between. When the worker is full it stops calling for a while:
        staying a member of the group meanwhile is the subscription's job.

        Raises:
            BrokerUnavailableError: Lost the broker; calling again is safe and reconnects.
        """
        ...

    async def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Record that the group has these and everything before them: each partition's form a contiguous prefix.

        What belongs to an epoch that has passed is left out in silence: its new owner decides.

        Raises:
            BrokerUnavailableError: Nothing may have been recorded; acknowledging again is safe.
        """
        ...

    async def backlog(self) -> int:
        """How many messages are published for this group and not yet delivered to this reader."""
        ...


class Broker(Protocol):
    """Carries envelopes. Opened once by the app, then used concurrently by relay and worker."""

    capabilities: ClassVar[Capabilities]
    name: str
    """How texts call it: a URL without secrets."""
    observers: Observers
    """Told of offset resets; the app sets it before `open`."""

    async def open(self) -> None:
        """Connect.

        Raises:
            BrokerUnavailableError: Cannot be reached; opening again is safe.
            BrokerAccessError: Reached, and refused.
            BrokerVersionError: Reached, and cannot be spoken to.
        """
        ...

    async def close(self) -> None:
        """Flush nothing, give everything back; safe to call twice and after a failed `open`. It may be opened again."""
        ...

    async def publish(self, envelopes: Sequence[Envelope]) -> Sequence[BrokerError | None]:
        """Publish a batch, pipelined; one outcome per envelope, in order: None once the broker has it for good.

        Order is kept per (topic, key): when one envelope is refused, no later one of its topic and key in this batch
        reaches the broker (its outcome is an error as well). Called by one task at a time. Cancelled, it sends nothing
        more; what was sent may still arrive, in order, so the caller repeats the whole batch.

        Raises:
            BrokerUnavailableError: Some may have arrived and some not; the caller repeats the whole batch.
        """
        ...

    def subscribe(
        self, group: str, topics: Sequence[str], *, start: Start = "earliest", on_revoked: Revoked | None = None
    ) -> AbstractAsyncContextManager[Subscription]:
        """Join a consumer group. Leaving the block leaves the group without waiting for work in flight.

        Args:
            group: Its members share the messages; each group gets all of them.
            topics: What to read.
            start: Where a group begins that has never acknowledged anything.
            on_revoked: Called before partitions go to another member.

        Raises:
            BrokerUnavailableError: Entering failed; entering again is safe.
            TopicMissingError: A topic is not there, and this broker does not make them by itself.
        """
        ...

    async def check(self, topics: Sequence[TopicPlan]) -> Sequence[Finding]:
        """What `doctor` wants to know: reachable, permitted, topics there. Never raises for what it finds."""
        ...

    async def missing_topics(self, topics: Sequence[TopicPlan]) -> Sequence[TopicPlan]:
        """Those that would have to be made."""
        ...

    async def create_topics(self, topics: Sequence[TopicPlan]) -> None:
        """Make them; those that are there already are left as they are."""
        ...


def worth_retrying(error: CqrsDecorError) -> bool:
    """Whether the same record may pass the next time: everything but a record that is too large for the broker."""
    return error.code != "CD505"
