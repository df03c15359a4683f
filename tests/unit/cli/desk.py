"""A store as operators meet it: it knows every filter of the seams and keeps what was asked of it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from cqrs_decor.inbox import InboxFilter, ParkedMessage
from cqrs_decor.memory import MemoryStore
from cqrs_decor.outbox import Backlog, OutboxFilter, StoredRecord
from cqrs_decor.store import Retention
from tests.unit.cli import sample


def _is_older(moment: datetime, age: timedelta | None) -> bool:
    return age is None or datetime.now(UTC) - moment > age


@dataclass
class DeskOutbox:
    """Records in a list; `calls` are the changes, a tuple of ids each."""

    records: list[StoredRecord] = field(default_factory=list)
    calls: list[tuple[str, tuple[int, ...], str]] = field(default_factory=list)

    async def find(self, wanted: OutboxFilter) -> Sequence[StoredRecord]:
        return [
            record
            for record in sorted(self.records, key=lambda record: record.id)
            if (not wanted.ids or record.id in wanted.ids)
            and (record.state != "delivered" if wanted.state is None else record.state == wanted.state)
            and wanted.topic in (None, record.envelope.topic)
            and wanted.key in (None, record.envelope.key)
            and (wanted.error is None or wanted.error in (record.error or ""))
            and _is_older(record.written_at, wanted.older_than)
            and record.id > wanted.after
        ][: wanted.limit]

    async def backlog(self) -> Backlog:
        parked = sum(record.state == "parked" for record in self.records)
        return Backlog(pending=len(self.records) - parked, parked=parked, oldest=None)

    async def retry(self, ids: Collection[int], *, who: str) -> int:
        return self._move("retry", ids, who, "parked", "pending")

    async def discard(self, ids: Collection[int], *, who: str) -> int:
        self.calls.append(("discard", tuple(ids), who))
        gone = [record for record in self.records if record.id in ids]
        self.records = [record for record in self.records if record.id not in ids]
        return len(gone)

    async def replay(self, ids: Collection[int], *, who: str) -> int:
        """As a relay that keeps a history does at once: the new records are delivered, at the end."""
        self.calls.append(("replay", tuple(ids), who))
        last = max(record.id for record in self.records)
        again = [record for record in self.records if record.id in ids]
        self.records += [
            replace(record, id=last + n, written_at=datetime.now(UTC)) for n, record in enumerate(again, start=1)
        ]
        return len(again)

    def _move(self, verb: str, ids: Collection[int], who: str, before: str, after: str) -> int:
        self.calls.append((verb, tuple(ids), who))
        moved = [record for record in self.records if record.id in ids and record.state == before]
        self.records = [
            replace(record, state=after, retries=record.retries + 1) if record in moved else record
            for record in self.records
        ]
        return len(moved)


@dataclass
class DeskInbox:
    messages: list[ParkedMessage] = field(default_factory=list)
    calls: list[tuple[str, tuple[int, ...], str]] = field(default_factory=list)

    async def find(self, wanted: InboxFilter) -> Sequence[ParkedMessage]:
        return [
            parked
            for parked in self.messages
            if (not wanted.ids or parked.id in wanted.ids)
            and wanted.consumer in (None, parked.consumer)
            and wanted.topic in (None, parked.envelope.topic)
            and wanted.key in (None, parked.envelope.key)
            and (wanted.error is None or wanted.error in parked.error)
            and _is_older(parked.parked_at, wanted.older_than)
            and wanted.held in (None, parked.held)
            and parked.id > wanted.after
        ][: wanted.limit]

    async def parked_count(self) -> int:
        return len(self.messages)

    async def retry(self, ids: Collection[int], *, who: str) -> int:
        self.calls.append(("retry", tuple(ids), who))
        asked = [parked for parked in self.messages if parked.id in ids and not parked.retry_requested]
        self.messages = [
            replace(parked, retry_requested=True) if parked in asked else parked for parked in self.messages
        ]
        return len(asked)

    async def discard(self, ids: Collection[int], *, who: str) -> int:
        self.calls.append(("discard", tuple(ids), who))
        gone = [parked for parked in self.messages if parked.id in ids]
        self.messages = [parked for parked in self.messages if parked.id not in ids]
        return len(gone)


class Desk(MemoryStore):
    """Attributes: `kept` is how many rows a clean-up finds; `cleaned` is what was asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.outbox = self.desk_outbox = DeskOutbox()
        self.inbox = self.desk_inbox = DeskInbox()
        self.kept = 0
        self.cleaned: list[Retention] = []

    async def clean_up(self, retention: Retention, limit: int) -> int:
        self.cleaned.append(retention)
        deleted = min(self.kept, limit)
        self.kept -= deleted
        return deleted


def record(
    number: int,
    state: str = "parked",
    *,
    topic: str = "orders",
    key: str = "1",
    error: str = "RecordTooLargeError: it has 9 bytes",
    age: timedelta = timedelta(hours=1),
    retries: int = 0,
) -> StoredRecord:
    return StoredRecord(
        id=number,
        lane=1,
        envelope=sample.envelope(number, topic=topic, key=key),
        state=state,
        attempts=1,
        error=None if state in ("pending", "delivered") else error,
        written_at=datetime.now(UTC) - age,
        due_at=None,
        retries=retries,
    )


def message(
    number: int,
    *,
    consumer: str = "sample.bill",
    topic: str = "orders",
    held: bool = False,
    error: str = "ValueError: no such article",
    age: timedelta = timedelta(hours=1),
    retries: int = 0,
    retry_requested: bool = False,
) -> ParkedMessage:
    return ParkedMessage(
        id=number,
        consumer=consumer,
        envelope=sample.envelope(number, topic=topic),
        error=error,
        attempts=8,
        parked_at=datetime.now(UTC) - age,
        held=held,
        retries=retries,
        retry_requested=retry_requested,
    )
