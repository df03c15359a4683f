"""When a process is live and when it is ready: a probe that is wrong restarts healthy ones, or none."""

from datetime import timedelta
from typing import Any

import pytest

from cqrs_decor import Settings
from cqrs_decor.counters import Counters
from cqrs_decor.errors import StoreUnavailableError
from cqrs_decor.health import Health, Verdict
from cqrs_decor.memory import MemoryStore
from cqrs_decor.observers import ConnectionChanged, FenceRejected, PartitionsPaused, WakeUpChanged
from cqrs_decor.outbox import Backlog
from cqrs_decor.testing.clock import FakeClock

pytestmark = pytest.mark.feature("B11")


class Loop:
    """A relay or a worker, as far as health looks at it."""

    def __init__(self, clock: FakeClock) -> None:
        self.progress_at: float | None = clock.elapsed()
        self.lanes_held = 30
        self.published = 5
        self.handled = 6
        self.subscribed = True

    async def backlog(self) -> int:
        return 7


class StandIn:
    """A running app. `away` makes its database raise."""

    def __init__(self, clock: FakeClock) -> None:
        self.relay = Loop(clock)
        self.worker = Loop(clock)
        self.store = MemoryStore()
        self.service = "shop"
        self.settings = Settings(lease_s=10)
        self.away = False
        self.asked = 0


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def app(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    app = StandIn(clock)

    async def backlog() -> Backlog:
        app.asked += 1
        if app.away:
            raise StoreUnavailableError("memory://", "away")
        return Backlog(pending=12, parked=2, oldest=timedelta(seconds=90))

    monkeypatch.setattr(app.store.outbox, "backlog", backlog)
    return app


@pytest.fixture
def counters() -> Counters:
    return Counters()


@pytest.fixture
def health(app: Any, clock: FakeClock, counters: Counters) -> Health:
    health = Health(app, clock, counters)
    health.note_started()
    return health


def moved(clock: FakeClock, seconds: float, *loops: Loop) -> None:
    """Time passes, and these loops make progress."""
    clock.advance(timedelta(seconds=seconds))
    for loop in loops:
        loop.progress_at = clock.elapsed()


@pytest.mark.parametrize("silent", ["relay", "worker"])
async def test_a_loop_that_says_nothing_for_too_long_is_not_live(
    app: StandIn, clock: FakeClock, health: Health, silent: str
) -> None:
    """That is what a restart is for. The other one goes on, so that the process looks busy."""
    other = app.worker if silent == "relay" else app.relay
    moved(clock, health.silence_limit_s - 1, other)
    assert (await health.live()).good

    moved(clock, 2, other)
    verdict = await health.live()

    assert not verdict.good
    assert verdict.document["stuck"] == [silent]
    assert (await health.ready()).document["reasons"] == [f"the {silent} is stuck"]


async def test_a_loop_that_never_gets_anywhere_is_not_live(app: StandIn, clock: FakeClock, health: Health) -> None:
    """Hung at its first step: it has no last one."""
    app.relay.progress_at = None
    moved(clock, health.silence_limit_s - 1, app.worker)
    assert (await health.live()).good

    moved(clock, 2, app.worker)

    assert (await health.live()).document["stuck"] == ["relay"]


async def test_an_outage_is_not_un_live(app: StandIn, clock: FakeClock, counters: Counters, health: Health) -> None:
    """Restarting every process does not bring a database back, and makes its return harder."""
    counters.notice(ConnectionChanged(part="the outbox", up=False))
    for _ in range(20):
        moved(clock, 10)
        assert (await health.live()).good

    counters.notice(ConnectionChanged(part="the outbox", up=True))
    moved(clock, health.silence_limit_s - 1)
    assert (await health.live()).good
    moved(clock, 2)
    assert not (await health.live()).good


async def test_ready_says_what_waits_and_what_is_held(health: Health, counters: Counters) -> None:
    """One look tells an operator where to look next."""
    counters.notice(WakeUpChanged(works=False, reason="a pooler"))
    counters.notice(PartitionsPaused(group="shop", paused=3))
    counters.notice(FenceRejected(owner="relay", lane=1))

    verdict = await health.ready()

    assert verdict == Verdict(
        good=True,
        document={
            "status": "ready",
            "reasons": [],
            "uptime_s": 0.0,
            "service": "shop",
            "away": [],
            "silent_s": {"relay": 0.0, "worker": 0.0},
            "relay": {"lanes_held": 30, "lanes": 32, "published": 5, "wake_ups_work": False},
            "worker": {"subscribed": True, "handled": 6, "paused_partitions": 3},
            "pending": 12,
            "lag_s": 90.0,
            "parked": {"outbox": 2, "inbox": 0},
            "to_consume": 7,
            "counts": {"FenceRejected": 1, "PartitionsPaused": 1, 'WakeUpChanged{works="False"}': 1},
        },
    )


async def test_what_is_away_is_degraded_and_named(app: StandIn, counters: Counters, health: Health) -> None:
    """By the loops that lost it, or by asking."""
    counters.notice(ConnectionChanged(part="the broker", up=False))
    assert (await health.ready()).document["reasons"] == ["the broker is away"]


async def test_a_database_that_does_not_answer_is_degraded_before_a_loop_has_noticed(
    app: StandIn, health: Health
) -> None:
    """A relay may not look for half a second, and a worker alone has no reason to."""
    app.away = True

    verdict = await health.ready()

    assert not verdict.good
    assert verdict.document["status"] == "degraded"
    assert (await health.live()).good


async def test_a_worker_that_is_not_subscribed_is_not_ready(app: StandIn, health: Health) -> None:
    """A rolling deployment must not stop the old one before the new one reads."""
    app.worker.subscribed = False

    assert (await health.ready()).document["reasons"] == ["the worker is not subscribed"]


async def test_while_it_starts_and_stops_it_is_live_and_not_ready(
    app: Any, clock: FakeClock, counters: Counters
) -> None:
    """Draining may take longer than a loop may be silent, and must not be cut off by a restart."""
    health = Health(app, clock, counters)
    moved(clock, 1_000)
    starting = await health.ready()
    assert (await health.live()).good
    health.note_started()
    health.note_stopping()
    stopping = await health.ready()

    assert (starting.good, starting.document["status"]) == (False, "starting")
    assert (stopping.good, stopping.document["status"]) == (False, "stopping")
    assert (await health.live()).good


async def test_probes_do_not_become_load(app: StandIn, clock: FakeClock, health: Health) -> None:
    """Anybody who reaches the port may ask, as often as they like."""
    for _ in range(50):
        await health.ready()
    clock.advance(timedelta(seconds=1))
    await health.ready()

    assert app.asked == 2
