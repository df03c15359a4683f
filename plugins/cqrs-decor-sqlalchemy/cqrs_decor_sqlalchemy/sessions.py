"""Sessions that take outbox rows along: those the store makes, and those that belong to a caller."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from cqrs_decor.errors import AutocommitRefusedError, UnsafeDatabaseSetupError
from cqrs_decor_sqlalchemy.database import Database
from cqrs_decor_sqlalchemy.dialects import is_prepared_sqlite
from cqrs_decor_sqlalchemy.driver_insert import DriverInsert
from cqrs_decor_sqlalchemy.ledger import Entry, Guard, Ledger, Mark, ledger_of, note_undone, savepoint_of
from cqrs_decor_sqlalchemy.urls import same_database, shown


class Notes:
    """What is kept about one session while it lives.

    Attributes:
        pending: Rows added before the session had a connection.
        ledger: That of its connection, once there is one.
        guard: Of a session of the store's own.
        committed: What was committed and is about to end.
    """

    __slots__ = ("committed", "connection", "database", "guard", "ledger", "pending")

    def __init__(self, database: Database, guard: Guard | None = None) -> None:
        self.database = database
        self.guard = guard
        self.pending: list[Entry] = []
        self.ledger: Ledger | None = None
        self.connection: Connection | None = None
        self.committed: SessionTransaction | None = None

    def mark(self, session: Session) -> Mark:
        innermost = session.get_nested_transaction() or session.get_transaction()
        savepoint = None if self.connection is None else savepoint_of(self.connection)
        return Mark(innermost, savepoint, self.ledger)

    def add(self, session: Session, insert: DriverInsert, rows: Sequence[dict[str, object]]) -> None:
        mark = self.mark(session)
        entries = self.pending if self.ledger is None else self.ledger.entries
        entries.extend(Entry(insert, row, mark) for row in rows)

    def attach(self, session: Session, connection: Connection) -> None:
        """From now on the session's rows go by this connection.

        Raises:
            AutocommitRefusedError, UnsafeDatabaseSetupError: It cannot keep the promises.
        """
        check_connection(connection, self.database)
        self.connection = connection
        self.ledger = ledger_of(connection)
        self.ledger.entries.extend(self.pending)
        self.pending.clear()
        if self.guard is not None:
            self.ledger.guard = self.guard
            self.ledger.is_flushing = lambda: bool(getattr(session, "_flushing", False))

    def detach(self) -> None:
        self.pending.clear()
        self.ledger = None
        self.connection = None


def notes_of(session: Session, database: Database) -> Notes:
    """The notes about a caller's session, which is followed from now on."""
    notes = _kept(session)
    if notes is None:
        notes = _keep(session, Notes(database))
        for name, listener in _LISTENERS.items():
            event.listen(session, name, listener)
    if not session.in_transaction():
        session.begin()
    if notes.connection is None:
        _attach_to_what_is_open(session, notes)
    return notes


def own_session(session: Session, database: Database) -> Notes:
    """The notes about a new session of the store's own, whose class is `guarded`. It begins without a round trip."""
    guard = Guard(ending=True)
    notes = _keep(session, Notes(database, guard))
    session.begin()
    guard.ending = False
    return notes


def guarded(session_class: type[Session]) -> type[Session]:
    """A subclass whose sessions refuse to be ended by a handler. One per store: its listeners are set up once."""
    made = type(session_class.__name__, (_Guarded, session_class), {"__module__": session_class.__module__})
    for name, listener in _LISTENERS.items():
        event.listen(made, name, listener)
    return made


def sync_session(session: object) -> Session | None:
    """The synchronous session behind whatever a caller calls their session; None if it is none."""
    if isinstance(session, AsyncSession):
        return session.sync_session
    return session if isinstance(session, Session) else None


def leads_to(connection: Connection, database: Database) -> bool:
    """Whether a connection leads to the store's database, by its own pool or by another engine for the same place."""
    engine, own = connection.engine, database.engine
    return engine.pool is own.pool or same_database(engine.url, own.url)


def check_connection(connection: Connection, database: Database) -> None:
    """
    Raises:
        AutocommitRefusedError: In AUTOCOMMIT mode there is no transaction to take rows along.
        UnsafeDatabaseSetupError: SQLite with a driver that begins transactions by itself.
    """
    if in_autocommit(connection):
        raise AutocommitRefusedError(database.name)
    if connection.dialect.name == "sqlite" and not is_prepared_sqlite(connection.engine):
        raise UnsafeDatabaseSetupError(
            shown(connection.engine.url),
            "the SQLite driver begins transactions by itself, so a rolled-back savepoint can leave rows behind",
            "call cqrs_decor_sqlalchemy.prepare_sqlite_engine(engine) right after create_async_engine(...)",
        )


def in_autocommit(connection: Connection) -> bool:
    """By option of the connection, or as `engine_in_autocommit`."""
    level = connection.get_execution_options().get("isolation_level")
    return level == "AUTOCOMMIT" or (level is None and engine_in_autocommit(connection.engine))


def engine_in_autocommit(engine: Engine) -> bool:
    """By option of the engine, or by `create_engine(isolation_level=...)`, which only the dialect remembers."""
    level = engine.get_execution_options().get("isolation_level")
    return (level or getattr(engine.dialect, "_on_connect_isolation_level", None)) == "AUTOCOMMIT"


class _Guarded(Session):
    """Refuses what would end the transaction, or begin another; savepoints are welcome."""

    def begin(self, nested: bool = False) -> SessionTransaction:
        if not nested:
            _refuse(self, "begin")
        return super().begin(nested)

    def commit(self) -> None:
        _refuse(self, "commit")
        super().commit()

    def rollback(self) -> None:
        _refuse(self, "rollback")
        super().rollback()

    def prepare(self) -> None:
        _refuse(self, "prepare")
        super().prepare()

    def close(self) -> None:
        _refuse(self, "close")
        super().close()

    def reset(self) -> None:
        _refuse(self, "reset")
        super().reset()

    def invalidate(self) -> None:
        _refuse(self, "invalidate")
        super().invalidate()


def _kept(session: Session) -> Notes | None:
    """On the session itself: they end with it, and a weak dictionary is ten times as slow."""
    return vars(session).get(_NOTES)


def _keep(session: Session, notes: Notes) -> Notes:
    vars(session)[_NOTES] = notes
    return notes


_NOTES = "_cqrs_decor_notes"


def _refuse(session: Session, action: str) -> None:
    notes = _kept(session)
    if notes is not None and notes.guard is not None:
        notes.guard.refuse(action)


def _attach_to_what_is_open(session: Session, notes: Notes) -> None:
    """Find the connection that a session has already: asking for one by `session.connection()` might have to wait."""
    if isinstance(session.bind, Connection) and session.bind.in_transaction():
        notes.attach(session, session.bind)
        return
    transaction: Any = session.get_transaction()
    for connection, *_ in transaction._connections.values():
        if leads_to(connection, notes.database):
            notes.attach(session, connection)
            return


def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    notes = _kept(session)
    if notes is not None and notes.connection is None and leads_to(connection, notes.database):
        notes.attach(session, connection)


def _before_commit(session: Session) -> None:
    """Rows without a connection get one: the session has touched no database yet, and is about to commit nothing."""
    notes = _kept(session)
    if notes is None or not notes.pending:
        return
    connection = session.connection(bind_arguments={"clause": notes.database.tables.outbox})
    if notes.connection is None:
        raise TypeError(f"This session is bound to {shown(connection.engine.url)}, not to {notes.database.name}.")


def _after_commit(session: Session) -> None:
    """The innermost savepoint was released, or the root committed."""
    notes = _kept(session)
    if notes is not None:
        notes.committed = session.get_nested_transaction() or session.get_transaction()


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    """What ends without a commit is undone. No event says so: after a failed flush a savepoint is closed in silence."""
    notes = _kept(session)
    if notes is None or not (transaction.nested or transaction.parent is None):
        return
    if transaction is not notes.committed:
        note_undone(transaction)
    notes.committed = None
    if transaction.parent is None:
        notes.detach()
        if notes.guard is not None and not notes.guard.ending:
            notes.guard.broken = notes.guard.broken or "rollback"


_LISTENERS: dict[str, Any] = {
    "after_begin": _after_begin,
    "before_commit": _before_commit,
    "after_commit": _after_commit,
    "after_transaction_end": _after_transaction_end,
}
