"""Begin, commit, roll back, `after_commit`: one transaction around a handler and everything that joins it."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

import anyio

from cqrs_decor.crash_points import reach
from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import JoinedDispatchFailedError, UnitOfWorkClosedError

T = TypeVar("T")

_logger = logging.getLogger(__name__)


class Transaction(Protocol):
    """One transaction of a store. Used by one dispatch and by the tasks that its handler awaits."""

    def resource(self, kind: type[T]) -> T:
        """What handlers ask for by type, e.g. `AsyncSession`; one object per transaction."""
        ...

    def add(self, envelopes: Sequence[Envelope]) -> None:
        """Buffer outbox records: their rows are written last, at the flush before the commit.

        They belong to the savepoint that is open now: one that is rolled back takes them along.
        """
        ...

    def mark(self) -> object:
        """Where the transaction stands now: which savepoint is open."""
        ...

    def holds(self, mark: object) -> bool:
        """Whether work done at `mark` is still part of the transaction, i.e. no savepoint around it was rolled back."""
        ...

    async def run_sync(self, function: Callable[[], T]) -> T:
        """Run plain code that uses the transaction's synchronous resources; its waits do not block the loop."""
        ...

    async def commit(self) -> None:
        """Flush, write the buffered outbox rows, commit. On any error the transaction is rolled back.

        Raises:
            CommitOutcomeUnknownError: The connection broke during COMMIT.
        """
        ...

    async def rollback(self) -> None:
        """Undo everything and give the connection back; safe after a failed commit and when called twice."""
        ...


Begin = Callable[[], Awaitable[Transaction]]


class UnitOfWork:
    """The transaction of a dispatch, opened when it is first needed, shared by every dispatch that joins it.

    A handler that only emits gets its transaction at commit, for the outbox rows alone.

    Attributes:
        committing: The commit is under way; after a cancellation, that it was and that its outcome is unknown.
    """

    __slots__ = (
        "_after_commit",
        "_begin",
        "_beginning",
        "_begun",
        "_closed",
        "_doomed",
        "_pending",
        "_writes",
        "committing",
        "joined",
        "transaction",
    )

    def __init__(self, begin: Begin, transaction: Transaction | None = None, *, joined: bool = False) -> None:
        """
        Args:
            begin: Opens a transaction.
            transaction: One that the caller has open already.
            joined: The caller owns the transaction: `commit` and `rollback` leave it to them.
        """
        self.transaction = transaction
        self.joined = joined
        self.committing = False
        self._begin = begin
        self._beginning = False
        self._begun: anyio.Event | None = None
        self._pending: list[Envelope] = []
        self._doomed: list[tuple[object, str]] = []
        self._after_commit: list[Callable[[], Awaitable[None]]] = []
        self._closed = False
        self._writes = False

    async def open(self) -> Transaction:
        """The transaction, begun if need be; tasks of one handler that ask at once get the same."""
        if self._closed:
            raise UnitOfWorkClosedError("A transaction")
        while self._beginning:
            self._begun = self._begun or anyio.Event()
            await self._begun.wait()
        if self.transaction is None:
            self.transaction = await self._begin_alone()
        return self.transaction

    async def _begin_alone(self) -> Transaction:
        """Others that ask meanwhile wait. A lock would say so too, but each unit of work would have to make one: that
        took a fifteenth of the time of a message.
        """
        self._beginning = True
        try:
            transaction = await self._begin()
        finally:
            self._beginning = False
            if self._begun is not None:
                self._begun.set()
                self._begun = None
        if self._pending:
            transaction.add(self._pending)  # before those that are emitted from now on
            self._pending = []
        return transaction

    def resource(self, kind: type[T]) -> T:
        """A resource of the open transaction, e.g. its `AsyncSession`.

        Raises:
            UnitOfWorkClosedError: There is no open transaction.
        """
        if self.transaction is None or self._closed:
            raise UnitOfWorkClosedError(kind.__name__)
        return self.transaction.resource(kind)

    def add(self, envelope: Envelope) -> bool:
        """Take an outbox record along; True for the first one."""
        if self._closed:
            raise UnitOfWorkClosedError("A place for an event")
        first, self._writes = not self._writes, True
        if self.transaction is None:
            self._pending.append(envelope)
        else:
            self.transaction.add((envelope,))
        return first

    def mark(self) -> object:
        return None if self.transaction is None else self.transaction.mark()

    def holds(self, mark: object) -> bool:
        return mark is None or self.transaction is None or self.transaction.holds(mark)

    def doom(self, mark: object, message: str) -> None:
        """A joined dispatch that began at `mark` failed: what it left may only be committed if a savepoint undid it."""
        self._doomed.append((mark, message))

    def after_commit(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Run `callback` once this transaction has been committed; never after a rollback."""
        self._after_commit.append(callback)

    async def commit(self) -> None:
        for mark, message in self._doomed:
            if self.holds(mark):
                raise JoinedDispatchFailedError(message)
        if self._pending:
            await self.open()
        if self.joined:
            return
        if self.transaction is not None:
            reach("uow.before_commit")
            self.committing = True
            await self.transaction.commit()
            self.committing = False
            reach("uow.after_commit")
        self._closed = True
        for callback in self._after_commit:
            try:
                await callback()
            except Exception:  # it has been committed: a failure from here on is no failure of the command
                _logger.exception("a callback after the commit failed", extra={"action": "after_commit_failed"})

    async def rollback(self) -> None:
        """Undo. Cancellation does not interrupt it, so that no connection is left in the middle of something."""
        self._closed = True
        if self.transaction is not None and not self.joined:
            with anyio.CancelScope(shield=True):
                await self.transaction.rollback()


async def nothing_to_begin() -> Transaction:
    """Stands in for `Begin` where a unit of work has been given its transaction."""
    raise UnitOfWorkClosedError("A second transaction")
