"""A transaction of the store in memory."""

from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import anyio
import anyio.to_thread

from cqrs_decor.envelope import Envelope
from cqrs_decor.errors import (
    UnitOfWorkClosedError,
    UnsupportedError,
)
from cqrs_decor.memory.outbox import MemoryOutbox

T = TypeVar("T")


class MemoryTransaction:
    """Buffers everything and carries it out at commit, in one step that nothing can interrupt."""

    def __init__(self, outbox: "MemoryOutbox") -> None:
        self._outbox = outbox
        self._envelopes: list[Envelope] = []
        self._changes: list[Callable[[], object]] = []
        self._locks: list[Callable[[], object]] = []
        self._ended = False

    def resource(self, kind: type[T]) -> NoReturn:
        raise UnsupportedError(
            "The store in memory",
            f"give a {kind.__name__}",
            'name a database: bootstrap(database="sqlite+aiosqlite:///app.db")',
        )

    def add(self, envelopes: Sequence[Envelope]) -> None:
        self._require_open()
        self._envelopes.extend(envelopes)

    def mark(self) -> object:
        return self

    def holds(self, mark: object) -> bool:
        """There are no savepoints that could be rolled back."""
        return True

    async def run_sync(self, function: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(function)

    async def commit(self) -> None:
        self._require_open()
        for change in self._changes:
            change()
        self._outbox.append(self._envelopes)
        self._end()

    async def rollback(self) -> None:
        self._end()

    def at_commit(self, change: Callable[[], object]) -> None:
        self._require_open()
        self._changes.append(change)

    def at_end(self, unlock: Callable[[], object]) -> None:
        self._require_open()
        self._locks.append(unlock)

    def _end(self) -> None:
        self._ended = True
        locks, self._locks = self._locks, []
        for unlock in locks:
            unlock()

    def _require_open(self) -> None:
        if self._ended:
            raise UnitOfWorkClosedError("A transaction")
