"""The inbox in memory."""

import logging
from collections.abc import Collection, Hashable, Sequence
from dataclasses import replace

import anyio

from cqrs_decor.envelope import Envelope
from cqrs_decor.inbox import InboxFilter, ParkedMessage
from cqrs_decor.memory.transaction import MemoryTransaction
from cqrs_decor.unit_of_work import Transaction

_logger = logging.getLogger(__name__)


class MemoryInbox:
    """The inbox in memory. What an open transaction has touched is locked until it ends, as rows of a database are."""

    def __init__(self) -> None:
        self._had: set[Hashable] = set()
        self._parked: dict[int, ParkedMessage] = {}
        self._last_id = 0
        self._locked: dict[Hashable, tuple[MemoryTransaction, anyio.Event]] = {}

    async def record(self, transaction: Transaction, consumer: str, envelope: Envelope) -> bool:
        key = (consumer, envelope.source, envelope.id)
        mine = _mine(transaction)
        if not await self._lock(key, mine) or key in self._had:
            return False
        mine.at_commit(lambda: self._had.add(key))
        return True

    async def park(self, parked: ParkedMessage) -> None:
        self._last_id += 1
        known = next((old.id for old in self._parked.values() if _identity(old) == _identity(parked)), self._last_id)
        self._parked[known] = replace(parked, id=known, retry_requested=False)

    async def unpark(self, transaction: Transaction, parked_id: int) -> bool:
        mine = _mine(transaction)
        if not await self._lock(parked_id, mine) or parked_id not in self._parked:
            return False
        mine.at_commit(lambda: self._parked.pop(parked_id, None))
        return True

    async def retries(self, consumers: Collection[str], limit: int) -> Sequence[ParkedMessage]:
        wanted = [parked for parked in self._parked.values() if parked.retry_requested and parked.consumer in consumers]
        return wanted[:limit]

    async def find(self, wanted: InboxFilter) -> Sequence[ParkedMessage]:
        return [parked for parked in self._parked.values() if _is_meant(parked, wanted)][: wanted.limit]

    async def parked_count(self) -> int:
        return len(self._parked)

    async def retry(self, ids: Collection[int], *, who: str) -> int:
        asked = [parked for parked in self._parked.values() if parked.id in ids and not parked.retry_requested]
        for parked in asked:
            self._parked[parked.id] = replace(parked, retry_requested=True)
        _logger.info("parked messages retried", extra={"action": "inbox_retried", "who": who, "count": len(asked)})
        return len(asked)

    async def discard(self, ids: Collection[int], *, who: str) -> int:
        given_up = [self._parked.pop(parked_id) for parked_id in set(ids) if parked_id in self._parked]
        _logger.info("messages discarded", extra={"action": "inbox_discarded", "who": who, "count": len(given_up)})
        return len(given_up)

    async def _lock(self, key: Hashable, transaction: MemoryTransaction) -> bool:
        """Wait until no other transaction has touched `key`, then keep others out; False if this one had it already."""
        while key in self._locked:
            holder, ended = self._locked[key]
            if holder is transaction:
                return False
            await ended.wait()
        self._locked[key] = (transaction, anyio.Event())
        transaction.at_end(lambda: self._unlock(key))
        return True

    def _unlock(self, key: Hashable) -> None:
        _, ended = self._locked.pop(key)
        ended.set()


def _mine(transaction: Transaction) -> MemoryTransaction:
    if not isinstance(transaction, MemoryTransaction):
        raise TypeError(f"{transaction!r} is no transaction of the store in memory")
    return transaction


def _identity(parked: ParkedMessage) -> tuple[str, str, str]:
    return parked.consumer, parked.envelope.source, parked.envelope.id


def _is_meant(parked: ParkedMessage, wanted: InboxFilter) -> bool:
    return (
        (not wanted.ids or parked.id in wanted.ids)
        and wanted.consumer in (None, parked.consumer)
        and wanted.topic in (None, parked.envelope.topic)
        and wanted.key in (None, parked.envelope.key)
    )
