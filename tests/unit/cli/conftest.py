"""Runs command lines in this process."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from cqrs_decor import App
from cqrs_decor.cli import main
from tests.unit.cli import sample
from tests.unit.cli.desk import Desk, message, record

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
def store(app_with: Callable[..., App]) -> Desk:
    """A store with parked records 1 and 3, a rescheduled one (2) and one that waits behind it (4); and the parked
    messages 1 and 2 of two consumers.
    """
    desk = Desk()
    desk.desk_outbox.records = [
        record(1, topic="sample-orders"),
        record(2, "rescheduled", topic="sample-orders", key="2", error="RecordRejectedError: not now"),
        record(3, topic="other", key="3", error="RecordRejectedError: never"),
        record(4, "held", topic="sample-orders", key="2", error=""),
    ]
    desk.desk_inbox.messages = [
        message(1, consumer="sample.write_invoice", topic="sample-orders"),
        message(2, consumer="sample.count", topic="sample-orders"),
    ]
    app_with(database=desk)
    return desk
