"""One transaction around a handler, on a session of the store's own or on one that a caller has open."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import anyio
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import CommitOutcomeUnknownError, TransactionControlError
from cqrs_decor.unit_of_work import Transaction
from cqrs_decor_sqlalchemy.database import Database
from cqrs_decor_sqlalchemy.errors import is_unavailable
from cqrs_decor_sqlalchemy.ledger import Guard, Mark
from cqrs_decor_sqlalchemy.records import record_row
from cqrs_decor_sqlalchemy.sessions import Notes

T = TypeVar("T")


class SqlAlchemyTransaction:
    """A transaction as the core sees it. The connection is taken from the pool when the session first needs it.

    Attributes:
        session: What handlers ask for.
    """

    __slots__ = ("_database", "_guard", "_notes", "_read_only", "session")

    def __init__(
        self, session: AsyncSession, notes: Notes, database: Database, guard: Guard | None, *, read_only: bool = False
    ) -> None:
        self.session = session
        self._notes = notes
        self._database = database
        self._guard = guard
        self._read_only = read_only

    def resource(self, kind: type[T]) -> T:
        for session in (self.session, self.session.sync_session):
            if isinstance(session, kind):
                return session
        raise TypeError(f"{self._database.name} has a {type(self.session).__name__} to offer, not a {kind.__name__}.")

    def add(self, envelopes: Sequence[Envelope]) -> None:
        rows = [record_row(envelope) for envelope in envelopes]
        self._notes.add(self.session.sync_session, self._database.tables.insert_record, rows)

    def mark(self) -> Mark:
        return self._notes.mark(self.session.sync_session)

    def holds(self, mark: object) -> bool:
        return not isinstance(mark, Mark) or mark.holds()

    async def run_sync(self, function: Callable[[], T]) -> T:
        def without_session(_: Session) -> T:
            return function()

        return await self.session.run_sync(without_session)

    async def commit(self) -> None:
        guard = self._owned()
        if guard.broken is not None:
            await self.rollback()
            raise TransactionControlError(guard.broken)
        if self._read_only:
            await self.rollback()
            return
        guard.ending = True
        try:
            await self.session.commit()
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await self.rollback()
            if guard.committing and isinstance(error, Exception) and is_unavailable(error):
                raise CommitOutcomeUnknownError(self._database.name) from error
            raise
        await self.session.close()

    async def rollback(self) -> None:
        self._owned().ending = True
        try:
            await self.session.close()
        except (SQLAlchemyError, OSError):  # the connection is gone, and the transaction with it
            await self.session.invalidate()

    def _owned(self) -> Guard:
        if self._guard is None:
            raise TransactionControlError("commit or rollback on a session of the caller's")
        return self._guard


async def in_transaction(transaction: Transaction, work: Callable[[Connection], T]) -> T:
    """Run `work` on the transaction's connection, with nothing of the session's ORM in between.

    Raises:
        TypeError: It is not a transaction of this store.
    """
    if not isinstance(transaction, SqlAlchemyTransaction):
        raise TypeError(f"{type(transaction).__name__} is not a transaction of this store.")

    def on_connection(session: Session) -> T:
        return work(session.connection())

    return await transaction.session.run_sync(on_connection)
