"""Runs command lines in this process."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import anyio
import pytest

from cqrs_decor import App
from cqrs_decor.cli import main
from cqrs_decor.inbox import ParkedMessage
from cqrs_decor.memory import MemoryOutbox, MemoryStore
from cqrs_decor.outbox import FailedRecord, Settlement
from tests.unit.cli import sample

APP = "tests.unit.cli.sample:cqrs"


@dataclass(frozen=True)
class Outcome:
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Calls `cqrs-decor` on the sample app; 200 columns wide."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("CQRS_DECOR_APP", APP)
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def call(*arguments: str) -> Outcome:
        code = main(arguments)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def app_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., App]:
    """Puts another app where the command line finds it."""

    def put(**changes: Any) -> App:
        app = sample.make_app(**changes)
        monkeypatch.setattr(sample, "cqrs", app)
        return app

    return put


@pytest.fixture
def store(app_with: Callable[..., App]) -> MemoryStore:
    """A store with parked records 1 and 3, a rescheduled one (2) and one that waits behind it (4); and the parked
    messages 1 and 2 of two consumers.
    """
    store = MemoryStore()
    app_with(database=store)
    anyio.run(_fill, store)
    return store


async def _fill(store: MemoryStore) -> None:
    outbox = store.outbox
    assert isinstance(outbox, MemoryOutbox)
    outbox.append(
        [sample.envelope(1, key="1"), sample.envelope(2, key="2"), sample.envelope(3, topic="other", key="3")]
    )
    lanes = [each.lane for each in await outbox.acquire("a relay", timedelta(seconds=60), 100, in_hand=10)]
    one, two, three = await outbox.claim(lanes, 10)
    failed = [
        FailedRecord(record=one, error="RecordTooLargeError: it has 9 bytes", delay=None),
        FailedRecord(record=two, error="RecordRejectedError: not now", delay=timedelta(hours=1)),
        FailedRecord(record=three, error="RecordRejectedError: never", delay=None),
    ]
    await outbox.settle(Settlement(lanes=lanes, failed=failed))
    outbox.append([sample.envelope(4, key="2")])
    for number, consumer in ((1, "sample.write_invoice"), (2, "sample.count")):
        await store.inbox.park(
            ParkedMessage(
                consumer=consumer,
                envelope=sample.envelope(number),
                error="ValueError",
                attempts=8,
                parked_at=sample.NOON,
            )
        )
