"""What the status says of a running app."""

from datetime import timedelta
from typing import Any

import pytest

from cqrs_decor.cli.status import Watch
from cqrs_decor.errors import StoreUnavailableError
from cqrs_decor.memory import MemoryStore
from cqrs_decor.outbox import Backlog
from cqrs_decor.testing.clock import FakeClock
from tests.unit.cli import sample


class _Loop:
    """A relay or a worker, as far as the status looks at it."""

    def __init__(self) -> None:
        self.published = 0
        self.handled = 0
        self.lanes_held = 30

    async def backlog(self) -> int:
        return 7


class _App:
    def __init__(self, *, relay: Any, worker: Any) -> None:
        self.relay = relay
        self.worker = worker
        self.store = MemoryStore()


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Any:
    app = _App(relay=_Loop(), worker=_Loop())

    async def backlog() -> Backlog:
        return Backlog(pending=1_234, parked=2, oldest=timedelta(seconds=90))

    monkeypatch.setattr(app.store.outbox, "backlog", backlog)
    return app


async def test_rates_are_counted_between_two_looks(app: Any) -> None:
    """Totals of a process that runs for weeks say nothing."""
    clock = FakeClock()
    watch = Watch(app, clock, ask_every_s=5)
    await watch.read()
    app.relay.published, app.worker.handled = 50, 20
    clock.advance(timedelta(seconds=2))

    reading = await watch.read()

    assert (reading.published_per_s, reading.handled_per_s) == (25.0, 10.0)
    assert reading.line() == ("published 25/s  handled 10/s  pending 1.2k  parked 2  lanes 30/32  lag 2m")


async def test_the_line_fits_into_80_columns(app: Any) -> None:
    """It is one line at the bottom, with large numbers too."""
    app.relay.published = app.worker.handled = 99_999
    clock = FakeClock()
    watch = Watch(app, clock, ask_every_s=5)
    clock.advance(timedelta(seconds=1))

    line = (await watch.read()).line()

    assert line.startswith("published 100k/s  handled 100k/s")
    assert len(line) <= 80


async def test_the_database_is_asked_less_often_than_the_counters(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Watching must not become load."""
    asked: list[None] = []

    async def backlog() -> Backlog:
        asked.append(None)
        return Backlog(pending=0, parked=0, oldest=None)

    monkeypatch.setattr(app.store.outbox, "backlog", backlog)
    clock = FakeClock()
    watch = Watch(app, clock, ask_every_s=5)
    for _ in range(10):
        await watch.read()
        clock.advance(timedelta(seconds=1))

    assert len(asked) == 2


async def test_a_database_that_is_away_leaves_question_marks(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The status goes on: that is when it is looked at."""

    async def backlog() -> Backlog:
        raise StoreUnavailableError("memory://", "away")

    monkeypatch.setattr(app.store.outbox, "backlog", backlog)

    reading = await Watch(app, FakeClock(), ask_every_s=5).read()

    assert "pending ?  parked ?" in reading.line()
    assert reading.document()["pending"] is None


async def test_a_worker_alone_has_no_lanes() -> None:
    """The relay runs in another process."""
    stand_in: Any = _App(relay=None, worker=_Loop())

    reading = await Watch(stand_in, FakeClock(), ask_every_s=5).read()

    assert "lanes -" in reading.line()
    assert reading.document()["to_consume"] == 7


def test_the_sample_is_an_app() -> None:
    """What stands in for it here has the same properties."""
    assert {"relay", "worker", "store"} <= set(dir(sample.cqrs))
