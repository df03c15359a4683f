"""The store seam: outbox, inbox and unit of work of one database, as a plugin brings them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, Protocol

from cqrs_decor.broker import Broker
from cqrs_decor.envelope import Envelope
from cqrs_decor.findings import Finding
from cqrs_decor.idempotency import IdempotencyStore
from cqrs_decor.inbox import InboxStore
from cqrs_decor.outbox import OutboxStore
from cqrs_decor.unit_of_work import Transaction


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCard:
    """What a store promises, declared once on its class; docs, `doctor` and conformance tests read the same card."""

    durable: bool
    shared: bool
    concurrent_writers: bool
    crash_may_lose: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """For how long what is done with is kept, by the database's clock; None for ever.

    Attributes:
        inbox: Which message a consumer has had. Never shorter than a message may come again.
        history: Delivered outbox records, where they are kept.
        idempotency: Results of commands that were sent with an idempotency key.
        log: Messages of the database as broker that every group has acknowledged.
        groups: A group of that broker that was not there for so long is given up, and holds up nothing any more.
    """

    inbox: timedelta | None = None
    history: timedelta | None = None
    idempotency: timedelta | None = None
    log: timedelta | None = None
    groups: timedelta | None = None


class SchemaAdmin(Protocol):
    """The store's own tables: what `cqrs-decor db` works on."""

    async def plan(self) -> Sequence[str]:
        """The SQL statements that `upgrade` would run; none when everything is there."""
        ...

    async def upgrade(self) -> Sequence[str]:
        """Create or change what is missing; returns what was run. Safe to run twice and side by side."""
        ...

    async def check(self) -> Sequence[Finding]:
        """How the tables in the database differ from what is needed."""
        ...


class Store(Protocol):
    """One database. Opened once by the app, then used concurrently."""

    card: ClassVar[StoreCard]
    resources: Mapping[type[Any], bool]
    """What handlers may ask for -> whether plain `def` code may use it (`{AsyncSession: False, Session: True}`)."""
    name: str
    """How texts call it: a URL without secrets."""
    outbox: OutboxStore
    inbox: InboxStore
    idempotency: IdempotencyStore
    schema: SchemaAdmin | None

    async def open(self) -> None:
        """Connect and look.

        Raises:
            StoreUnavailableError: Cannot be reached; opening again is safe.
            StoreAccessError: Reached, and refused.
            SchemaMissingError, SchemaOutdatedError: The tables are not what is needed.
            UnsafeDatabaseSetupError, AutocommitRefusedError: The caller's engine cannot keep the promises.
        """
        ...

    async def close(self) -> None:
        """Give everything back that `open` took; an engine of the caller's stays theirs. Safe to call twice.

        It may be opened again.
        """
        ...

    async def begin(self, *, read_only: bool = False) -> Transaction:
        """A new transaction on a connection of its own."""
        ...

    def join(self, session: object) -> Transaction:
        """The transaction that a session of the caller's has open, or will open; they commit it.

        Raises:
            TypeError: It is not a session of this store.
            AutocommitRefusedError: It is in AUTOCOMMIT mode.
        """
        ...

    def add(self, session: object, envelopes: Sequence[Envelope]) -> None:
        """Buffer outbox records in a session of the caller's; rows are written when it flushes for its commit."""
        ...

    def is_transient(self, error: BaseException) -> bool:
        """Whether the same transaction may pass when it is run again: serialization failure, deadlock."""
        ...

    def is_unavailable(self, error: BaseException) -> bool:
        """Whether the error says that the database is away, and nothing about the message in hand."""
        ...

    def log_broker(self) -> Broker | None:
        """The database as its own broker, where the store has one; shares the store's connections."""
        ...

    async def clean_up(self, retention: Retention, limit: int) -> int:
        """Delete up to `limit` rows that retention says are done with, oldest first; how many. One process at a time
        does it for all: 0 when nothing is left, or another one is at it.
        """
        ...

    async def check(self) -> Sequence[Finding]:
        """What `doctor` wants to know. Never raises for what it finds."""
        ...
