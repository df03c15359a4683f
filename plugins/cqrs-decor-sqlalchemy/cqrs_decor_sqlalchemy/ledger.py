"""What a connection's transaction will write last: outbox rows, each with the savepoint it belongs to.

Everything hangs on the events of the connection, not on those of sessions: `commit` is the one moment that comes after
the last flush, once, for the root transaction only, however sessions share the connection.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from sqlalchemy import Connection, Engine, NestedTransaction, event
from sqlalchemy.orm import SessionTransaction

from cqrs_decor.crash_points import reach
from cqrs_decor.errors import TransactionControlError
from cqrs_decor_sqlalchemy.driver_insert import DriverInsert


@dataclass(slots=True, eq=False)
class Mark:
    """A place in a transaction: the savepoints around it, those of the session and those of the connection.

    A session makes its savepoint on the connection only when it first needs it, so that both have to be kept.
    """

    session: SessionTransaction | None
    savepoint: NestedTransaction | None
    ledger: "Ledger | None"

    def holds(self) -> bool:
        """Whether nothing around it was rolled back."""
        if self.ledger is not None and self.ledger.undone:
            return False
        return not (_undone_around(self.session, "parent") or _undone_around(self.savepoint, "_previous_nested"))


@dataclass(slots=True, eq=False)
class Entry:
    """A row to be written by `insert`."""

    insert: DriverInsert
    row: dict[str, object]
    mark: Mark


@dataclass(slots=True, eq=False)
class Guard:
    """Stands over a transaction of the store's own, which only the store may end.

    Attributes:
        ending: The store is ending it now.
        broken: How a handler tried to, if one did.
        committing: The rows are written, COMMIT is the next thing to be sent.
    """

    ending: bool = False
    broken: str | None = None
    committing: bool = False

    def refuse(self, action: str) -> None:
        """
        Raises:
            TransactionControlError: It is not the store that ends the transaction.
        """
        if not self.ending:
            self.broken = self.broken or action
            raise TransactionControlError(action)


@dataclass(slots=True, eq=False)
class Ledger:
    """The rows that one root transaction of a connection will write."""

    entries: list[Entry] = field(default_factory=list[Entry])
    guard: Guard | None = None
    is_flushing: Callable[[], bool] | None = None
    undone: bool = False


_undone: "WeakSet[SessionTransaction | NestedTransaction]" = WeakSet()


def follow(target: Engine | Connection) -> None:
    """Write what the transactions of an engine, or of one connection, take along; safe to call again."""
    if not event.contains(target, "commit", _on_commit):
        for name, listener in _LISTENERS.items():
            event.listen(target, name, listener)


def ledger_of(connection: Connection) -> Ledger:
    """The ledger of the connection's transaction; one that was begun before it was followed is followed from now on."""
    ledger = _kept(connection)
    if ledger is None:
        follow(connection)
        ledger = _keep(connection, Ledger())
    return ledger


def _kept(connection: Connection) -> Ledger | None:
    """On the connection itself: it ends with it, and a weak dictionary is ten times as slow."""
    return vars(connection).get(_LEDGER)


def _keep(connection: Connection, ledger: Ledger) -> Ledger:
    vars(connection)[_LEDGER] = ledger
    return ledger


_LEDGER = "_cqrs_decor_ledger"


def note_undone(transaction: SessionTransaction | NestedTransaction) -> None:
    """A savepoint was rolled back, and with it everything that was done in it."""
    _undone.add(transaction)


def savepoint_of(connection: Connection) -> NestedTransaction | None:
    """The innermost open savepoint; SQLAlchemy names an inner one even when the one around it was rolled back first."""
    savepoint = connection.get_nested_transaction()
    while savepoint is not None and savepoint in _undone:
        outer: Any = savepoint
        savepoint = outer._previous_nested
    return savepoint


def _on_begin(connection: Connection) -> None:
    """A guard stays with its connection: what is begun on it after a refused commit is guarded as well."""
    before = _kept(connection)
    _keep(connection, Ledger() if before is None else Ledger(guard=before.guard, is_flushing=before.is_flushing))


def _on_commit(connection: Connection) -> None:
    ledger = _kept(connection)
    if ledger is None:
        return
    _refuse(connection, ledger, "commit")
    if ledger.entries:
        _write(connection, ledger)
    if ledger.guard is not None:
        ledger.guard.committing = True


def _on_rollback(connection: Connection) -> None:
    ledger = _kept(connection)
    if ledger is None:
        return
    ledger.undone = True
    ledger.entries.clear()
    if ledger.is_flushing is None or not ledger.is_flushing():  # a flush that fails rolls back by itself
        _refuse(connection, ledger, "rollback")


def _refuse(connection: Connection, ledger: Ledger, action: str) -> None:
    if ledger.guard is None:
        return
    try:
        ledger.guard.refuse(action)
    except TransactionControlError:
        _abandon(connection)
        raise


def _on_rollback_savepoint(connection: Connection, name: str, context: None) -> None:
    savepoint: Any = connection.get_nested_transaction()
    while savepoint is not None:
        note_undone(savepoint)
        if savepoint._savepoint == name:
            return
        savepoint = savepoint._previous_nested


def _on_prepare_twophase(connection: Connection, xid: object) -> None:
    _on_commit(connection)


_LISTENERS: dict[str, Callable[..., None]] = {
    "begin": _on_begin,
    "commit": _on_commit,
    "rollback": _on_rollback,
    "rollback_savepoint": _on_rollback_savepoint,
    "prepare_twophase": _on_prepare_twophase,
}


def _write(connection: Connection, ledger: Ledger) -> None:
    """Write the rows in the order in which they were added. A failure ends the transaction, whoever catches it."""
    entries = [entry for entry in ledger.entries if entry.mark.holds()]
    ledger.entries.clear()
    try:
        while entries:
            insert = entries[0].insert
            insert.write(connection, [entry.row for entry in entries if entry.insert is insert])
            entries = [entry for entry in entries if entry.insert is not insert]
        reach("outbox.rows_written")
    except BaseException:
        _abandon(connection)
        raise


def _abandon(connection: Connection) -> None:
    """SQLAlchemy takes the transaction for ended and sends no ROLLBACK: the next one would be begun inside it."""
    try:
        connection.dialect.do_rollback(connection.connection)
    except Exception:  # the first error is the one to be seen; what cannot be rolled back is dropped
        connection.invalidate()


def _undone_around(transaction: Any, outer: str) -> bool:
    while transaction is not None:
        if transaction in _undone:
            return True
        transaction = getattr(transaction, outer)
    return False
