"""Outbox, inbox and unit of work in memory."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from cqrs_decor.broker import Broker
from cqrs_decor.clock import Clock, SystemClock
from cqrs_decor.envelope import Envelope
from cqrs_decor.findings import Finding
from cqrs_decor.idempotency import IdempotencyStore
from cqrs_decor.inbox import InboxStore
from cqrs_decor.memory.idempotency import MemoryIdempotency
from cqrs_decor.memory.inbox import MemoryInbox
from cqrs_decor.memory.outbox import MemoryOutbox
from cqrs_decor.memory.transaction import MemoryTransaction
from cqrs_decor.memory.urls import expect_memory_url
from cqrs_decor.outbox import (
    OutboxStore,
)
from cqrs_decor.store import Retention, SchemaAdmin, StoreCard


class MemoryStore:
    """Outbox and inbox in memory. It has no session: handlers that ask for one need a database."""

    card: ClassVar[StoreCard] = StoreCard(
        durable=False, shared=False, concurrent_writers=True, crash_may_lose="everything: it lives in the process"
    )
    resources: Mapping[type[Any], bool] = {}

    def __init__(self, *, clock: Clock | None = None) -> None:
        self.name = "memory://"
        self.schema: SchemaAdmin | None = None
        self.inbox: InboxStore = MemoryInbox(clock)
        self.idempotency: IdempotencyStore = MemoryIdempotency()
        self.outbox: OutboxStore
        self.outbox = self._outbox = MemoryOutbox(clock or SystemClock())

    @classmethod
    def from_url(cls, url: str) -> "MemoryStore":
        """A new and empty store, each time."""
        expect_memory_url("database", url)
        return cls()

    async def open(self) -> None:
        """Nothing to connect to."""

    async def close(self) -> None:
        """Keeps its records: another app may use the same object, and an app can be entered again."""

    async def begin(self, *, read_only: bool = False) -> "MemoryTransaction":
        return MemoryTransaction(self._outbox)

    def join(self, session: object) -> "MemoryTransaction":
        """The nearest thing to a session of the caller's is a transaction that they began here."""
        if not isinstance(session, MemoryTransaction):
            raise TypeError(f"{session!r} is no transaction of the store in memory, which has no sessions")
        return session

    def add(self, session: object, envelopes: Sequence[Envelope]) -> None:
        self.join(session).add(envelopes)

    def is_transient(self, error: BaseException) -> bool:
        return False

    def is_unavailable(self, error: BaseException) -> bool:
        return False

    def log_broker(self) -> Broker | None:
        return None

    async def clean_up(self, retention: Retention, limit: int) -> int:
        return self._outbox.clean_up(retention.history, limit)

    async def check(self) -> Sequence[Finding]:
        return [Finding.ok(f"{self.name} keeps records within this process")]
