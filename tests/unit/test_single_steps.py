"""A record that kills relays is found, and only it is parked; outages and stops are no crashes."""

from collections.abc import Sequence
from typing import Any

import anyio
import pytest

from cqrs_decor import Envelope
from cqrs_decor.errors import BrokerError
from cqrs_decor.observers import CrashSuspected
from cqrs_decor.outbox import OutboxFilter
from tests.unit.apps import eventually
from tests.unit.relay_bench import LEASE, Bench, MoodyBroker, Node, act, of_key, pass_time, running

pytestmark = pytest.mark.feature("O4")

KEYS = "abcdefghijklmnopqrstuvwxyz"
POISON = "k2"


class DeadlyBroker(MoodyBroker):
    """Whoever publishes the poison dies of it: the call never comes back, and the test ends the relay."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[str]] = []
        self.deadly = True
        self.died = anyio.Event()

    async def publish(self, envelopes: Sequence[Envelope]) -> Sequence[BrokerError | None]:
        names = [envelope.id for envelope in envelopes]
        self.batches.append(names)
        if self.deadly and POISON in names:
            self.died.set()
            await anyio.sleep_forever()
        return await super().publish(envelopes)


async def die_of_the_poison(bench: Bench, broker: DeadlyBroker, *, relays: int) -> Node:
    """One relay after another meets the poison; returns the next one, which is not running yet."""
    for _ in range(relays):
        broker.died = anyio.Event()
        victim = Node(bench, broker=broker)
        async with running(victim):
            await act()
            with anyio.fail_after(10):
                await broker.died.wait()
            await victim.kill()
        bench.clock.advance(LEASE)
    return Node(bench, broker=broker)


async def test_a_record_that_kills_relays_is_parked_and_nothing_else() -> None:
    """One death in a batch, one in a step beside others, two alone: four relays, then the rest gets through."""
    bench, broker = Bench(), DeadlyBroker()
    await bench.commit(*(f"{key}{number}" for number in (1, 2, 3) for key in KEYS))

    heir = await die_of_the_poison(bench, broker, relays=4)
    async with running(heir):
        await act()
        await eventually(lambda: heir.relay.parked != [])
        await pass_time(bench.clock, 2)

        assert await bench.states() == {POISON: "parked", "k3": "held"}
    (parked,) = await bench.store.outbox.find(OutboxFilter(state="parked"))
    assert parked.error is not None
    assert parked.error.startswith("RecordKillsRelaysError: 3 relays in a row vanished with record ")
    assert set(broker.reached) == {f"{key}{number}" for number in (1, 2, 3) for key in KEYS} - {POISON, "k3"}
    for key in KEYS:
        reached = list(dict.fromkeys(of_key(key, broker.reached)))
        assert reached == sorted(reached)


async def test_a_record_under_accusation_goes_alone() -> None:
    """Nothing else of the relay is in flight, so that nothing else can have been the cause if it vanishes as well."""
    bench, broker = Bench(), DeadlyBroker()
    await bench.commit(*(f"{key}{number}" for number in (1, 2, 3) for key in KEYS))

    accused = await die_of_the_poison(bench, broker, relays=2)
    flying: list[tuple[int, list[str]]] = []
    publish = broker.publish

    async def watched(envelopes: Sequence[Envelope]) -> Any:
        flying.append((len(accused.relay._flying), [each.id for each in envelopes]))
        return await publish(envelopes)

    broker.publish = watched  # type: ignore[method-assign]
    broker.deadly = False
    async with running(accused):
        await eventually(lambda: POISON in broker.reached)

    until_poison = flying[: next(n for n, (_, names) in enumerate(flying) if POISON in names) + 1]
    assert {(count, len(names)) for count, names in until_poison} == {(1, 1)}


async def test_suspects_go_in_single_steps_up_to_the_last_that_was_in_hand_and_then_in_batches() -> None:
    """What nobody had in hand is above suspicion: single steps are slow."""
    bench, broker = Bench(), DeadlyBroker()
    await bench.commit(POISON, *(f"a{number}" for number in range(1, 6)))
    await die_of_the_poison(bench, broker, relays=1)
    broker.deadly = False
    broker.batches.clear()
    await bench.commit(*(f"z{number}" for number in range(1, 21)))
    heir = Node(bench, broker=broker, batch=2)  # it has ten records in hand at most, of whichever lane

    async with running(heir):
        await eventually(lambda: len(broker.reached) == 26)
        suspicions = heir.recorder.of(CrashSuspected)

    assert {(each.part, each.crashes) for each in suspicions} == {("relay", 0)}
    assert [len(of_key("a", batch)) for batch in broker.batches if of_key("a", batch)] == [1] * 5
    assert [len(of_key("z", batch)) for batch in broker.batches if of_key("z", batch)] == [1] * 10 + [2] * 5


async def test_other_lanes_go_in_batches_meanwhile() -> None:
    """The lanes that a relay has held all along are above suspicion: they keep their pace."""
    bench, broker = Bench(), DeadlyBroker()
    other, victim = Node(bench, broker=broker), Node(bench, broker=broker)
    async with running(other, victim):
        await pass_time(bench.clock, 8)
        healthy = other.relay._holding.held.keys()
        await bench.commit(POISON)
        (poison,) = await bench.records()
        if poison.lane in healthy:
            other, victim = victim, other
        victim.relay.wake()
        await broker.died.wait()
        await victim.kill()
        broker.deadly = False
        broker.gate.clear()
        await pass_time(bench.clock, LEASE.total_seconds() + 1)
        await bench.commit(*(f"{key}{number}" for number in range(3, 9) for key in KEYS))
        other.relay.wake()
        await act()
        broker.gate.set()
        await eventually(lambda: len(broker.reached) == 6 * len(KEYS) + 1)

    sizes = [len(batch) for batch in broker.batches]
    assert max(sizes) > 32


async def die_in_outages(bench: Bench, *, relays: int) -> None:
    """A relay vanishes with a batch in hand; each of its heirs takes over while the broker is away, and is killed."""
    bench.broker.gate.clear()
    for number in range(relays + 1):
        victim = Node(bench)
        async with running(victim):
            calls = bench.broker.calls
            await act()
            await eventually(lambda: bench.broker.calls > calls)  # noqa: B023 - used at once
            await act()
            await victim.kill()
        bench.clock.advance(LEASE)
        if number == 0:
            bench.broker.gate.set()
            bench.broker.down = True
    bench.broker.down = False


async def test_an_outage_of_the_broker_is_no_crash() -> None:
    """Five minutes without a broker, and a container that is restarted all the while, must not park healthy records."""
    bench = Bench()
    await bench.commit("a1", "b1")

    await die_in_outages(bench, relays=4)
    heir = Node(bench)
    async with running(heir):
        await eventually(lambda: heir.relay.published == 2)

    assert not heir.relay.parked


async def test_marks_that_are_left_on_in_an_outage_park_healthy_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above."""
    bench = Bench()
    await bench.commit("a1", "b1")

    async def nothing(*arguments: Any) -> None:
        pass

    monkeypatch.setattr(bench.store.outbox, "unmark", nothing)
    await die_in_outages(bench, relays=4)

    assert "parked" in (await bench.states()).values()


async def test_a_stop_in_the_middle_of_a_step_is_no_crash() -> None:
    """Ten deployments in a row, each while the same record is in hand."""
    bench, broker = Bench(), DeadlyBroker()
    await bench.commit(POISON)
    heir = await die_of_the_poison(bench, broker, relays=1)
    for _ in range(5):
        broker.died = anyio.Event()
        async with running(heir):
            await broker.died.wait()
        heir = Node(bench, broker=broker)
    broker.deadly = False

    async with running(heir):
        await eventually(lambda: broker.reached == [POISON])
    assert not heir.relay.parked


async def test_lanes_under_suspicion_are_not_given_to_a_newcomer() -> None:
    """It would not know of the suspicion, and claim the poison in a batch."""
    bench, broker = Bench(), DeadlyBroker()
    await bench.commit(*(f"{key}{number}" for number in (1, 2) for key in KEYS))
    heir = await die_of_the_poison(bench, broker, relays=1)
    newcomer = Node(bench, broker=broker)
    broker.deadly = False
    broker.gate.clear()

    async with running(heir) as tasks:
        await pass_time(bench.clock, 1)
        suspected = set(heir.relay._holding.suspicions)
        tasks.start_soon(newcomer.run)
        await pass_time(bench.clock, 7)
        given_away = heir.relay._holding.surplus & suspected
        broker.gate.set()
        await pass_time(bench.clock, 10)

        assert max(suspected) >= 16  # one that would else be the first to go
        assert given_away == set()
        assert (heir.held, newcomer.held) == (16, 16)
        assert await bench.states() == {}
