"""The inbox in memory."""

import logging
from collections.abc import Collection, Hashable, Sequence
from dataclasses import replace

import anyio

from cqrs_decor.clock import Clock, SystemClock
from cqrs_decor.envelope import Envelope
from cqrs_decor.inbox import NOBODY, InboxFilter, Mark, Noted, ParkedMessage
from cqrs_decor.memory.transaction import MemoryTransaction
from cqrs_decor.unit_of_work import Transaction

_logger = logging.getLogger(__name__)

_Identity = tuple[str, str, str]
"""Consumer, source and id."""

_Line = tuple[str, str, str]
"""Consumer, topic and key: messages that wait for each other."""


class MemoryInbox:
    """The inbox in memory. What an open transaction has touched is locked until it ends, as rows of a database are.

    Args:
        clock: Tells how long ago a message was parked.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._had: set[_Identity] = set()
        self._parked: dict[int, ParkedMessage] = {}
        self._ids: dict[_Identity, int] = {}
        self._lines: dict[_Line, list[int]] = {}
        self._last_id = 0
        self._marks: dict[tuple[str, str, int], tuple[str, Mark]] = {}
        self._locked: dict[Hashable, tuple[MemoryTransaction, anyio.Event]] = {}

    # --- note -------------------------------------------------------------------------------------------------------

    async def record(self, transaction: Transaction, consumer: str, envelope: Envelope) -> Noted:
        identity = _identity(consumer, envelope)
        mine = _mine(transaction)
        if not await self._lock(identity, mine) or identity in self._had:
            return Noted.HAD
        if _line(consumer, envelope) in self._lines:
            return Noted.HELD
        mine.at_commit(lambda: self._had.add(identity))
        return Noted.NEW

    async def record_all(
        self, transaction: Transaction, consumer: str, envelopes: Sequence[Envelope]
    ) -> Sequence[Noted]:
        answers = [Noted.HAD] * len(envelopes)
        for place in sorted(range(len(envelopes)), key=lambda each: (envelopes[each].source, envelopes[each].id)):
            answers[place] = await self.record(transaction, consumer, envelopes[place])
        return answers

    # --- park -------------------------------------------------------------------------------------------------------

    async def park(self, parked: ParkedMessage) -> bool:
        identity = _identity(parked.consumer, parked.envelope)
        await self._until_unlocked(identity, _line(parked.consumer, parked.envelope))
        known = self._parked.get(self._ids.get(identity, 0))
        if known is None and identity in self._had:
            return False
        self._keep(replace(parked, id=known.id, retries=known.retries) if known else parked, held=False)
        return True

    async def hold_back(self, parked: ParkedMessage) -> bool:
        identity, line = _identity(parked.consumer, parked.envelope), _line(parked.consumer, parked.envelope)
        await self._until_unlocked(identity, line)
        if line not in self._lines or identity in self._had:
            return False
        self._keep(parked, held=True)
        return True

    async def unpark(self, transaction: Transaction, parked_id: int) -> bool:
        mine = _mine(transaction)
        parked = self._parked.get(parked_id)
        if parked is None:
            return False
        await self._lock(_line(parked.consumer, parked.envelope) or parked_id, mine)
        if not await self._lock((parked_id,), mine) or parked_id not in self._parked:
            return False
        mine.at_commit(lambda: self._take_out(parked_id))
        return True

    async def retries(self, consumers: Collection[str], limit: int) -> Sequence[ParkedMessage]:
        wanted = [
            parked
            for parked in self._parked.values()
            if parked.retry_requested and parked.consumer in consumers and self._is_first(parked)
        ]
        return wanted[:limit]

    def _keep(self, parked: ParkedMessage, *, held: bool) -> None:
        identity, line = _identity(parked.consumer, parked.envelope), _line(parked.consumer, parked.envelope)
        if not parked.id:
            self._last_id += 1
            parked = replace(parked, id=self._last_id)
            self._ids[identity] = parked.id
            if line is not None:
                self._lines.setdefault(line, []).append(parked.id)
        self._had.add(identity)
        self._parked[parked.id] = replace(parked, retry_requested=False, held=held)

    def _take_out(self, parked_id: int) -> None:
        """The one behind the first of its key has its turn; behind the last one the key is free."""
        parked = self._parked.pop(parked_id)
        del self._ids[_identity(parked.consumer, parked.envelope)]
        line = _line(parked.consumer, parked.envelope)
        if line is None:
            return
        ids = self._lines[line]
        was_first = ids[0] == parked_id
        ids.remove(parked_id)
        if not ids:
            del self._lines[line]
        elif was_first:
            self._parked[ids[0]] = replace(self._parked[ids[0]], retry_requested=True, held=False)

    def _is_first(self, parked: ParkedMessage) -> bool:
        line = _line(parked.consumer, parked.envelope)
        return line is None or self._lines[line][0] == parked.id

    # --- marks ------------------------------------------------------------------------------------------------------

    async def mark(self, group: str, owner: str, marks: Collection[Mark]) -> None:
        for mark in marks:
            self._marks[group, mark.topic, mark.partition] = (owner, mark)

    async def take_marks(self, group: str, owner: str, partitions: Collection[tuple[str, int]]) -> Sequence[Mark]:
        found = [self._marks.get((group, *place), (owner, None)) for place in partitions]
        return [mark for by, mark in found if mark is not None and by != owner]

    async def unmark(self, group: str, owner: str, partitions: Collection[tuple[str, int]]) -> None:
        for place in partitions:
            by, mark = self._marks.get((group, *place), (None, None))
            if by != owner or mark is None:
                continue
            if mark.crashes:
                self._marks[(group, *place)] = (NOBODY, replace(mark, suspect=None))
            else:
                del self._marks[(group, *place)]

    # --- operators --------------------------------------------------------------------------------------------------

    async def find(self, wanted: InboxFilter) -> Sequence[ParkedMessage]:
        return [parked for parked in self._parked.values() if self._is_meant(parked, wanted)][: wanted.limit]

    async def parked_count(self) -> int:
        return len(self._parked)

    async def retry(self, ids: Collection[int], *, who: str) -> int:
        asked = [
            parked
            for parked in self._parked.values()
            if parked.id in ids and not parked.retry_requested and not parked.held
        ]
        for parked in asked:
            self._parked[parked.id] = replace(parked, retry_requested=True, retries=parked.retries + 1)
        _logger.info("parked messages retried", extra={"action": "inbox_retried", "who": who, "count": len(asked)})
        return len(asked)

    async def discard(self, ids: Collection[int], *, who: str) -> int:
        count = 0
        for parked_id in sorted(set(ids)):
            count += await self._discard(parked_id)
        _logger.info("messages discarded", extra={"action": "inbox_discarded", "who": who, "count": count})
        return count

    async def _discard(self, parked_id: int) -> bool:
        parked = self._parked.get(parked_id)
        if parked is not None:
            await self._until_unlocked(_line(parked.consumer, parked.envelope) or parked_id)
        if parked_id not in self._parked:
            return False
        self._take_out(parked_id)
        return True

    def _is_meant(self, parked: ParkedMessage, wanted: InboxFilter) -> bool:
        return (
            (not wanted.ids or parked.id in wanted.ids)
            and wanted.consumer in (None, parked.consumer)
            and wanted.topic in (None, parked.envelope.topic)
            and wanted.key in (None, parked.envelope.key)
            and (wanted.error is None or wanted.error in parked.error)
            and (wanted.older_than is None or parked.parked_at <= self._clock.now() - wanted.older_than)
            and wanted.held in (None, parked.held)
            and parked.id > wanted.after
        )

    # --- locks ------------------------------------------------------------------------------------------------------

    async def _lock(self, key: Hashable, transaction: MemoryTransaction) -> bool:
        """Wait until no other transaction has touched `key`, then keep others out; False if this one had it already."""
        while key in self._locked:
            holder, ended = self._locked[key]
            if holder is transaction:
                return False
            await ended.wait()
        transaction.at_end(lambda: self._unlock(key))
        self._locked[key] = (transaction, anyio.Event())
        return True

    def _unlock(self, key: Hashable) -> None:
        _, ended = self._locked.pop(key)
        ended.set()

    async def _until_unlocked(self, *keys: Hashable) -> None:
        """Wait until no transaction has touched any of these; there is no other task in between."""
        while held := next((self._locked[key] for key in keys if key in self._locked), None):
            await held[1].wait()


def _mine(transaction: Transaction) -> MemoryTransaction:
    if not isinstance(transaction, MemoryTransaction):
        raise TypeError(f"{transaction!r} is no transaction of the store in memory")
    return transaction


def _identity(consumer: str, envelope: Envelope) -> _Identity:
    return consumer, envelope.source, envelope.id


def _line(consumer: str, envelope: Envelope) -> _Line | None:
    return None if envelope.key is None else (consumer, envelope.topic, envelope.key)
