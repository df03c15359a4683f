"""The relay on memory: everything once committed reaches the broker, in order per key, whoever fails meanwhile."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import anyio
import pytest

from cqrs_decor import Command, IntegrationEvent, Registry, Retry, Settings, emit
from cqrs_decor.errors import LaneLostError, StoreUnavailableError
from cqrs_decor.lanes import HeldLane, Renewal
from cqrs_decor.memory import MemoryBroker, MemoryStore
from cqrs_decor.observers import ConnectionChanged, FenceRejected, LanesChanged, Observers
from cqrs_decor.outbox import ClaimedRecord, OutboxFilter
from cqrs_decor.relay import Relay
from cqrs_decor.testing import FakeClock
from tests.unit.apps import app_of, eventually
from tests.unit.relay_bench import LEASE, Bench, MoodyBroker, act, of_key, pass_time, record


@pytest.mark.feature("O5")
async def test_records_reach_the_broker_in_the_order_of_their_commits() -> None:
    """Per key, over batches and transactions."""
    bench = Bench(batch=2)
    await bench.commit("a1", "b1", "a2")
    await bench.commit("b2", "a3")

    async with bench.running():
        await eventually(lambda: bench.relay.published == 5)

        assert await bench.states() == {}
    assert of_key("a", bench.broker.reached) == ["a1", "a2", "a3"]
    assert of_key("b", bench.broker.reached) == ["b1", "b2"]


@pytest.mark.feature("O5")
async def test_a_refused_record_holds_back_its_own_key_only() -> None:
    """The others of its key would overtake it; those of other keys have nothing to do with it."""
    bench = Bench()
    bench.broker.refusals["a1"] = 1
    await bench.commit("a1", "b1", "a2", "b2")

    async with bench.running():
        await eventually(lambda: bench.relay.published == 2)
        await bench.idle()

        assert await bench.states() == {"a1": "rescheduled", "a2": "held"}
    assert bench.broker.reached == ["b1", "b2"]


@pytest.mark.feature("O5")
async def test_a_broker_that_answers_for_too_few_loses_nothing() -> None:
    """Which of them it has is unknown: none may be taken for delivered."""
    bench = Bench()
    await bench.commit("a1", "b1")
    bench.broker.publish = lambda envelopes: _answer([None] * (len(envelopes) - 1))  # type: ignore[method-assign]

    with pytest.RaisesGroup(ValueError, flatten_subgroups=True):
        await bench.relay.run()

    assert await bench.states() == {"a1": "pending", "b1": "pending"}


async def _answer(outcomes: list[None]) -> list[None]:
    return outcomes


@pytest.mark.feature("O5")
async def test_a_rescheduled_record_is_delivered_before_those_it_held_back() -> None:
    """In their old order, and with records that were committed meanwhile behind them."""
    bench = Bench()
    bench.broker.refusals["a1"] = 2
    await bench.commit("a1", "a2")

    async with bench.running():
        for attempts in (1, 2):
            await eventually(lambda: bench.broker.refusals["a1"] == 2 - attempts)  # noqa: B023 - used at once
            await bench.idle()
            (first, *_) = await bench.records()
            assert first.attempts == attempts
            await bench.commit(f"a{attempts + 2}")
            await bench.idle()
            bench.clock.advance(timedelta(hours=1))
        await eventually(lambda: bench.relay.published == 4)

    assert bench.broker.reached == ["a1", "a2", "a3", "a4"]


@pytest.mark.feature("O4")
@pytest.mark.feature("O11")
async def test_a_record_is_parked_after_its_last_attempt_and_keeps_its_place() -> None:
    """The relay gives up on it in sight of everybody, never in silence; an operator decides."""
    bench = Bench()
    bench.broker.refusals["a1"] = 3
    await bench.commit("a1", "a2", "b1")

    async with bench.running():
        for _ in range(2):
            await bench.idle()
            bench.clock.advance(timedelta(hours=1))
        await eventually(lambda: len(bench.relay.parked) == 1)
        await bench.idle()
        parked = await bench.states()
        (first, _) = await bench.records()
        await bench.store.outbox.retry([first.id], who="test")
        bench.clock.advance(LEASE / 2)
        await eventually(lambda: bench.relay.published == 3)

    assert parked == {"a1": "parked", "a2": "held"}
    assert first.attempts == 3
    assert first.error == "RecordRejectedError: Broker memory:// refused a record for topic 'told': not today."
    assert bench.broker.reached == ["b1", "a1", "a2"]


@pytest.mark.feature("O4")
async def test_a_record_that_is_too_large_is_parked_at_once() -> None:
    """No number of attempts makes it smaller."""
    clock = FakeClock()
    store, broker = MemoryStore(clock=clock), MemoryBroker(max_bytes=1)
    relay = Relay(
        store.outbox, broker, lease=LEASE, batch=10, poll_interval_s=0.001, clock=clock, observers=Observers()
    )
    transaction = await store.begin()
    transaction.add([record("a1")])
    await transaction.commit()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(relay.run)
        await eventually(lambda: len(relay.parked) == 1)
        tasks.cancel_scope.cancel()

    (stored,) = await store.outbox.find(OutboxFilter())
    assert (stored.state, stored.attempts) == ("parked", 1)


@pytest.mark.feature("O11")
async def test_a_record_that_cannot_be_read_is_parked_unpublished(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its later ones wait behind it, in the same batch as well; everything else goes on."""
    bench = Bench()
    claim = bench.store.outbox.claim

    async def claimed(*args: Any, **options: Any) -> list[ClaimedRecord]:
        return [
            replace(each, unreadable="its headers have no time") if each.envelope.id == "a2" else each
            for each in await claim(*args, **options)
        ]

    monkeypatch.setattr(bench.store.outbox, "claim", claimed)
    await bench.commit("a1", "a2", "a3", "b1")

    async with bench.running():
        await eventually(lambda: bench.relay.published == 2)
        await bench.idle()

        assert await bench.states() == {"a2": "parked", "a3": "held"}
    assert sorted(bench.broker.reached) == ["a1", "b1"]
    assert "cannot be read: its headers have no time" in bench.relay.parked[0]


@pytest.mark.feature("O5")
async def test_a_record_without_a_key_holds_back_nothing() -> None:
    """No key, no order."""
    bench = Bench()
    bench.broker.refusals["-1"] = 1
    await bench.commit("-1", "-2")

    async with bench.running():
        await eventually(lambda: bench.relay.published == 1)
        await bench.idle()

        assert await bench.states() == {"-1": "rescheduled"}
    assert bench.broker.reached == ["-2"]


@pytest.mark.feature("O4")
async def test_an_outage_of_the_broker_loses_nothing_and_counts_nothing() -> None:
    """An hour without Kafka must not use up the attempts of what waits."""
    bench = Bench(retry=Retry(max_attempts=1))
    bench.broker.down = True
    await bench.commit("a1", "a2", "b1")

    async with bench.running():
        await eventually(lambda: bench.broker.calls == 1)
        for _ in range(20):
            bench.clock.advance(timedelta(seconds=1))
            await anyio.wait_all_tasks_blocked()
        during = [(each.envelope.id, each.state, each.attempts, each.error) for each in await bench.records()]
        bench.broker.down = False
        bench.clock.advance(timedelta(seconds=1))
        await eventually(lambda: bench.relay.published == 3)

    assert [(name, state, attempts, error) for name, state, attempts, error in during] == [
        ("a1", "pending", 0, None),
        ("a2", "pending", 0, None),
        ("b1", "pending", 0, None),
    ]
    assert of_key("a", bench.broker.reached) == ["a1", "a2"]
    assert [(each.part, each.up) for each in bench.recorder.of(ConnectionChanged)] == [
        ("the broker", False),
        ("the broker", True),
    ]


@pytest.mark.feature("O4")
async def test_an_outage_is_tried_no_more_than_about_once_a_second() -> None:
    """A broker that is coming back must not be greeted by a storm."""
    bench = Bench()
    bench.broker.down = True
    await bench.commit("a1")

    async with bench.running():
        await eventually(lambda: bench.broker.calls == 1)
        for _ in range(100):
            bench.clock.advance(timedelta(milliseconds=100))
            await anyio.wait_all_tasks_blocked()

    assert 10 <= bench.broker.calls <= 15


@pytest.mark.feature("O4")
async def test_an_outage_of_the_outbox_ends_by_itself() -> None:
    """The relay waits for the database, and says so once."""
    bench = Bench()
    claim, down = bench.store.outbox.claim, [True]

    async def moody(*arguments: Any, **options: Any) -> Any:
        if down[0]:
            raise StoreUnavailableError("db", "restarting")
        return await claim(*arguments, **options)

    bench.store.outbox.claim = moody  # type: ignore[method-assign]
    await bench.commit("a1")

    async with bench.running():
        for _ in range(5):
            await anyio.sleep(0.005)
            bench.clock.advance(timedelta(seconds=1))
        down[0] = False
        bench.clock.advance(timedelta(seconds=1))
        await eventually(lambda: bench.relay.published == 1)

    (away, *_) = bench.recorder.of(ConnectionChanged)
    assert (away.part, away.up) == ("the outbox", False)


@pytest.mark.feature("O4")
async def test_a_lane_lost_while_a_batch_flies_settles_nothing() -> None:
    """The new owner repeats the batch; if the old one settled it, a record could be lost between the two."""
    bench = Bench()
    bench.broker.gate.clear()
    await bench.commit("a1", "b1")

    async with bench.running():
        await eventually(lambda: bench.broker.calls == 1)
        bench.clock.advance(LEASE)
        taken = await bench.store.outbox.acquire("another relay", LEASE, 32, in_hand=10)
        bench.broker.gate.set()
        await eventually(lambda: bool(bench.recorder.of(LanesChanged)[1:]))
        await eventually(lambda: not bench.relay._in_flight)

        claimed = await bench.store.outbox.claim([each.lane for each in taken], 10)

    assert len(taken) == 32
    assert bench.broker.reached == ["a1", "b1"]
    assert bench.relay.published == 0
    assert [each.envelope.id for each in claimed] == ["a1", "b1"]
    assert bench.recorder.of(LanesChanged)[1].lost + len(bench.recorder.of(FenceRejected)) == 32


@pytest.mark.feature("O4")
async def test_a_late_write_is_refused_by_the_fence_and_noticed() -> None:
    """A relay that stood still does not know that its lanes are another's: the store tells it."""
    bench = Bench()
    bench.broker.gate.clear()
    await bench.commit("a1")

    async with bench.running():
        await eventually(lambda: bench.broker.calls == 1)
        await act()
        # The lease ends without the relay's clock moving: as when its process was frozen.
        mine = list(bench.relay._holding.held.values())
        await bench.store.outbox.release(bench.relay.owner, mine)
        taken = await bench.store.outbox.acquire("another relay", LEASE, 32, in_hand=10)
        bench.broker.gate.set()
        await eventually(lambda: bool(bench.recorder.of(FenceRejected)))

        claimed = await bench.store.outbox.claim([each.lane for each in taken], 10)

    assert bench.relay.published == 0
    assert [each.envelope.id for each in claimed] == ["a1"]


@pytest.mark.feature("O4")
async def test_a_relay_goes_on_when_its_lanes_are_lost_while_they_are_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store may tidy up under the lanes that it has just renewed. By then the relay may have stood still."""
    bench = Bench()
    renew, losses = bench.store.outbox.renew, [True]

    async def renew_and_lose(owner: str, lanes: Sequence[HeldLane], lease: timedelta) -> Renewal:
        if lanes and losses:
            losses.pop()
            await bench.store.outbox.release(owner, lanes)
            raise LaneLostError(owner, [lane.number for lane in lanes])
        return await renew(owner, lanes, lease)

    monkeypatch.setattr(bench.store.outbox, "renew", renew_and_lose)
    async with bench.running():
        await eventually(lambda: bench.relay.lanes_held == 32)
        await pass_time(bench.clock, LEASE.total_seconds() / 2)
        await bench.commit("a1")
        await eventually(lambda: bench.relay.published == 1)

    assert not losses
    assert len(bench.recorder.of(FenceRejected)) == 32


@pytest.mark.feature("O4")
async def test_nothing_is_published_near_the_end_of_a_lease() -> None:
    """What is sent then could land after the next owner's first batch."""
    bench = Bench()

    async with bench.running():
        await eventually(lambda: bench.relay.lanes_held == 32)

        async def hangs(*arguments: Any) -> Any:
            await asyncio.Event().wait()

        bench.store.outbox.renew = hangs  # type: ignore[method-assign]
        bench.clock.advance(LEASE * 0.8)
        await bench.commit("a1")
        for _ in range(20):
            await anyio.sleep(0.001)

        assert bench.broker.calls == 0
        assert await bench.states() == {"a1": "pending"}


@pytest.mark.parametrize("turns", range(8))
async def test_what_was_left_behind_near_the_end_of_a_lease_goes_out_after_its_renewal(turns: int) -> None:
    """A batch that is left behind blocks those claimed after it, which are left behind as well. While the next one was
    always claimed before the last was settled, that never ended. How many turns the renewal takes decides what is under
    way when it comes.
    """
    bench = Bench(batch=2)
    renew, claim = bench.store.outbox.renew, bench.store.outbox.claim

    async def slow_renew(*arguments: Any) -> Any:
        for _ in range(turns):
            await anyio.lowlevel.checkpoint()
        return await renew(*arguments)

    async def slow_claim(*arguments: Any, **options: Any) -> Any:
        for _ in range(3):
            await anyio.lowlevel.checkpoint()
        return await claim(*arguments, **options)

    bench.store.outbox.renew = slow_renew  # type: ignore[method-assign]
    bench.store.outbox.claim = slow_claim  # type: ignore[method-assign]
    bench.broker.down = True
    names = [f"a{number:02}" for number in range(40)]
    await bench.commit(*names)

    async with bench.running():
        await eventually(lambda: bench.broker.calls == 1)
        await anyio.wait_all_tasks_blocked()
        bench.broker.down = False
        bench.clock.advance(LEASE * 0.8)
        await eventually(lambda: bench.relay.published == 40)

    assert bench.broker.reached == names


async def test_a_batch_may_fly_past_the_end_of_the_lease_that_it_began_under() -> None:
    """Renewals carry it on. A broker that needs its whole time would else be cut off near the end of each lease."""
    bench = Bench()
    bench.broker.gate.clear()

    async with bench.running():
        await act()
        bench.store.outbox.renew, renew = _away, bench.store.outbox.renew  # type: ignore[method-assign]
        await pass_time(bench.clock, 8)
        await bench.commit("a1")
        await eventually(lambda: bench.broker.calls == 1)
        bench.store.outbox.renew = renew  # type: ignore[method-assign]
        await pass_time(bench.clock, 8)
        bench.broker.gate.set()
        await eventually(lambda: bench.relay.published == 1)

    assert bench.broker.calls == 1
    assert bench.broker.reached == ["a1"]


async def _away(*arguments: Any) -> Any:
    raise StoreUnavailableError("db", "restarting")


async def test_a_batch_is_cut_off_near_the_end_of_a_lease_that_is_not_renewed() -> None:
    """The control of the test above: what is still sent then could land after the first records of the next owner."""
    bench = Bench()
    bench.broker.gate.clear()

    async with bench.running():
        await act()
        bench.store.outbox.renew = _away  # type: ignore[method-assign]
        await pass_time(bench.clock, 8)
        await bench.commit("a1")
        await eventually(lambda: bench.broker.calls == 1)
        await pass_time(bench.clock, 2.75)
        bench.broker.gate.set()
        await act()

        assert (bench.relay.published, bench.broker.reached) == (0, [])
        assert await bench.states() == {"a1": "pending"}


@pytest.mark.feature("O4")
async def test_a_broker_that_takes_too_long_is_away() -> None:
    """A connection that died in silence must not hold up a relay until its lease ends."""
    bench = Bench()
    bench.broker.gate.clear()
    await bench.commit("a1")

    async with bench.running():
        await eventually(lambda: bench.broker.calls == 1)
        await pass_time(bench.clock, 8.75)
        before = bench.recorder.of(ConnectionChanged)
        await pass_time(bench.clock, 1)
        after = bench.recorder.of(ConnectionChanged)
        bench.broker.gate.set()
        await eventually(lambda: bench.relay.published == 1)

    assert before == []
    assert [(each.part, each.up) for each in after] == [("the broker", False)]
    assert bench.broker.reached == ["a1"]


async def test_delivered_records_are_kept_where_a_history_is_wanted() -> None:
    """`history_days` above 0: operators see what went out, and can replay it."""
    store, broker = MemoryStore(), MoodyBroker()
    async with app_of(database=store, broker=broker, run="relay", settings=Settings(history_days=1)) as app:
        await _commit(store, "a1")
        await eventually(lambda: app.relay is not None and app.relay.published == 1)

    (kept,) = await store.outbox.find(OutboxFilter(state="delivered"))
    assert kept.envelope.id == "a1"


async def _commit(store: MemoryStore, *ids: str) -> None:
    transaction = await store.begin()
    transaction.add([record(each) for each in ids])
    await transaction.commit()


@pytest.mark.feature("O4")
@pytest.mark.parametrize("decision", ["retry", "discard"])
async def test_a_key_goes_on_in_order_after_a_decision_about_its_parked_record(decision: str) -> None:
    """Whatever was written behind it meanwhile; and nobody has to wake the relay for it."""
    bench = Bench(retry=Retry(max_attempts=1))
    bench.broker.refusals["a1"] = 1
    await bench.commit("a1", "a2", "b1")

    async with bench.running():
        await eventually(lambda: len(bench.relay.parked) == 1)
        await bench.commit("a3")
        await bench.idle()
        held = await bench.states()
        (parked,) = await bench.store.outbox.find(OutboxFilter(state="parked"))
        await getattr(bench.store.outbox, decision)([parked.id], who="test")
        await pass_time(bench.clock, 6)
        await bench.commit("a4")
        await bench.idle()

    assert held == {"a1": "parked", "a2": "held", "a3": "held"}
    rest = ["a2", "a3", "a4"]
    assert bench.broker.reached == ["b1", *(["a1", *rest] if decision == "retry" else rest)]


@pytest.mark.feature("B11")
async def test_a_stop_settles_what_flies_and_gives_the_lanes_back() -> None:
    """The next relay takes over at once instead of waiting for a lease to end."""
    bench = Bench()
    bench.broker.gate.clear()
    await bench.commit("a1")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.relay.run)
        await eventually(lambda: bench.broker.calls == 1)
        bench.relay.stop()
        bench.broker.gate.set()

    assert bench.relay.published == 1
    assert await bench.states() == {}
    assert len(await bench.store.outbox.acquire("next", LEASE, 32, in_hand=10)) == 32


@pytest.mark.feature("B11")
async def test_a_stop_during_an_outage_ends_soon_and_loses_nothing() -> None:
    """A deployment must not wait for the broker."""
    bench = Bench()
    bench.broker.down = True
    await bench.commit("a1")
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(bench.relay.run)
            await eventually(lambda: bench.broker.calls == 1)
            bench.relay.stop()
            await anyio.wait_all_tasks_blocked()
            bench.clock.advance(timedelta(seconds=1))

    assert await bench.states() == {"a1": "pending"}


@pytest.mark.feature("O4")
async def test_two_relays_share_an_outbox_without_publishing_anything_twice() -> None:
    """Each record is in one relay's hands at a time."""
    one = Bench()
    other = Bench()
    other.relay = Relay(
        one.store.outbox,
        one.broker,
        lease=LEASE,
        batch=3,
        poll_interval_s=0.001,
        clock=one.clock,
        observers=Observers(),
    )
    names = [f"{key}{number}" for number in range(5) for key in "abcdefgh"]
    await one.commit(*names)

    async with one.running(), other.running():
        await eventually(lambda: one.relay.published + other.relay.published == len(names))

    assert sorted(one.broker.reached) == sorted(names)
    for key in "abcdefgh":
        assert of_key(key, one.broker.reached) == of_key(key, names)


class Told(IntegrationEvent, topic="told", key="name", name="relay.told"):
    name: str


class Tell(Command[None]):
    name: str


@pytest.mark.feature("O1")
async def test_a_commit_wakes_the_relay_of_its_process() -> None:
    """Low latency without polling: the interval is an hour here."""
    sales = Registry("sales")

    @sales.command_handler
    async def tell(command: Tell) -> None:
        emit(Told(name=command.name))

    broker = MoodyBroker()
    settings = Settings(poll_interval_s=3600)
    async with app_of(sales, broker=broker, run="relay", settings=settings) as app:
        assert app.relay is not None
        await eventually(lambda: app.relay is not None and app.relay.idle)
        for number in range(3):
            await app.send(Tell(name="a"))
            await eventually(lambda: len(broker.reached) == number + 1)  # noqa: B023 - used at once


@pytest.mark.feature("O11")
async def test_the_relay_publishes_what_this_process_has_no_class_for() -> None:
    """It moves bytes: one relay serves rows of every version of every service on the database."""
    bench = Bench()
    await bench.commit("a1")

    async with bench.running():
        await eventually(lambda: bench.relay.published == 1)

    assert bench.broker.reached == ["a1"]
